"""From a YAML file and ``key=value`` overrides to a recipe's typed config, or to one line that says what is wrong.

A recipe's schema is a dataclass. Keys it does not have are refused, values are checked against its types, and every
node with a ``_component_`` is checked against the signature of what it names: all before anything is built or written.
Nothing is converted: a value is of the type that YAML gives it. A whole number will do where any number will.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import time
import traceback
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, get_type_hints

import torch.distributed as dist
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from adapt_recipes.errors import nearest

ConfigT = TypeVar("ConfigT")

# Import paths of components that have moved, and where to; a config with an old one is refused with its new one.
MOVED = {"adapt_recipes.rewards": "adapt_recipes.signals.rewards"}


class Renamed(NamedTuple):
    """What a config key is called now, and what else has changed about it."""

    key: str
    remark: str = ""


# Keys that were renamed; a config with an old one is refused with its new one. An argument stands beside its component,
# a key of the recipe's own beside None.
RENAMED: dict[tuple[str | None, str], Renamed] = {
    (None, "budget.passes"): Renamed("budget.epochs"),
    ("adapt_recipes.mixture.Adapt", "averaging"): Renamed("ema_decay"),
    ("adapt_recipes.mixture.AdaptPlanned", "loss_averaging"): Renamed("ema_decay"),
    ("adapt_recipes.mixture.AdaptPlanned", "fast_memory"): Renamed("fast_discount"),
    ("adapt_recipes.mixture.AdaptPlanned", "slow_memory"): Renamed("slow_discount"),
    ("adapt_recipes.mixture.Exp3", "averaging"): Renamed("ema_decay"),
    ("adapt_recipes.mixture.Scorer", "ema"): Renamed("ema_decay", "the weight of the old: 1 - ema"),
    ("adapt_recipes.signals.rewards.Uncertainty", "passes"): Renamed("mc_samples"),
}

# What makes a dataclass a strict schema: `@dataclass(kw_only=True, config=STRICT)` with pydantic's dataclass.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

# Of these, one given on the command line replaces the one in the file.
BUDGETS = ("fraction", "tokens", "epochs")

DUPLICATE_ERROR_SECONDS = 10  # seconds until a process says an error that the first one should have said

YAML_TERMS = {  # for what pydantic says of JSON
    "Input should be": "has to be",
    "an object": "a mapping of keys to values",
    "a valid array": "a list",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid ": "a ",
}


class Injected:
    """Marks a component field, ``Annotated[Component, Injected("params")]``, with the arguments the recipe gives it."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Mark:
    """Metadata of a field, ``Annotated[bool, FREE_AT_RESUME]``; see ``marked``."""


FREE_AT_RESUME = Mark()
"""a resume may change it; what is not marked is refused by name"""
NOT_COMPARED = Mark()
"""two runs that differ only in it are still the same run, repeated"""


class Component(BaseModel):
    """A config node that names what to build: ``_component_`` is its import path, all other keys are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)

    component: str = Field(alias="_component_", description="import path of a class or function")
    _key: str = PrivateAttr("")  # where it stands in the config

    @property
    def arguments(self) -> dict[str, Any]:
        """What the config gives the component."""
        return dict(self.model_extra or {})

    def build(self, **given: Any) -> Any:
        """Call the component with its arguments and those the recipe gives.

        Raises:
            ValueError: whatever the component raises, in one line that begins with the key.
        """
        key = self._key or self.component
        try:
            return locate(self.component)(**self.arguments, **given)
        except ValueError as error:
            if str(error).startswith((f"{key}.", f"{key}:")):
                raise
            raise ValueError(f"{key}: {error}") from error
        except Exception as error:
            reason = f"{_named(error)} (ADAPT_TRACEBACK=1 shows where)"
            raise ValueError(f"{key}: {self.component} cannot be built: {reason}") from error


def locate(path: str) -> Any:
    """Import what a dotted path names.

    Raises:
        ValueError: it is not a dotted path, or a part of it cannot be imported.
    """
    if os.getcwd() not in sys.path:  # a user's own component lies beside the config
        sys.path.append(os.getcwd())
    for old, new in MOVED.items():
        if path.startswith(f"{old}."):
            raise ValueError(f"'{path}' has moved to '{new}{path.removeprefix(old)}'")
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"'{path}' is not an import path like 'package.module.name'")
    found: Any = None
    for i, part in enumerate(parts):
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
            continue
        name = ".".join(parts[: i + 1])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise ValueError(f"'{path}' cannot be imported: it needs the package '{error.name}'") from error
            owner = f"'{'.'.join(parts[:i])}' has no" if i else "there is no module"
            public = [name for name in (dir(found) if i else sys.modules) if name[0] != "_" and "." not in name]
            hint = nearest(part, public)
            hint = hint if "did you mean" in hint else ""  # not the whole list
            raise ValueError(f"'{path}' cannot be imported: {owner} '{part}'{hint}") from error
        except Exception as error:  # whatever the module does when it is imported
            raise ValueError(f"'{path}' cannot be imported: {_named(error)}") from error
    return found


def load(config_class: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a config file, apply overrides, and check all of it.

    Args:
        config_class: the recipe's dataclass.
        path: of the YAML file.
        overrides: ``key=value`` with dots for nested keys, or ``~key`` to take one out.

    Returns:
        The config, interpolations resolved.

    Raises:
        ValueError: one line that names the key and what is allowed.
    """
    config = _validate(config_class, _override(_read(Path(path)), overrides))
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        node = getattr(config, name)
        if isinstance(node, Component):
            node._key = name
            marks = [mark for mark in typing.get_args(hint) if isinstance(mark, Injected)]
            _check_arguments(name, node, marks[0].names if marks else ())
    return config


def marked(config_class: type, mark: Mark) -> list[str]:
    """The dotted keys of a schema whose fields have a mark, in the order of the schema."""
    keys = []
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        if any(each is mark for each in typing.get_args(hint)):
            keys.append(name)
        elif isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, BaseModel)):
            keys += [f"{name}.{key}" for key in marked(hint, mark)]
    return keys


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain YAML values, the inverse of ``load``."""
    return TypeAdapter(type(config)).dump_python(config, by_alias=True)


def command_line(main: Callable[[Any], int], config_class: type, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a recipe from the command line and exit with its status.

    A ``ValueError`` or ``OSError`` ends in one line and status 2; ``ADAPT_TRACEBACK=1`` shows where it came from.
    One of several processes leaves at once after an error, whatever the others do.

    Args:
        main: takes the config, returns the exit status.
        config_class: the recipe's dataclass.
        argv: the command line without the program; default ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="tune run RECIPE --config FILE [key=value ...] [~key ...]",
        epilog="ADAPT_TRACEBACK=1 in the environment shows where an error comes from.",
    )
    parser.add_argument("--config", required=True, help="YAML file")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        status = main(_load_once(config_class, arguments.config, overrides))
    except (ValueError, OSError) as error:
        if os.environ.get("ADAPT_TRACEBACK"):
            traceback.print_exc()
        else:
            print(f"error: {_line(error)}", file=sys.stderr)
            sys.unraisablehook = lambda _: None  # what is only half built may fail once more as it is cleared away
        status = 2
    except BaseException as error:
        if not dist.is_initialized():
            raise
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    if dist.is_initialized():  # after an error alone
        # At its end Python would take the group down, and nccl waits there for kernels that wait for other processes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _load_once(config_class: type[ConfigT], path: str, overrides: Sequence[str]) -> ConfigT:
    """``load``, with its error said by the first process of each host alone, as all have the same one."""
    try:
        return load(config_class, path, overrides)
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(DUPLICATE_ERROR_SECONDS)  # torchrun ends this process here, as soon as the first one has ended
        raise


def _line(error: BaseException) -> str:
    """What an error says, in one line; of YAML's and OmegaConf's, which go on about where they were, the first part."""
    if isinstance(error, OmegaConfBaseException):
        return str(error).partition("\n")[0]
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _named(error: BaseException) -> str:
    """The same with the kind of error, for one that is no ``ValueError`` and means little without."""
    return f"{type(error).__name__}: {_line(error)}".removesuffix(": ")


def _read(path: Path) -> dict[str, Any]:
    """The file as plain values, interpolations still in it."""
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file; `tune ls` lists the names that `tune run` knows"
        raise ValueError(f"--config {path}: {what}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config {path}{line}: {_line(error)}") from error
    if not isinstance(values, dict) or not values:
        raise ValueError(f"--config {path}: has to be a mapping of keys to values{'' if values else ', and is empty'}")
    values.pop("versions", None)  # of a run's resolved.yaml, which is a config like any other
    return values  # type: ignore[return-value]


def _override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply the command line to the file's values and resolve interpolations."""
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        takes_out, key = key.startswith("~"), key.removeprefix("~")
        *parents, last = key.split(".")
        if takes_out == bool(equals) or key.startswith("-") or not all((*parents, last)):
            raise ValueError(f"'{override}' is not an override: write key=value, or ~key to take a key out")
        if key in seen:
            raise ValueError(f"{key} is given twice on the command line")
        seen.add(key)
        node: Any = values
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        if takes_out:
            if last not in node:
                raise ValueError(f"~{key}: the config has no such key{nearest(last, node) if node else ''}")
            del node[last]
            continue
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{override}: {_line(error)}") from error
        value = None if parsed["value"] == "None" else parsed["value"]
        if isinstance(value, str) and isinstance(node.get(last), dict) and "_component_" in node[last]:
            node, last = node[last], "_component_"  # as in torchtune: model=other.builder
        if parents == ["budget"] and last in BUDGETS:
            for name in BUDGETS:
                if f"budget.{name}" not in seen:
                    node.pop(name, None)
        node[last] = value
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {_line(error)}") from error
    return resolved


def _validate(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Build the dataclass, or say in one line what stands in the way."""
    try:
        return _strictly(TypeAdapter(config_class), values)
    except ValidationError as error:
        unknown = "unexpected_keyword_argument"  # these first: a misspelt key also leaves the right one missing
        detail = min(error.errors(), key=lambda detail: detail["type"] != unknown)
        *parents, last = [str(part) for part in detail["loc"]] or [""]
        key = ".".join((*parents, last))
        if detail["type"] in ("missing", "missing_argument"):
            raise ValueError(f"missing key '{key}'") from error
        if detail["type"] == "value_error":  # a schema's own
            raise ValueError(str(detail["ctx"]["error"])) from error
        if detail["type"] != unknown:
            raise ValueError(_wrong(key, detail)) from error
        if renamed := RENAMED.get((None, key)):
            raise ValueError(f"unknown key '{key}': it is '{renamed.key}' now{_remark(renamed)}") from error
        owner: Any = config_class
        for part in parents:
            owner = get_type_hints(owner)[part]
            owner = next((arg for arg in typing.get_args(owner) if is_dataclass(arg)), owner)
        raise ValueError(f"unknown key '{key}'{nearest(last, [field.name for field in fields(owner)])}") from error


def _strictly(adapter: TypeAdapter, value: Any) -> Any:
    """Checks a value as JSON, for pydantic knows there that lists may be tuples, and mappings dataclasses."""
    return adapter.validate_json(json.dumps(value, default=str), strict=True)


def _wrong(key: str, detail: Any) -> str:
    """What pydantic has to say of a value, in the words of YAML."""
    said = detail["msg"]
    for theirs, ours in YAML_TERMS.items():
        said = said.replace(theirs, ours)
    return f"{key}: {said}, not {json.dumps(detail['input'], default=str)}"


def _check_arguments(key: str, node: Component, given: Sequence[str]) -> None:
    """Check a component's arguments against what it takes, without calling it."""
    try:
        component = locate(node.component)
    except ValueError as error:
        raise ValueError(f"{key}._component_: {error}") from error
    if not callable(component):
        raise ValueError(f"{key}._component_: '{node.component}' is not a class or function")
    try:
        parameters = inspect.signature(component).parameters
    except (ValueError, TypeError):  # some built-in callables do not tell
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in given:
        if name not in named and not takes_any:
            raise ValueError(f"{key}._component_: '{node.component}' does not take '{name}', which the recipe gives it")
        if name in node.arguments:
            raise ValueError(f"{key}.{name}: the recipe gives this itself; take it out")
    allowed = [name for name in (*named, *type(node).model_fields) if name not in (*given, "component")]
    for name in node.arguments:
        if name not in allowed and not takes_any:
            for (owner, old), renamed in RENAMED.items():
                if old == name and owner is not None and locate(owner) is component:
                    raise ValueError(f"unknown key '{key}.{name}': it is '{key}.{renamed.key}' now{_remark(renamed)}")
            raise ValueError(f"unknown key '{key}.{name}' for {node.component}{nearest(name, allowed)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in (*given, *node.arguments):
            raise ValueError(f"missing key '{key}.{name}', which {node.component} needs")
    try:
        hints = get_type_hints(component.__init__ if inspect.isclass(component) else component)
    except Exception:  # libraries hide some annotations behind names that are not importable
        return
    for name, value in node.arguments.items():
        if name in hints and name in named and value is not named[name].default:  # `x: int = None` is common
            _check_type(f"{key}.{name}", value, hints[name])


def _remark(renamed: Renamed) -> str:
    return f", {renamed.remark}" if renamed.remark else ""


def _check_type(key: str, value: Any, annotation: Any) -> None:
    """Refuse a value that its parameter's annotation does not admit, as far as the annotation can be checked."""
    try:
        _strictly(TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)), value)
    except (PydanticUserError, TypeError):
        return
    except ValidationError as error:
        detail = error.errors()[0]
        if detail["type"] != "needs_python_object":  # of classes, only the component itself can tell
            raise ValueError(_wrong(key, detail)) from error


def config_differences(saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """The settings in which two configs differ.

    Args:
        saved, now: nested dicts; lists are compared as wholes, and a key that one lacks differs.
        free: dotted keys that may differ, each with everything below it.

    Returns:
        Dotted keys, in the order of ``saved`` and then of ``now``.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(now))
    missing = object()
    return [
        key
        for key in old | new
        if not _equal(old.get(key, missing), new.get(key, missing))
        and not any(key == prefix or key.startswith(f"{prefix}.") for prefix in free)
    ]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _equal(one: Any, other: Any) -> bool:
    """``==``, but NaN is NaN."""
    return one == other or (one != one and other != other)
