"""Bytes as tokens, for the toy tasks and for tests: there is no vocabulary to download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from adapt_recipes.data.examples import Conversation

_END = "<|end|>"
_END_ID = 256


class ByteTokenizer:
    """The UTF-8 bytes of all messages (ids 0 to 255), and an end token (256) after every answer.

    It has the interface of ``ChatTokenizer``.

    Args:
        supervise_end: put a supervised end token after every answer. False: there is no end token, for answers of a
            fixed length.
    """

    vocab_size = 257
    pad_id = _END_ID
    eos_ids = (_END_ID,)

    def __init__(self, *, supervise_end: bool = True) -> None:
        self._supervise_end = supervise_end
        self.end_ids: tuple[int, ...] = self.eos_ids if supervise_end else ()
        self.fingerprint = f"bytes-{'end' if supervise_end else 'no-end'}"

    def encode(self, messages: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it is supervised; two lists of the same length.

        Raises:
            ValueError: the text contains the name of the end token, which transformers would read as the end token.
        """
        if _END in "".join(message["content"] for message in messages):
            raise ValueError(f"the text contains {_END}, the name of the end token")
        tokens: list[int] = []
        supervised: list[bool] = []
        for message in messages:
            is_answer = message["role"] == "assistant"
            tokens += message["content"].encode()
            if is_answer and self._supervise_end:
                tokens.append(_END_ID)
            supervised += [is_answer] * (len(tokens) - len(supervised))
        return tokens, supervised

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
