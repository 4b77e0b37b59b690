"""Shared by the benchmarks: the model and examples they generate if none are given, tables, and numbers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from adapt_recipes.report.read import Run

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "yaml"

# Of generated examples.
WORKLOADS = ("natural", "long_answers", "mixed_lengths")
TYPES = ("Answering", "Dialogue", "Extraction", "Sentiment", "Summarization")
VOCAB = ["a", "the", "of", "to", "in", "is", "was", "for", "that", "with", "this", "from", "which", "answer", "text"]


def parser(description: str | None, *, max_seq_len: int) -> argparse.ArgumentParser:
    """A command line parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: a tiny model with random weights")
    parser.add_argument("--data", type=Path, help="Super-NaturalInstructions; default: generated examples")
    parser.add_argument("--max-seq-len", type=int, default=max_seq_len)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser


def sources(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Overrides that set the model and the data of a config to those of the command line.

    Args:
        arguments: of ``parser``.
        folder: for a generated model and generated examples, for the cache and the run.
    """
    model = arguments.model or tiny_model(folder / "model", max_seq_len=arguments.max_seq_len)
    workload = getattr(arguments, "workload", "natural")
    data = arguments.data or instructions(folder / "data", workload=workload)
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
    """Writes a Hugging Face folder with a model of 0.2M random weights that reads bytes.

    Its vocabulary is much larger than the number of bytes, so that the head is a quarter of the work, as in SmolLM2.
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


def instructions(folder: Path, *, examples: int = 400, workload: str = "natural") -> Path:
    """Writes a folder in the layout of Super-NaturalInstructions, with random words.

    Definitions have 20 to 80 characters. ``workload`` says how long inputs and answers are: as in the collection
    (log-normal inputs with a median per type, answers that are short or a tenth of the input); answers as long as the
    inputs; or together 30 to 8,000 characters, a quarter of them the answer, as many examples of each order of
    magnitude.
    """
    (folder / "tasks").mkdir(parents=True)
    rng = random.Random(0)
    for number, category in enumerate(TYPES):
        instances = []
        for _ in range(examples):
            if workload == "long_answers":
                size = answer_size = int(rng.lognormvariate(6.0, 0.5))
            elif workload == "mixed_lengths":
                total = 10 ** rng.uniform(1.5, 3.9)
                size, answer_size = int(0.75 * total), int(0.25 * total)
            else:
                size = int(rng.lognormvariate(4.0 + 0.3 * number, 0.7))
                answer_size = max(3, size // 10) if number > 2 else 3
            answer = _words(rng, answer_size)
            instances.append({"input": _words(rng, size), "output": [answer]})
        definition = _words(rng, rng.randint(20, 80))
        content = {"Categories": [category], "Definition": [definition], "Instances": instances}
        (folder / "tasks" / f"task{number:03}.json").write_text(json.dumps(content))
    return folder


def equal_tasks(path: str, *, num_tasks: int, num_examples: int, max_bytes: int) -> list[Any]:
    """The same examples, distributed to any number of tasks: a ``tasks._component_``.

    Args:
        path: Super-NaturalInstructions.
        num_tasks: number of tasks; divides ``num_examples``.
        num_examples: for training, and as many for validation, of all tasks together.
        max_bytes: longer examples are skipped, so that none is dropped later.
    """
    from adapt_recipes.data import Conversation, RawTask, natural_instructions

    read = [c for task in natural_instructions(path) for c in task.conversations if isinstance(c, Conversation)]
    pool = {c.messages[0]["content"]: c for c in read}
    short = [c for c in pool.values() if sum(len(each["content"].encode()) for each in c.messages) <= max_bytes]
    if len(short) < 2 * num_examples or num_examples % num_tasks:
        raise ValueError(
            f"{num_examples} examples, twice, for {num_tasks} tasks: there are {len(short)} of up to {max_bytes} bytes"
        )
    random.Random(0).shuffle(short)
    train, validation = short[:num_examples], short[num_examples : 2 * num_examples]
    return [RawTask(f"task{i}", train[i::num_tasks], validation[i::num_tasks]) for i in range(num_tasks)]


def _words(rng: random.Random, size: int) -> str:
    """About ``size`` characters."""
    words = [rng.choice(VOCAB) + str(rng.randrange(100)) for _ in range(size // 5 + 1)]
    return " ".join(words)[:size].strip() or "a"


def load_recipe(config: Path) -> ModuleType:
    """The recipe that a config names."""
    from adapt_recipes.shipped import recipe_file, recipe_of

    path = Path(recipe_file(str(recipe_of(config))))
    return load_module(path.stem, path)


def load_module(name: str, path: Path) -> ModuleType:
    """Imports a recipe by its path, because torchtune installs a package ``recipes`` that cannot be imported."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def memory(pid: int | str = "self") -> tuple[float, float]:
    """(current, peak): resident memory of a process in MiB; without /proc both are the peak of this process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if "Vm" in key}
        return kib["VmRSS"] / 1024, kib["VmHWM"] / 1024
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF if pid == "self" else resource.RUSAGE_CHILDREN).ru_maxrss
        return (mib := peak / (2**20 if sys.platform == "darwin" else 2**10)), mib


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a plain table, with numbers to three digits."""
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


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with the header first."""
    header, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([header, "|" + "---|" * len(lines[0]), *rest])


def above_floors(run: Run, floors: Mapping[str, float]) -> Run:
    """The run with every loss counted from the lowest that its task can have: its floor in nats, else 0."""
    import numpy as np

    lowest = np.array([floors.get(task, 0.0) for task in run.tasks])
    losses = {"validation_losses": run.final_losses, "test_losses": run.test_losses}
    excess = {key: dict(zip(run.tasks, (values - lowest).tolist(), strict=True)) for key, values in losses.items()}
    validations = run.validations._replace(losses=run.validations.losses - lowest)
    return replace(run, summary=run.summary | excess, validations=validations)


def write(path: Path | None, numbers: dict[str, Any]) -> dict[str, Any]:
    """Writes the numbers as JSON if a path is given, and returns them."""
    if path is not None:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers
