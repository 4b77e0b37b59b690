"""Runs two revisions side by side and says whether their results are the same bit for bit, to prove a refactoring.

    python benchmarks/same_runs.py OLD [NEW] [key=value ...] [--rtol R] [--configs NAME[-VARIANT] ...]

OLD and NEW are git revisions; `.`, the default for NEW, is the working tree as it is, untracked files included. Each
runs all yaml/tiny_*.yaml that both have: 14 steps on small tasks whose examples differ in length. Some more runs are
variants of a config: `-toy` keeps the config's own toy tasks; `-resumed` is killed in the middle and resumed, and has
to equal the uninterrupted run too; `-two-processes`. A `key=value` goes to every run of both.

Compared are log.jsonl and summary.json without times, and model/, weights bit for bit. The first number and the
first tensor that differ are printed with all digits. "form" is a difference in anything else: a text, or a field, an
event, a tensor or a file that only one side has. The two tables below list what was renamed. Only the command line has
to be the same on both sides.

    $ python benchmarks/same_runs.py f585192 --configs uniform adapt adapt-resumed
    old: f585192, new: the working tree
    same     uniform
    differs  adapt
        mixture at step 6, probabilities.facts_8: old 0.1414, new 0.1421, relative deviation 0.0049 (and 213 more)
        model/model.safetensors, lm_head.weight: 9 of 12336 elements differ between old and new, by up to 2e-09, ...
    form     adapt-resumed
        step 1, grad_norm is only in old (and 13 more)
    not the same: adapt, adapt-resumed; largest relative deviation 0.0049; 31 s

Exit status: 0 same, 1 not the same, 2 unknown revision or config.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from checkouts import Checkout, stop
from rich.console import Console

# Old name: new name, of overrides. A side that has the new one in any of its configs gets the new one.
RENAMED_KEYS = {
    "budget.passes": "budget.epochs",
    "mixture.fast_memory": "mixture.fast_discount",
    "mixture.slow_memory": "mixture.slow_discount",
}
# Old name: new name, of fields of log.jsonl and summary.json.
RENAMED_FIELDS: dict[str, str] = {}

VARIANTS = ["adapt_planned-toy", "adapt_planned-resumed", "exp3-resumed", "mos_diff-resumed"]
VARIANTS += ["adapt-two-processes", "mos_diff-two-processes"]
# With dropout, a random generator that is not restored shows. Micro-batches are so small that a step has several.
SETTINGS = "model.attn_dropout=0.1 validate_every=4 checkpoint_every=2 log_every=0 resume=true"
LEARNED_SETTINGS = "mixture_update_every=3 probe.examples=5"
TOY_SETTINGS = "budget.tokens=640 micro_batch_tokens=256"
TASK_SETTINGS = (
    "tasks=adapt_recipes.data.jsonl_tasks tasks.path=../tasks tasks.validation_examples=6 "
    "tasks.no_validation=[facts_32] tokenizer.supervise_end=true "
    "max_seq_len=40 micro_batch_tokens=80 batch_size=8 budget.tokens=500"
)

# ---- what is run


def choose(words: Sequence[str] | None, sides: Sequence[Checkout]) -> list[str]:
    """The runs: configs that both sides have, then variants."""
    old, new = ({path.stem.removeprefix("tiny_") for path in side.root.glob("yaml/tiny_*.yaml")} for side in sides)
    configs = sorted(old & new)
    for side, missing in zip(sides, (old - new, new - old), strict=True):
        if missing:
            print(f"only in {side.name}, not run: {' '.join(sorted(missing))}")
    defaults = [*configs, *(name for name in VARIANTS if name.partition("-")[0] in configs)]
    names = [word.removeprefix("tiny_") for word in words or defaults]
    for name in names:
        config, _, variant = name.partition("-")
        if config not in configs or variant not in ("", "toy", "resumed", "two-processes"):
            stop(f"--configs: no {name!r}; NAME is one of {' '.join(configs)}, VARIANT of toy resumed two-processes")
    names += [name.removesuffix("-resumed") for name in names if name.endswith("-resumed")]
    return sorted(dict.fromkeys(names), key=lambda name: "-" in name)


def commands(root: Path, runs: Sequence[str], overrides: Sequence[str]) -> dict[str, list[str]]:
    """What follows ``tune run`` in a checkout, for each run; the same in both, but for renamed keys."""
    contents = (yaml.load(path.read_bytes(), yaml.CSafeLoader) for path in root.glob("yaml/*.yaml"))
    known_keys = {key for content in contents for key, _ in leaves(content)}
    renamed = {old: new for old, new in RENAMED_KEYS.items() if new in known_keys}
    found = {}
    for run in runs:
        name, _, variant = run.partition("-")
        path = f"yaml/tiny_{name}.yaml"
        text = (root / path).read_text()
        config = yaml.safe_load(text)
        recipe = config.get("recipe") or text.split()[3]  # "# tune run RECIPE --config ..."
        words = f"output_dir=runs/{run} {SETTINGS} {TOY_SETTINGS if variant == 'toy' else TASK_SETTINGS}".split()
        words += LEARNED_SETTINGS.split() if "mixture_update_every" in config else []
        settings = {renamed.get(key, key): value for key, _, value in (w.partition("=") for w in [*words, *overrides])}
        # Other tasks do not take the arguments of the toy tasks.
        removed = [f"~tasks.{key}" for key in config["tasks"] if key != "_component_" and variant != "toy"]
        processes = ["--nproc_per_node", "2"] if variant == "two-processes" else []
        set_words = [f"{key}={value}" for key, value in settings.items()]
        found[run] = [*processes, recipe, "--config", path, *removed, *set_words]
    return found


def write_tasks(folder: Path) -> None:
    """Tasks so small that some repeat in a run, with the names that the tiny configs give weights and references to."""
    folder.mkdir()
    rng = random.Random(0)
    for number, facts in enumerate((2, 8, 32, 64, 128, 256, 512)):
        rows = []
        for i in range(12 + 6 * number):
            prompt, response = f"{'abcdefg'[number]}{i}" + "?" * rng.randrange(8), "xyz"[i % 3] * rng.randint(1, 6)
            turns = [("user", prompt), ("assistant", response), ("user", "and?"), ("assistant", response[:2])]
            turns = turns if facts == 128 else turns[:2]
            rows.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
        (folder / f"facts_{facts}.jsonl").write_text("\n".join(rows))


# ---- what is compared


def results(folder: Path, skip: Sequence[str] = ()) -> dict[str, Any]:
    """All that is compared of a run directory: places, such as "step 3, loss", and what stands there.

    Args:
        folder: the run directory.
        skip: events to leave out.
    """
    from safetensors.torch import load_file

    found: dict[str, Any] = {}

    def add(place: str, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if not name.endswith("seconds"):
                found.update(leaves(value, f"{place}, {RENAMED_FIELDS.get(name, name)}"))

    for event in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        name, step = event["event"], event.get("step")
        place = f"step {step}" if name == "step" else f"{name} at step {step}"
        if name not in skip:
            add(place + ", again" * (f"{place}, event" in found), event)
    add("summary", json.loads((folder / "summary.json").read_text()))
    for path in sorted([*folder.glob("model*/*.*"), *folder.glob("adapter/*.*")]):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found |= {f"{name}, {tensor}": value for tensor, value in load_file(path).items()}
        elif path.suffix == ".json":
            add(name, json.loads(path.read_text()))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dicts and lists hold, with dotted places; empty ones hold themselves."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield place, value
    for key, item in items:
        yield from leaves(item, f"{place}.{key}" if place else str(key))


@dataclass
class Differences:
    """Lines that say what differs, in the order of the log.

    Attributes:
        rtol: relative deviation up to which numbers and tensors are the same; 0: only if all bits are.
        numbers, weights: values of the log and summary; tensors.
        forms: all else.
        largest: relative deviation; of a tensor it is relative to the largest element.
    """

    rtol: float = 0.0
    numbers: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    largest: float = 0.0

    def add(self, old: dict[str, Any], new: dict[str, Any], names: tuple[str, str] = ("old", "new")) -> None:
        """Compare two runs, as ``results`` returns them; ``names`` is what the lines call them."""
        missing: dict[tuple[str, str], dict[str, str]] = {}
        for place in {**old, **new}:
            if place not in old or place not in new:
                event = place.partition(", ")[0]
                what = event if (f"{event}, event" in old) != (f"{event}, event" in new) else place
                # One line for all events of a kind, or for a field that all of them lack.
                kind, name = re.sub(r"\d+", "", what.partition(".")[0]), names[place in new]
                missing.setdefault((kind, name), {})[what] = f"{what} is only in {name}"
                continue
            is_text, is_tensor = isinstance(old[place], str), hasattr(old[place], "dtype")
            line, deviation = (tensor_difference if is_tensor else difference)(old[place], new[place], names)
            self.largest = max(self.largest, deviation)
            if line and (is_text or not self.rtol or deviation > self.rtol):
                (self.forms if is_text else self.weights if is_tensor else self.numbers).append(f"{place}: {line}")
        self.forms += [first_of([*lines.values()]) for lines in missing.values()]
        for first, instead in zip(filter(new.__contains__, old), filter(old.__contains__, new), strict=True):
            if first != instead:
                self.forms.append(f"another order: {names[0]} has {first} where {names[1]} has {instead}")
                break


def difference(old: Any, new: Any, names: tuple[str, str]) -> tuple[str, float]:
    """What differs between two values, "" for nothing; and the relative deviation, infinite if one is null."""
    if repr(old) == repr(new):
        return "", 0.0
    line = f"{names[0]} {old!r}, {names[1]} {new!r}"
    if isinstance(old, str):
        return line, 0.0
    both = isinstance(old, int | float) and isinstance(new, int | float)
    deviation = abs(old - new) / (max(abs(old), abs(new)) or 1.0) if both else math.inf
    return f"{line}, relative deviation {deviation:.2g}", deviation


def tensor_difference(old: Any, new: Any, names: tuple[str, str]) -> tuple[str, float]:
    """The same of two tensors, relative to the largest element."""
    import torch

    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{names[0]} {old.dtype} {[*old.shape]}, {names[1]} {new.dtype} {[*new.shape]}", math.inf
    old_bits, new_bits = (tensor.reshape(-1, 1).view(torch.uint8) for tensor in (old, new))
    count = int((old_bits != new_bits).any(1).sum())
    if count == 0:
        return "", 0.0
    off = (old.double() - new.double()).abs().max()
    deviation = float((off / old.double().abs().max()).nan_to_num(0 if off == 0 else math.inf))
    line = f"{count} of {old.numel()} elements differ between {names[0]} and {names[1]}, by up to {off:.2g}"
    return f"{line}, relative deviation {deviation:.2g}", deviation


def first_of(lines: Sequence[str]) -> str:
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def compare(run: str, sides: Sequence[Checkout], rtol: float) -> list[Differences]:
    """Compare the run of both sides; and one that was resumed with the uninterrupted one of its side."""
    is_resumed = run.endswith("-resumed")
    skip = ("checkpoint", "resume") if is_resumed else ()
    old, new = (results(side.folder(run), skip) for side in sides)
    found = [Differences(rtol)]
    found[0].add(old, new)
    for side, values in zip(sides, (old, new), strict=True):
        # Two runs of which nothing is found are not the same.
        if "step 1, loss" not in values or not any(hasattr(value, "dtype") for value in values.values()):
            found[0].forms.append(f"{side.name} has no steps in its log or no weights in model/")
    for side, resumed in zip(sides, (old, new), strict=True) if is_resumed else ():
        uninterrupted = results(side.folder(run.removesuffix("-resumed")), skip)
        found.append(Differences(rtol))
        found[-1].add(uninterrupted, resumed, (f"{side.name} uninterrupted", f"{side.name} resumed"))
        if '"resume"' not in side.folder(run, "/log.jsonl").read_text():
            found[-1].forms.append(f"no event 'resume' in the log of {side.name}")
    return found


# ---- the command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("old", metavar="OLD", help="git revision")
    parser.add_argument("words", metavar="NEW", nargs="*", help="git revision; default: . (the working tree)")
    parser.add_argument(
        "--rtol", type=float, default=0.0, help="relative deviation that counts as the same; default: 0"
    )
    parser.add_argument("--configs", nargs="+", metavar="NAME[-VARIANT]", help="default: all, and some variants")
    arguments = parser.parse_args(argv)
    overrides = [word for word in arguments.words if "=" in word]
    revisions = [arguments.old, *(word for word in arguments.words if "=" not in word)]
    if len(revisions) > 2:
        stop(f"OLD and NEW are two revisions, not {len(revisions)}: {' '.join(revisions)}")
    started, console = time.monotonic(), Console(markup=False, highlight=False, soft_wrap=True)
    outcomes: dict[str, str] = {}
    printed: set[str] = set()
    largest = 0.0
    with tempfile.TemporaryDirectory(prefix="same_runs_") as folder, contextlib.ExitStack() as stack:
        home = Path(folder).resolve()
        sides = [Checkout(*each, home) for each in zip(("old", "new"), [*revisions, "."], strict=False)]
        console.print(", ".join(side.title for side in sides))
        write_tasks(home / "tasks")
        runs = choose(arguments.configs, sides)
        for side in sides:
            side.start(commands(side.root, runs, overrides))
            stack.callback(side.close)
        for run in runs:
            with console.status(run):
                failures = [failure for side in sides if (failure := side.wait(run))]
                found = [] if failures else compare(run, sides, arguments.rtol)
            largest = max([largest, *(each.largest for each in found)])
            lines = [first_of(lines) for each in found for lines in (each.numbers, each.weights) if lines]
            forms = [line for each in found for line in each.forms]
            outcomes[run] = "failed" if failures else "differs" if lines else "form" if forms else "same"
            # Many runs have the same differences of form.
            forms = [line for line in forms if line not in printed]
            printed.update(forms)
            console.print(f"{outcomes[run]:8} {run}", *failures, *lines, *forms[:8], sep="\n    ")
    wrong = [run for run, outcome in outcomes.items() if outcome != "same"]
    configs, variants = ([run for run in runs if ("-" in run) == is_variant] for is_variant in (False, True))
    names = (configs if len(configs) < 3 else [f"{len(configs)} configs"]) + variants
    same = f"same to {arguments.rtol:g}" if arguments.rtol else "same, bit for bit"
    deviation = f"; largest relative deviation {largest:.2g}" if largest else ""
    said = f"not the same: {', '.join(wrong)}" if wrong else f"{same}: {', '.join(names)}"
    console.print(f"{said}{deviation}; {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    # Both end the runs and remove the checkouts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
