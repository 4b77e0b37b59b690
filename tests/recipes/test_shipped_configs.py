"""Every shipped config is what its name says; those of SmolLM2 run on a tiny model and a few examples.

The configs of the grid run in ``test_grid.py``, the tiny ones in ``test_run_directory.py``.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, Runner
from standins import write_natural_instructions, write_tokenizer
from torchtune._cli.tune import TuneCLIParser
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapt_recipes.config import load, to_dict
from adapt_recipes.data import IGNORE_INDEX, ChatTokenizer
from adapt_recipes.mixture.interface import check_mixture
from adapt_recipes.signals.reward_interface import check_reward

CONFIGS = sorted((ROOT / "yaml").glob("*.yaml"))
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
    "adapt_oracle": "Adapt",
    "adapt_planned": "AdaptPlanned",
    "dro": "GroupDRO",
    "dro_exponentiated": "GroupDRO",
    "dro_oracle": "GroupDRO",
    "dro_asymptote": "GroupDRO",
    "exp3": "Exp3",
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
STATIC = {name: name for name in ("uniform", "proportional", "temperature")} | {"fixed": "fixed_weights"}
REFERENCES = {"oracle": dict, "asymptote": str}  # the types of what losses are counted from, where the name says so
DATASETS = ("dialogue", "math", "medical", "nlp")
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


@pytest.fixture
def model_and_data(tmp_path: Path) -> Path:
    """What the configs of SmolLM2 expect in the current folder: a model of 0.03M parameters, and a few examples."""
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
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
    write_natural_instructions(tmp_path / "data" / "natural-instructions", types, num_examples=160)
    return folder


@pytest.mark.parametrize("config", [path.stem for path in CONFIGS if path.stem.startswith("smollm2_")])
def test_runs(run: Runner, model_and_data: Path, config: str) -> None:
    cadence = ["mixture_update_every=2"] if "mixture_update_every" in (ROOT / f"yaml/{config}.yaml").read_text() else []
    done = run(config, "budget.tokens=200", "device=cpu", *cadence, "max_seq_len=256")
    assert done.summary["strategy"] in config and done.summary["supervised_tokens"] == 200
    assert done.summary["mixture_updates"] == ((done.summary["steps"] - 1) // 2 if cadence else 0)
    assert done.summary["tokens"] >= 0.8 * done.summary["computed_tokens"], "little is padding"
    initial, final = done.summary["initial_validation_losses"], done.summary["validation_losses"]
    assert all(final[name] != initial[name] for name in final)

    # The folder answers in transformers, and its losses are those that the recipe reports (bf16 compute: to 1 %).
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model").eval()
    theirs = AutoTokenizer.from_pretrained(done.folder / "model")
    ours = ChatTokenizer(done.folder / "model")
    messages = [{"role": "user", "content": "Answer.\n\nyes or no?"}, {"role": "assistant", "content": "yes"}]
    tokens, supervised = ours.encode(messages)
    assert theirs.apply_chat_template(messages, return_dict=False) == tokens
    labels = torch.tensor([tokens]).masked_fill(~torch.tensor([supervised]), IGNORE_INDEX)
    assert model(torch.tensor([tokens]), labels=labels).loss.isfinite()
    prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_name_tells_the_truth(path: Path, tmp_path: Path, recipes: dict[str, ModuleType]) -> None:
    """All of it is built, the model without memory for its weights, on a few examples of each task."""
    parts = re.fullmatch(rf"({'|'.join(PARAMETERS)})_(.+?)(?:_(\d+)(pct|ep))?", path.stem)
    model, strategy, number, unit = parts.groups()
    recipe = f"{'mos' if strategy in REWARDS else 'adapt' if strategy in LEARNED else 'sft'}_full_finetune"
    module = recipes[recipe]
    assert path.read_text().splitlines()[0] == f"# tune run {recipe} --config yaml/{path.name}"
    config = load(module.Config, path)
    assert config.strategy == strategy
    assert config.output_dir == f"runs/{path.stem}"
    component = "Scorer" if strategy in REWARDS else (LEARNED | STATIC)[strategy]
    assert config.mixture.component == f"adapt_recipes.mixture.{component}"
    reference = config.mixture.arguments.get("reference")
    assert type(reference) is REFERENCES.get(strategy.rpartition("_")[2], type(None))
    assert config.budget.fraction == (int(number) / 100 if unit == "pct" else None)
    assert config.budget.passes == (int(number) if unit == "ep" else None)
    assert load(module.Config, path, ["seed=1"]).seed == 1
    assert to_dict(config)["mixture"]["_component_"] == config.mixture.component

    if model == "smollm2_135m":
        Path(config.model.arguments["path"]).mkdir(parents=True)
        Path(config.model.arguments["path"], "config.json").write_text(json.dumps({"model_type": "llama"} | SMOLLM2))
    with torch.device("meta"):
        decoder = config.model.build()
    assert sum(parameter.numel() for parameter in decoder.parameters()) == PARAMETERS[model]
    assert decoder.max_seq_len >= config.max_seq_len
    optimizer = config.optimizer.build(params=decoder.parameters())
    assert optimizer.param_groups[0]["lr"] == config.optimizer.arguments["lr"]
    assert 0 < config.lr_schedule.build()(0.5) <= 1

    if types := config.tasks.arguments.get("types"):
        write_natural_instructions(tmp_path / "data" / "natural-instructions", [*types, "Another"], num_examples=3)
    if config.tasks.component == "adapt_recipes.data.jsonl_tasks":
        Path(config.tasks.arguments["path"]).mkdir(parents=True)
        for name in DATASETS:
            Path(config.tasks.arguments["path"], f"{name}.jsonl").write_text('{"prompt": "1 + 1", "response": "2"}')
    names = [task.name for task in config.tasks.build()]
    assert names == (types or names)
    sizes = torch.arange(1, len(names) + 1)
    mixture = config.mixture.build(task_names=names, num_supervised_tokens=sizes, budget_tokens=1000)
    check_mixture(mixture, getattr(module, "SIGNALS", ()), num_tasks=len(names), recipe=recipe)
    assert bool(mixture.observes) == (strategy not in STATIC)
    if strategy in REWARDS:
        reward = config.reward.build(task_names=names, model=decoder)
        check_reward(reward, mixture)
        assert config.reward.component == f"adapt_recipes.signals.rewards.{REWARDS[strategy]}"
        assert ("specialist" in config.reward.arguments) == strategy.startswith("mospec")


@pytest.mark.parametrize("path", [path for path in CONFIGS if not path.stem.startswith("tiny_")], ids=lambda p: p.stem)
def test_its_header_says_how_to_run_it(path: Path) -> None:
    header, _, content = path.read_text().partition("\n\n")
    said = dict(re.findall(r"^# (\w+): +(.*)$", header, re.MULTILINE))
    download = TuneCLIParser()._parser.parse_args(shlex.split(said["Model"])[1:])
    folders = re.findall(r"(?:path|checkpoint_dir): (models/\S+)", content)
    assert len(folders) >= 2 and set(folders) == {str(download.output_dir)}
    assert download.output_dir.name == download.repo_id.split("/")[1]
    assert not any(pattern.endswith("safetensors") for pattern in download.ignore_patterns or ())
    assert f"path: {said['Data'].split()[-1]}\n" in content
    assert re.match(r"[\d.]+ GB |docs/scaling.md ", said["Memory"])


def test_natural_instructions_by_file_with_examples(run: Runner, model_and_data: Path) -> None:
    options = ("tasks.group_by=file", "tasks.num_positive_examples=1", "tasks.all_outputs=true")
    done = run("smollm2_135m_uniform_10pct", *options, "budget.tokens=50", "device=cpu")
    assert set(done.summary["task_tokens"]) == {f"task{i}" for i in range(5)}
