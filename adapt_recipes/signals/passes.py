"""Forward and backward passes that measure tasks: losses, exact matches, gradients, embeddings, uncertainties.

``model`` is any module whose ``forward(tokens, labels)`` returns the cross-entropies of the supervised positions in
row-major order, and which takes the third argument of ``adapt_recipes.models.TokenLosses``. ``batches`` is a sequence
of objects with ``tokens`` (batch, length), ``labels`` (batch, length) and ``tasks`` (batch,), on any device. Functions
that measure single examples also need ``rows`` (batch,), the index of each row in the list of all, and ``lengths``
(batch,), its tokens. The loss of a task is the mean over all its supervised tokens in all batches of all processes.

Every function runs in eval mode and leaves the weights, their ``.grad``, the training mode of every module and torch's
generators unchanged, also when a forward pass raises. Every process must have the same number of batches; one without
further examples has batches without supervised labels, whose ``rows`` are -1. FSDP2's sharded parameters are perturbed
shard by shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adapt_recipes.training.process_group import all_reduce_sum, world_size
from adapt_recipes.training.sharding import device_of, to_local

# The label of a position that does not count in the loss, as in torch.
IGNORE_INDEX = -100

# Nats: added to a loss that is divided by, so that a loss of 0 has a relative decrease, of 0.
SMALLEST_LOSS = 1e-8

# Of which tokens an example is measured: of the supervised ones, or of all whose predecessor is read, prompt included.
Tokens = Literal["answer", "all"]


class Batch(Protocol):
    """Sequences of several tasks, padded on the right."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def tasks(self) -> Tensor: ...


class ExampleBatch(Batch, Protocol):
    """A batch for functions that measure single examples."""

    @property
    def rows(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...


def task_losses(model: nn.Module, batches: Sequence[Batch], num_tasks: int) -> Tensor:
    """The mean loss of each task.

    Args:
        model: see the module's docstring.
        batches: the examples.
        num_tasks: tasks in the run.

    Returns:
        (num_tasks,) float64 on the CPU, nats per supervised token; NaN for a task without a supervised token.
    """
    with measuring(model):
        return _loss_sums(model, batches, num_tasks) / num_supervised(batches, num_tasks)


class Scores(NamedTuple):
    """What results are made of, (num_tasks,) float64 on the CPU each; NaN for a task without an example.

    Attributes:
        losses: nats per supervised token.
        exact_match: share of the examples whose supervised tokens, the end token included, are all the most likely
            ones given what precedes them in the example. Greedy decoding generates the answers of these examples.
    """

    losses: Tensor
    exact_match: Tensor


@torch.no_grad()
def task_scores(model: nn.Module, batches: Sequence[Batch], num_tasks: int) -> Scores:
    """The mean loss of each task, as ``task_losses`` measures it, and its exact match, by the same forward passes.

    Args:
        model: see the module's docstring.
        batches: the examples.
        num_tasks: tasks in the run.
    """
    loss_sums, num_matches, num_examples = torch.zeros(3, num_tasks, dtype=torch.float64)
    with measuring(model):
        for batch in batches:
            device, tasks = device_of(model), batch.tasks.cpu()
            losses, hits = model(batch.tokens.to(device), batch.labels.to(device), "scores").to("cpu", torch.float64).T
            _reshard(model)
            rows = _of_supervised(batch.labels, torch.arange(len(tasks)))
            loss_sums.index_add_(0, tasks[rows], losses)
            num_misses = torch.bincount(rows, weights=1 - hits, minlength=len(tasks))
            kept = _examples(batch)
            num_matches += torch.bincount(tasks[kept & (num_misses == 0)], minlength=num_tasks)
            num_examples += torch.bincount(tasks[kept], minlength=num_tasks)
    return Scores(
        losses=all_reduce_sum(loss_sums) / num_supervised(batches, num_tasks),
        exact_match=all_reduce_sum(num_matches) / all_reduce_sum(num_examples),
    )


def loss_gradient(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Tensor,  # (num_tasks,) float64, finite
) -> list[Tensor]:
    """The gradient of ``sum_j weights_j * (mean loss of task j)``: v of ADAPT, or the gradient of one task.

    Args:
        model: see the module's docstring.
        batches: the examples. Sequences of tasks with weight 0 are not computed.
        weights: of the tasks.

    Returns:
        One tensor for each trainable parameter, in the order of ``model.parameters()``, sharded like the parameter.
    """
    assert weights.isfinite().all(), f"weights {weights.tolist()}"
    parameters = _trainable(model)
    # Gradients are averaged over processes, and the means here are over all processes.
    token_weights = world_size() * weights / num_supervised(batches, len(weights))

    # With FSDP2 a forward pass of one process waits for that of all others, so all skip the same batches.
    chosen = [(weights != 0)[batch.tasks.cpu()] for batch in batches]
    num_processes = all_reduce_sum(torch.tensor([float(rows.any()) for rows in chosen], dtype=torch.float64))

    # Accumulate in empty .grad, and restore what was there.
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        with measuring(model), torch.enable_grad():
            for batch, rows, needed_by in zip(batches, chosen, num_processes.tolist(), strict=True):
                if needed_by == 0:
                    continue
                # A process that needs none of the rows computes one of weight 0.
                if not rows.any():
                    rows[0] = True
                losses, tasks = _token_losses(model, batch, of=batch.tasks, rows=rows)
                (losses * token_weights[tasks].to(losses)).sum().backward()
                _reshard(model)
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
    if world_size() > 1:
        # FSDP2 has averaged the sharded gradients; the others are averaged here.
        for part in gradient:
            if not isinstance(part, DTensor):
                dist.all_reduce(part)
                part /= world_size()
    return gradient


def example_gradient_norms(model: nn.Module, batches: Sequence[ExampleBatch], *, tokens: Tokens = "answer") -> Tensor:
    """The norm of the gradient of each example's mean loss, by one backward pass per example.

    One gradient is in memory at a time. FSDP2 averages gradients over processes, so they take turns: while one computes
    an example, the others compute a single token without a label. N processes need as long as one.

    Args:
        model: see the module's docstring.
        batches: the examples; their ``rows`` number all examples of all processes from 0.
        tokens: of which the mean loss is.

    Returns:
        (num_examples,) float64 on the CPU, in the order of ``rows``.
    """
    mine = {}
    for batch in batches:
        labels = _labels(batch, tokens)
        for i in _examples(batch).nonzero().flatten().tolist():
            row, end = slice(i, i + 1), int(batch.lengths[i])
            mine[int(batch.rows[i])] = _Row(batch.tokens[row, :end], labels[row, :end])
    norms = torch.zeros(_num_examples(batches), dtype=torch.float64)
    for example in range(len(norms)):
        gradient = loss_gradient(model, [mine.get(example, _BLANK)], torch.ones(1, dtype=torch.float64))
        norms[example] = norm(gradient)
        del gradient
    return norms


class _Row(NamedTuple):
    """A batch of one example."""

    tokens: Tensor
    labels: Tensor
    tasks: Tensor = torch.zeros(1, dtype=torch.int64)


# Of a process whose turn it is not.
_BLANK = _Row(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORE_INDEX))


def gradient_dots(
    model: nn.Module,
    batches: Sequence[Batch],
    direction: Sequence[Tensor],
    num_tasks: int,
    *,
    relative_step: float,
    loss_step: float = 0.05,
) -> Tensor:
    """``<direction, gradient of task i's mean loss>`` by central finite differences: two forward passes, no backward.

    The weights move by ``+- eps * direction`` and are restored bit for bit from a copy, which is all the memory that
    this needs. ``eps`` is the smaller of two bounds:

    - ``eps * ||direction|| = relative_step * ||weights||``. Alone this suits models of about 10M weights.
    - ``eps * ||direction||^2 = loss_step``, the first-order change of the loss whose gradient ``direction`` is.
      ``||weights||`` grows with the number of weights, but the distance over which a loss is linear does not: for a
      model of 135M weights a relative step of 1e-3 changes the loss by 16 nats, and dots get the wrong sign.

    Args:
        model: see the module's docstring; trainable weights in fp32 or float64 (compute may be in bf16).
        batches: the examples, the same in both forward passes.
        direction: a gradient, one tensor per trainable parameter, as ``loss_gradient`` returns it.
        num_tasks: tasks in the run.
        relative_step: 1e-3 suits fp32 compute, 3e-3 to 1e-2 bf16 compute (measured).
        loss_step: 0.05 suits fp32 compute; bf16 compute, whose rounding is coarse, needs about 1 (measured). Infinity:
            only the first bound.

    Returns:
        (num_tasks,) float64 on the CPU; NaN for a task without a supervised token. A ``direction`` of 0 gives 0 without
        a forward pass.

    Raises:
        ValueError: trainable weights are in half precision, which is too coarse for a small step.
    """
    assert relative_step > 0 and loss_step > 0, f"relative_step {relative_step}, loss_step {loss_step}"
    parameters = _trainable(model)
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype: finite differences need fp32 weights, but these are {parameter.dtype}; "
                "use `bf16` (fp32 weights, bf16 compute) or `fp32`"
            )
    counts = num_supervised(batches, num_tasks)
    size = norm(direction)
    assert math.isfinite(size), f"the direction's norm is {size}: the model has diverged"
    if size == 0:
        return torch.zeros(num_tasks, dtype=torch.float64) / counts
    # Weights that are all 0 (LoRA's B alone, at the start) have no scale.
    eps = min(relative_step * (norm(parameters) or 1.0) / size, loss_step / size / size)
    with measuring(model), restored(model) as originals:
        _move(parameters, originals, direction, eps)
        above = _loss_sums(model, batches, num_tasks)
        _move(parameters, originals, direction, -eps)
        below = _loss_sums(model, batches, num_tasks)
    return (above - below) / (2 * eps) / counts


def gradient_dots_by_backward(
    model: nn.Module, batches: Sequence[Batch], direction: Sequence[Tensor], num_tasks: int
) -> Tensor:
    """The exact value of ``gradient_dots``, by one backward pass per task, in any dtype.

    Args:
        model: see the module's docstring.
        batches: the examples.
        direction: one tensor per trainable parameter, as ``loss_gradient`` returns it.
        num_tasks: tasks in the run.

    Returns:
        (num_tasks,) float64 on the CPU; NaN for a task without a supervised token.
    """
    counts = num_supervised(batches, num_tasks)
    dots = torch.full((num_tasks,), math.nan, dtype=torch.float64)
    for task in torch.nonzero(counts).flatten().tolist():
        weights = torch.zeros(num_tasks, dtype=torch.float64)
        weights[task] = 1
        dots[task] = inner(loss_gradient(model, batches, weights), direction)
    return dots


def gradient_moments(model: nn.Module, halves: Sequence[Sequence[Batch]], num_tasks: int) -> tuple[Tensor, Tensor]:
    """The squared norm of each task's gradient, and the variance of one example's, by two backward passes per task.

    With the gradients a and b of m and n examples of a task, drawn independently, <a, b> is an unbiased estimate of the
    squared norm, which may be negative, and |a - b|^2 / (1/m + 1/n) one of the trace of the covariance of an example's
    gradient, unbiased if all examples have the same number of supervised tokens.

    Args:
        model: see the module's docstring.
        halves: two sets of examples.
        num_tasks: tasks in the run.

    Returns:
        (num_tasks,) float64 on the CPU each; NaN for a task that is not in both.
    """
    in_both = torch.stack([num_supervised(half, num_tasks) for half in halves]).amin(0) > 0
    squared_norms, variances = torch.full((2, num_tasks), math.nan, dtype=torch.float64)
    # 1/m + 1/n
    spread = torch.stack([1 / _examples_per_task(half, num_tasks) for half in halves]).sum(0)
    for task in in_both.nonzero().flatten().tolist():
        weights = torch.zeros(num_tasks, dtype=torch.float64)
        weights[task] = 1
        a, b = (loss_gradient(model, half, weights) for half in halves)
        squared_norms[task] = inner(a, b)
        variances[task] = (inner(a, a) + inner(b, b) - 2 * squared_norms[task]) / spread[task]
    return squared_norms, variances


def step_gains(model: nn.Module, batches: Sequence[Sequence[Batch]], *, learning_rate: float) -> Tensor:
    """The relative decrease of each task's loss by one step of SGD on that task alone, on the same examples.

    Each step starts from the weights as they are. A gradient and a copy of the trainable weights are in memory.

    Args:
        model: see the module's docstring; trainable weights in fp32 or float64.
        batches: the examples of each task, none of which is of another one.
        learning_rate: of the step.

    Returns:
        (num_tasks,) float64 on the CPU, (before - after) / (before + ``SMALLEST_LOSS``); negative where the loss rises,
        NaN for a task without a supervised token.
    """
    gains = torch.full((len(batches),), math.nan, dtype=torch.float64)
    for task, weights in enumerate(torch.eye(len(batches), dtype=torch.float64)):
        own = batches[task]
        if num_supervised(own, len(batches))[task] == 0:
            continue
        before = task_losses(model, own, len(batches))[task]
        with stepped(model, loss_gradient(model, own, weights), -learning_rate):
            after = task_losses(model, own, len(batches))[task]
        gains[task] = (before - after) / (before + SMALLEST_LOSS)
    return gains


@torch.no_grad()
def task_embeddings(model: nn.Module, batches: Sequence[ExampleBatch], num_tasks: int) -> Tensor:
    """The embedding of a task: the top hidden states, averaged over the tokens of an example and over the examples.

    Args:
        model: see the module's docstring.
        batches: the examples.
        num_tasks: tasks in the run.

    Returns:
        (num_tasks, dim) float64 on the CPU; NaN for a task without an example.
    """
    sums: Tensor | None = None
    counts = torch.zeros(num_tasks, dtype=torch.float64)
    with measuring(model):
        for batch in batches:
            device = device_of(model)
            hidden = model(batch.tokens.to(device), batch.labels.to(device), "hidden_states").float()
            _reshard(model)
            real = torch.arange(hidden.shape[1], device=device) < batch.lengths.to(device)[:, None]
            means = (hidden * real[:, :, None]).sum(1).to("cpu", torch.float64) / batch.lengths.cpu()[:, None]
            sums = torch.zeros(num_tasks, means.shape[1], dtype=torch.float64) if sums is None else sums
            kept = _examples(batch)
            sums.index_add_(0, batch.tasks.cpu()[kept], means[kept])
            counts += torch.bincount(batch.tasks.cpu()[kept], minlength=num_tasks)
    assert sums is not None, "there are no batches"
    return all_reduce_sum(sums) / all_reduce_sum(counts)[:, None]


@torch.no_grad()
def example_losses(model: nn.Module, batches: Sequence[ExampleBatch], *, tokens: Tokens = "answer") -> Tensor:
    """The mean loss of each example, in nats per token: the logarithm of its perplexity.

    Args:
        model: see the module's docstring.
        batches: the examples; their ``rows`` number all examples of all processes from 0.
        tokens: of which the mean is. ``all`` computes logits at every position, not only at those of answers.

    Returns:
        (num_examples,) float64 on the CPU, in the order of ``rows``.
    """
    sums, counts = torch.zeros(2, _num_examples(batches), dtype=torch.float64)
    with measuring(model):
        for batch in batches:
            labels = _labels(batch, tokens)
            losses = model(batch.tokens.to(device_of(model)), labels.to(device_of(model)))
            _reshard(model)
            rows = _of_supervised(labels, batch.rows)
            sums.index_add_(0, rows, losses.to("cpu", torch.float64))
            counts.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
    return all_reduce_sum(sums) / all_reduce_sum(counts)


@torch.no_grad()
def example_uncertainties(
    model: nn.Module,
    batches: Sequence[ExampleBatch],
    measure: Callable[[Tensor, Tensor], Tensor],
    *,
    mc_samples: int = 1,
    dropout: bool = False,
) -> Tensor:
    """How uncertain the model is of each example's answer, averaged over forward passes.

    Args:
        model: see the module's docstring.
        batches: as for ``example_losses``.
        measure: takes an example's ``p`` (num_supervised,) float64, the probability of the most likely token at each
            position, and ``entropy`` (num_supervised,) float64, in nats; returns a scalar.
        mc_samples: forward passes over all batches.
        dropout: use dropout as in training, with new masks in every forward pass.

    Returns:
        (num_examples,) float64 on the CPU, in the order of ``rows``.
    """
    values = torch.zeros(_num_examples(batches), dtype=torch.float64)
    with measuring(model, dropout=dropout):
        for batch in [*batches] * mc_samples:
            device = device_of(model)
            logits = model(batch.tokens.to(device), batch.labels.to(device), "logits")
            _reshard(model)
            log_p = torch.log_softmax(logits, dim=-1)
            p = log_p.max(-1).values.exp().to("cpu", torch.float64)
            entropy = -(log_p.exp() * log_p).sum(-1).to("cpu", torch.float64)
            rows = _of_supervised(batch.labels, batch.rows)
            for row in rows.unique().tolist():
                values[row] += measure(p[rows == row], entropy[rows == row])
    return all_reduce_sum(values) / mc_samples


def task_means(values: Tensor, batches: Sequence[ExampleBatch], num_tasks: int) -> Tensor:
    """The mean of one value per example over each task's examples.

    Args:
        values: (num_examples,) float64.
        batches: the examples, for their tasks.
        num_tasks: tasks in the run.

    Returns:
        (num_tasks,) float64 on the CPU; NaN for a task without an example.
    """
    sums, counts = torch.zeros(2, num_tasks, dtype=torch.float64)
    for batch in batches:
        kept = _examples(batch)
        tasks = batch.tasks.cpu()[kept]
        sums.index_add_(0, tasks, values[batch.rows.cpu()[kept]])
        counts += torch.bincount(tasks, minlength=num_tasks)
    return all_reduce_sum(sums) / all_reduce_sum(counts)


def num_supervised(batches: Sequence[Batch], num_tasks: int) -> Tensor:
    """(num_tasks,) float64 on the CPU: supervised tokens of each task in all batches of all processes."""
    counts = torch.zeros(num_tasks, dtype=torch.int64)
    for batch in batches:
        counts += torch.bincount(_of_supervised(batch.labels, batch.tasks), minlength=num_tasks)
    return all_reduce_sum(counts.to(torch.float64))


def _examples_per_task(batches: Sequence[Batch], num_tasks: int) -> Tensor:
    """(num_tasks,) float64 on the CPU: examples of each task in all batches of all processes."""
    counts = torch.zeros(num_tasks, dtype=torch.float64)
    for batch in batches:
        counts += torch.bincount(batch.tasks.cpu()[_examples(batch)], minlength=num_tasks)
    return all_reduce_sum(counts)


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The inner product of two gradients, summed in float64, over all shards."""
    sharded, unsharded = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(left, right, strict=True):
            # A product of bf16 tensors would be rounded to bf16.
            wide = torch.promote_types(a.dtype, torch.float32)
            product = (to_local(a).to(wide) * to_local(b)).sum(dtype=torch.float64).cpu()
            (sharded if isinstance(a, DTensor) else unsharded).add_(product)
    return float(all_reduce_sum(sharded) + unsharded)


def norm(tensors: Sequence[Tensor]) -> float:
    """The L2 norm of a gradient, over all shards."""
    return math.sqrt(inner(tensors, tensors))


@contextmanager
def stepped(model: nn.Module, direction: Sequence[Tensor], scale: float) -> Iterator[None]:
    """The model at ``weights + scale * direction``; afterwards the weights are restored bit for bit from a copy.

    Args:
        model: see the module's docstring.
        direction: one tensor per trainable parameter.
        scale: for a step of gradient descent along a gradient, minus the learning rate.
    """
    parameters = _trainable(model)
    with restored(model) as originals:
        _move(parameters, originals, direction, scale)
        yield


@torch.no_grad()
def move(model: nn.Module, direction: Sequence[Tensor], scale: float) -> None:
    """Adds ``scale * direction`` to the weights, inside ``restored``."""
    for parameter, part in zip(_trainable(model), direction, strict=True):
        to_local(parameter).add_(to_local(part), alpha=scale)


@contextmanager
def exchanged(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """The model with other trainable weights. Until the end of the context ``weights`` hold its own, bit for bit.

    Args:
        model: see the module's docstring.
        weights: of each trainable parameter this process's shard, on any device.
    """
    _exchange(model, weights)
    try:
        yield
    finally:
        _exchange(model, weights)


@contextmanager
def only_trained(model: nn.Module, kept: Collection[nn.Parameter]) -> Iterator[None]:
    """Until the end of the context only these weights train.

    Gradients, copies and steps are of them alone, and backward passes end at the lowest of them.

    Args:
        model: see the module's docstring.
        kept: some of the trainable parameters.
    """
    ids = {id(parameter) for parameter in kept}
    frozen = [parameter for parameter in _trainable(model) if id(parameter) not in ids]
    # FSDP2 reads what trains when it gathers the shards.
    _reshard(model)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        _reshard(model)


def trainable_copies(model: nn.Module, *, device: torch.device) -> list[Tensor]:
    """Copies of the trainable weights (of the local shards) on a device."""
    return [to_local(parameter).detach().to(device, copy=True) for parameter in _trainable(model)]


@torch.no_grad()
def _exchange(model: nn.Module, weights: Sequence[Tensor]) -> None:
    _reshard(model)
    for parameter, weight in zip(_trainable(model), weights, strict=True):
        own = to_local(parameter).clone()
        to_local(parameter).copy_(weight)
        weight.copy_(own)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def _move(parameters: Sequence[Tensor], originals: Sequence[Tensor], direction: Sequence[Tensor], scale: float) -> None:
    """``parameters = originals + scale * direction``."""
    for parameter, original, part in zip(parameters, originals, direction, strict=True):
        torch.add(original, to_local(part), alpha=scale, out=to_local(parameter))


@contextmanager
def restored(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a copy of the trainable weights (of the local shards), and always restores the weights from it."""
    parameters = _trainable(model)
    originals = [to_local(parameter).detach().clone() for parameter in parameters]
    _reshard(model)
    try:
        yield originals
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                to_local(parameter).copy_(original)
        _reshard(model)


@contextmanager
def measuring(model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Eval mode, or with ``dropout`` training mode; modes and generators are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    accelerators = {"devices": [device], "device_type": device.type} if device.type != "cpu" else {"devices": []}
    try:
        model.train(dropout)
        with torch.random.fork_rng(**accelerators):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _token_losses(
    model: nn.Module,
    batch: Batch,
    *,
    of: Tensor,  # (batch,) int64
    rows: Tensor | None = None,  # (batch,) bool; None: all
) -> tuple[Tensor, Tensor]:
    """Losses of the supervised positions of ``rows``, on the model's device, and ``of`` of each, on the CPU."""
    tokens, labels, of = batch.tokens, batch.labels, of.cpu()
    if rows is not None and not rows.all():
        kept = rows.nonzero().flatten()
        tokens, labels, of = tokens[kept.to(tokens.device)], labels[kept.to(labels.device)], of[kept]
    device = device_of(model)
    return model(tokens.to(device), labels.to(device)), _of_supervised(labels, of)


def _examples(batch: Batch) -> Tensor:
    """(batch,) bool on the CPU: which rows are examples, and not dummies."""
    return (batch.labels.cpu() != IGNORE_INDEX).any(1)


def _labels(batch: ExampleBatch, tokens: Tokens) -> Tensor:
    """(batch, length): the labels of the batch, and with ``tokens: all`` every next token that its rows show."""
    if tokens == "answer":
        return batch.labels
    following = torch.full_like(batch.tokens, IGNORE_INDEX)
    following[:, :-1] = batch.tokens[:, 1:]
    # A dummy stays without labels.
    ends = torch.where(_examples(batch), batch.lengths.cpu() - 1, 0).to(following.device)
    known = torch.arange(following.shape[1], device=following.device) < ends[:, None]
    supervised = batch.labels != IGNORE_INDEX
    return torch.where(supervised, batch.labels, following.masked_fill(~known, IGNORE_INDEX))


def _num_examples(batches: Sequence[Batch]) -> int:
    """The number of examples on all processes."""
    here = sum(int(_examples(batch).sum()) for batch in batches)
    return int(all_reduce_sum(torch.tensor(float(here), dtype=torch.float64)))


def _of_supervised(labels: Tensor, of: Tensor) -> Tensor:
    """(num_supervised,) on the CPU: for every supervised position the value of ``of`` (batch,) for its row."""
    supervised = labels.cpu() != IGNORE_INDEX
    return of.cpu()[:, None].expand_as(supervised)[supervised]


@torch.no_grad()
def _loss_sums(model: nn.Module, batches: Sequence[Batch], num_tasks: int) -> Tensor:
    """(num_tasks,) float64: the sum of each task's losses over batches and processes."""
    sums = torch.zeros(num_tasks, dtype=torch.float64)
    for batch in batches:
        losses, tasks = _token_losses(model, batch, of=batch.tasks)
        _reshard(model)
        # On the CPU the order of addition is fixed.
        sums.index_add_(0, tasks, losses.to("cpu", torch.float64))
    return all_reduce_sum(sums)


def _reshard(model: nn.Module) -> None:
    """Frees the weights that FSDP2 has gathered, so that the next forward pass gathers the shards again."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()
