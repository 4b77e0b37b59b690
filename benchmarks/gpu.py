"""Training speed, peak memory and the cost of mixture updates on one GPU, in minutes, without network or files.

    python benchmarks/gpu.py [--models llama3_2_1b gemma3_1b qwen3_0_6b] [--variants ...] [--minutes 8] [--json FILE]
    python benchmarks/gpu.py --tiny     # tiny models on the CPU: does the script work? Its numbers mean nothing

Weights and token ids are random (``synthetic.py``). Examples are as long as those of Natural Instructions: log-normal,
median 150 tokens, at most 1,024. The workload "short answers" supervises 3.6 % of the tokens, as there, "long answers"
half of them. Everything else is as in the shipped configs ``MODEL_uniform_10pct``.

- plain, compile, checkpointing, compile_checkpointing: ``setup`` and ``step`` of ``recipes/sft_full_finetune.py``, with
  the keys ``compile`` and ``activation_checkpointing``: fp32 weights, bf16 compute.
- torchtune, torchtune_compile, trainer: see ``gpu_libraries.py``. Of the three models torchtune has Llama only.
- updates: ``update_mixture`` of each strategy's recipe, with the smallest model, on 10 tasks of 16 examples.

A speed is the median of real tokens per second (no padding, no last token of an example) over steps, after two steps
and without those that compiled something. ``compile_seconds`` is by how much these others took longer, so what does not
compile has some as well. The second workload of a process finds the first's kernels in a cache. "Computed" is how many
positions are computed per real token, padding included.

The share of the peak is FLOPs per token (6 x body parameters + 6 x head parameters x supervised share + attention, see
``flops.py``) x tokens/s / dense bf16 peak of the GPU. What a contender computes besides is not counted.

Each model and variant has a process of its own: an error costs its rows only, and its peak memory is its own. The time
left is divided among the processes left. ``--json`` is written after each row.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import gpu_libraries
import synthetic
import torch
from flops import flops_per_token
from torch.utils.benchmark import Timer

from adapt_recipes import data
from adapt_recipes.files import atomic_file
from adapt_recipes.run import Run
from adapt_recipes.training.sharding import on_meta

# From large to small.
MODELS = ["llama3_2_1b", "gemma3_1b", "qwen3_0_6b"]
# In the order in which they run; the last ones may find no time.
VARIANTS = ["plain", "compile", "torchtune", "updates", "trainer", "checkpointing"]
VARIANTS += ["torchtune_compile", "compile_checkpointing"]
WORKLOADS = {"short answers": 0.036, "long answers": 0.5}
STRATEGIES = ["adapt", "adapt_planned", "dro", "exp3", "hbo", "multidds", "multiuat"]
STRATEGIES += ["mos_cossim", "mos_diff", "mospec_cossim", "mospec_diff"]
WARMUP_STEPS, MIN_STEPS = 2, 3
NOT_RUN = "not run: no time"
# What a process of one model and variant runs. The components of its configs find this module by its name.
MEASURE = "import gpu, sys; gpu.measure(*sys.argv[1:])"

# bf16 TFLOP/s without sparsity, by a part of the device's name: the first that fits. Plain H100 and H200 are SXM.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "B200": 2250}
PEAKS |= {"A100": 312, "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165}

SPEED = ["tokens_per_second", "range", "share_of_peak"]

Row = dict[str, Any]


# ---- the script


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line ``argv``. Returns the numbers that ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --tiny runs tiny models on the CPU")
    deadline = time.time() + 60 * arguments.minutes

    models, variants = (sorted(each, key=[*MODELS, *VARIANTS].index) for each in (arguments.models, arguments.variants))
    only = {"updates": models[-1], "torchtune": "llama3_2_1b", "torchtune_compile": "llama3_2_1b"}
    jobs = [(model, variant) for variant in variants for model in models if only.get(variant, model) == model]
    # What compiles, and the many strategies, have twice the time of others.
    weights = [2 if "compile" in variant or variant == "updates" else 1 for _, variant in jobs]
    with tempfile.TemporaryDirectory() as folder:
        file = (arguments.json or Path(folder) / "numbers.json").absolute()
        # The file of an interrupted run says what is missing.
        numbers: Row = {"device": None, "rows": {key: {"status": NOT_RUN} for job in jobs for key in keys(*job)}}
        keep(file, numbers)
        for i, (model, variant) in enumerate(jobs):
            left = max(0.0, deadline - time.time())
            share = left * weights[i] / sum(weights[i:])
            job = {"model": model, "variant": variant, "tiny": arguments.tiny, "file": str(file)}
            status = run_job(job | {"end": time.time() + share}, limit=min(2 * share, left))
            numbers = json.loads(file.read_text())
            for key in keys(model, variant):
                if numbers["rows"][key]["status"] == NOT_RUN:
                    numbers["rows"][key]["status"] = status
                print(f"{key}: {numbers['rows'][key]['status']}", flush=True)
            keep(file, numbers)
    report(numbers)
    return numbers


def keys(model: str, variant: str) -> list[str]:
    """The names of a job's rows."""
    return [f"{model}, {variant}, {part}" for part in (STRATEGIES if variant == "updates" else WORKLOADS)]


def keep(file: Path, numbers: dict[str, Any]) -> None:
    """Writes the numbers; a kill at any moment leaves a whole file."""
    with atomic_file(file) as partial:
        common.write(partial, numbers)


def run_job(job: dict[str, Any], *, limit: float) -> str:
    """Runs a job in a process that writes its rows. Returns the status of those that it did not come to."""
    needed = ("transformers", "accelerate") if job["variant"] == "trainer" else ()
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        return f"skipped: no {' and no '.join(missing)} here"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+") as output:
        paths = [str(Path(__file__).resolve().parent), str(common.ROOT), os.environ.get("PYTHONPATH", "")]
        # Nothing that was compiled before is found. On the CPU torch would compile C++ for minutes.
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_BACKEND": "eager"} if job["tiny"] else {}
        command = [sys.executable, "-c", MEASURE, json.dumps(job), folder]
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=limit, env=os.environ | environment)
        except subprocess.TimeoutExpired:
            return NOT_RUN
        if done.returncode < 0:
            return f"failed: killed by signal {-done.returncode}"
        output.seek(0)
        return failure(output.read()) if done.returncode else NOT_RUN


def failure(text: str) -> str:
    """The status of a row whose process printed this."""
    # torch's OutOfMemoryError, Python's, and torch's RuntimeError on the CPU.
    if "MemoryError" in text or "DefaultCPUAllocator" in text:
        return "out of memory"
    return f"failed: {text.strip().splitlines()[-1][:200]}"


def report(numbers: dict[str, Any]) -> None:
    """Prints the tables."""
    if device := numbers["device"]:
        print("{name}, driver {driver}, torch {torch}, {peak:.3g} bf16 TFLOP/s ({source})".format(**device))
    done = [{"row": key, **row} for key, row in numbers["rows"].items() if row["status"] == "ok"]
    for title, columns in {
        "training": [*SPEED, "computed", "peak_gib", "compile_seconds", "graphs"],
        "mixture updates": ["steps", "seconds", "probe_tokens", "peak_gib"],
    }.items():
        rows = [[row[column] for column in ("row", *columns)] for row in done if columns[0] in row]
        common.show(title, ["", *columns], rows)


# ---- in the process of one model and variant


def measure(job_json: str, folder: str) -> None:
    """Measures the rows of a job and writes each of them to its file."""
    job = json.loads(job_json) | {"folder": folder}
    file, device = Path(job["file"]), torch.device("cpu" if job["tiny"] else "cuda")
    numbers = json.loads(file.read_text())
    numbers["device"] = numbers["device"] or describe(device)
    contenders: dict[str, Callable[..., Row]] = {"updates": update, "trainer": library, "torchtune": library}
    contender = contenders.get(job["variant"].removesuffix("_compile"), ours)
    names = keys(job["model"], job["variant"])
    for i, key in enumerate(names):
        # The first row is measured in any case; this process is killed after twice its share of the time.
        if i and time.time() > job["end"]:
            break
        torch.manual_seed(0)
        clock = Clock(device, seconds=(job["end"] - time.time()) / (len(names) - i), steps=3 if job["tiny"] else 10)
        try:
            row: Row = {"status": "ok"} | contender(job, key.split(", ")[-1], clock)
        except Exception:
            traceback.print_exc()
            row = {"status": failure(traceback.format_exc())}
        if "tflops" in row:
            row["share_of_peak"] = row["tflops"] / numbers["device"]["peak"]
        numbers["rows"][key] = row
        keep(file, numbers)
        # The clock counts with the model, which must be gone before the next one is built.
        del clock
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def describe(device: torch.device) -> Row:
    """The device, and its bf16 peak in TFLOP/s: that of the table, or else the speed of a matrix product."""
    name, driver = "CPU", "none"
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(), "unknown"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    peak, source = next(((peak, "data sheet") for part, peak in PEAKS.items() if part in name), (0.0, ""))
    if not source:
        size = 8192 if device.type == "cuda" else 512
        matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        seconds = Timer("matrix @ matrix", globals={"matrix": matrix}).blocked_autorange().median
        peak, source = 2e-12 * size**3 / seconds, f"not in the table; measured by a product of {size} x {size}"
    return {"name": name, "driver": driver, "torch": torch.__version__, "peak": peak, "source": source}


class Enough(Exception):
    """Ends a training loop."""


class Clock:
    """Times the steps of training on ``device``, for about ``seconds`` or ``steps`` measured steps."""

    def __init__(self, device: torch.device, *, seconds: float, steps: int) -> None:
        self.device, self.steps, self.end = device, steps, time.perf_counter() + seconds
        # Of each step: seconds, real tokens, computed positions, graphs that were compiled.
        self.records: list[list[float]] = []

    def seconds(self) -> float:
        """The time at which the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_gib(self, *, reset: bool = False) -> float | None:
        """Peak memory of tensors since the last reset; None: not a GPU."""
        if self.device.type != "cuda":
            return None
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30

    def start(self, counts: Callable[[], tuple[float, float]]) -> None:
        """Training begins. ``counts`` returns the real tokens and the computed positions so far."""
        self.counts = counts
        self.peak_gib(reset=True)
        self.last = self.state()

    def state(self) -> list[float]:
        return [self.seconds(), *self.counts(), torch._dynamo.utils.counters["stats"]["unique_graphs"]]

    def step(self) -> None:
        """A step has ended; raises ``Enough``."""
        before, self.last = self.last, self.state()
        self.records.append([float(now - then) for now, then in zip(self.last, before, strict=True)])
        if len(self.measured) >= (MIN_STEPS if self.last[0] > self.end else self.steps):
            raise Enough

    @property
    def measured(self) -> list[list[float]]:
        """The steps that count."""
        return [record for record in self.records[WARMUP_STEPS:] if not record[3]]

    def row(self, decoder: Any, tasks: Sequence[data.Task]) -> Row:
        """What was measured, and the FLOPs of what was trained."""
        speeds = [tokens / seconds for seconds, tokens, _, _ in self.measured]
        median, (_, tokens, positions, _) = statistics.median(speeds), map(sum, zip(*self.measured, strict=True))
        others = [record for record in self.records if record not in self.measured]
        lengths = torch.cat([task.train.lengths for task in tasks]) - 1
        supervised = sum(int(task.train.num_supervised.sum()) for task in tasks) / int(lengths.sum())
        return {
            "tokens_per_second": median,
            "range": f"{min(speeds):,.0f} to {max(speeds):,.0f}",
            "computed": positions / tokens,
            "peak_gib": self.peak_gib(),
            "compile_seconds": sum(max(0.0, seconds - tokens / median) for seconds, tokens, _, _ in others),
            "graphs": sum(int(record[3]) for record in self.records),
            "steps_measured": len(speeds),
            "supervised_share": supervised,
            "tflops": 1e-12 * median * flops_per_token(decoder, supervised_share=supervised, lengths=lengths),
        }


def ours(job: Row, workload: str, clock: Clock) -> Row:
    """The minimal recipe."""
    switches = {"compile": "compile" in job["variant"], "activation_checkpointing": "checkpointing" in job["variant"]}
    module, config = shipped(job, workload, **switches)
    with Run(config) as run:
        recipe = module.Recipe(config, run)
        recipe.setup()
        clock.start(lambda: (recipe.ledger.tokens, recipe.ledger.computed_tokens))
        with contextlib.suppress(Enough):
            while True:
                recipe.step()
                clock.step()
        return clock.row(recipe.model.decoder, recipe.tasks)


def library(job: Row, workload: str, clock: Clock) -> Row:
    """torchtune's recipe or transformers' Trainer, on examples of all tasks in turn."""
    _, config = shipped(job, workload, compile=job["variant"] == "torchtune_compile")
    _, tasks = data.build_tasks(config.tasks, config.tokenizer, max_seq_len=config.max_seq_len)
    count = min(len(task.train) for task in tasks)
    examples = [task.train.example(i) for i in range(count) for task in tasks]
    train = gpu_libraries.trainer if job["variant"] == "trainer" else gpu_libraries.torchtune
    with contextlib.suppress(Enough):
        train(config, examples, clock.device, clock.start, clock.step)
    with on_meta():
        return clock.row(config.model.build(), tasks)


def update(job: Row, strategy: str, clock: Clock) -> Row:
    """An update of the mixture, and a step; of each the faster of the second and the third."""
    # No model has configs of all strategies.
    mixture_of = f"gemma_2b_{strategy}_3ep" if "mospec" in strategy else f"smollm2_135m_{strategy}_10pct"
    module, config = shipped(job, "short answers", mixture_of=mixture_of)
    with Run(config) as run:
        recipe = module.Recipe(config, run)
        recipe.setup()
        if hasattr(recipe, "measure_base_model"):
            recipe.measure_base_model()
        taken: list[list[float]] = [[], []]
        for _ in range(3):
            for part, seconds in zip((recipe.step, recipe.update_mixture), taken, strict=True):
                clock.peak_gib(reset=True)
                began = clock.seconds()
                part()
                seconds.append(clock.seconds() - began)
        step, update = (min(each[1:]) for each in taken)
        tokens = sum(batch.num_tokens for batch in recipe.probe_validation)
        return {"steps": update / step, "seconds": update, "probe_tokens": tokens, "peak_gib": clock.peak_gib()}


def shipped(job: Row, workload: str, **changes: Any) -> tuple[Any, Any]:
    """A recipe and its config for a workload."""
    folder, share = Path(job["folder"]), WORKLOADS[workload]
    return synthetic.shipped(job["model"], folder=folder, tiny=job["tiny"], supervised=share, **changes)


if __name__ == "__main__":
    # The tables are wider than what is assumed of an output that is no terminal.
    os.environ.setdefault("COLUMNS", "150")
    main()
