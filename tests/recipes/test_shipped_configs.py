"""Every shipped config is what its name and its header say; those of SmolLM2 run on a tiny model and a few examples.

The configs of the grid run in ``test_grid.py``, the tiny ones in ``test_run_directory.py``.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Runner
from running import CONFIGS, learns, load_recipe, recipe_of
from standins import write_natural_instructions, write_tokenizer
from tiers import slow_but
from torchtune._cli.tune import TuneCLIParser
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapt_recipes.config import Component, load, to_dict
from adapt_recipes.data import IGNORE_INDEX, ChatTokenizer, Conversation
from adapt_recipes.mixture.interface import check_mixture
from adapt_recipes.signals.reward_interface import check_reward

PARAMETERS = {  # by the name of the model in the name of the config
    "tiny": 89_424,
    "smollm2_135m": 134_515_008,
    "gemma3_1b": 999_885_952,
    "llama3_2_1b": 1_235_814_400,
    "qwen3_0_6b": 596_049_920,
    "qwen1_5_0_5b": 463_987_712,
    "gemma_2b": 2_506_172_416,
    "llama3_8b": 8_030_261_248,
}
LEARNED = {
    "adapt": "Adapt",
    "adapt_forecast": "AdaptForecast",
    "adapt_ksteps": "AdaptKSteps",
    "adapt_oracle": "Adapt",
    "adapt_planned": "AdaptPlanned",
    "dro": "GroupDRO",
    "pike": "Pike",
    "grape": "Grape",
    "dynamix": "Dynamix",
    "dro_exponentiated": "GroupDRO",
    "dro_oracle": "GroupDRO",
    "dro_asymptote": "GroupDRO",
    "exp3": "Exp3",
    "ado": "Ado",
    "famo": "Famo",
    # It learns nothing, and is updated to switch.
    "staged": "Staged",
}
REWARDS = {
    "mos_cossim": "CosineSimilarity",
    "mos_diff": "PerplexityRatio",
    "mospec_cossim": "CosineSimilarity",
    "mospec_diff": "PerplexityRatio",
    "multidds": "GradientAlignment",
    "multiuat": "Uncertainty",
    "hbo": "GradientNorm",
}
STATIC = {name: name for name in ("uniform", "proportional", "temperature")}
STATIC |= {"fixed": "fixed_weights", "unimax": "uniform"}
REFERENCES = {"oracle": dict, "asymptote": str}  # the types of what losses are counted from, where the name says so
DATASETS = ["math", "medical", "dialogue", "nlp"]
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


NAME = re.compile(rf"({'|'.join(PARAMETERS)})_(.+?)(?:_(\d+)(pct|ep))?")
BUDGETS = {"1pct": "1 % of", "5pct": "5 % of", "10pct": "10 % of", "3ep": "three times"}


SMOLLM2_CONFIGS = [name for name in CONFIGS if name.startswith("smollm2_")]
# One of each recipe. A tiny config of each other strategy runs, too.
QUICK = [f"smollm2_135m_{strategy}_10pct" for strategy in ("adapt_planned", "mos_diff", "uniform")]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/ and data/ for the configs of SmolLM2: a model of 0.03M parameters, and a few examples."""
    home = tmp_path_factory.mktemp("smollm2")
    folder = home / "models" / "SmolLM2-135M-Instruct"
    vocab_size = write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_key_value_heads, config.tie_word_embeddings, config.max_position_embeddings = 2, True, 1024
    LlamaForCausalLM(config).save_pretrained(folder)
    types = (
        "Question Answering",
        "Sentiment Analysis",
        "Information Extraction",
        "Summarization",
        "Dialogue Generation",
    )
    write_natural_instructions(home / "data" / "natural-instructions", types, num_examples=80)
    return home


@pytest.fixture
def small(smollm2: Path, tmp_path: Path) -> list[str]:
    """Overrides for a run on what lies in ``smollm2``, which then lies in the current folder."""
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(smollm2 / name)
    return ["device=cpu", "max_seq_len=256", "tasks.validation_examples=8"]


@pytest.mark.parametrize("config", slow_but(QUICK, SMOLLM2_CONFIGS))
def test_runs(run: Runner, small: list[str], config: str) -> None:
    cadence = ["mixture_update_every=2"] if learns(CONFIGS[config]) else []
    done = run(config, "budget.tokens=140", *small, *cadence)
    assert done.summary["strategy"] in config and done.summary["supervised_tokens"] == 140
    assert done.summary["mixture_updates"] == ((done.summary["steps"] - 1) // 2 if cadence else 0)
    assert done.summary["computed_tokens"] < done.summary["tokens"], "no padding, and beginnings once"
    initial, final = done.summary["initial_validation_losses"], done.summary["validation_losses"]
    assert all(final[name] != initial[name] for name in final)

    # The folder answers in transformers.
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model").eval()
    theirs = AutoTokenizer.from_pretrained(done.folder / "model")
    ours = ChatTokenizer(done.folder / "model")
    messages = [{"role": "user", "content": "Answer.\n\nyes or no?"}, {"role": "assistant", "content": "yes"}]
    tokens, [(first, end)] = ours.encode(Conversation(messages, (1,)))
    assert theirs.apply_chat_template(messages, return_dict=False) == tokens
    labels = torch.full((1, len(tokens)), IGNORE_INDEX)
    labels[0, first:end] = torch.tensor(tokens[first:end])
    assert model(torch.tensor([tokens]), labels=labels).loss.isfinite()
    prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """Models and tasks by what configs say of them. Most configs share theirs."""
    return {}


def build_once(component: Component, built: dict[str, Any]) -> Any:
    key = f"{component.component} {component.arguments}"
    if key not in built:
        built[key] = component.build()
    return built[key]


@pytest.mark.parametrize("name", CONFIGS)
def test_its_name_tells_the_truth(name: str, tmp_path: Path, built: dict[str, Any], mos_datasets: Path) -> None:
    """All of it is built, the model without memory for its weights, on a few examples of each task."""
    parts = NAME.fullmatch(name)
    assert parts is not None
    model, strategy, number, unit = parts.groups()
    recipe = f"{'mos' if strategy in REWARDS else 'adapt' if strategy in LEARNED else 'sft'}_full_finetune"
    assert recipe_of(CONFIGS[name]) == recipe
    module = load_recipe(recipe)
    config = load(module.Config, CONFIGS[name])
    assert config.strategy == strategy
    assert config.output_dir == f"runs/{name}"
    component = "Scorer" if strategy in REWARDS else (LEARNED | STATIC)[strategy]
    assert config.mixture.component == f"adapt_recipes.mixture.{component}"
    reference = config.mixture.arguments.get("reference")
    assert type(reference) is REFERENCES.get(strategy.rpartition("_")[2], type(None))
    assert config.budget.fraction == (int(number) / 100 if unit == "pct" else None)
    assert config.budget.epochs == (int(number) if unit == "ep" else None)
    assert to_dict(config)["mixture"]["_component_"] == config.mixture.component

    if model == "smollm2_135m":
        Path(config.model.arguments["path"]).mkdir(parents=True)
        Path(config.model.arguments["path"], "config.json").write_text(json.dumps({"model_type": "llama"} | SMOLLM2))
    elif model != "tiny":
        assert config.model.component.rpartition(".")[2] == model
    with torch.device("meta"):
        decoder = build_once(config.model, built)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == PARAMETERS[model]
    assert decoder.max_seq_len >= config.max_seq_len
    optimizer = config.optimizer.build(params=decoder.parameters())
    assert optimizer.param_groups[0]["lr"] == config.optimizer.arguments["lr"]
    assert 0 < config.lr_schedule.build()(0.5) <= 1

    if types := config.tasks.arguments.get("types"):
        write_natural_instructions(tmp_path / "data" / "natural-instructions", [*types, "Another"], num_examples=3)
    is_mos = unit == "ep"
    for owner in mos_datasets.iterdir() if is_mos else ():
        Path(owner.name).symlink_to(owner)
    names = [task.name for task in build_once(config.tasks, built)]
    assert names == (types or (DATASETS if is_mos else names))
    sizes = torch.arange(1, len(names) + 1)
    mixture = config.mixture.build(task_names=names, num_supervised_tokens=sizes, budget_tokens=1000)
    check_mixture(mixture, getattr(module, "SIGNALS", ()), num_tasks=len(names), recipe=recipe)
    assert bool(mixture.observes) == (strategy not in STATIC)
    if strategy in REWARDS:
        reward = config.reward.build(task_names=names, model=decoder)
        check_reward(reward, mixture)
        assert config.reward.component == f"adapt_recipes.signals.rewards.{REWARDS[strategy]}"
        assert ("specialist" in config.reward.arguments) == strategy.startswith("mospec")


@pytest.mark.parametrize("name", CONFIGS)
def test_its_header_says_how_to_run_it(name: str) -> None:
    """Its command, its budget, where memory is given, and how to get the model and the data that it reads."""
    header, _, content = CONFIGS[name].read_text().partition("\n\n")
    command = f"{recipe_of(CONFIGS[name])} --config yaml/{name}.yaml"
    assert header.startswith(f"# tune run {command}\n#\n")
    parts = NAME.fullmatch(name)
    assert parts is not None
    if parts[1] == "tiny":
        return
    assert f"with {BUDGETS[parts[3] + parts[4]]} their supervised tokens." in header.replace("\n# ", " ")
    said = dict(re.findall(r"^# (\w+): +(.*)$", header, re.MULTILINE))
    download = TuneCLIParser()._parser.parse_args(shlex.split(said["Model"])[1:])
    folders = re.findall(r"(?:path|checkpoint_dir): (models/\S+)", content)
    assert len(folders) >= 2 and set(folders) == {str(download.output_dir)}
    assert download.output_dir.name == download.repo_id.split("/")[1]
    assert not any(pattern.endswith("safetensors") for pattern in download.ignore_patterns or ())
    if parts[4] == "ep":
        # By name on the hub, without a command.
        assert len(re.findall(r"^    path: [\w-]+/[\w-]+$", content, re.MULTILINE)) == len(DATASETS)
        assert said["Data"].startswith("fetched at the first start") and "licenses" in header
    else:
        assert f"path: {said['Data'].split()[-1]}\n" in content
    if parts[1] == "smollm2_135m":
        assert re.match(r"[\d.]+ GB ", said["Memory"])
    else:
        assert re.findall(r"^# Memory: docs/scaling\.md .*\n# +(.*)$", header, re.MULTILINE) == [
            f"tune plan --nproc_per_node N {command}"
        ]


def test_natural_instructions_by_file_with_examples(run: Runner, small: list[str]) -> None:
    options = ("tasks.task_per=file", "tasks.num_positive_examples=1", "tasks.all_outputs=true")
    done = run("smollm2_135m_uniform_10pct", "budget.tokens=50", *small, *options)
    assert set(done.summary["task_tokens"]) == {f"task{i}" for i in range(5)}
