"""A tiny decoder, examples of several tasks, and what torchtune's own forward makes of one of them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2

from adapt_recipes.data import IGNORE_INDEX, Example, MicroBatch, micro_batches
from adapt_recipes.models import TokenLosses

VOCAB = 48
NAMES = ["a", "b", "c", "d"]


def tiny_model(
    *, seed: int = 0, compute_dtype: torch.dtype | None = None, lora_dropout: float | None = None, **changes: float
) -> TokenLosses:
    """A Llama whose norms are not all 1; with ``lora_dropout`` one with adapters, none of which is 0."""
    sizes = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 16,
        "intermediate_dim": 24,
        "max_seq_len": 64,
        **changes,
    }
    if lora_dropout is None:
        decoder = llama3_2(**sizes)  # type: ignore[arg-type]
    else:
        adapters = {"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": lora_dropout}
        decoder = lora_llama3_2(["q_proj", "v_proj"], True, **sizes, **adapters)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return TokenLosses(decoder, compute_dtype=compute_dtype)


def tiny_examples(counts: Sequence[int] = (3, 1, 4, 2), *, seed: int) -> list[tuple[int, Example]]:
    """``counts[i]`` examples of task i, of many lengths, in any order; of some, two stretches are supervised."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for task in [task for task, count in enumerate(counts) for _ in range(count)]:
        length = int(torch.randint(5, 15, (), generator=generator))
        rendered = torch.randint(VOCAB, (length + 1,), generator=generator)
        answer = int(torch.randint(1, 4, (), generator=generator))
        labels = rendered[1:].clone()
        labels[: length - answer] = IGNORE_INDEX
        if length > 9:  # an answer in the middle of the conversation
            labels[2:4] = rendered[3:5]
        examples.append((task, Example(rendered[:-1], labels)))
    return [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]


def batched(examples: Sequence[tuple[int, Example]], *, max_tokens: int = 40) -> list[MicroBatch]:
    return micro_batches([example for _, example in examples], [task for task, _ in examples], max_tokens=max_tokens)


def alone(model: TokenLosses, example: Example) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, logits) of the supervised positions, and the states behind the final norm, of one unpadded example."""
    states: list[Tensor] = []
    hook = model.decoder.norm.register_forward_hook(lambda module, arguments, output: states.append(output))
    was_training = model.training
    logits = model.eval().decoder(example.tokens[None])[0]
    model.train(was_training)
    hook.remove()
    kept = example.labels != IGNORE_INDEX
    return F.cross_entropy(logits[kept], example.labels[kept], reduction="none"), logits[kept], states[0][0]


def likeliest(logits: Tensor) -> tuple[list[float], list[float]]:
    """At each position the probability of the likeliest token, and the entropy in nats, by the formulas."""
    rows = [[math.exp(x) for x in row] for row in logits.tolist()]
    shares = [[x / sum(row) for x in row] for row in rows]
    return [max(row) for row in shares], [-sum(q * math.log(q) for q in row) for row in shares]
