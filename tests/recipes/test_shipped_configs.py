"""Every shipped config that names a real model and real data runs to its end on a tiny model and a few examples."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Runner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapt_recipes.config import load, to_dict
from adapt_recipes.data import IGNORE_INDEX, ChatTokenizer

REAL = sorted(path.stem for path in (ROOT / "yaml").glob("*.yaml") if not path.stem.startswith("tiny_"))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def model_and_data(tmp_path: Path) -> Path:
    """What the configs expect in the current folder: a model of 0.03M parameters, and a few examples of each type."""
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the answer is yes or no", "user assistant question answer"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_key_value_heads, config.tie_word_embeddings, config.max_position_embeddings = 2, True, 1024
    LlamaForCausalLM(config).save_pretrained(folder)

    tasks = tmp_path / "data" / "natural-instructions" / "tasks"
    tasks.mkdir(parents=True)
    rng = random.Random(0)
    types = (
        "Question Answering",
        "Sentiment Analysis",
        "Information Extraction",
        "Summarization",
        "Dialogue Generation",
    )
    for number, category in enumerate(types):
        instances = [
            {
                "id": str(i),
                "input": f"{category} {i} " + "x" * rng.randint(0, 40),
                "output": [rng.choice(["yes", "no"])],
            }
            for i in range(160)
        ]
        worked = [{"input": "is it?", "output": "yes", "explanation": "it is"}]
        content = {"Definition": ["Answer."], "Categories": [category], "Positive Examples": worked}
        content["Instances"] = instances
        (tasks / f"task{number}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("config", REAL)
def test_runs(run: Runner, model_and_data: Path, config: str) -> None:
    cadence = ["mixture_update_every=2"] if "adapt" in config else []
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


@pytest.mark.parametrize("path", sorted((ROOT / "yaml").glob("*.yaml")), ids=lambda path: path.stem)
def test_its_name_tells_the_truth(path: Path, adapt_full_finetune, sft_full_finetune) -> None:
    recipe = path.read_text().split()[3]
    module = {"adapt_full_finetune": adapt_full_finetune, "sft_full_finetune": sft_full_finetune}[recipe]
    config = load(module.Config, path)
    component = {"adapt": "Adapt", "adapt_planned": "AdaptPlanned", "fixed": "fixed_weights"}
    assert config.mixture.component.split(".")[-1] == component.get(config.strategy, config.strategy)
    assert config.output_dir == f"runs/{path.stem}"
    model, _, rest = path.stem.partition("_") if path.stem.startswith("tiny") else ("smollm2", "", path.stem[13:])
    strategy, _, budget = rest.rpartition("_") if rest.endswith("pct") else (rest, "", "")
    assert strategy == config.strategy
    if budget:
        assert config.budget.fraction == int(budget.removesuffix("pct")) / 100
    assert load(module.Config, path, [f"{key}={value}" for key, value in (("seed", 1),)]).seed == 1
    assert to_dict(config)["mixture"]["_component_"] == config.mixture.component


def test_natural_instructions_by_file_with_examples(run: Runner, model_and_data: Path) -> None:
    options = ("tasks.group_by=file", "tasks.num_positive_examples=1", "tasks.all_outputs=true")
    done = run("smollm2_135m_uniform_10pct", *options, "budget.tokens=50", "device=cpu")
    assert set(done.summary["task_tokens"]) == {f"task{i}" for i in range(5)}
