"""``Probe`` counts all that it reads, each time it is read, and refuses what is not finite in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import NAMES, batched, tiny_examples, tiny_model
from torch import Tensor

from adapt_recipes.budget import Ledger
from adapt_recipes.data import IGNORE_INDEX, Example, Examples, MicroBatch, Task
from adapt_recipes.signals import BaseWeights, Probe, passes

COUNTS = {"train": (3, 1, 4, 2), "validation": (2, 3, 0, 1), "pool": (2, 3, 1, 3)}  # examples per task
EXAMPLES = {name: tiny_examples(counts, seed=seed) for seed, (name, counts) in enumerate(COUNTS.items())}
BATCHES = {name: batched(examples) for name, examples in EXAMPLES.items()}
WEIGHTS = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)
NOTHING = Examples.in_memory(torch.zeros(0), torch.zeros(0), torch.zeros(1), torch.zeros(0))
EXAMPLE = Example(torch.tensor([1, 2, 3]), torch.tensor([IGNORE_INDEX, 3, 4]))
STEP = 7


def make_probe(**changes: Any) -> Probe:
    """Of four tasks, of which c has no validation split, in the middle of a run."""
    tasks = [
        Task(name, NOTHING, NOTHING if count else None) for name, count in zip(NAMES, COUNTS["validation"], strict=True)
    ]
    ledger = Ledger(1000, len(NAMES))
    ledger.steps = STEP
    return Probe(tiny_model(**changes), ledger, tasks)


def read(probe: Probe) -> tuple[int, int]:
    return probe.ledger.probe_tokens, probe.ledger.probe_total_tokens


def validated(probe: Probe) -> tuple[int, int]:
    return probe.ledger.validation_tokens, probe.ledger.validation_total_tokens


def tokens(*names: str) -> tuple[int, int]:
    """(supervised, all) tokens of the examples, by hand."""
    examples = [example for name in names for _, example in EXAMPLES[name]]
    return (
        sum(int((example.labels != IGNORE_INDEX).sum()) for example in examples),
        sum(len(example.tokens) for example in examples),
    )


class Reward:
    """Reads one of its batches twice."""

    reads = ("validation", "train", "train", "pool")

    def __call__(self, *, validation: Any, train: Any, pool: Any, base_losses: Tensor) -> Tensor:
        assert (validation, train, pool) == tuple(BATCHES[name] for name in ("validation", "train", "pool"))
        return torch.full((len(NAMES),), float(base_losses), dtype=torch.float64)


def test_scores_are_those_of_the_passes_and_are_counted() -> None:
    probe = make_probe()
    scores = probe.scores(BATCHES["validation"])
    assert (validated(probe), read(probe)) == (tokens("validation"), (0, 0))
    expected = passes.task_scores(probe.model, BATCHES["validation"], len(NAMES))
    for values, those in zip(scores, expected, strict=True):
        assert values.isnan().tolist() == [False, False, True, False], "without a validation split"
        torch.testing.assert_close(values, those, rtol=0, atol=0, equal_nan=True)
    probe.scores(BATCHES["validation"])
    assert validated(probe) == tokens("validation", "validation"), "each time"


def test_losses_are_those_of_scores_and_are_counted_apart() -> None:
    probe = make_probe()
    losses = probe.losses(BATCHES["validation"])
    assert (validated(probe), read(probe)) == ((0, 0), tokens("validation"))
    torch.testing.assert_close(losses, probe.scores(BATCHES["validation"]).losses, rtol=0, atol=0, equal_nan=True)


def with_test_split(probe: Probe, *names: str) -> Probe:
    """With a test split in these tasks."""
    probe.tasks = [replace(task, test=NOTHING if task.name in names else None) for task in probe.tasks]
    return probe


def test_scores_of_the_test_split_are_checked_for_the_tasks_that_have_it() -> None:
    """c has no validation split, and a no test split."""
    probe, batches = with_test_split(make_probe(), *"bcd"), batched([(1, EXAMPLE), (2, EXAMPLE), (3, EXAMPLE)])
    scores = probe.scores(batches, split="test")
    assert scores.losses.isnan().tolist() == [True, False, False, False]
    assert (validated(probe), read(probe)) == ((3 * 2, 3 * 3), (0, 0))
    with pytest.raises(ValueError, match="is not finite"):
        probe.scores(batches)
    with pytest.raises(ValueError, match="is not finite"):
        probe.scores(batched([(1, EXAMPLE), (3, EXAMPLE)]), split="test")


def test_a_gradient_is_that_of_the_passes_and_is_counted() -> None:
    probe = make_probe()
    gradient = probe.gradient(BATCHES["train"], WEIGHTS, of="training")
    assert read(probe) == tokens("train")
    expected = passes.loss_gradient(probe.model, BATCHES["train"], WEIGHTS)
    assert all(torch.equal(one, other) for one, other in zip(gradient, expected, strict=True))


@pytest.mark.parametrize(("estimator", "times"), [("backward", 1), ("finite_difference", 2)])
def test_gradient_dots_are_those_of_the_passes_and_are_counted(estimator: Any, times: int) -> None:
    probe = make_probe()
    v = passes.loss_gradient(probe.model, BATCHES["validation"], WEIGHTS)
    dots = probe.gradient_dots(BATCHES["train"], v, estimator=estimator, dtype="fp32")
    assert read(probe) == tokens(*["train"] * times)
    expected = passes.gradient_dots_by_backward(probe.model, BATCHES["train"], v, len(NAMES))
    torch.testing.assert_close(dots, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("estimator", "reads"),
    [("backward", ("validation",)), ("finite_difference", ("train", "pool") * 3 + ("validation",) * 2)],
)
def test_kstep_differences_agree_with_autograd_and_are_counted(estimator: Any, reads: tuple[str, ...]) -> None:
    """Two steps, on other examples each."""
    probe, p = make_probe(), torch.full((len(NAMES),), 0.25, dtype=torch.float64)
    measured = probe.kstep_differences(
        [BATCHES["train"], BATCHES["pool"]],
        BATCHES["validation"],
        p,
        WEIGHTS,
        estimator=estimator,
        learning_rate=0.002,
        validation_weight=0.5,
    )
    assert read(probe) == tokens("train", "pool", *reads)
    # To first order in the step size.
    v = passes.loss_gradient(probe.model, BATCHES["validation"], WEIGHTS)
    dots = [passes.gradient_dots_by_backward(probe.model, BATCHES[name], v, len(NAMES)) for name in ("train", "pool")]
    torch.testing.assert_close(measured, 0.002 * (dots[0] + dots[1]), rtol=0.2, atol=0.2 * float(measured.abs().max()))
    assert centered_cosine(measured, dots[0] + dots[1]) > 0.98


def test_gradient_moments_are_those_of_the_passes_and_are_counted() -> None:
    probe = make_probe()
    halves = [BATCHES["train"], BATCHES["pool"]]
    moments = probe.gradient_moments(halves)
    assert read(probe) == tokens("train", "pool")
    expected = passes.gradient_moments(probe.model, halves, len(NAMES))
    assert [*moments] == ["squared_gradient_norms", "gradient_variances"]
    for measured, of_passes in zip(moments.values(), expected, strict=True):
        assert torch.equal(measured, of_passes)


def test_step_gains_are_those_of_the_passes_and_are_counted() -> None:
    """Three times: the loss before, its gradient, and the loss after. A task without an example has none."""
    probe = make_probe()
    own = [batched([each for each in EXAMPLES["validation"] if each[0] == task]) for task in range(len(NAMES))]
    gains = probe.step_gains(own, learning_rate=0.1)
    assert read(probe) == tokens(*["validation"] * 3)
    assert gains.isnan().tolist() == [False, False, True, False]
    expected = passes.step_gains(probe.model, own, learning_rate=0.1)
    torch.testing.assert_close(gains, expected, rtol=0, atol=0, equal_nan=True)


def test_a_variance_needs_two_examples() -> None:
    with pytest.raises(ValueError, match=r"^probe\.examples: the variance of gradients needs at least 2 examples"):
        make_probe().gradient_moments([BATCHES["train"], []])


def centered_cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one - one.mean(), other - other.mean(), dim=0))


def test_rewards_are_given_what_they_read_and_it_is_counted_each_time() -> None:
    probe = make_probe()
    rewards = probe.rewards(Reward(), BATCHES, base_losses=torch.tensor(3.0))
    assert read(probe) == tokens("validation", "train", "train", "pool")
    assert rewards.tolist() == [3.0] * 4


def test_base_losses_come_with_the_pool_alone() -> None:
    class Train:
        reads = ("train",)

        def __call__(self, *, train: Sequence[MicroBatch]) -> Tensor:
            return torch.ones(len(NAMES), dtype=torch.float64)

    probe = make_probe()
    probe.rewards(Train(), BATCHES, base_losses=torch.empty(0))
    assert read(probe) == tokens("train")


def test_base_losses_of_other_examples_are_counted_and_of_the_base_model() -> None:
    """With ``base_losses`` beside ``train`` these are read twice, and the reward is given both."""

    class Fresh:
        reads = ("train", "base_losses")

        def __call__(self, *, train: Any, base_losses: Tensor) -> Tensor:
            assert train == BATCHES["train"]
            return passes.task_means(base_losses, train, len(NAMES))

    probe = make_probe()
    base, expected = BaseWeights(probe.model), passes.example_losses(probe.model, BATCHES["train"], tokens="all")
    with torch.no_grad():
        for parameter in probe.model.parameters():
            parameter.mul_(1.5)
    losses = probe.base_losses(base, BATCHES["train"], tokens="all")
    assert torch.equal(losses, expected) and read(probe) == tokens("train")
    rewards = probe.rewards(Fresh(), BATCHES, base_losses=losses)
    assert torch.equal(rewards, passes.task_means(expected, BATCHES["train"], len(NAMES)))
    assert read(probe) == tokens("train", "train")


# ---- what is not finite


def broken(probe: Probe, token: int) -> Probe:
    """With a model that reads infinity where this token stands."""

    def spoil(module: Any, arguments: tuple[Tensor], embeddings: Tensor) -> Tensor:
        return embeddings.masked_fill((arguments[0] == token)[:, :, None], torch.inf)

    probe.model.decoder.tok_embeddings.register_forward_hook(spoil)  # type: ignore[union-attr]
    return probe


def with_token(token: int) -> list[MicroBatch]:
    """Two examples of task b, the second of which has the token."""
    bad = Example(torch.tensor([1, token, 3]), torch.tensor([IGNORE_INDEX, 3, 4]))
    return batched([(1, EXAMPLE), (1, bad)])


FATAL = 40


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (lambda probe, batches: probe.losses(batches), "the loss of validation example 1 of task 'b'"),
        (lambda probe, batches: probe.scores(batches), "the loss of validation example 1 of task 'b'"),
        (
            lambda probe, batches: with_test_split(probe, "b").scores(batches, split="test"),
            "the loss of test example 1 of task 'b'",
        ),
        (
            lambda probe, batches: probe.gradient(batches, WEIGHTS, of="validation"),
            "the loss of validation example 1 of task 'b'",
        ),
        (
            lambda probe, batches: probe.gradient(batches, WEIGHTS, of="training"),
            "the loss of training example 1 of task 'b'",
        ),
        (
            lambda probe, batches: probe.base_losses(BaseWeights(probe.model), batches, tokens="all"),
            "the loss of training example 1 of task 'b'",
        ),
        (
            lambda probe, batches: probe.gradient_dots(
                batches, [torch.ones_like(p) for p in probe.model.parameters()], estimator="backward", dtype="fp32"
            ),
            "the gradient of training examples of task 'b'",
        ),
        (
            lambda probe, batches: probe.kstep_differences(
                [batches],
                batches,
                WEIGHTS,
                WEIGHTS,
                estimator="finite_difference",
                learning_rate=0.1,
                validation_weight=0.1,
            ),
            "after the look-ahead steps the loss of training examples of task 'b'",
        ),
        (
            lambda probe, batches: probe.step_gains([[], batches, [], []], learning_rate=0.1),
            "before or after a step on the task alone the loss of training examples of task 'b'",
        ),
        (
            lambda probe, batches: probe.gradient_moments([batches, batches]),
            "the gradient of training examples of task 'b'",
        ),
    ],
    ids=[
        *("losses", "scores", "test scores", "gradient", "gradient of training", "base losses", "dots", "K steps"),
        *("step gains", "moments"),
    ],
)
def test_what_is_not_finite_ends_in_one_line(measure: Any, said: str) -> None:
    """It names the step, the task and, where there is one, the example."""
    probe, batches = broken(make_probe(), FATAL), with_token(FATAL)
    with pytest.raises(ValueError) as error:
        measure(probe, batches)
    assert str(error.value).startswith(f"step {STEP}: {said} is not finite; ") and "\n" not in str(error.value)


def test_a_reward_that_is_not_finite_ends_in_one_line() -> None:
    with pytest.raises(ValueError) as error:
        make_probe().rewards(Reward(), BATCHES, base_losses=torch.tensor(torch.inf))
    assert str(error.value).startswith(f"step {STEP}: the reward of task 'a' is inf; ")
    assert "\n" not in str(error.value)
