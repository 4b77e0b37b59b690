"""Converts a conversation to tokens. Supervised are the assistant's answers and the token that ends each of them.

The same for every model: render the chat template once, tokenize the text once, and mask by character offsets.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from adapt_recipes.data.chat_template import compile_chat_template, read_chat_template
from adapt_recipes.data.conversations import error_prefix
from adapt_recipes.data.examples import Conversation

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# What a template is asked with to find the token that ends an answer.
_QUESTION = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
_SYSTEM = {"role": "system", "content": "system"}
# Stands for an answer, to find what the template puts before and after one.
_ANSWER = "\ue000answer\ue000"


class ChatTokenizer:
    """The tokenizer and the chat template of any Hugging Face folder, without transformers.

    It computes the same ids as transformers' ``apply_chat_template``, with a fixed date (see ``chat_template.py``). As
    in transformers, the name of a special token inside a message becomes that token.

    The folder contains ``tokenizer.json``, ``tokenizer_config.json`` and a template: the file ``chat_template.jinja``,
    or ``chat_template`` in the config. If the config has several, the one called ``default`` is used.

    Args:
        path: the folder.
        chat_template: a Jinja file to use instead; None: the folder's own template.

    Attributes:
        vocab_size: the highest id plus one. A model may have more embeddings than that. Gemma 3's text models have one
            less, because the last id is that of an image.
        fingerprint: differs between tokenizers that may give different ids or masks.
        pad_id: the id of the padding token; 0 if the folder names none.
        eos_ids: the ids that end a text: the config's end token, and those in ``generation_config.json`` if it exists.

    Raises:
        ValueError: a file is missing or malformed.
    """

    def __init__(self, path: str | Path, *, chat_template: str | Path | None = None) -> None:
        self._path = Path(path).expanduser()
        self._template_file = None if chat_template is None else Path(chat_template).expanduser()
        with error_prefix("tokenizer.path"):
            config = self._read_tokenizer()
        with error_prefix("tokenizer.path" if self._template_file is None else "tokenizer.chat_template"):
            template = read_chat_template(self._path, config, self._template_file)
            self._template = compile_chat_template(template)
        self._names_eos = "eos_token" in template
        parts = [
            (self._path / "tokenizer.json").read_bytes(),
            template.encode(),
            json.dumps(self._variables, sort_keys=True).encode(),
        ]
        self.fingerprint = blake2b(b"".join(blake2b(part).digest() for part in parts), digest_size=16).hexdigest()

    def _read_tokenizer(self) -> dict[str, Any]:
        """Reads everything but the template; returns ``tokenizer_config.json``."""
        if not self._path.is_dir():
            raise ValueError(f"no folder {self._path}; `tune download MODEL --output-dir FOLDER` creates one")
        tokenizer_file = self._path / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise ValueError(f"no file {tokenizer_file}")
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:
            # The tokenizers library raises nothing more specific.
            raise ValueError(f"{tokenizer_file}: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_ids = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

        # Special tokens: the variables of the template, and the ids of padding and of the ends of a text.
        config = _json_object(self._path / "tokenizer_config.json")
        named = _json_object(self._path / "special_tokens_map.json", optional=True) | config
        named = {key: _text(value) for key, value in named.items() if key.endswith("_token")}
        self._variables = {key: token for key, token in named.items() if isinstance(token, str)}
        ids = {key: self._tokenizer.token_to_id(token) for key, token in self._variables.items()}
        self.pad_id: int = ids.get("pad_token") or 0
        ends = _json_object(self._path / "generation_config.json", optional=True).get("eos_token_id")
        ends = [ids.get("eos_token"), *(ends if isinstance(ends, list) else [ends])]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))
        return config

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the arguments, because a compiled template cannot be pickled."""
        return partial(type(self), chat_template=self._template_file), (self._path,)

    def encode(self, messages: Conversation) -> tuple[list[int], list[bool]]:
        """Tokenizes a conversation.

        Every answer of the assistant is supervised, from its first character to the special token that ends the turn.
        Text that the template adds before an answer (a header, an empty thinking block) or after its end token (a new
        line) is not supervised. A token that spans the start of the answer is supervised, because the answer begins in
        it.

        Args:
            messages: a checked conversation.

        Returns:
            Token ids, and for each whether it is supervised; two lists of the same length.

        Raises:
            ValueError: the template refuses or changes the conversation, is not prefix-stable (renders a turn
                differently when another follows), or ends an answer without a special token.
        """
        text = self._render(messages)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, spans = encoding.ids, encoding.offsets
        supervised = [False] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._answer_span(messages[: index + 1], text)
            last = bisect_right(spans, end, key=lambda span: span[1])
            while last < len(ids) and ids[last] not in self._special_ids:
                last += 1
            if last == len(ids):
                raise ValueError(
                    "the chat template ends an answer without a special token: the model could not learn to stop"
                )
            first = bisect_right(spans, start, key=lambda span: span[1])
            # A special token of the header may also consume the white space at the start of the answer.
            if spans[first][0] < start and ids[first] in self._special_ids:
                first += 1
            supervised[first : last + 1] = [True] * (last + 1 - first)
        return ids, supervised

    def _answer_span(self, messages: Conversation, text: str) -> tuple[int, int]:
        """Start and end of the last message, an answer, in ``text``."""
        *before, answer = messages
        turn, prompt = self._render(messages), self._render(before, add_generation_prompt=True)
        head, _, foot = self._render([*before, answer | {"content": _ANSWER}]).partition(_ANSWER)
        end = len(turn) - len(foot)
        # A template may strip an answer, but not change it otherwise. An answer that includes its thoughts starts right
        # after the prompt, where the template inserts an empty thinking block for other answers.
        starts = [
            len(front)
            for front in (head, prompt)
            if turn.startswith(front) and turn[len(front) : end].strip() == answer["content"].strip()
        ]
        if not starts:
            raise ValueError("the chat template does not render an answer as it is written")
        if not (text.startswith(turn) and turn.startswith(prompt)):
            raise ValueError(
                "the chat template is not prefix-stable: in training an answer follows another text than in generation "
                "(Qwen3's template drops earlier thoughts); keep one answer per conversation"
            )
        return starts[0], end

    def _render(self, messages: Conversation, *, add_generation_prompt: bool = False) -> str:
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(self._variables | given)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The id of the token that ends an answer; empty if the template refuses a question with an answer."""
        # Some templates require a system message, and some refuse it.
        for messages in (_QUESTION, [_SYSTEM, *_QUESTION]):
            try:
                ids, supervised = self.encode(messages)
            except ValueError:
                continue
            return ([token for token, counts in zip(ids, supervised, strict=True) if counts][-1],)
        return ()

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files, so that transformers loads the same tokenizer and chat template.

        The copy's ``eos_token`` is the token that ends an answer: vLLM and llama.cpp stop there. It is not changed if
        the chat template mentions ``eos_token``, because the template would render another text.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self._path / name).is_file():
                shutil.copyfile(self._path / name, Path(folder) / name)
        if self._template_file is not None:
            shutil.copyfile(self._template_file, Path(folder) / "chat_template.jinja")
        if not self._names_eos and (end_ids := self.end_ids):
            token = str(self._tokenizer.id_to_token(end_ids[0]))
            _set_eos_token(Path(folder) / "tokenizer_config.json", token)
            # Where it exists, transformers prefers its names.
            if "eos_token" in _json_object(Path(folder) / "special_tokens_map.json", optional=True):
                _set_eos_token(Path(folder) / "special_tokens_map.json", token)


def _set_eos_token(file: Path, token: str) -> None:
    """Leaves the file as it is if it names the token."""
    content = _json_object(file)
    if _text(content.get("eos_token")) != token:
        text = json.dumps(content | {"eos_token": token}, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def _text(token: Any) -> Any:
    """Of a special token in a config, which may be an object."""
    return token.get("content") if isinstance(token, dict) else token


def _json_object(file: Path, *, optional: bool = False) -> dict[str, Any]:
    if not file.is_file():
        if optional:
            return {}
        raise ValueError(f"no file {file}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a JSON object")
    return content
