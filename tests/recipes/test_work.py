"""The work of a run, counted exactly: what would make it slower changes a number here, on any machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Runner
from torch.utils._python_dispatch import TorchDispatchMode

from adapt_recipes.models import TokenLosses

STEPS = 8
# Of the tiny model: two layers of nine weights, embeddings, norm and head.
WEIGHTS = 21
# All but the norms and the embeddings.
CAST_WEIGHTS = 15
# Copied when the model is saved.
ROUNDED = 25
# Of the seven toy tasks.
VALIDATION_EXAMPLES = 1792
VALIDATION_TOKENS = 912
COPIES = (torch.ops.aten.clone, torch.ops.aten._to_copy)


class Work(TorchDispatchMode):
    """Counts what the model computes, in training and in measuring.

    Attributes:
        counts: by what is counted and ``train`` or ``measure``: forwards, tokens computed, positions through the head,
            and copies of a weight, casts included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.weights: set[int] = set()
        self.phase = "measure"

    @contextmanager
    def watch(self) -> Iterator[Counter[str]]:
        forward = TokenLosses.forward

        def counted(model: TokenLosses, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
            if not self.weights:
                self.weights = {parameter.data_ptr() for parameter in model.parameters()}
                model.decoder.tok_embeddings.register_forward_pre_hook(self.hook("tokens"))
                model.decoder.output.register_forward_pre_hook(self.hook("head"))
            self.phase = "train" if model.training else "measure"
            self.counts[f"forwards, {self.phase}"] += 1
            return forward(model, tokens, *arguments)

        with mock.patch.object(TokenLosses, "forward", counted), self:
            yield self.counts

    def hook(self, name: str) -> Any:
        def count(_: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
            positions = given[0].numel() if name == "tokens" else given[0].numel() // given[0].shape[-1]
            self.counts[f"{name}, {self.phase}"] += positions

        return count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in COPIES and args[0].data_ptr() in self.weights:
            self.counts["copies of a weight"] += 1
        return func(*args, **kwargs or {})


def test_a_step_is_one_forward_without_padding_and_the_head_sees_supervised_positions_alone(run: Runner) -> None:
    with Work().watch() as counts:
        summary = run("tiny_uniform").summary
    assert summary["steps"] == STEPS and summary["validation_tokens"] == 2 * VALIDATION_EXAMPLES
    copies = counts.pop("copies of a weight")
    assert copies == ROUNDED
    assert counts == {
        "forwards, train": STEPS,
        "tokens, train": summary["computed_tokens"],
        "head, train": summary["supervised_tokens"],
        # Before and after training. Rows of three tokens: those of seven tasks begin alike.
        "forwards, measure": 2,
        "tokens, measure": 2 * VALIDATION_TOKENS,
        "head, measure": summary["validation_tokens"],
    }


@pytest.mark.parametrize(
    ("config", "at_start", "forwards", "copies"),
    [
        # Losses; gradient of the objective; two for the finite differences, for which the weights are copied once.
        ("tiny_adapt", 0, 4, 1),
        ("tiny_adapt_planned", 0, 1, 0),
        # The losses of the base model, at the start, or of other examples in each update, with its weights and back.
        ("tiny_mos_diff reward.tokens=answer reward.examples=fixed", 1, 1, 0),
        ("tiny_mos_diff reward.tokens=answer", 0, 2, 2),
    ],
)
def test_an_update_is_so_many_forwards(
    run: Runner, tmp_path: Path, config: str, at_start: int, forwards: int, copies: int
) -> None:
    with Work().watch() as plain:
        run("tiny_uniform", folder="uniform")
    # The losses of the base model may be in the cache that tests share.
    with Work().watch() as counts:
        summary = run(*config.split(), f"tasks.cache_dir={tmp_path / 'cache'}").summary
    updates = summary["mixture_updates"]
    assert updates == 2
    assert counts["forwards, train"] == STEPS and counts["tokens, train"] == summary["computed_tokens"]
    assert counts["forwards, measure"] == 2 + at_start + updates * forwards
    assert counts["head, measure"] == summary["probe_tokens"] + summary["validation_tokens"]
    read = summary["probe_total_tokens"] + summary["validation_total_tokens"]
    assert counts["tokens, measure"] < 0.7 * read, "examples of a task begin alike"
    assert counts["copies of a weight"] - plain["copies of a weight"] == updates * copies * WEIGHTS


def test_weights_are_cast_once_per_step_however_many_micro_batches(run: Runner) -> None:
    casts = []
    for max_tokens in (4096, 16):
        with Work().watch() as counts:
            run("tiny_uniform", "dtype=bf16", f"micro_batch_tokens={max_tokens}", folder=f"{max_tokens} tokens")
        casts.append(counts["copies of a weight"])
    assert casts[0] == casts[1] == CAST_WEIGHTS * (STEPS + 2) + ROUNDED


def test_no_graph_is_compiled_again(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    graphs = []
    for steps in (4, 12):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run("tiny_uniform", "compile=true", f"budget.tokens={16 * steps}", folder=f"{steps} steps")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # The four parts of a layer around attention, for one number of tokens and for any.
    assert graphs == [8, 8]
