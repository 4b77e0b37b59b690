"""What the probe measures of single examples, against one unpadded example after the other, and without a trace."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import NAMES, VOCAB, alone, batched, likeliest, tiny_examples, tiny_model

from adapt_recipes.data import IGNORE_INDEX, Example
from adapt_recipes.data.packing import pack_rows
from adapt_recipes.signals import passes

NUM_TASKS = len(NAMES)
EXAMPLES = tiny_examples(seed=1)


def skewed(p, entropy):
    """A measure that shows the order of the positions."""
    places = torch.arange(1, len(p) + 1, dtype=torch.float64)
    return (p * places).sum() + (entropy / places).sum()


MEASURED = {
    "task_embeddings": lambda model, batches: passes.task_embeddings(model, batches, NUM_TASKS),
    "example_losses": passes.example_losses,
    "losses of all tokens": partial(passes.example_losses, tokens="all"),
    "example_uncertainties": lambda model, batches: passes.example_uncertainties(model, batches, skewed),
}


def with_all_labels(example):
    """The same example, in which every token but the first is supervised, and the last label if it was."""
    labels = [*example.tokens[1:].tolist(), int(example.labels[-1])]
    assert all(old in (new, IGNORE_INDEX) for old, new in zip(example.labels.tolist(), labels, strict=True))
    return Example(example.tokens, torch.tensor(labels))


def by_hand(model):
    """The same, one example after the other."""
    states, losses, of_all, values = [], [], [], []
    for _, example in EXAMPLES:
        loss, logits, hidden = alone(model, example)
        of_all.append(alone(model, with_all_labels(example))[0].double().mean())
        states.append(hidden.double().mean(0))
        losses.append(loss.double().mean())
        values.append(skewed(*(torch.tensor(each, dtype=torch.float64) for each in likeliest(logits))))
    tasks = torch.tensor([task for task, _ in EXAMPLES])
    embeddings = [torch.stack(states)[tasks == task].mean(0) for task in range(NUM_TASKS)]
    return {
        "task_embeddings": torch.stack(embeddings).detach(),
        "example_losses": torch.stack(losses).detach(),
        "losses of all tokens": torch.stack(of_all).detach(),
        "example_uncertainties": torch.stack(values),
    }


# ----------------------------------------------------------------------------------------------------- what it measures


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000], ids=["each alone", "a few together", "all together"])
@pytest.mark.parametrize("name", MEASURED)
def test_single_examples_by_hand(name, max_tokens) -> None:
    model = tiny_model()
    values = MEASURED[name](model, batched(EXAMPLES, max_tokens=max_tokens))
    assert values.dtype == torch.float64 and not values.requires_grad
    torch.testing.assert_close(values, by_hand(model)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", [True, False], ids=["last supervised", "last not supervised"])
def test_losses_of_all_tokens_of_rows_that_share_their_beginning(last) -> None:
    """The shared tokens are computed once, and counted in each row: as each row alone, in float64."""
    generator = torch.Generator().manual_seed(0)
    shared, examples = torch.randint(VOCAB, (9,), generator=generator), []
    for length in (2, 4, 5, 5):
        rendered = torch.cat([shared, torch.randint(VOCAB, (length + 1,), generator=generator)])
        labels = torch.where(torch.arange(len(rendered) - 1) < 9, IGNORE_INDEX, rendered[1:])
        if not last:
            labels[-1] = IGNORE_INDEX
        examples.append((0, Example(rendered[:-1], labels)))
    (batch,) = batched(examples, max_tokens=1000)
    assert len(pack_rows(batch.tokens, batch.lengths).tokens) < int(batch.lengths.sum())
    expected, plain = [], tiny_model().double().eval()
    for _, example in examples:
        log_p = plain.decoder(example.tokens[None])[0].double().log_softmax(-1)
        following = [*example.tokens[1:].tolist(), *([int(example.labels[-1])] if last else [])]
        expected.append(-log_p[range(len(following)), following].mean())
    losses = passes.example_losses(tiny_model(), [batch], tokens="all")
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MEASURED)
def test_padding_does_not_count_whatever_it_is(name) -> None:
    model, padded = tiny_model(), []
    for batch in batched(EXAMPLES):
        tokens = torch.randint(VOCAB, (len(batch.tokens), batch.tokens.shape[1] + 5))
        labels = torch.full_like(tokens, IGNORE_INDEX)
        for row, length in enumerate(batch.lengths.tolist()):
            tokens[row, :length], labels[row, :length] = batch.tokens[row, :length], batch.labels[row, :length]
        padded.append(batch._replace(tokens=tokens, labels=labels))
    torch.testing.assert_close(MEASURED[name](model, padded), by_hand(model)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MEASURED)
def test_bf16_compute_is_close_and_comes_as_float64(name) -> None:
    exact = by_hand(tiny_model())[name]
    values = MEASURED[name](tiny_model(compute_dtype=torch.bfloat16), batched(EXAMPLES))
    assert values.dtype == torch.float64
    assert 1e-5 < (values - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_task_without_an_example_lies_nowhere() -> None:
    model = tiny_model()
    there = [(2 * task, example) for task, example in EXAMPLES]  # tasks 1, 3 and 5 have none
    embeddings = passes.task_embeddings(model, batched(there), 2 * NUM_TASKS)
    torch.testing.assert_close(embeddings[::2], by_hand(model)["task_embeddings"], rtol=1e-5, atol=1e-6)
    assert embeddings[1::2].isnan().all()


def test_a_measure_is_given_the_likeliest_tokens_and_the_entropies_in_order() -> None:
    model, given = tiny_model(), []

    def measure(p, entropy):
        given.append((p, entropy))
        return p.sum() + entropy.sum()

    values = passes.example_uncertainties(model, batched(EXAMPLES), measure)
    assert len(given) == len(EXAMPLES)
    for value, (_, example) in zip(values, EXAMPLES, strict=True):
        expected = [torch.tensor(each, dtype=torch.float64) for each in likeliest(alone(model, example)[1])]
        found = [each for each in given if torch.allclose(each[0].sum() + each[1].sum(), value, rtol=1e-12)]
        assert len(found) == 1
        for part, wanted in zip(found[0], expected, strict=True):
            assert part.dtype == torch.float64
            torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("raise_at", [None, 1, 3])
def test_gradients_of_single_examples_leave_everything_as_it_was(raise_at) -> None:
    """One backward pass per example, each in eval mode; the blank row of a process without examples is none."""
    model, batches = tiny_model(attn_dropout=0.2), batched(EXAMPLES)
    model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    parameters = list(model.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    seen, generator = [], torch.get_rng_state()

    def restless(module, arguments):
        seen.append((tuple(arguments[0].shape), any(module.training for module in model.modules())))
        torch.rand(3)
        if len(seen) == raise_at:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(restless)
    if raise_at is None:
        norms = passes.example_gradient_norms(model, batches)
        assert seen == [((1, len(example.tokens)), False) for _, example in EXAMPLES]
        hook.remove()
        blank = batches[0]._replace(labels=torch.full_like(batches[0].labels, IGNORE_INDEX))
        assert torch.equal(passes.example_gradient_norms(model, [blank, *batches]), norms) and norms.min() > 0
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            passes.example_gradient_norms(model, batches)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert (parameters[0].grad == 7).all() and all(parameter.grad is None for parameter in parameters[1:])


def test_task_means_are_over_examples_not_over_tokens() -> None:
    values = torch.linspace(-1, 2, len(EXAMPLES), dtype=torch.float64) ** 3
    means = passes.task_means(values, batched(EXAMPLES), NUM_TASKS + 1)
    tasks = torch.tensor([task for task, _ in EXAMPLES])
    torch.testing.assert_close(means[:-1], torch.stack([values[tasks == task].mean() for task in range(NUM_TASKS)]))
    assert means.dtype == torch.float64 and means[-1].isnan()


def test_supervised_tokens_are_counted_by_task() -> None:
    expected = torch.zeros(NUM_TASKS + 1, dtype=torch.float64)
    for task, example in EXAMPLES:
        expected[task] += (example.labels != IGNORE_INDEX).sum()
    assert torch.equal(passes.num_supervised(batched(EXAMPLES), NUM_TASKS + 1), expected)


def test_inner_products_and_norms_are_not_rounded_to_the_gradients_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = ([torch.randn(shape, generator=generator) for shape in [(300, 40), (7,)]] for _ in range(2))
    expected = sum((a.double() * b.double()).sum().item() for a, b in zip(left, right, strict=True))
    assert passes.inner(left, right) == pytest.approx(expected, rel=1e-6)
    assert passes.norm(left) == pytest.approx(torch.cat([a.flatten() for a in left]).double().norm().item())

    left, right = [a.bfloat16() for a in left], [b.bfloat16() for b in right]
    expected = sum((a.double() * b.double()).sum().item() for a, b in zip(left, right, strict=True))
    assert passes.inner(left, right) == pytest.approx(expected, rel=1e-6)
    large = torch.tensor([1e8, 1.0, -1e8])
    for parts in ([large], list(large.split(1))):
        ones = [torch.ones_like(part) for part in parts]
        assert passes.inner(parts, ones) == 1.0, "not lost in a sum of 32 bits"
    with pytest.raises(ValueError, match="zip"):
        passes.inner(left, right[:1])


def test_rows_without_a_supervised_label_are_no_examples() -> None:
    """What a process brings that has no more batches."""
    model, batches = tiny_model(), batched(EXAMPLES)
    blank = batches[0]._replace(labels=torch.full_like(batches[0].labels, IGNORE_INDEX))
    for name, measured in MEASURED.items():
        torch.testing.assert_close(measured(model, [blank, *batches, blank]), measured(model, batches), rtol=0, atol=0)
        assert measured(model, [blank]).isnan().all(), name  # of no example there is nothing to say
    values = passes.example_losses(model, batches)
    without, beside = (passes.task_means(values, each, NUM_TASKS) for each in (batches, [blank, *batches]))
    assert torch.equal(without, beside)


# -------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dropout", [{"attn_dropout": 0.3}, {"lora_dropout": 0.3}], ids=str)
def test_passes_with_dropout_use_the_masks_that_come_next(dropout) -> None:
    model, batches = tiny_model(**dropout), batched(EXAMPLES)
    start = torch.get_rng_state()
    values = passes.example_uncertainties(model, batches, skewed, mc_samples=3, dropout=True)
    assert torch.equal(torch.get_rng_state(), start)

    each_pass = []
    for _ in range(3):
        each = torch.zeros(len(EXAMPLES), dtype=torch.float64)
        for batch in batches:
            logits = model.train()(batch.tokens, batch.labels, "logits")
            of_rows = logits.split((batch.labels != IGNORE_INDEX).sum(1).tolist())
            for row, of_row in zip(batch.rows.tolist(), of_rows, strict=True):
                found = likeliest(of_row)
                each[row] = skewed(*(torch.tensor(part, dtype=torch.float64) for part in found))
        each_pass.append(each)
    torch.testing.assert_close(values, torch.stack(each_pass).mean(0), rtol=1e-5, atol=1e-6)
    assert torch.stack(each_pass).std(0).min() > 1e-3, "other masks in each pass"

    torch.set_rng_state(start)
    once = passes.example_uncertainties(model, batches, skewed, dropout=True)
    torch.testing.assert_close(once, each_pass[0], rtol=1e-5, atol=1e-6)
    without = passes.example_uncertainties(model, batches, skewed)
    torch.testing.assert_close(without, by_hand(model)["example_uncertainties"], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ leaves no trace


@pytest.mark.parametrize("raise_at", [None, 1, 3], ids=lambda at: f"raises at {at}" if at else "all goes well")
@pytest.mark.parametrize("name", [*MEASURED, "with dropout"])
def test_leaves_everything_as_it_was(name, raise_at) -> None:
    calls = {
        **MEASURED,
        "with dropout": lambda model, batches: passes.example_uncertainties(
            model, batches, skewed, mc_samples=2, dropout=True
        ),
    }
    model = tiny_model(attn_dropout=0.2)
    model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    parameters = list(model.parameters())
    parameters[0].grad = torch.full_like(parameters[0], 7.0)
    weights = [parameter.detach().clone() for parameter in parameters]
    seen = []

    def restless(module, arguments):
        seen.append([module.training for module in model.modules()])
        assert not torch.is_grad_enabled()
        torch.rand(3)
        if len(seen) == raise_at:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(restless)
    generator, raised = torch.get_rng_state(), False
    try:
        calls[name](model, batched(EXAMPLES))
    except RuntimeError as error:
        raised = str(error) == "out of memory"
    assert raised == (raise_at is not None)
    assert seen and all(set(now) == {name == "with dropout"} for now in seen)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert (parameters[0].grad == 7).all() and all(parameter.grad is None for parameter in parameters[1:])
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(parameters, weights, strict=True))
    assert torch.is_grad_enabled()


def test_what_fsdp_has_gathered_is_dropped_after_every_forward() -> None:
    model, calls = tiny_model(), SimpleNamespace(forwards=0, reshards=0)

    def counted(name):
        return lambda *_: setattr(calls, name, getattr(calls, name) + 1)

    model.register_forward_pre_hook(counted("forwards"))
    model.reshard = counted("reshards")
    for measured in MEASURED.values():
        measured(model, batched(EXAMPLES))
    assert calls.forwards == calls.reshards == len(MEASURED) * len(batched(EXAMPLES))
