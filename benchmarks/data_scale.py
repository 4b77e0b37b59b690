"""Time and memory of preparing many examples, beside what tokenizing the same texts takes at least.

    python benchmarks/data_scale.py --examples N [--model FOLDER --data FOLDER] [--rounds 1]

Makes a folder in the layout of Super-NaturalInstructions with N examples: numbered copies of those in ``--data``. Each
measurement is a process of its own, on the cores that this command may use:

- cold: ``load_tasks`` with an empty cache;
- limit: ``tokenizers`` alone, ``encode_batch`` over the same rendered texts; only the encoding is timed;
- warm: ``load_tasks`` again, and the fingerprint, in two processes one after the other, as on a host with two of them.

Memory is that of each warm process while both are there, after both have drawn an epoch: private memory (Private_Clean
and Private_Dirty of smaps_rollup) is its own, shared memory is the page cache's, once for all processes of a host. The
baseline is a process that has imported the same modules. Times do not include imports, and the file cache of the
operating system is not cleared. On a machine with other load the seconds of the CPU are the ones to compare.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common

# Texts per call of encode_batch.
BATCH = 1024


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line ``argv``. Returns the numbers that ``--json`` writes."""
    parser = common.parser(__doc__, max_seq_len=4096)
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument(
        "--rounds", type=int, default=1, help="cold preparations, each beside the limit; the best counts"
    )
    parser.add_argument("--folder", type=Path, help="where examples and caches are written; default: temporary")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        model = arguments.model or common.tiny_model(folder / "model", max_seq_len=arguments.max_seq_len)
        source = arguments.data or common.instructions(folder / "source", examples=40)
        numbers: dict[str, Any] = {"examples": copy_examples(source, folder / "data", arguments.examples)}
        numbers["bytes"] = sum(file.stat().st_size for file in (folder / "data" / "tasks").iterdir())
        caches = [folder / f"cache{i}" for i in range(arguments.rounds)]
        paths = {"model": str(model.absolute()), "data": str(folder / "data"), "max_seq_len": arguments.max_seq_len}

        # Cold beside the limit.
        cold, limit = [], []
        for cache in caches:
            cold.append(_end(_start("load", paths | {"cache": str(cache)})))
            limit.append(_end(_start("limit", paths)))
        numbers["cold"], numbers["limit"] = (min(each, key=lambda one: one["seconds"]) for each in (cold, limit))
        for key in ("seconds", "cpu_seconds"):
            numbers[f"{key}_cold_by_limit"] = numbers["cold"][key] / numbers["limit"][key]

        # Warm, with memory.
        numbers["cache_bytes"] = sum(file.stat().st_size for file in caches[-1].rglob("*") if file.is_file())
        baseline = _start("import", paths)
        numbers["baseline"] = _memory(baseline.pid)
        _end(baseline)
        processes = [_start("load", paths | {"cache": str(caches[-1])}) for _ in range(2)]
        numbers["memory"] = [_memory(process.pid) for process in processes]
        numbers["warm"] = [_end(process) for process in processes]

    assert len({each["fingerprint"] for each in (numbers["cold"], *numbers["warm"])}) == 1
    warm = min(numbers["warm"], key=lambda one: one["seconds"])
    rows = [
        ("cold, s", numbers["cold"]["seconds"]),
        ("  of the CPU, s", numbers["cold"]["cpu_seconds"]),
        ("limit (bare tokenizers), s", numbers["limit"]["seconds"]),
        ("  of the CPU, s", numbers["limit"]["cpu_seconds"]),
        ("cold / limit", numbers["seconds_cold_by_limit"]),
        ("  of the CPU", numbers["cpu_seconds_cold_by_limit"]),
        ("warm, s", warm["seconds"]),
        ("  of the CPU, s", warm["cpu_seconds"]),
        ("fingerprint, s", warm["fingerprint_seconds"]),
        ("private memory, MiB", max(each["private"] for each in numbers["memory"])),
        ("  of which imports, MiB", numbers["baseline"]["private"]),
        ("shared memory, MiB", max(each["shared"] for each in numbers["memory"])),
        ("cache on disk, MiB", numbers["cache_bytes"] / 2**20),
    ]
    tokens = numbers["cold"]["tokens"]
    common.show(f"{numbers['examples']:,} examples, {tokens:,} tokens", ("", ""), rows)
    return common.write(arguments.json, numbers)


def copy_examples(source: Path, folder: Path, number: int) -> int:
    """Writes ``number`` examples: copies of those in ``source``, whose inputs end in the number of the copy.

    Copy 0 is the source itself. Instances with only empty outputs are no examples, and are left out.

    Returns:
        ``number``.

    Raises:
        ValueError: the source has no file.
    """
    files = sorted((source / "tasks").glob("*.json"))
    if not files:
        raise ValueError(f"no files {source}/tasks/*.json")
    (folder / "tasks").mkdir(parents=True)
    left = number
    for copy in itertools.count():
        for file in files:
            content = json.loads(file.read_text(encoding="utf-8"))
            instances = [each for each in content["Instances"] if any(map(str.strip, _outputs(each)))][:left]
            if copy:
                instances = [each | {"input": f"{each['input']} ({copy})"} for each in instances]
            name = f"{file.stem}_copy{copy}.json"
            (folder / "tasks" / name).write_text(json.dumps(content | {"Instances": instances}), encoding="utf-8")
            left -= len(instances)
            if not left:
                return number
    raise AssertionError


def _outputs(instance: dict[str, Any]) -> list[str]:
    outputs = instance["output"]
    return outputs if isinstance(outputs, list) else [outputs]


def _start(what: str, options: dict[str, Any]) -> subprocess.Popen[str]:
    """Starts a process that measures, and waits until it has; it stays until its input ends."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what, json.dumps(options)]
    python_path = os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])
    # The tests turn the threads of tokenizers off.
    environment = os.environ | {"PYTHONPATH": python_path, "TOKENIZERS_PARALLELISM": "true"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.first_line = process.stdout.readline()  # type: ignore[attr-defined]
    return process


def _end(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Ends a process; returns its numbers."""
    process.communicate()
    if process.returncode:
        raise RuntimeError(f"a measurement failed: {process.args!r}")
    numbers: dict[str, Any] = json.loads(process.first_line)  # type: ignore[attr-defined]
    return numbers


def _memory(pid: int) -> dict[str, float]:
    """Private and shared memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    return {
        "private": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024,
        "shared": (kib["Shared_Clean"] + kib["Shared_Dirty"]) / 1024,
    }


def child(what: str, options: dict[str, Any]) -> None:
    """One measurement; prints its numbers, and waits until the input ends."""
    from adapt_recipes import data
    from adapt_recipes.data.load import TasksConfig

    numbers: dict[str, Any] = {}
    tokenizer = data.ChatTokenizer(options["model"])
    component = {"_component_": "adapt_recipes.data.natural_instructions", "path": options["data"]}
    if what == "limit":
        numbers = _limit(tokenizer, options["data"])
    elif what == "load":
        config = TasksConfig(**component, cache_dir=options["cache"])
        started, cpu_started = time.perf_counter(), _cpu_seconds()
        tasks = data.load_tasks(config, tokenizer=tokenizer, max_seq_len=options["max_seq_len"])
        numbers["seconds"] = time.perf_counter() - started
        numbers["cpu_seconds"] = _cpu_seconds() - cpu_started
        started = time.perf_counter()
        numbers["fingerprint"] = data.fingerprint(tasks, cache_dir=Path(options["cache"]))
        numbers["fingerprint_seconds"] = time.perf_counter() - started
        # What a run keeps: the order of an epoch, and the pages of all examples.
        sampler = data.TokenSampler(tasks, seed=0)
        splits = [split for task in tasks for split in task.splits.values()]
        numbers["tokens"] = sum(int(split.lengths.sum()) for split in splits)
        numbers["supervised_tokens"] = sum(int(split.num_supervised.sum()) for split in splits)
        numbers["kept"] = sum(map(len, splits))
        started = time.perf_counter()
        for i, task in enumerate(tasks):
            for index in range(0, len(task.train), max(1, len(task.train) // 1000)):
                sampler.example(data.sampler.Draw(i, index, 10**9, True))
        numbers["example_seconds"] = (time.perf_counter() - started) / 1000 / len(tasks)
    print(json.dumps(numbers), flush=True)
    sys.stdin.read()


def _limit(tokenizer: Any, folder: str) -> dict[str, Any]:
    """Encodes the rendered texts with ``tokenizers`` alone."""
    seconds, cpu_seconds, tokens, texts = 0.0, 0.0, 0, _rendered(tokenizer, folder)
    while batch := list(itertools.islice(texts, BATCH)):
        started, cpu_started = time.perf_counter(), _cpu_seconds()
        encodings = tokenizer._tokenizer.encode_batch(batch, add_special_tokens=False)
        seconds += time.perf_counter() - started
        cpu_seconds += _cpu_seconds() - cpu_started
        tokens += sum(map(len, encodings))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens}


def _cpu_seconds() -> float:
    """Of this process, and of its processes that have ended."""
    return sum(os.times()[:4])


def _rendered(tokenizer: Any, folder: str) -> Iterator[str]:
    """The texts of all examples, file by file."""
    for file in sorted((Path(folder) / "tasks").iterdir()):
        content = json.loads(file.read_text(encoding="utf-8"))
        definition = content["Definition"][0] if isinstance(content["Definition"], list) else content["Definition"]
        for instance in content["Instances"]:
            answer = next(text.strip() for text in _outputs(instance) if text.strip())
            prompt = f"{definition.strip()}\n\n{instance['input'].strip()}".strip()
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield tokenizer._template.render(messages)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
