"""The schedule that a run has learned, as a config that repeats it without learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from adapt_recipes.files import atomic_file
from adapt_recipes.run_directory import LOG, has_run, is_finished
from adapt_recipes.runlog import read_resolved, read_summary


class _Flow(dict[str, Any]):
    """A mapping that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Flow, lambda dumper, mapping: dumper.represent_mapping("tag:yaml.org,2002:map", mapping, True))


def write_schedule(folder: Path, out: Path) -> None:
    """Writes the config of a finished run with its mixture replaced by the probabilities that it had, stage by stage.

    A stage begins where an update changed them, so that a run of this config draws the same examples. In another one,
    of another model or seed, the schedule is what this run has learned.

    Args:
        folder: the run directory.
        out: the config, a YAML file; replaced if it exists.

    Raises:
        ValueError: there is no finished run; its probabilities have not changed; or it has targets, which ``Staged``
            does not take.
        OSError: the file cannot be written.
    """
    if not has_run(folder):
        raise ValueError(f"{folder} is no run directory")
    if not is_finished(folder):
        raise ValueError(f"--schedule: the run in {folder} is not finished; resume=true finishes it")
    if out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--schedule {out}: has to end in .yaml")
    config, summary = read_resolved(folder), read_summary(folder)
    if config["tasks"].get("targets"):
        raise ValueError(f"--schedule: {folder} has tasks.targets, and a schedule is only of what is trained")

    # Stages: where the probabilities changed, by supervised tokens.
    lines = map(json.loads, (folder / LOG).read_text(encoding="utf-8").splitlines())
    begins: list[tuple[int, dict[str, float]]] = []
    for line in lines:
        if line["event"] == "mixture" and (not begins or begins[-1][1] != line["probabilities"]):
            begins.append((line["supervised_tokens"], line["probabilities"]))
    if len(begins) < 2:
        raise ValueError(f"--schedule: the probabilities of {folder} have never changed")
    budget = summary["budget_tokens"]
    ends = [tokens for tokens, _ in begins[1:]] + [budget]
    stages = [
        {"share": (end - begin) / budget, "weights": _Flow(probabilities)}
        for (begin, probabilities), end in zip(begins, ends, strict=True)
    ]

    # The rest of the config, without what measures for the mixture.
    staged = {"_component_": "adapt_recipes.mixture.Staged", "stages": stages}
    strategy = f"{config['strategy']}_schedule"
    changed = {"strategy": strategy, "output_dir": f"{config['output_dir']}_schedule", "mixture": staged}
    config = {key: None if key == "reward" else changed.get(key, value) for key, value in config.items()}
    text = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    header = f"# tune run {config['recipe']} --config {out}\n#\n# What the run {folder.name} has learned.\n\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as partial:
        partial.write_text(header + text, encoding="utf-8")
