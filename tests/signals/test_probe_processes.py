"""What probes and rewards measure on two processes, which share examples and weights, is what one process measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import group
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchtune.models.llama3_2 import llama3_2

from adapt_recipes.data import IGNORE_INDEX, Example, MicroBatch, micro_batches
from adapt_recipes.models import TokenLosses
from adapt_recipes.signals import BaseWeights, passes, rewards
from adapt_recipes.signals.ksteps import kstep_differences, last_layers
from adapt_recipes.training.process_group import process_group, rank, world_size
from adapt_recipes.training.sharding import full_tensor, shard, to_local

pytestmark = pytest.mark.slow

TASKS = ["long", "short", "absent", "both", "single"]
N = len(TASKS)
WEIGHTS = torch.tensor([0.3, 0.1, 0.2, 0.4, 0.0], dtype=torch.float64)


def make_model(kind: str = "resharded") -> TokenLosses:
    torch.manual_seed(0)
    decoder = llama3_2(
        vocab_size=65,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        intermediate_dim=49,
        max_seq_len=64,
        scale_factor=1,
    )
    for name, parameter in decoder.named_parameters():
        if "scale" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.2)
    model = TokenLosses(decoder)
    if kind == "kept":  # everything stays gathered after a forward, unless the probe sees to it
        for module in (*decoder.layers, model):
            fully_shard(module, reshard_after_forward=False)
    else:
        shard(model, decoder.layers, device=torch.device("cpu"))
    return model


# Lengths of each task's examples, so that a process lacks some tasks. Those of more than half a forward are computed
# alone, and where there are odd many of them, somebody has none in the end.
TRAIN = {0: [30, 26], 1: [4, 3, 5, 4, 3], 2: [14], 3: [28, 12, 9, 3, 4, 21], 4: [17]}
VALIDATION = {0: [30, 26], 1: [20], 3: [28, 24, 21], 4: [17]}
POOL = {0: [16, 17], 1: [18], 2: [19, 20], 3: [31], 4: [30, 29, 28]}


def make_batches(kinds: dict[int, list[int]]) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(len(kinds))
    examples, tasks = [], []
    for task, lengths in kinds.items():
        for length in lengths:
            tokens, labels = torch.randint(65, (2, length), generator=generator)
            labels[torch.rand(length, generator=generator) < 0.4] = IGNORE_INDEX
            labels[-1] = 7
            examples.append(Example(tokens, labels))
            tasks.append(task)
    return micro_batches(examples, tasks, max_tokens=31, rank=rank(), world_size=world_size())


def with_matches(model: nn.Module, batches: list[MicroBatch]) -> list[MicroBatch]:
    """In every other example the labels become the likeliest tokens."""
    changed = []
    for batch in batches:
        with torch.no_grad():
            likeliest = model(batch.tokens, batch.labels, "logits").argmax(-1)
        labels = batch.labels.masked_scatter(batch.labels != IGNORE_INDEX, likeliest)
        changed.append(batch._replace(labels=labels.where(batch.rows[:, None] % 2 == 0, batch.labels)))
    return changed


def of_last_layer(model: Any, train: list[list[MicroBatch]], validation: list[MicroBatch]) -> Tensor:
    with passes.only_trained(model, last_layers(model, 1)):
        return kstep_differences(model, train, validation, WEIGHTS, WEIGHTS, learning_rate=0.1, validation_weight=0.5)


def measure(model: nn.Module) -> dict[str, Any]:
    """Everything, as whole tensors. It leaves the weights as they were, to the bit."""
    validation, train, pool = make_batches(VALIDATION), make_batches(TRAIN), make_batches(POOL)
    before = [to_local(parameter).detach().clone() for parameter in model.parameters()]
    base = BaseWeights(model)
    v = passes.loss_gradient(model, validation, WEIGHTS)
    measured: dict[str, Any] = {
        "losses": passes.task_losses(model, validation, N),
        "exact match": passes.task_scores(model, with_matches(model, pool), N).exact_match,
        "gradient": torch.cat([full_tensor(part).flatten() for part in v]),
        "dots": passes.gradient_dots(model, train, v, N, relative_step=1e-3),
        "dots by backward": passes.gradient_dots_by_backward(model, train, v, N),
        "K-step differences": kstep_differences(
            model, [train, pool], validation, WEIGHTS, WEIGHTS, learning_rate=0.1, validation_weight=0.5
        ),
        "K-step differences of the last layer": of_last_layer(model, [train, pool], validation),
        "gradient moments": torch.stack(passes.gradient_moments(model, [train, pool], N)),
        "step gains": passes.step_gains(
            model, [make_batches({task: lengths}) for task, lengths in TRAIN.items()], learning_rate=0.5
        ),
        "embeddings": passes.task_embeddings(model, validation, N),
        "example losses": passes.example_losses(model, pool),
        "losses of all tokens": passes.example_losses(model, pool, tokens="all"),
        "gradient norms": passes.example_gradient_norms(model, train),
        "gradient norms of all tokens": passes.example_gradient_norms(model, pool, tokens="all"),
        "uncertainties": passes.example_uncertainties(model, validation, rewards.MEASURES["EntSent"]),
    }
    arguments: dict[str, Any] = {"task_names": TASKS, "model": model}
    with passes.stepped(model, v, -0.05):
        measured["losses ahead"] = passes.task_losses(model, validation, N)
        measured["embeddings ahead"] = passes.task_embeddings(model, train, N)
        with base.loaded_into(model):
            measured["base losses"] = passes.example_losses(model, pool)
            assert torch.equal(measured["base losses"], measured["example losses"])
        measured["fresh"] = rewards.PerplexityRatio(**arguments, examples="fresh")(
            train=pool, base_losses=measured["base losses"]
        )
    base_losses = measured["example losses"] + torch.arange(len(measured["example losses"])) / 10
    measured |= {
        "CosineSimilarity": rewards.CosineSimilarity(**arguments)(train=train),
        "MoSpec": rewards.CosineSimilarity(**arguments, specialist="both")(train=train),
        "PerplexityRatio": rewards.PerplexityRatio(**arguments)(pool=pool, base_losses=base_losses),
        "GradientAlignment": rewards.GradientAlignment(**arguments)(validation=validation, train=train),
        "Uncertainty": rewards.Uncertainty(**arguments, measure="ExpTP")(validation=validation),
        "GradientNorm": rewards.GradientNorm(**arguments)(train=train),
    }
    for parameter, original in zip(model.parameters(), before, strict=True):
        assert torch.equal(to_local(parameter), original) and parameter.grad is None
    return measured


def measured(folder: Path) -> dict[str, Any]:
    with process_group("cpu", batch_size=2):
        result: dict[str, Any] = {kind: measure(make_model(kind)) for kind in ("resharded", "kept")}
        for name, kinds in {"train": TRAIN, "validation": VALIDATION, "pool": POOL}.items():
            rows = [batch.rows.tolist() for batch in make_batches(kinds)]
            tasks = [batch.tasks[batch.rows >= 0] for batch in make_batches(kinds)]
            result[name] = {"rows": rows, "tasks": set(torch.cat(tasks).tolist())}
        return result


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    ended = group.run((measured,), tmp_path_factory.mktemp("group"))["measured"]
    assert [each.status for each in ended] == [0, 0], ended[0].err + ended[1].err
    return [each.result for each in ended]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return measure(make_model())


def test_the_processes_differ_in_what_they_bring(ended: list[dict[str, Any]]) -> None:
    """Otherwise the tests below would prove little."""
    first, second = ended
    for name in ("train", "validation", "pool"):
        assert len(first[name]["rows"]) == len(second[name]["rows"]) > 2
        assert first[name]["tasks"] != second[name]["tasks"]
    for name in ("validation", "pool"):
        assert [-1] in first[name]["rows"] + second[name]["rows"]


@pytest.mark.parametrize("kind", ["resharded", "kept"])
@pytest.mark.parametrize(
    "name",
    [
        "losses",
        "losses ahead",
        "exact match",
        "gradient",
        "dots",
        "dots by backward",
        "K-step differences",
        "K-step differences of the last layer",
        "gradient moments",
        "step gains",
        "embeddings",
        "embeddings ahead",
        "example losses",
        "losses of all tokens",
        "base losses",
        "fresh",
        "gradient norms",
        "gradient norms of all tokens",
        "uncertainties",
        "CosineSimilarity",
        "MoSpec",
        "PerplexityRatio",
        "GradientAlignment",
        "Uncertainty",
        "GradientNorm",
    ],
)
def test_two_processes_measure_what_one_does(
    ended: list[dict[str, Any]], alone: dict[str, Tensor], kind: str, name: str
) -> None:
    first, second = (each[kind][name] for each in ended)
    assert torch.equal(first.nan_to_num(nan=9.0), second.nan_to_num(nan=9.0)), "the same bits on all processes"
    scale = float(alone[name].nan_to_num().abs().max())
    torch.testing.assert_close(first, alone[name], rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
    spread = alone[name][~alone[name].isnan()]
    assert spread.numel() > 1 and float(spread.max() - spread.min()) > 0.01 * scale


@pytest.mark.parametrize("kind", ["resharded", "kept"])
def test_two_forwards_give_the_dots_of_one_backward_a_task(ended: list[dict[str, Any]], kind: str) -> None:
    measured = ended[0][kind]
    scale = float(measured["dots by backward"].nan_to_num().abs().max())
    torch.testing.assert_close(
        measured["dots"], measured["dots by backward"], rtol=0, atol=1e-3 * scale, equal_nan=True
    )


def test_the_step_shows(alone: dict[str, Tensor]) -> None:
    assert (alone["losses ahead"] - alone["losses"]).nan_to_num().abs().max() > 0.01
    assert alone["losses"].isnan().tolist() == [task == "absent" for task in TASKS]
