from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize
from unittest import mock

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapt_recipes.data import ByteTokenizer, ChatTokenizer
from adapt_recipes.data.chat_template import TODAY
from adapt_recipes.data.examples import Conversation

# Qwen 1.5's own.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "<|eot_id|>" }}
{%- for message in messages %}
    {% if message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
# A sentence-piece kind of template: the answer follows a space, and nothing but an end token comes after it.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | tojson }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As Gemma 3's: the system message is the start of the first user's.
GEMMA = """{{ bos_token }}
{%- set before = '' %}
{%- if messages[0].role == 'system' %}
    {%- set before = messages[0].content + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {{- (before if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
# As Qwen 3's: the last answer has a block of thoughts, an empty one unless it brings its own; earlier ones have none.
THINKING = """{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.last %}
        {%- set parts = message.content.split('</think>') %}
        {%- set thoughts = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
        {{- '<|im_start|>assistant\n<think>\n' + thoughts + '\n</think>\n\n' + parts[-1].lstrip('\n') }}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '') }}
{%- endif %}"""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<unk>"]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "the cat sat on the mat.\n\nthe dog\n",
    "<think>\n\n</think>\n\n",
    " user assistant\nsystem\n",
    "été 😀 naïve",
] * 8


def messages(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def conversation(turns: list[dict[str, Any]], *, last: bool = False, tools: Any = None) -> Conversation:
    """All answers of the turns are supervised, or the last alone."""
    answers = tuple(i for i, message in enumerate(turns) if message["role"] == "assistant")
    return Conversation(turns, answers[-1:] if last else answers, tools)


def encode(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether it is in a span."""
    ids, spans = tokenizer.encode(conversation(turns, **options))
    assert all(0 <= first < end <= len(ids) for first, end in spans)
    return ids, [any(first <= i < end for first, end in spans) for i in range(len(ids))]


CONVERSATIONS = [
    messages("the cat?", "the dog."),
    messages("the cat?", "the dog", "and?", "\n\nthe cat sat\n", "", " 😀", system="été"),
    messages(" \n", "  été\n naïve 😀  "),
    messages("<|im_end|> </s> the cat", "say <|im_end|>"),
    messages("the", "answer <think> the\n\n\n"),
]


def make_folder(folder: Path, template: str | None, kind: str = "gpt2", **config: Any) -> Path:
    """A small BPE tokenizer as transformers saves one, trained on a few words.

    The kinds split text into words as their models do. They differ in what moves offsets: "gpt2" and "llama" trim white
    space from them, "qwen" composes characters (NFC), "gemma" writes a space as another character and what it does not
    know as bytes. "gemma" also puts its bos before any text.
    """
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind != "qwen")
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    if kind in ("llama", "qwen"):
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    if kind == "gemma":
        alphabet = []
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if kind == "gemma":
        trained = json.loads(tokenizer.to_str())["model"]
        vocab = trained["vocab"] | {f"<0x{byte:02X}>": len(trained["vocab"]) + byte for byte in range(256)}
        merges = [tuple(merge) for merge in trained["merges"]]
        tokenizer.model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer.enable_truncation(5)  # some hub folders carry one; transformers resets it
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|im_end|>"} | config
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def supervised_text(tokenizer: Any, ids: list[int], supervised: list[bool]) -> str:
    return tokenizer.decode([token for token, counts in zip(ids, supervised, strict=True) if counts])


class FixedDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return TODAY


class Pair(NamedTuple):
    """A tokenizer as this project and as transformers load it.

    Attributes:
        end: ends an answer.
        shown: what the template writes between its generation prompt and the end of an answer.
    """

    ours: ChatTokenizer
    theirs: Any
    end: str
    shown: Callable[[str], str] = str

    def reference(self, turns: Sequence[dict[str, Any]], **options: Any) -> Any:
        options = {"return_dict": False} | options
        with mock.patch.object(transformers.utils.chat_template_utils, "datetime", FixedDay):
            return self.theirs.apply_chat_template(turns, **options)

    def text(self, ids: list[int]) -> str:
        return normalize("NFC", self.theirs.decode(ids, clean_up_tokenization_spaces=False))

    def check(self, turns: list[dict[str, Any]], *, last: bool = False) -> None:
        """The ids are transformers'; supervised are the answers and their ends, behind what a model is asked with."""
        example = conversation(turns, last=last)
        ids, spans = self.ours.encode(example)
        assert ids == self.reference(turns)
        assert len(spans) == len(example.supervised)
        for index, (first, end) in zip(example.supervised, spans, strict=True):
            text, expected = self.text(ids[first:end]), normalize("NFC", self.shown(turns[index]["content"]) + self.end)
            assert text.endswith(expected)
            # More than that only where the header's last white space is in one token with the answer's first letters.
            if more := text.removesuffix(expected):
                assert not more.strip() and len(self.text(ids[first : first + 1])) > len(more)
            prompt = self.reference(turns[:index], add_generation_prompt=True)
            assert self.text(ids[:first]) + more == self.text(prompt)
            if not more:
                assert ids[:first] == prompt


PAIRS: dict[str, tuple[str, str, str, Callable[[str], str]]] = {
    "chatml": ("gpt2", CHATML, "<|im_end|>", str),
    "qwen1_5": ("qwen", CHATML, "<|im_end|>", str),
    "llama3": ("llama", LLAMA3, "<|eot_id|>", str.strip),
    "gemma3": ("gemma", GEMMA, "<end_of_turn>", str.strip),
    "inst": ("gpt2", INST, "</s>", lambda answer: " " + answer),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, template, end, shown = PAIRS[request.param]
    folder = make_folder(tmp_path_factory.mktemp(request.param), template, kind)
    return Pair(ChatTokenizer(folder), AutoTokenizer.from_pretrained(folder), end, shown)


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_are_transformers_and_only_answers_count(pair: Pair, turns: list[dict[str, str]]) -> None:
    pair.check(turns)


# White space of all sorts, characters of two code points, of several bytes, that join others, names of special tokens.
PIECES = list(" \n\t\r\xa0\u2028\ufeff\u200d\u0301\0é한𐍈😀")
PIECES += ["  ", "\n\n", "the", " cat", "a\u0301", "1", "2.", "👨\u200d👩"]
PIECES += ["<|im_end|>", "<|im_start|>", "<end_of_turn>", "<|eot_id|>", "<s>", "</s>", "<bos>"]
CONTENTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
TURNS = st.lists(st.tuples(CONTENTS, CONTENTS.filter(str.strip)), min_size=1, max_size=3)
ANY_CONVERSATION = st.builds(
    lambda turns, system: messages(*(content for turn in turns for content in turn), system=system),
    TURNS,
    st.none() | CONTENTS,
)


@given(turns=ANY_CONVERSATION, last=st.booleans())
def test_any_text(pair: Pair, turns: list[dict[str, str]], last: bool) -> None:
    pair.check(turns, last=last)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, THINKING])
@given(contents=st.lists(st.text("ab <>\n/think", min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_an_answer_found_by_lengths_is_that_found_by_rendering_again(
    template: str, contents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if template not in FOUND:
        folder = make_folder(tmp_path_factory.mktemp("tokenizer"), template)
        FOUND[template] = ChatTokenizer(folder), ChatTokenizer(folder)
        again = FOUND[template][1]
        again._rendered_answers = lambda given, text: [  # type: ignore[method-assign]
            again._rendered_answer(given, index, text) for index in given.supervised
        ]
    by_lengths, again = FOUND[template]
    turns = conversation(messages(*contents[: len(contents) // 2 * 2]))
    one, other = by_lengths.encode_all([turns])[0], again.encode_all([turns])[0]
    assert repr(one) == repr(other)


FOUND: dict[str, tuple[ChatTokenizer, ChatTokenizer]] = {}


def test_a_token_merged_across_the_start_counts_and_the_new_line_after_the_end_does_not(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path, CHATML))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ids, supervised = encode(tokenizer, messages("a", "\n\nthe"))
    pieces = [reference.decode([token]) for token in ids]
    assert pieces[-5:] == ["\n\n", "\n", "the", "<|im_end|>", "\n"], "the header ends with the first of three new lines"
    assert supervised == [False] * (len(ids) - 5) + [True, True, True, True, False]


def test_a_header_that_swallows_white_space_does_not_count(tmp_path: Path) -> None:
    """As Phi-3's: the header's token takes the new line behind it, and the spaces of the answer."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    make_folder(tmp_path, template)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ids, supervised = encode(ChatTokenizer(tmp_path), messages("a", "  the", "b", "cat"))
    assert supervised_text(reference, ids, supervised) == "the<|im_end|>cat<|im_end|>"


@pytest.fixture
def thinking(tmp_path: Path) -> Pair:
    folder = make_folder(tmp_path, THINKING, "qwen")
    shown = lambda answer: "<think>\n\n</think>\n\n" + answer.lstrip("\n")  # noqa: E731
    return Pair(ChatTokenizer(folder), AutoTokenizer.from_pretrained(folder), "<|im_end|>", shown)


@pytest.mark.parametrize("answer", ["the cat.", "think.", "\n.", " 😀"])
def test_an_empty_block_of_thoughts_counts_because_the_model_is_asked_before_it(thinking: Pair, answer: str) -> None:
    thinking.check(messages("a", answer))
    turns = messages("a", "b", "c", answer)
    thinking.check(turns, last=True)
    with pytest.raises(
        ValueError,
        match="^the chat template is not prefix-stable: .*; set tasks.supervise: last to train on the last answer of "
        "each conversation$",
    ):
        encode(thinking.ours, turns)
    # Answers that are context only may be rendered in any way.
    ids, spans = thinking.ours.encode(Conversation(turns, supervised=()))
    assert ids == thinking.reference(turns) and spans == []


def test_an_answers_own_thoughts_count(thinking: Pair) -> None:
    for answer in ("<think>\nthe cat\n</think>\n\nsat.", "<think>\n\n</think>\n\nsat."):
        turns = messages("a", answer, system="the")
        ids, supervised = encode(thinking.ours, turns)
        assert ids == thinking.reference(turns)
        assert supervised_text(thinking.theirs, ids, supervised) == answer + "<|im_end|>"
    missing = "^the chat template does not render an answer as it is written: the text 'the mat' is missing$"
    with pytest.raises(ValueError, match=missing):
        encode(thinking.ours, messages("a", "<think>the cat</think><think>the mat</think>sat."))


@pytest.mark.parametrize(
    ("answer", "asked", "counts"),
    [
        # Both new lines are one token, in which the answer begins.
        ("the cat.", "<think>", "\n\n</think>\n\nthe cat.<|im_end|>"),
        ("<think>\nthe\n</think>\n\ncat", "<think>\n", "the\n</think>\n\ncat<|im_end|>"),
        ("<think>the</think>cat", "<think>\n", "the\n</think>\n\ncat<|im_end|>"),
    ],
)
def test_a_prompt_that_ends_inside_a_block_of_thoughts(tmp_path: Path, answer: str, asked: str, counts: str) -> None:
    """The model has to learn to close the block that the prompt opens."""
    template = THINKING.replace(" and loop.last", "").split("{%- if add_generation_prompt %}")[0]
    template += "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    make_folder(tmp_path, template, "qwen")
    with_tokens = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with_tokens.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    with_tokens.save(str(tmp_path / "tokenizer.json"))
    tokenizer, theirs = ChatTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for turns in (messages("a", answer), messages("a", answer, "b", answer)):
        ids, spans = tokenizer.encode(conversation(turns))
        assert ids == theirs.apply_chat_template(turns, return_dict=False)
        for first, end in spans:
            assert theirs.decode(ids[:first]).endswith("<|im_start|>assistant\n" + asked)
            assert theirs.decode(ids[first:end]) == counts


def test_a_system_message_is_merged_or_refused_as_the_template_says(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path / "a", GEMMA, "gemma"))
    merged = messages("be brief\n\nthe cat?", "the dog.")
    assert encode(tokenizer, messages("the cat?", "the dog.", system="be brief")) == encode(tokenizer, merged)
    refusing = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}" + GEMMA
    tokenizer = ChatTokenizer(make_folder(tmp_path / "b", refusing, "gemma"))
    bos = AutoTokenizer.from_pretrained(tmp_path / "b").bos_token_id
    assert encode(tokenizer, merged)[0].count(bos) == 1
    with pytest.raises(
        ValueError,
        match="^the chat template refuses the conversation: System role not supported; .*: merge_into_user$",
    ):
        encode(tokenizer, messages("the cat?", "the dog.", system="be brief"))


def test_a_template_from_a_file(tmp_path: Path) -> None:
    make_folder(tmp_path / "base", None)
    with pytest.raises(ValueError, match="has no chat template .*: name a Jinja file in tokenizer.chat_template"):
        ChatTokenizer(tmp_path / "base")
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    expected = ChatTokenizer(make_folder(tmp_path / "own", CHATML))
    for folder in (tmp_path / "base", make_folder(tmp_path / "other", LLAMA3)):
        tokenizer = ChatTokenizer(folder, chat_template=file)
        assert tokenizer.fingerprint == pickle.loads(pickle.dumps(tokenizer)).fingerprint == expected.fingerprint
        tokenizer.save(tmp_path / "saved" / folder.name)
        saved = AutoTokenizer.from_pretrained(tmp_path / "saved" / folder.name)
        assert saved.chat_template == CHATML
        Pair(tokenizer, saved, "<|im_end|>").check(CONVERSATIONS[1])
    with pytest.raises(ValueError, match="^tokenizer.chat_template: no file .*nowhere.jinja$"):
        ChatTokenizer(tmp_path / "own", chat_template=tmp_path / "nowhere.jinja")
    file.write_text("{% for %}")
    with pytest.raises(ValueError, match="^tokenizer.chat_template: the chat template is malformed: "):
        ChatTokenizer(tmp_path / "own", chat_template=file)


VICUNA = Path(__file__).parents[2] / "yaml" / "vicuna.jinja"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def test_vicunas_template_renders_as_fastchat_does(tmp_path: Path) -> None:
    """Which separates turns by a space and by </s> in turn. The prompt is the start of the text."""
    folder = make_folder(tmp_path / "model", None, eos_token="</s>")
    tokenizer = ChatTokenizer(folder, chat_template=VICUNA)
    theirs = AutoTokenizer.from_pretrained(folder)
    turns = messages("Hi, who?", "I am.", "Sure?", "Yes. ")
    # In FastChat the tokenizer adds <s>, if it has one.
    first = f"<s>{VICUNA_SYSTEM} USER: Hi, who? ASSISTANT: I am.</s>"
    second = "USER: Sure? ASSISTANT: Yes. </s>"
    for count, expected in ((2, first), (4, first + second)):
        assert theirs.apply_chat_template(turns[:count], chat_template=VICUNA.read_text(), tokenize=False) == expected
        ids, supervised = encode(tokenizer, turns[:count])
        assert theirs.decode(ids) == expected
    assert supervised_text(theirs, ids, supervised) == " I am.</s> Yes. </s>"
    theirs.chat_template = VICUNA.read_text()
    prompt = theirs.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert first.startswith(prompt) and prompt.endswith(" ASSISTANT:")
    ids, _ = encode(tokenizer, [{"role": "system", "content": "Be brief."}, *turns[:2]])
    assert theirs.decode(ids) == "<s>Be brief. USER: Hi, who? ASSISTANT: I am.</s>"


def test_an_answer_of_which_the_tokenizer_leaves_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="ends an answer without a special token"):
        encode(ChatTokenizer(tmp_path), messages("the", "\u200b"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no\n roles here') }}", "^the chat template refuses the conversation: no roles here$"),
        ("{{ messages[0].nothing.at_all }}", "^the chat template refuses the conversation: 'dict object' has no"),
        ("{{ 1 / 0 }}", "^the chat template refuses the conversation: division by zero$"),
        ("{{ messages[0].content + 1 }}", "^the chat template refuses the conversation: "),
        (
            "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
            "as it is written: the text 'cat' is missing$",
        ),
        ("{% for m in messages %}{{ m.role }}</s>{% endfor %}", "as it is written: the text 'cat' is miss"),
        ("{{ messages[-1].content }}</s>", "not prefix-stable: it renders an answer differently when another turn"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "ends an answer without a special token"),
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}{{ 'A:' if add_generation_prompt }}",
            "^the chat template is not prefix-stable: an answer does not follow the text of its generation prompt, ",
        ),
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}</s>{% endif %}{% endfor %}", "is not prefix-stable"),
    ],
)
def test_templates_that_cannot_be_masked(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path, template))
    with pytest.raises(ValueError, match=message) as error:
        encode(tokenizer, messages("the", "cat", "sat", "mat"))
    assert "\n" not in str(error.value)


def test_attributes_fingerprint_and_pickle(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path / "a", CHATML))
    reference = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.pad_id == reference.pad_token_id and tokenizer.eos_ids == (reference.eos_token_id,)
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, reference.eos_token_id]}))
    assert ChatTokenizer(tmp_path / "a").eos_ids == (reference.eos_token_id, 1, 5)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    assert encode(again, CONVERSATIONS[0]) == encode(tokenizer, CONVERSATIONS[0])
    others = [make_folder(tmp_path / "b", LLAMA3), make_folder(tmp_path / "c", CHATML, bos_token="<|im_start|>")]
    assert len({tokenizer.fingerprint, *(ChatTokenizer(other).fingerprint for other in others)}) == 3


def test_a_saved_folder_is_the_same_tokenizer(pair: Pair, tmp_path: Path) -> None:
    pair.ours.save(tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.chat_template == pair.theirs.chat_template
    pair._replace(ours=ChatTokenizer(tmp_path / "model"), theirs=theirs).check(CONVERSATIONS[1])
    # But for its eos_token, which is where an answer ends.
    assert theirs.eos_token == pair.end and pair.ours.end_ids == (theirs.eos_token_id,)
    eos = {"eos_token": pair.end}
    assert theirs.special_tokens_map == pair.theirs.special_tokens_map | eos


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("eos_token", [None, "<|im_end|>", {"content": "</s>", "lstrip": False}])
def test_the_saved_eos_token_ends_an_answer(tmp_path: Path, eos_token: Any) -> None:
    folder = make_folder(tmp_path / "base", None, additional_special_tokens=["<|eot_id|>"])
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"</s>"', json.dumps(eos_token)))
    before = contents(folder)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    ChatTokenizer(folder, chat_template=tmp_path / "chatml.jinja").save(tmp_path / "model")
    after = contents(tmp_path / "model")
    assert after.pop("chat_template.jinja").decode() == CHATML
    # The same bytes but for one value.
    expected = before[file.name].replace(
        b'"eos_token": ' + json.dumps(eos_token).encode(), b'"eos_token": "<|im_end|>"'
    )
    assert after == before | {file.name: expected}


def test_special_tokens_map_names_the_same_eos_token(tmp_path: Path) -> None:
    """Transformers prefers it to tokenizer_config.json."""
    file = make_folder(tmp_path / "base", CHATML) / "special_tokens_map.json"
    for name, saved in (("eos_token", {"eos_token": "<|im_end|>"}), ("bos_token", {"bos_token": "</s>"})):
        file.write_text(json.dumps({name: "</s>"}))
        ChatTokenizer(tmp_path / "base").save(tmp_path / "model")
        assert json.loads((tmp_path / "model" / file.name).read_text()) == saved
        assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<|im_end|>"


def test_a_template_that_mentions_the_eos_token_keeps_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "base", CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    tokenizer = ChatTokenizer(folder)
    tokenizer.save(tmp_path / "model")
    assert contents(tmp_path / "model") == contents(folder)
    assert AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(tokenizer.end_ids) == ["<|im_end|>"]


def test_the_end_of_an_answer_that_needs_a_system_message_or_more(tmp_path: Path) -> None:
    refusing = "{{ raise_exception('no') if messages[0].role == 'user' }}" + CHATML
    needs_system = ChatTokenizer(make_folder(tmp_path / "a", refusing))
    assert needs_system.end_ids == ChatTokenizer(make_folder(tmp_path / "b", CHATML)).end_ids
    tokenizer = ChatTokenizer(make_folder(tmp_path / "c", "{{ raise_exception('no') }}"))
    assert tokenizer.end_ids == ()
    tokenizer.save(tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tmp_path / "c")


def test_templates_inside_the_config_and_special_tokens_as_objects(tmp_path: Path) -> None:
    expected = encode(ChatTokenizer(make_folder(tmp_path, INST)), CONVERSATIONS[0])
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"bos_token": {"content": "<s>", "lstrip": False}}
    for template in (INST, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": INST}]):
        file.write_text(json.dumps(config | {"chat_template": template}))
        assert encode(ChatTokenizer(tmp_path), CONVERSATIONS[0]) == expected
    for template in ([{"name": "tool_use", "template": "x"}], None):
        file.write_text(json.dumps(config | {"chat_template": template}))
        with pytest.raises(ValueError, match=r"^tokenizer.path: .* has no chat template \(no default one\)"):
            ChatTokenizer(tmp_path)
    del config["bos_token"]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    file.write_text(json.dumps(config | {"chat_template": INST}))
    assert encode(ChatTokenizer(tmp_path), CONVERSATIONS[0]) == expected


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no file .*/tokenizer.json$"),
        ("tokenizer.json", "{", "/tokenizer.json: "),
        (
            "tokenizer.json",
            LFS_POINTER,
            "/tokenizer.json is a Git LFS pointer, not the file itself; run `git lfs pull` in",
        ),
        ("tokenizer_config.json", None, "no file .*/tokenizer_config.json$"),
        ("tokenizer_config.json", "{", "/tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "/tokenizer_config.json: must be a JSON object$"),
        ("chat_template.jinja", None, "has no chat template"),
        ("chat_template.jinja", "{% for %}", "the chat template is malformed: "),
    ],
)
def test_missing_and_malformed_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    make_folder(tmp_path, CHATML)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^tokenizer.path: .*{message}") as error:
        ChatTokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_sentencepiece_model_that_is_a_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match="^tokenizer.path: .*/tokenizer.model is a Git LFS pointer, .*`git lfs pull`"):
        ChatTokenizer(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="^tokenizer.path: no folder .*nowhere; `tune download MODEL --output-dir FOLDER` creates one"
    ):
        ChatTokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("supervise_end", [True, False])
@pytest.mark.parametrize("turns", [CONVERSATIONS[0], CONVERSATIONS[1], messages("<0x41>\x00", "\u2028é")])
def test_bytes(tmp_path: Path, supervise_end: bool, turns: list[dict[str, str]]) -> None:
    tokenizer = ByteTokenizer(supervise_end=supervise_end)
    example = conversation(turns)
    ids, spans = tokenizer.encode(example)
    tokenizer.save(tmp_path / "model")
    reference = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert ids == reference.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert len(reference) == tokenizer.vocab_size == 257
    assert (reference.eos_token_id,) == tokenizer.eos_ids and reference.pad_token_id == tokenizer.pad_id
    assert tokenizer.end_ids == (256,) * supervise_end
    end = "<|end|>" * supervise_end
    assert [reference.decode(ids[first:last]) for first, last in spans] == [
        turns[index]["content"] + end for index in example.supervised
    ]
    assert tokenizer.encode(conversation(turns, last=True)) == (ids, spans[-1:])
    assert (256 in ids) == supervise_end
    if supervise_end:
        assert ChatTokenizer(tmp_path / "model").encode(example) == (ids, spans)


def test_bytes_refuse_the_end_tokens_name() -> None:
    assert ByteTokenizer().fingerprint != ByteTokenizer(supervise_end=False).fingerprint
    with pytest.raises(ValueError, match="^the text contains <|end|>, the name of the end token$"):
        encode(ByteTokenizer(), messages("<|en", "d|>"))
