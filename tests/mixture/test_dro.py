"""Group DRO: both forms by hand, losses counted from a reference, and what it keeps."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_recipes.mixture import GroupDRO, uniform
from adapt_recipes.mixture.interface import check_mixture

NAN = math.nan
FORMS = ["softmax", "exponentiated_gradient"]


def make(num_tasks, kind=GroupDRO, budget_tokens=1000, **arguments):
    names = [f"task {i}" for i in range(num_tasks)]
    return kind(task_names=names, num_supervised_tokens=[100] * num_tasks, budget_tokens=budget_tokens, **arguments)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def update(mixture, losses, tokens=None):
    tokens = torch.zeros(len(losses)) if tokens is None else tensor(tokens)
    return mixture.update(task_tokens=tokens, **{mixture.observes[0]: tensor(losses)})


def shares(logits):
    weights = [math.exp(logit) for logit in logits]
    return tensor([weight / sum(weights) for weight in weights])


@pytest.mark.parametrize("losses", ["validation", "train"])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_softmax_by_hand(losses, floor) -> None:
    """Of the moment: what was before does not matter."""
    mixture = make(3, sharpness=1.7, floor=floor, losses=losses)
    update(mixture, [9.0, 0.0, 1.0])
    update(mixture, [0.5, 1.5, 1.0])
    expected = (1 - floor) * shares([1.7 * loss for loss in (0.5, 1.5, 1.0)]) + floor / 3
    torch.testing.assert_close(mixture.probabilities(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_exponentiated_gradient_by_hand(floor) -> None:
    """The sum over the run."""
    mixture = make(3, form="exponentiated_gradient", step_size=0.2, floor=floor)
    for losses in ([9.0, 0.0, 1.0], [0.5, 1.5, 1.0], [0.0, 2.0, 2.0]):
        update(mixture, losses)
    expected = (1 - floor) * shares([0.2 * 9.5, 0.2 * 3.5, 0.2 * 4.0]) + floor / 3
    torch.testing.assert_close(mixture.probabilities(), expected, rtol=0, atol=1e-14)


def test_softmax_is_the_best_answer_to_a_worst_case() -> None:
    """q of the highest sum q L + H(q) / beta, and its value there is (1 / beta) log sum exp(beta L)."""
    losses, beta = tensor([0.3, 2.0, 1.1, 1.0]), 1.3
    mixture = make(4, sharpness=beta, floor=0.0)
    update(mixture, losses)

    def value(q):
        return float((q * losses).sum() - (q * q.log()).sum() / beta)

    q = mixture.probabilities()
    assert value(q) == pytest.approx(float((beta * losses).logsumexp(0)) / beta, abs=1e-13)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.softmax(q.log() + 0.1 * torch.randn(4, generator=generator, dtype=torch.float64), 0)
        assert value(other) < value(q)


@pytest.mark.parametrize("form", FORMS)
def test_a_task_that_was_not_measured_keeps_its_share(form) -> None:
    mixture = make(4, form=form, floor=0.0)
    update(mixture, [1.0, 2.0, NAN, 0.5])
    p = mixture.probabilities()
    assert p[2] == pytest.approx(1 / 4, abs=1e-15), "a fair share while it was never measured"
    torch.testing.assert_close(p[[0, 1, 3]], 0.75 * shares([1.0, 2.0, 0.5]), rtol=0, atol=1e-14)
    update(mixture, [NAN, 1.0, 3.0, NAN])
    after = mixture.probabilities()
    torch.testing.assert_close(after[[0, 3]], p[[0, 3]], rtol=0, atol=1e-15)
    assert after[2] > p[2]
    update(mixture, [NAN] * 4)
    torch.testing.assert_close(mixture.probabilities(), after, rtol=0, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_equal_losses_and_a_sharpness_of_0_leave_it_uniform(form) -> None:
    for n in range(1, 30):
        even = make(n, kind=uniform).probabilities()
        key = "sharpness" if form == "softmax" else "step_size"
        for arguments, losses in (({key: 3.0}, [0.7] * n), ({key: 0}, list(range(n)))):
            mixture = make(n, form=form, **arguments)
            assert torch.equal(mixture.probabilities(), even)
            update(mixture, losses)
            assert torch.equal(mixture.probabilities(), even)


def test_exponentiated_gradient_does_not_overflow() -> None:
    mixture = make(3, form="exponentiated_gradient", step_size=1.0, floor=0.0)
    update(mixture, [1e6, 0.0, 1e6])
    update(mixture, [0.0, 0.0, 1.0])
    torch.testing.assert_close(mixture.probabilities(), shares([0.0, -800.0, 1.0]), rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------- with a reference


def test_losses_are_counted_from_the_reference(tmp_path) -> None:
    given = {"task 0": 0.5, "task 1": 2.0, "task 2": 0.0}
    file = tmp_path / "entropies.json"
    file.write_text(json.dumps(given))
    for reference in (given, str(file)):
        mixture = make(3, reference=reference, floor=0.0, sharpness=2.0)
        logged = update(mixture, [1.0, 2.1, NAN])
        torch.testing.assert_close(logged["excess_losses"], tensor([0.5, 0.1, NAN]), equal_nan=True)
        assert logged["reference_losses"].tolist() == [0.5, 2.0, 0.0]
        torch.testing.assert_close(mixture.probabilities()[:2], shares([1.0, 0.2]) * 2 / 3, rtol=0, atol=1e-14)


def run(kind, budget=38_400, steps=300, update_every=5, noise_seed=0, **arguments):
    """A run without a model: seven tasks fall as ln 16 * exp(-speed * tokens), the eighth, of pure noise, never.

    Speeds are per fair share; losses are measured with an error of 0.03 nats. Returns (worst excess loss of the seven,
    share of the noise task).
    """
    mixture = make(8, kind=kind, budget_tokens=budget, **arguments)
    per_token = tensor([60, 30, 15, 8, 4, 2, 1, 0]) * 8 / budget
    tokens = torch.zeros(8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(noise_seed)
    for step in range(1, steps + 1):
        tokens = tokens + mixture.probabilities() * budget / steps
        if step % update_every == 0 and mixture.observes:
            losses = math.log(16) * torch.exp(-per_token * tokens)
            update(mixture, losses + 0.03 * torch.randn(8, generator=generator, dtype=torch.float64), tokens)
    losses = math.log(16) * torch.exp(-per_token * tokens)
    return float(losses[:7].max()), float(tokens[7] / tokens.sum())


def test_a_reference_keeps_the_tokens_from_a_task_of_noise() -> None:
    """Worst excess / share of the noise task measured.

    Uniform 1.02 / .125, raw losses 1.24 / .71, given the entropies .28 / .067, the asymptote .32 / .135.
    """
    oracle = {f"task {i}": 0.0 for i in range(7)} | {"task 7": math.log(16)}
    even_worst, _ = run(uniform)
    raw_worst, raw_noise = run(GroupDRO, sharpness=2.0)
    given_worst, told_noise = run(GroupDRO, sharpness=2.0, reference=oracle)
    guessed_worst, guessed_noise = run(GroupDRO, sharpness=2.0, reference="asymptote")
    assert raw_noise > 0.5 and raw_worst > 0.9 * even_worst, "the trap"
    assert told_noise < 0.08 and given_worst < 0.35 * even_worst
    assert guessed_noise < 0.15 and guessed_worst < 1.2 * given_worst, "nearly as good as given entropies"


# ------------------------------------------------------------------------------------------------------ what it keeps


@settings(max_examples=50)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.one_of(st.floats(0, 1e6), st.just(NAN)), min_size=n, max_size=n), min_size=1, max_size=12
        )
    ),
    st.sampled_from(FORMS),
    st.sampled_from([None, "initial", "asymptote"]),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.randoms(use_true_random=False),
)
def test_always_a_mixture_whatever_the_order_and_the_state_carries_everything(
    updates, form, reference, floor, random
) -> None:
    n = len(updates[0])
    order = list(range(n))
    random.shuffle(order)
    options = {"form": form, "reference": reference, "floor": floor}
    options["sharpness" if form == "softmax" else "step_size"] = 0.5
    mixture, resumed, permuted = (make(n, **options) for _ in range(3))
    tokens = torch.zeros(n, dtype=torch.float64)
    for losses in updates:
        tokens = tokens + tensor([random.randrange(50) for _ in range(n)])
        logged = update(mixture, losses, tokens)
        assert torch.equal(logged["excess_losses"].isnan(), tensor(losses).isnan())
        again = update(resumed, losses, tokens)
        assert torch.equal(again["excess_losses"].nan_to_num(), logged["excess_losses"].nan_to_num())
        update(permuted, [losses[i] for i in order], tokens[order])
        state, resumed = resumed.state_dict(), make(n, **options)
        resumed.load_state_dict(state)
        p = mixture.probabilities()
        assert abs(p.sum() - 1) < 1e-12
        assert (p >= floor / n * (1 - 1e-12)).all()
        assert torch.equal(resumed.probabilities(), p)
    torch.testing.assert_close(permuted.probabilities(), p[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "softmx"}, "mixture.form: 'softmx'; did you mean 'softmax'?"),
        ({"losses": "test"}, "mixture.losses: 'test'; allowed: validation, train"),
        ({"sharpness": -1}, "mixture.sharpness must be a finite number >= 0, not -1"),
        ({"floor": 1.0}, "mixture.floor must be a finite number >= 0 and < 1, not 1.0"),
        ({"reference": "asymptot"}, "mixture.reference: asymptot is no file; did you mean 'asymptote'?"),
    ],
)
def test_arguments_out_of_range_are_named_in_one_line(arguments, message) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        make(2, **arguments)


def test_state_of_another_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="the state is of 4 tasks, this run has 3"):
        make(3).load_state_dict(make(4).state_dict())
    with pytest.raises(ValueError, match="the state has"):
        make(3).load_state_dict(make(3, reference="initial").state_dict())
    with pytest.raises(ValueError, match="the state has"):
        make(3, reference="initial").load_state_dict(make(3).state_dict())


@pytest.mark.parametrize("losses", ["validation", "train"])
def test_keeps_the_contract(losses) -> None:
    check_mixture(make(3, losses=losses), [f"{losses}_losses"], num_tasks=3, recipe="a recipe")
