"""Configs: what a file and a command line become, and that no misspelling gets through."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import string
import sys
import time
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from adapt_recipes import shipped
from adapt_recipes.budget import BudgetConfig
from adapt_recipes.config import (
    FREE_AT_RESUME,
    NOT_COMPARED,
    STRICT,
    Component,
    Injected,
    TrainConfig,
    command_line,
    load,
    to_dict,
)
from adapt_recipes.strict import MOVED, config_differences, locate, marked

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "yaml").glob("*.yaml"))


def build(size: int, lr: float = 0.1, names: list[str] | None = None, late: bool = None) -> tuple[Any, ...]:  # type: ignore[assignment] # noqa: E501
    """What the component of these tests makes."""
    return size, lr, names, late


@dataclass(kw_only=True, config=STRICT)
class Schema:
    name: str
    part: Component
    budget: BudgetConfig
    size: int = 3
    fitted: Annotated[Component | None, Injected("size")] = None


FILE = """
name: a
part:
  _component_: test_config.build
  size: ${size}
  lr: 0.2
budget:
  fraction: 0.5
size: 4
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


# ---- from a file and a command line to a config


def test_a_file(file: Path) -> None:
    config = load(Schema, file)
    assert (config.name, config.size, config.budget.fraction, config.fitted) == ("a", 4, 0.5, None)
    assert config.part.arguments == {"size": 4, "lr": 0.2}
    assert config.part.build(late=True) == (4, 0.2, None, True)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=b=c", {"name": "b=c"}),
        ("name='5'", {"name": "5"}),
        ("size=5", {"size": 5, "part": {"_component_": "test_config.build", "size": 5, "lr": 0.2}}),
        ("part.lr=1", {"part": {"_component_": "test_config.build", "size": 4, "lr": 1}}),
        ("part.lr=1e-3", {"part": {"_component_": "test_config.build", "size": 4, "lr": 0.001}}),
        ("part.lr=.inf", {"part": {"_component_": "test_config.build", "size": 4, "lr": math.inf}}),
        (
            "part.names=[a, b]",
            {"part": {"_component_": "test_config.build", "size": 4, "lr": 0.2, "names": ["a", "b"]}},
        ),
        ("part.late=null", {"part": {"_component_": "test_config.build", "size": 4, "lr": 0.2, "late": None}}),
        ("part.late=None", {"part": {"_component_": "test_config.build", "size": 4, "lr": 0.2, "late": None}}),
        ("~part.lr", {"part": {"_component_": "test_config.build", "size": 4}}),
        ("part=builtins.dict", {"part": {"_component_": "builtins.dict", "size": 4, "lr": 0.2}}),
        ("part={_component_: builtins.dict, a: 1}", {"part": {"_component_": "builtins.dict", "a": 1}}),
        ("budget.tokens=7", {"budget": {"fraction": None, "tokens": 7, "epochs": None}}),
        ("budget={epochs: 2}", {"budget": {"fraction": None, "tokens": None, "epochs": 2.0}}),
    ],
)
def test_an_override(file: Path, override: str, expected: dict[str, Any]) -> None:
    assert to_dict(load(Schema, file, [override])) == to_dict(load(Schema, file)) | expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("size=010", "^size=010: YAML reads 010 as 8: write a number in decimal without leading zeros; text needs quo"),
        ("size=-010", "^size=-010: YAML reads -010 as -8: "),
        ("size=1:30", "^size=1:30: YAML reads 1:30 as 90: "),
        ("part={_component_: test_config.build, size: 010}", ": YAML reads 010 as 8: "),
        ("size=08", '^size: has to be a whole number, not "08"$'),
        ("size=", "^size= has no value: write size=null for none, or size=\"''\" for an empty text$"),
        ("name= ", "^name= has no value: "),
        ("name=a #1", "^name=a #1: YAML reads what follows # as a comment; write name=\"'...'\" to keep it$"),
        ("name=#1", "^name=#1: YAML reads what follows # as a comment"),
        ("size", "^'size' is not an override: write key=value, or ~key to remove a key, without spaces$"),
        (" =3", "^' =3' is not an override: "),
        ("--size=3", "^'--size=3' is not an override: .*; options of torchrun, such as --nproc_per_node, come before"),
        ("size='7'", '^size: has to be a whole number, not "7", which is text; for an environment variable write '),
    ],
)
def test_an_override_that_is_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load(Schema, file, [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("size = 5", "size", 5),
        ("size=0x10", "size", 16),
        ("size=1_0", "size", 10),
        ("size=0", "size", 0),
        ("name=\"'010'\"", "name", "'010'"),
        ("name='010'", "name", "010"),
        ("name='a #1'", "name", "a #1"),
        ("name=a#1 b", "name", "a#1 b"),
        ("name=''", "name", ""),
        ("name=zwei Wörter/größe", "name", "zwei Wörter/größe"),
    ],
)
def test_an_override_that_looks_odd(file: Path, override: str, key: str, value: Any) -> None:
    assert getattr(load(Schema, file, [override]), key) == value


def test_an_octal_number_in_a_file_is_refused_with_its_line(file: Path) -> None:
    file.write_text(FILE.replace("lr: 0.2", "lr: 010"))
    with pytest.raises(ValueError, match="config.yaml, line 6: YAML reads 010 as 8: "):
        load(Schema, file)


def test_numbers_from_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable is text, as OmegaConf says; ``oc.decode`` makes it a number."""
    monkeypatch.setenv("NUM", "7")
    assert load(Schema, file, ["name=${oc.env:NUM}"]).name == "7"
    assert load(Schema, file, ["size=${oc.decode:${oc.env:NUM}}"]).size == 7
    with pytest.raises(ValueError, match=r'not "7", which is text; .* write \$\{oc.decode:\$\{oc.env:NAME\}\}$'):
        load(Schema, file, ["size=${oc.env:NUM}"])
    monkeypatch.delenv("NUM")
    with pytest.raises(ValueError, match="size: .*Environment variable 'NUM' not found"):
        load(Schema, file, ["size=${oc.env:NUM}"])


def test_a_config_in_another_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interpolations are its own; its relative paths are those of the current folder, and stay as they are."""
    moved = file.parent / "zwei Wörter" / "größe 1.yaml"
    moved.parent.mkdir()
    moved.write_text(FILE.replace("name: a", "name: data/${size}"))
    monkeypatch.chdir(file.parent)
    assert load(Schema, moved.relative_to(file.parent)).name == "data/4"


def test_a_node_that_the_file_does_not_have(file: Path) -> None:
    config = load(Schema, file, ["fitted._component_=builtins.dict", "fitted.lr=1"])
    assert to_dict(config)["fitted"] == {"_component_": "builtins.dict", "lr": 1}
    assert load(Schema, file, ["fitted={_component_: builtins.dict, lr: 1}"]) == config
    assert load(Schema, file, ["fitted={_component_: test_config.build, lr: 1}", "~fitted.lr"]).fitted is not None


def test_what_the_recipe_gives_is_neither_missing_nor_allowed(file: Path) -> None:
    load(Schema, file, ["fitted={_component_: test_config.build}"])
    with pytest.raises(ValueError, match="^fitted.size: the recipe passes this itself; remove it$"):
        load(Schema, file, ["fitted={_component_: test_config.build, size: 3}"])
    with pytest.raises(ValueError, match="^fitted._component_: 'math.sqrt' does not take 'size', which"):
        load(Schema, file, ["fitted={_component_: math.sqrt}"])


def test_a_component_in_a_component(file: Path) -> None:
    """As in torchtune: it is checked as any other, and built first."""
    inner = "{_component_: test_config.build, size: 1, names: [a]}"
    assert load(Schema, file, [f"part={{_component_: builtins.dict, x: {inner}}}"]).part.build(y=2) == {
        "x": (1, 0.1, ["a"], None),
        "y": 2,
    }
    for changed, message in {
        inner.replace("size", "sise"): "unknown key 'part.x.sise' for test_config.build; did you mean 'size'?",
        inner.replace("size: 1", "lr: 1"): "missing key 'part.x.size', which test_config.build needs",
        inner.replace("[a]", "a"): 'part.x.names: has to be a list, not "a"',
        "{_component_: test_config.biuld}": "part.x._component_: 'test_config.biuld' cannot be imported",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            load(Schema, file, [f"part={{_component_: builtins.dict, x: {changed}}}"])
    node = load(Schema, file, ["part={_component_: builtins.dict, x: {_component_: builtins.int, y: 0}}"]).part
    with pytest.raises(ValueError, match=r"^part\.x: builtins.int cannot be built: TypeError"):
        node.build()


def test_an_error_about_an_argument_names_its_key(file: Path) -> None:
    decoder = "{_component_: adapt_recipes.models.decoder_from_folder, path: nowhere, max_seq_len: 8}"
    node = load(Schema, file, [f"part={decoder}"]).part
    with pytest.raises(ValueError, match="^part.path: there is no folder nowhere"):
        node.build()
    node = load(Schema, file, [f"part={{_component_: builtins.dict, decoder: {decoder}}}"]).part
    with pytest.raises(ValueError, match="^part.decoder.path: there is no folder nowhere"):
        node.build()


def nested_tasks(path: str) -> list[str]:
    """A component that names its arguments as those of ``tasks``, wherever it stands, and a file like one."""
    raise ValueError(f"tasks.path: {path} has no data/tasks.path; see tasks.size, tasks.path")


def test_a_nested_component_need_not_know_its_key() -> None:
    node = Component(_component_="builtins.dict", math={"_component_": "test_config.nested_tasks", "path": "x"})
    node._key = "tasks"
    with pytest.raises(
        ValueError, match="^tasks.math.path: x has no data/tasks.path; see tasks.size, tasks.math.path$"
    ):
        node.build()
    # Two levels down, and where it is not nested.
    node = Component(_component_="builtins.dict", all=node.arguments | {"_component_": "builtins.dict"})
    node._key = "tasks"
    with pytest.raises(ValueError, match="^tasks.all.math.path: x has .* tasks.all.math.path$"):
        node.build()
    node = Component(_component_="test_config.nested_tasks", path="x")
    node._key = "tasks"
    with pytest.raises(ValueError, match="^tasks.path: x has no data/tasks.path; see tasks.size, tasks.path$"):
        node.build()


def collect(first: int = 0, **sizes: list[int]) -> dict[str, Any]:
    return {"first": first} | sizes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("part.frist=3", "^unknown key 'part.frist' for test_config.collect; did you mean 'first'[?]$"),
        ("part.innre.size=3", "^unknown key 'part.innre' for test_config.collect; did you mean 'inner'[?]$"),
        ("~part.inner._component_", "^missing key 'part.inner._component_'$"),
        ("part.other=3", "^part.other: has to be a list, not 3$"),
    ],
)
def test_what_goes_into_kwargs_is_checked(file: Path, override: str, message: str) -> None:
    """Before anything is built, which may take long."""
    part = "part={_component_: test_config.collect, inner: {_component_: test_config.build, size: 1}, rest: [1]}"
    assert load(Schema, file, [part]).part.build() == {"first": 0, "inner": (1, 0.1, None, None), "rest": [1]}
    with pytest.raises(ValueError, match=message):
        load(Schema, file, [part, override])


def test_arguments_missing_are_named_in_their_order(file: Path) -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="^missing key 'part.vocab_size'"):
            load(Schema, file, ["part={_component_: torchtune.models.llama3_2.llama3_2}"])


def test_locate() -> None:
    assert locate("math.sqrt") is math.sqrt
    assert locate("adapt_recipes.config.Component.build") is Component.build
    assert locate("xml.dom.minidom").__name__ == "xml.dom.minidom"
    with pytest.raises(ValueError, match="^'math.sqt' cannot be imported: 'math' has no 'sqt'; did you mean 'sqrt'?"):
        locate("math.sqt")
    with pytest.raises(ValueError, match="'xml.dom' has no 'nothing'"):
        locate("xml.dom.nothing.at_all")
    for path in ("", ".", "math.", "math sqrt", "1.2"):
        with pytest.raises(ValueError, match="is not an import path"):
            locate(path)


def test_a_component_that_has_moved_is_named_with_its_new_place() -> None:
    assert MOVED
    for old, new in MOVED.items():
        with pytest.raises(ValueError, match=f"^'{old}.Name' has moved to '{new}.Name'$"):
            locate(f"{old}.Name")


def test_what_a_component_raises_begins_with_its_key_once(file: Path) -> None:
    node = load(Schema, file, ["part={_component_: builtins.int, x: y}"]).part
    with pytest.raises(ValueError, match=r"^part: builtins.int cannot be built: TypeError: .* \(ADAPT_TRACEBACK=1"):
        node.build()
    node = load(Schema, file, ["part={_component_: adapt_recipes.training.schedule.cosine, final: 2}"]).part
    with pytest.raises(ValueError, match="^part: lr_schedule.final: 2"):
        node.build()


def test_marked_keys_are_found_in_nodes_as_well() -> None:
    @dataclass(kw_only=True, config=STRICT)
    class Marked(TrainConfig):
        mine: Annotated[int, NOT_COMPARED, FREE_AT_RESUME] = 0

    base, own = (set(marked(schema, FREE_AT_RESUME)) for schema in (TrainConfig, Marked))
    assert own == base | {"mine"} and {"resume", "tasks.cache_dir"} <= base and "seed" not in base
    # An argument of a component, and not the component.
    assert "checkpointer.save_dtype" in base and "checkpointer" not in base
    assert "checkpointer.save_dtype" not in marked(TrainConfig, NOT_COMPARED)
    assert set(marked(Marked, NOT_COMPARED)) == set(marked(TrainConfig, NOT_COMPARED)) | {"mine"}


def test_config_differences_are_named() -> None:
    saved = {
        "seed": 1,
        "resume": False,
        "model": {"path": "a", "size": {"x": 1}},
        "tasks": ["a", "b"],
        "gone": {},
        "lr": 1,
    }
    now = {
        "seed": 2,
        "resume": True,
        "model": {"path": "b", "size": {"x": 2}},
        "tasks": ["b", "a"],
        "new": None,
        "lr": 1.0,
    }
    assert config_differences(saved, saved, free=()) == []
    assert config_differences(saved, now, free=()) == [
        "seed",
        "resume",
        "model.path",
        "model.size.x",
        "tasks",
        "gone",
        "new",
    ]
    assert config_differences(saved, now, free={"resume", "model.size", "gone", "new"}) == [
        "seed",
        "model.path",
        "tasks",
    ]
    nan = {"lr": float("nan")}
    assert config_differences(nan, {"lr": float("nan")}, free=()) == []
    assert config_differences(nan, {"lr": 1.0}, free=()) == ["lr"]
    assert config_differences({"model_path": 1}, {"model_path": 2}, free=["model"]) == ["model_path"]
    assert config_differences({"model": {"path": "a"}}, {"model": None}, free=[]) == ["model.path", "model"]


# ---- the configs that come with the recipes


@cache
def recipe_of(path: Path) -> ModuleType:
    """By its file: torchtune installs a package called `recipes` that raises when it is imported."""
    name = str(shipped.recipe_of(path))
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_survives_being_written_and_read(path: Path, tmp_path: Path) -> None:
    schema = recipe_of(path).Config
    config = load(schema, path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    again = load(schema, resolved)
    assert again == config
    assert json.dumps(to_dict(again)) == json.dumps(to_dict(config))  # types as well: 1, 1.0 and true are equal
    assert "${" not in resolved.read_text()
    written = yaml.safe_load(path.read_text())
    if "mixture" in written:
        written["mixture"]["start_from"] = None
    for key in set(written) - {"model", "budget", "tasks", "probe", "benchmarks"}:
        assert to_dict(config)[key] == written[key]
    if path.stem.startswith("eval_"):
        return
    assert config.max_seq_len == written["max_seq_len"]
    if "max_seq_len" in written["model"]:  # the file says ${max_seq_len}
        assert config.model.arguments["max_seq_len"] == config.max_seq_len
    assert config.strategy in path.stem and config.output_dir == f"runs/{path.stem}"


def test_infinity_survives(tmp_path: Path) -> None:
    path = next(path for path in SHIPPED if path.stem == "tiny_temperature")
    config = load(recipe_of(path).Config, path, ["mixture.temperature=.inf"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(to_dict(config)))
    assert load(recipe_of(path).Config, resolved).mixture.arguments["temperature"] == math.inf


PLANNED = ROOT / "yaml" / "tiny_adapt_planned.yaml"


@cache
def keys() -> dict[str, list[str]]:
    """All keys that the config may have, by the key of the mapping they stand in ("" for the top)."""
    schema = recipe_of(PLANNED).Config
    config = load(schema, PLANNED)
    found = {"": list(schema.__dataclass_fields__)}
    for name in found[""]:
        node = getattr(config, name)
        if isinstance(node, Component):
            fixed = set(type(node).model_fields) - {"component"}
            found[name] = sorted({*inspect.signature(locate(node.component)).parameters, *fixed} - set(GIVEN))
        elif hasattr(node, "__dataclass_fields__"):
            found[name] = list(node.__dataclass_fields__)
    return found


GIVEN = ("task_names", "num_supervised_tokens", "budget_tokens", "params")


def slips(key: str) -> set[str]:
    """The key with one letter wrong, missing or too many, or two swapped."""
    cuts = [(key[:i], key[i:]) for i in range(len(key) + 1)]
    letters = string.ascii_lowercase + "_"
    found = {before + letter + after[k:] for before, after in cuts for letter in letters for k in (0, 1)}
    found |= {before + after[1:] for before, after in cuts} | {b + a[:2][::-1] + a[2:] for b, a in cuts}
    return found - {key, ""}


@st.composite
def misspellings(draw: st.DrawFn) -> tuple[str, str, str]:
    """(mapping, key, the key misspelt)."""
    where = draw(st.sampled_from(sorted(keys())))
    key = draw(st.sampled_from(keys()[where]))
    return where, key, draw(st.sampled_from(sorted(slips(key))))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(misspellings())
def test_no_misspelling_gets_through(misspelling: tuple[str, str, str]) -> None:
    where, key, misspelt = misspelling
    others = set(keys()[where]) - {key}
    assume(misspelt not in {*GIVEN, *others, *(slip for other in others for slip in slips(other))})
    wrong = f"{where}.{misspelt}".lstrip(".")
    with pytest.raises(ValueError) as refused:
        load(recipe_of(PLANNED).Config, PLANNED, [f"{wrong}=1"])
    said = str(refused.value)
    assert said.startswith(f"unknown key '{wrong}'") and said.endswith(f"; did you mean '{key}'?")


# ---- the end of a process


def status(monkeypatch: pytest.MonkeyPatch, file: Path, main: Any, *argv: str) -> int:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as exit:
        command_line(main, Schema, ["--config", str(file), *argv])
    return exit.value.code  # type: ignore[return-value]


def test_exit_status(monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(config: Schema) -> int:
        raise OSError(28, "No space left on device", "checkpoint")

    def bug(config: Schema) -> int:
        raise RuntimeError("a bug")

    monkeypatch.delenv("ADAPT_TRACEBACK", raising=False)
    assert status(monkeypatch, file, lambda config: config.size, "size=143") == 143
    assert status(monkeypatch, file, lambda config: 0, "size=x") == 2
    assert capsys.readouterr().err == 'error: size: has to be a whole number, not "x"\n'
    assert status(monkeypatch, file, full) == 2
    assert capsys.readouterr().err == "error: checkpoint: no space left on device\n"
    with pytest.raises(RuntimeError):  # what is nobody's fault but ours keeps its traceback
        command_line(bug, Schema, ["--config", str(file)])
    monkeypatch.setenv("ADAPT_TRACEBACK", "1")
    assert status(monkeypatch, file, lambda config: 0, "size=x") == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_the_first_process_does_not_say_another_does(
    monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.delenv("ADAPT_TRACEBACK", raising=False)
    for local_rank in "01":
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert status(monkeypatch, file, lambda config: 0, "size=x") == 2
        assert capsys.readouterr().err == 'error: size: has to be a whole number, not "x"\n'
        assert len(waited) == int(local_rank)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=1"], "error: --config FILE is missing after the recipe; "),
        (["--confg", "x"], "error: unknown argument '--confg'; did you mean '--config'?"),
        (["--config"], "error: --config: has no value; "),
        (["--config=a", "--config", "b"], "error: --config is given twice"),
    ],
)
def test_a_command_line_without_one_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as exit:
        command_line(lambda config: 0, Schema, words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(message) and error.count("\n") == 1
