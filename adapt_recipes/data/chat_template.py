"""Chat templates as transformers renders them, but for the clock."""

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

# What templates see as today. With a real clock the tokens, and so the run, would depend on the day. It is the day that
# Llama 3.2's template takes where there is no clock.
TODAY = datetime(2024, 7, 26)


def read_chat_template(folder: Path, config: dict[str, Any], file: Path | None) -> str:
    """The source of the template: ``file``, else the tokenizer's own, where a file goes before the folder's config."""
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
            f"{folder} has no chat template (no default one): name a Jinja file with one in tokenizer.chat_template, "
            "or take an instruction-tuned model's tokenizer"
        )
    return template


def compile_chat_template(source: str) -> jinja2.Template:
    """A template with all that transformers lets it use, in the same sandbox."""
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
    """Lets ``{% generation %} ... {% endgeneration %}`` pass: the mask has no need of it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML
