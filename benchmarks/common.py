"""What the benchmarks share: the model and the examples they make when none are given, their tables and numbers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "yaml"

TYPES = ("Answering", "Dialogue", "Extraction", "Sentiment", "Summarization")
WORDS = ["a", "the", "of", "to", "in", "is", "was", "for", "that", "with", "this", "from", "which", "answer", "text"]


def parser(description: str | None, *, max_seq_len: int) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: a tiny model with random weights")
    parser.add_argument("--data", type=Path, help="Super-NaturalInstructions; default: examples made by code")
    parser.add_argument("--max-seq-len", type=int, default=max_seq_len)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser


def sources(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Overrides that have a config of a real model read the model and the examples of the command line.

    Args:
        arguments: of ``parser``.
        folder: for what is made where ``--model`` or ``--data`` is missing, for the cache and the run.
    """
    model = arguments.model or tiny_model(folder / "model", max_seq_len=arguments.max_seq_len)
    data = arguments.data or instructions(folder / "data")
    return [
        f"model.path={model.absolute()}",
        f"tokenizer.path={model.absolute()}",
        f"checkpointer.checkpoint_dir={model.absolute()}",
        f"tasks.path={data.absolute()}",
        f"tasks.cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}",
        f"max_seq_len={arguments.max_seq_len}",
        "device=cpu",
    ]


def tiny_model(folder: Path, *, max_seq_len: int) -> Path:
    """A Hugging Face folder of a model of 0.2M random weights that reads bytes.

    Its vocabulary has many more rows than there are bytes, so that the head is a quarter of the work, as in SmolLM2.
    """
    import torch
    from torchtune.models.llama3_2 import llama3_2

    from adapt_recipes.data import ByteTokenizer
    from adapt_recipes.models import HuggingFaceCheckpointer, huggingface_config

    torch.manual_seed(0)
    decoder = llama3_2(
        vocab_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        max_seq_len=max_seq_len,
        intermediate_dim=192,
        tie_word_embeddings=False,
    )
    tokenizer = ByteTokenizer()
    config = huggingface_config(decoder, eos_token_id=list(tokenizer.eos_ids), pad_token_id=tokenizer.pad_id)
    HuggingFaceCheckpointer(None).save(decoder.state_dict(), folder, config=config, tokenizer=tokenizer)
    return folder


def instructions(folder: Path, *, examples: int = 400) -> Path:
    """A folder laid out as Super-NaturalInstructions, with random words.

    Lengths are those of the collection's real examples in shape: definitions of 20 to 80 characters, inputs log-normal
    around a median of the type's own, and answers that are short or a tenth of the input.
    """
    (folder / "tasks").mkdir(parents=True)
    rng = random.Random(0)
    for number, category in enumerate(TYPES):
        instances = []
        for _ in range(examples):
            size = int(rng.lognormvariate(4.0 + 0.3 * number, 0.7))
            answer = _words(rng, max(3, size // 10) if number > 2 else 3)
            instances.append({"input": _words(rng, size), "output": [answer]})
        definition = _words(rng, rng.randint(20, 80))
        content = {"Categories": [category], "Definition": [definition], "Instances": instances}
        (folder / "tasks" / f"task{number:03}.json").write_text(json.dumps(content))
    return folder


def equal_tasks(path: str, *, num_tasks: int, num_examples: int, max_bytes: int) -> list[Any]:
    """The same examples, whatever the number of tasks they are dealt out to: a ``tasks._component_``.

    Args:
        path: Super-NaturalInstructions.
        num_tasks: how many tasks; divides ``num_examples``.
        num_examples: of training, and as many of validation, of all tasks together.
        max_bytes: only examples that are as short are taken, so that none is dropped later.
    """
    from adapt_recipes.data import RawTask, natural_instructions

    pool = {c[0]["content"]: c for task in natural_instructions(path) for c in task.conversations}
    short = [c for c in pool.values() if sum(len(message["content"].encode()) for message in c) <= max_bytes]
    if len(short) < 2 * num_examples or num_examples % num_tasks:
        raise ValueError(
            f"{num_examples} examples, twice, for {num_tasks} tasks: there are {len(short)} of up to {max_bytes} bytes"
        )
    random.Random(0).shuffle(short)
    train, validation = short[:num_examples], short[num_examples : 2 * num_examples]
    return [RawTask(f"task{i}", train[i::num_tasks], validation[i::num_tasks]) for i in range(num_tasks)]


def _words(rng: random.Random, size: int) -> str:
    """About ``size`` characters."""
    words = [rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(size // 5 + 1)]
    return " ".join(words)[:size].strip() or "a"


def load_recipe(config: Path) -> ModuleType:
    """The recipe that a config names."""
    from adapt_recipes.cli import recipe_file, recipe_of

    path = Path(recipe_file(str(recipe_of(config))))
    return load_module(path.stem, path)


def load_module(name: str, path: Path) -> ModuleType:
    """A recipe's module, by its path: torchtune installs a package ``recipes`` that cannot be imported."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def memory(pid: int | str = "self") -> tuple[float, float]:
    """(now, at its peak): resident memory of a process in MiB; the peak of this one alone where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if "Vm" in key}
        return kib["VmRSS"] / 1024, kib["VmHWM"] / 1024
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF if pid == "self" else resource.RUSAGE_CHILDREN).ru_maxrss
        return (mib := peak / (2**20 if sys.platform == "darwin" else 2**10)), mib


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a plain table; numbers to three digits."""
    table = Table(title=title, box=None, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(_digits(cell) for cell in row))
    Console(soft_wrap=True).print(table)


def _digits(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def write(path: Path | None, numbers: dict[str, Any]) -> dict[str, Any]:
    """Write the numbers as JSON where so wished, and return them."""
    if path is not None:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers
