"""The recipes and configs that are shipped, by name, and a user's own, by path. Quick to import."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import yaml

from adapt_recipes.errors import closest, nearest
from adapt_recipes.words import COMMAND


def bundle() -> Path:
    """The folder with recipes/ and yaml/: inside the package if a wheel is installed, else the checkout.

    The folder beside an installed package, site-packages, has a `recipes` too, which is torchtune's.
    """
    package = Path(__file__).resolve().parent
    return package / "_bundled" if (package / "_bundled").is_dir() else package.parent


def shipped(folder: str, suffix: str) -> dict[str, Path]:
    """{file name without suffix: path} of a folder of the bundle, in alphabetical order."""
    return {path.stem: path for path in sorted((bundle() / folder).iterdir()) if path.suffix == suffix}


def recipe_of(config_path: str | Path) -> str | None:
    """The recipe that a config names by its key `recipe`, by name or path; None: it names none."""
    try:
        config = yaml.safe_load(Path(config_path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        # Loading the config will say what is wrong with it.
        return None
    recipe = config.get("recipe") if isinstance(config, dict) else None
    return None if recipe is None else str(recipe)


def config_file(name_or_path: str) -> str:
    """The file of a config.

    Raises:
        ValueError: it is neither a file nor a known name.
    """
    import torchtune
    from torchtune._recipe_registry import get_all_recipes

    configs = {config.name: config.file_path for recipe in get_all_recipes() for config in recipe.configs}
    if name_or_path in configs:
        stock_folder = os.path.join(os.path.dirname(torchtune.__file__), "..", "recipes", "configs")
        # If the second path is absolute, it is the result.
        return os.path.join(stock_folder, configs[name_or_path])
    if not os.path.isfile(name_or_path):
        raise ValueError(
            f"config {name_or_path!r} is neither a file nor a known name{nearest_or_ls(name_or_path, list(configs))}"
        )
    return name_or_path


def recipe_file(name_or_path: str) -> str:
    """The file of one of our recipes, or a user's file.

    Raises:
        ValueError: there is none.
    """
    recipes = shipped("recipes", ".py")
    if name_or_path.endswith(".py") and os.path.isfile(name_or_path):
        return name_or_path
    if name_or_path not in recipes:
        raise ValueError(f"no recipe '{name_or_path}', by name or by path{nearest(name_or_path, recipes)}")
    return str(recipes[name_or_path])


def schema(recipe_path: str) -> type:
    """The class `Config` of a recipe's file.

    Raises:
        ValueError: the file cannot be imported, or has no such class.
    """
    spec = spec_from_file_location(Path(recipe_path).stem, recipe_path)
    assert spec is not None and spec.loader is not None
    # dataclasses look up annotations in ``sys.modules``.
    recipe = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(recipe)
    except Exception as error:
        # A user's file may raise anything.
        raise ValueError(f"{recipe_path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(recipe, "Config"):
        raise ValueError(f"{recipe_path} has no class Config, which is the schema of a recipe's config")
    return recipe.Config


def check_recipe(recipe: str, config: str) -> None:
    """Refuses a config that does not exist, and another recipe's for a shipped recipe that is called by name."""
    try:
        owner = recipe_of(config_file(config))
    except ValueError as error:
        raise ValueError(f"--config: {error}") from error
    if recipe in shipped("recipes", ".py") and owner not in (None, recipe):
        reason = f"--config {config}: is for the recipe {owner}, not for {recipe}"
        raise ValueError(f"{reason}; run that recipe, or give a recipe by its path, which takes any config")


def nearest_or_ls(word: str, names: Sequence[str]) -> str:
    """The end of an error message about an unknown name of those that `tune ls` lists, which are many."""
    close = closest(word, names)
    return f"; did you mean '{close}'?" if close else f"; `{COMMAND} ls` lists all"
