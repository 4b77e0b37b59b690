"""Tokens per second, padding and memory of this project's training step, torchtune's recipe and HF's Trainer.

    python benchmarks/throughput.py [--model FOLDER] [--data FOLDER]

All train the same model on the same examples, which this project's sampler draws once with a uniform mixture, in the
same order. All take an optimizer step (AdamW, fused, gradients clipped at 1) every ``--batch-size`` examples, in bf16:

- ours: the shipped recipe's ``step``: fp32 weights and bf16 autocast, micro-batches by length, the head on supervised
  positions.
- torchtune: the recipe class of its wheel, with its own ``train``: bf16 weights, 8 examples per forward pass.
- Trainer: that of transformers: fp32 weights and bf16 autocast, 8 examples per forward pass. It is skipped, with a
  message, if ``--trainer-python`` has no transformers and accelerate.

``contenders.py`` says which parts are the library's. Each round starts a new process for each, in turn: A B C A B C. It
trains over the examples twice, and the second epoch is measured (the first warms up kernels and memory). The ratios,
between runs that alternate, are reliable; times on a machine with other load are not.

A real token is a position that is not padding, counted after the causal shift (the length of an example minus one), so
that all contenders have the same number of them. Padding is the share of the other positions that pass through the
embedding (the last token of an example, which predicts nothing, is not padding). Memory is the peak of the process, and
its growth since the libraries were imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from contenders import CONTENDERS

from adapt_recipes.config import load
from adapt_recipes.data import IGNORE_INDEX, TokenSampler, load_tasks


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line ``argv``. Returns the numbers that ``--json`` writes."""
    parser = common.parser(__doc__, max_seq_len=1024)
    parser.add_argument("--examples", type=int, default=64, help="drawn once, a multiple of the batch size")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per optimizer step, for all")
    parser.add_argument("--stock-batch-size", type=int, default=8, help="examples per forward pass of the other two")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--trainer-python", default=sys.executable, help="interpreter of the Trainer's environment")
    arguments = parser.parse_args(argv)
    if arguments.examples % arguments.batch_size or arguments.batch_size % arguments.stock_batch_size:
        parser.error("--examples has to be a multiple of --batch-size, and that of --stock-batch-size")
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(arguments, Path(folder))
    report(numbers)
    return common.write(arguments.json, numbers)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The counts of the examples, and the measurements of each contender in each round."""
    settings = draw(arguments, folder)
    (folder / "settings.json").write_text(json.dumps(settings))
    rounds: list[dict[str, dict[str, Any]]] = []
    skipped: dict[str, str] = {}
    for _ in range(arguments.rounds):
        rounds.append({})
        for name in [name for name in arguments.contenders if name not in skipped]:
            python = arguments.trainer_python if name == "Trainer" else sys.executable
            answer = contend(name, python=python, folder=folder, threads=arguments.threads)
            if "skipped" in answer:
                skipped[name] = answer["skipped"]
            else:
                rounds[-1][name] = answer
    contenders = [name for name in arguments.contenders if name not in skipped]
    counts = {key: settings[key] for key in ("num_examples", "num_tokens", "num_supervised_tokens")}
    shown: dict[str, Any] = {}
    for name in contenders:
        turns = [turn[name] for turn in rounds]
        # For the others one position per example, the last, is neither a real token nor padding.
        real = settings["num_tokens"] + (0 if name == "ours" else settings["num_examples"])
        shown[name] = {
            "tokens_per_second": [settings["num_tokens"] / turn["seconds"] for turn in turns],
            "supervised_tokens_per_second": [settings["num_supervised_tokens"] / turn["seconds"] for turn in turns],
            "padding": 1 - real / turns[0]["positions"],
            "positions": turns[0]["positions"],
            "first_loss": turns[0]["first_loss"],
            "peak_mib": max(turn["peak_mib"] for turn in turns),
            "growth_mib": max(turn["growth_mib"] for turn in turns),
        }
    ratios = {
        name: [turn[name]["seconds"] / turn["ours"]["seconds"] for turn in rounds]
        for name in contenders
        if name != "ours" and "ours" in contenders
    }
    return {**counts, "contenders": shown, "ours_over": ratios, "skipped": skipped}


def draw(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Draws the examples as the recipe will, writes them to a file, and returns the settings for the contenders."""
    recipe = common.load_module("sft_full_finetune", common.ROOT / "recipes" / "sft_full_finetune.py")
    overrides = [
        *common.sources(arguments, folder),
        "tasks.types=null",
        "budget.tokens=1000000000",
        "budget.allow_repeats=true",
        f"batch_size={arguments.batch_size}",
        f"micro_batch_tokens={max(4096, arguments.max_seq_len)}",
        "log_every=0",
    ]
    config = load(recipe.Config, common.CONFIGS / "smollm2_135m_uniform_10pct.yaml", overrides)
    tokenizer = config.tokenizer.build()
    tasks = load_tasks(config.tasks, tokenizer=tokenizer, max_seq_len=config.max_seq_len)
    mixture = config.mixture.build(task_names=[t.name for t in tasks], num_supervised_tokens=[], budget_tokens=0)
    sampler = TokenSampler(tasks, seed=config.seed)
    rows, num_supervised = [], 0
    for drawn in sampler.draw(mixture.probabilities(), max_examples=arguments.examples, max_tokens=10**9):
        split = tasks[drawn.task].train
        start, end = split.offsets[drawn.example_index : drawn.example_index + 2].tolist()
        tokens, supervised = split.tokens[start:end].long(), split.supervised[start:end]
        rows.append({"tokens": tokens.tolist(), "labels": tokens.masked_fill(~supervised, IGNORE_INDEX).tolist()})
        num_supervised += int(supervised.sum())
    (folder / "examples.json").write_text(json.dumps(rows))
    return {
        "overrides": overrides,
        "model": config.checkpointer.arguments["checkpoint_dir"],
        "folder": str(folder),
        "examples": str(folder / "examples.json"),
        "max_seq_len": arguments.max_seq_len,
        "batch_size": arguments.batch_size,
        "stock_batch_size": arguments.stock_batch_size,
        "threads": arguments.threads,
        "num_examples": len(rows),
        "num_tokens": sum(len(row["tokens"]) - 1 for row in rows),
        "num_supervised_tokens": num_supervised,
    }


def contend(name: str, *, python: str, folder: Path, threads: int) -> dict[str, Any]:
    """Runs ``contenders.py`` in a process of its own and returns its answer; its output is in ``folder / NAME.log``."""
    here = Path(__file__).resolve().parent
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(common.ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    answer, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [python, str(here / "contenders.py"), name, str(folder / "settings.json"), str(answer)]
    with log.open("w") as output:
        if subprocess.run(command, stdout=output, stderr=output, env=environment).returncode:
            raise RuntimeError(f"{name} failed:\n{log.read_text()[-2000:]}")
    return json.loads(answer.read_text())


def report(numbers: dict[str, Any]) -> None:
    """Prints the tables."""
    names = list(numbers["contenders"])
    title = "{num_examples} examples, {num_tokens} real tokens, {num_supervised_tokens} supervised".format(**numbers)
    rows = []
    for name in names:
        of = numbers["contenders"][name]
        speed = statistics.median(of["tokens_per_second"])
        supervised = statistics.median(of["supervised_tokens_per_second"])
        padding, loss = f"{of['padding']:.1%}", f"{of['first_loss']:.4f}"
        rows.append((name, speed, supervised, padding, of["peak_mib"], of["growth_mib"], loss))
    columns = ("median", "tokens/s", "supervised/s", "padding", "peak MiB", "growth MiB", "first loss")
    common.show(title, columns, rows)
    speeds = zip(*(numbers["contenders"][name]["tokens_per_second"] for name in names), strict=True)
    common.show("tokens/s by round", ("round", *names), [(str(i), *speed) for i, speed in enumerate(speeds, 1)])
    for name, ratios in numbers["ours_over"].items():
        print(f"ours / {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for name, reason in numbers["skipped"].items():
        print(f"{name} skipped: {reason}")


if __name__ == "__main__":
    main()
