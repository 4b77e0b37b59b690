"""Renders chat templates as transformers does, but with a fixed date."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The current date as templates see it. With the real date the tokens, and so the run, would depend on the day. This is
# the date that Llama 3.2's template uses if it has no clock.
TODAY = datetime(2024, 7, 26)


def read_chat_template(folder: Path, config: dict[str, Any], file: Path | None) -> str:
    """The source of the template: ``file`` if given, else the folder's file, else the one in its config."""
    if file is not None and not file.is_file():
        raise ValueError(f"no file {file}")
    file = file or folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {each.get("name"): each.get("template") for each in template}.get("default")
    if not isinstance(template, str):
        raise ValueError(
            f"{folder} has no chat template (no default one): name a Jinja file in tokenizer.chat_template, "
            "or use the tokenizer of an instruction-tuned model"
        )
    return template


def compile_chat_template(source: str) -> jinja2.Template:
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
    """Accepts ``{% generation %} ... {% endgeneration %}`` and ignores it: the mask does not need it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without HTML escapes, which Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
