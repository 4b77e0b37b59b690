"""Loads a YAML file with ``key=value`` overrides into a recipe's typed config, with errors of one line.

A recipe's schema is a dataclass. Unknown keys are refused, values are checked against the types, and a node with a
``_component_`` is checked against the signature of that class or function, before anything is built or written. Values
are not converted: a value has the type that YAML gives it, except that a whole number is also a float.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import re
import signal
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

from adapt_recipes.errors import closest, nearest
from adapt_recipes.output import never_fatal
from adapt_recipes.stop import exit_on_signals
from adapt_recipes.words import parse_override, split_words

ConfigT = TypeVar("ConfigT")

# Import paths of components that have moved, and their new paths; a config with an old one is refused with its new one.
MOVED = {
    "adapt_recipes.rewards": "adapt_recipes.signals.rewards",
    "adapt_recipes.models.llama_from_folder": "adapt_recipes.models.decoder_from_folder",
    "adapt_recipes.models.add_lora": "adapt_recipes.models.with_lora",
    "adapt_recipes.models.lora_gemma3": "adapt_recipes.models.with_lora",
    "adapt_recipes.models.lora_gemma3_1b": "adapt_recipes.models.with_lora",
    "adapt_recipes.models.lora_qwen1_5_0_5b": "adapt_recipes.models.with_lora",
    "adapt_recipes.models.lora_qwen3": "adapt_recipes.models.with_lora",
    "adapt_recipes.models.lora_qwen3_0_6b": "adapt_recipes.models.with_lora",
}


class Renamed(NamedTuple):
    """The new name of a config key, and what else has changed about it."""

    key: str
    remark: str = ""


# Keys that were renamed; a config with an old one is refused with its new one. An argument stands beside its component,
# a key of the recipe's own beside None.
RENAMED: dict[tuple[str | None, str], Renamed] = {
    (None, "budget.passes"): Renamed("budget.epochs"),
    (None, "budget.allow_repeats"): Renamed("tasks.max_epochs_per_task", "a number of epochs"),
    ("adapt_recipes.data.natural_instructions", "group_by"): Renamed("task_per"),
    ("adapt_recipes.mixture.Adapt", "averaging"): Renamed("ema_decay"),
    ("adapt_recipes.mixture.AdaptPlanned", "loss_averaging"): Renamed("ema_decay"),
    ("adapt_recipes.mixture.AdaptPlanned", "fast_memory"): Renamed("fast_discount"),
    ("adapt_recipes.mixture.AdaptPlanned", "slow_memory"): Renamed("slow_discount"),
    ("adapt_recipes.mixture.Exp3", "averaging"): Renamed("ema_decay"),
    ("adapt_recipes.mixture.Scorer", "ema"): Renamed("ema_decay", "the weight of the old: 1 - ema"),
    ("adapt_recipes.signals.rewards.Uncertainty", "passes"): Renamed("mc_samples"),
}

# For strict schemas: `@dataclass(kw_only=True, config=STRICT)` with pydantic's dataclass.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

BUDGETS = ("fraction", "tokens", "epochs")
# Keys of which exactly one is given. One of them on the command line replaces another one in the file.
ALTERNATIVES = ([f"budget.{name}" for name in BUDGETS], ["batch_size", "batch_tokens"])

# Whole numbers by YAML 1.1 that most people read otherwise: 010 is 8, and 1:30 is 90.
OCTAL_OR_BASE_60 = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")

# How long a process waits before it prints an error that the first process should have printed.
DUPLICATE_ERROR_SECONDS = 10

# YAML's terms for those of JSON in pydantic's messages.
YAML_TERMS = {
    "Input should be": "has to be",
    "an object": "a mapping of keys to values",
    "a valid array": "a list",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid ": "a ",
}


class Injected:
    """Marks a field with the arguments that the recipe passes: ``Annotated[Component, Injected("params")]``.

    ``optional``: those that it passes to a component that takes them.
    """

    def __init__(self, *names: str, optional: tuple[str, ...] = ()) -> None:
        self.names, self.optional = names, optional


class Mark:
    """Metadata of a field, ``Annotated[bool, FREE_AT_RESUME]``, or of arguments of a component; see ``marked``."""

    def of(self, *arguments: str) -> MarkedArguments:
        """Marks arguments of a component only: ``Annotated[Component, FREE_AT_RESUME.of("x")]``."""
        return MarkedArguments(self, arguments)


class MarkedArguments:
    """The arguments of a component that have a mark."""

    def __init__(self, mark: Mark, names: tuple[str, ...]) -> None:
        self.mark, self.names = mark, names


FREE_AT_RESUME = Mark()
"""a resume may change it; a change of any other key is refused"""
NOT_COMPARED = Mark()
"""runs that differ only in it count as repetitions of the same run"""


class Component(BaseModel):
    """A config node to build: ``_component_`` is the import path of a class or function, other keys its arguments.

    An argument may be such a node too; it is built first.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    component: str = Field(alias="_component_", description="import path of a class or function")
    # The key of the node in the config.
    _key: str = PrivateAttr("")

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments in the config."""
        return dict(self.model_extra or {})

    def nested(self, key: str) -> dict[str, Component]:
        """The arguments that are themselves nodes to build; ``key`` is that of this node."""
        nodes = {}
        for name, value in self.arguments.items():
            if isinstance(value, dict) and "_component_" in value:
                nodes[name] = Component(**value)
                nodes[name]._key = f"{key}.{name}"
        return nodes

    def taken(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the arguments that the component takes."""
        parameters = _parameters(locate(self.component)) or {}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return {name: value for name, value in arguments.items() if takes_any or name in parameters}

    def build(self, **injected: Any) -> Any:
        """Calls the component with the arguments in the config and those of the recipe.

        Raises:
            ValueError: the component raised an exception; one line that begins with the key.
        """
        key = self._key or self.component
        try:
            nested = {name: node.build() for name, node in self.nested(key).items()}
            return locate(self.component)(**self.arguments | nested, **injected)
        except ValueError as error:
            message = _with_key(key, self.component, str(error))
            if message.startswith((f"{key}.", f"{key}:")):
                raise ValueError(message) from error
            # A message about an argument begins with its name.
            about_argument = message.startswith(tuple(f"{name}:" for name in self.arguments))
            raise ValueError(f"{key}{'.' if about_argument else ': '}{message}") from error
        except Exception as error:
            reason = f"{_named(error)} (ADAPT_TRACEBACK=1 shows where)"
            raise ValueError(f"{key}: {self.component} cannot be built: {reason}") from error


def _with_key(key: str, component: str, message: str) -> str:
    """A message of a nested component that does not know its place: ``tasks.path`` becomes ``tasks.math.path``."""
    root, dot, _ = key.partition(".")
    if not dot or message.startswith(f"{key}."):
        return message
    names = "|".join(map(re.escape, _parameters(locate(component)) or ()))
    return re.sub(rf"(?<![\w./]){re.escape(root)}\.(?=({names})\b)", f"{key}.", message) if names else message


def locate(path: str) -> Any:
    """Imports the object at a dotted path.

    Raises:
        ValueError: it is not a dotted path, or a part of it cannot be imported.
    """
    # A user's components may be in the current folder.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for old, new in MOVED.items():
        if f"{path}.".startswith(f"{old}."):
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
            # A similar name, but not the whole list.
            hint = nearest(part, public)
            hint = hint if "did you mean" in hint else ""
            raise ValueError(f"'{path}' cannot be imported: {owner} '{part}'{hint}") from error
        except Exception as error:
            # Any exception that the module raises when it is imported.
            raise ValueError(f"'{path}' cannot be imported: {_named(error)}") from error
    return found


def load(config_class: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a config file, applies overrides, and checks the result.

    Args:
        config_class: the recipe's dataclass.
        path: of the YAML file.
        overrides: ``key=value`` with dots for nested keys, or ``~key`` to remove a key.

    Returns:
        The config with interpolations resolved.

    Raises:
        ValueError: one line that names the key and what is allowed.
    """
    config = _validate(config_class, _override(_read(Path(path)), overrides))
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        node = getattr(config, name)
        if isinstance(node, Component):
            node._key = name
            marks = [mark for mark in typing.get_args(hint) if isinstance(mark, Injected)]
            _check_arguments(name, node, *((marks[0].names, marks[0].optional) if marks else ()))
            # A setting of the node may be a component itself.
            for setting in type(node).model_fields:
                if isinstance(inner := getattr(node, setting), Component):
                    inner._key = f"{name}.{setting}"
                    _check_arguments(inner._key, inner)
    return config


def marked(config_class: type, mark: Mark) -> list[str]:
    """The dotted keys of a schema that have a mark, fields and arguments of components, in the order of the schema."""
    keys = []
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        metadata = typing.get_args(hint)
        if any(each is mark for each in metadata):
            keys.append(name)
        of_arguments = [each for each in metadata if isinstance(each, MarkedArguments) and each.mark is mark]
        keys += [f"{name}.{argument}" for each in of_arguments for argument in each.names]
        if isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, BaseModel)):
            keys += [f"{name}.{key}" for key in marked(hint, mark)]
    return keys


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain YAML values; the inverse of ``load``."""
    return TypeAdapter(type(config)).dump_python(config, by_alias=True)


def command_line(main: Callable[[Any], int], config_class: type, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a recipe from the command line and exits with its status.

    A ``ValueError``, ``OSError`` or ``MemoryError`` ends in one line and status 2; with ``ADAPT_TRACEBACK=1`` it is a
    traceback. With several processes, one with an error exits at once without waiting for the others.

    Args:
        main: takes the config, returns the exit status.
        config_class: the recipe's dataclass.
        argv: the command line without the program; default ``sys.argv``.
    """
    handlers = exit_on_signals()
    # All modules are imported by now. Their objects are never garbage; searching them takes long, also at exit.
    gc.freeze()
    config: Any = None
    with never_fatal():
        try:
            config = _load_once(config_class, sys.argv[1:] if argv is None else argv)
            status = main(config)
        except (ValueError, OSError, MemoryError) as error:
            if os.environ.get("ADAPT_TRACEBACK"):
                traceback.print_exc()
            else:
                print(f"error: {_key_of(error, config)}{_line(error)}", file=sys.stderr)
                # Partly built objects may raise again when they are deleted.
                sys.unraisablehook = lambda _: None
            status = 2
        except BaseException as error:
            if not dist.is_initialized():
                raise
            status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
            if not isinstance(error, SystemExit):
                traceback.print_exc()
    # Only after an error. At exit Python would destroy the group, and nccl would wait for kernels that wait for other
    # processes.
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.exit(status)


def _key_of(error: Exception, config: Any) -> str:
    """The key of the config whose path a system's error is about, as the beginning of its message; "" if none is."""
    file = getattr(error, "filename", None)
    if config is None or not isinstance(file, str | os.PathLike):
        return ""
    path = Path(os.path.abspath(file))
    about = [
        (len(str(value)), key)
        for key, value in _leaves(to_dict(config))
        if isinstance(value, str) and value and path.is_relative_to(os.path.abspath(value))
    ]
    return f"{max(about)[1]}: " if about else ""


def _load_once(config_class: type[ConfigT], words: Sequence[str]) -> ConfigT:
    """``load`` by a command line. Its error, which all have, is printed by the first process of each host only."""
    try:
        return load(config_class, *split_words(words))
    except ValueError:
        # torchrun ends this process while it sleeps, as soon as the first one has ended.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(DUPLICATE_ERROR_SECONDS)
        raise


def _line(error: BaseException) -> str:
    """The message of an error in one line; for YAML and OmegaConf, which add context, only its first part."""
    if isinstance(error, OmegaConfBaseException):
        return str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _named(error: BaseException) -> str:
    """The message of an error with its type, for errors other than ``ValueError``."""
    return f"{type(error).__name__}: {_line(error)}".removesuffix(": ")


def _read(path: Path) -> dict[str, Any]:
    """The file as plain values, with interpolations unresolved."""
    if not path.is_file():
        reason = "not a file" if path.exists() else "no such file; `tune ls` lists the names that `tune run` knows"
        raise ValueError(f"--config {path}: {reason}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        _check_numbers(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config {path}{line}: {_line(error)}") from error
    if not isinstance(values, dict) or not values:
        raise ValueError(f"--config {path}: has to be a mapping of keys to values{'' if values else ', and is empty'}")
    # A run's resolved.yaml is a valid config; it also has versions.
    values.pop("versions", None)
    return values  # type: ignore[return-value]


def _override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies overrides to the file's values and resolves interpolations."""
    seen: set[str] = set()
    for override in overrides:
        key, text = parse_override(override)
        *parents, last = key.split(".")
        if key in seen:
            raise ValueError(f"{key} is given twice on the command line")
        seen.add(key)

        # Find the node, and remove or set the key.
        node: Any = values
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        if text is None:
            if last not in node:
                raise ValueError(f"~{key}: the config has no such key{nearest(last, node) if node else ''}")
            del node[last]
            continue
        if not text.strip():
            # An unset variable of the shell.
            raise ValueError(f"{key}= has no value: write {key}=null for none, or {key}=\"''\" for an empty text")
        if re.search(r"(^|\s)#", text) and text.lstrip()[0] not in "'\"[{":
            raise ValueError(f"{override}: YAML reads what follows # as a comment; write {key}=\"'...'\" to keep it")
        try:
            _check_numbers(text)
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{override}: {_line(error)}") from error
        value = None if parsed["value"] == "None" else parsed["value"]
        # As in torchtune, model=other.builder sets model._component_.
        if isinstance(value, str) and isinstance(node.get(last), dict) and "_component_" in node[last]:
            node, last = node[last], "_component_"
        for other in next((keys for keys in ALTERNATIVES if key in keys), []):
            if other not in seen:
                node.pop(other.rpartition(".")[2], None)
        node[last] = value
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {_line(error)}") from error
    return _expand_home(resolved)


def _check_numbers(text: str) -> None:
    """Refuses a number in YAML that is read as another than it looks like.

    Raises:
        MarkedYAMLError: there is one, or it is no YAML.
    """
    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken) and token.plain and OCTAL_OR_BASE_60.fullmatch(token.value):
            problem = (
                f"YAML reads {token.value} as {yaml.safe_load(token.value)}: write a number in decimal without leading "
                f"zeros; text needs quotes, '{token.value}', in a shell \"'{token.value}'\""
            )
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=token.start_mark)


def _expand_home(value: Any) -> Any:
    """The value with ``~`` and ``~/...`` as the home folder, as in a shell."""
    if isinstance(value, dict):
        return {key: _expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and (value == "~" or value[:2] == "~/") else value


def _validate(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Builds the dataclass, or raises an error of one line."""
    try:
        return _strictly(TypeAdapter(config_class), values)
    except ValidationError as error:
        # Unknown keys first, because a misspelled key is also a missing one.
        unknown = "unexpected_keyword_argument"
        detail = min(error.errors(), key=lambda detail: detail["type"] != unknown)
        *parents, last = [str(part) for part in detail["loc"]] or [""]
        key = ".".join((*parents, last))
        if detail["type"] in ("missing", "missing_argument"):
            raise ValueError(f"missing key '{key}'") from error
        # Raised by the schema itself.
        if detail["type"] == "value_error":
            raise ValueError(str(detail["ctx"]["error"])) from error
        if detail["type"] != unknown:
            raise ValueError(_wrong(key, detail)) from error
        if renamed := RENAMED.get((None, key)):
            raise ValueError(f"unknown key '{key}': it is '{renamed.key}' now{_remark(renamed)}") from error
        owner: Any = config_class
        for part in parents:
            # Not a field, but the key of a mapping.
            if part not in (hints := get_type_hints(owner)):
                continue
            owner = next((arg for arg in typing.get_args(hints[part]) if is_dataclass(arg)), hints[part])
        raise ValueError(f"unknown key '{key}'{nearest(last, [field.name for field in fields(owner)])}") from error


def _strictly(adapter: TypeAdapter, value: Any) -> Any:
    """Validates a value as JSON, where pydantic accepts a list as a tuple and a mapping as a dataclass."""
    return adapter.validate_json(json.dumps(value, default=str), strict=True)


def _wrong(key: str, detail: Any) -> str:
    """pydantic's message about a value, in YAML's terms."""
    message = detail["msg"]
    for theirs, ours in YAML_TERMS.items():
        message = message.replace(theirs, ours)
    value = detail["input"]
    # An environment variable is always text.
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?(?!0\d)[\d.]+(e[-+]?\d+)?|true|false", value, re.I)
    hint = ", which is text; for an environment variable write ${oc.decode:${oc.env:NAME}}" if is_number else ""
    return f"{key}: {message}, not {json.dumps(value, default=str)}{hint}"


def _check_arguments(key: str, node: Component, injected: Sequence[str] = (), optional: Sequence[str] = ()) -> None:
    """Checks a component's arguments against its signature, without calling it."""
    try:
        component = locate(node.component)
    except ValueError as error:
        raise ValueError(f"{key}._component_: {error}") from error
    if not callable(component):
        raise ValueError(f"{key}._component_: '{node.component}' is not a class or function")
    nested = node.nested(key)
    for name, argument in nested.items():
        _check_arguments(f"{key}.{name}", argument)
    parameters = _parameters(component)
    if parameters is None:
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    # What the recipe passes, which the component has to take and the config must not give.
    for name in injected:
        if name not in named and not takes_any:
            raise ValueError(f"{key}._component_: '{node.component}' does not take '{name}', which the recipe passes")
    for name in (*injected, *optional):
        if name in node.arguments:
            raise ValueError(f"{key}.{name}: the recipe passes this itself; remove it")

    # Unknown and missing arguments.
    passed = (*injected, *optional, "component")
    allowed = [name for name in (*named, *type(node).model_fields) if name not in passed]
    for name in node.arguments:
        if name not in allowed and not takes_any:
            for (owner, old), renamed in RENAMED.items():
                if old == name and owner is not None and locate(owner) is component:
                    raise ValueError(f"unknown key '{key}.{name}': it is '{key}.{renamed.key}' now{_remark(renamed)}")
            raise ValueError(f"unknown key '{key}.{name}' for {node.component}{nearest(name, allowed)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in (*passed, *node.arguments):
            raise ValueError(f"missing key '{key}.{name}', which {node.component} needs")

    # Types.
    try:
        hints = get_type_hints(component.__init__ if inspect.isclass(component) else component)
    except Exception:
        # Some libraries have annotations that cannot be imported.
        return
    for name, value in node.arguments.items():
        # A default may contradict its annotation: `x: int = None` is common.
        if name in hints and name in named and name not in nested and value is not named[name].default:
            _check_type(f"{key}.{name}", value, hints[name])

    # What goes into **kwargs, where a misspelled key is one whose value does not fit.
    rest = next((name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD), "")
    for name, value in node.arguments.items():
        if rest not in hints or name in named or name in nested:
            continue
        try:
            _check_type(f"{key}.{name}", value, hints[rest])
        except ValueError as error:
            if close := closest(name, [*allowed, *nested]):
                unknown = f"unknown key '{key}.{name}' for {node.component}; did you mean '{close}'?"
                raise ValueError(unknown) from error
            if isinstance(value, dict):
                raise ValueError(f"missing key '{key}.{name}._component_'") from error
            raise


def _parameters(component: Any) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a class or function by name; None: some built-in ones have no signature."""
    try:
        return inspect.signature(component).parameters
    except (ValueError, TypeError):
        return None


def _remark(renamed: Renamed) -> str:
    return f", {renamed.remark}" if renamed.remark else ""


def _check_type(key: str, value: Any, annotation: Any) -> None:
    """Refuses a value that does not fit its parameter's annotation, as far as the annotation can be checked."""
    try:
        _strictly(TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)), value)
    except (PydanticUserError, TypeError):
        return
    except ValidationError as error:
        # An annotation that is a class without a schema can only be checked by the component itself.
        detail = error.errors()[0]
        if detail["type"] != "needs_python_object":
            raise ValueError(_wrong(key, detail)) from error


def config_differences(saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """The keys in which two configs differ.

    Args:
        saved, now: nested dicts. Lists are compared as a whole; a key that is in one of them only differs.
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
    """``==``, except that NaN equals NaN."""
    return one == other or (one != one and other != other)
