"""Precision and speed switches: a run with each goes through and says the same; what cannot work is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Runs, events, load_checkpoint
from test_processes import Job, in_two
from torchtune.models.llama3_2 import llama3_2

from adapt_recipes.models import TokenLosses

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, and there is none")

# A learned mixture, so that the probes go through the switches as well. Without dropout: some draw it in another order.
SETTINGS = {
    "optimizer": "{_component_: torch.optim.AdamW, lr: 3.0e-3}",
    "model.attn_dropout": 0.0,
    "mixture_update_every": 2,
    "budget.tokens": 100,
    "validate_every": 0,
}
MEMORY = {"activation_checkpointing": "true", "activation_offloading": "true", "loss_chunk_tokens": 3}
# What a run is like with it, and how far its losses may lie from those of a run without.
SWITCHES: dict[str, tuple[dict[str, Any], float]] = {
    "activation_checkpointing": ({"activation_checkpointing": "true"}, 1e-6),
    "activation_offloading": ({"activation_checkpointing": "true", "activation_offloading": "true"}, 1e-6),
    "loss_chunk_tokens": ({"loss_chunk_tokens": 3}, 1e-5),
    "all three": (MEMORY, 1e-5),
    "fused": ({"optimizer": "{_component_: torch.optim.AdamW, lr: 3.0e-3, fused: true}"}, 1e-4),
    "async_checkpointing": ({"async_checkpointing": "true"}, 1e-7),
    "bf16": ({"dtype": "bf16"}, 0.1),
    "bf16 with all three": ({"dtype": "bf16"} | MEMORY, 0.1),
    "pure_bf16": ({"dtype": "pure_bf16"}, 0.3),
}
ON_TWO = {"none": ({}, 1e-5), "fsdp_cpu_offload": ({"fsdp_cpu_offload": "true"}, 1e-5)} | SWITCHES
COMPILED: dict[str, tuple[dict[str, Any], float]] = {
    "compile": ({"compile": "true"}, 1e-4),
    "8 bits": ({"optimizer": "{_component_: torchao.optim.AdamW8bit, lr: 3.0e-3}"}, 1e-2),
}


@pytest.fixture(scope="module")
def expected(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert runs.run("adapt_planned", folder, **SETTINGS) == 0
    return losses(folder)


def losses(folder: Path) -> list[float]:
    """Of the steps, and those that the mixture updates saw."""
    values = []
    for event in events(folder):
        values += [event["loss"]] if event["event"] == "step" else []
        values += event["validation_losses"].values() if "validation_losses" in event else []
    return [value for value in values if value is not None]


def assert_close(folder: Path, expected: list[float], within: float) -> None:
    # From the fourth step on rounding may have moved the mixture, and with it the examples.
    torch.testing.assert_close(losses(folder)[:8], expected[:8], rtol=0, atol=within)


@pytest.mark.parametrize(
    "name", [*SWITCHES, *(pytest.param(name, marks=[needs_compiler, pytest.mark.slow]) for name in COMPILED)]
)
def test_says_the_same_on_one_process(runs: Runs, expected: list[float], tmp_path: Path, name: str) -> None:
    changes, within = (SWITCHES | COMPILED)[name]
    assert runs.run("adapt_planned", tmp_path / "run", **SETTINGS | changes) == 0
    assert_close(tmp_path / "run", expected, within)


@pytest.fixture(scope="module")
def on_two(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        name: Job("adapt_planned", runs.argv("adapt_planned", folder / "runs" / name, **SETTINGS | changes))
        for name, (changes, _) in ON_TWO.items()
    }
    for name, ended in in_two(jobs, folder).items():
        assert [process["status"] for process in ended] == [0, 0], (name, ended[0]["err"], ended[1]["err"])
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_says_the_same_on_two(on_two: Path, expected: list[float], name: str) -> None:
    # Two processes sum in another order than one: never closer than without any switch.
    assert_close(on_two / name, expected, max(ON_TWO[name][1], ON_TWO["none"][1]))
    (checkpoint,) = (on_two / name / "checkpoints").iterdir()
    dtypes = {weight.dtype for weight in load_checkpoint(checkpoint)["model"].values()}
    assert dtypes == {torch.bfloat16 if name == "pure_bf16" else torch.float32}, "what the optimizer steps on"


# ---- what the switches are for


def decoder() -> Any:
    torch.manual_seed(0)
    return llama3_2(
        vocab_size=97, num_layers=3, num_heads=2, num_kv_heads=2, embed_dim=32, max_seq_len=16, intermediate_dim=64
    )


@pytest.fixture
def batch() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(97, (4, 12), generator=generator)
    labels = torch.where(torch.rand(4, 12, generator=generator) < 0.5, tokens.roll(-1, 1), -100)
    yield tokens, labels


def gradients(model: TokenLosses, batch: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    losses = model(*batch)
    losses.sum().backward()
    return [losses.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_are_the_whole_and_hold_fewer_logits(batch: tuple[torch.Tensor, torch.Tensor], chunk: int) -> None:
    """Nothing of the size of more logits than a chunk's is kept for the backward."""
    whole, chunked = TokenLosses(decoder()), TokenLosses(decoder(), loss_chunk_tokens=chunk)
    torch.testing.assert_close(gradients(chunked, batch), gradients(whole, batch), rtol=1e-5, atol=1e-6)
    logits = {(int((batch[1] != -100).sum()), 97)}
    for model, kept in ((whole, True), (chunked, False)):
        saved: set[tuple[int, ...]] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: saved.add(tuple(tensor.shape)), id):
            model(*batch)
        assert bool(logits & saved) == kept


def test_nothing_supervised_in_chunks(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, labels = batch
    losses = TokenLosses(decoder(), loss_chunk_tokens=2)(tokens, torch.full_like(labels, -100))
    losses.sum().backward()
    assert losses.shape == (0,)


def test_what_is_offloaded_is_the_input_of_each_layer(
    batch: tuple[torch.Tensor, torch.Tensor], runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[list[torch.Size]] = []

    class Counted(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            packed.append([])
            assert not pin_memory
            super().__init__(self.pack, lambda tensor: tensor)

        def pack(self, tensor: torch.Tensor) -> torch.Tensor:
            packed[-1].append(tensor.shape)
            return tensor

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    changes = {"activation_checkpointing": "true", "activation_offloading": "true", "budget.tokens": 8}
    settings = {key: value for key, value in SETTINGS.items() if key != "mixture_update_every"}
    assert runs.run("uniform", tmp_path / "run", **settings | changes) == 0
    trained = [shapes for shapes in packed if shapes]
    assert trained and all(len(shapes) == 2 and shapes[0] == shapes[1] for shapes in trained), "two layers"


# ---- what cannot work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_offloading": "true"}, "activation_offloading: needs activation_checkpointing; set both"),
        ({"fsdp_cpu_offload": "true"}, "fsdp_cpu_offload: needs several processes; start them with `tune run --nproc"),
        ({"loss_chunk_tokens": 0}, "loss_chunk_tokens: "),
        ({"dtype": "pure_bf16", "strategy": "dynamix"}, "dtype: pure_bf16 rounds the steps that the mixture observes"),
        ({"dtype": "pure_bf16", "strategy": "adapt"}, "dtype: pure_bf16 rounds the steps of finite differences away"),
    ],
)
def test_what_cannot_work_is_refused_at_start_up(
    runs: Runs, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    strategy = changes.pop("strategy", "adapt_planned")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        runs.run(strategy, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
