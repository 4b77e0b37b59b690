"""Build hook: what makes torchtune's `tune` know this project's recipes, in a wheel and in an editable install."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Adds the .pth file; and in a wheel only, where there is no checkout to find them in, the recipes and configs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build_data["force_include_editable"]["tune_cli_ext.pth"] = "tune_cli_ext.pth"
        build_data["force_include"]["tune_cli_ext.pth"] = "tune_cli_ext.pth"
        for files in ("recipes/*.py", "yaml/*.yaml"):  # not the script that writes configs
            for file in sorted(Path(self.root).glob(files)):
                name = file.relative_to(self.root).as_posix()
                build_data["force_include"][name] = f"adapt_recipes/_bundled/{name}"
