from __future__ import annotations

import json
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapt_recipes.data import ByteTokenizer, ChatTokenizer
from adapt_recipes.data.chat_template import TODAY

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
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
    {%- if message.role == 'assistant' %}
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
# As Qwen3's: the last answer gets an empty block of thoughts, earlier ones lose it.
THINKING = """{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
TEXTS = [
    "the cat sat on the mat.\n\nthe dog\n",
    "<think>\n\n</think>\n\n",
    " user assistant\nsystem\n",
    "été 😀 naïve",
] * 8


def messages(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS = [
    messages("the cat?", "the dog."),
    messages("the cat?", "the dog", "and?", "\n\nthe cat sat\n", "", " 😀", system="été"),
    messages(" \n", "  été\n naïve 😀  "),
    messages("<|im_end|> </s> the cat", "say <|im_end|>"),
    messages("the", "answer <think> the\n\n\n"),
]


def make_folder(folder: Path, template: str | None, **config: Any) -> Path:
    """A small byte-level BPE tokenizer as transformers saves one, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3's: spaces fall out of the offsets
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(5)  # some hub folders carry one; transformers resets it
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|im_end|>"} | config
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def supervised_text(tokenizer: Any, ids: list[int], supervised: list[bool]) -> str:
    return tokenizer.decode([token for token, counts in zip(ids, supervised, strict=True) if counts])


@pytest.fixture
def fixed_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class FixedDay(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return TODAY

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", FixedDay)


@pytest.mark.parametrize(
    ("template", "end", "strips"),
    [(CHATML, "<|im_end|>", False), (LLAMA3, "<|eot_id|>", True), (INST, "</s>", False)],
    ids=["chatml", "llama3", "inst"],
)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_are_transformers_and_only_answers_count(
    tmp_path: Path, fixed_day: None, template: str, end: str, strips: bool, conversation: list[dict[str, str]]
) -> None:
    if template is INST:
        conversation = [message for message in conversation if message["role"] != "system"]
    folder = make_folder(tmp_path, template)
    reference = AutoTokenizer.from_pretrained(folder)
    ids, supervised = ChatTokenizer(folder).encode(conversation)
    assert ids == reference.apply_chat_template(conversation, tokenize=True, return_dict=False)
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    text = supervised_text(reference, ids, supervised)
    if template is CHATML and conversation is CONVERSATIONS[1]:
        # The header's "\n" is in one token with the answer's first.
        text = text.replace("\n\n\nthe", "\n\nthe")
    if template is INST:
        text = text.replace(f"{end} ", end).removeprefix(" ")  # " the" is one token, and the template wrote its space
        answers = [answer.removeprefix(" ") for answer in answers]
    assert text == "".join((answer.strip() if strips else answer) + end for answer in answers)


def test_a_token_merged_across_the_start_counts_and_the_new_line_after_the_end_does_not(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path, CHATML))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ids, supervised = tokenizer.encode(messages("a", "\n\nthe"))
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
    ids, supervised = ChatTokenizer(tmp_path).encode(messages("a", "  the", "b", "cat"))
    assert supervised_text(reference, ids, supervised) == "the<|im_end|>cat<|im_end|>"


def test_an_empty_block_of_thoughts_does_not_count(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path, THINKING))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for answer in ("the cat", "think", "\n"):
        ids, supervised = tokenizer.encode(messages("a", answer + "."))
        assert ids == reference.apply_chat_template(messages("a", answer + "."), tokenize=True, return_dict=False)
        assert supervised_text(reference, ids, supervised).lstrip("\n") == f"{answer}.<|im_end|>".lstrip("\n")
    with pytest.raises(
        ValueError, match="^the chat template is not prefix-stable: .*; keep one answer a conversation$"
    ):
        tokenizer.encode(messages("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no roles here') }}", "^the chat template refuses the conversation: no roles here$"),
        ("{{ messages[0].content + 1 }}", "^the chat template refuses the conversation: "),
        ("{{ messages[1].content | upper }}</s>", "^the chat template does not show an answer as it is written$"),
        ("{{ messages[0].content }}</s>", "^the chat template does not show an answer as it is written$"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "ends an answer with no special token"),
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}{{ 'A:' if add_generation_prompt }}",
            "not prefix-stable",
        ),
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}</s>{% endif %}{% endfor %}", "is not prefix-stable"),
    ],
)
def test_templates_that_cannot_be_masked(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path, template))
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.encode(messages("the", "cat", "sat", "mat"))
    assert "\n" not in str(error.value)


def test_attributes_fingerprint_and_pickle(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path / "a", CHATML))
    reference = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.pad_id == reference.pad_token_id and tokenizer.eos_ids == (reference.eos_token_id,)
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, reference.eos_token_id]}))
    assert ChatTokenizer(tmp_path / "a").eos_ids == (reference.eos_token_id, 1, 5)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint and again.encode(CONVERSATIONS[0]) == tokenizer.encode(
        CONVERSATIONS[0]
    )
    others = [make_folder(tmp_path / "b", LLAMA3), make_folder(tmp_path / "c", CHATML, bos_token="<|im_start|>")]
    assert len({tokenizer.fingerprint, *(ChatTokenizer(other).fingerprint for other in others)}) == 3


def test_a_saved_folder_is_the_same_tokenizer(tmp_path: Path, fixed_day: None) -> None:
    tokenizer = ChatTokenizer(make_folder(tmp_path / "a", LLAMA3))
    tokenizer.save(tmp_path / "b" / "model")
    assert ChatTokenizer(tmp_path / "b" / "model").fingerprint == tokenizer.fingerprint
    reference = AutoTokenizer.from_pretrained(tmp_path / "b" / "model")
    ids = reference.apply_chat_template(CONVERSATIONS[1], tokenize=True, return_dict=False)
    assert ids == tokenizer.encode(CONVERSATIONS[1])[0]


def test_templates_inside_the_config_and_special_tokens_as_objects(tmp_path: Path) -> None:
    expected = ChatTokenizer(make_folder(tmp_path, INST)).encode(CONVERSATIONS[0])
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"bos_token": {"content": "<s>", "lstrip": False}}
    for template in (INST, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": INST}]):
        file.write_text(json.dumps(config | {"chat_template": template}))
        assert ChatTokenizer(tmp_path).encode(CONVERSATIONS[0]) == expected
    for template in ([{"name": "tool_use", "template": "x"}], None):
        file.write_text(json.dumps(config | {"chat_template": template}))
        with pytest.raises(ValueError, match=r"^tokenizer.path: .* has no chat template \(no default one\)"):
            ChatTokenizer(tmp_path)
    del config["bos_token"]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    file.write_text(json.dumps(config | {"chat_template": INST}))
    assert ChatTokenizer(tmp_path).encode(CONVERSATIONS[0]) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no file .*/tokenizer.json$"),
        ("tokenizer.json", "{", "/tokenizer.json: "),
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


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^tokenizer.path: no folder .*nowhere$"):
        ChatTokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("supervise_end", [True, False])
@pytest.mark.parametrize("conversation", [CONVERSATIONS[0], CONVERSATIONS[1], messages("<0x41>\x00", "\u2028é")])
def test_bytes(tmp_path: Path, supervise_end: bool, conversation: list[dict[str, str]]) -> None:
    tokenizer = ByteTokenizer(supervise_end=supervise_end)
    ids, supervised = tokenizer.encode(conversation)
    tokenizer.save(tmp_path / "model")
    reference = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert ids == reference.apply_chat_template(conversation, tokenize=True, return_dict=False)
    assert len(reference) == tokenizer.vocab_size == 257
    assert (reference.eos_token_id,) == tokenizer.eos_ids and reference.pad_token_id == tokenizer.pad_id
    end = "<|end|>" * supervise_end
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    assert supervised_text(reference, ids, supervised) == "".join(answer + end for answer in answers)
    assert (256 in ids) == supervise_end
    if supervise_end:
        assert ChatTokenizer(tmp_path / "model").encode(conversation) == (ids, supervised)


def test_bytes_refuse_the_end_tokens_name() -> None:
    assert ByteTokenizer().fingerprint != ByteTokenizer(supervise_end=False).fingerprint
    with pytest.raises(ValueError, match="^the text holds <|end|>, the name of the end token$"):
        ByteTokenizer().encode(messages("<|en", "d|>"))
