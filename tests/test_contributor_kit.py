"""What CONTRIBUTING.md, CITATION.cff and the files for GitHub say is true of the tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import adapt_recipes

ROOT = Path(adapt_recipes.__file__).resolve().parents[1]
GUIDE = ROOT / "CONTRIBUTING.md"
# What a listed file has of the sibling; the tests of formats run over the table of all formats.
SIBLINGS = {
    "a mixture": r"(?i)\bpike\b|tiny_pike",
    "a reward": r"\b(GradientNorm|(tiny_)?hbo)\b",
    "a model family": "qwen3",
    "a data format": r"(?i)dolly|\bFORMATS\b",
}


def tables() -> dict[str, list[str]]:
    """The paths in the first column of each table of the guide, by the words behind the dots of its heading."""
    parts = re.split(r"^### \.\.\. (.*)$", GUIDE.read_text(), flags=re.MULTILINE)[1:]
    rows = {
        heading: re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
        for heading, text in zip(*[iter(parts)] * 2, strict=True)
    }
    return {heading: re.findall(r"`([^`]+)`", " ".join(cells)) for heading, cells in rows.items()}


def test_the_files_that_have_to_change_are_those_that_name_the_sibling() -> None:
    assert tables().keys() == SIBLINGS.keys()
    for heading, paths in tables().items():
        assert len(paths) >= 5
        # Every change has a line of its own there.
        for path in {*paths} - {"CHANGELOG.md"}:
            assert re.search(SIBLINGS[heading], path + (ROOT / path).read_text()), f"{path} has nothing of {heading}"


def test_no_test_of_the_siblings_is_missing_in_the_tables() -> None:
    """In the folders in which tests list all mixtures, or all formats, by name."""
    for heading, folders in {"a mixture": ["mixture", "recipes"], "a data format": ["data"]}.items():
        for folder in folders:
            for file in (ROOT / "tests" / folder).glob("test_*.py"):
                if re.search(SIBLINGS[heading], file.read_text()):
                    assert file.relative_to(ROOT).as_posix() in tables()[heading]


def layers() -> dict[str, int]:
    """The layer of each module that the guide lists, from its numbered list."""
    lines = re.findall(r"^(\d+)\. (.*)$", GUIDE.read_text(), re.MULTILINE)
    return {name: int(number) for number, line in lines for name in re.findall(r"`(\w+)`", line)}


def test_imports_run_downwards() -> None:
    """Each import of a layer is of one below it, or of its own module."""
    layer, seen = layers(), 0
    assert layer["mixture"] < layer["data"] < layer["models"] < layer["signals"] < layer["run"]
    for file in (ROOT / "adapt_recipes").rglob("*.py"):
        here = file.relative_to(ROOT / "adapt_recipes").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "adapt_recipes":
                paths = [node.module] if node.module != "adapt_recipes" else [f"x.{name.name}" for name in node.names]
                for there in (str(path).split(".")[1] for path in paths):
                    if there != here and {here, there} <= layer.keys():
                        assert layer[there] < layer[here], f"{file} imports {there}"
                        seen += 1
    assert seen > 100


def links(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of every link within the project; each may be empty."""
    found = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text())
    return [(path, anchor) for path, anchor in found if "://" not in path]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists() and (not anchor or anchor in anchors(target)), f"{path}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= {path for path, _ in links(ROOT / "docs" / "README.md")}


def test_citation() -> None:
    """The keys that version 1.2.0 of the schema requires, and what else the project says of itself."""
    citation = load("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"][0]["name"] in (ROOT / "LICENSE").read_text()
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    for reference, number in zip(citation["references"], ("2512.04555", "2406.08811"), strict=True):
        assert {"type", "title", "authors"} <= reference.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in reference["authors"])
        assert reference["url"].endswith(number) and reference["identifiers"][0]["value"] == f"arXiv:{number}"
        assert number in (ROOT / "README.md").read_text()


def test_the_workflow_and_the_hook_run_what_is_here() -> None:
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    assert f'requires-python = ">={python}"' in (ROOT / "pyproject.toml").read_text()
    ((hook,),) = [repo["hooks"] for repo in load(".pre-commit-config.yaml")["repos"]]
    assert hook["language"] == "system" and hook["entry"].split()[0] == "make"
    assert f"\n{hook['entry'].split()[-1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_have_what_github_requires(form: Path) -> None:
    content = load(form.relative_to(ROOT).as_posix())
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len({*ids})
    for field in content["body"]:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes") and field["attributes"]["label"]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())
