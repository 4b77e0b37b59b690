"""Converts a conversation to tokens, and finds the tokens of each of the assistant's answers.

The same for every model: render the chat template once, tokenize the text once, and find answers by character offsets.
"""

from __future__ import annotations

import json
import re
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from adapt_recipes.data.chat_template import TEMPLATES_FOLDER, ChatTemplate, read_chat_templates
from adapt_recipes.data.conversations import error_prefix
from adapt_recipes.data.examples import Conversation, Message
from adapt_recipes.data.tokenizer_files import read_json, read_tokenizer

# Incremented whenever the same files would give other ids or spans.
_VERSION = 2
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
# Stands for an answer, to find what the template puts after one.
_ANSWER = "\ue000answer\ue000"


class ChatTokenizer:
    """The tokenizer and the chat template of any Hugging Face folder, without transformers.

    It computes the same ids as ``apply_chat_template`` of transformers 5, with a fixed date (see ``chat_template.py``).
    As in transformers, the name of a special token inside a message becomes that token.

    The folder contains ``tokenizer.json``, ``tokenizer_config.json`` and a template: the file ``chat_template.jinja``,
    or ``chat_template`` in the config. If there are several, the one called ``default`` is used, and ``tool_use`` for
    conversations with tools.

    Args:
        path: the folder.
        chat_template: a Jinja file to use instead; None: the folder's own template.

    Attributes:
        vocab_size: the highest id plus one. A model may have more embeddings than that. Gemma 3's text models have one
            less, because the last id is that of an image.
        fingerprint: differs between tokenizers that may give different ids or spans.
        pad_id: the id of the padding token; 0 if the folder names none.
        eos_ids: the ids that end a text: the config's end token, and those in ``generation_config.json`` if it exists.

    Raises:
        ValueError: a file is missing or malformed.
    """

    def __init__(self, path: str | Path, *, chat_template: str | Path | None = None) -> None:
        self._path = Path(path).expanduser()
        self._template_file = None if chat_template is None else Path(chat_template).expanduser()
        with error_prefix("tokenizer.path"):
            files = read_tokenizer(self._path)
            ends = read_json(self._path / "generation_config.json", optional=True).get("eos_token_id")
        self._tokenizer = files.tokenizer
        self._special_ids = files.special_ids
        with error_prefix("tokenizer.path" if self._template_file is None else "tokenizer.chat_template"):
            templates = read_chat_templates(self._path, files.config, self._template_file)
            self._template = ChatTemplate(templates, files.special_tokens)
        # Then the eos_token of a saved folder has to stay the same.
        self._keeps_eos = files.special_tokens.get("eos_token") in files.only_named or any(
            "eos_token" in source for source in templates.values()
        )

        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        named = {name: self._tokenizer.token_to_id(token) for name, token in files.special_tokens.items()}
        self.pad_id: int = named.get("pad_token") or 0
        ends = [named.get("eos_token"), *(ends if isinstance(ends, list) else [ends])]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))

        added = sorted(map(repr, self._tokenizer.get_added_tokens_decoder().items()))
        how = [files.class_name, *map(files.config.get, ("legacy", "add_prefix_space", "split_special_tokens"))]
        parts = [
            (self._path / "tokenizer.json").read_bytes(),
            json.dumps([_VERSION, templates, files.special_tokens, added, how], sort_keys=True).encode(),
        ]
        self.fingerprint = blake2b(b"".join(blake2b(part).digest() for part in parts), digest_size=16).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the arguments, because a compiled template cannot be pickled."""
        return partial(type(self), chat_template=self._template_file), (self._path,)

    def encode(self, conversation: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenizes a conversation.

        An answer counts in the loss from the end of the template's generation prompt, because there the model is asked
        for it, to the special token that ends the turn. So thoughts count unless the prompt contains them, even an
        empty block of thoughts. Text that the template adds after the end token (a new line) does not count. A token
        that spans the end of the prompt counts, because the answer begins in it.

        Args:
            conversation: a checked conversation. Answers that are not supervised may be rendered in any way.

        Returns:
            Token ids, and the span (first, last + 1) of the tokens of each of ``conversation.supervised``.

        Raises:
            ValueError: the template refuses the conversation, does not read a part of it, changes a supervised answer,
                renders it differently when another turn follows, or ends it without a special token.
        """
        self._template.check_fields(conversation)
        text = self._template.render(conversation.messages, conversation.tools)
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:
            # The tokenizers library raises nothing more specific.
            raise ValueError(f"tokenizer.json: {error}") from None
        ids, offsets = encoding.ids, encoding.offsets
        return ids, [self._span(conversation, index, text, ids, offsets) for index in conversation.supervised]

    def _span(
        self, conversation: Conversation, index: int, text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """First and last + 1 of the tokens of the answer ``index``."""
        *before, answer = conversation.messages[: index + 1]
        render = partial(self._template.render, tools=conversation.tools)
        turn, prompt = render([*before, answer]), render(before, add_generation_prompt=True)
        if not text.startswith(turn):
            raise ValueError(
                "the chat template is not prefix-stable: it renders an answer differently when another turn follows "
                "(Qwen 3's drops earlier thoughts); set tasks.supervise: last to train on the last answer of each "
                "conversation"
            )
        if not turn.startswith(prompt):
            raise ValueError(
                "the chat template is not prefix-stable: an answer does not follow the text of its generation prompt, "
                "so the model would be trained on another text than it is asked with"
            )

        # What follows the answer in its turn: the same text as behind an answer without calls, but for some templates
        # that end a call with a token of its own (Llama 3.1's <|eom_id|>).
        plain = {key: value for key, value in answer.items() if key != "tool_calls"} | {"content": _ANSWER}
        foot = render([*before, plain]).split(_ANSWER)[-1]
        start, end = len(prompt), len(turn)
        first = bisect_right(offsets, start, key=lambda offset: offset[1])
        # A special token of the header may also consume the white space at the start of the answer.
        if first < len(ids) and offsets[first][0] < start and ids[first] in self._special_ids:
            first += 1
        turn_end = bisect_left(offsets, end, key=lambda offset: offset[0])
        ends = [position for position in range(first, turn_end) if ids[position] in self._special_ids]
        if turn.endswith(foot):
            end -= len(foot)
            ends = [position for position in ends if offsets[position][1] > end]
        else:
            ends = ends[-1:]
        if missing := _missing_part(answer, turn[start:end]):
            raise ValueError(f"the chat template does not render an answer as it is written: {missing} is missing")
        if not ends:
            raise ValueError(
                "the chat template ends an answer without a special token: the model could not learn to stop"
            )
        return first, ends[0] + 1

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The id of the token that ends an answer; empty if the template refuses a question with an answer."""
        # Some templates require a system message, and some refuse it.
        for messages in (_QUESTION, [_SYSTEM, *_QUESTION]):
            try:
                ids, ((_, stop),) = self.encode(Conversation(messages, supervised=(len(messages) - 1,)))
            except ValueError:
                continue
            return (ids[stop - 1],)
        return ()

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files, so that transformers loads the same tokenizer and chat template.

        The copy's ``eos_token`` is the token that ends an answer: vLLM and llama.cpp stop there. It is not changed if
        the ids would change: if the chat template mentions ``eos_token``, or if the old one is a token only because the
        config names it.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self._path / name).is_file():
                shutil.copyfile(self._path / name, Path(folder) / name)
        if self._template_file is not None:
            shutil.copyfile(self._template_file, Path(folder) / "chat_template.jinja")
        elif (self._path / TEMPLATES_FOLDER).is_dir():
            shutil.copytree(self._path / TEMPLATES_FOLDER, Path(folder) / TEMPLATES_FOLDER, dirs_exist_ok=True)
        if not self._keeps_eos and (end_ids := self.end_ids):
            token = str(self._tokenizer.id_to_token(end_ids[0]))
            _set_eos_token(Path(folder) / "tokenizer_config.json", token)
            # Where it exists, transformers may prefer its names.
            if "eos_token" in read_json(Path(folder) / "special_tokens_map.json", optional=True):
                _set_eos_token(Path(folder) / "special_tokens_map.json", token)


def _missing_part(answer: Message, rendered: str) -> str | None:
    """Names the first part of an answer that is not in its rendered turn, in order and up to white space around it."""
    position = 0
    for name, part in _parts(answer):
        found = rendered.find(part, position)
        if found < 0:
            return f"{name} {part[:60]!r}"
        position = found + len(part)
    return None


def _parts(answer: Message) -> Iterator[tuple[str, str]]:
    yield "its 'reasoning_content'", (answer.get("reasoning_content") or "").strip()
    # A template may move thoughts, or put white space around them.
    for part in re.split("</?think>", answer.get("content") or ""):
        yield "the text", part.strip()
    for call in answer.get("tool_calls") or ():
        yield "the call of", str(call.get("function", call).get("name"))


def _set_eos_token(file: Path, token: str) -> None:
    """Leaves the file as it is if it names the token."""
    content = read_json(file)
    named = content.get("eos_token")
    if (named.get("content") if isinstance(named, dict) else named) != token:
        text = json.dumps(content | {"eos_token": token}, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")
