"""Bytes as tokens, for the toy tasks and for tests: there is no vocabulary to download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from adapt_recipes.data.examples import Conversation

_END = "<|end|>"
_END_ID = 256
_UNSUPPORTED = {"tool_calls", "reasoning_content"}


class ByteTokenizer:
    """The UTF-8 bytes of all messages (ids 0 to 255), and an end token (256) after every answer.

    It has the interface of ``ChatTokenizer``, and takes no tools and no thoughts.

    Args:
        supervise_end: put an end token after every answer, which counts with it. False: there is no end token, for
            answers of a fixed length.
    """

    vocab_size = 257
    pad_id = _END_ID
    eos_ids = (_END_ID,)

    def __init__(self, *, supervise_end: bool = True) -> None:
        self._supervise_end = supervise_end
        self.end_ids: tuple[int, ...] = self.eos_ids if supervise_end else ()
        self.fingerprint = f"bytes-{'end' if supervise_end else 'no-end'}"

    def encode(self, conversation: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the span (first, last + 1) of the tokens of each of ``conversation.supervised``.

        Raises:
            ValueError: the conversation has more than text; or the text contains the name of the end token, which
                transformers would read as the end token.
        """
        messages = conversation.messages
        fields = {key for message in messages for key, value in message.items() if value} & _UNSUPPORTED
        fields |= {"tools"} if conversation.tools else set()
        if fields or any(message["role"] == "tool" for message in messages):
            what = f"{min(fields)!r}" if fields else "the role 'tool'"
            raise ValueError(f"the byte tokenizer takes text alone, not {what}")
        if any(not isinstance(message["content"], str) for message in messages):
            raise ValueError("the byte tokenizer takes text alone, not a message without content")
        if _END in "".join(message["content"] for message in messages):
            raise ValueError(f"the text contains {_END}, the name of the end token")
        tokens: list[int] = []
        spans = []
        for message in messages:
            first = len(tokens)
            tokens += message["content"].encode()
            if message["role"] == "assistant" and self._supervise_end:
                tokens.append(_END_ID)
            spans.append((first, len(tokens)))
        return tokens, [spans[index] for index in conversation.supervised]

    def save(self, folder: str | Path) -> None:
        """Writes a tokenizer and a chat template with which transformers computes the same ids."""
        byte_names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        tokenizer = Tokenizer(models.BPE(vocab=byte_names, merges=[], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.add_special_tokens([_END])
        end = "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}" if self._supervise_end else ""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _END,
            "pad_token": _END,
            "clean_up_tokenization_spaces": False,
            "chat_template": "{% for message in messages %}{{ message['content'] }}" + end + "{% endfor %}",
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
