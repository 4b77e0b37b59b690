"""The real tokenizers and chat templates of the models: ids as transformers gives them, and the right mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_tokenizers import real_files
from test_chat import (
    ANY_CONVERSATION,
    CHATML,
    CONVERSATIONS,
    INST,
    Pair,
    conversation,
    encode,
    messages,
    supervised_text,
)
from test_chat_tools import TOOLS, call, result, thoughtful
from transformers import AutoTokenizer

from adapt_recipes.data import ChatTokenizer

pytestmark = pytest.mark.network


class Real(NamedTuple):
    """What is known of a model.

    Attributes:
        files: the tokenizer's among ``real_tokenizers.MAKE``.
        asked: the ids that ask for an answer.
        end, shown: as in ``Pair``.
        takes: what the template reads besides text: tools, calls, results and thoughts.
        template: the template's text, or its files among ``real_tokenizers.MAKE``; None: the tokenizer's own.
    """

    files: str
    vocab_size: int
    bos: int | None
    asked: list[int]
    end: str
    shown: Callable[[str], str] = str
    template: str | None = None
    takes: tuple[str, ...] = ()


def qwen3(answer: str) -> str:
    """The model is asked before its thoughts, so it has to write that there are none."""
    return "<think>\n\n</think>\n\n" + answer.lstrip("\n")


QWEN = [151644, 77091, 198]
LLAMA = [128006, 78191, 128007, 271]
MODELS = {
    "gemma3": Real("gemma3", 262145, 2, [105, 4368, 107], "<end_of_turn>", str.strip),
    "qwen3": Real("qwen3", 151669, None, QWEN, "<|im_end|>", qwen3, takes=("tools", "calls", "thoughts")),
    "qwen1_5": Real("qwen3", 151669, None, QWEN, "<|im_end|>", template=CHATML),
    "llama3": Real("llama3", 128256, 128000, LLAMA, "<|eot_id|>", str.strip),
    "llama3_2": Real(
        "llama3", 128256, 128000, LLAMA, "<|eot_id|>", template="llama3_2_template", takes=("tools", "calls")
    ),
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


def last_alone(model: str) -> bool:
    """Qwen 3's template drops earlier thoughts."""
    return model == "qwen3"


def test_it_is_the_models(model: str, pair: Pair) -> None:
    real = MODELS[model]
    prompt = pair.theirs.apply_chat_template(messages("a"), return_dict=False, add_generation_prompt=True)
    assert prompt[-len(real.asked) :] == real.asked
    ids, _ = encode(pair.ours, messages("a", "b"))
    assert any(ids[start : start + len(real.asked)] == real.asked for start in range(len(ids)))
    assert pair.ours.vocab_size == len(pair.theirs) == real.vocab_size
    assert pair.ours.eos_ids == (pair.theirs.eos_token_id,) == (pair.theirs.convert_tokens_to_ids(real.end),)
    assert pair.ours.pad_id == (pair.theirs.pad_token_id or 0)


@pytest.mark.parametrize(("files", "makers"), [("llama3", "llama3_vocabulary"), ("qwen3", "qwen_vocabulary")])
def test_the_vocabulary_is_its_makers(cache: Path, files: str, makers: str) -> None:
    tokenizer = json.loads((real_files(files, cache) / "tokenizer.json").read_bytes())
    assert tokenizer["model"]["vocab"] == json.loads((real_files(makers, cache) / "vocab.json").read_bytes())


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_are_transformers_and_only_answers_count(model: str, pair: Pair, turns: list[dict[str, str]]) -> None:
    pair.check(turns, last=last_alone(model))


@given(turns=ANY_CONVERSATION, last=st.booleans())
def test_any_text(model: str, pair: Pair, turns: list[dict[str, str]], last: bool) -> None:
    pair.check(turns, last=last or last_alone(model))


def test_one_bos_and_it_does_not_count(model: str, pair: Pair) -> None:
    turns = messages("the cat?", "the dog.", "and?", "no.", system="Be brief.")
    ids, supervised = encode(pair.ours, turns, last=last_alone(model))
    if bos := MODELS[model].bos:
        assert ids[0] == bos and ids.count(bos) == 1 and not supervised[0]
    assert [message["content"] in pair.text(ids) for message in turns] == [True] * len(turns)


def test_a_special_token_typed_by_a_user_is_that_token_and_does_not_count(model: str, pair: Pair) -> None:
    end = MODELS[model].end
    ids, supervised = encode(pair.ours, messages(f"what does {end} do?", f"{end} ends."))
    end_id = pair.theirs.convert_tokens_to_ids(end)
    others = encode(pair.ours, messages("what does it do?", "it ends."))[0].count(end_id)
    assert ids.count(end_id) == others + 2, "as in transformers"
    assert supervised_text(pair.theirs, ids, supervised) == pair.shown(f"{end} ends.") + end


def test_a_saved_folder_is_the_same_tokenizer(model: str, pair: Pair, tmp_path: Path) -> None:
    pair.ours.save(tmp_path)
    assert ChatTokenizer(tmp_path).fingerprint == pair.ours.fingerprint
    again = pair._replace(theirs=AutoTokenizer.from_pretrained(tmp_path))
    assert again.theirs.chat_template == pair.theirs.chat_template
    for turns in CONVERSATIONS:
        again.check(turns, last=last_alone(model))


@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
def test_qwen3_with_and_without_thoughts(pair: Pair) -> None:
    with pytest.raises(
        ValueError, match=r"^the chat template is not prefix-stable: .*\(Qwen 3's drops earlier thoughts\); .*last"
    ):
        encode(pair.ours, messages("a", "b", "c", "d"))
    answer = "<think>\nTwo and two.\n</think>\n\nFour."
    before = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": answer}]
    asked = [*before, {"role": "user", "content": "2 + 2?"}]
    inside = {"role": "assistant", "content": answer}
    beside = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    prompt = pair.reference(asked, add_generation_prompt=True)
    for turns in ([*asked, inside], [*asked, beside]):
        ids, ((first, end),) = pair.ours.encode(conversation(turns, last=True))
        assert ids == pair.reference(turns)
        assert ids[:first] == prompt, "asked with thinking enabled"
        assert pair.text(ids[first:end]) == answer + "<|im_end|>"


ROWS = {
    "tools": conversation(messages("the cat?", "the dog.", system="be brief"), tools=TOOLS),
    "calls": conversation([*messages("Rome?"), call(content=""), result(), *messages("", "21")[1:]], last=True),
    "thoughts": conversation([*messages("2 + 2?"), thoughtful("Four.", "Two and two.")]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_tools_and_thoughts_are_read_or_refused(model: str, pair: Pair, kind: str) -> None:
    example = ROWS[kind]
    if kind not in MODELS[model].takes:
        with pytest.raises(ValueError, match="^the chat template does not read '[a-z_]+'; "):
            pair.ours.encode(example)
        return
    ids, ((first, end),) = pair.ours.encode(example)
    assert ids == pair.reference(example.messages, tools=example.tools)
    assert ids[:first] == pair.reference(example.messages[:-1], tools=example.tools, add_generation_prompt=True)
    answer = example.messages[-1]
    thoughts = answer.get("reasoning_content", "")
    expected = pair.shown(answer["content"]).replace("<think>\n", f"<think>\n{thoughts}")
    assert pair.text(ids[first:end]) == expected + pair.end


@pytest.mark.parametrize("model", [name for name, real in MODELS.items() if "calls" in real.takes], indirect=True)
@pytest.mark.parametrize("arguments", [{"city": "Städte <b>"}, '{"city":"Rome"}'])
def test_a_call_is_an_answer(pair: Pair, arguments: Any) -> None:
    turns = [*messages("Rome?"), call(arguments=arguments, content="")]
    ids, ((first, end),) = pair.ours.encode(conversation(turns, tools=TOOLS))
    assert ids == pair.reference(turns, tools=TOOLS)
    assert ids[:first] == pair.reference(turns[:1], tools=TOOLS, add_generation_prompt=True)
    assert '{"name": "weather", "' in pair.text(ids[first:end]) and pair.text(ids[end - 1 : end]) == pair.end


@pytest.mark.parametrize("model", ["llama3_2"], indirect=True)
def test_llama3_2_has_the_same_day_every_day(pair: Pair, cache: Path) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime(2031, 1, 2)

    template = real_files("llama3_2_template", cache) / "chat_template.jinja"
    turns = messages("a", "b")
    with mock.patch("transformers.utils.chat_template_utils.datetime", Later):
        theirs = pair.theirs.apply_chat_template(turns, return_dict=False)
        ours, _ = encode(ChatTokenizer(pair.theirs.name_or_path, chat_template=template), turns)
    assert "Today Date: 02 Jan 2031\n" in pair.text(theirs)
    assert "Today Date: 26 Jul 2024\n" in pair.text(ours) and ours == encode(pair.ours, turns)[0]


@pytest.fixture(scope="module")
def llama2(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTokenizer, Any]:
    folder = real_files("llama2", cache)
    template = tmp_path_factory.mktemp("llama2") / "inst.jinja"
    template.write_text(INST)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = INST
    return ChatTokenizer(folder, chat_template=template), theirs


@given(turns=ANY_CONVERSATION)
def test_llama2_has_the_spaces_that_transformers_puts_before_words(
    llama2: tuple[ChatTokenizer, Any], turns: list[dict[str, str]]
) -> None:
    """Transformers does not read them from tokenizer.json."""
    ours, theirs = llama2
    ids, spans = ours.encode(conversation(turns))
    assert ids == theirs.apply_chat_template(turns, return_dict=False)
    for index, (first, end) in zip(conversation(turns).supervised, spans, strict=True):
        # Its decoder writes more spaces behind special tokens.
        expected = turns[index]["content"] + "</s>"
        assert theirs.decode(ids[first:end]).replace(" ", "") == expected.replace(" ", "")
