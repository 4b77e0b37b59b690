"""Two processes that share a model's weights train it as one process does that has them all."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import group
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune import training
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from adapt_recipes.data import IGNORE_INDEX, Example, micro_batches
from adapt_recipes.models import TokenLosses, train_adapters_alone
from adapt_recipes.training.process_group import all_gather_object, all_reduce_sum, process_group, rank, world_size
from adapt_recipes.training.sharding import clip_grad_norm, full_tensor, load_weights, on_meta, shard, to_local

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# 65 and 3 rows cannot be cut in two equal parts; one row leaves the second process nothing.
SIZES: dict[str, Any] = {
    "vocab_size": 65,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 49,
    "max_seq_len": 32,
    "scale_factor": 1,
}
LORA: dict[str, Any] = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_alpha": 8.0}

MODELS: dict[str, Any] = {
    "tied": lambda: llama3_2(**SIZES),
    "untied": lambda: llama3_2(**SIZES, tie_word_embeddings=False),
    "adapters of rank 3": lambda: lora_llama3_2(**SIZES, **LORA, lora_rank=3, apply_lora_to_mlp=True),
    "adapters of rank 1": lambda: lora_llama3_2(**SIZES, **LORA, lora_rank=1),
}
CASES: dict[str, dict[str, Any]] = {
    "tied": {"model": "tied", "num_steps": 30},
    "untied": {"model": "untied"},
    "checkpointed": {"model": "tied", "checkpointed": True, "num_steps": 30},
    "adapters": {"model": "adapters of rank 3"},
    "adapters of one row": {"model": "adapters of rank 1"},
    "half": {"model": "tied", "compute_dtype": torch.bfloat16, "num_steps": 4},
    "half checkpointed": {"model": "tied", "compute_dtype": torch.bfloat16, "checkpointed": True, "num_steps": 4},
}


def build(model: str, *, checkpointed: bool = False, compute_dtype: torch.dtype | None = None) -> TokenLosses:
    torch.manual_seed(0)
    decoder = MODELS[model]()
    train_adapters_alone(decoder)
    if checkpointed:
        training.set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    losses = TokenLosses(decoder, compute_dtype=compute_dtype).train()
    shard(losses, decoder.layers, device=CPU)
    return losses


def steps(num_steps: int) -> Iterator[tuple[list[Example], list[int]]]:
    """Most of eight examples of three tasks, some awkward to share."""
    generator = torch.Generator().manual_seed(1)
    for step in range(num_steps):
        examples, tasks = [], []
        for i in range({3: 3, 7: 1}.get(step, 8)):  # two for one process and one for the other; one for one alone
            length = int(torch.randint(2, 25, (), generator=generator))
            tokens = torch.randint(65, (2, length), generator=generator)
            labels = tokens[1].masked_fill(torch.rand(length, generator=generator) < 0.5, IGNORE_INDEX)
            labels[-1] = tokens[1, -1]
            if step == 11:  # one supervised token in all
                labels[: -1 if i == 5 else None] = IGNORE_INDEX
            examples.append(Example(tokens[0], labels))
            tasks.append(2 if i == 0 and step % 2 else i % 2)  # which is on one process, or nowhere
        yield examples, tasks


def train(*, num_steps: int = 12, **arguments: Any) -> dict[str, Any]:
    """A recipe's loop. What it leaves: losses by task, norms, and whole weights."""
    model = build(**arguments)
    first = {name: full_tensor(weight).clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    losses, norms, forwards = [], [], []
    for examples, tasks in steps(num_steps):
        batches = micro_batches(examples, tasks, max_tokens=60, rank=rank(), world_size=world_size())
        num_supervised = sum(batch.num_supervised_tokens for batch in batches)
        loss_sums = torch.zeros(3, dtype=torch.float64)
        with model.autocast():
            for batch in batches:
                each = model(batch.tokens, batch.labels)
                (each.sum() * world_size() / num_supervised).backward()
                loss_sums.index_add_(0, batch.supervised_tasks, each.detach().double())
        norms.append(clip_grad_norm(model.parameters(), 1.0))
        losses.append(all_reduce_sum(loss_sums) / num_supervised)
        forwards.append(len(batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {
        "first": first,
        "weights": {name: full_tensor(weight).clone() for name, weight in model.state_dict().items()},
        "losses": torch.stack(losses),
        "norms": torch.tensor(norms),
        "forwards": forwards,
        "own": sum(to_local(weight).numel() for weight in model.state_dict().values()),
        "all": sum(weight.numel() for weight in model.state_dict().values()),
    }


def trained(folder: Path) -> dict[str, Any]:
    with process_group("cpu", batch_size=8):
        return {case: train(**arguments) for case, arguments in CASES.items()}


def loaded(folder: Path) -> dict[str, Any]:
    with process_group("cpu", batch_size=8):
        return {model: load(model) for model in MODELS} | {"gathered": gathered_layers()}


def gathered_layers() -> list[list[bool]]:
    """Which layers are whole while each computes, and at last after the forward, the root as the last of them."""
    model = build("tied")
    parts = [*model.decoder.layers, model.decoder.norm]
    seen: list[list[bool]] = []

    def look(*ignored: Any) -> None:
        seen.append([not isinstance(next(part.parameters()), DTensor) for part in parts])

    for layer in model.decoder.layers:
        layer.attn.register_forward_pre_hook(look)
    model(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)).sum()
    look()
    return seen


class Asked(Mapping[str, Tensor]):
    """Weights that are read when they are asked for, one at a time: the one before has to be gone by then."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights, self.last = weights, lambda: None

    def __getitem__(self, name: str) -> Tensor:
        assert self.last() is None, "two weights in memory"
        weight = self.weights[name].clone()
        self.last = weakref.ref(weight)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def load(model: str, *, seed: int = 3) -> dict[str, Tensor]:
    """Of a decoder built without weights: what it holds after the loading, whole."""
    weights = given(model)
    state = torch.get_rng_state()
    with on_meta():
        decoder = MODELS[model]()
    assert torch.equal(torch.get_rng_state(), state), "no random number was drawn"
    assert all(parameter.is_meta for parameter in decoder.parameters())
    train_adapters_alone(decoder)
    shard(decoder, decoder.layers, device=CPU)
    load_weights(decoder, Asked(weights), seed=seed)
    buffers, expected = dict(decoder.named_buffers()), dict(MODELS[model]().named_buffers())
    assert buffers and all(torch.equal(buffers[name], expected[name]) for name in expected), "the rotations"
    assert all(isinstance(parameter, DTensor) == (world_size() > 1) for parameter in decoder.parameters())
    return {name: full_tensor(weight).clone() for name, weight in decoder.state_dict().items()}


def given(model: str) -> dict[str, Tensor]:
    """A folder's weights: all but adapters, and in half precision."""
    generator = torch.Generator().manual_seed(2)
    decoder: TransformerDecoder = MODELS[model]()
    return {
        name: torch.randn(weight.shape, generator=generator).bfloat16()
        for name, weight in decoder.state_dict().items()
        if "lora" not in name
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[group.Ended]]:
    ended = group.run((trained, loaded), tmp_path_factory.mktemp("group"))
    for each in (*ended["trained"], *ended["loaded"]):
        assert each.status == 0, each.err
    return ended


@pytest.mark.parametrize("case", [case for case in CASES if "half" not in case])
def test_two_processes_train_as_one_does(ended: dict[str, list[group.Ended]], case: str) -> None:
    alone, (first, second) = train(**CASES[case]), (each.result[case] for each in ended["trained"])
    assert first["forwards"] == second["forwards"]
    for name, weight in alone["weights"].items():
        assert torch.equal(first["first"][name], alone["first"][name]), f"{name}: drawn as on one process"
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-5)
        assert torch.equal(first["weights"][name], second["weights"][name])
    for name in ("losses", "norms"):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(first[name], second[name]), "the same bits on all processes"
    moved = [(alone["weights"][name] - alone["first"][name]).abs().max() for name in alone["weights"]]
    assert max(moved) > 0.05 and (alone["norms"] > 1).any()


@pytest.mark.parametrize("case", [case for case in CASES if "half" in case])
def test_two_processes_train_as_one_does_in_half_precision(ended: dict[str, list[group.Ended]], case: str) -> None:
    """A weight's cast that autocast keeps from one forward to the next would lose the gradient of the second."""
    alone, first = train(**CASES[case]), ended["trained"][0].result[case]
    torch.testing.assert_close(first["norms"][:3], alone["norms"][:3], rtol=0.02, atol=0)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=0.02, atol=0.02)


def test_every_process_holds_its_part_only(ended: dict[str, list[group.Ended]]) -> None:
    first, second = (each.result["tied"] for each in ended["trained"])
    assert first["own"] + second["own"] == first["all"]
    assert abs(first["own"] - second["own"]) < 0.03 * first["all"]


def test_a_layer_is_whole_only_while_it_computes(ended: dict[str, list[group.Ended]]) -> None:
    for each in ended["loaded"]:
        assert each.result["gathered"] == [[True, False, True], [False, True, True], [False, False, False]]


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_loaded_row_by_row(ended: dict[str, list[group.Ended]], model: str) -> None:
    alone, weights = load(model), given(model)
    for each in ended["loaded"]:
        for name, weight in each.result[model].items():
            assert weight.dtype == torch.float32 and torch.equal(weight, alone[name]), name
            if name in weights:
                assert torch.equal(weight, weights[name].float())
            else:
                assert (weight.abs().max() > 0) == ("lora_a" in name), "an adapter starts at 0"


def test_adapters_are_drawn_as_torchtune_draws_them() -> None:
    """From the same distribution, by layer and seed."""
    first, second = load("adapters of rank 3"), load("adapters of rank 3")
    other = load("adapters of rank 3", seed=4)
    a = [weight for name, weight in first.items() if "lora_a" in name]
    built = [weight for name, weight in MODELS["adapters of rank 3"]().state_dict().items() if "lora_a" in name]
    for ours, theirs in zip(a, built, strict=True):
        assert ours.shape == theirs.shape and ours.abs().max() <= 1 / ours.shape[1] ** 0.5
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.3)
    assert len({float(weight[0, 0]) for weight in a}) == len(a)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) != ("lora_a" in name) for name in first)


def test_built_as_ever_where_weights_are_to_be_random() -> None:
    torch.manual_seed(0)
    with on_meta(False):
        decoder = MODELS["tied"]()
    torch.manual_seed(0)
    for one, other in zip(decoder.parameters(), MODELS["tied"]().parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_built_later_has_weights_again() -> None:
    with contextlib.suppress(KeyError), on_meta():
        raise KeyError
    assert not any(parameter.is_meta for parameter in MODELS["tied"]().parameters())


def test_one_process_keeps_its_tensors() -> None:
    model = build("tied")
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    weight = next(model.parameters())
    assert full_tensor(weight) is weight and to_local(weight) is weight and all_gather_object(1) == [1]
