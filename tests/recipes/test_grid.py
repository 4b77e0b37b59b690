"""The grid of configs is what its script writes, spends what it says on mixture updates, and runs to its end.

That each is what its name and its header say is shown in ``test_shipped_configs.py``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import Runner
from running import CONFIGS, ROOT, Run, finished, load_recipe, recipe_of
from standins import SHAREGPT_BAD_ROWS, write_natural_instructions, write_tokenizer
from tiers import slow_but
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

from adapt_recipes import data, models
from adapt_recipes.config import load
from adapt_recipes.data import ChatTokenizer
from adapt_recipes.models import TokenLosses
from adapt_recipes.planning.memory import CPU, Shape, estimate_memory

SCRIPT = ROOT / "tools" / "yaml_grid" / "write.py"
# By its path: the folder is not a package.
MODULE = runpy.run_path(str(SCRIPT))
STUDIES: dict[str, Any] = MODULE["studies"]()
WRITTEN: dict[str, str] = {name: text for study in STUDIES.values() for name, text in MODULE["configs"](study).items()}
GRID = [name.removesuffix(".yaml") for name in WRITTEN]
VALUES = {name: yaml.safe_load(content) for name, content in zip(GRID, WRITTEN.values(), strict=True)}
TYPES = VALUES[GRID[0]]["tasks"]["types"]
DATASETS = ["math", "medical", "dialogue", "nlp"]
P3_CONFIGURATIONS = VALUES["gemma_2b_uniform_3ep"]["tasks"]["nlp"]["names"]
# What an update costs for each example that it measures on: a forward is 1, a forward and its backward 3.
COST = {
    "adapt": 1 + 3 + 2,  # losses, their gradient, and losses on both sides of the weights
    "adapt_planned": 1,
    "mos_cossim": 1,
    "mos_diff": 1 + 1,  # of the base model, too
    "mospec_cossim": 1,
    "mospec_diff": 1 + 1,
    "multidds": 3 + 3,
    "multiuat": 1,
}
STATIC = ("uniform", "proportional", "temperature")


class Name(NamedTuple):
    """What the name of a config is made of."""

    grid: Any
    model: str
    strategy: str
    budget: str

    def sibling(self, **changes: Any) -> str:
        return "_".join(self._replace(**changes)[1:])


NAMES = {
    f"{model}_{strategy}_{budget}": Name(grid, model, strategy, budget)
    for grid in STUDIES.values()
    for model in grid.models
    for strategy in grid.strategies
    for budget in grid.budgets
}


class Kind(NamedTuple):
    """A tiny model of a kind: what overrides give of it to our builder, and what transformers is given."""

    builder: str
    sizes: dict[str, Any]
    model_class: Any
    config_class: Any
    config: dict[str, Any]


SIZES = {"vocab_size": 304, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}
CONFIG = {
    "vocab_size": 304,
    "num_hidden_layers": 2,
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
            "layer_types": ["sliding_attention", "full_attention"],
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


MOS = [config for config, name in NAMES.items() if name.grid is STUDIES["mos"]]
GRID_OF = {name.model: name.grid for name in NAMES.values()}


def names_of_tasks(config: str) -> list[str]:
    return VALUES[config]["tasks"].get("types", DATASETS)


# ---- the files


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    """Else: python tools/yaml_grid/write.py. A file that it no longer writes is to be removed by hand."""
    shipped = {path.name: path.read_text() for path in (ROOT / "yaml").glob("*.yaml")}
    assert {name: shipped.get(name) for name in WRITTEN} == WRITTEN
    assert {name for name in shipped if not name.startswith(("tiny_", "smollm2_", "eval_"))} == set(WRITTEN)
    run_copy(tmp_path)
    assert {path.name: path.read_text() for path in (tmp_path / "yaml").glob("*.yaml")} == WRITTEN


def run_copy(folder: Path, *edit: str) -> Path:
    """Run a copy of the script and its fragments, after an edit: file, old text and new text; the folder of both."""
    copy = folder / "tools" / "yaml_grid"
    shutil.copytree(SCRIPT.parent, copy)
    (folder / "yaml").mkdir()
    if edit:
        file, old, new = edit
        text = (copy / file).read_text()
        assert old in text
        (copy / file).write_text(text.replace(old, new, 1))
    runpy.run_path(str(copy / SCRIPT.name), run_name="__main__")
    return copy


def test_an_added_entry_is_a_row_of_the_grid(tmp_path: Path) -> None:
    entry = "30pct: {title: 30 % of it, unit: fraction, amount: 0.3, every: 9}\n"
    with pytest.raises(SystemExit, match=r"strategies\.yaml: adapt\.updates\.every\.30pct: missing$"):
        run_copy(tmp_path / "one", "adapt/budgets.yaml", "1pct:", f"{entry}1pct:")
    entry = 'none: {recipe: sft_full_finetune, title: None, mixture: "_component_: mine.none"}\n'
    run_copy(tmp_path / "two", "mos/strategies.yaml", "mos_cossim:", f"{entry}mos_cossim:")
    files = {path.name: path.read_text() for path in (tmp_path / "two" / "yaml").glob("*.yaml")}
    assert set(files) - set(WRITTEN) == {f"{model}_none_3ep.yaml" for model in STUDIES["mos"].models}
    assert {name: files[name] for name in WRITTEN} == WRITTEN
    assert yaml.safe_load(files["gemma_2b_none_3ep.yaml"])["mixture"] == {"_component_": "mine.none"}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("adapt/models.yaml", "  options:", "  option:", "gemma3_1b.option: not used by write.py"),
        ("adapt/models.yaml", "  title: Gemma 3 1B\n", "", "gemma3_1b.title: missing"),
        ("adapt/models.yaml", "llama3_2_1b:", "gemma3_1b:", "gemma3_1b: given twice"),
        ("adapt/models.yaml", "  title: Gemma 3 1B", "  title: [", "while parsing a flow sequence .*"),
        ("adapt/models.yaml", "  title: Gemma 3 1B", "  title: 3", "gemma3_1b.title: .* valid string"),
        ("adapt/strategies.yaml", "    passes: 6", "    pases: 6", "adapt.updates.pases: not used by write.py"),
        ("adapt/strategies.yaml", "5pct: 110", "7pct: 110", "adapt.updates.every.5pct: missing"),
        ("adapt/strategies.yaml", "5pct: 8", "5pct: 8, 7pct: 9", "adapt.updates.examples.7pct: not in budgets.yaml"),
        ("mos/budgets.yaml", "unit: epochs", "unit: steps", "3ep.unit: .*'fraction' or 'epochs'"),
        ("mos/budgets.yaml", "every: 1000", "every: 0", "3ep.every: .*greater than 0"),
        ("mos/shared.yaml", "num_tasks: 4\n", "", "num_tasks: missing"),
        ("config.yaml.jinja", "{{ model.notes", "{{ model.note", ".*has no attribute 'note'"),
    ],
)
def test_a_wrong_fragment_is_one_line(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    """With the file and the key, and before any config is written."""
    with pytest.raises(SystemExit) as leaving:
        run_copy(tmp_path, file, old, new)
    assert re.fullmatch(f"{re.escape(str(tmp_path))}/tools/yaml_grid/{file}: {message}", str(leaving.value.code))
    assert not list((tmp_path / "yaml").iterdir())


@pytest.mark.parametrize(("name", "message"), [("budgets", "missing"), ("budget", "not used by write.py")])
def test_a_file_of_fragments_that_is_missing_or_not_used(tmp_path: Path, name: str, message: str) -> None:
    copy = run_copy(tmp_path)
    if message == "missing":
        (copy / "mos" / f"{name}.yaml").unlink()
    else:
        (copy / "mos" / f"{name}.yaml").write_text("3ep: {}\n")
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(copy / SCRIPT.name), run_name="__main__")
    assert leaving.value.code == f"{copy}/mos/{name}.yaml: {message}"


def test_every_key_of_a_fragment_is_used() -> None:
    """By the template, or by the script for the numbers in it."""
    template = (SCRIPT.parent / "config.yaml.jinja").read_text()
    for kind in ("Shared", "Model", "Strategy", "Budget"):
        unused = {key for key in MODULE[kind].model_fields if f"{kind.lower()}.{key}" not in template}
        assert unused == ({"num_tasks", "examples_per_step"} if kind == "Shared" else set())


def test_it_is_models_by_strategies_by_budgets() -> None:
    studies = (
        ("gemma3_1b llama3_2_1b qwen3_0_6b", "adapt adapt_planned uniform proportional", "1pct 5pct 10pct"),
        (
            "qwen1_5_0_5b gemma_2b llama3_8b",
            "mos_cossim mos_diff mospec_cossim mospec_diff multidds multiuat temperature proportional uniform",
            "3ep",
        ),
    )
    names = {"_".join(each) for study in studies for each in itertools.product(*map(str.split, study))}
    assert set(GRID) == set(NAMES) == names and len(GRID) == 36 + 27
    assert len(TYPES) == len(set(TYPES)) == 20


def test_configs_differ_in_nothing_but_what_their_names_say() -> None:
    """A comparison of strategies compares nothing else."""

    def rest(config: str, *keys: str) -> dict[str, Any]:
        return {key: value for key, value in VALUES[config].items() if key not in ("output_dir", *keys)}

    of_model = ("model", "tokenizer", "checkpointer")
    of_strategy = ("recipe", "strategy", "mixture", "reward", "sampling", "mixture_update_every", "probe")
    of_budget = ("budget", "checkpoint_every", "validate_every", "mixture_update_every", "probe")
    for config, name in NAMES.items():
        assert rest(config, *of_strategy) == rest(name.sibling(strategy="uniform"), *of_strategy)
        assert rest(config, *of_model) == rest(name.sibling(model=next(iter(name.grid.models))), *of_model)
        assert rest(config, *of_budget) == rest(name.sibling(budget=next(iter(name.grid.budgets))), *of_budget)


def test_mos_is_set_as_in_its_paper_and_its_authors_code() -> None:
    """The settings that these give, and which reward is whose."""
    whole_text = {"tokens": "all", "examples": "fresh"}
    rewards = {
        "mos_cossim": {"_component_": "adapt_recipes.signals.rewards.CosineSimilarity"},
        "mos_diff": {"_component_": "adapt_recipes.signals.rewards.PerplexityRatio"} | whole_text,
        "mospec_cossim": {"_component_": "adapt_recipes.signals.rewards.CosineSimilarity", "specialist": "math"},
        "mospec_diff": {"_component_": "adapt_recipes.signals.rewards.PerplexityRatio", "specialist": "math"}
        | whole_text,
        "multidds": {"_component_": "adapt_recipes.signals.rewards.GradientAlignment"},
        "multiuat": {"_component_": "adapt_recipes.signals.rewards.Uncertainty", "measure": "EntSent"},
    }
    scorer = {"_component_": "adapt_recipes.mixture.Scorer", "prior": "uniform", "ema_decay": 0.1}
    authors, paper = {"form": "authors"}, {"form": "paper", "optimizer": "adam", "learning_rate": 1e-4}
    for config in MOS:
        values, strategy = VALUES[config], NAMES[config].strategy
        assert (values["batch_size"], values["optimizer"]["lr"], values["lr_schedule"]["warmup"]) == (64, 1e-5, 0.1)
        assert values["optimizer"]["_component_"] == "torch.optim.AdamW"
        assert values["lr_schedule"]["_component_"] == "adapt_recipes.training.schedule.linear"
        assert values.get("reward") == rewards.get(strategy)
        if strategy in rewards:
            assert (values["mixture_update_every"], values["probe"]) == (
                100,
                {"examples": 16 if strategy.endswith("diff") else 64},
            )
            assert values["mixture"] == scorer | (authors if strategy.startswith("mos") else paper)
            assert values["sampling"] == "example"
        else:
            temperature = {"temperature": 10} if strategy == "temperature" else {}
            assert values["mixture"] == {"_component_": f"adapt_recipes.mixture.{strategy}"} | temperature
            assert not {"sampling", "mixture_update_every", "probe"} & set(values)


@pytest.mark.parametrize("config", [config for config, name in NAMES.items() if name.strategy in COST])
def test_updates_are_many_and_cost_what_it_says(config: str) -> None:
    """And of ADAPT, whose settings are ours: at most 5 % of the time by passes over examples."""
    values, text, name = VALUES[config], WRITTEN[f"{config}.yaml"], NAMES[config]
    update_every, examples = values["mixture_update_every"], values["probe"]["examples"]
    update = len(names_of_tasks(config)) * examples * COST[name.strategy]
    # A step of so many tokens has about as many examples of the mean length.
    per_step = values["batch_size"] if config in MOS else round(values["batch_tokens"] / 9.1)
    steps = update_every * per_step * 3
    assert f"costs {update / (3 * per_step):.1f} steps: {100 * update / (update + steps):.1f} % of" in text
    assert update / (update + steps) <= 0.05 or config in MOS
    assert examples <= values["tasks"]["validation_examples"]
    length, updates = map(int, re.search(r"some ([\d,]+) steps and (\d+) mix", text.replace(",", "")).groups())
    assert updates >= 8 and updates == pytest.approx(length / update_every, abs=1)
    millions = float(re.search(r"; ([\d.]+) million examples", text).group(1))
    epochs = values["budget"].get("fraction") or values["budget"]["epochs"]
    assert length == pytest.approx(epochs * millions * 1e6 / per_step, abs=5)


# ---- runs


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, mos_datasets: Path) -> Path:
    """models/ and data/ as the headers' commands make them, and the datasets of MoS by their names on the hub, tiny.

    Weights are large, so that a wrong one shows.
    """
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    for name, kind in KINDS.items():
        path = folder / downloaded(name)
        write_tokenizer(path)
        model = kind.model_class(kind.config_class(**CONFIG | kind.config))
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.4).add_(1.0 if parameter.ndim == 1 and "gemma" not in name else 0.0)
        model.save_pretrained(path)
    write_natural_instructions(folder / "data" / "natural-instructions", [*TYPES, "Another"], num_examples=34)
    for owner in mos_datasets.iterdir():
        (folder / owner.name).symlink_to(owner)
    return folder


def downloaded(model: str) -> str:
    """Where a config looks for its model."""
    return GRID_OF[model].models[model].folder


def tiny(config: str, hub: Path, *, builder: str | None = None, batch_size: int | None = None) -> list[str]:
    """Overrides that put in the tiny model, and make some five steps of the shipped share of the tiny data.

    ``builder``: None for that of the whole model; ``batch_size``: None for as many as make these steps.
    """
    for path in hub.iterdir():
        Path(path.name).symlink_to(path)
    name, kind = NAMES[config], KINDS[NAMES[config].model]
    overrides = [f"model={builder or kind.builder}", *(f"model.{k}={v}" for k, v in (SIZES | kind.sizes).items())]
    if batch_size is None:
        batch_size = 32 if config in MOS else round(200 * VALUES[config]["budget"]["fraction"])
    overrides += [
        "device=cpu",
        "max_seq_len=256",
        "tasks.validation_examples=2",
        "tasks.test_examples=0",
        f"batch_size={batch_size}",
    ]
    return overrides + (["mixture_update_every=2", "probe.examples=2"] if name.strategy in COST else [])


def test_the_datasets_of_mos(hub: Path) -> None:
    """What the shipped ``tasks`` make of rows as they are on the hub: each is an example, or skipped and counted."""
    config = "qwen1_5_0_5b_mos_diff_3ep"
    overrides = tiny(config, hub)
    loaded = load(load_recipe(recipe_of(CONFIGS[config])).Config, CONFIGS[config], overrides)
    raw = {task.name: task for task in loaded.tasks.build()}
    assert list(raw) == DATASETS

    # One conversation of each kind.
    def prompts(name: str) -> list[str]:
        """Of the first examples, without what tells them apart."""
        return [re.sub("x+", "", each.messages[0]["content"]) for each in raw[name].conversations[:4]]

    first = P3_CONFIGURATIONS[0]
    assert prompts("math") == [f"math {i} " for i in range(4)]
    assert prompts("medical") == ["medical 0 ", "medical 1 ", "medical 2 \n\na patient of 40 years", "medical 3 "]
    assert prompts("dialogue") == ["dialogue 0 ", "dialogue 1 ", "Answer.", "dialogue 3 "]
    assert prompts("nlp") == [f"{first} {i} \n\n" for i in range(4)]
    roles = [[message["role"] for message in each.messages] for each in raw["dialogue"].conversations[:4]]
    pair = ["user", "assistant"]
    assert roles == [pair, pair * 2, ["system", *pair], pair]
    assert raw["dialogue"].conversations[1].messages[2:] == messages("sure?", "no")
    for name, ends in {"math": "", "medical": "", "dialogue": "", "nlp": "\n"}.items():
        answers = {each.messages[index]["content"] for each in raw[name].conversations for index in each.supervised}
        assert answers == {f"yes{ends}", f"no{ends}"}

    # All rows: those of the config's file and configurations, in their order, by split.
    sizes = {name: len(raw[name].conversations) for name in DATASETS}
    assert sizes == {"math": 12, "medical": 16, "dialogue": 8, "nlp": 4 * len(P3_CONFIGURATIONS)}
    for rows, names in (
        (raw["nlp"].conversations[::4], P3_CONFIGURATIONS),
        (raw["nlp"].validation, P3_CONFIGURATIONS),
        (raw["nlp"].test, P3_CONFIGURATIONS[1:2]),
    ):
        assert [each.messages[0]["content"].split()[0] for each in rows] == names
    assert all(raw[name].validation is None and raw[name].test is None for name in DATASETS[:3])

    # What is not used, and what is skipped.
    nlp = 5 * len(P3_CONFIGURATIONS) + 1
    unused = {"math": {"source": 12}, "medical": {}, "dialogue": {"id": 8}, "nlp": {"inputs": nlp, "targets": nlp}}
    assert {name: dict(task.unused_keys) for name, task in raw.items()} == unused
    bad = raw["dialogue"].bad_rows
    assert not any(raw[name].bad_rows for name in DATASETS if name != "dialogue")
    assert [row.number for row in bad] == [2 * i for i in range(len(SHAREGPT_BAD_ROWS))]
    for row, (_, reason) in zip(bad, SHAREGPT_BAD_ROWS, strict=True):
        where = "anon8231489123/ShareGPT_Vicuna_unfiltered, split 'train', row"
        assert str(row).startswith(f"{where} {row.number}: {reason}")
    tasks = data.load_tasks(loaded.tasks, tokenizer=loaded.tokenizer.build(), max_seq_len=loaded.max_seq_len)
    assert [task.left_out.bad_rows for task in tasks] == [0, 0, len(SHAREGPT_BAD_ROWS), 0]
    kept = [len(task.train) + len(task.validation) for task in tasks]
    assert kept == [12, 16, 8, 5 * len(P3_CONFIGURATIONS)]
    assert [len(task.validation) for task in tasks] == [2, 2, 2, len(P3_CONFIGURATIONS)]


def test_a_dataset_of_mos_by_overrides(hub: Path) -> None:
    """One of one's own in place of one, and what is said of an argument of one."""
    config, overrides = "qwen1_5_0_5b_mos_diff_3ep", tiny("qwen1_5_0_5b_mos_diff_3ep", hub)

    def loaded(*more: str) -> Any:
        return load(load_recipe("mos_full_finetune").Config, CONFIGS[config], [*overrides, *more])

    Path("mine").mkdir()
    Path("mine", "a.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    for mine in (["tasks.math.path=mine"], ["tasks.math=adapt_recipes.data.jsonl_tasks", "tasks.math.path=mine"]):
        tasks = loaded(*mine, "~tasks.dialogue").tasks.build()
        assert [task.name for task in tasks] == ["math", "medical", "nlp"]
        assert [each.messages for each in tasks[0].conversations] == [messages("a", "b")]

    for override, message in {
        "tasks.math.path=./nowhere": "tasks.math.path: no folder nowhere$",
        "tasks.nlp.split=trian": "tasks.nlp: bigscience/P3, configuration .*: no split 'trian'; did you mean 'train'",
        "tasks.nlp.configuration=a": "tasks.nlp.configuration is not for .*; tasks.nlp.names chooses among them$",
        "tasks.dialogue.response=values": "tasks.dialogue.response: .*, split 'train' has no column 'values'",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            loaded(override).tasks.build()
    for override, message in {
        "tasks.maths.path=mine": "unknown key 'tasks.maths' for .*; did you mean 'math'",
        "tasks.on_bad_row=refuse": "unknown key 'tasks.on_bad_row' for .*; did you mean 'on_bad_rows'",
        "tasks.math.pth=mine": "unknown key 'tasks.math.pth' for .*; did you mean 'path'",
        "~tasks.math._component_": "missing key 'tasks.math._component_'$",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            loaded(override)
    refusing = loaded("tasks.on_bad_rows=refuse")
    with pytest.raises(
        ValueError, match=r"_unfiltered, split 'train': 5 bad rows: row 0: message 0 .*on_bad_rows: skip"
    ):
        data.load_tasks(refusing.tasks, tokenizer=refusing.tokenizer.build(), max_seq_len=256)

    # Advice about a row, too.
    Path("mine", "a.jsonl").write_text(json.dumps({"prompt": "a", "response": "b", "question": "a", "answer": "b"}))
    refusing = loaded("tasks.math.path=mine", "~tasks.dialogue", "tasks.on_bad_rows=refuse")
    with pytest.raises(ValueError, match="row 0: fits the formats .*; name one in tasks.math.format$"):
        data.load_tasks(refusing.tasks, tokenizer=refusing.tokenizer.build(), max_seq_len=256)


def messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each mixture update of the runs to come costs: sequences, counted 3 where they are to have a backward."""
    costs, total = [], [0]
    forward = TokenLosses.forward

    def counted(model: TokenLosses, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
        total[0] += len(tokens) * (3 if torch.is_grad_enabled() else 1)
        return forward(model, tokens, *arguments)

    def measured(update: Any) -> Any:
        def update_mixture(recipe: Any) -> None:
            before = total[0]
            update(recipe)
            costs.append(total[0] - before)

        return update_mixture

    monkeypatch.setattr(TokenLosses, "forward", counted)
    for recipe in (
        load_recipe("adapt_full_finetune").Recipe,
        load_recipe("mos_full_finetune").Recipe,
    ):
        monkeypatch.setattr(recipe, "update_mixture", measured(recipe.update_mixture))
    return costs


def tasks_of(done: Run, name: str) -> list[data.Task]:
    """The tasks of a run, as its ``resolved.yaml`` gives them."""
    config = load(load_recipe(recipe_of(CONFIGS[name])).Config, done.folder / "resolved.yaml")
    return data.load_tasks(config.tasks, tokenizer=config.tokenizer.build(), max_seq_len=config.max_seq_len)


def covering(grid: Any) -> list[str]:
    """Each model, strategy and budget of a study at least once, in as few configs as there are strategies.

    Each line of a config is of one of the three, but for how often the mixture is updated, which ``tiny`` overrides.
    """
    models, budgets = [*grid.models], [*grid.budgets]
    strategies = enumerate(grid.strategies)
    return [f"{models[i % len(models)]}_{strategy}_{budgets[i % len(budgets)]}" for i, strategy in strategies]


COVERING = [config for grid in STUDIES.values() for config in covering(grid)]


def test_what_runs_covers_the_grid() -> None:
    for field in ("model", "strategy", "budget"):
        assert {getattr(NAMES[config], field) for config in COVERING} == {
            getattr(each, field) for each in NAMES.values()
        }


@pytest.mark.parametrize("config", slow_but(COVERING[::4], COVERING))
def test_runs(run: Runner, costs: list[int], hub: Path, config: str) -> None:
    name, values = NAMES[config], VALUES[config]
    ((unit, share),) = values["budget"].items()
    done = run(config, *tiny(config, hub), f"budget.{unit}={share}")
    tasks, summary = tasks_of(done, config), done.summary
    sizes = {task.name: int(task.train.num_supervised.sum()) for task in tasks}
    assert summary["strategy"] == values["strategy"] and list(sizes) == names_of_tasks(config)
    assert summary["supervised_tokens"] == summary["budget_tokens"] == round(share * sum(sizes.values()))
    assert summary["steps"] >= 4
    updates = [line["step"] for line in done.events("mixture")][1:]  # the first says how it starts
    assert updates == (list(range(2, summary["steps"], 2)) if name.strategy in COST else [])
    assert costs == [len(tasks) * 2 * COST[name.strategy] for _ in updates]
    assert summary["mixture_updates"] == len(updates)
    if name.strategy in STATIC:
        power = {"uniform": 0, "proportional": 1, "temperature": 0.1}[name.strategy]
        shares = {name: size**power for name, size in sizes.items()}
        assert summary["probabilities"] == pytest.approx({n: s / sum(shares.values()) for n, s in shares.items()})
    assert summary["validation_losses"] != summary["initial_validation_losses"]
    # To what bf16 loses with such weights.
    assert losses_in_transformers(done.folder / "model", tasks) == pytest.approx(summary["validation_losses"], rel=0.05)
    if "reward" in values:
        first, *later = done.events("mixture")
        assert first["probabilities"] == dict.fromkeys(sizes, 0.25) != later[-1]["probabilities"]
        if name.strategy == "mospec_cossim":
            assert later[-1]["rewards"]["math"] == pytest.approx(1) == max(later[-1]["rewards"].values())


@pytest.mark.slow
@pytest.mark.parametrize("config", [config for config in GRID if config not in COVERING])
def test_the_others_run_too(run: Runner, hub: Path, config: str) -> None:
    """In three steps of two examples, with one update of a mixture that learns."""
    done = run(config, *tiny(config, hub, batch_size=2), "budget.tokens=12")
    assert (done.summary["strategy"], done.summary["steps"]) == (NAMES[config].strategy, 3)
    assert done.summary["mixture_updates"] == (NAMES[config].strategy in COST)
    assert (done.folder / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", KINDS)
def test_the_model_folder_computes_what_was_trained(run: Runner, hub: Path, model: str) -> None:
    config = next(config for config, name in NAMES.items() if name.model == model)
    small = tiny(config, hub, batch_size=2)
    done = run(config, *small, "budget.tokens=20", "dtype=fp32", "optimizer.lr=1e-2")
    losses, initial = done.summary["validation_losses"], done.summary["initial_validation_losses"]
    assert all(abs(losses[name] - initial[name]) > 0.01 for name in names_of_tasks(config))
    tasks = tasks_of(done, config)
    assert losses_in_transformers(done.folder / "model", tasks) == pytest.approx(losses, rel=1e-4)
    assert losses_in_transformers(hub / downloaded(model), tasks) == pytest.approx(initial, rel=1e-4)


TOO_LARGE = "llama3_8b_mos_cossim_3ep"
REMEDY = GRID_OF["llama3_8b"].models["llama3_8b"].remedy
WITH_REMEDY = [
    word for word in shlex.split(REMEDY) if "=" in word and not word.endswith((".", ","))
]  # not a sentence's


def test_the_remedy_for_a_model_that_is_too_large(run: Runner, hub: Path) -> None:
    """LoRA, with what the header says of it: it is what it says, and trains."""
    of_models = {model: grid.models[model] for model, grid in GRID_OF.items()}
    assert [model for model, of_model in of_models.items() if of_model.remedy] == ["llama3_8b"]
    assert REMEDY in WRITTEN[f"{TOO_LARGE}.yaml"].replace("\n#         ", "\n")
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "scaling.md").read_text().splitlines()]
    on_80 = {(row[0].strip("`"), row[1]): row[-1] for row in rows if row[0].strip("`") in of_models}
    assert [model for model in of_models if on_80[model, "1"] not in ("yes", "C")] == ["llama3_8b"]
    assert (on_80["llama3_8b", "1"], on_80["llama3_8b", "2"], on_80["llama3_8b", "4"]) == ("L", "L", "C")

    checkpointing, builder, modules, rate = WITH_REMEDY
    assert (checkpointing, rate) == ("activation_checkpointing=true", "optimizer.lr=1e-4")
    small = tiny(TOO_LARGE, hub, builder=builder.removeprefix("model=").replace("llama3_8b", "llama3"))
    small += [checkpointing, modules, "model.lora_rank=8", "model.lora_alpha=16"]  # the large builder's defaults
    done = run(TOO_LARGE, *small, "budget.epochs=3", "dtype=fp32", "optimizer.lr=1e-2")
    losses, initial = done.summary["validation_losses"], done.summary["initial_validation_losses"]
    assert all(losses[name] != initial[name] for name in DATASETS)
    tasks = tasks_of(done, TOO_LARGE)
    assert losses_in_transformers(done.folder / "model", tasks) == pytest.approx(losses, rel=1e-4)
    assert (done.folder / "adapter").is_dir()


@pytest.mark.slow
def test_the_remedy_takes_the_memory_that_it_says() -> None:
    loaded = load(load_recipe("mos_full_finetune").Config, CONFIGS[TOO_LARGE], WITH_REMEDY)
    model = models.build(loaded, [], device=CPU, checkpointer=None)
    memory, size = estimate_memory(model, loaded, Shape(4096, 1024, 512))
    assert 0 < size.trained < size.parameters / 1000
    assert f"about {memory.total / 1e9:.0f} GB (estimated" in REMEDY.replace("\n", " ")


def test_shares_of_examples_for_a_fixed_mixture(tmp_path: Path, hub: Path) -> None:
    """The command that the headers of fixed mixtures offer."""
    for config in (config for config in MOS if NAMES[config].strategy in STATIC):
        header = WRITTEN[f"{config}.yaml"].partition("\n\n")[0]
        assert re.findall(r"^# +(tune run .*)$", header, re.MULTILINE)[1:] == [
            f"tune run sft_full_finetune --config yaml/{config}.yaml sampling=example"
        ]
    options = ["budget.epochs=3", "validate_every=0", "checkpoint_every=0", "sampling=example"]
    done = finished(config, *tiny(config, hub), *options, output_dir=tmp_path / "run")
    assert done.summary["probabilities"] == dict.fromkeys(DATASETS, 0.25)


@pytest.mark.parametrize("model", ["qwen1_5_0_5b", *slow_but([], ["gemma_2b", "llama3_8b"])])
def test_the_base_model_with_vicunas_template(hub: Path, run: Runner, model: str) -> None:
    """By the overrides that the header offers; here the base model is one without a template of its own."""
    config = f"{model}_mos_diff_3ep"
    header = WRITTEN[f"{config}.yaml"].partition("\n\n")[0]
    download, *overrides = re.search(r"# Base: .*\n((?:#   .*\n)+)", header).group(1).replace("#", "").splitlines()
    overrides = " ".join(overrides).split()
    folder = Path(overrides[0].removeprefix("tokenizer.path="))
    assert re.search(rf"^ +tune download \S+/{folder.name} --output-dir {folder}( |$)", download)
    small = tiny(config, hub, batch_size=2)
    Path("models").unlink()
    shutil.copytree(hub / downloaded(model), folder)
    (folder / "chat_template.jinja").unlink()
    write_tokenizer(folder, eos_token="<end>", chat_template=None)
    Path("yaml").symlink_to(ROOT / "yaml")
    loaded = load(load_recipe("mos_full_finetune").Config, CONFIGS[config], [*small, *overrides])
    with pytest.raises(ValueError, match=r"^tokenizer.path: "):
        ChatTokenizer(folder)
    tokenizer = loaded.tokenizer.build()
    ids, [(first, end)] = tokenizer.encode(data.Conversation(messages("is it?", "yes"), (1,)))
    text = AutoTokenizer.from_pretrained(folder).decode(ids)
    assert text.startswith("A chat between") and text.endswith(" USER: is it? ASSISTANT: yes<end>")
    done = run(config, *small, *overrides, "budget.tokens=12")
    assert done.summary["mixture_updates"] == 1
    assert "USER: " in AutoTokenizer.from_pretrained(done.folder / "model").chat_template


@pytest.mark.slow
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
