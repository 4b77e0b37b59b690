"""A config with a key of an earlier release is refused in one line that says what the key is now."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from adapt_recipes.config import TrainConfig, load
from adapt_recipes.mixture import GroupDRO
from adapt_recipes.strict import RENAMED, locate

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text((ROOT / "yaml" / "tiny_uniform.yaml").read_text())
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        load(TrainConfig, file, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_key_of_the_recipe(file: Path) -> None:
    assert refusal(file, "budget.passes=3") == "unknown key 'budget.passes': it is 'budget.epochs' now"
    assert load(TrainConfig, file, ["budget.epochs=3"]).budget.num_tokens(100) == 300


@pytest.mark.parametrize(("component", "old"), [key for key in RENAMED if key[0] is not None])
def test_an_argument_of_a_component(file: Path, component: str, old: str) -> None:
    """By whatever path the config names the component."""
    renamed = RENAMED[component, old]
    found = locate(component)
    names = inspect.signature(found).parameters
    assert renamed.key in names and old not in names
    # The function of natural_instructions hides its module.
    paths = {component, f"{found.__module__}.{found.__name__}" if inspect.isclass(found) else component}
    for path in paths:
        if ".mixture." in path:
            node, given = "mixture", [f"mixture={path}"]
        else:  # no key of all recipes takes a reward
            needs = [n for n in ("task_names", "model", "path") if n in names and names[n].default is names[n].empty]
            needed = ", ".join(f"{name}: null" for name in needs)
            node, given = "lr_schedule", [f"lr_schedule={{_component_: {path}, {needed}}}"]
        remark = f", {renamed.remark}" if renamed.remark else ""
        said = refusal(file, *given, f"{node}.{old}=0.5")
        assert said == f"unknown key '{node}.{old}': it is '{node}.{renamed.key}' now{remark}"


def test_an_old_name_in_another_component_is_only_unknown(file: Path) -> None:
    said = refusal(file, "mixture=adapt_recipes.mixture.GroupDRO", "mixture.averaging=0.5")
    assert said.startswith("unknown key 'mixture.averaging' for adapt_recipes.mixture.GroupDRO")


def test_no_shipped_config_has_an_old_name() -> None:
    for path in sorted((ROOT / "yaml").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        for (component, old), _ in RENAMED.items():
            if component is None:
                parent, _, key = old.partition(".")
                assert key not in config.get(parent, {}), path
            for node in config.values():
                if isinstance(node, dict) and node.get("_component_") == component:
                    assert old not in node, path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"form": "softmax", "step_size": 0.1},
            "mixture.step_size is for mixture.form: exponentiated_gradient; softmax takes mixture.sharpness",
        ),
        (
            {"form": "exponentiated_gradient", "sharpness": 2.0},
            "mixture.sharpness is for mixture.form: softmax; exponentiated_gradient takes mixture.step_size",
        ),
    ],
)
def test_each_form_of_group_dro_has_its_own_key(arguments: dict[str, float | str], message: str) -> None:
    """`sharpness` was the rate of exponentiated gradients too."""
    with pytest.raises(ValueError) as error:
        GroupDRO(task_names=["a", "b"], num_supervised_tokens=[1, 1], budget_tokens=10, **arguments)  # type: ignore[arg-type]
    assert str(error.value) == message
