"""Real tokens per second and memory of a training step: this project, torchtune's recipe, and TRL's SFTTrainer.

    python benchmarks/throughput.py [--model FOLDER] [--data FOLDER | --workload NAME] [--trl-python PYTHON]

All train the same model on the same examples, which this project's sampler draws once with a uniform mixture. All take
an optimizer step (AdamW, fused, gradients clipped at 1) every ``--batch-size`` examples, in the same precision:

- ours: the shipped recipe's ``step``.
- torchtune: the recipe class of its wheel, padded; "torchtune packed": with its ``PackedDataset``.
- TRL sorted: ``SFTTrainer`` with ``train_sampling_strategy="group_by_length"``; "TRL packed": ``packing=True`` (bfd).

``contenders.py`` says which parts are the library's. A contender that cannot run is skipped, with a message.

First each contender looks for its best micro-batch size: the examples of one step, once, with each size of its
``SIZES``. Then it is measured at the fastest one. Each round starts a new process for each contender, in turn: A B C A
B C. It takes one step to warm up and is measured on all examples. The ratios, between runs that alternate, are
reliable; times on a machine with other load are not.

A real token is a position that is not padding, counted after the causal shift (the length of an example minus one), so
that all contenders have the same number of them. "Computed" is the number of positions that pass through the embedding,
relative to the real ones: padding makes it more, a beginning that examples share and that is computed once makes it
less. Memory is the peak of the process, and its growth since the libraries were imported.

Workloads: ``natural`` (``--data``, or generated in the likeness of Natural Instructions: short answers),
``long_answers`` (half of the tokens supervised) and ``mixed_lengths`` (20 to 4,000 tokens, as many examples of each
order of magnitude; ``--max-seq-len 4096``). What is generated is random words behind one definition per task.
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
from contenders import CONTENDERS, SIZES

from adapt_recipes.config import load
from adapt_recipes.data import IGNORE_INDEX, TokenSampler, load_tasks


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line ``argv``. Returns the numbers that ``--json`` writes."""
    parser = common.parser(__doc__, max_seq_len=1024)
    parser.add_argument("--workload", choices=common.WORKLOADS, default="natural")
    parser.add_argument("--examples", type=int, default=32, help="drawn once, a multiple of the batch size")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per optimizer step, for all")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment with TRL")
    arguments = parser.parse_args(argv)
    if arguments.examples % arguments.batch_size:
        parser.error("--examples has to be a multiple of --batch-size")
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(arguments, Path(folder))
    report(numbers)
    return common.write(arguments.json, numbers)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The counts of the examples, the best size of each contender, and its measurements in each round."""
    settings = draw(arguments, folder)

    def contend(name: str, size: int, *, examples: int, warm_up: bool) -> dict[str, Any]:
        python = arguments.trl_python if name.startswith("TRL") else sys.executable
        chosen = settings | {"size": size, "num_examples": examples, "warm_up": warm_up}
        print(f"{name}, micro-batches of {size}, {examples} examples", file=sys.stderr)
        return run(name, chosen, python=python, folder=folder, threads=arguments.threads)

    # The best size of each.
    sizes: dict[str, dict[int, float]] = {}
    skipped: dict[str, str] = {}
    for name in arguments.contenders:
        tried = {}
        for size in SIZES[name]:
            answer = contend(name, size, examples=arguments.batch_size, warm_up=False)
            if "skipped" in answer:
                skipped[name] = answer["skipped"]
                break
            tried[size] = answer["seconds"]
        else:
            sizes[name] = tried
    best = {name: min(tried, key=lambda size: tried[size]) for name, tried in sizes.items()}

    # The rounds.
    rounds = [
        {name: contend(name, size, examples=arguments.examples, warm_up=True) for name, size in best.items()}
        for _ in range(arguments.rounds)
    ]
    counts = {key: settings[key] for key in ("num_tokens", "num_supervised_tokens")}
    shown: dict[str, Any] = {}
    for name in best:
        turns = [turn[name] for turn in rounds]
        shown[name] = {
            "size": best[name],
            "search_seconds": {str(size): seconds for size, seconds in sizes[name].items()},
            "tokens_per_second": [settings["num_tokens"] / turn["seconds"] for turn in turns],
            "supervised_tokens_per_second": [settings["num_supervised_tokens"] / turn["seconds"] for turn in turns],
            "computed": turns[0]["positions"] / settings["num_tokens"],
            "loss": turns[0]["loss"],
            "peak_mib": max(turn["peak_mib"] for turn in turns),
            "growth_mib": max(turn["growth_mib"] for turn in turns),
        }
    ratios = {
        name: [turn[name]["seconds"] / turn["ours"]["seconds"] for turn in rounds]
        for name in best
        if name != "ours" and "ours" in best
    }
    counts["num_examples"] = arguments.examples
    return {**counts, "dtype": arguments.dtype, "contenders": shown, "ours_over": ratios, "skipped": skipped}


def draw(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Draws the examples as the recipe will, writes them to a file, and returns the settings for the contenders."""
    recipe = common.load_module("sft_full_finetune", common.ROOT / "recipes" / "sft_full_finetune.py")
    overrides = [
        *common.sources(arguments, folder),
        "tasks.types=null",
        "budget.epochs=1000000",
        f"batch_size={arguments.batch_size}",
        f"dtype={arguments.dtype}",
        # As the others.
        "optimizer.lr=2.0e-5",
        "lr_schedule.warmup=0.0",
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
    num_tokens = sum(len(row["tokens"]) - 1 for row in rows)
    return {
        "overrides": overrides,
        "model": config.checkpointer.arguments["checkpoint_dir"],
        "folder": str(folder),
        "examples": str(folder / "examples.json"),
        "max_seq_len": arguments.max_seq_len,
        "batch_size": arguments.batch_size,
        # The contenders that pack take as many optimizer steps as the others.
        "packs_per_step": max(1, round(num_tokens * arguments.batch_size / len(rows) / arguments.max_seq_len)),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "num_tokens": num_tokens,
        "num_supervised_tokens": num_supervised,
    }


def run(name: str, settings: dict[str, Any], *, python: str, folder: Path, threads: int) -> dict[str, Any]:
    """Runs ``contenders.py`` in a process of its own and returns its answer; its output is in ``folder / NAME.log``."""
    here = Path(__file__).resolve().parent
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(common.ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    answer, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [python, str(here / "contenders.py"), name, str(folder / "settings.json"), str(answer)]
    with log.open("w") as output:
        if subprocess.run(command, stdout=output, stderr=output, env=environment).returncode:
            raise RuntimeError(f"{name} failed:\n{log.read_text()[-2000:]}")
    return json.loads(answer.read_text())


def report(numbers: dict[str, Any]) -> None:
    """Prints the tables."""
    names = list(numbers["contenders"])
    title = "{num_examples} examples, {num_tokens} real tokens, {num_supervised_tokens} supervised, {dtype}"
    rows = []
    for name in names:
        of = numbers["contenders"][name]
        speed = statistics.median(of["tokens_per_second"])
        supervised = statistics.median(of["supervised_tokens_per_second"])
        computed, loss = f"{of['computed']:.0%}", f"{of['loss']:.3f}"
        rows.append((name, of["size"], speed, supervised, computed, of["peak_mib"], of["growth_mib"], loss))
    columns = ("median", "size", "tokens/s", "supervised/s", "computed", "peak MiB", "growth MiB", "loss")
    common.show(title.format(**numbers), columns, rows)
    speeds = zip(*(numbers["contenders"][name]["tokens_per_second"] for name in names), strict=True)
    common.show("tokens/s by round", ("round", *names), [(str(i), *speed) for i, speed in enumerate(speeds, 1)])
    for name, ratios in numbers["ours_over"].items():
        print(f"ours / {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for name, reason in numbers["skipped"].items():
        print(f"{name} skipped: {reason}")


if __name__ == "__main__":
    main()
