"""Build hook that adds the files by which torchtune's `tune` finds the recipes, to a wheel and an editable install."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Adds the .pth file, and to a wheel the recipes and configs, which an editable install finds in the checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build_data["force_include_editable"]["tune_cli_ext.pth"] = "tune_cli_ext.pth"
        build_data["force_include"]["tune_cli_ext.pth"] = "tune_cli_ext.pth"
        for files in ("recipes/*.py", "yaml/*.yaml", "yaml/*.jinja"):
            for file in sorted(Path(self.root).glob(files)):
                name = file.relative_to(self.root).as_posix()
                build_data["force_include"][name] = f"adapt_recipes/_bundled/{name}"
