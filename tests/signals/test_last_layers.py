"""K look-ahead steps of the last layers: the same as on a model whose other weights are frozen, and what it saves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import NAMES, batched, tiny_examples, tiny_model
from torch import Tensor, nn

from adapt_recipes.budget import Ledger
from adapt_recipes.data import Examples, Task
from adapt_recipes.models import TokenLosses
from adapt_recipes.models.adapters import train_adapters_alone
from adapt_recipes.signals import Probe, passes
from adapt_recipes.signals.ksteps import last_layers

NUM_LAYERS = 3
TRAIN = [batched(tiny_examples(seed=seed)) for seed in (0, 1)]
VALIDATION = batched(tiny_examples(seed=2))
P = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)
NOTHING = Examples.in_memory(torch.zeros(0), torch.zeros(0), torch.zeros(1), torch.zeros(0))
ESTIMATORS = ["finite_difference", "backward"]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def make_model(**changes: Any) -> TokenLosses:
    model = tiny_model(num_layers=NUM_LAYERS, **changes)
    train_adapters_alone(model.decoder)
    return model


def measure(model: TokenLosses, number: int | None, estimator: Any, *, learning_rate: float = 0.05) -> Tensor:
    probe = Probe(model, Ledger(1000, len(NAMES)), [Task(name, NOTHING, NOTHING) for name in NAMES])
    return probe.kstep_differences(
        TRAIN,
        VALIDATION,
        P,
        WEIGHTS,
        estimator=estimator,
        learning_rate=learning_rate,
        validation_weight=0.5,
        num_last_layers=number,
    )


@every_estimator
@pytest.mark.parametrize("number", [1, 2, NUM_LAYERS])
def test_it_is_the_same_as_with_all_other_weights_frozen(number: int, estimator: str) -> None:
    """Bit for bit; with all layers, these are embeddings, norm and head."""
    model = make_model()
    frozen = copy.deepcopy(model)
    frozen.requires_grad_(False)
    for layer in frozen.decoder.layers[-number:]:
        layer.requires_grad_(True)
    measured = measure(model, number, estimator)
    assert torch.equal(measured, measure(frozen, None, estimator))
    assert not torch.allclose(measured, measure(model, None, estimator), rtol=1e-2)


@pytest.mark.parametrize("number", [1, 2])
def test_both_estimators_agree(number: int) -> None:
    """As with all weights, to first order in the step size: half of it, half the relative error."""
    errors = []
    for learning_rate in (0.002, 0.001):
        steps, exact = (measure(make_model(), number, each, learning_rate=learning_rate) for each in ESTIMATORS)
        errors.append(float((steps - exact).norm() / exact.norm()))
    assert errors[0] < 0.1 and errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)


class Seen:
    """What was copied, and up to which layers gradients flowed."""

    def __init__(self) -> None:
        self.copied: list[int] = []
        self.gradients: list[int] = []
        self.flows: list[tuple[bool, ...]] = []


@contextmanager
def watched(model: TokenLosses, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    seen, restored, loss_gradient = Seen(), passes.restored, passes.loss_gradient
    outputs: list[bool] = []

    @contextmanager
    def counted(model: nn.Module) -> Iterator[list[Tensor]]:
        with restored(model) as copies:
            seen.copied.append(sum(each.numel() for each in copies))
            yield copies

    def computed(*arguments: Any) -> list[Tensor]:
        outputs.clear()
        gradient = loss_gradient(*arguments)
        seen.gradients.append(sum(each.numel() for each in gradient))
        seen.flows.append(tuple(outputs[:NUM_LAYERS]))
        return gradient

    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, given, output: outputs.append(output.requires_grad))
    monkeypatch.setattr(passes, "restored", counted)
    monkeypatch.setattr(passes, "loss_gradient", computed)
    yield seen


@pytest.mark.parametrize(("number", "flow"), [(1, (False, False, True)), (2, (False, True, True))])
def test_only_their_weights_are_copied_and_the_backward_pass_ends_there(
    number: int, flow: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    size = sum(p.numel() for layer in model.decoder.layers[-number:] for p in layer.parameters())
    with watched(model, monkeypatch) as seen:
        measure(model, number, "finite_difference")
    assert set(seen.copied) == set(seen.gradients) == {size} and set(seen.flows) == {flow}
    with watched(model, monkeypatch) as seen:
        measure(model, None, "finite_difference")
    assert set(seen.copied) == {sum(p.numel() for p in model.parameters())} and set(seen.flows) == {(True,) * 3}


@pytest.mark.parametrize("number", [None, 1])
def test_with_adapters_no_base_weight_is_copied(number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are a part of every layer, so the last layer has a third of them."""
    model = make_model(lora_dropout=0.1)
    adapters = {name: p.numel() for name, p in model.named_parameters() if "lora" in name}
    assert 0 < sum(adapters.values()) < sum(p.numel() for p in model.parameters()) / 4
    with watched(model, monkeypatch) as seen:
        measure(model, number, "finite_difference")
    expected = sum(adapters.values()) // (NUM_LAYERS if number else 1)
    assert set(seen.copied) == set(seen.gradients) == {expected}


@every_estimator
def test_it_leaves_everything_as_it_was(estimator: str) -> None:
    """Weights to the bit, and which of them train, also when a forward pass raises; a gradient reaches all again."""
    model = make_model(lora_dropout=0.1)
    before = copy.deepcopy(model.state_dict())
    trains = [parameter.requires_grad for parameter in model.parameters()]
    gradient = passes.loss_gradient(model, VALIDATION, WEIGHTS)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a forward pass")

    hook = model.decoder.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a forward pass"):
        measure(model, 1, estimator)
    hook.remove()
    measure(model, 1, estimator)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    again = passes.loss_gradient(model, VALIDATION, WEIGHTS)
    assert all(torch.equal(one, other) for one, other in zip(gradient, again, strict=True))


def test_layers_without_a_trained_weight_are_refused() -> None:
    model = make_model()
    model.decoder.layers[-1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"^probe\.last_layers: no weight of the last 1 layers is trained$"):
        last_layers(model, 1)
    assert len(last_layers(model, 2)) == len([*model.decoder.layers[-2].parameters()])
