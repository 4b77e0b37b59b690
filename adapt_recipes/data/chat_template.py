"""Renders chat templates as transformers does, but with a fixed date, and finds out what a template reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapt_recipes.data.examples import Conversation, Message

# The current date as templates see it. With the real date the tokens, and so the run, would depend on the day. This is
# the date that Llama 3.2's template uses if it has no clock.
TODAY = datetime(2024, 7, 26)
# A folder of more templates, each named by its file.
TEMPLATES_FOLDER = "additional_chat_templates"

# What a template is tried with. A template reads a field if the marker in that field appears in the text.
_MARKER = "q7marker1z"
_USER = {"role": "user", "content": "question"}
_ANSWER = {"role": "assistant", "content": "answer"}
_PARAMETERS = {"type": "object", "properties": {}}


class ChatTemplate:
    """The chat template of a folder, and its other template for conversations with tools if it has one.

    Args:
        sources: Jinja, by name: ``default``, and ``tool_use`` for conversations with tools. Others are not used.
        special_tokens: variables of the template.

    Raises:
        ValueError: a template is malformed.
    """

    def __init__(self, sources: dict[str, str], special_tokens: dict[str, str]) -> None:
        self._templates = {name: _compile(source) for name, source in sources.items()}
        self._special_tokens = special_tokens
        self._reads: dict[tuple[str, bool], bool] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text that ``apply_chat_template`` of transformers makes of a conversation.

        Raises:
            ValueError: the template refuses the conversation.
        """
        try:
            return self._render(messages, tools, add_generation_prompt)
        except Exception as error:
            # A template may raise anything, with line breaks.
            reason = f"the chat template refuses the conversation: {' '.join(str(error).split())}"
        if messages and messages[0]["role"] == "system":
            try:
                self._render(messages[1:], tools, add_generation_prompt)
            except Exception:
                pass
            else:
                reason += "; it takes no system message: set tasks.system: merge_into_user"
        raise ValueError(reason)

    def _render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        given = {
            "messages": [_as_transformers_passes_it(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._templates[name].render(self._special_tokens | given)

    def check_fields(self, conversation: Conversation) -> None:
        """Raises a ``ValueError`` if the template does not read what the conversation consists of."""
        messages, tools = conversation.messages, conversation.tools
        present = {
            "'tools'": bool(tools),
            "'tool_calls'": any(message.get("tool_calls") for message in messages),
            "messages of the role 'tool'": any(message["role"] == "tool" for message in messages),
            "'reasoning_content'": any(message.get("reasoning_content") for message in messages),
            "system messages": messages[0]["role"] == "system",
        }
        for field, is_present in present.items():
            if is_present and not self._does_read(field, with_tools=tools is not None):
                remedy = "remove that from the rows, or name another template in tokenizer.chat_template"
                if field == "system messages":
                    remedy = "set tasks.system: merge_into_user"
                raise ValueError(f"the chat template does not read {field}; {remedy}")

    def _does_read(self, field: str, *, with_tools: bool) -> bool:
        """Whether the template reads a field, where that can be found out; True if it refuses the probe."""
        key = field, with_tools
        if key not in self._reads:
            messages, tools = _probe(field, with_tools=with_tools)
            try:
                self._reads[key] = _MARKER in self._render(messages, tools, False)
            except Exception:
                # It may refuse the rest of the probe. How it renders the conversation shows more.
                self._reads[key] = True
        return self._reads[key]


def _probe(field: str, *, with_tools: bool) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """A small conversation with the marker in one field."""
    tools = [_tool("lookup")] if with_tools else None
    match field:
        case "'tools'":
            return [_USER, _ANSWER], [_tool(_MARKER)]
        case "'tool_calls'":
            return [_USER, _call(_MARKER)], tools
        case "messages of the role 'tool'":
            result = {"role": "tool", "tool_call_id": "call00001", "name": "lookup", "content": _MARKER}
            return [_USER, _call("lookup"), result, _ANSWER], tools
        case "'reasoning_content'":
            return [_USER, _ANSWER | {"reasoning_content": _MARKER}], tools
        case "system messages":
            return [{"role": "system", "content": _MARKER}, _USER, _ANSWER], tools
    raise AssertionError(field)


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "looks up", "parameters": _PARAMETERS}}


def _call(name: str) -> Message:
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _as_transformers_passes_it(message: Message) -> Message:
    """Without keys that are None, and with thoughts under the older name as well, which some templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    if "reasoning_content" in message:
        message = {"thinking": message["reasoning_content"], **message}
    return message


def read_chat_templates(folder: Path, config: dict[str, Any], file: Path | None) -> dict[str, str]:
    """The sources of the templates by name: ``file`` alone if given, else the folder's files, else those in its config.

    Raises:
        ValueError: there is no ``file``, or no template called ``default``.
    """
    if file is not None:
        if not file.is_file():
            raise ValueError(f"no file {file}")
        return {"default": file.read_text(encoding="utf-8")}
    files = {path.stem: path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    templates: Any = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if not templates:
        templates = config.get("chat_template")
        if isinstance(templates, list):
            templates = {each.get("name"): each.get("template") for each in templates}
        elif not isinstance(templates, dict):
            templates = {"default": templates}
    if not isinstance(templates.get("default"), str):
        raise ValueError(
            f"{folder} has no chat template (no default one): name a Jinja file in tokenizer.chat_template, "
            "or use the tokenizer of an instruction-tuned model"
        )
    return {name: templates[name] for name in ("default", "tool_use") if name in templates}


def _compile(source: str) -> jinja2.Template:
    """Compiles a template in the sandbox that transformers uses, with the same functions."""
    extensions: list[type[Extension]] = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is malformed: {error}") from None


class _Generation(Extension):
    """Accepts ``{% generation %} ... {% endgeneration %}`` as a scope of its own: the mask does not need it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML escapes, which Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
