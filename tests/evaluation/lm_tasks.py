"""Rows of benchmarks as the hub has them, and a tiny model that lm-eval opens."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from standins import write_tokenizer  # noqa: E402

WORDS = ["the", "answer", "is", "yes", "or", "no", "a", "cat", "sat", "on", "mat"]


def write_model(folder: Path, *, chat_template: bool = True) -> Path:
    """A Hugging Face folder of a model of .03M parameters."""
    vocab_size = write_tokenizer(folder, **({} if chat_template else {"chat_template": None}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_key_value_heads, config.tie_word_embeddings, config.max_position_embeddings = 2, True, 4096
    model = LlamaForCausalLM(config)
    # So large that the choices differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


@cache
def manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _text(rng: random.Random, number: int = 4) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(number))


def _arc(rng: random.Random, i: int) -> dict[str, Any]:
    choices = {"text": [_text(rng) for _ in "ABCD"], "label": [*"ABCD"]}
    return {"id": str(i), "question": _text(rng), "choices": choices, "answerKey": rng.choice("ABCD")}


def _hellaswag(rng: random.Random, i: int) -> dict[str, Any]:
    row = {"ind": i, "activity_label": "Cats", "ctx_a": _text(rng), "ctx_b": _text(rng), "ctx": "", "split": "val"}
    return row | {"endings": [_text(rng) for _ in range(4)], "label": str(rng.randrange(4))}


def _winogrande(rng: random.Random, i: int) -> dict[str, Any]:
    row = {"sentence": f"{_text(rng)} _ {_text(rng)}", "option1": "the cat", "option2": "the mat"}
    return row | {"answer": rng.choice("12")}


def _bbh(rng: random.Random, i: int) -> dict[str, Any]:
    return {"input": _text(rng), "target": rng.choice(["True", "False"])}


def _gsm8k(rng: random.Random, i: int) -> dict[str, Any]:
    return {"question": _text(rng), "answer": f"{_text(rng)} <<1+{i}={1 + i}>>\n#### {1 + i}"}


def _boolq(rng: random.Random, i: int) -> dict[str, Any]:
    return {"question": _text(rng), "passage": _text(rng, 12), "idx": i, "label": rng.randrange(2)}


def _drop(rng: random.Random, i: int) -> dict[str, Any]:
    date = {"day": "", "month": "", "year": ""}
    answer = {"number": "", "date": date, "spans": [_text(rng, 1)], "worker_id": "", "hit_id": ""}
    validated = {"number": [""], "date": [date], "spans": [[_text(rng, 2)]], "worker_id": [""], "hit_id": [""]}
    row = {"query_id": str(i), "passage": _text(rng, 12), "question": _text(rng)}
    return row | {"answer": answer, "validated_answers": validated}


def _mmlu(rng: random.Random, i: int) -> dict[str, Any]:
    return {
        "question": _text(rng),
        "subject": "anatomy",
        "choices": [_text(rng, 2) for _ in range(4)],
        "answer": rng.randrange(4),
    }


# File in ``data_dir``: what makes a row, and how many there are.
FILES: dict[str, tuple[Callable[[random.Random, int], dict[str, Any]], int]] = {
    "arc_challenge.jsonl": (_arc, 6),
    "hellaswag.jsonl": (_hellaswag, 6),
    "winogrande.jsonl": (_winogrande, 6),
    "bbh/boolean_expressions.jsonl": (_bbh, 3),
    "bbh/navigate.jsonl": (_bbh, 5),
    "gsm8k.jsonl": (_gsm8k, 3),
    "gsm8k_fewshot.jsonl": (_gsm8k, 8),
    "boolq.jsonl": (_boolq, 6),
    "drop.jsonl": (_drop, 3),
    "mmlu/anatomy_test.jsonl": (_mmlu, 6),
    "mmlu/anatomy_dev.jsonl": (_mmlu, 5),
    "mmlu/world_religions_test.jsonl": (_mmlu, 4),
    "mmlu/world_religions_dev.jsonl": (_mmlu, 5),
}


def write_rows(folder: Path, names: Sequence[str] = tuple(FILES)) -> Path:
    """Files of benchmarks with random rows."""
    for name in names:
        make, number = FILES[name]
        rng = random.Random(name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(make(rng, i)) + "\n" for i in range(number)))
    return folder
