"""Shipped configs without any file to read: random token ids and random weights."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import Any

import yaml
from common import CONFIGS, load_recipe
from torch import nn

from adapt_recipes import data
from adapt_recipes.config import load
from adapt_recipes.strict import locate

PAD_ID = 0

# Of the data: examples per task, examples per task that an update measures on, tokens of an example, token ids.
FULL = {"num_examples": 200, "probe_examples": 16, "median": 150, "vocab_size": 32_000}
TINY = {"num_examples": 20, "probe_examples": 2, "median": 12, "vocab_size": 256}

TINY_CONFIG = {"device": "cpu", "max_seq_len": 64, "batch_size": 16, "micro_batch_tokens": 128}
TINY_SIZES = {"vocab_size": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
TINY_SIZES |= {"intermediate_dim": 64, "max_seq_len": 128}
TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama3_2_1b": {"_component_": "torchtune.models.llama3_2.llama3_2"},
    "gemma3_1b": {"_component_": "adapt_recipes.models.gemma3", "head_dim": 8}
    | {"sliding_window": 16, "sliding_window_pattern": 2},
    "qwen3_0_6b": {"_component_": "adapt_recipes.models.qwen3", "head_dim": 8, "tie_word_embeddings": True},
}


def shipped(
    model: str, *, folder: Path, tiny: bool, supervised: float, mixture_of: str | None = None, **changes: Any
) -> tuple[Any, Any]:
    """The module of a recipe, and its config: ``MODEL_uniform_10pct`` with random weights and data.

    Args:
        model: in the name of a shipped config.
        folder: for the run, the cache and the config.
        tiny: tiny models on the CPU.
        supervised: share of the supervised tokens.
        mixture_of: the name of the config that recipe, mixture and reward are from; default: the same.
        changes: keys of the config, and their values.
    """
    sizes = TINY if tiny else FULL
    config = yaml.safe_load((CONFIGS / f"{model}_uniform_10pct.yaml").read_text())
    # Other libraries' steps have so many examples.
    del config["batch_tokens"]
    config["batch_size"] = 64
    if tiny:
        config |= TINY_CONFIG | {"model": TINY_SIZES | TINY_MODELS[model]}
    if mixture_of:
        other = yaml.safe_load((CONFIGS / f"{mixture_of}.yaml").read_text())
        config |= {key: other[key] for key in ("recipe", "strategy", "mixture", "reward") if key in other}
        config["probe"] = {"examples": sizes["probe_examples"]}
        if "specialist" in config.get("reward", {}):
            config["reward"]["specialist"] = "task0"
    builder = config["model"].pop("_component_")
    config["model"] |= {"_component_": "synthetic.random_decoder", "builder": builder}
    config["checkpointer"]["checkpoint_dir"] = None
    config["tokenizer"] = {"_component_": "synthetic.Integers", "vocab_size": sizes["vocab_size"]}
    config["tasks"] = {
        "_component_": "synthetic.tasks",
        "num_tasks": 10,
        "num_examples": sizes["num_examples"],
        "max_seq_len": config["max_seq_len"],
        "median": sizes["median"],
        "supervised": supervised,
        "validation_examples": sizes["probe_examples"],
        "cache_dir": str(folder / "cache"),
    }
    config["budget"] = {"epochs": 10**6}
    config |= {"output_dir": tempfile.mkdtemp(dir=folder), "resume": False, "log_every": 0} | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    module: Any = load_recipe(path)
    return module, load(module.Config, path)


def tasks(*, num_tasks: int, num_examples: int, max_seq_len: int, median: int, supervised: float) -> list[data.RawTask]:
    """A ``tasks._component_`` for the tokenizer ``Integers``: a message is the number and the length of an example.

    Args:
        num_tasks: all with the same distribution of lengths.
        num_examples: of each task.
        max_seq_len: tokens of the longest example.
        median: tokens of an example; lengths are log-normal, as wide as those of Natural Instructions.
        supervised: share of the supervised tokens; uniform between 0 and twice this in each example.
    """
    rng = random.Random(0)
    raw_tasks = []
    for task in range(num_tasks):
        conversations: list[Any] = []
        for number in range(task * num_examples, (task + 1) * num_examples):
            length = min(max_seq_len, max(8, round(rng.lognormvariate(math.log(median), 0.7))))
            answer = min(length - 1, max(1, round(length * supervised * rng.uniform(0, 2))))
            contents = {"user": f"{number} {length - answer}", "assistant": f"{number} {answer}"}
            conversations.append([{"role": role, "content": content} for role, content in contents.items()])
        raw_tasks.append(data.RawTask(f"task{task}", conversations))
    return raw_tasks


class Integers:
    """A ``tokenizer._component_``: random token ids, as many as the messages of ``tasks`` say."""

    eos_ids, pad_id = (PAD_ID,), PAD_ID

    def __init__(self, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.fingerprint = f"integers below {vocab_size}"

    def encode(self, conversation: data.Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        """The same ids for the same example, none of which is the padding, and the span of the answer."""
        (number, prompt), (_, answer) = (map(int, each["content"].split()) for each in conversation.messages)
        ids = random.Random(number).choices(range(PAD_ID + 1, self.vocab_size), k=prompt + answer)
        return ids, [(prompt, prompt + answer)]


def random_decoder(builder: str, **arguments: Any) -> nn.Module:
    """A ``model._component_``: the random weights of a builder, with embeddings as small as those of trained models.

    torch's have a deviation of 1; with the head tied to them the first losses would be hundreds of nats.
    """
    decoder = locate(builder)(**arguments)
    nn.init.normal_(decoder.tok_embeddings.weight, std=0.02)
    return decoder
