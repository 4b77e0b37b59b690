"""What a run saves: its dtype, the losses of what was saved, a warning of what rounding lost; and a second try."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from running import Runs, assert_same_run, before, events, files, said, summary
from safetensors.torch import load_file
from tiers import slow_but
from transformers import AutoModelForCausalLM

from adapt_recipes import data, models
from adapt_recipes.models import TokenLosses
from adapt_recipes.run import rounding_warning

ONE_OF_EACH_RECIPE = ["uniform", "adapt", "mos_diff"]
MEASURED = ["a", "b", "c"]
# No step of it changes a weight of size 0.1 by half of bf16's distance there.
SMALL = {"optimizer.lr": 1e-5}
LORA = {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "lora_rank": 2, "lora_alpha": 4}
Changes = dict[str, Any]


@pytest.fixture(scope="module")
def base(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in bf16, for the model of the tiny configs."""
    folder = tmp_path_factory.mktemp("base") / "base"
    config = runs.config("uniform", folder)
    torch.manual_seed(0)
    decoder = config.model.build()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    models.HuggingFaceCheckpointer(None, "bf16").save(
        decoder.state_dict(), folder, config=models.huggingface_config(decoder), tokenizer=config.tokenizer.build()
    )
    return folder


@pytest.fixture(scope="module")
def small(base: Path) -> Changes:
    """Small steps from the folder, in fp32, and a test split."""
    return {"checkpointer.checkpoint_dir": base, "tasks.test_examples": 3, **SMALL}


def lora(base: Path) -> Changes:
    decoder = {"_component_": "adapt_recipes.models.decoder_from_folder", "path": str(base), "max_seq_len": 16}
    model = {"_component_": "adapt_recipes.models.with_lora", "decoder": decoder, **LORA}
    return {"model": json.dumps(model), "checkpointer.checkpoint_dir": base, "optimizer.lr": 1e-4}


@pytest.fixture
def without_dropout(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(runs.settings, "model.attn_dropout")


def losses_by_transformers(folder: Path, tasks: list[data.Task], split: str) -> dict[str, Any]:
    """Of the folder, in fp32, one example at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    measured: dict[str, Any] = {}
    for task in tasks:
        examples, losses = getattr(task, split), []
        for k in range(0 if examples is None else len(examples)):
            tokens, labels = examples.example(k)
            with torch.no_grad():
                logits = model(tokens[None]).logits[0]
            kept = labels != data.IGNORE_INDEX
            losses.append(F.cross_entropy(logits[kept], labels[kept], reduction="none"))
        measured[task.name] = pytest.approx(float(torch.cat(losses).double().mean()), abs=2e-6) if losses else None
    return measured


def tasks_of(runs: Runs, changes: Changes) -> list[data.Task]:
    config = runs.config("uniform", Path("unused"), **changes)
    return data.build_tasks(config.tasks, config.tokenizer, max_seq_len=config.max_seq_len)[1]


def notes(folder: Path) -> list[str]:
    return [event["text"] for event in events(folder) if event["event"] == "note"]


def mean(losses: dict[str, float]) -> float:
    return sum(losses[task] for task in MEASURED) / len(MEASURED)


# ---- what was saved is measured


@pytest.mark.parametrize("strategy", slow_but(["uniform"], ONE_OF_EACH_RECIPE))
def test_the_losses_of_a_rounded_model_are_those_of_its_folder(runs: Runs, small: Changes, strategy: str) -> None:
    folder, exact = runs.whole(strategy, **small), runs.whole(strategy, **small, **{"checkpointer.save_dtype": "fp32"})
    done, tasks = summary(folder), tasks_of(runs, small)
    assert done["saved_validation_losses"] == losses_by_transformers(folder / "model", tasks, "validation")
    assert done["test_losses"] == losses_by_transformers(folder / "model", tasks, "test")
    assert mean(done["saved_validation_losses"]) > done["mean_validation_loss"] + 1e-3
    # Those of validation are of the trained weights, as they are in the folder of the other.
    assert done["validation_losses"] == losses_by_transformers(exact / "model", tasks, "validation")
    assert done["validation_losses"] == summary(exact)["validation_losses"]


@pytest.mark.parametrize("strategy", slow_but(["uniform"], ONE_OF_EACH_RECIPE))
def test_nothing_is_measured_where_nothing_was_rounded(runs: Runs, small: Changes, strategy: str) -> None:
    """The second validation is the only difference in what is read."""
    small = {key: value for key, value in small.items() if key != "tasks.test_examples"}
    validation = sum(
        int((example.labels != data.IGNORE_INDEX).sum())
        for _, example in data.validation_examples(tasks_of(runs, small))
    )
    read, late = {}, {}
    forward, over = TokenLosses.forward, []

    def counted(*arguments: Any) -> Any:
        late[save_dtype] += len(over)
        return forward(*arguments)

    for save_dtype in ("stored", "fp32"):
        folder = Path(f"{save_dtype}")
        over.clear()
        late[save_dtype] = 0
        with mock.patch.object(TokenLosses, "forward", counted), before(strategy, "finish", lambda: over.append(1)):
            assert runs.run(strategy, folder, **small, **{"checkpointer.save_dtype": save_dtype}) == 0
        read[save_dtype] = summary(folder)["validation_tokens"]
    assert late["fp32"] == 0 < late["stored"]
    assert read["stored"] == read["fp32"] + validation
    done = summary(Path("fp32"))
    assert done["saved_validation_losses"] == done["validation_losses"]
    assert not notes(Path("fp32")) and not [e for e in events(Path("fp32")) if e["event"] == "saved_validation"]


def test_the_log_has_it_once_with_a_warning(
    runs: Runs, tmp_path: Path, small: Changes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.run("uniform", tmp_path / "run", **small) == 0
    done = summary(tmp_path / "run")
    names = [event["event"] for event in events(tmp_path / "run")]
    assert names[-5:] == ["checkpoint", "saved_validation", "note", "test", "end"]
    spent = {"step": done["steps"], "supervised_tokens": done["supervised_tokens"]}
    saved = {"event": "saved_validation", **spent, "losses": done["saved_validation_losses"]}
    line = events(tmp_path / "run")[-4]
    assert line | saved == line
    assert 0 < line["validation_tokens"] < done["validation_tokens"], "the test comes later"
    initial, trained = mean(done["initial_validation_losses"]), done["mean_validation_loss"]
    rounded = mean(done["saved_validation_losses"])
    (text,) = notes(tmp_path / "run")
    assert text == (
        f"saving rounded the weights: mean validation loss {rounded:.4f} in model/, {trained:.4f} as trained "
        f"({(rounded - trained) / (initial - trained):.0%} of the gain lost); "
        "checkpointer.save_dtype=fp32 keeps it: remove model/ and run again with resume=true"
    )
    assert capsys.readouterr().err.count(f"warning: {text}\n") == 1


@pytest.mark.parametrize(
    ("initial", "trained", "saved", "share"),
    [
        (2.0, 1.0, 1.5, " (50% of the gain lost)"),
        (2.0, 1.0, 1.011, " (1% of the gain lost)"),
        (2.0, 1.0, 1.009, None),
        (2.0, 1.0, 0.5, None),
        (1.0005, 1.0, 1.0002, " (40% of the gain lost)"),
        # What four digits do not show.
        (1.0001, 1.0, 1.00009, None),
        (2.0, 1.0, 4.0, " (300% of the gain lost)"),
        # There was no gain.
        (1.0, 2.0, 2.1, ""),
        (1.0, 2.0, 2.00009, None),
    ],
)
def test_when_there_is_a_warning(initial: float, trained: float, saved: float, share: str | None) -> None:
    for cause, advice in (
        ("saving", "; checkpointer.save_dtype=fp32 keeps it"),
        ("merging the adapters", "; adapter/ has them as trained"),
    ):
        text = rounding_warning(initial, trained, saved, has_adapters=cause != "saving")
        assert (text is None) == (share is None)
        if text is not None:
            assert text.startswith(f"{cause} rounded the weights: ")
            assert f"in model/, {trained:.4f} as trained{share}{advice}" in text


@pytest.mark.parametrize("dtype", slow_but(["fp32"], ["fp32", "bf16", "pure_bf16"]))
def test_adapters_are_measured_merged(
    runs: Runs, base: Path, tmp_path: Path, without_dropout: None, dtype: str
) -> None:
    """In fp32 the folder's losses; merged and computed in bf16 also an adapter saved in fp32 is rounded."""
    changes = lora(base) | {"dtype": dtype}
    tasks = tasks_of(runs, changes)
    for save_dtype in ("stored", "fp32"):
        folder = tmp_path / save_dtype
        assert runs.run("uniform", folder, **changes, **{"checkpointer.save_dtype": save_dtype}) == 0
        done = summary(folder)
        assert done["saved_validation_losses"] != done["validation_losses"]
        if dtype == "fp32":
            assert done["saved_validation_losses"] == losses_by_transformers(folder / "model", tasks, "validation")
            lost = mean(done["saved_validation_losses"]) - done["mean_validation_loss"]
            assert abs(lost) < 1e-5 if save_dtype == "fp32" else lost > 1e-4
            assert bool(notes(folder)) == (save_dtype == "stored")
    assert notes(tmp_path / "stored")[0].startswith("merging the adapters rounded the weights: mean validation loss ")
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("stored", "fp32")]
    assert all(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())
    assert any(weight.any() for name, weight in adapters[0].items() if "lora_B" in name)


@pytest.mark.parametrize("with_adapters", slow_but([False], [False, True]))
def test_two_processes_measure_the_same(
    runs: Runs, base: Path, small: Changes, tmp_path: Path, without_dropout: None, with_adapters: bool
) -> None:
    changes = lora(base) if with_adapters else small
    assert runs.finish_group("uniform", tmp_path / "run", **changes) == [0, 0]
    assert runs.run("uniform", tmp_path / "alone", **changes) == 0
    both, alone = (summary(tmp_path / name) for name in ("run", "alone"))
    assert both["validation_tokens"] == alone["validation_tokens"] > 0
    lost = [mean(done["saved_validation_losses"]) - done["mean_validation_loss"] for done in (both, alone)]
    # Weights that differ in their last bits may be rounded apart.
    assert min(lost) > 1e-4 and lost[0] == pytest.approx(lost[1], rel=0.3)
    expected = losses_by_transformers(tmp_path / "run" / "model", tasks_of(runs, changes), "validation")
    assert both["saved_validation_losses"] == expected
    assert said(tmp_path / "run", ".0.err").count(" rounded the weights: ") == 1
    assert "rounded the weights" not in said(tmp_path / "run", ".1.err")


# ---- stopped, resumed and written again


@pytest.mark.parametrize("strategy", slow_but(["adapt"], ONE_OF_EACH_RECIPE))
def test_a_run_that_is_stopped_at_any_moment_has_the_same_summary(
    runs: Runs, small: Changes, tmp_path: Path, strategy: str
) -> None:
    """From the last step to the summary, one after the other."""
    for method in ("finish", "test", "log_test", "finished"):
        runs.stop(strategy, tmp_path / "run", method=method, **small)
    assert runs.run(strategy, tmp_path / "run", **small) == 0
    assert_same_run(tmp_path / "run", runs.whole(strategy, **small))


@pytest.mark.parametrize("save_dtype", slow_but(["fp32"], ["stored", "fp32", "fp16"]))
def test_a_model_that_is_gone_is_written_again_in_another_dtype(
    runs: Runs, small: Changes, tmp_path: Path, save_dtype: str
) -> None:
    """As if the run had been started with it."""
    changes = small | {"checkpointer.save_dtype": save_dtype}
    shutil.copytree(runs.whole("uniform", **small), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert runs.run("uniform", tmp_path / "run", **changes) == 0
    assert_same_run(tmp_path / "run", runs.whole("uniform", **changes))
    dtype = {"stored": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[save_dtype]
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}


def test_a_finished_run_is_the_same_run_with_another_dtype(
    runs: Runs, small: Changes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing changes, and it says what would."""
    folder = tmp_path / "run"
    shutil.copytree(runs.whole("uniform", **small), folder)
    written = files(folder)
    for changes, warning in (
        ({}, ""),
        ({"checkpointer.save_dtype": "fp32"}, "checkpointer.save_dtype changed: remove model/ first"),
    ):
        capsys.readouterr()
        assert runs.run("uniform", folder, **small, **changes) == 0
        output = capsys.readouterr()
        assert "is finished already" in output.out and files(folder) == written
        assert warning in output.err and bool(output.err) == bool(warning)


def test_an_unknown_dtype_is_refused(runs: Runs, small: Changes, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^checkpointer\.save_dtype: has to be 'stored', 'fp32', 'bf16' or 'fp16', not \"fp8\"\Z",
    ):
        runs.run("uniform", tmp_path / "run", **small, **{"checkpointer.save_dtype": "fp8"})
    assert not (tmp_path / "run").exists()
