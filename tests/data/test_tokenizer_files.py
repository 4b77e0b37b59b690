"""A folder is read as transformers reads it, whatever its files name."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat import CHATML, CONTENTS, TEXTS, conversation, encode, make_folder, messages
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from adapt_recipes.data import ChatTokenizer
from adapt_recipes.data.examples import Conversation

TURNS = messages(
    "<think>the 12  cats</think>\n\t</s>", " a\u0301\n\n<|eot_id|>the <s> <|endoftext|>cat <mask>", system="é"
)
KINDS = ("gpt2", "llama", "qwen", "gemma", "sentencepiece")
CLASSES = (None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GemmaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer")
MODEL_TYPES = (None, "llama", "gemma3_text", "qwen2", "qwen3")


def edit(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; removes those that become None."""
    content = (json.loads(file.read_text()) if file.is_file() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def any_folder(folder: Path, kind: str) -> Path:
    """As ``make_folder``, and one more kind: "sentencepiece" puts a space before each text, as Llama 2's."""
    if kind != "sentencepiece":
        return make_folder(folder, CHATML, kind)
    make_folder(folder, CHATML, "gemma")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer.json", pre_tokenizer=None)
    return folder


def check(folder: Path, turns: list[dict[str, Any]] = TURNS) -> None:
    """Ours are the ids, the special tokens and the size of the vocabulary that transformers has; or neither works."""
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = ChatTokenizer(folder)
    try:
        expected = theirs.apply_chat_template(turns, return_dict=False)
    except Exception as error:
        with pytest.raises(ValueError, match="^tokenizer.json: Unk token"):
            encode(ours, turns)
        assert "Unk token" in str(error)
        return
    assert ours.encode(Conversation(turns, supervised=()))[0] == expected
    assert ours.vocab_size == len(theirs)
    assert ours.pad_id == (theirs.pad_token_id or 0)
    assert ours.eos_ids == ((theirs.eos_token_id,) if theirs.eos_token else ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("model_type", [None, "llama"])
def test_every_class(tmp_path: Path, kind: str, name: str | None, model_type: str | None) -> None:
    """Some classes of transformers do not read all of tokenizer.json, and split words in their own way."""
    folder = any_folder(tmp_path, kind)
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    if model_type:
        edit(folder / "config.json", model_type=model_type)
    check(folder)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("model_type", MODEL_TYPES[2:])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_every_family(tmp_path: Path, name: str | None, model_type: str, where: str) -> None:
    """The class depends on the model that the folder holds, too."""
    folder = any_folder(tmp_path, "llama")
    edit(folder / "tokenizer_config.json", tokenizer_class=None)
    edit(folder / "config.json", model_type=model_type)
    edit(folder / where, tokenizer_class=name)
    check(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_padding_in_tokenizer_json_names_a_token(tmp_path: Path, name: str | None) -> None:
    folder = any_folder(tmp_path, "llama")
    edit(folder / "tokenizer_config.json", tokenizer_class=name, pad_token=None)
    edit(folder / "tokenizer.json", padding=PADDING)
    check(folder)


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("add_prefix_space", [None, True, False])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_a_space_before_the_text(tmp_path: Path, legacy: bool | None, add_prefix_space: bool | None, name: str) -> None:
    folder = any_folder(tmp_path, "sentencepiece" if name == "LlamaTokenizer" else "gpt2")
    options = {"legacy": legacy, "add_prefix_space": add_prefix_space}
    edit(folder / "tokenizer_config.json", tokenizer_class=name, **options)
    check(folder)


def test_fingerprints_of_tokenizers_that_split_words_in_another_way(tmp_path: Path) -> None:
    folder = any_folder(tmp_path, "sentencepiece")
    fingerprints = set()
    for changes in (
        {},
        {"tokenizer_class": "LlamaTokenizer"},
        {"legacy": True},
        {"add_prefix_space": False},
        {"extra_special_tokens": ["cat"]},
        {"split_special_tokens": True},
    ):
        edit(folder / "tokenizer_config.json", **changes)
        fingerprints.add(ChatTokenizer(folder).fingerprint)
    assert len(fingerprints) == 6


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTokenizer, Any]:
    folder = any_folder(tmp_path_factory.mktemp("llama2"), "sentencepiece")
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    return ChatTokenizer(folder), AutoTokenizer.from_pretrained(folder)


@given(contents=st.lists(CONTENTS.filter(str.strip), min_size=2, max_size=4).filter(lambda texts: len(texts) % 2 == 0))
def test_any_text_with_llama_2s_class(llama2: tuple[ChatTokenizer, Any], contents: list[str]) -> None:
    ours, theirs = llama2
    turns = messages(*contents)
    ids, spans = ours.encode(conversation(turns))
    assert ids == theirs.apply_chat_template(turns, return_dict=False)
    for content, (first, end) in zip(contents[1::2], spans, strict=True):
        assert theirs.decode(ids[first:end]).removeprefix("\n").lstrip(" ") == (content + "<|im_end|>").lstrip(" ")


@pytest.mark.parametrize(
    ("changes", "files", "named"),
    [
        ({"tokenizer_class": "CodeLlamaTokenizerFast"}, {}, "CodeLlamaTokenizer"),
        (
            {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["my.MyTokenizer", None]}},
            {},
            "MyTokenizer",
        ),
        ({"tokenizer_class": "LlamaTokenizer"}, {"config.json": {"model_type": "mistral"}}, "LlamaTokenizer"),
    ],
)
def test_a_class_that_reads_the_files_in_another_way_is_refused(
    tmp_path: Path, changes: dict[str, Any], files: dict[str, Any], named: str
) -> None:
    folder = any_folder(tmp_path, "sentencepiece")
    edit(folder / "tokenizer_config.json", **changes)
    for name, content in files.items():
        edit(folder / name, **content)
    with pytest.raises(ValueError, match=f"^tokenizer.path: [^\n]* the class {named}; supported: LlamaTokenizer, "):
        ChatTokenizer(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend", auto_map=None)
    check(folder)


def test_a_class_for_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    folder = any_folder(tmp_path, "gemma")
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, "<|im_end|>": 1}, "unk_token": "<unk>"}
    edit(folder / "tokenizer.json", model=model, added_tokens=[], post_processor=None)
    edit(folder / "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    with pytest.raises(
        ValueError, match="^tokenizer.path: .*tokenizer.json: transformers reads it as GemmaTokenizer, "
    ):
        ChatTokenizer(folder)


END = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|im_end|>"}
# Files that make <|im_end|> a special token, and <think> as well.
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "eos_token": {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
    "eos_token as an object": {"tokenizer_config.json": {"eos_token": END | {"__type": "AddedToken"}}},
    "added_tokens_decoder": {"tokenizer_config.json": {"added_tokens_decoder": {"1": END | {"special": True}}}},
    "added_tokens_decoder and eos_token": {
        "tokenizer_config.json": {"added_tokens_decoder": {"1": END | {"special": False}}, "eos_token": "<|im_end|>"}
    },
    "added_tokens_decoder with white space": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"1": END | {"special": True, "rstrip": True}},
            "eos_token": "<|im_end|>",
        }
    },
    "additional_special_tokens": {
        "tokenizer_config.json": {"additional_special_tokens": ["<think>", "<|im_end|>"], "extra_special_tokens": []}
    },
    "extra_special_tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<think>", "<|im_end|>"]}},
    "extra_special_tokens by name": {
        "tokenizer_config.json": {"extra_special_tokens": {"turn_token": "<|im_end|>", "open": "<think>"}}
    },
    "a name of its own": {"tokenizer_config.json": {"end_of_turn_token": "<|im_end|>", "add_bos_token": True}},
    "special_tokens_map.json": {
        "special_tokens_map.json": {"eos_token": END, "additional_special_tokens": ["<think>"]}
    },
    "special_tokens_map.json, more": {
        "special_tokens_map.json": {"extra_special_tokens": ["<think>", END]},
        "tokenizer_config.json": {"extra_special_tokens": ["</think>"]},
    },
    "special_tokens_map.json by name": {
        "special_tokens_map.json": {"extra_special_tokens": {"turn": "<|im_end|>", "open": "<think>"}}
    },
    "special_tokens_map.json is not read": {
        "special_tokens_map.json": {"eos_token": "</think>", "pad_token": "</think>"},
        "tokenizer_config.json": {"added_tokens_decoder": {"1": END | {"special": True}}},
    },
    "added_tokens.json": {
        "added_tokens.json": {"<think>": 400, "</think>": 401},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "</think>"},
    },
    "padding": {"tokenizer.json": {"padding": PADDING}},
}


@pytest.mark.parametrize("listed", ["no", "as an added token", "as a special token"])
@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_whatever_names_a_special_token(tmp_path: Path, case: str, listed: str, name: str) -> None:
    """In tokenizer.json <|im_end|> is a word of the vocabulary and, maybe, one of the added tokens."""
    folder = make_folder(tmp_path / "a", CHATML, "qwen")
    names = {"bos_token": None, "eos_token": None, "pad_token": None, "tokenizer_class": name}
    edit(folder / "tokenizer_config.json", **names)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added = [token for token in added if token["content"] != "<|im_end|>"]
    if listed != "no":
        added.insert(1, {"id": 1} | END | {"special": listed == "as a special token"})
    edit(folder / "tokenizer.json", added_tokens=added, truncation=None)
    for file, changes in NAMED[case].items():
        edit(folder / file, **changes)
    check(folder)
    if case == "padding" and name == "Qwen2Tokenizer":
        # This class has its own padding token, so the file makes none special.
        return
    _, ((first, end),) = ChatTokenizer(folder).encode(conversation(messages("a", "the cat")))
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages("a", "the cat"), return_dict=False)
    assert theirs.decode(ids[first:end]) == "the cat<|im_end|>"
    # A saved folder is the same tokenizer.
    ChatTokenizer(folder).save(tmp_path / "b")
    for path in (folder, tmp_path / "b"):
        assert (
            AutoTokenizer.from_pretrained(path).apply_chat_template(TURNS, return_dict=False)
            == (ChatTokenizer(folder).encode(conversation(TURNS))[0])
        )


def test_the_old_end_of_a_text_stays_a_token_in_a_saved_folder(tmp_path: Path) -> None:
    """It is one only because the config names it, and a message may contain it."""
    folder = make_folder(tmp_path / "a", CHATML)
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(folder / "tokenizer.json", added_tokens=[t for t in content["added_tokens"] if t["content"] != "</s>"])
    turns = messages("</s> the", "</s>cat")
    ids = encode(ChatTokenizer(folder), turns)
    ChatTokenizer(folder).save(tmp_path / "b")
    assert encode(ChatTokenizer(tmp_path / "b"), turns) == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "b").apply_chat_template(turns, return_dict=False) == ids[0]


def test_special_tokens_may_be_split(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, CHATML)
    edit(folder / "tokenizer_config.json", split_special_tokens=True)
    turns = messages("the", "cat")
    ids, _ = ChatTokenizer(folder).encode(Conversation(turns, supervised=()))
    assert ids == AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, return_dict=False)
    with pytest.raises(ValueError, match="ends an answer without a special token"):
        encode(ChatTokenizer(folder), turns)


def test_a_folder_with_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """The error names a command that writes what is missing."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = tmp_path / "a folder"
    folder.mkdir()
    (tmp_path / "text").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": CHATML, "additional_special_tokens": ["<|im_end|>"]}
    edit(folder / "tokenizer_config.json", **config)
    with pytest.raises(
        ValueError, match="^tokenizer.path: .* has only a SentencePiece model.*, no tokenizer.json; "
    ) as error:
        ChatTokenizer(folder)
    assert "\n" not in str(error.value)
    command = str(error.value).split("`")[1]
    assert command.startswith("python -c ")
    program = shlex.split(command)[1:]
    subprocess.run([sys.executable, *program], check=True, capture_output=True)
    check(folder)
