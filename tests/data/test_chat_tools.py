"""Tools, calls, results of calls and thoughts: ids as transformers gives them, and nothing dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat import CHATML, CONTENTS, GEMMA, THINKING, Pair, conversation, encode, make_folder, messages
from transformers import AutoTokenizer

from adapt_recipes.data import ByteTokenizer, ChatTokenizer
from adapt_recipes.data.examples import Conversation

# As Qwen 3's and Llama 3.2's, without their exceptions. What a model writes is marked for transformers.
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') + '# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content if message.content is string else '' }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
LLAMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n' + messages[0].content | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}
    {{- messages[0].content | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call\nat once') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- generation %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
        {{- '</s>' if call.name == 'python' else '<|eot_id|>' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
TEMPLATES = {"qwen": QWEN, "llama": LLAMA}

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "Städte"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "a < b", "parameters": PARAMETERS}}
    for name in ("weather", "python")
]


def call(name: str = "weather", arguments: Any = None, content: str | None = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": {"city": "Rome"} if arguments is None else arguments}
    calls = [{"id": "call00001", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls} | fields


def result(content: str = "21C") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": content}


def thoughtful(content: str, thoughts: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": thoughts}


ARGUMENTS = st.dictionaries(st.sampled_from(["city", "a b"]), CONTENTS | st.integers() | st.none(), max_size=2)
CALLS = st.builds(call, st.sampled_from(["weather", "python"]), ARGUMENTS | ARGUMENTS.map(json.dumps))
# Per turn: the question; the calls before the answer, each with its result; and the answer.
TURNS = st.lists(
    st.tuples(CONTENTS, st.lists(st.tuples(CALLS, CONTENTS), max_size=2), CONTENTS.filter(str.strip)),
    min_size=1,
    max_size=2,
)


@st.composite
def conversations(draw: Any, kind: str) -> Conversation:
    system = draw(st.none() | CONTENTS)
    turns = messages(system=system)
    for question, calls, answer in draw(TURNS):
        turns.append({"role": "user", "content": question})
        for asked, content in calls:
            turns += [asked, result(content)]
        turns.append({"role": "assistant", "content": answer})
    if kind == "qwen":
        for turn in turns:
            if turn["role"] == "assistant" and draw(st.booleans()):
                turn["reasoning_content"] = draw(CONTENTS)
            if "tool_calls" in turn and draw(st.booleans()):
                turn["content"] = draw(CONTENTS)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    supervised = draw(st.lists(st.sampled_from(answers), unique=True).map(sorted))
    return Conversation(turns, tuple(supervised), draw(st.sampled_from([None, [], TOOLS])))


@pytest.fixture(scope="module", params=TEMPLATES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = make_folder(tmp_path_factory.mktemp(kind), TEMPLATES[kind], kind)
    return Pair(ChatTokenizer(folder), AutoTokenizer.from_pretrained(folder), "<|im_end|>")


@given(data=st.data())
def test_ids_and_spans_are_transformers(kind: str, pair: Pair, data: st.DataObject) -> None:
    example = data.draw(conversations(kind))
    ids, spans = pair.ours.encode(example)
    options = {"tools": example.tools, "return_dict": True, "return_assistant_tokens_mask": True}
    theirs = pair.reference(example.messages, **options)
    assert ids == theirs["input_ids"]
    # Its mask has the tokens of all answers.
    answers = tuple(index for index, turn in enumerate(example.messages) if turn["role"] == "assistant")
    _, all_spans = pair.ours.encode(Conversation(example.messages, answers, example.tools))
    assert [int(any(first <= i < end for first, end in all_spans)) for i in range(len(ids))] == theirs[
        "assistant_masks"
    ]
    assert spans == [all_spans[answers.index(index)] for index in example.supervised]


@pytest.mark.parametrize(
    ("answer", "missing"),
    [
        (call(content="Let me look."), "the text 'Let me look.'"),
        (thoughtful("the cat", "long thoughts " * 9), "its 'reasoning_content' "),
    ],
)
def test_what_a_template_drops_of_a_supervised_answer(tmp_path: Path, answer: dict[str, Any], missing: str) -> None:
    # Reads thoughts, but not in a long conversation.
    template = LLAMA.replace(
        "message.content | trim + '<|eot_id|>' }}{%- endg",
        "(message.reasoning_content | default('') if loop.length == 2 else '') + message.content + '<|eot_id|>' }}"
        "{%- endg",
    )
    tokenizer = ChatTokenizer(make_folder(tmp_path, template, "llama"))
    example = conversation([*messages("the cat?"), answer], tools=TOOLS)
    if "tool_calls" not in answer:
        example = conversation([*messages("a", "b", "c"), answer])
    with pytest.raises(ValueError, match=f"^the chat template does not render an answer as it is written: {missing}"):
        tokenizer.encode(example)
    # As context it may be rendered in any way.
    tokenizer.encode(Conversation(example.messages, (), example.tools))


def test_a_call_that_a_template_drops(tmp_path: Path) -> None:
    first_alone = QWEN.replace("in message.tool_calls", "in (message.tool_calls or [])[:1]")
    tokenizer = ChatTokenizer(make_folder(tmp_path, first_alone))
    two = call()
    two["tool_calls"] += call("python")["tool_calls"]
    encode(tokenizer, [*messages("Rome?"), call()])
    with pytest.raises(ValueError, match="as it is written: the call of 'python' is missing$"):
        encode(tokenizer, [*messages("Rome?"), two])


def test_thoughts_have_an_older_name(tmp_path: Path) -> None:
    """As gpt-oss reads them."""
    folder = make_folder(tmp_path, QWEN.replace("reasoning_content", "thinking"))
    turns = [*messages("the cat?"), thoughtful("the dog.", "the mat")]
    ids, _ = encode(ChatTokenizer(folder), turns)
    assert ids == AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, return_dict=False)
    assert ids != encode(ChatTokenizer(folder), messages("the cat?", "the dog."))[0]


QUESTION = messages("the cat?")
KINDS = {
    "'tools'": Conversation(messages("the cat?", "the dog."), (1,), TOOLS),
    "'tool_calls'": Conversation([*QUESTION, call(content="look")], (1,)),
    "messages of the role 'tool'": Conversation([*QUESTION, call(content=""), result(), *messages("", "b")[1:]], ()),
    "'reasoning_content'": Conversation([*QUESTION, thoughtful("the dog.", "the mat")], ()),
    "system messages": Conversation(messages("the cat?", "the dog.", system="the mat"), ()),
}
# A template that reads the rest.
DEAF = {
    "'tools'": CHATML,
    "'tool_calls'": CHATML,
    "messages of the role 'tool'": QWEN.replace("message.role == 'tool'", "false"),
    "'reasoning_content'": CHATML,
    "system messages": QWEN.replace("messages[0].role == 'system'", "false"),
}


@pytest.mark.parametrize("field", KINDS)
def test_a_field_that_the_template_does_not_read_is_refused(tmp_path: Path, field: str) -> None:
    ChatTokenizer(make_folder(tmp_path / "qwen", QWEN)).encode(KINDS[field])
    tokenizer = ChatTokenizer(make_folder(tmp_path / "deaf", DEAF[field]))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^the chat template does not read {field}; [^\n]+$") as error:
            tokenizer.encode(KINDS[field])
    assert ("tasks.system: merge_into_user" in str(error.value)) == (field == "system messages")


@pytest.mark.parametrize("field", [field for field in KINDS if field != "system messages"])
def test_bytes_are_text_alone(field: str) -> None:
    with pytest.raises(ValueError, match="^the byte tokenizer takes text alone, not '?(tool|reasoning|the role 'tool)"):
        ByteTokenizer().encode(KINDS[field])


def test_a_template_that_refuses_a_probe_is_asked_for_the_real_thing(tmp_path: Path) -> None:
    """Gemma's raises at a turn of a tool, and Llama's at two calls."""
    alternating = "{{ raise_exception('roles must alternate') if messages[2].role == 'tool' }}"
    tokenizer = ChatTokenizer(make_folder(tmp_path / "a", alternating + GEMMA, "gemma"))
    turns = [*QUESTION, {"role": "assistant", "content": "the"}, result(), *messages("", "b")[1:]]
    with pytest.raises(ValueError, match="^the chat template refuses the conversation: roles must alternate$"):
        encode(tokenizer, turns)
    tokenizer = ChatTokenizer(make_folder(tmp_path / "b", LLAMA, "llama"))
    two = call()
    two["tool_calls"] *= 2
    with pytest.raises(ValueError, match="^the chat template refuses the conversation: one call at once$"):
        encode(tokenizer, [*QUESTION, two])


def test_content_that_is_none(tmp_path: Path) -> None:
    """As transformers: the template does not see the key."""
    tokenizer = ChatTokenizer(make_folder(tmp_path, CHATML.replace("message['content']", "message.content.strip()")))
    turns = [*QUESTION, {"role": "assistant", "content": None}]
    with pytest.raises(ValueError, match="^the chat template refuses the conversation: 'dict object' has no attribute"):
        encode(tokenizer, turns)


def test_the_last_answer_alone_where_earlier_thoughts_are_gone(tmp_path: Path) -> None:
    """As Qwen 3's: the thoughts before the last question are dropped, and may be, because they are context."""
    template = THINKING.replace("message.content + '<|im_end|>", "message.content.split('</think>')[-1] + '<|im_end|>")
    folder = make_folder(tmp_path, template, "qwen")
    pair = Pair(ChatTokenizer(folder), AutoTokenizer.from_pretrained(folder), "<|im_end|>")
    turns = messages("a", "<think>the cat</think>the dog", "b", "<think>\nthe mat\n</think>\n\nsat")
    ids, ((first, end),) = pair.ours.encode(conversation(turns, last=True))
    assert ids == pair.reference(turns) and "the cat" not in pair.text(ids)
    assert pair.text(ids[first:end]) == "<think>\nthe mat\n</think>\n\nsat<|im_end|>"


def write_templates(folder: Path, where: str, templates: dict[str, str]) -> None:
    """Several templates, either in the config or as files."""
    if where == "config":
        file = folder / "tokenizer_config.json"
        listed = [{"name": name, "template": template} for name, template in templates.items()]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": listed}))
    else:
        (folder / "additional_chat_templates").mkdir()
        for name, template in templates.items():
            file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (folder / file).write_text(template)


@pytest.mark.parametrize("where", ["config", "files"])
def test_a_template_of_its_own_for_tools(tmp_path: Path, where: str) -> None:
    folder = make_folder(tmp_path / "a", None, "qwen")
    write_templates(folder, where, {"default": CHATML, "tool_use": QWEN, "rag": "{{ raise_exception('no') }}"})
    ours = ChatTokenizer(folder)
    ours.save(tmp_path / "saved")
    for path in (folder, tmp_path / "saved"):
        pair = Pair(ChatTokenizer(path), AutoTokenizer.from_pretrained(path), "<|im_end|>")
        for tools in (None, [], TOOLS):
            example = conversation(messages("the cat?", "the dog."), tools=tools)
            ids, _ = pair.ours.encode(example)
            assert ids == pair.reference(example.messages, tools=tools)
            assert ids == ours.encode(example)[0]
    with pytest.raises(ValueError, match="does not read 'tool_calls'"):
        ours.encode(KINDS["'tool_calls'"])
    # A file that is named replaces them all, in the saved folder as well.
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    named = ChatTokenizer(folder, chat_template=file)
    with pytest.raises(ValueError, match="does not read 'tools'"):
        named.encode(KINDS["'tools'"])
    named.save(tmp_path / "named")
    assert AutoTokenizer.from_pretrained(tmp_path / "named").chat_template == CHATML


def test_a_block_of_generation_is_a_scope(tmp_path: Path) -> None:
    template = "{% set a = 'x' %}{% for m in messages %}{% generation %}{% set a = 'y' %}{{ m.content }}</s>"
    template += "{% endgeneration %}{{ a }}{% endfor %}"
    folder = make_folder(tmp_path, template)
    ids, _ = encode(ChatTokenizer(folder), messages("the", "cat"))
    assert ids == AutoTokenizer.from_pretrained(folder).apply_chat_template(messages("the", "cat"), return_dict=False)
