"""Converts a conversation to tokens, and finds the tokens of each of the assistant's answers.

The same for every model: render the chat template once, tokenize the text once, and find answers by character offsets.
"""

from __future__ import annotations

import json
import re
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from tokenizers import Encoding

from adapt_recipes.data.chat_template import TEMPLATES_FOLDER, ChatTemplate, read_chat_templates
from adapt_recipes.data.conversations import error_prefix
from adapt_recipes.data.examples import Conversation, Message
from adapt_recipes.data.tokenizer_files import read_json, read_tokenizer

P = ParamSpec("P")
T = TypeVar("T")

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
# The keys of a message of text alone.
_PLAIN = {"role", "content"}


class _RenderedAnswer(NamedTuple):
    """Where an answer is in the rendered text.

    Attributes:
        message: the answer.
        start: the length of the text up to the end of the generation prompt.
        end: the length of the text up to the end of the answer's turn.
        foot: what the template puts behind an answer.
    """

    message: Message
    start: int
    end: int
    foot: str


class _Layout(NamedTuple):
    """How a template renders messages of some roles: as fixed text around their contents.

    Attributes:
        fixed: the text before the first content, between contents, and behind the last.
        answers: by index, with ``start`` and ``end`` of the fixed text alone.
    """

    fixed: list[str]
    answers: dict[int, _RenderedAnswer]


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
        # By the roles of a conversation.
        self._layouts: dict[tuple[str, ...], _Layout | None] = {}
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
        (result,) = self.encode_all([conversation])
        if isinstance(result, ValueError):
            raise result
        return result

    def encode_all(
        self, conversations: Sequence[Conversation]
    ) -> list[tuple[list[int], list[tuple[int, int]]] | ValueError]:
        """``encode`` of each conversation, or the error that it raises, in less time.

        One kind of work follows the other: tokenizing takes a third longer where other work in between evicts its
        tables from the caches of the CPU.
        """
        texts = [_attempt(self._text, each) for each in conversations]
        encodings = [each if isinstance(each, ValueError) else _attempt(self._encoding, each) for each in texts]
        return [
            encoding if isinstance(encoding, ValueError) else _attempt(self._with_spans, conversation, encoding)
            for conversation, encoding in zip(conversations, encodings, strict=True)
        ]

    def _text(self, conversation: Conversation) -> str:
        self._template.check_fields(conversation)
        return self._template.render(conversation.messages, conversation.tools)

    def _encoding(self, text: str) -> tuple[str, Encoding]:
        try:
            return text, self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:
            # The tokenizers library raises nothing more specific.
            raise ValueError(f"tokenizer.json: {error}") from None

    def _with_spans(
        self, conversation: Conversation, encoded: tuple[str, Encoding]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        text, encoding = encoded
        ids = encoding.ids
        return ids, [self._span(answer, text, ids, encoding) for answer in self._rendered_answers(conversation, text)]

    def _rendered_answers(self, conversation: Conversation, text: str) -> list[_RenderedAnswer]:
        """Where the supervised answers are in the rendered ``text``.

        A template renders most conversations as fixed text around their contents. Where it has done so, lengths say
        where an answer is; else the conversation is rendered again up to the answer.
        """
        messages = conversation.messages
        if conversation.tools is None and all(map(_is_plain, messages)):
            roles = tuple(message["role"] for message in messages)
            if roles not in self._layouts:
                self._layouts[roles] = self._layout(roles)
            layout = self._layouts[roles]
            contents = [message["content"] for message in messages]
            if layout is not None and text == "".join(_alternating(layout.fixed, contents)):
                # The positions of the ends of contents, without the fixed text.
                ends = [0, *accumulate(map(len, contents))]
                return [
                    _RenderedAnswer(
                        messages[index],
                        layout.answers[index].start + ends[index],
                        layout.answers[index].end + ends[index + 1],
                        layout.answers[index].foot,
                    )
                    for index in conversation.supervised
                ]
        return [self._rendered_answer(conversation, index, text) for index in conversation.supervised]

    def _layout(self, roles: tuple[str, ...]) -> _Layout | None:
        """How the template renders plain messages with these roles; None: not as fixed text around the contents."""
        marks = [f"\ue000{index}\ue000" for index in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        answers = {}
        try:
            text = self._template.render(messages)
            fixed, rest = [], text
            for mark in marks:
                before, found, rest = rest.partition(mark)
                if not found:
                    return None
                fixed.append(before)
            fixed.append(rest)
            if "\ue000" in "".join(fixed):
                return None
            ends = [0, *accumulate(map(len, marks))]
            for index, role in enumerate(roles):
                if role == "assistant":
                    found_at = self._rendered_answer(Conversation(messages, supervised=(index,)), index, text)
                    start, end = found_at.start - ends[index], found_at.end - ends[index + 1]
                    answers[index] = found_at._replace(start=start, end=end)
        except ValueError:
            return None
        return _Layout(fixed, answers)

    def _rendered_answer(self, conversation: Conversation, index: int, text: str) -> _RenderedAnswer:
        """Renders the turns up to the answer ``index``, with and without it."""
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
        return _RenderedAnswer(answer, len(prompt), len(turn), foot)

    def _span(self, answer: _RenderedAnswer, text: str, ids: list[int], encoding: Encoding) -> tuple[int, int]:
        """First and last + 1 of the tokens of an answer."""
        start, end = answer.start, answer.end
        first = _first_token(encoding, start, behind=False)
        # A special token of the header may also consume the white space at the start of the answer.
        if first < len(ids) and ids[first] in self._special_ids and _chars(encoding, first)[0] < start:
            first += 1
        turn_end = _first_token(encoding, end, behind=True)
        ends = [position for position in range(first, turn_end) if ids[position] in self._special_ids]
        if text.endswith(answer.foot, 0, end):
            end -= len(answer.foot)
            ends = [position for position in ends if _chars(encoding, position)[1] > end]
        else:
            ends = ends[-1:]
        if missing := _missing_part(answer.message, text[start:end]):
            raise ValueError(f"the chat template does not render an answer as it is written: {missing} is missing")
        if not ends:
            raise ValueError(
                "the chat template ends an answer without a special token: the model could not learn to stop"
            )
        return first, ends[0] + 1

    def encode_prompt(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[int]]:
        """The text with which a model is asked for the next answer, and its tokens.

        Raises:
            ValueError: the template refuses the messages.
        """
        text = self._template.render(messages, tools, add_generation_prompt=True)
        return text, self._encoding(text)[1].ids

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


def _attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | ValueError:
    """The result of a function, or the ``ValueError`` that it raises."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        return error


def _is_plain(message: Message) -> bool:
    """Whether a message is a text that a template has no reason to treat in a special way."""
    content = message.get("content")
    return message.keys() == _PLAIN and isinstance(content, str) and not ("<" in content or content != content.strip())


def _alternating(fixed: list[str], contents: list[str]) -> Iterator[str]:
    for before, content in zip(fixed, contents, strict=False):
        yield before
        yield content
    yield fixed[-1]


def _chars(encoding: Encoding, token: int) -> tuple[int, int]:
    """The first and last + 1 of the characters of a token."""
    chars = encoding.token_to_chars(token)
    assert chars is not None
    return chars


def _first_token(encoding: Encoding, position: int, *, behind: bool) -> int:
    """The first token that ends behind the character at ``position``, or (``behind``) that begins there or later.

    The library converts the offsets of all tokens at once, which takes a tenth of the time of tokenizing. The character
    is asked for where that gives the same.
    """
    token = encoding.char_to_token(position)
    if token is not None and not behind:
        return token
    if token is not None and _chars(encoding, token)[0] == position:
        if token == 0 or _chars(encoding, token - 1)[0] < position:
            return token
    elif token is None and behind and len(encoding) and _chars(encoding, len(encoding) - 1)[0] < position:
        return len(encoding)
    if behind:
        return bisect_left(encoding.offsets, position, key=lambda offset: offset[0])
    return bisect_right(encoding.offsets, position, key=lambda offset: offset[1])


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
