"""The real tokenizers and chat templates of the models: ids as transformers gives them, and the right mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from hypothesis import given
from real_tokenizers import real_files
from test_chat import ANY_CONVERSATION, CHATML, CONVERSATIONS, Pair, messages, supervised_text
from transformers import AutoTokenizer

from adapt_recipes.data import ChatTokenizer

pytestmark = pytest.mark.network


class Real(NamedTuple):
    """What is known of a model.

    Attributes:
        files: the tokenizer's among ``real_tokenizers.MAKE``.
        asked: the ids that ask for an answer.
        end, shown: as in ``Pair``.
        template: the template's text, or its files among ``real_tokenizers.MAKE``; None: the tokenizer's own.
    """

    files: str
    vocab_size: int
    bos: int | None
    asked: list[int]
    end: str
    shown: Callable[[str], str] = str
    template: str | None = None


QWEN = [151644, 77091, 198]
LLAMA = [128006, 78191, 128007, 271]
MODELS = {
    "gemma3": Real("gemma3", 262145, 2, [105, 4368, 107], "<end_of_turn>", str.strip),
    "qwen3": Real("qwen3", 151669, None, QWEN, "<|im_end|>", lambda answer: answer.lstrip("\n")),
    "qwen1_5": Real("qwen3", 151669, None, QWEN, "<|im_end|>", template=CHATML),
    "llama3": Real("llama3", 128256, 128000, LLAMA, "<|eot_id|>", str.strip),
    "llama3_2": Real("llama3", 128256, 128000, LLAMA, "<|eot_id|>", template="llama3_2_template"),
    "smollm2": Real("smollm2", 49152, None, [1, 520, 9531, 198], "<|im_end|>"),
}


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.cache.mkdir("tokenizers")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(model: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    real = MODELS[model]
    folder = real_files(real.files, cache)
    theirs = AutoTokenizer.from_pretrained(folder)
    file = None
    if real.template == CHATML:
        file = tmp_path_factory.mktemp(model) / "chatml.jinja"
        file.write_text(CHATML)
    elif real.template:
        file = real_files(real.template, cache) / "chat_template.jinja"
    if file:
        theirs.chat_template = file.read_text()
    return Pair(ChatTokenizer(folder, chat_template=file), theirs, real.end, real.shown)


def fits(model: str, conversation: list[dict[str, str]]) -> list[dict[str, str]]:
    """Qwen3's template takes one answer alone."""
    turns = [message for message in conversation if message["role"] != "system"]
    return conversation[: len(conversation) - len(turns) + 2] if model == "qwen3" else conversation


def test_it_is_the_models(model: str, pair: Pair) -> None:
    real = MODELS[model]
    prompt = pair.theirs.apply_chat_template(messages("a"), return_dict=False, add_generation_prompt=True)
    assert prompt[-len(real.asked) :] == real.asked
    ids, _ = pair.ours.encode(messages("a", "b"))
    assert any(ids[start : start + len(real.asked)] == real.asked for start in range(len(ids)))
    assert pair.ours.vocab_size == len(pair.theirs) == real.vocab_size
    assert pair.ours.eos_ids == (pair.theirs.eos_token_id,) == (pair.theirs.convert_tokens_to_ids(real.end),)
    assert pair.ours.pad_id == (pair.theirs.pad_token_id or 0)


@pytest.mark.parametrize(("files", "makers"), [("llama3", "llama3_vocabulary"), ("qwen3", "qwen_vocabulary")])
def test_the_vocabulary_is_its_makers(cache: Path, files: str, makers: str) -> None:
    tokenizer = json.loads((real_files(files, cache) / "tokenizer.json").read_bytes())
    assert tokenizer["model"]["vocab"] == json.loads((real_files(makers, cache) / "vocab.json").read_bytes())


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_are_transformers_and_only_answers_count(
    model: str, pair: Pair, conversation: list[dict[str, str]]
) -> None:
    pair.check(fits(model, conversation))


@given(conversation=ANY_CONVERSATION)
def test_any_text(model: str, pair: Pair, conversation: list[dict[str, str]]) -> None:
    pair.check(fits(model, conversation))


def test_one_bos_and_it_does_not_count(model: str, pair: Pair) -> None:
    conversation = fits(model, messages("the cat?", "the dog.", "and?", "no.", system="Be brief."))
    ids, supervised = pair.ours.encode(conversation)
    if bos := MODELS[model].bos:
        assert ids[0] == bos and ids.count(bos) == 1 and not supervised[0]
    assert [message["content"] in pair.text(ids) for message in conversation] == [True] * len(conversation)


def test_a_special_token_typed_by_a_user_is_that_token_and_does_not_count(model: str, pair: Pair) -> None:
    end = MODELS[model].end
    ids, supervised = pair.ours.encode(messages(f"what does {end} do?", f"{end} ends."))
    end_id = pair.theirs.convert_tokens_to_ids(end)
    others = pair.ours.encode(messages("what does it do?", "it ends."))[0].count(end_id)
    assert ids.count(end_id) == others + 2, "as in transformers"
    assert supervised_text(pair.theirs, ids, supervised) == f"{end} ends.{end}"


def test_a_saved_folder_is_the_same_tokenizer(model: str, pair: Pair, tmp_path: Path) -> None:
    pair.ours.save(tmp_path)
    assert ChatTokenizer(tmp_path).fingerprint == pair.ours.fingerprint
    again = pair._replace(theirs=AutoTokenizer.from_pretrained(tmp_path))
    assert again.theirs.chat_template == pair.theirs.chat_template
    for conversation in CONVERSATIONS:
        again.check(fits(model, conversation))


@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
def test_qwen3_takes_one_answer_with_or_without_thoughts(pair: Pair) -> None:
    with pytest.raises(
        ValueError, match=r"^the chat template is not prefix-stable: .*\(Qwen3's template drops earlier thoughts"
    ):
        pair.ours.encode(messages("a", "b", "c", "d"))
    answer = "<think>\nTwo and two.\n</think>\n\nFour."
    ids, supervised = pair.ours.encode(messages("2 + 2?", answer))
    assert ids == pair.reference(messages("2 + 2?", answer))
    assert supervised_text(pair.theirs, ids, supervised) == answer + "<|im_end|>"
    prompt = pair.theirs.apply_chat_template(messages("2 + 2?"), return_dict=False, add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt and supervised.index(True) == len(prompt), "asked with thinking enabled"


@pytest.mark.parametrize("model", ["llama3_2"], indirect=True)
def test_llama3_2_has_the_same_day_every_day(pair: Pair, cache: Path) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime(2031, 1, 2)

    template = real_files("llama3_2_template", cache) / "chat_template.jinja"
    conversation = messages("a", "b")
    with mock.patch("transformers.utils.chat_template_utils.datetime", Later):
        theirs = pair.theirs.apply_chat_template(conversation, return_dict=False)
        ours, _ = ChatTokenizer(pair.theirs.name_or_path, chat_template=template).encode(conversation)
    assert "Today Date: 02 Jan 2031\n" in pair.text(theirs)
    assert "Today Date: 26 Jul 2024\n" in pair.text(ours) and ours == pair.ours.encode(conversation)[0]
