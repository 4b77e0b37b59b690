"""What torchtune's `tune` does with this project installed: from a wheel, in an empty folder, and from the checkout."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import tomllib
import venv
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import tune_cli_ext
from adapt_recipes import cli, shipped
from adapt_recipes.stop import NOTHING_PRINTED
from adapt_recipes.words import CommandParser, Parser

ROOT = Path(tune_cli_ext.__file__).resolve().parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
CONFIGS = sorted(path.stem for path in (ROOT / "yaml").glob("*.yaml"))
WELL_FORMED = (0, "Config is well-formed!\n")

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# What pip writes for torchtune's entry point. It is written here because torchtune is not installed into the
# environments of these tests but lent to them; the tests marked `network` have the script that pip itself wrote.
TUNE = """#!{python}
import sys
from torchtune._cli.tune import main
sys.exit(main())
"""

# Several commands in one process, through what `tune` calls: importing torchtune takes seconds, most commands none.
TUNE_MANY = """
import contextlib, io, json, sys
from torchtune._cli.tune import main
results = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["tune", *command]
    out, status = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as exit:
            status = exit.code
    results.append([status, out.getvalue()])
print(json.dumps(results))
"""


class Environment:
    """A virtual environment with this project in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.tune = path / "bin" / "tune"
        self.site_packages = next((path / "lib").glob("python3.*")) / "site-packages"
        self.variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(self, *command: str | Path, cwd: Path) -> str:
        """Output of a command, which has to succeed."""
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=cwd, env=self.variables, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def tune_many(self, *commands: list[str], cwd: Path) -> list[tuple[int, str]]:
        """(exit status, output) of each `tune` command."""
        output = self.run(self.python, "-c", TUNE_MANY, json.dumps(commands), cwd=cwd)
        return [(status, text) for status, text in json.loads(output.splitlines()[-1])]

    def train(self, recipe: str, config: str, out: Path, *, cwd: Path) -> tuple[dict, str]:
        """(summary.json, output) of a training run that ends after a few steps."""
        command = ["run", recipe, "--config", config, f"output_dir={out}", "budget.tokens=64", "resume=false"]
        output = self.run(self.tune, *command, cwd=cwd)
        return json.loads((out / "summary.json").read_text()), output


def borrowing_environment(path: Path, *install: str) -> Environment:
    """An environment of its own for this project, with all that it depends on lent by the environment of the tests.

    The lent site-packages come last and their .pth files are not read, so an editable install of this project in there
    cannot be seen from here.
    """
    venv.create(path, with_pip=False)
    environment = Environment(path)
    (environment.site_packages / "zz_lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment.tune.write_text(TUNE.format(python=environment.python))
    environment.tune.chmod(0o755)
    options = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    environment.run(sys.executable, "-m", "pip", "--python", environment.python, *options, *install, cwd=path)
    return environment


def build(target: str, source: Path, folder: Path) -> Path:
    """Build a wheel or sdist of the sources; its path."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl" if target == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, by way of the sdist."""
    folder = tmp_path_factory.mktemp("build")
    shutil.unpack_archive(build("sdist", ROOT, folder), folder)
    return build("wheel", next(path for path in folder.iterdir() if path.is_dir()), folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return borrowing_environment(tmp_path_factory.mktemp("wheel") / "env", str(wheel))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return borrowing_environment(tmp_path_factory.mktemp("editable") / "env", "--editable", str(ROOT))


def listed(output: str) -> dict[str, list[str]]:
    """{recipe: its configs} as `tune ls` prints them."""
    recipes: dict[str, list[str]] = {}
    for line in output.splitlines()[1:]:
        *recipe, config = line.split()
        recipes.setdefault(recipe[0] if recipe else list(recipes)[-1], []).append(config)
    return recipes


# ---- the wheel


@pytest.mark.slow
def test_the_wheel_holds_the_sources_and_nothing_beside_them(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "adapt_recipes").rglob("*.py")}
    bundled = {f"adapt_recipes/_bundled/recipes/{name}.py" for name in RECIPES}
    bundled |= {f"adapt_recipes/_bundled/yaml/{name}.yaml" for name in CONFIGS}
    bundled |= {"adapt_recipes/_bundled/yaml/vicuna.jinja"}
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert package | {"adapt_recipes/report/page.html", "adapt_recipes/planning/new.yaml.jinja"} <= set(names)
    assert tops == {"adapt_recipes", "tune_cli_ext.py", "tune_cli_ext.pth"}  # `recipes` would overwrite torchtune's
    assert {name for name in names if "_bundled" in name} == bundled
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_commands_from_an_empty_folder(installed: Environment, tmp_path: Path) -> None:
    """ls, cp, cat and validate, by name."""
    program = "import adapt_recipes as a, tune_cli_ext as t; print(a.__file__, t.__file__)"
    where = installed.run(installed.python, "-c", program, cwd=tmp_path).split()
    assert all(path.startswith(str(installed.site_packages)) for path in where), "another installation is tested here"

    ls, cp_recipe, cp_config, cat, *validations = installed.tune_many(
        ["ls"],
        ["cp", "adapt_full_finetune", "mine.py"],
        ["cp", "yaml/tiny_adapt.yaml", "."],
        ["cat", "yaml/tiny_adapt.yaml"],
        ["validate", "tiny_adapt"],
        ["validate", "yaml/tiny_adapt.yaml", "budget.tokens=64", "seed=3"],
        ["validate", "tiny_adapt.yaml"],
        ["validate", "tiny_adapt", "sede=3"],
        ["validate", "tiny_adapt", "budget.tokns=64"],
        ["validate", "tiny_adapd"],
        ["validate", "llama2/7B_full", "seed=3"],
        ["run", "adapt_full_finetun", "--config", "tiny_adapt"],
        ["run", "./gone.py", "--config", "tiny_adapt"],
        ["run", "adapt_full_finetune", "--config", "tiny_mos_diff"],
        ["run", "mixture_eval", "--config", "eval_taks", "runs=[runs/a]"],
        cwd=tmp_path,
    )
    recipes = listed(ls[1])
    assert list(recipes)[: len(RECIPES)] == RECIPES
    assert "llama2/7B_full" in recipes["full_finetune_distributed"]
    listed_configs = [config for name in RECIPES for config in recipes[name]]
    assert sorted(listed_configs) == sorted(CONFIGS), "each once"
    assert cp_recipe[0] == cp_config[0] == cat[0] == 0
    assert (tmp_path / "mine.py").read_text() == (ROOT / "recipes" / "adapt_full_finetune.py").read_text()
    assert (tmp_path / "tiny_adapt.yaml").read_text() == (ROOT / "yaml" / "tiny_adapt.yaml").read_text()
    assert "strategy: adapt" in cat[1]

    assert validations[:3] == [WELL_FORMED] * 3
    hints = ["did you mean 'seed'?", "did you mean 'tokens'?", "did you mean 'tiny_adapt'?", "not for a recipe of ours"]
    hints += ["no recipe 'adapt_full_finetun', by name or by path; did you mean 'adapt_full_finetune'?", "`tune ls`"]
    hints += [
        "--config tiny_mos_diff: is for the recipe mos_full_finetune, not for adapt_full_finetune; run that recipe",
        "--config: config 'eval_taks' is neither a file nor a known name; did you mean 'eval_tasks'?",
    ]
    for (status, output), hint in zip(validations[3:], hints, strict=True):
        assert status == 2 and hint in output and output.count("\n") == 1, output


@pytest.mark.slow
def test_run_by_name_from_an_empty_folder(installed: Environment, tmp_path: Path) -> None:
    """The literal command of the README where there is no folder yaml/, without the noise of our pins."""
    summary, output = installed.train("adapt_full_finetune", "yaml/tiny_adapt.yaml", tmp_path / "out", cwd=tmp_path)
    assert summary["supervised_tokens"] == 64
    assert "cpp extensions" not in output and "set_vital" not in output


@pytest.mark.slow
def test_edited_copies_win_over_the_bundled_files(installed: Environment, tmp_path: Path) -> None:
    """A recipe and a config are copied and edited: then `tune run ./mine.py --config yaml/...` runs the copies."""
    config = (ROOT / "yaml" / "tiny_adapt.yaml").read_text()
    recipe = (ROOT / "recipes" / "adapt_full_finetune.py").read_text()
    assert "\nstrategy: adapt\n" in config and "\nif __name__ ==" in recipe
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "tiny_adapt.yaml").write_text(config.replace("\nstrategy: adapt\n", "\nstrategy: edited\n"))
    (tmp_path / "mine.py").write_text(recipe.replace("\nif __name__ ==", "\nprint('edited recipe')\nif __name__ =="))
    summary, output = installed.train("./mine.py", "yaml/tiny_adapt.yaml", tmp_path / "out", cwd=tmp_path)
    assert "edited recipe" in output
    assert summary["strategy"] == "edited"


@pytest.mark.slow
def test_a_python_start_imports_nothing_heavy(installed: Environment, tmp_path: Path) -> None:
    program = "import sys; print(*sys.modules)"
    hooked = set(installed.run(installed.python, "-c", program, cwd=tmp_path).split())
    pth = installed.site_packages / "tune_cli_ext.pth"
    pth.rename(tmp_path / pth.name)
    try:
        bare = set(installed.run(installed.python, "-c", program, cwd=tmp_path).split())
    finally:
        (tmp_path / pth.name).rename(pth)
    assert hooked - bare == {"tune_cli_ext", "__future__"}


# ---- the checkout


@pytest.mark.slow
def test_commands_from_the_checkout(editable: Environment, tmp_path: Path) -> None:
    """An editable install reads recipes and configs where they lie."""
    where = editable.run(editable.python, "-c", "import adapt_recipes; print(adapt_recipes.__file__)", cwd=tmp_path)
    assert where.strip() == str(ROOT / "adapt_recipes" / "__init__.py")
    ls, cp, validate = editable.tune_many(
        ["ls"],
        ["cp", "yaml/tiny_uniform.yaml", str(tmp_path / "mine.yaml")],
        ["validate", "yaml/tiny_uniform.yaml"],
        cwd=ROOT,
    )
    assert list(listed(ls[1]))[: len(RECIPES)] == RECIPES
    assert cp[0] == 0 and (tmp_path / "mine.yaml").read_text() == (ROOT / "yaml" / "tiny_uniform.yaml").read_text()
    assert validate == WELL_FORMED
    summary, _ = editable.train("recipes/sft_full_finetune.py", "yaml/tiny_uniform.yaml", tmp_path / "out", cwd=ROOT)
    assert summary["supervised_tokens"] == 64


@pytest.mark.slow
def test_module_without_a_pth_file(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", "-m", "tune_cli_ext", "ls"]  # -S: no .pth file is read
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert list(listed(done.stdout))[: len(RECIPES)] == RECIPES, done.stderr
    assert "cpp extensions" not in done.stderr


def importable(*extras: str) -> set[str]:
    """The names under which the packages of extras are imported."""
    return {re.split(r"[<>=]", package)[0].replace("-", "_") for extra in extras for package in EXTRAS[extra]}


def many_in_checkout(commands: list[list[str]], *, cwd: Path, before: str = "") -> list[tuple[int | None, str]]:
    """(exit status, output) of each `tune` command of the checkout, in one process that first runs ``before``."""
    program = f"import sys\n{before}\nimport tune_cli_ext\ntune_cli_ext.hook()\n{TUNE_MANY}"
    words = [sys.executable, "-c", program, json.dumps(commands)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [(status, text) for status, text in json.loads(done.stdout.splitlines()[-1])]


def test_only_reports_and_evaluations_need_an_extra(tmp_path: Path) -> None:
    """With every import of their packages refused. Reports and evaluations name the command that installs them."""
    report, evaluation = importable("report"), importable("eval")
    assert report == {"itables", "matplotlib", "plotly"} and {"lm_eval", "transformers"} < evaluation
    run = ["--config", "tiny_adapt", "budget.tokens=64", "tasks.num_validation_rows=8", "output_dir=out"]
    results = many_in_checkout(
        [
            ["validate", "tiny_adapt"],
            ["validate", "eval_tasks"],
            ["plan", "adapt_full_finetune", *run],
            ["run", "adapt_full_finetune", *run],
            ["report", "out"],
            ["run", "mixture_eval", "--config", "eval_tasks", "runs=[out]"],
        ],
        cwd=tmp_path,
        before=f"sys.modules.update(dict.fromkeys({sorted(report | evaluation)}))",
    )
    *others, of_report, of_evaluation = results
    assert all(status in (0, None) for status, _ in others), others
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["supervised_tokens"] == 64
    needs = f"it needs {', '.join(sorted(report))}; pip install 'adapt-recipes[report]'\n"
    assert of_report == (2, f"tune report: error: {needs}")
    status, output = of_evaluation
    named = re.fullmatch(r"error: it needs (.+); pip install 'adapt-recipes\[eval\]'\n", output)
    assert status == 2 and named and set(named[1].split(", ")) == evaluation


def test_our_own_command_prints_its_own_name(tmp_path: Path) -> None:
    results = many_in_checkout(
        [
            ["run", "gone", "--config", "tiny_adapt"],
            ["run", "sft_full_finetune", "--config", "tiny_adapt"],
            ["validate", "tiny_adapd"],
            ["plan", "gone", "--config", "tiny_adapt"],
            ["report", "gone"],
            ["plan"],
            ["run"],
            ["cp"],
            ["gone"],
        ],
        cwd=tmp_path,
        before="sys.argv[0] = '/home/user/.local/bin/adapt-recipes'",
    )
    assert "`adapt-recipes ls`" in results[0][1]
    names = ["run", "run", "validate", "plan", "report", "plan", "run", "cp", ""]
    for (status, output), name in zip(results, names, strict=True):
        prefix = f"adapt-recipes {name}".strip()
        assert status == 2 and output.startswith(f"{prefix}: error: ") and output.count("\n") == 1, output


HEAVY = {"torch", "torchao", "torchtune", "datasets", "pandas", "pyarrow", "pydantic", "omegaconf", "rich"}


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        (["ls"], HEAVY | importable("report")),
        pytest.param(
            ["validate", "tiny_adapt_planned"],
            {"transformers", "tensorboard", "adapt_recipes.planning"} | importable("report"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_commands_import_only_what_they_need(command: list[str], unneeded: set[str], tmp_path: Path) -> None:
    """Torch and torchtune take seconds. Validation needs them, because it reads the signatures of their functions."""
    program = """if True:
        import atexit, sys
        atexit.register(lambda: print(*sys.modules, file=sys.stderr))
        import tune_cli_ext
        tune_cli_ext.hook()
        sys.argv[0] = "tune"
        from torchtune._cli.tune import main
        main()
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", program, *command]
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.splitlines()[-1].split())
    assert "adapt_recipes.cli" in imported
    assert not imported & unneeded


@pytest.mark.slow
def test_the_collector_runs_again_after_the_import_and_not_over_modules(tmp_path: Path) -> None:
    program = "import gc, torchtune; print(gc.isenabled(), gc.get_freeze_count() > len(gc.get_objects()))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"import tune_cli_ext; tune_cli_ext.hook(); {program}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


# ---- the hook, in this process


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The current folder, empty, with the hook at work and what it extends not imported yet."""
    importlib.import_module("torchtune")
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "tune_cli_ext" not in str(finder)])
    extended = [f"torchtune._cli.{name}" for name in ("validate", "run", "tune")]
    for name in ("torchtune._recipe_registry", *extended):
        monkeypatch.delitem(sys.modules, name, raising=False)
        parent, _, child = name.rpartition(".")
        monkeypatch.delattr(importlib.import_module(parent), child, raising=False)
    monkeypatch.setattr(sys, "argv", ["tune", "ls"])
    monkeypatch.chdir(tmp_path)
    tune_cli_ext.hook()
    return tmp_path


def registered() -> dict:
    """{name: recipe} of torchtune's registry."""
    registry = importlib.import_module("torchtune._recipe_registry")
    recipes = {recipe.name: recipe for recipe in registry.get_all_recipes()}
    assert len(recipes) == len(registry.get_all_recipes())
    return recipes


def validate(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """(exit status, output) of `tune validate`."""
    parser = CommandParser()
    importlib.import_module("torchtune._cli.validate").Validate.create(parser.add_subparsers())
    args = parser.parse_args(["validate", *words])
    status = 0
    try:
        args.func(args)
    except SystemExit as exit:
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_hooking_twice_registers_once(empty_folder: Path) -> None:
    """And each config with one recipe, which it names."""
    tune_cli_ext.hook()
    assert sum("tune_cli_ext" in str(finder) for finder in sys.meta_path) == 1
    recipes = registered()
    assert list(recipes)[: len(RECIPES)] == RECIPES
    assert all(recipes[name].supports_distributed for name in RECIPES)
    owned = [(config.name, name) for name in RECIPES for config in recipes[name].configs if "/" not in config.name]
    assert sorted(owned) == [(config, shipped.recipe_of(ROOT / "yaml" / f"{config}.yaml")) for config in CONFIGS]


@pytest.mark.parametrize("word", ["my.py", "./my.py", "recipes/my.py", "../{name}/my.py", "{folder}/my.py"])
def test_a_python_file_is_run_as_that_file(empty_folder: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    word = word.format(name=empty_folder.name, folder=empty_folder)
    (empty_folder / "recipes").mkdir()
    (empty_folder / word).write_text("")
    monkeypatch.setattr(sys, "argv", ["tune", "run", "--nproc_per_node", "2", word, "--config", "tiny_adapt"])
    recipe = registered()[word]
    assert Path(recipe.file_path).is_absolute() and Path(recipe.file_path).samefile(empty_folder / word)
    assert recipe.supports_distributed


@pytest.mark.parametrize("argv", [["tune", "cp", "my.py"], ["tune", "run", "other.py"]])
def test_only_files_given_to_run_are_recipes(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    (empty_folder / "my.py").write_text("")
    monkeypatch.setattr(sys, "argv", argv)
    assert not [name for name in registered() if name.endswith(".py")]


def test_a_config_of_the_current_folder_wins(empty_folder: Path) -> None:
    (empty_folder / "yaml").mkdir()
    (empty_folder / "yaml" / "tiny_adapt.yaml").write_text("strategy: mine\n")
    configs = {config.name: config.file_path for config in registered()["adapt_full_finetune"].configs}
    assert configs["yaml/tiny_adapt.yaml"] == str(empty_folder / "yaml" / "tiny_adapt.yaml")
    assert configs["tiny_adapt"] == str(ROOT / "yaml" / "tiny_adapt.yaml")


def test_ls_lists_torchtunes_recipes_as_torchtune_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(importlib.import_module("torchtune").__file__ or "").parent
    spec = importlib.util.spec_from_file_location("ls", folder / "_cli" / "ls.py")
    assert spec is not None and spec.loader is not None
    ls = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ls)
    ls.List(argparse.ArgumentParser().add_subparsers())._ls_cmd(argparse.Namespace())
    header, *theirs = capsys.readouterr().out.splitlines()

    # Ours, if the hook is at work, come before them.
    first = next(row for row in theirs if row.startswith("full_finetune_single_device "))
    monkeypatch.setattr(cli, "shipped", lambda *_: {})
    cli.list_recipes(folder)
    assert capsys.readouterr().out.splitlines() == [header, *theirs[theirs.index(first) :]]


def test_what_is_wrong_with_our_files_leaves_torchtune_as_it_was(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stock recipes stay, and one line says why ours are missing."""
    monkeypatch.setattr(shipped, "bundle", lambda: empty_folder / "nowhere")
    assert "full_finetune_distributed" in registered()
    error = capsys.readouterr().err
    assert error.startswith("adapt-recipes could not extend torchtune's `tune`: FileNotFoundError")
    assert error.count("\n") == 1


def test_an_error_in_the_finder_stops_no_import(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("fails")

    monkeypatch.setattr(tune_cli_ext, "_silence_known_noise", fail)
    monkeypatch.setattr(tune_cli_ext, "_extend_after_execution", fail)
    assert "full_finetune_distributed" in registered()
    assert sys.meta_path[0].find_spec("torchtune", None) is None
    assert capsys.readouterr().err.count("RuntimeError: fails") == 2


def test_validate_knows_whose_a_config_is(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its key `recipe`, a name or a path; a config without a `strategy` is torchtune's."""
    text = (ROOT / "yaml" / "tiny_uniform.yaml").read_text()
    (empty_folder / "mine.py").write_text((ROOT / "recipes" / "sft_full_finetune.py").read_text())
    ours = {
        "by_name.yaml": text,
        "by_path.yaml": text.replace("recipe: sft_full_finetune", "recipe: mine.py"),
    }
    for name, content in ours.items():
        (empty_folder / name).write_text(content)
        assert validate(capsys, name) == WELL_FORMED
        status, output = validate(capsys, name, "sede=1")
        assert status == 2 and "'sede'" in output and "did you mean 'seed'?" in output

    (empty_folder / "stock.yaml").write_text("seed: 1\n")
    assert validate(capsys, "stock.yaml") == WELL_FORMED


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("recipe: gone.py\nstrategy: uniform\n", "recipe: no recipe 'gone.py', by name or by path"),
        ("recipe: sft_full_finetun\n", "did you mean 'sft_full_finetune'?"),
        ("strategy: uniform\n", "missing key 'recipe'; allowed: adapt_full_finetune, "),
        ("strategy: [\n", "expected"),
        ("- strategy\n", "mapping"),
    ],
)
def test_validate_says_in_one_line_what_is_wrong(
    empty_folder: Path, capsys: pytest.CaptureFixture[str], content: str, hint: str
) -> None:
    (empty_folder / "mine.yaml").write_text(content)
    status, output = validate(capsys, "mine.yaml")
    assert status == 2 and hint in output and output.count("\n") == 1, output


# ---- the command line of `tune run`


@pytest.fixture
def tune_run(empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Does `tune run` with a config t.yaml in the current folder, up to the start of the recipe.

    Returns (exit status, output, what would be started: "torchrun" or "python", and the words after the recipe).
    """
    (empty_folder / "t.yaml").write_text((ROOT / "yaml" / "tiny_uniform.yaml").read_text())
    (empty_folder / "mine.py").write_text("")

    def tune_run(*words: str) -> tuple[int, str, list]:
        monkeypatch.setattr(sys, "argv", ["tune", "run", *words])
        run = importlib.import_module("torchtune._cli.run").Run
        started: list = []
        for method, what in (("_run_single_device", "python"), ("_run_distributed", "torchrun")):
            monkeypatch.setattr(
                run, method, lambda self, args, is_builtin, what=what: started.extend([what, args.recipe_args])
            )
        status = 0
        try:
            importlib.import_module("torchtune._cli.tune").main()
        except SystemExit as exit:
            status = int(exit.code or 0)
        captured = capsys.readouterr()
        return status, captured.out + captured.err, started

    return tune_run


SFT = "sft_full_finetune"
MISSING = "--config FILE is missing after the recipe"
NO_VALUE = "--config: has no value; write --config FILE"
ORDER = "options of torchrun, such as --nproc_per_node, come before the recipe"


@pytest.mark.parametrize(
    ("words", "started"),
    [
        ([SFT, "--config", "t.yaml", "seed=1"], ["python", "seed=1"]),
        ([SFT, "--config=t.yaml", "seed=1"], ["python", "seed=1"]),
        ([SFT, "~seed", "--config=t.yaml"], ["python", "~seed"]),
        (["--", SFT, "--config", "t.yaml"], ["torchrun"]),
        (["--nproc_per_node=2", SFT, "--config=t.yaml", "seed=1"], ["torchrun", "seed=1"]),
        (["--nproc_per_node", "2", SFT, "seed=1", "--config=t.yaml"], ["torchrun", "seed=1"]),
        (["--role", SFT, SFT, "--config", "t.yaml"], ["torchrun"]),
        # A user's file may take any words.
        (["mine.py", "--config=t.yaml", "--mine", "3"], ["python", "--mine", "3"]),
    ],
)
def test_run_starts_the_recipe(tune_run: Callable, words: list[str], started: list[str]) -> None:
    how, *others = started
    assert tune_run(*words) == (0, "", [how, ["--config", "t.yaml", *others]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # No recipe, or none of that name.
        ([], "the following arguments are required: recipe"),
        (["seed=1", "--config", "t.yaml"], "no recipe 'seed=1', by name or by path; `tune ls` lists all"),
        (["--config", "t.yaml"], "the following arguments are required: recipe"),
        (["--config", "t.yaml", SFT], "--config comes after the recipe: tune run RECIPE --config FILE"),
        # The config.
        ([SFT], MISSING),
        ([SFT, "t.yaml"], MISSING),
        ([SFT, "seed=1", "--config"], NO_VALUE),
        ([SFT, "--config="], NO_VALUE),
        ([SFT, "--config", ""], NO_VALUE),
        ([SFT, "--config", "--nproc_per_node", "2"], NO_VALUE),
        ([SFT, "--config", "t.yaml", "--config=t.yaml"], "--config is given twice"),
        ([SFT, "--confg", "t.yaml"], "unknown argument '--confg'; did you mean '--config'?"),
        ([SFT, "-config=t.yaml"], "unknown argument '-config'; did you mean '--config'?"),
        ([SFT, "--config", "t.yml"], "--config: config 't.yml' is neither a file nor a known name; "),
        ([SFT, "--config", "."], "--config: config '.' is neither a file nor a known name; `tune ls` lists all"),
        # Options of torchrun.
        (["--foo", SFT, "--config", "t.yaml"], "unknown argument '--foo'"),
        (["--nproc_per_nide", "2", SFT], "unknown argument '--nproc_per_nide'; did you mean '--nproc_per_node'?"),
        (["--nproc_per_node"], "argument --nproc-per-node/--nproc_per_node: expected one argument"),
        (["--nproc_per_node", SFT, "--config", "t.yaml", "seed=1"], f"--nproc_per_node {SFT}: Unsupported"),
        (["--nproc_per_node", "gpu", SFT, "--config", "t.yaml"], "--nproc_per_node gpu: Cuda is not available; write"),
        (["--nproc_per_node", "0", SFT, "--config", "t.yaml"], "--nproc_per_node: has to be at least 1, not 0"),
        (["--nnodes", "x", SFT, "--config", "t.yaml"], "--nnodes: has to be a number of hosts, or MIN:MAX, not x"),
        (["--nnodes=0:1", SFT, "--config", "t.yaml"], "--nnodes: has to be a number of hosts, or MIN:MAX, not 0:1"),
        (["--max_restarts", "x", SFT, "--config", "t.yaml"], "argument --max-restarts/--max_restarts: invalid int"),
        (["--nproc_per_node=2", "--nproc-per-node", "1", SFT], "--nproc_per_node is given twice"),
        ([SFT, "--config", "t.yaml", "--nproc_per_node", "2"], ORDER),
        # Overrides.
        ([SFT, "--config", "t.yaml", "--seed=3"], "'--seed=3' is not an override: write key=value"),
        ([SFT, "--config", "t.yaml", "seed", "=", "3"], "'seed' is not an override: write key=value, or ~key to"),
        # A recipe of torchtune's.
        (["full_finetune_single_device", "--config", "t.yaml", "--foo"], "'--foo' is not an override"),
        (["full_finetune_single_device", "--config", "t.yml"], "--config: config 't.yml' is neither a file"),
        (["--nproc_per_node=2", "full_finetune_single_device", "--config=t.yaml"], "does not support distributed"),
    ],
)
def test_run_says_in_one_line_what_is_wrong(
    tune_run: Callable, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, output, started = tune_run(*words)
    assert status == 2 and not started and output.startswith("tune run: error: ") and output.count("\n") == 1, output
    assert message in output


def test_help_of_a_recipe_needs_no_config(tune_run: Callable) -> None:
    status, output, started = tune_run(SFT, "--help")
    assert status == 0 and not started and output.startswith("usage: tune run RECIPE --config FILE")


def test_other_commands_have_errors_of_one_line(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("torchtune._cli.tune").main
    for words, message in {
        "rnu": "tune: error: argument ",
        "validate": "tune validate: error: the following arguments are required: config\n",
        "report a --ot b": "tune report: error: unknown argument '--ot'; did you mean '--out'?\n",
        "plan a --jsn": "tune plan: error: ",
        "ls x": "tune ls: error: unknown argument 'x'\n",
    }.items():
        monkeypatch.setattr(sys, "argv", ["tune", *words.split()])
        with pytest.raises(SystemExit) as exit:
            main()
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.startswith(message) and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("raised", "status", "output"),
    [
        (ValueError("-r x does\nnot match"), 2, "tune run: error: torchrun failed: ValueError: -r x does not match ("),
        # One process has printed an error of the user, and torchrun has ended the other.
        ([2, 128 + signal.SIGTERM], 2, ""),
        ([2, -signal.SIGTERM], 2, ""),
        ([1, -signal.SIGTERM], 1, "\n===="),
    ],
)
def test_what_torchrun_raises(
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: Exception | list[int],
    status: int,
    output: str,
) -> None:
    if isinstance(raised, list):
        failures = {i: ProcessFailure(i, 0, code, "") for i, code in enumerate(raised)}
        raised = ChildFailedError("recipe.py", failures)

    def run_distributed(self: object, args: object, is_builtin: bool) -> None:
        raise raised

    run = importlib.import_module("torchtune._cli.run").Run
    monkeypatch.setattr(run.__mro__[1], "_run_distributed", run_distributed)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.delenv("ADAPT_TRACEBACK", raising=False)
    for name in ("ADAPT_RECIPES_WORKER", NOTHING_PRINTED):
        monkeypatch.setenv(name, "")
    args = argparse.Namespace(nnodes="1", rdzv_endpoint="")
    with pytest.raises(SystemExit) as exit:
        run(argparse.ArgumentParser().add_subparsers(parser_class=Parser))._run_distributed(args, is_builtin=True)
    error = capsys.readouterr().err
    assert exit.value.code == status and error[: len(output)] == output and bool(error) == bool(output), error
    assert status == 1 or error.count("\n") <= 1


# ---- fresh environments, from the package index


@pytest.fixture(scope="module")
def wheels(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels of the project, of all it needs, and of the installers, so that each is fetched once."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    reach = subprocess.run([*pip, "download", "--no-deps", "--dest", folder, "uv"], capture_output=True, text=True)
    if reach.returncode:
        pytest.skip(f"no package index: {reach.stderr.strip().splitlines()[-1]}")
    fetch = [*pip, "wheel", "--quiet", "--wheel-dir", folder, "--constraint", ROOT / "constraints.txt"]
    fetch += [f"{wheel}[report]", "uv", "pipx", "pip", "hatchling", "editables"]
    done = subprocess.run(fetch, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def with_pip(path: Path, wheels: Path, *install: str | Path) -> Environment:
    """An environment into which pip has installed wheels of that folder."""
    venv.create(path, with_pip=True)
    environment = Environment(path)
    environment.variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.run(environment.python, "-m", "pip", "install", "--quiet", *install, cwd=path)
    environment.run(environment.python, "-m", "pip", "check", cwd=path)
    return environment


@pytest.fixture(scope="module")
def fresh(wheel: Path, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment into which pip has installed the wheel and all it needs."""
    return with_pip(tmp_path_factory.mktemp("fresh") / "env", wheels, wheel)


@pytest.fixture(scope="module")
def installers(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with uv and pipx."""
    return with_pip(tmp_path_factory.mktemp("installers") / "env", wheels, "uv", "pipx")


def check_installation(environment: Environment, folder: Path) -> None:
    """The script as the installer wrote it, in an empty folder."""
    folder.mkdir()
    recipes = listed(environment.run(environment.tune, "ls", cwd=folder))
    assert list(recipes)[: len(RECIPES)] == RECIPES
    summary, _ = environment.train("adapt_full_finetune", "yaml/tiny_adapt.yaml", folder / "out", cwd=folder)
    assert summary["supervised_tokens"] == 64


@pytest.mark.network
def test_pip_in_a_fresh_environment(fresh: Environment, tmp_path: Path) -> None:
    """`tune`, and the command that a report names installs what it needs."""
    check_installation(fresh, tmp_path / "wheel")
    ((status, error),) = fresh.tune_many(["report", "wheel/out"], cwd=tmp_path)
    pip, *words = shlex.split(error.split("; ")[1])
    assert status == 2 and pip == "pip"
    fresh.run(fresh.python, "-m", "pip", *words, cwd=tmp_path)
    fresh.run(fresh.tune, "report", "wheel/out", cwd=tmp_path)
    fresh.run(fresh.python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", ROOT, cwd=tmp_path)
    check_installation(fresh, tmp_path / "editable")


@pytest.mark.network
def test_uv_in_a_fresh_environment(fresh: Environment, installers: Environment, wheel: Path, tmp_path: Path) -> None:
    """uv installs the project without dependencies, where pip has installed them."""
    uv = [installers.path / "bin" / "uv", "pip"]
    options = ["--quiet", "--python", fresh.python, "--no-deps", "--reinstall-package", "adapt-recipes"]
    for name, install in (("wheel", [wheel]), ("editable", ["--editable", ROOT])):
        installers.run(*uv, "install", *options, *install, cwd=tmp_path)
        check_installation(fresh, tmp_path / name)
    installers.run(*uv, "check", "--python", fresh.python, cwd=tmp_path)


@pytest.mark.network
@pytest.mark.parametrize("installer", ["uv", "pipx"])
def test_a_tool_has_our_own_command(
    installers: Environment, wheel: Path, wheels: Path, tmp_path: Path, installer: str
) -> None:
    """In an environment of its own, of which only the commands of the package itself are in the folder of commands."""
    commands = tmp_path / "bin"
    installers.variables |= {
        "UV_TOOL_DIR": str(tmp_path / "venvs"),
        "UV_TOOL_BIN_DIR": str(commands),
        "UV_CACHE_DIR": str(tmp_path / "cache"),
        "PIPX_HOME": str(tmp_path),
        "PIPX_BIN_DIR": str(commands),
        "PIPX_MAN_DIR": str(tmp_path / "man"),
    }
    options = ["--no-index", "--find-links", wheels] if installer == "uv" else []
    install = [*(["tool"] if installer == "uv" else []), "install", "--python", sys.executable, *options, wheel]
    installers.run(installers.path / "bin" / installer, *install, cwd=tmp_path)
    assert [path.name for path in commands.iterdir()] == ["adapt-recipes"]
    tool = Environment(tmp_path / "venvs" / "adapt-recipes")
    tool.tune = commands / "adapt-recipes"
    check_installation(tool, tmp_path / "empty")


def test_a_thread_that_joins_itself_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun's timer does when its thread is the last to hold it."""
    monkeypatch.setattr(sys, "unraisablehook", cli._ignore_join_of_itself)

    def delete_what_joins_this_thread() -> None:
        weakref.finalize(lambda: None, threading.current_thread().join)

    thread = threading.Thread(target=delete_what_joins_this_thread)
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""

    def fail() -> None:
        raise RuntimeError("another error")

    weakref.finalize(lambda: None, fail)
    assert "RuntimeError: another error" in capsys.readouterr().err
