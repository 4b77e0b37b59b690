"""Writes the configs of the papers' grids, model x strategy x budget, into yaml/.

    python tools/yaml_grid/write.py

Each config is complete, so that it can be read, copied and edited alone. What configs share is written once, in the
fragments here: ``config.yaml.jinja`` is a whole config with placeholders, and each folder is a study, with its models,
strategies and budgets in one file each. To add one of these, add an entry to its file; another study is another folder.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError

FOLDER = Path(__file__).parent
TEMPLATE = FOLDER / "config.yaml.jinja"
# Shorter than pydantic's messages.
MESSAGES = {"extra_forbidden": "not used by write.py", "missing": "missing"}


class Strict(BaseModel, extra="forbid", str_strip_whitespace=True):
    """Takes no other keys."""


class Shared(Strict):
    """What is the same in all configs of a study. "Header" is the comment at the top of a config."""

    title: str  # of the tasks
    settings: str  # for the header: which settings are those of the paper, and which ours
    data: str  # for the header, in lines: how to get it
    memory: str  # for the header, in lines: what it takes to read the data
    tasks: str  # lines under `tasks`
    num_tasks: PositiveInt
    num_examples: PositiveInt  # approximate
    batch: str  # lines: the key for the size of a step
    length: str  # for the header: for which mixtures the number of steps holds
    examples_per_step: PositiveInt  # about


class Model(Strict):
    """A base model."""

    title: str
    repository: str  # on the model hub
    options: str = ""  # of `tune download`
    base: str = ""  # on the model hub: the base model of a chat model, for use with Vicuna's template
    notes: str  # for the header, in lines
    builder: str  # lines under `model`
    remedy: str = ""  # for the header, in lines: what to do if it does not fit in memory

    @property
    def folder(self) -> str:
        return f"models/{self.repository.split('/')[-1]}"


class Updates(Strict):
    """The mixture updates of a strategy that learns."""

    passes: PositiveInt  # cost per example that an update reads, in forward passes; a backward pass counts as two
    every: dict[str, PositiveInt]  # for each budget, steps between updates
    examples: dict[str, PositiveInt]  # for each budget, examples per task that an update reads


class Strategy(Strict):
    """A method that sets the mixture."""

    recipe: str  # the file in recipes/
    title: str
    mixture: str  # lines under `mixture`
    reward: str = ""  # lines under `reward`, for a mixture that learns from rewards
    updates: Updates | None = None
    shares: str = ""  # for the header, in lines: what the shares refer to; a command for other shares follows


class Budget(Strict):
    """A number of epochs, or a fraction of one."""

    title: str
    unit: Literal["fraction", "epochs"]  # the key under `budget`
    amount: PositiveInt | PositiveFloat  # its value
    every: PositiveInt  # steps between validations and checkpoints


class Study(Strict):
    """A folder, with a file for each field; names of models, strategies and budgets make the names of the configs."""

    shared: Shared
    models: dict[str, Model]
    strategies: dict[str, Strategy]
    budgets: dict[str, Budget]


class Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]}: given twice")
        return super().construct_mapping(node, deep)


def read(folder: Path) -> Study:
    """The fragments in a folder; an error in them ends the script with one line that names the file and the key."""
    values = {}
    for file in sorted(folder.glob("*.yaml")):
        try:
            values[file.stem] = yaml.load(file.read_text(encoding="utf-8"), Loader)
        except yaml.YAMLError as error:
            raise SystemExit(f"{file}: {' '.join(str(error).split())}") from error
    try:
        study = Study(**values)
    except ValidationError as error:
        # Unknown keys first, because a misspelled key is also a missing one.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        name, *keys = map(str, first["loc"])
        parts = (f"{folder / name}.yaml", ".".join(keys), MESSAGES.get(first["type"], first["msg"]))
        raise SystemExit(": ".join(filter(None, parts))) from error
    for name, strategy in study.strategies.items():
        for key in ("every", "examples") if strategy.updates else ():
            given = getattr(strategy.updates, key)
            for budget in sorted(given.keys() ^ study.budgets.keys()):
                reason = "not in budgets.yaml" if budget in given else "missing"
                raise SystemExit(f"{folder / 'strategies.yaml'}: {name}.updates.{key}.{budget}: {reason}")
    return study


def numbers(study: Study, strategy: Strategy, budget: str) -> dict[str, float]:
    """The steps of a run, and the interval, size and cost of its mixture updates, by their names in the template."""
    per_step = study.shared.examples_per_step
    steps = study.budgets[budget].amount * study.shared.num_examples / per_step
    if not strategy.updates:
        return {"steps": steps}
    every, examples = strategy.updates.every[budget], strategy.updates.examples[budget]
    # In training steps, which count 3 forward passes per example.
    cost = strategy.updates.passes * study.shared.num_tasks * examples / (3 * per_step)
    return {"steps": steps, "every": every, "examples": examples, "cost": cost, "percent": 100 * cost / (every + cost)}


def configs(study: Study) -> dict[str, str]:
    """{file name: content} of a study."""
    options: Any = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": jinja2.StrictUndefined}
    written = {}
    try:
        template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), **options)
        for names in itertools.product(study.models, study.strategies, study.budgets):
            name, strategy = "_".join(names), study.strategies[names[1]]
            written[f"{name}.yaml"] = template.render(
                numbers(study, strategy, names[2]),
                name=name,
                shared=study.shared,
                model=study.models[names[0]],
                strategy=strategy,
                strategy_name=names[1],
                budget=study.budgets[names[2]],
            )
    except jinja2.TemplateError as error:
        raise SystemExit(f"{TEMPLATE}: {error}") from error
    return written


def studies() -> dict[str, Study]:
    """{folder: its study}."""
    return {folder.name: read(folder) for folder in sorted({file.parent for file in FOLDER.glob("*/*.yaml")})}


if __name__ == "__main__":
    for name, content in [each for study in studies().values() for each in configs(study).items()]:
        (FOLDER.parents[1] / "yaml" / name).write_text(content, encoding="utf-8")
