"""What a run would do, from its config and its data alone: nothing is trained, and no weight is read or made."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from adapt_recipes import data, models
from adapt_recipes.config import TrainConfig
from adapt_recipes.display import count, of_available, task_name, task_table
from adapt_recipes.mixture.interface import check_mixture
from adapt_recipes.planning.memory import Memory, Shape, estimate_memory
from adapt_recipes.planning.update import Pass, Source, Update, update_of
from adapt_recipes.signals.reward_interface import check_reward
from adapt_recipes.training import precision

MANY_EPOCHS = 4  # over a task; what comes after is worth ever less (Muennighoff et al., arXiv 2305.16264)
WIDE = 100  # columns of a terminal; with fewer there is no room for names beside all of a table's numbers, and
WIDE_ONLY = ("share", "sup./ex.", "tok./ex.")  # go: they follow from others
WARNING = "yellow"


@dataclass(frozen=True)
class TaskPlan:
    """What a run would make of one task.

    Attributes:
        examples: to train on.
        dropped: left out because they are too long.
        supervised_tokens: of ``examples``.
        share: of all tasks' supervised tokens.
        mean_supervised_tokens, mean_tokens: of an example; ``tokens`` are all that the model reads.
        probability: at the start.
        epochs: supervised tokens that the run spends on the task, over those there are.
    """

    examples: int
    dropped: int
    supervised_tokens: int
    share: float
    mean_supervised_tokens: float
    mean_tokens: float
    probability: float
    epochs: float


@dataclass(frozen=True)
class Plan:
    """What a run would do. Counts of tokens are what its ``summary.json`` would say.

    Attributes:
        tasks: by name.
        available_supervised_tokens: of all tasks.
        budget_tokens: supervised tokens to spend.
        steps: optimizer steps.
        tokens: that they read, padding left out.
        parameters: of the model, a tied head counted once.
        memory_bytes: of one process.
        checkpoint_bytes: of one checkpoint, all processes together.
        mixture_updates: how many.
        mixture_cost_steps: what they take in all, in training steps: counting passes over tokens, a forward is 1/3.
        probe_tokens: supervised tokens that probes and validation read.
        exact: whether the mixture stays what it is at the start. Otherwise ``steps``, ``epochs`` and all that follows
            from them is what they would be if it did.
        warnings: in a line each.
    """

    tasks: dict[str, TaskPlan]
    available_supervised_tokens: int
    budget_tokens: int
    steps: int
    tokens: int
    parameters: int
    memory_bytes: Memory
    checkpoint_bytes: int
    mixture_updates: int
    mixture_cost_steps: float
    probe_tokens: int
    exact: bool
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What ``tune plan --json`` prints."""
        return asdict(self)


def make_plan(config: Any, *, num_processes: int = 1, say: Callable[[str], object] = lambda doing: None) -> Plan:
    """Work out what a run would do.

    Args:
        config: of a recipe, ours or one of the user's whose ``Config`` inherits ``TrainConfig``.
        num_processes: that the run would have.
        say: is told what is being done, as it may take minutes.

    Raises:
        ValueError: the run would be refused, or the config is no ``TrainConfig``.
    """
    if not isinstance(config, TrainConfig):
        raise ValueError("the recipe's Config does not inherit TrainConfig, without which there is no plan")
    if config.batch_size < num_processes:  # as ``training.distributed.processes`` says it
        raise ValueError(
            f"batch_size: {config.batch_size} examples are too few for {num_processes} processes; one each"
        )
    say("reading tasks")
    tasks = data.load_tasks(config.tasks, tokenizer=config.tokenizer.build(), max_seq_len=config.max_seq_len)
    names = [task.name for task in tasks]
    available = torch.stack([task.train.num_supervised.sum() for task in tasks])
    budget_tokens = config.budget.num_tokens(int(available.sum()))
    given = {"task_names": names, "num_supervised_tokens": available, "budget_tokens": budget_tokens}
    mixture = config.mixture.build(**given)
    update_every = getattr(config, "mixture_update_every", 0)
    _check_mixture(mixture, config, num_tasks=len(tasks))
    model = models.build(config, tasks, device=torch.device("cpu"), checkpointer=None)
    model.activation_offloading = False
    reward = None
    if hasattr(config, "reward"):
        reward = config.reward.build(task_names=names, model=model) if config.reward else None
        check_reward(reward, mixture)
    probe = getattr(config, "probe", None)
    if probe is None and set(mixture.observes) - {"train_losses"}:
        raise ValueError(f"the recipe's Config has no 'probe', and the mixture observes {mixture.observes}")
    update = update_of(mixture.observes, probe, reward)
    takes_differences = "gradient_dots" in mixture.observes and getattr(probe, "estimator", "") == "finite_difference"
    learning_rate = config.optimizer.arguments.get("lr", math.inf)
    precision.check(config.dtype, learning_rate=learning_rate, finite_differences=takes_differences)

    say("drawing examples")
    drawn = _draw(config, tasks, mixture.probabilities(), budget_tokens)
    num_updates = (drawn.steps - 1) // update_every if update_every and mixture.observes else 0
    reads = _Reads(tasks, count=probe.examples if probe else 0, seed=config.seed)
    validations = 2 + ((drawn.steps - 1) // every if (every := getattr(config, "validate_every", 0)) else 0)
    probe_tokens = validations * reads.validation_tokens
    cost = 0.0
    reads_pool = any(each.source == "pool" for each in update.passes)
    before = [Pass("pool")] if reads_pool and update_every else []  # (9) of MoS
    for number, passes in enumerate([before, *[update.passes] * num_updates], start=-1):
        for each in passes:
            supervised, tokens = reads.tokens(each.source, number)
            probe_tokens += supervised
            cost += each.steps * tokens * drawn.steps / drawn.tokens

    say("reckoning memory")
    in_step, in_reading = _shapes(config, tasks, reads, num_processes)
    memory, size = estimate_memory(
        model,
        config,
        in_step,
        read=in_reading,
        update=update if num_updates else Update(),
        num_processes=num_processes,
    )
    task_plans = {
        task.name: TaskPlan(
            examples=len(task.train),
            dropped=task.num_dropped,
            supervised_tokens=tokens,
            share=tokens / int(available.sum()),
            mean_supervised_tokens=tokens / len(task.train),
            mean_tokens=float((task.train.lengths - 1).double().mean()),
            probability=p,
            epochs=spent / tokens,
        )
        for task, tokens, p, spent in zip(
            tasks, available.tolist(), mixture.probabilities().tolist(), drawn.task_tokens.tolist(), strict=True
        )
    }
    found = Plan(
        tasks=task_plans,
        available_supervised_tokens=int(available.sum()),
        budget_tokens=budget_tokens,
        steps=drawn.steps,
        tokens=drawn.tokens,
        parameters=size.parameters,
        memory_bytes=memory,
        checkpoint_bytes=size.checkpoint_bytes,
        mixture_updates=num_updates,
        mixture_cost_steps=cost,
        probe_tokens=probe_tokens,
        exact=num_updates == 0,
        warnings=[],
    )
    found.warnings.extend(_warnings(found, update_every=update_every, learns=bool(mixture.observes), reward=reward))
    return found


def show(plan: Plan, config: Any, *, num_processes: int, console: Console | None = None) -> None:
    """What ``tune plan`` prints for people, of a plan and its config; on standard output unless told otherwise."""
    # A pipe or a file has no width; there the table is as wide as it needs to be.
    console = console or (Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200))
    soft_wrap = not console.is_terminal  # a terminal gets lines broken between words, a pipe gets them whole
    columns = _COLUMNS if console.width >= WIDE else {k: v for k, v in _COLUMNS.items() if k not in WIDE_ONLY}
    table = task_table(*columns)
    for name, task in plan.tasks.items():
        table.add_row(task_name(name), *(cell(task) for cell in columns.values()))
    recipe, device = type(config).__module__, config.device or "the best device there is"
    console.print(
        f"{recipe}: strategy {config.strategy}, on {device} in {config.dtype}", markup=False, soft_wrap=soft_wrap
    )
    console.print(table)
    if any(map(_is_odd, plan.tasks.values())):
        console.print(f"! read more than {MANY_EPOCHS} times, or never", style=WARNING)
    memory, about = plan.memory_bytes, "" if plan.exact else "about "
    parts = ", ".join(f"{name} {_size(value)}" for name, value in asdict(memory).items())
    where = "the process" if num_processes == 1 else f"each of {num_processes} processes"
    mixture, cost = "fixed", plan.mixture_cost_steps
    if plan.mixture_updates:
        mixture = count(plan.mixture_updates, "update")
    if cost:  # also without updates: a reward may be relative to the base model
        mixture += f"; costs as much as {about}{cost:,.1f} steps ({cost / (plan.steps + cost):.1%} of the time)"
    lines = [
        f"budget: {of_available(plan.budget_tokens, plan.available_supervised_tokens)}, in {about}"
        f"{count(plan.steps, 'step')} that read {count(plan.tokens, 'token')}",
        f"model: {count(plan.parameters, 'parameter')}",
        f"disk: a checkpoint takes {_size(plan.checkpoint_bytes)}; while one is saved there are keep_checkpoints + 1, "
        f"{_size((config.keep_checkpoints + 1) * plan.checkpoint_bytes)}",
        f"memory of {where}: {_size(memory.total)} ({parts}), plus kernel and CUDA overhead (1 to 2 GB on a GPU)",
        f"mixture: {mixture}",
        f"probes and validation read {about}{count(plan.probe_tokens, 'supervised token')} more",
    ]
    if not plan.exact:
        lines.append("the mixture is learned: steps and epochs assume that it stays at its starting probabilities")
    for line in lines:
        console.print(line, markup=False, soft_wrap=soft_wrap)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style=WARNING, markup=False, soft_wrap=soft_wrap)


_COLUMNS: dict[str, Callable[[TaskPlan], str]] = {
    "examples": lambda task: f"{task.examples:,}",
    "dropped": lambda task: f"{task.dropped:,}",
    "sup. tokens": lambda task: f"{task.supervised_tokens:,}",
    "share": lambda task: f"{task.share:.1%}",
    "sup./ex.": lambda task: f"{task.mean_supervised_tokens:,.1f}",
    "tok./ex.": lambda task: f"{task.mean_tokens:,.1f}",
    "start p": lambda task: f"{task.probability:.3f}",
    "epochs": lambda task: f"{'! ' if _is_odd(task) else ''}{task.epochs:.3g}",
}


def _is_odd(task: TaskPlan) -> bool:
    return task.epochs == 0 or task.epochs > MANY_EPOCHS


def _check_mixture(mixture: Any, config: Any, *, num_tasks: int) -> None:
    """As its recipe does: a recipe says in SIGNALS what it measures, and one without updates measures nothing."""
    recipe = sys.modules[type(config).__module__]
    measurable: Sequence[str] = ()
    if hasattr(config, "mixture_update_every"):
        measurable = getattr(recipe, "SIGNALS", getattr(mixture, "observes", ()))
    check_mixture(mixture, measurable, num_tasks=num_tasks, recipe=recipe.__name__)


@dataclass
class _Drawn:
    """What a run would draw."""

    task_tokens: Tensor  # (num_tasks,) int64, supervised
    tokens: int = 0
    steps: int = 0


def _draw(config: Any, tasks: Sequence[data.Task], probabilities: Tensor, budget_tokens: int) -> _Drawn:
    """By the run's own sampler, with a mixture that stays as it is."""
    sampler = data.TokenSampler(tasks, seed=config.seed)
    lengths = [(task.train.lengths - 1).tolist() for task in tasks]  # as the model reads them
    drawn = _Drawn(torch.zeros(len(tasks), dtype=torch.int64))
    spent = [0] * len(tasks)
    while (left := budget_tokens - sum(spent)) > 0:
        p = probabilities
        if getattr(config, "sampling", "tokens") == "dataset":
            p = data.sample_one_hot(p, seed=config.seed, step=drawn.steps)
        for draw in sampler.draw(p, max_examples=config.batch_size, max_tokens=left):
            spent[draw.task] += draw.num_supervised_tokens
            drawn.tokens += lengths[draw.task][draw.example_index]
        drawn.steps += 1
    drawn.task_tokens = torch.tensor(spent)
    return drawn


class _Reads:
    """What probes and validation read, in tokens."""

    def __init__(self, tasks: Sequence[data.Task], *, count: int, seed: int) -> None:
        self._tasks, self._count, self._seed = tasks, count, seed
        splits = [task.validation for task in tasks if task.validation is not None]
        self.validation_tokens = sum(int(split.num_supervised.sum()) for split in splits)
        self.num_validation = sum(len(split) for split in splits)
        self.num_probed = count * len(tasks)
        self._always: dict[Source, tuple[int, int]] = {}

    def tokens(self, source: Source, update: int) -> tuple[int, int]:
        """(supervised, all) tokens that are read once in an update, which are numbered from 0."""
        if source == "train":
            return self._counted(data.random_examples(self._tasks, self._count, seed=self._seed, update=update))
        if source not in self._always:
            self._always[source] = self._counted(
                data.validation_examples(self._tasks, self._count)
                if source == "validation"
                else data.random_examples(self._tasks, self._count, seed=self._seed, update=None)
            )
        return self._always[source]

    @staticmethod
    def _counted(examples: Sequence[tuple[int, data.Example]]) -> tuple[int, int]:
        supervised = sum(int((example.labels != data.IGNORE_INDEX).sum()) for _, example in examples)
        return supervised, sum(len(example.tokens) for _, example in examples)


def _shapes(config: Any, tasks: Sequence[data.Task], reads: _Reads, num_processes: int) -> tuple[Shape, Shape]:
    """The largest micro-batches there can be, in a step and in what probes and validation read.

    All examples are as long as the longest, and supervised as the task is that is most.
    """
    splits = [split for task in tasks for split in (task.train, task.validation) if split is not None]
    longest = max(int(split.lengths.max()) for split in splits) - 1
    supervised = max(int(s.num_supervised.sum()) / int((s.lengths - 1).sum()) for s in splits)
    fitting = max(1, config.micro_batch_tokens // longest)

    def shape(num_examples: int) -> Shape:
        most = math.ceil(num_examples / num_processes)
        rows = min(fitting, most)
        return Shape(rows, longest, math.ceil(rows * longest * supervised), several=most > rows)

    return shape(config.batch_size), shape(max(reads.num_validation, reads.num_probed))


def _warnings(plan: Plan, *, update_every: int, learns: bool, reward: Any) -> list[str]:
    warnings = []
    for name, task in plan.tasks.items():
        if task.epochs == 0:
            warnings.append(f"task '{name}' would never be read: its p is {task.probability:.3g}")
        elif task.epochs > MANY_EPOCHS:
            warnings.append(f"task '{name}' would be read {task.epochs:.3g} times over, more than {MANY_EPOCHS}")
    if learns and not plan.mixture_updates:
        when = f"every {update_every} steps of {plan.steps}" if update_every else "never (mixture_update_every)"
        warnings.append(f"the mixture would not be updated: {when}")
    if plan.probe_tokens > plan.budget_tokens:
        warnings.append(
            f"probes and validation would read {plan.probe_tokens:,} supervised tokens, more than the budget of "
            f"{plan.budget_tokens:,}"
        )
    if reward is not None and not hasattr(reward, "gradients"):
        warnings.append(
            f"reward: {type(reward).__name__} does not say how many `gradients` it keeps: taken for 0, forwards alone"
        )
    return warnings


def _size(num_bytes: int) -> str:
    """In GB and MB of the thousands."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
