"""The grid of configs is what its script writes, spends what it says on mixture updates, and runs to its end."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, Run, Runner
from standins import write_natural_instructions, write_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adapt_recipes import data
from adapt_recipes.config import load

SCRIPT = ROOT / "yaml" / "write_grid.py"
MODULE = runpy.run_path(str(SCRIPT))  # by path, for the folder is no package
WRITTEN: dict[str, str] = MODULE["configs"]()
GRID = [name.removesuffix(".yaml") for name in WRITTEN]
CONFIGS = {name: yaml.safe_load(content) for name, content in zip(GRID, WRITTEN.values(), strict=True)}
TYPES = CONFIGS[GRID[0]]["tasks"]["types"]


class Kind(NamedTuple):
    """A tiny model of a kind: what overrides give of it to our builder, and what transformers is given."""

    builder: str
    sizes: dict[str, Any]
    model_class: Any
    config_class: Any
    config: dict[str, Any]


SIZES = {"vocab_size": 304, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}
CONFIG = {
    "vocab_size": 304,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "tie_word_embeddings": True,
}
KINDS = {
    "gemma3_1b": Kind(
        "adapt_recipes.models.gemma3",
        {"head_dim": 16, "sliding_window": 24, "sliding_window_pattern": 2},
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "llama3_2_1b": Kind(
        "torchtune.models.llama3_2.llama3_2",
        {"max_seq_len": 256, "rope_base": 500_000, "scale_factor": 32},
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen3_0_6b": Kind(
        "adapt_recipes.models.qwen3",
        {"head_dim": 16, "tie_word_embeddings": "true"},
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
}
OTHERS = {  # models that no config names yet
    "qwen1_5_0_5b": Kind(
        "torchtune.models.qwen2.qwen2",
        {"max_seq_len": 256, "norm_eps": 1e-6, "rope_base": 1_000_000, "tie_word_embeddings": "true"},
        Qwen2ForCausalLM,
        Qwen2Config,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "gemma_2b": Kind(
        "torchtune.models.gemma.gemma",
        {"max_seq_len": 256, "head_dim": 16},
        GemmaForCausalLM,
        GemmaConfig,
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "llama3_8b": Kind(
        "torchtune.models.llama3.llama3",
        {"max_seq_len": 256, "rope_base": 500_000},
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
}


def model_of(config: str) -> str:
    return next(model for model in KINDS if config.startswith(model))


# ---- the files


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    """Else: python yaml/write_grid.py. A file that it no longer writes is to be removed by hand."""
    shipped = {path.name: path.read_text() for path in (ROOT / "yaml").glob("*.yaml")}
    assert {name: shipped.get(name) for name in WRITTEN} == WRITTEN
    assert {name for name in shipped if not name.startswith(("tiny_", "smollm2_"))} == set(WRITTEN)
    shutil.copy(SCRIPT, tmp_path)
    runpy.run_path(str(tmp_path / SCRIPT.name), run_name="__main__")
    assert {path.name: path.read_text() for path in tmp_path.glob("*.yaml")} == WRITTEN


def test_it_is_models_by_strategies_by_budgets() -> None:
    strategies = ("adapt", "adapt_planned", "uniform", "proportional")
    assert set(GRID) == {f"{m}_{s}_{percent}pct" for m in KINDS for s in strategies for percent in (1, 5, 10)}
    assert len(TYPES) == len(set(TYPES)) == 20


def test_configs_differ_in_nothing_but_what_their_names_say() -> None:
    """A comparison of strategies compares nothing else."""

    def rest(config: str, *keys: str) -> dict[str, Any]:
        return {key: value for key, value in CONFIGS[config].items() if key not in ("output_dir", *keys)}

    of_strategy = ("strategy", "mixture", "mixture_update_every", "probe")
    for config in GRID:
        model, percent = model_of(config), config.rpartition("_")[2]
        strategy = config[len(model) + 1 : -len(percent) - 1]
        assert rest(config, *of_strategy) == rest(f"{model}_uniform_{percent}", *of_strategy)
        of_model = ("model", "tokenizer", "checkpointer")
        assert rest(config, *of_model) == rest(f"gemma3_1b_{strategy}_{percent}", *of_model)
        of_budget = ("budget", "checkpoint_every", "validate_every", "mixture_update_every", "probe")
        assert rest(config, *of_budget) == rest(f"{model}_{strategy}_1pct", *of_budget)


@pytest.mark.parametrize("config", [config for config in GRID if "adapt" in config])
def test_updates_are_many_and_cost_little(config: str) -> None:
    """At most 5 % of the time by passes over examples, and 8 in the shortest run."""
    values, text = CONFIGS[config], WRITTEN[f"{config}.yaml"]
    update_every, examples = values["mixture_update_every"], len(values["tasks"]["types"]) * values["probe"]["examples"]
    forward, gradient = 1, 3
    one_step = values["strategy"] == "adapt"  # losses, their gradient, and losses on both sides of the weights
    update = examples * (forward + gradient + 2 * forward if one_step else forward)
    steps = update_every * values["batch_size"] * gradient
    assert update / (update + steps) <= 0.05
    assert f" {100 * update / (update + steps):.1f} % of the time" in text
    assert values["probe"]["examples"] <= values["tasks"]["validation_examples"]
    length, updates = map(int, re.search(r"some ([\d,]+) steps and (\d+) mix", text.replace(",", "")).groups())
    assert updates >= 8 and updates == pytest.approx(length / update_every, abs=1)


@pytest.mark.parametrize("model", KINDS)
def test_memory_is_reckoned_with_the_real_sizes(model: str, adapt_full_finetune: ModuleType) -> None:
    config = load(adapt_full_finetune.Config, ROOT / "yaml" / f"{model}_adapt_1pct.yaml")
    with torch.device("meta"):
        decoder = config.model.build()
    reckoned = MODULE["ADAPT"].models[model]
    assert reckoned.parameters == sum(parameter.numel() for parameter in decoder.parameters())
    assert reckoned.vocab_size == decoder.tok_embeddings.num_embeddings
    assert reckoned.activation_bytes % len(decoder.layers) == 0
    states = 16 * reckoned.parameters / 1e9  # weights, gradients and AdamW, in fp32
    assert states < reckoned.gigabytes(activation_checkpointing=True) < reckoned.gigabytes() < 3 * states
    assert f"# Memory: {reckoned.gigabytes()} GB on one GPU" in WRITTEN[f"{model}_adapt_1pct.yaml"]


# ---- runs


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/ and data/ as the headers' commands make them, tiny. Weights are large, so that a wrong one shows."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    for name, kind in (KINDS | OTHERS).items():
        path = folder / downloaded(name)
        write_tokenizer(path)
        model = kind.model_class(kind.config_class(**CONFIG | kind.config))
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.4).add_(1.0 if parameter.ndim == 1 and "gemma" not in name else 0.0)
        model.save_pretrained(path)
    write_natural_instructions(folder / "data" / "natural-instructions", [*TYPES, "Another"], num_examples=34)
    return folder


def downloaded(model: str) -> str:
    """Where a config looks for its model."""
    return CONFIGS[f"{model}_uniform_1pct"]["checkpointer"]["checkpoint_dir"] if model in KINDS else f"models/{model}"


def tiny(config: str, hub: Path, *, model: str | None = None) -> list[str]:
    """Overrides that put in the tiny model, and make some five steps of the shipped share of the tiny data.

    ``model``: None for the config's own.
    """
    for name in ("models", "data"):
        Path(name).symlink_to(hub / name)
    model, batch_size = model or model_of(config), round(200 * CONFIGS[config]["budget"]["fraction"])
    kind = (KINDS | OTHERS)[model]
    folder = downloaded(model)
    overrides = [f"model={kind.builder}", *(f"model.{key}={value}" for key, value in (SIZES | kind.sizes).items())]
    overrides += [f"tokenizer.path={folder}", f"checkpointer.checkpoint_dir={folder}"] if model in OTHERS else []
    overrides += ["device=cpu", "max_seq_len=256", "tasks.validation_examples=2", f"batch_size={batch_size}"]
    return overrides + (["mixture_update_every=2", "probe.examples=2"] if "adapt" in config else [])


@pytest.fixture
def recipes(adapt_full_finetune: ModuleType, sft_full_finetune: ModuleType) -> dict[str, ModuleType]:
    return {"adapt_full_finetune": adapt_full_finetune, "sft_full_finetune": sft_full_finetune}


def tasks_of(done: Run, recipe: ModuleType) -> list[data.Task]:
    """The tasks of a run, as its ``resolved.yaml`` gives them."""
    config = load(recipe.Config, done.folder / "resolved.yaml")
    return data.load_tasks(config.tasks, tokenizer=config.tokenizer.build(), max_seq_len=config.max_seq_len)


@pytest.mark.parametrize("config", GRID)
def test_runs(run: Runner, recipes: dict[str, ModuleType], hub: Path, config: str) -> None:
    fraction = CONFIGS[config]["budget"]["fraction"]
    done = run(config, *tiny(config, hub), f"budget.fraction={fraction}")
    tasks, summary = tasks_of(done, recipes[WRITTEN[f"{config}.yaml"].split()[3]]), done.summary
    sizes = {task.name: int(task.train.num_supervised.sum()) for task in tasks}
    assert summary["strategy"] == CONFIGS[config]["strategy"] and list(sizes) == TYPES
    assert summary["supervised_tokens"] == summary["budget_tokens"] == round(fraction * sum(sizes.values()))
    assert summary["steps"] >= 4
    assert summary["mixture_updates"] == ((summary["steps"] - 1) // 2 if "adapt" in config else 0)
    if "adapt" not in config:
        shares = {name: 1 / 20 if "uniform" in config else size / sum(sizes.values()) for name, size in sizes.items()}
        assert summary["probabilities"] == pytest.approx(shares)
    assert summary["validation_losses"] != summary["initial_validation_losses"]
    # To what bf16 loses with such weights.
    assert losses_in_transformers(done.folder / "model", tasks) == pytest.approx(summary["validation_losses"], rel=0.05)


@pytest.mark.parametrize("model", [*KINDS, *OTHERS])
def test_the_model_folder_computes_what_was_trained(
    run: Runner, recipes: dict[str, ModuleType], hub: Path, model: str
) -> None:
    config = f"{model}_adapt_1pct" if model in KINDS else "gemma3_1b_adapt_1pct"
    done = run(config, *tiny(config, hub, model=model), "budget.tokens=20", "dtype=fp32", "optimizer.lr=1e-2")
    losses, initial = done.summary["validation_losses"], done.summary["initial_validation_losses"]
    assert all(abs(losses[name] - initial[name]) > 0.01 for name in TYPES)
    tasks = tasks_of(done, recipes["adapt_full_finetune"])
    assert losses_in_transformers(done.folder / "model", tasks) == pytest.approx(losses, rel=1e-4)
    assert losses_in_transformers(hub / downloaded(model), tasks) == pytest.approx(initial, rel=1e-4)


def test_the_literal_command(hub: Path) -> None:
    """What the header says, in a process of its own; at its end lies a model that transformers loads."""
    config = "gemma3_1b_adapt_1pct"
    command = WRITTEN[f"{config}.yaml"].splitlines()[0].removeprefix("# tune ").split()
    done = subprocess.run(
        [sys.executable, "-m", "tune_cli_ext", *command, *tiny(config, hub), "log_every=0"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    model = AutoModelForCausalLM.from_pretrained(f"runs/{config}/model")
    tokenizer = AutoTokenizer.from_pretrained(f"runs/{config}/model")
    assert type(model) is Gemma3ForCausalLM
    message = [{"role": "user", "content": "Answer.\n\nyes or no?"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def losses_in_transformers(folder: Path, tasks: list[data.Task]) -> dict[str, float]:
    """Each task's validation loss with the model in a folder, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    examples = data.validation_examples(tasks)
    sums = torch.zeros(2, len(tasks), dtype=torch.float64)
    for batch in data.micro_batches([each for _, each in examples], [task for task, _ in examples], max_tokens=4096):
        with torch.no_grad():
            logits = model(batch.tokens).logits[batch.labels != data.IGNORE_INDEX]
        losses = F.cross_entropy(logits, batch.labels[batch.labels != data.IGNORE_INDEX], reduction="none")
        sums[0].index_add_(0, batch.supervised_tasks, losses.double())
        sums[1].index_add_(0, batch.supervised_tasks, torch.ones_like(losses, dtype=torch.float64))
    return dict(zip([task.name for task in tasks], (sums[0] / sums[1]).tolist(), strict=True))
