"""Each reward against plain torch on one unpadded example after the other; and what holds for all of them."""

from __future__ import annotations

import copy
import math
import statistics
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NAMES, alone, batched, likeliest, tiny_examples, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from adapt_recipes.data import IGNORE_INDEX, Example
from adapt_recipes.signals import passes
from adapt_recipes.signals.rewards import (
    MEASURES,
    CosineSimilarity,
    GradientAlignment,
    GradientNorm,
    PerplexityRatio,
    Uncertainty,
)

NUM_TASKS = len(NAMES)
TASKS = range(NUM_TASKS)
EXAMPLES = {
    "train": tiny_examples(seed=1),
    "validation": tiny_examples((2, 3, 0, 1), seed=2),  # task c has no validation split
    "pool": tiny_examples((2, 3, 1, 3), seed=3),
}
EVERY = [
    (CosineSimilarity, {}),
    (CosineSimilarity, {"specialist": "b"}),
    (PerplexityRatio, {}),
    (PerplexityRatio, {"specialist": "d"}),
    (PerplexityRatio, {"tokens": "all"}),
    (PerplexityRatio, {"examples": "fresh"}),
    (GradientAlignment, {}),
    *((Uncertainty, {"measure": measure}) for measure in MEASURES),
    (GradientNorm, {}),
    (GradientNorm, {"tokens": "all"}),
]
every_reward = pytest.mark.parametrize(
    ("kind", "arguments"), EVERY, ids=[" ".join([kind.__name__, *arguments.values()]) for kind, arguments in EVERY]
)


def of_base(reward):
    """Of which examples a reward is given the base model's losses."""
    return "train" if "base_losses" in reward.reads else "pool"


def read(reward, batches, base_losses):
    """Call a reward with what it reads, as the recipe does."""
    base = {"base_losses": base_losses} if {"pool", "base_losses"} & set(reward.reads) else {}
    return reward(**{name: batches[name] for name in reward.reads if name != "base_losses"}, **base)


def measured(kind, arguments, *, examples=EXAMPLES, model=None, names=NAMES, max_tokens=40):
    """A reward on these examples; the base model's losses are those of another tiny model."""
    model = model or tiny_model()
    batches = {name: batched(each, max_tokens=max_tokens) for name, each in examples.items()}
    reward, base = kind(task_names=names, model=model, **arguments), tiny_model(seed=7).double()
    tokens = arguments.get("tokens", "answer")
    base_losses = torch.stack([losses_alone(base, example, tokens).mean() for _, example in examples[of_base(reward)]])
    return read(reward, batches, base_losses.detach())


def losses_alone(model, example, tokens):
    """Plain cross-entropies of one example."""
    logits = model.eval().decoder(example.tokens[None])[0].double()
    labels = example.labels.clone()
    if tokens == "all":
        hidden = (labels == IGNORE_INDEX) & (torch.arange(len(labels)) < len(labels) - 1)
        labels[hidden] = example.tokens[1:][hidden[:-1]]
    kept = labels != IGNORE_INDEX
    return -logits.log_softmax(-1)[kept, labels[kept]]


def means_by_task(split, values):
    """The mean of each task's values, one an example; NaN where there is none."""
    of_task = [[value for (task, _), value in zip(EXAMPLES[split], values, strict=True) if task == i] for i in TASKS]
    return torch.tensor([statistics.fmean(each) if each else math.nan for each in of_task], dtype=torch.float64)


def task_gradient(model, split, task):
    """Of the mean over all the task's supervised tokens, in one long vector."""
    losses = torch.cat([alone(model, example)[0] for of, example in EXAMPLES[split] if of == task])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(losses.mean(), parameters)]).double()


def cosine(one, other):
    return float(one @ other / one.square().sum().sqrt() / other.square().sum().sqrt())


def assert_close(rewards, expected, *, rtol=1e-5):
    assert rewards.dtype == torch.float64 and not rewards.requires_grad
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(rewards, expected, rtol=rtol, atol=1e-7, equal_nan=True)


# ------------------------------------------------------------------------------------------------------ the equations


@pytest.mark.parametrize("specialist", [None, "b"])
def test_cosine_similarity(specialist) -> None:
    """(7) and (8). MoSpec: with the specialist alone, itself included."""
    model = tiny_model()
    states = [(task, alone(model, example)[2].double().detach()) for task, example in EXAMPLES["train"]]
    z = [torch.stack([hidden.mean(0) for of, hidden in states if of == task]).mean(0) for task in TASKS]
    others = TASKS if specialist is None else [NAMES.index(specialist)]
    expected = [statistics.fmean(cosine(z[i], z[n]) for n in others) for i in TASKS]
    assert min(expected) > 0 and max(expected) - min(expected) > 0.05
    assert_close(measured(CosineSimilarity, {"specialist": specialist}), expected)


@pytest.mark.parametrize("examples", ["fixed", "fresh"])
@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("specialist", [None, "d"])
def test_perplexity_ratio(specialist, tokens, examples) -> None:
    """(9) and (10). MoSpec: the specialist's counts twice."""

    def perplexity(model, example):
        return losses_alone(model, example, tokens).mean().exp().item()

    model, base = tiny_model().double(), tiny_model(seed=7).double()
    split = "train" if examples == "fresh" else "pool"
    ratios = [perplexity(model, example) / perplexity(base, example) for _, example in EXAMPLES[split]]
    expected = means_by_task(split, ratios)
    if specialist is not None:
        expected[NAMES.index(specialist)] *= 2
    arguments = {"specialist": specialist, "tokens": tokens, "examples": examples}
    assert_close(measured(PerplexityRatio, arguments), expected)


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_fresh_examples_are_measured_as_fixed_ones(tokens) -> None:
    """On the same examples; and of the base model itself every ratio is 1."""
    model, batches = tiny_model(), batched(EXAMPLES["pool"])
    rewards = {
        examples: PerplexityRatio(task_names=NAMES, model=model, tokens=tokens, examples=examples)
        for examples in ("fixed", "fresh")
    }
    base_losses = passes.example_losses(model, batches, tokens=tokens)
    assert (rewards["fresh"](train=batches, base_losses=base_losses) == 1).all()
    base_losses = base_losses + torch.linspace(-1, 1, len(base_losses))
    fixed, fresh = (
        rewards["fixed"](pool=batches, base_losses=base_losses),
        rewards["fresh"](train=batches, base_losses=base_losses),
    )
    assert torch.equal(fixed, fresh) and fixed.unique().numel() == NUM_TASKS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": "answers"}, "reward.tokens: 'answers'; did you mean 'answer'?"),
        ({"tokens": "prompt"}, "reward.tokens: 'prompt'; allowed: answer, all"),
        ({"examples": "fixd"}, "reward.examples: 'fixd'; did you mean 'fixed'?"),
        ({"examples": 16}, "reward.examples: 16; allowed: fixed, fresh"),
    ],
)
def test_what_perplexity_ratio_refuses(arguments, message) -> None:
    with pytest.raises(ValueError) as error:
        PerplexityRatio(task_names=NAMES, model=tiny_model(), **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_alignment(frozen) -> None:
    """(a), over the tasks that have a validation split."""
    model = tiny_model()
    model.decoder.layers.requires_grad_(not frozen)
    validation = [task_gradient(model, "validation", task) for task in (0, 1, 3)]
    train = [task_gradient(model, "train", task) for task in TASKS]
    expected = [max(0, statistics.fmean(cosine(v, gradient) for v in validation)) for gradient in train]
    assert len(set(expected)) > 2 and max(expected) > 0.02
    assert_close(measured(GradientAlignment, {}, model=model), expected, rtol=1e-4)


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_norm(frozen, tokens) -> None:
    """(c), of the weights that are trained, against autograd in float64. It is not the norm of the mean gradient."""
    model = tiny_model()
    model.decoder.layers.requires_grad_(not frozen)
    plain = copy.deepcopy(model).double()
    parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    norms = []
    for _, example in EXAMPLES["train"]:
        gradients = torch.autograd.grad(losses_alone(plain, example, tokens).mean(), parameters)
        norms.append(math.sqrt(sum(float(part.square().sum()) for part in gradients)))
    rewards = measured(GradientNorm, {"tokens": tokens}, model=model)
    assert_close(rewards, means_by_task("train", norms), rtol=1e-4)
    if tokens == "answer":
        of_mean = torch.stack([task_gradient(model, "train", task).square().sum().sqrt() for task in TASKS])
        assert (rewards > of_mean * 1.02).sum() >= 3, "but for a task with one example"


def test_what_gradient_norm_refuses() -> None:
    with pytest.raises(ValueError) as error:
        GradientNorm(task_names=NAMES, model=tiny_model(), tokens="anser")
    assert str(error.value) == "reward.tokens: 'anser'; did you mean 'answer'?"


# p: of the likeliest token at each position; e: the entropies.
BY_HAND = {
    "PreTP": lambda p, e: 1 - math.prod(p),
    "ExpTP": lambda p, e: 1 - statistics.fmean(p),
    "VarTP": lambda p, e: statistics.pvariance(p),
    "ComEV": lambda p, e: statistics.pvariance(p) / statistics.fmean(p),
    "EntSent": lambda p, e: statistics.fmean(e),
    "EntEOS": lambda p, e: e[-1],
}


def test_every_measure_is_tested() -> None:
    assert list(BY_HAND) == list(MEASURES)


@pytest.mark.parametrize("measure", BY_HAND)
def test_uncertainty(measure) -> None:
    """(b). A task without a validation split cannot be measured."""
    model = tiny_model()
    values = [BY_HAND[measure](*likeliest(alone(model, example)[1])) for _, example in EXAMPLES["validation"]]
    expected = means_by_task("validation", values)
    assert expected.isnan().tolist() == [False, False, True, False]
    assert_close(measured(Uncertainty, {"measure": measure}), expected)


# ------------------------------------------------------------------------------------------- what holds for all of them


@every_reward
@pytest.mark.parametrize("max_tokens", [1, 10_000], ids=["each alone", "all together"])
def test_the_cut_into_micro_batches_and_the_order_do_not_matter(kind, arguments, max_tokens) -> None:
    backwards = {name: each[::-1] for name, each in EXAMPLES.items()}
    changed = measured(kind, arguments, examples=backwards, max_tokens=max_tokens)
    assert_close(changed, measured(kind, arguments), rtol=1e-4)


@every_reward
def test_a_measurement_repeats_and_leaves_no_trace(kind, arguments) -> None:
    model = tiny_model()
    model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    generator = torch.get_rng_state()
    batches = {name: batched(each) for name, each in EXAMPLES.items()}
    reward = kind(task_names=NAMES, model=model, **arguments)
    base_losses = torch.zeros(len(EXAMPLES[of_base(reward)]), dtype=torch.float64)
    first, second = (read(reward, batches, base_losses) for _ in range(2))
    assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(model.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@every_reward
def test_a_task_without_examples_cannot_be_measured_and_changes_no_other(kind, arguments) -> None:
    fifth = measured(kind, arguments, names=[*NAMES, "e"])
    assert fifth[-1].isnan()
    assert_close(fifth[:-1], measured(kind, arguments))


@pytest.mark.parametrize("dropout", [{}, {"attn_dropout": 0.1}], ids=["no dropout", "dropout"])
@every_reward
def test_reads_says_how_often_each_example_is_computed(kind, arguments, dropout) -> None:
    """It is what the ledger books."""
    model, computed = tiny_model(**dropout), Counter()
    batches = {name: batched(each) for name, each in EXAMPLES.items()}
    split_of = {tuple(example.tokens[:5].tolist()): name for name, each in EXAMPLES.items() for _, example in each}
    assert len(split_of) == sum(map(len, EXAMPLES.values()))

    def count(module, arguments):
        computed.update(split_of[tuple(tokens[:5])] for tokens in arguments[0].tolist())

    model.register_forward_pre_hook(count)
    reward = kind(task_names=NAMES, model=model, **arguments)
    read(reward, batches, torch.zeros(len(EXAMPLES[of_base(reward)]), dtype=torch.float64))
    # The recipe measures the base model.
    reads = Counter(name for name in reward.reads if name != "base_losses")
    assert computed == {name: times * len(EXAMPLES[name]) for name, times in reads.items()}
    assert len(reward.reads) == (30 if kind is Uncertainty and dropout else len(set(reward.reads)))


class Table(nn.Module):
    """A model whose states and logits are the rows of a table, and its losses their products with the weights.

    So the gradient of a task's mean loss is the mean of the rows of its labels.
    """

    def __init__(self, table) -> None:
        super().__init__()
        self.register_buffer("table", torch.as_tensor(table, dtype=torch.float64))
        self.weights = nn.Parameter(torch.linspace(0.3, 0.5, self.table.shape[1], dtype=torch.float64))

    def forward(self, tokens, labels, output="losses"):
        if output == "hidden_states":
            return self.table[tokens]
        logits = self.table[labels[labels != IGNORE_INDEX]]
        return logits if output == "logits" else logits @ self.weights


ROWS, DIM = 6, 3
numbers = st.floats(-10, 10, allow_subnormal=False)
tables = st.lists(st.lists(numbers, min_size=DIM, max_size=DIM), min_size=ROWS, max_size=ROWS)


def of_task(task, rows):
    """An example that has these rows of the table as tokens and as labels."""
    return task, Example(torch.tensor(rows), torch.tensor(rows))


@st.composite
def several_tasks(draw):
    """A table and, of two to four tasks, one to three examples in each split."""
    rows = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4)
    num_tasks = draw(st.integers(2, 4))
    splits = {}
    for split in EXAMPLES:
        each = [draw(st.lists(rows, min_size=1, max_size=3)) for _ in range(num_tasks)]
        splits[split] = [of_task(task, example) for task, several in enumerate(each) for example in several]
    return draw(tables), splits, NAMES[:num_tasks]


def on_table(kind, arguments, table, examples, names):
    """A reward on ``Table``; the base losses are 0."""
    batches = {name: batched(each, max_tokens=10) for name, each in examples.items()}
    reward = kind(task_names=names, model=Table(table), **arguments)
    return read(reward, batches, torch.zeros(len(examples[of_base(reward)]), dtype=torch.float64))


@pytest.mark.parametrize("specialist", [None, "b"])
@settings(max_examples=50)
@given(several_tasks())
def test_similarities_are_from_minus_1_to_1_and_alignments_from_0(specialist, case) -> None:
    table, examples, names = case
    similarities = on_table(CosineSimilarity, {"specialist": specialist}, table, examples, names)
    assert (similarities.abs() <= 1 + 1e-12).all()
    alignments = on_table(GradientAlignment, {}, table, examples, names)
    assert ((alignments >= 0) & (alignments <= 1)).all()


@pytest.mark.slow
@every_reward
@settings(max_examples=20)
@given(several_tasks(), st.randoms())
def test_the_order_of_the_tasks_does_not_matter(kind, arguments, case, random) -> None:
    table, examples, names = case
    place = random.sample(range(len(names)), len(names))  # task i goes to place[i]
    moved_names = [names[place.index(i)] for i in range(len(names))]
    moved = {split: [(place[task], example) for task, example in each] for split, each in examples.items()}
    if arguments.get("specialist", "a") not in names:
        arguments = {"specialist": "a"}
    rewards = on_table(kind, arguments, table, examples, names)
    assert rewards.isfinite().all()
    there = on_table(kind, arguments, table, moved, moved_names)
    torch.testing.assert_close(there[place], rewards, rtol=1e-5, atol=1e-5)


AXES = [[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("rows", "specialist", "expected"),
    [
        ([0, 1, 1], None, [-1 / 3, 1 / 3, 1 / 3]),
        ([0, 0, 2], None, [2 / 3, 2 / 3, 1 / 3]),
        ([0, 1, 0], "b", [-1, 1, -1]),
        ([2, 2, 2], None, [1, 1, 1]),
        ([0, 3, 3], None, [1 / 3, 0, 0]),  # a mean state of 0, or a gradient of 0, has no direction
    ],
)
def test_what_is_opposed_has_a_negative_similarity_and_an_alignment_of_0(rows, specialist, expected) -> None:
    examples = {split: [of_task(task, [row]) for task, row in enumerate(rows)] for split in EXAMPLES}
    assert_close(on_table(CosineSimilarity, {"specialist": specialist}, AXES, examples, NAMES[:3]), expected)
    if specialist is None:
        clamped = [max(0, each) for each in expected]
        assert_close(on_table(GradientAlignment, {}, AXES, examples, NAMES[:3]), clamped)


@pytest.mark.parametrize("kind", [CosineSimilarity, GradientAlignment])
def test_what_is_all_alike_gets_1_up_to_rounding(kind) -> None:
    examples = {split: [of_task(task, [0]) for task in TASKS] for split in EXAMPLES}
    for table in torch.randn(30, 1, DIM, generator=torch.Generator().manual_seed(0)):
        rewards = on_table(kind, {}, table, examples, NAMES)
        assert ((rewards - 1).abs() < 1e-12).all()
        assert kind is CosineSimilarity or (rewards <= 1).all()


def test_a_task_without_a_validation_split_is_left_out_of_the_mean() -> None:
    splits = {"train": [0, 1, 2], "validation": [0, 0, 2], "pool": [0, 0, 0]}
    examples = {split: [of_task(task, [row]) for task, row in enumerate(rows)] for split, rows in splits.items()}
    assert_close(on_table(GradientAlignment, {}, AXES, examples, NAMES[:3]), [2 / 3, 0, 1 / 3])
    examples["validation"].pop()  # of task c
    assert_close(on_table(GradientAlignment, {}, AXES, examples, NAMES[:3]), [1, 0, 0])


@pytest.mark.parametrize("kind", [CosineSimilarity, PerplexityRatio])
def test_an_unknown_specialist_is_named(kind) -> None:
    with pytest.raises(ValueError) as error:
        kind(task_names=["sums", "dates"], model=tiny_model(), specialist="date")
    assert str(error.value) == "reward.specialist: 'date' is no task of this run; did you mean 'dates'?"


# -------------------------------------------------------------------------------------------------------------- dropout

DROPOUTS = [{"attn_dropout": 0.2}, {"lora_dropout": 0.2}]


@pytest.mark.parametrize("samples", [None, 1, 4])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=str)
def test_uncertainty_is_a_mean_over_passes_with_dropout(dropout, samples, capsys) -> None:
    model, batches = tiny_model(**dropout), batched(EXAMPLES["validation"])
    reward = Uncertainty(task_names=NAMES, model=model, measure="EntSent", mc_samples=samples)
    num_passes = samples or 30
    assert reward.reads == ("validation",) * num_passes
    model.decoder.layers[0].eval()
    modes, start = [module.training for module in model.modules()], torch.get_rng_state()
    rewards = reward(validation=batches)
    assert torch.equal(torch.get_rng_state(), start)
    assert [module.training for module in model.modules()] == modes

    model.train()
    each = torch.zeros(num_passes, len(EXAMPLES["validation"]), dtype=torch.float64)
    for values in each:
        for batch in batches:
            log_p = model(batch.tokens, batch.labels, "logits").detach().double().log_softmax(-1)
            entropies = -(log_p.exp() * log_p).sum(-1)
            of_rows = entropies.split((batch.labels != IGNORE_INDEX).sum(1).tolist())
            for row, entropy in zip(batch.rows.tolist(), of_rows, strict=True):
                values[row] = entropy.mean()
    assert_close(rewards, means_by_task("validation", each.mean(0).tolist()))
    values = [statistics.fmean(likeliest(alone(model, example)[1])[1]) for _, example in EXAMPLES["validation"]]
    without = means_by_task("validation", values)
    assert (rewards - without).abs().nan_to_num().max() > 1e-3, "dropout shows"
    assert capsys.readouterr().out == ""


def test_other_masks_at_every_update() -> None:
    """Training draws random numbers between two updates."""
    model, batches = tiny_model(attn_dropout=0.2), batched(EXAMPLES["validation"])
    reward = Uncertainty(task_names=NAMES, model=model, mc_samples=2)
    first = reward(validation=batches)
    torch.rand(1)
    assert (first - reward(validation=batches)).abs().nan_to_num().max() > 1e-6


@pytest.mark.parametrize("samples", [None, 1])
@pytest.mark.parametrize("none", [{}, {"lora_dropout": 0.0}], ids=["whole model", "adapters"])
def test_without_dropout_one_pass_will_do(none, samples) -> None:
    reward = Uncertainty(task_names=NAMES, model=tiny_model(**none), mc_samples=samples)
    assert reward.reads == ("validation",)
    assert reward.note == "the model has no dropout: uncertainty is that of one forward pass"


def test_any_dropout_module_with_a_rate_is_dropout() -> None:
    model = Table(AXES)
    model.drop = nn.Dropout(0.0)
    assert len(Uncertainty(task_names=NAMES, model=model).reads) == 1
    model.drop.p = 0.1
    reward = Uncertainty(task_names=NAMES, model=model)
    assert len(reward.reads) == 30 and reward.note == "uncertainty is the mean over 30 forward passes with dropout"


@pytest.mark.parametrize(
    ("dropout", "arguments", "message"),
    [
        (
            0.0,
            {"mc_samples": 2},
            "reward.mc_samples: 2 samples need dropout, and the model has none; leave the key out",
        ),
        (0.0, {"mc_samples": 0}, "reward.mc_samples: has to be at least 1, not 0"),
        (0.1, {"mc_samples": -3}, "reward.mc_samples: has to be at least 1, not -3"),
        (0.1, {"measure": "PreTp"}, "reward.measure: 'PreTp'; did you mean 'PreTP'?"),
        (0.1, {"measure": "x"}, "reward.measure: 'x'; allowed: PreTP, ExpTP, VarTP, ComEV, EntSent, EntEOS"),
    ],
)
def test_what_uncertainty_refuses(dropout, arguments, message) -> None:
    with pytest.raises(ValueError) as error:
        Uncertainty(task_names=NAMES, model=tiny_model(attn_dropout=dropout), **arguments)
    assert str(error.value) == message


# ---------------------------------------------------------------------------------------------------- several processes


def all_rewards(model, batches):
    rewards = [kind(task_names=NAMES, model=model, **arguments) for kind, arguments in EVERY]
    base_losses = [torch.zeros(len(EXAMPLES[of_base(reward)]), dtype=torch.float64) for reward in rewards]
    return torch.stack([read(reward, batches, each) for reward, each in zip(rewards, base_losses, strict=True)])


def one_of_two_processes(rank, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = {}
    for name, each in EXAMPLES.items():
        batches = batched(each)
        half = (len(batches) + 1) // 2
        blank = batches[0]._replace(labels=torch.full_like(batches[0].labels, IGNORE_INDEX))
        mine[name] = batches[:half] if rank == 0 else (batches[half:] + [blank])[:half]  # one may have no more
        assert len(mine[name]) == half
    rewards = {}
    for kind in ("replicated", "sharded"):
        model = tiny_model()
        if kind == "sharded":
            for module in (*model.decoder.layers, model):
                fully_shard(module)
        rewards[kind] = all_rewards(model, mine)
    torch.save(rewards, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path) -> None:
    assert any(len(batched(each)) % 2 for each in EXAMPLES.values()), "a process that has no more"
    start = torch.multiprocessing.start_processes
    start(one_of_two_processes, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = all_rewards(tiny_model(), {name: batched(each) for name, each in EXAMPLES.items()})
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind in ("replicated", "sharded"):
        assert torch.equal(first[kind].nan_to_num(-1), second[kind].nan_to_num(-1)), "differs by rank"
        torch.testing.assert_close(first[kind], expected, rtol=1e-4, atol=1e-6, equal_nan=True)
