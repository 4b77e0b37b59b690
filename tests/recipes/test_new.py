"""``tune new``: what it writes for each form of tasks, what it refuses, and that the config trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from standins import CHATML, write_natural_instructions, write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_recipes import shipped
from adapt_recipes.planning import new, write_config
from adapt_recipes.strict import load

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def write_model(folder: Path, *, chat_template: str | None = CHATML, max_position_embeddings: int = 512) -> Path:
    vocab_size = write_tokenizer(folder, chat_template=chat_template)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=max_position_embeddings, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(name: str, number: int, *, long: int = 0) -> list[dict[str, str]]:
    """Of Alpaca; the first ``long`` ones are longer."""
    return [
        {"instruction": f"{name} {i} " + "x" * (200 if i < long else 3), "input": "", "output": f"answer {i}"}
        for i in range(number)
    ]


def write_rows(file: Path, *args: Any, **keys: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(*args, **keys)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_model(tmp_path / "model")
    write_rows(tmp_path / "tasks" / "a.jsonl", "a", 200)
    write_rows(tmp_path / "tasks" / "b.jsonl", "b", 900)
    return tmp_path


def write(name: str = "mine", tasks: str = "tasks", model: str = "model", **keys: Any) -> dict[str, Any]:
    """Writes a config; what is in the file, which is what its plan is of."""
    arguments: dict[str, Any] = {
        "column": None,
        "template": shipped.bundle() / "yaml" / "vicuna.jinja",
        "load": lambda recipe, path: load(shipped.schema(shipped.recipe_file(recipe)), str(path), []),
    }
    file, config, plan = write_config(name, tasks=tasks, model=model, **arguments | keys)
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    assert file == Path("mine.yaml") and config.budget.fraction == content["budget"]["fraction"]
    assert list(plan.tasks) and content["recipe"] == config.recipe
    assert plan.memory_bytes.total <= new._memory() or config.activation_checkpointing
    return content


def test_a_folder_of_files(folder: Path) -> None:
    """1,100 examples are fewer than 200 steps of 16: all of them are the budget, in smaller steps; tasks may repeat."""
    content = write()
    assert content["recipe"] == "adapt_full_finetune" and content["output_dir"] == "runs/mine"
    assert content["tasks"] == {
        "_component_": "adapt_recipes.data.jsonl_tasks",
        "path": "tasks",
        "validation_examples": 20,
        "test_examples": 20,
        "max_epochs_per_task": 4,
    }
    assert content["budget"] == {"fraction": 1.0} and content["max_seq_len"] == 64
    assert content["mixture"]["losses"] == "validation" and content["probe"] == {"examples": 16}
    assert content["batch_size"] == 6 and "batch_tokens" not in content


def test_much_data_is_read_once(folder: Path) -> None:
    """A budget of 200 steps of 16 examples, out of 12,200."""
    write_rows(folder / "tasks" / "c.jsonl", "c", 11_100)
    content = write()
    assert content["budget"] == {"fraction": 0.27} and content["tasks"]["max_epochs_per_task"] == 1
    assert content["mixture"]["losses"] == "train" and "probe" not in content
    assert content["batch_tokens"] > 16 and "batch_size" not in content
    assert content["mixture_update_every"] == 4 and content["validate_every"] == 41


@pytest.mark.parametrize(
    ("long", "max_seq_len", "comment"), [(0, 64, "none is"), (5, 64, "the 5 longest are"), (50, 256, "none is")]
)
def test_the_longest_examples(folder: Path, long: int, max_seq_len: int, comment: str) -> None:
    """Few long ones are dropped, and the file says how many; many are not."""
    write_rows(folder / "tasks" / "b.jsonl", "b", 900, long=long)
    assert write()["max_seq_len"] == max_seq_len
    assert f"{comment} dropped." in Path("mine.yaml").read_text()


def test_natural_instructions(folder: Path) -> None:
    write_natural_instructions(folder / "ni", ["Summarization", "Dialogue"], num_examples=100)
    assert write(tasks="ni")["tasks"]["_component_"] == "adapt_recipes.data.natural_instructions"


def test_a_column_of_a_saved_dataset(folder: Path) -> None:
    kinds = [row | {"kind": row["instruction"][0]} for row in [*rows("a", 90), *rows("b", 90)]]
    datasets.Dataset.from_list(kinds).save_to_disk(folder / "saved")
    assert write(tasks="saved")["recipe"] == "sft_full_finetune"
    Path("mine.yaml").unlink()
    tasks = write(tasks="saved", column="kind")["tasks"]
    assert tasks["_component_"] == "adapt_recipes.data.hf_tasks" and tasks["task_per"] == "column"


def test_one_task_has_nothing_to_mix(folder: Path) -> None:
    content = write(tasks="tasks/b.jsonl")
    assert content["recipe"] == "sft_full_finetune" and content["mixture"] == {
        "_component_": "adapt_recipes.mixture.uniform"
    }
    assert "probe" not in content and "mixture_update_every" not in content


def test_what_the_rows_need(folder: Path) -> None:
    """Bad rows, a template without a system role, and a task that is too small are each a line with its reason."""
    write_model(folder / "strict", chat_template=NO_SYSTEM)
    with open(folder / "tasks" / "a.jsonl", "a") as file:
        file.write('{"instruction": "no answer"}\n')
    write_rows(folder / "tasks" / "few.jsonl", "few", 20)
    tasks = write(model="strict")["tasks"]
    assert (tasks["system"], tasks["on_bad_rows"], tasks["no_validation"]) == ("merge_into_user", "skip", ["few"])
    assert "  # Left out: tasks/a.jsonl, line 201: " in Path("mine.yaml").read_text()


def test_a_base_model_gets_a_template(folder: Path) -> None:
    write_model(folder / "base", chat_template=None)
    assert write(model="base")["tokenizer"]["chat_template"] == "mine.jinja"
    assert "USER: " in Path("mine.jinja").read_text()


def test_micro_batches_fit_into_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As large as the memory allows; where the smallest does not fit, activations are computed again."""
    write_rows(folder / "tasks" / "c.jsonl", "c", 11_100)
    assert write()["micro_batch_tokens"] == new.Draft.micro_batch_tokens
    memory = 2_000_000
    monkeypatch.setattr(new, "_memory", lambda: memory)
    Path("mine.yaml").unlink()
    fitted = write()
    assert 64 < fitted["micro_batch_tokens"] < new.Draft.micro_batch_tokens and "activation_checkpointing" not in fitted
    monkeypatch.setattr(new, "_memory", lambda: 100_000)
    Path("mine.yaml").unlink()
    assert "a run would need" not in capsys.readouterr().err
    least = write()
    assert "warning: a run would need 0.0 GB, more than the 0.0 that it may take here" in capsys.readouterr().err
    assert least["micro_batch_tokens"] == least["max_seq_len"] and least["activation_checkpointing"]


def test_the_mixture_of_a_pilot(folder: Path) -> None:
    content = write(pilot=lambda config, plan: "proportional")
    assert content["recipe"] == "sft_full_finetune" and content["mixture"]["_component_"].endswith(".proportional")
    assert "# The best of four by a pilot" in Path("mine.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "nowhere"}, "--model: config.json: there is no folder nowhere"),
        ({"tasks": "nowhere"}, "no folder nowhere"),
        ({"tasks": "bad"}, "bad/a.jsonl, line 1: fits no format"),
        ({"name": "old"}, "old.yaml exists"),
    ],
)
def test_refused_in_one_line_and_nothing_written(folder: Path, arguments: dict[str, str], error: str) -> None:
    (folder / "bad").mkdir()
    (folder / "bad" / "a.jsonl").write_text('{"text": "x"}\n')
    (folder / "old.yaml").write_text("seed: 1\n")
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match=error.replace(".", r"\.")) as raised:
        write(**arguments)
    assert "\n" not in str(raised.value) and (folder / "old.yaml").read_text() == "seed: 1\n"
    assert {path.name for path in folder.iterdir()} - {"cache"} == before


@pytest.mark.slow
def test_the_command_and_the_run(folder: Path) -> None:
    """Paths with spaces and other letters; the config trains as it is."""
    (folder / "tasks").rename(folder / "meine Aufgaben ü")
    command = [sys.executable, "-m", "tune_cli_ext"]
    made = subprocess.run(
        [*command, "new", "mine", "--tasks", "meine Aufgaben ü", "--model", "model"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-2:] == ["mine.yaml", "tune run adapt_full_finetune --config mine.yaml"]
    words = ["run", "adapt_full_finetune", "--config", "mine.yaml", "budget.fraction=0.1", "device=cpu"]
    ran = subprocess.run([*command, *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert torch.isfinite(torch.tensor(json.loads(Path("runs/mine/summary.json").read_text())["test_losses"]["a"]))
    again = subprocess.run(
        [*command, "new", "mine", "--tasks", "meine Aufgaben ü", "--model", "model"], capture_output=True, text=True
    )
    assert (
        again.returncode == 2 and again.stderr == "tune new: error: mine.yaml exists: remove it, or take another name\n"
    )
