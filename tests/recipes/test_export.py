"""`tune export`: any checkpoint of a run as the folders that the run itself writes when it ends there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Runs, files
from test_lora_runs import LORA, SIZES, base  # noqa: F401 (a fixture)
from tiers import slow_but
from transformers import AutoModelForCausalLM

from adapt_recipes import commands, models
from adapt_recipes.export import export
from adapt_recipes.training.checkpoint import Checkpoints
from adapt_recipes.words import CommandParser


def tune_export(*words: str | Path) -> None:
    """`tune export` with these words, in this process."""
    parser = CommandParser(prog="tune")
    commands.add_export(parser.add_subparsers())
    args = parser.parse_args(["export", *map(str, words)])
    args.func(args)


@pytest.fixture(scope="module")
def stopped(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in step 6; its checkpoints are from steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    runs.stop("uniform", folder, after=5, keep_checkpoints=2)
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def newest(run: Path) -> int:
    return max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


# ---- the folders of the run itself


@pytest.mark.parametrize("strategy", slow_but(["uniform"], ["uniform", "adapt_planned", "mos_diff"]))
def test_the_last_checkpoint_is_the_model(runs: Runs, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every recipe, file by file; nothing else in the run directory changes."""
    run = Path(shutil.copytree(runs.whole(strategy), "run"))
    run_before = files(run)
    capsys.readouterr()
    tune_export(run)
    out = run / f"exported_model_step_{newest(run)}"
    assert capsys.readouterr().out == f"{out}\n"
    assert files(out) == files(run / "model") and len(files(out)) > 3
    assert {name: text for name, text in files(run).items() if not name.startswith(f"{out.name}/")} == run_before


BASE: dict[str, Any] = {"model": json.dumps({"_component_": "torchtune.models.llama3_2.llama3_2"} | SIZES)}
SAVED: dict[str, dict[str, Any]] = {
    "stored": {},
    "save_dtype": {"checkpointer.save_dtype": "bf16"},
    "pure_bf16": {"dtype": "pure_bf16", "optimizer.lr": 0.03},
    "switches": {"activation_checkpointing": "true", "activation_offloading": "true", "loss_chunk_tokens": 3},
    "lora": {"model": json.dumps(LORA | SIZES)},
    "lora_bf16": {"model": json.dumps(LORA | SIZES), "checkpointer.save_dtype": "bf16", "dtype": "bf16"},
}


@pytest.mark.parametrize("name", slow_but(["save_dtype", "lora"], SAVED))
def test_of_a_base_model(tmp_path: Path, base: Path, name: str) -> None:  # noqa: F811
    """In the dtype of the run, with merged adapters and those for PEFT."""
    runs = Runs(tmp_path)
    del runs.settings["model.attn_dropout"]
    changes = BASE | {"checkpointer.checkpoint_dir": base, "budget.tokens": 60} | SAVED[name]
    assert runs.run("uniform", run := tmp_path / "run", **changes) == 0
    step = newest(run)
    written = export(run)
    lora = name.startswith("lora")
    assert written == [run / f"exported_model_step_{step}", *([run / f"exported_adapter_step_{step}"] if lora else [])]
    for own, exported in zip(("model", "adapter"), written, strict=False):
        assert files(exported) == files(run / own) and files(run / own)
    # A name without `model` has the adapters beside it, too.
    for exported, again in zip(written, export(run, out=tmp_path / "other"), strict=True):
        assert files(exported) == files(again)
    assert (tmp_path / "other_adapter").exists() == lora


def test_another_dtype_is_that_of_a_run_with_it(tmp_path: Path, base: Path) -> None:  # noqa: F811
    runs = Runs(tmp_path)
    del runs.settings["model.attn_dropout"]
    changes = BASE | {"checkpointer.checkpoint_dir": base, "budget.tokens": 30}
    assert runs.run("uniform", run := tmp_path / "run", **changes) == 0
    tune_export(run, "--dtype", "bf16", "--out", tmp_path / "exported")
    shutil.rmtree(run / "model")
    assert runs.run("uniform", run, **changes | {"checkpointer.save_dtype": "bf16"}) == 0
    assert files(tmp_path / "exported") == files(run / "model")


# ---- a run that was stopped


@pytest.mark.parametrize("step", [None, 2])
def test_transformers_computes_what_the_checkpoint_does(
    runs: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    """Logits of a run that died, to 1e-5; its data is gone, and so are the modules of its mixture."""
    text = (folder / "resolved.yaml").read_text()
    gone = text.replace(str(runs.tasks), "/gone").replace("adapt_recipes.mixture.uniform", "gone.mixture")
    assert gone.count("gone") == 2
    (folder / "resolved.yaml").write_text(gone)
    (written,) = export(folder, step=step)
    assert written == folder / f"exported_model_step_{step or 4}"

    config = runs.config("uniform", folder)
    model = models.build(config, (), device=torch.device("cpu"), checkpointer=config.checkpointer.build()).eval()
    Checkpoints(folder / "checkpoints", keep=2, asynchronous=False).load_weights(step or 4, model)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(written).eval()(tokens).logits
        ours = model.decoder(tokens)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert ours.std() > 0.1


def test_a_step_in_the_middle_is_the_model_of_a_run_that_ends_there(runs: Runs, tmp_path: Path) -> None:
    """The exported folder is that of ``model_best/``, which is written of a checkpoint after the run."""
    run = tmp_path / "run"
    assert runs.run("uniform", run, keep_best="worst", validate_every=2) == 0
    best = json.loads((run / "summary.json").read_text())["best_step"]
    assert files(export(run, step=best)[0]) == files(run / "model_best")


@pytest.mark.slow
def test_of_several_processes(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.finish_group("uniform", run, **{"budget.tokens": 60}) == [0, 0]
    assert files(export(run)[0]) == files(run / "model")


def test_a_checkpoint_that_was_just_replaced(folder: Path) -> None:
    """A kill between two renames leaves ``step_N.replaced``, which is whole."""
    (written,) = export(folder, step=4)
    (folder / "checkpoints" / "step_4").rename(folder / "checkpoints" / "step_4.replaced")
    assert files(export(folder, out=folder / "again")[0]) == files(written)


# ---- errors


def test_refused_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is written."""

    def refused(*words: str | Path) -> str:
        state = files(tmp_path)
        with pytest.raises(SystemExit) as caught:
            tune_export(*words)
        assert caught.value.code == 2 and files(tmp_path) == state
        captured = capsys.readouterr()
        assert not captured.out and captured.err.count("\n") == 1
        return captured.err.removeprefix("tune export: error: ").rstrip("\n")

    checkpoints = folder / "checkpoints"
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'} is no run directory"
    where = f"--step 3: there is no such checkpoint in {checkpoints}; there are steps 2, 4"
    assert refused(folder, "--step", "3") == where
    (tmp_path / "out").mkdir()
    there = f"--out: {tmp_path / 'out'} is there already; remove it, or choose another folder"
    assert refused(folder, "--out", tmp_path / "out") == there

    # Damage is named, and so is what else there is.
    with open(next((checkpoints / "step_4").glob("*.distcp")), "r+b") as file:
        file.write(b"damage")
    assert refused(folder).endswith("is not what was written); it cannot be loaded; there are steps 2, 4")
    (checkpoints / "step_4").rename(checkpoints / "step_4.partial")
    assert refused(folder, "--step", "4").endswith("; there is step 2")

    resolved = (folder / "resolved.yaml").rename(folder / "elsewhere.yaml")
    assert refused(folder) == f"there is no {folder / 'resolved.yaml'}, the config of the run"
    resolved.rename(folder / "resolved.yaml")
    shutil.rmtree(checkpoints)
    assert refused(folder) == f"there is no checkpoint in {checkpoints}"
    checkpoints.mkdir()
    (folder / "resolved.yaml").unlink()
    assert refused(folder) == f"{folder} is no run directory"


def test_what_the_model_is_built_from_is_gone(tmp_path: Path, base: Path) -> None:  # noqa: F811
    runs = Runs(tmp_path)
    del runs.settings["model.attn_dropout"]
    gone = Path(shutil.copytree(base, tmp_path / "gone"))
    changes = {"model": json.dumps(LORA | SIZES), "checkpointer.checkpoint_dir": gone, "budget.tokens": 30}
    assert runs.run("uniform", run := tmp_path / "run", **changes) == 0
    (run / f"exported_adapter_step_{newest(run)}").mkdir()
    with pytest.raises(ValueError, match=rf"^--out: {run}/exported_adapter_step_\d is there already; [^\n]*\Z"):
        export(run)
    shutil.rmtree(gone)
    with pytest.raises(ValueError, match=rf"^checkpointer\.checkpoint_dir: there is no folder {gone}; [^\n]*\Z"):
        export(run)
    assert not list(run.glob("exported_model_step_*"))
