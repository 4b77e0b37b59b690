"""ADAPT's one-step form: the update is the gradient of the unrolled look-ahead step, and what else it promises."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from adapt_recipes.mixture import Adapt, uniform
from adapt_recipes.mixture.adapt import MIN_NORMALIZER
from adapt_recipes.signals import passes

NAN = math.nan


def make(num_tasks, **arguments):
    return Adapt(
        task_names=[f"task {i}" for i in range(num_tasks)],
        num_supervised_tokens=[100] * num_tasks,
        budget_tokens=1000,
        **arguments,
    )


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def update(mixture, losses, dots):
    tokens = torch.zeros(len(losses), dtype=torch.float64)
    return mixture.update(task_tokens=tokens, validation_losses=tensor(losses), gradient_dots=tensor(dots))


def with_logits(mixture, logits):
    mixture.load_state_dict({**mixture.state_dict(), "logits": tensor(logits)})
    return mixture


# ---------------------------------------------------------------------------------------------------- the mathematics


class TinyModel(nn.Module):
    """A plain causal model in float64: each position sees the mean of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.output = nn.Embedding(13, 6), nn.Linear(6, 7), nn.Linear(7, 13)
        self.double()

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        logits = self.output(torch.tanh(self.hidden(x)))
        kept = labels != -100
        return F.cross_entropy(logits[kept], labels[kept], reduction="none")


def random_batches(num_tasks, generator, without=()):
    """Three batches; every task but those in ``without`` has supervised tokens in several of them."""
    batches = []
    for _ in range(3):
        tasks = torch.arange(2 * num_tasks) % num_tasks
        tokens = torch.randint(13, (2 * num_tasks, 9), generator=generator)
        labels = torch.randint(13, (2 * num_tasks, 9), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.5] = -100
        for task in without:
            labels[tasks == task] = -100
        batches.append(SimpleNamespace(tokens=tokens, labels=labels, tasks=tasks))
    return batches


def differentiable_losses(model, parameters, batches, task):
    """The task's mean loss over all batches, as a function of ``parameters``."""
    losses = []
    for batch in batches:
        rows = batch.tasks == task
        losses.append(functional_call(model, parameters, (batch.tokens[rows], batch.labels[rows])))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("references", [None, [0.4, 1.9, 0.7, 3.5]], ids=["losses", "losses less a reference"])
@pytest.mark.parametrize("left_out", [(), (2,)], ids=["all tasks", "one left out of the objective"])
@pytest.mark.parametrize("normalize", ["initial", "none"])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_the_update_is_the_gradient_of_the_unrolled_step(floor, normalize, left_out, references) -> None:
    """dF/dp and the step on the logits, measured with the probe, against autograd through theta'(p) in float64."""
    num_tasks, eta, rho, beta, entropy_weight = 4, 0.7, 0.6, 2.5, 0.4
    torch.manual_seed(0)
    model, generator = TinyModel(), torch.Generator().manual_seed(1)
    train = random_batches(num_tasks, generator)
    validation = random_batches(num_tasks, generator, without=left_out)
    mixture = make(
        num_tasks,
        meta_lr=rho,
        entropy_weight=entropy_weight,
        sharpness=beta,
        floor=floor,
        normalize=normalize,
        reference=references and {f"task {i}": loss for i, loss in enumerate(references)},
        center_and_scale=False,
        ema_decay=0.0,
        lookahead_lr=eta,
    )
    with_logits(mixture, [0.3, -1.2, 0.8, 0.1])

    # What a recipe does, exact look-ahead.
    step = passes.loss_gradient(model, train, mixture.probabilities())
    with passes.stepped(model, step, -eta):
        losses = passes.task_losses(model, validation, num_tasks)
        v = passes.loss_gradient(model, validation, mixture.objective_weights(losses))
    dots = passes.gradient_dots_by_backward(model, train, v, num_tasks)
    logged = mixture.update(
        task_tokens=torch.zeros(num_tasks), validation_losses=losses, gradient_dots=dots, rewards=dots
    )

    # The oracle, independent of both: autograd through the step.
    a = tensor([0.3, -1.2, 0.8, 0.1]).requires_grad_()
    p = (1 - floor) * torch.softmax(a, 0) + floor / num_tasks
    theta = dict(model.named_parameters())
    train_losses = [differentiable_losses(model, theta, train, i) for i in range(num_tasks)]
    gradients = torch.autograd.grad((p * torch.stack(train_losses)).sum(), list(theta.values()), create_graph=True)
    ahead = {name: x - eta * g for (name, x), g in zip(theta.items(), gradients, strict=True)}
    in_objective = [j for j in range(num_tasks) if j not in left_out]
    raw = torch.stack([differentiable_losses(model, ahead, validation, j) for j in in_objective])
    excess = raw - tensor(references or [0.0] * num_tasks)[in_objective]
    normalised = excess / raw.detach() if normalize == "initial" else excess
    objective = (beta * normalised).exp().mean().log() / beta + entropy_weight * (p * p.log()).sum()
    dF_dp, dF_da = torch.autograd.grad(objective, [p, a])

    p = p.detach()
    assert raw.min() > MIN_NORMALIZER
    torch.testing.assert_close(losses[in_objective], raw.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(logged["objective"], objective.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(-logged["values"] + entropy_weight * (p.log() + 1), dF_dp, rtol=0, atol=1e-8)
    torch.testing.assert_close(mixture.logits, (a - rho * dF_da).detach(), rtol=0, atol=1e-8)
    assert logged["reference_losses"].tolist() == (references or [0.0] * num_tasks)
    assert dF_da.abs().max() > 1e-2, "the step is not trivially 0"


def test_with_targets_the_update_is_the_gradient_of_their_worst_case() -> None:
    """Three tasks and two targets; the objective is over both targets and one of the tasks, with weights."""
    num_tasks, eta, rho, beta, entropy_weight = 3, 0.7, 0.6, 2.5, 0.4
    o = tensor([0.0, 1.0, 0.0, 2.0, 3.0])
    torch.manual_seed(0)
    model, generator = TinyModel(), torch.Generator().manual_seed(1)
    train, validation = random_batches(num_tasks, generator), random_batches(5, generator)
    mixture = make(
        num_tasks,
        meta_lr=rho,
        entropy_weight=entropy_weight,
        sharpness=beta,
        floor=0.0,
        normalize="none",
        center_and_scale=False,
        ema_decay=0.0,
        lookahead_lr=eta,
        target_names=["x", "y"],
        target_weights=o,
    )
    assert mixture.observes == ("validation_losses", "gradient_dots", "target_losses")
    with_logits(mixture, [0.3, -1.2, 0.8])

    step = passes.loss_gradient(model, train, mixture.probabilities())
    with passes.stepped(model, step, -eta):
        losses = passes.task_losses(model, validation, 5)
        weights = mixture.objective_weights(losses[:num_tasks], losses[num_tasks:])
        v = passes.loss_gradient(model, validation, weights)
    dots = passes.gradient_dots_by_backward(model, train, v, num_tasks)
    logged = mixture.update(
        task_tokens=torch.zeros(num_tasks),
        validation_losses=losses[:num_tasks],
        target_losses=losses[num_tasks:],
        gradient_dots=dots,
    )

    a = tensor([0.3, -1.2, 0.8]).requires_grad_()
    p = torch.softmax(a, 0)
    theta = dict(model.named_parameters())
    train_losses = [differentiable_losses(model, theta, train, i) for i in range(num_tasks)]
    gradients = torch.autograd.grad((p * torch.stack(train_losses)).sum(), list(theta.values()), create_graph=True)
    ahead = {name: x - eta * g for (name, x), g in zip(theta.items(), gradients, strict=True)}
    ahead_losses = torch.stack([differentiable_losses(model, ahead, validation, j) for j in range(5)])
    worst_case = ((o / o.sum()) * (beta * ahead_losses).exp()).sum().log() / beta
    (gradient,) = torch.autograd.grad(worst_case + entropy_weight * (p * p.log()).sum(), a)

    torch.testing.assert_close(mixture.logits, (a - rho * gradient).detach(), rtol=0, atol=1e-8)
    assert weights[0] == weights[2] == 0 and (weights[[1, 3, 4]] > 0).all()
    assert torch.equal(torch.cat([logged["weights"], logged["target_weights"]]), weights)
    assert gradient.abs().max() > 1e-2, "the step is not trivially 0"


def test_targets_are_part_of_the_state() -> None:
    targets = {"target_names": ["x"], "target_weights": tensor([1.0, 0.0, 1.0])}
    mixtures = [make(2, reference="initial", **targets) for _ in range(2)]
    for number in range(3):
        for mixture in mixtures:
            mixture.update(
                task_tokens=torch.full((2,), float(number)),
                validation_losses=tensor([2.0 - number / 2, 1.0]),
                target_losses=tensor([3.0 - number]),
                gradient_dots=tensor([0.1, number]),
            )
        state = mixtures[0].state_dict()
        mixtures[0] = make(2, reference="initial", **targets)
        mixtures[0].load_state_dict(state)
    assert torch.equal(mixtures[0].probabilities(), mixtures[1].probabilities())
    with pytest.raises(ValueError, match="the state is of"):
        make(2, reference="initial").load_state_dict(mixtures[0].state_dict())


def test_objective_weights_are_the_gradient_of_the_worst_case_and_leave_out_nan() -> None:
    mixture = make(4, sharpness=3.0)
    first, losses = tensor([2.0, 1.0, NAN, 0.5]), tensor([1.5, 1.1, NAN, 0.1])
    update(mixture, first, [0.0] * 4)
    leaf = losses[[0, 1, 3]].requires_grad_()
    worst_case = (3.0 * leaf / first[[0, 1, 3]]).exp().mean().log() / 3.0
    (expected,) = torch.autograd.grad(worst_case, leaf)
    weights = mixture.objective_weights(losses)
    torch.testing.assert_close(weights[[0, 1, 3]], expected)
    assert weights[2] == 0
    assert (mixture.objective_weights(tensor([NAN] * 4)) == 0).all()


def test_a_task_already_mastered_is_not_made_the_worst_case_by_its_normaliser() -> None:
    weights = make(2, sharpness=2.0).objective_weights(tensor([1e-6, 1.0]))
    expected = torch.softmax(2.0 * tensor([1e-6 / MIN_NORMALIZER, 1.0]), 0) / tensor([MIN_NORMALIZER, 1.0])
    torch.testing.assert_close(weights, expected)


def test_objective_weights_of_the_first_call_use_its_own_losses_and_remember_nothing() -> None:
    mixture = make(2)
    before = mixture.objective_weights(tensor([3.0, 1.0]))
    assert torch.equal(before, tensor([0.5 / 3.0, 0.5]))
    mixture.objective_weights(tensor([9.0, 9.0]))
    assert torch.equal(mixture.objective_weights(tensor([3.0, 1.0])), before)


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("normalize", ["initial", "none"])
def test_without_a_reference_nothing_is_subtracted_to_the_last_bit(normalize) -> None:
    """The losses' own bits, and those of a reference of 0."""
    options = {"normalize": normalize, "sharpness": 3.0}
    plain, zeros = make(3, **options), make(3, reference={f"task {i}": 0 for i in range(3)}, **options)
    generator, first = torch.Generator().manual_seed(0), None
    for _ in range(5):
        losses = 3 * torch.rand(3, generator=generator, dtype=torch.float64)
        dots = torch.randn(3, generator=generator, dtype=torch.float64)
        first = losses if first is None else first
        normalizers = first.clamp_min(MIN_NORMALIZER) if normalize == "initial" else torch.ones(3).double()
        w = torch.softmax(3.0 * (losses / normalizers), dim=0)
        assert torch.equal(plain.objective_weights(losses), w / normalizers)
        logged = update(plain, losses, dots)
        assert torch.equal(logged["weights"], w)
        assert torch.equal(logged["reference_losses"], torch.zeros(3).double())
        for name, value in update(zeros, losses, dots).items():
            assert torch.equal(value, logged[name]), name
        assert torch.equal(plain.logits, zeros.logits)
    assert plain.state_dict().keys() == {"logits", "values", "first_losses"}


def falling(start, end):
    """Losses, tokens and dots of 30 updates of two tasks: one falls from ``start`` to ``end``, one stays."""
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        share = math.exp(-0.3 * step)
        losses = tensor([end + (start - end) * share, 2.5 + 0.01 * math.sin(step)])
        yield losses, tensor([20.0, 30.0]) * step, torch.randn(2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("normalize", ["initial", "none"])
@pytest.mark.parametrize("reference", [{"task 0": 0.2, "task 1": 2.4}, "initial", "asymptote"], ids=str)
def test_weights_and_update_count_from_the_same_reference(reference, normalize) -> None:
    """The one there was when the weights were asked for, though the update's losses then change it."""
    mixture, references = make(2, reference=reference, normalize=normalize, sharpness=2.0), []
    first = None
    for losses, tokens, dots in falling(2.0, 0.3):
        first = losses if first is None else first
        r = mixture.reference.losses.clone()
        r = torch.where(r.isnan(), losses, r)
        normalizers = first if normalize == "initial" else torch.ones(2).double()
        weights = mixture.objective_weights(losses)
        torch.testing.assert_close(weights, torch.softmax(2.0 * (losses - r) / normalizers, dim=0) / normalizers)
        logged = mixture.update(task_tokens=tokens, validation_losses=losses, gradient_dots=dots)
        torch.testing.assert_close(logged["weights"] / normalizers, weights, rtol=1e-12, atol=0)
        references.append(logged["reference_losses"])
    changes = {tuple(each.tolist()) for each in references}
    assert len(changes) > 5 if reference == "asymptote" else len(changes) == 1
    if isinstance(reference, dict):
        assert references[-1].tolist() == [0.2, 2.4]
    elif reference == "initial":
        assert references[-1].tolist() == [2.0, 2.5]
    else:
        torch.testing.assert_close(references[-1], tensor([0.3, 2.5]), rtol=0, atol=0.06)


@pytest.mark.parametrize("reference", ["initial", "asymptote"])
def test_the_state_carries_the_reference(reference) -> None:
    straight, resumed = make(2, reference=reference), make(2, reference=reference)
    for losses, tokens, dots in falling(2.0, 0.3):
        state, resumed = resumed.state_dict(), make(2, reference=reference)
        resumed.load_state_dict(state)
        assert torch.equal(resumed.objective_weights(losses), straight.objective_weights(losses))
        signals = {"task_tokens": tokens, "validation_losses": losses, "gradient_dots": dots}
        ours, theirs = resumed.update(**signals), straight.update(**signals)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.equal(resumed.probabilities(), straight.probabilities())


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations([None, "initial", "asymptote"], 2)))
def test_the_state_of_another_reference_is_refused(one, other) -> None:
    with pytest.raises(ValueError, match="^mixture: the state has"):
        make(2, reference=one).load_state_dict(make(2, reference=other).state_dict())


def test_a_task_that_cannot_be_learned_is_not_the_worst_case() -> None:
    """With the asymptote for a reference, it loses the weight that it has without."""
    weights = {}
    for reference in (None, "asymptote"):
        mixture = make(2, reference=reference, normalize="none", sharpness=3.0)
        for losses, tokens, dots in falling(2.0, 0.3):
            logged = mixture.update(task_tokens=tokens, validation_losses=losses, gradient_dots=dots)
        weights[reference] = logged["weights"][1].item()
    assert weights[None] > 0.99 and weights["asymptote"] < 0.6


# ------------------------------------------------------------------------------------------ centred and scaled values


def test_centred_and_scaled_update_by_hand() -> None:
    """a <- a + rho N ( p (z - sum p z) - lambda p (log p + H(p)) ), entry by entry."""
    rho, entropy_weight, logits, dots = 0.05, 0.8, [0.4, -0.1, 0.0], [5.3, 5.1, 4.9]
    mixture = with_logits(make(3, meta_lr=rho, entropy_weight=entropy_weight, floor=0.0), logits)
    update(mixture, [1.0, 2.0, 3.0], dots)
    rms = math.sqrt((0.2**2 + 0 + 0.2**2) / 3)
    z = [0.2 / rms, 0.0, -0.2 / rms]
    total = sum(math.exp(x) for x in logits)
    p = [math.exp(x) / total for x in logits]
    entropy, mean = -sum(x * math.log(x) for x in p), sum(x * y for x, y in zip(p, z, strict=True))
    expected = [
        logits[i] + rho * 3 * (p[i] * (z[i] - mean) - entropy_weight * p[i] * (math.log(p[i]) + entropy))
        for i in range(3)
    ]
    torch.testing.assert_close(mixture.logits, tensor(expected), rtol=0, atol=1e-12)


@given(
    st.lists(st.floats(-3, 3), min_size=2, max_size=8),
    st.floats(0.01, 100),
    st.floats(-100, 100),
    st.floats(0, 0.9),
)
def test_centred_and_scaled_update_ignores_size_and_common_part(logits, size, common, floor) -> None:
    n = len(logits)
    dots = torch.linspace(-1, 1, n, dtype=torch.float64)
    plain = with_logits(make(n, floor=floor), logits)
    moved = with_logits(make(n, floor=floor), logits)
    update(plain, [1.0] * n, dots.tolist())
    update(moved, [1.0] * n, (size * dots + common).tolist())
    torch.testing.assert_close(moved.logits, plain.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dots", [[0.0] * 3, [7.3] * 3, [0.3, 0.1 + 0.2, 0.3], [NAN] * 3, [2.0, NAN, NAN]])
def test_no_move_where_all_values_are_equal(dots) -> None:
    mixture = with_logits(make(3), [0.5, 0.0, -0.5])
    before = mixture.probabilities()
    update(mixture, [1.0, 2.0, 3.0], dots)
    assert torch.equal(mixture.probabilities(), before)


@pytest.mark.parametrize("center_and_scale", [True, False])
def test_a_task_without_train_tokens_in_the_probe_moves_by_entropy_alone(center_and_scale) -> None:
    logits = [0.5, 0.0, -0.5]
    mixture = with_logits(make(3, entropy_weight=0.0, center_and_scale=center_and_scale), logits)
    update(mixture, [1.0, 2.0, 3.0], [4.0, NAN, 1.0])
    assert mixture.logits[1] == pytest.approx(0.0, abs=1e-15)
    assert mixture.logits[0] > 0.5
    assert mixture.logits[2] < -0.5


def test_values_are_averaged_over_updates_and_kept_where_there_is_no_evidence() -> None:
    mixture = make(3, ema_decay=0.7, lookahead_lr=0.5)
    update(mixture, [1.0] * 3, [2.0, 4.0, NAN])
    logged = update(mixture, [1.0] * 3, [6.0, NAN, 10.0])
    torch.testing.assert_close(logged["values"], tensor([0.7 * 1 + 0.3 * 3, 2.0, 5.0]))


# ------------------------------------------------------------------------------------------------------ what it keeps


def signals(min_tasks=1):
    loss = st.one_of(st.floats(0, 1e6), st.just(NAN))
    dot = st.one_of(st.floats(-1e100, 1e100), st.just(NAN))
    return st.integers(min_tasks, 7).flatmap(
        lambda n: st.lists(
            st.tuples(st.lists(loss, min_size=n, max_size=n), st.lists(dot, min_size=n, max_size=n)),
            min_size=1,
            max_size=4,
        )
    )


OPTIONS = st.fixed_dictionaries(
    {
        "meta_lr": st.sampled_from([0.0, 0.05, 3.0]),
        "floor": st.sampled_from([0.0, 0.05, 0.5]),
        "sharpness": st.sampled_from([0.1, 2.0, 50.0]),
        "normalize": st.sampled_from(["initial", "none"]),
        "reference": st.sampled_from([None, "initial", "asymptote"]),
        "center_and_scale": st.booleans(),
        "ema_decay": st.sampled_from([0.0, 0.7]),
    }
)


@settings(deadline=None)
@given(signals(), OPTIONS)
def test_always_a_mixture_above_the_floor_and_the_state_carries_everything(updates, options) -> None:
    n = len(updates[0][0])
    mixture, resumed = make(n, **options), make(n, **options)
    for losses, dots in updates:
        logged = update(mixture, losses, dots)
        assert (logged["weights"][tensor(losses).isnan()] == 0).all()
        assert logged["values"].isfinite().all()
        update(resumed, losses, dots)
        state, resumed = resumed.state_dict(), make(n, **options)
        resumed.load_state_dict(state)
        p = mixture.probabilities()
        assert p.isfinite().all()
        assert abs(p.sum() - 1) < 1e-12
        assert (p >= options["floor"] / n * (1 - 1e-12)).all()
        assert torch.equal(resumed.probabilities(), p)
    for name, value in mixture.state_dict().items():
        assert torch.equal(resumed.state_dict()[name].nan_to_num(-1.0), value.nan_to_num(-1.0)), name


@given(
    st.integers(2, 7).flatmap(
        lambda n: st.tuples(
            st.lists(st.tuples(st.integers(1, 50), st.integers(-50, 50)), min_size=n, max_size=n),
            st.permutations(range(n)),
        )
    ),
    OPTIONS,
)
def test_the_order_of_the_tasks_does_not_matter(case, options) -> None:
    (pairs, order), n = case, len(case[0])
    losses, dots = [loss / 10 for loss, _ in pairs], [dot / 10 for _, dot in pairs]
    mixture, permuted = make(n, **options), make(n, **options)
    for _ in range(3):
        update(mixture, losses, dots)
        update(permuted, [losses[i] for i in order], [dots[i] for i in order])
    torch.testing.assert_close(permuted.probabilities(), mixture.probabilities()[list(order)], rtol=0, atol=1e-7)


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.3, 0.7])
@pytest.mark.parametrize("center_and_scale", [True, False])
def test_a_meta_learning_rate_of_0_is_uniform_to_the_last_bit(floor, center_and_scale) -> None:
    for n in range(1, 101):
        mixture = make(n, meta_lr=0, floor=floor, center_and_scale=center_and_scale)
        expected = uniform(task_names=mixture.values, num_supervised_tokens=[], budget_tokens=1).probabilities()
        assert torch.equal(mixture.probabilities(), expected)
        generator = torch.Generator().manual_seed(n)
        for _ in range(2):
            dots = torch.randn(n, generator=generator, dtype=torch.float64)
            update(mixture, torch.rand(n, generator=generator, dtype=torch.float64).tolist(), dots.tolist())
            assert torch.equal(mixture.probabilities(), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("meta_lr", -0.1),
        ("meta_lr", math.inf),
        ("entropy_weight", -1),
        ("sharpness", 0),
        ("floor", 1.0),
        ("floor", -0.1),
        ("ema_decay", 1),
        ("lookahead_lr", 0.0),
        ("lookahead_lr", "fast"),
        ("center_and_scale", 1),
        ("normalize", "intial"),
        ("normalize", None),
        ("reference", "asymptot"),
        ("reference", {"task 0": 1.0}),
    ],
)
def test_arguments_out_of_range_are_named_in_one_line(key, value) -> None:
    with pytest.raises(ValueError, match=rf"^mixture\.{key}[ :].*") as error:
        make(3, **{key: value})
    assert "\n" not in str(error.value)


def test_state_of_another_mixture_is_refused() -> None:
    mixture = make(3)
    with pytest.raises(ValueError, match="the state is of 4 tasks, this run has 3"):
        mixture.load_state_dict(make(4).state_dict())
    with pytest.raises(ValueError, match=r"mixture: the state has \['logits'\]"):
        mixture.load_state_dict({"logits": torch.zeros(3)})
    assert torch.equal(mixture.logits, torch.zeros(3, dtype=torch.float64))
