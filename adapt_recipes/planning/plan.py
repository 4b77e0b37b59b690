"""Computes what a run would do from its config and its data. Nothing is trained, and no weights are loaded."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from adapt_recipes import data, models
from adapt_recipes.budget import Ledger
from adapt_recipes.config import TrainConfig, to_dict
from adapt_recipes.display import WIDE, count, left_out_columns, of_available, task_name, task_table, unused_keys
from adapt_recipes.mixture.interface import OF_LOOKAHEAD, check_mixture
from adapt_recipes.planning.memory import Memory, Shape, estimate_memory
from adapt_recipes.planning.update import Source, Update, update_of
from adapt_recipes.run_directory import check_output_dir
from adapt_recipes.signals.ksteps import check_last_layers
from adapt_recipes.signals.levels import level_sizes
from adapt_recipes.signals.reward_interface import check_reward
from adapt_recipes.start_from import start_mixture
from adapt_recipes.steps import batch_tokens_warning, expected_steps
from adapt_recipes.training import precision
from adapt_recipes.training.best import BestValidation

# Of a task; further epochs are worth less and less (Muennighoff et al., arXiv 2305.16264).
MANY_EPOCHS = 4
# These follow from the others.
WIDE_ONLY = ("share", "sup./ex.", "tok./ex.")
WARNING_STYLE = "yellow"


@dataclass(frozen=True)
class TaskPlan:
    """The plan for one task.

    Attributes:
        examples: of the training split.
        dropped: examples that are in no split, for the reasons in ``left_out``.
        left_out: what is not trained on.
        supervised_tokens: of ``examples``.
        share: of all tasks' supervised tokens.
        mean_supervised_tokens, mean_tokens: of an example; ``tokens`` are all tokens that the model reads.
        probability: of the mixture at the start.
        effective_probability: what the sampler draws by at the start, under ``tasks.max_epochs_per_task``.
        epochs: supervised tokens that the run spends on the task, divided by ``supervised_tokens``.
    """

    examples: int
    dropped: int
    left_out: data.LeftOut
    supervised_tokens: int
    share: float
    mean_supervised_tokens: float
    mean_tokens: float
    probability: float
    effective_probability: float
    epochs: float


@dataclass(frozen=True)
class Plan:
    """The plan for a run. Counts of tokens are those of its ``summary.json``.

    Attributes:
        tasks: by name.
        targets: the examples that each target validates and tests on, by name; they are never trained.
        available_supervised_tokens: of all tasks.
        budget_tokens: supervised tokens to spend.
        steps: optimizer steps.
        tokens: read in these steps, without padding.
        parameters: of the model, a tied head counted once.
        memory_bytes: of one process.
        checkpoint_bytes: of one checkpoint, all processes together.
        mixture_updates: number of updates.
        mixture_cost_steps: cost of all updates in training steps. It counts forward and backward passes over tokens; a
            forward pass is 1/3 of a step.
        probe_tokens: supervised tokens read by mixture updates. With ``levels`` an estimate: which examples are in a
            level only the base model's losses say, so it assumes that they are as long in each.
        validation_tokens: supervised tokens read by validations and the test.
        total_tokens: all tokens read, those of ``tokens`` included.
        exact: whether the mixture keeps its starting probabilities. If not, ``tokens`` and ``epochs`` assume that it
            does, and so do ``steps`` and the counts that follow from them unless ``exact_steps``.
        exact_steps: whether ``steps`` are exact: with ``batch_tokens`` a learned mixture makes as many.
        warnings: one line each.
    """

    tasks: dict[str, TaskPlan]
    targets: dict[str, dict[str, int]]
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
    validation_tokens: int
    total_tokens: int
    exact: bool
    exact_steps: bool
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What ``tune plan --json`` prints."""
        return asdict(self)


def make_plan(config: Any, *, num_processes: int = 1, say: Callable[[str], object] = lambda phase: None) -> Plan:
    """Computes the plan of a run.

    Args:
        config: of a recipe whose ``Config`` inherits ``TrainConfig``.
        num_processes: of the run.
        say: called with the name of each phase, because some take minutes.

    Raises:
        ValueError: the run would be refused, or the config is not a ``TrainConfig``.
    """
    if not isinstance(config, TrainConfig):
        raise ValueError("the recipe's Config does not inherit TrainConfig, which a plan needs")
    # The same error as in ``training.process_group``.
    if config.batch_size is not None and config.batch_size < num_processes:
        raise ValueError(
            f"batch_size: {config.batch_size} examples are too few for {num_processes} processes; one each"
        )
    check_output_dir(to_dict(config))
    say("reading tasks")
    parts = _build(config)
    tasks, mixture, update = parts.tasks, parts.mixture, parts.update

    # Steps, and what mixture updates, validation and test read.
    say("drawing examples")
    probabilities = mixture.probabilities()
    effective = parts.ledger.capped(probabilities)
    drawn = _draw(config, parts, probabilities)
    update_every = getattr(config, "mixture_update_every", 0)
    levels = getattr(config, "levels", None)
    learns = bool(mixture.observes or levels)
    num_updates = (drawn.steps - 1) // update_every if update_every and learns else 0
    num_probed = parts.probe.examples if parts.probe else 0
    num_lookahead = getattr(parts.probe, "steps", 0)
    reads = _Reads(tasks, parts.targets, count=num_probed, steps=num_lookahead, seed=config.seed, levels=levels)
    (probe_tokens, probe_total_tokens), cost = _cost_of_probes(config, update, reads, drawn, num_updates=num_updates)
    validate_every = getattr(config, "validate_every", 0)
    num_validations = 2 + ((drawn.steps - 1) // validate_every if validate_every else 0)
    validation_total_tokens = num_validations * reads.validation.tokens + reads.test.tokens

    say("estimating memory")
    in_step, in_reading = _shapes(
        config,
        [*tasks, *parts.targets],
        reads,
        num_processes,
        most_examples=_most_examples(config, tasks, parts.ledger),
        all_tokens=update.all_tokens,
    )
    memory, size = estimate_memory(
        parts.model,
        config,
        in_step,
        read=in_reading,
        update=update if num_updates else Update(),
        num_processes=num_processes,
    )
    plan = Plan(
        tasks=_task_plans(tasks, probabilities, effective, drawn.task_tokens),
        targets={task.name: {split: len(each) for split, each in task.splits.items()} for task in parts.targets},
        available_supervised_tokens=int(parts.available.sum()),
        budget_tokens=parts.ledger.budget_tokens,
        steps=drawn.steps,
        tokens=drawn.tokens,
        parameters=size.parameters,
        memory_bytes=memory,
        checkpoint_bytes=size.checkpoint_bytes,
        mixture_updates=num_updates,
        mixture_cost_steps=cost,
        probe_tokens=probe_tokens,
        validation_tokens=num_validations * reads.validation.supervised + reads.test.supervised,
        total_tokens=drawn.tokens + probe_total_tokens + validation_total_tokens,
        exact=num_updates == 0 and not levels,
        exact_steps=(num_updates == 0 and not levels) or expected_steps(tasks, effective, parts.ledger, config).exact,
        warnings=[],
    )
    if text := batch_tokens_warning(tasks, parts.ledger, config.batch_tokens, num_steps=plan.steps):
        plan.warnings.append(text)
    plan.warnings.extend(_warnings(plan, update_every=update_every, learns=learns, reward=parts.reward))
    return plan


def show(plan: Plan, config: Any, *, num_processes: int, console: Console | None = None) -> None:
    """Prints a plan, on standard output by default."""
    # A pipe or a file has no width; there the table is as wide as it needs to be. Only a terminal gets wrapped lines.
    console = console or (Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200))
    soft_wrap = not console.is_terminal

    # The table of tasks.
    columns = _COLUMNS if console.width >= WIDE else {k: v for k, v in _COLUMNS.items() if k not in WIDE_ONLY}
    left_out = [task.left_out for task in plan.tasks.values()]
    reasons, numbers = left_out_columns(left_out, width=console.width)
    table = task_table("examples", *reasons, *columns)
    for name, task in plan.tasks.items():
        counts = [f"{number:,}" for number in (task.examples, *numbers(task.left_out))]
        table.add_row(task_name(name), *counts, *(cell(task) for cell in columns.values()))
    recipe, device = type(config).__module__, config.device or "the best device there is"
    console.print(
        f"{recipe}: strategy {config.strategy}, on {device} in {config.dtype}", markup=False, soft_wrap=soft_wrap
    )
    console.print(table)
    for line in unused_keys(left_out):
        console.print(line, markup=False, soft_wrap=soft_wrap)
    for name, splits in plan.targets.items():
        held_out = ", ".join(f"{split} {count(size, 'example')}" for split, size in splits.items())
        console.print(f"target, never trained: {name} ({held_out})", markup=False, soft_wrap=soft_wrap)
    if any(map(_is_odd, plan.tasks.values())):
        console.print(f"! read more than {MANY_EPOCHS} times, or never", style=WARNING_STYLE)

    # Lines about the run.
    memory, about = plan.memory_bytes, "" if plan.exact else "about "
    about_steps = "" if plan.exact_steps else "about "
    about_reads = "about " if getattr(config, "levels", None) else about_steps
    parts = ", ".join(f"{name} {_size(value)}" for name, value in asdict(memory).items())
    where = "the process" if num_processes == 1 else f"each of {num_processes} processes"
    # The new one, and the best one.
    saved_besides = 1 + bool(config.keep_best)
    mixture, cost = "fixed", plan.mixture_cost_steps
    if plan.mixture_updates:
        mixture = count(plan.mixture_updates, "update")
    # There may be a cost without updates: a reward may measure the base model.
    if cost:
        mixture += f"; costs as much as {about}{cost:,.1f} steps ({cost / (plan.steps + cost):.1%} of the time)"
    lines = [
        f"budget: {of_available(plan.budget_tokens, plan.available_supervised_tokens)}, in {about_steps}"
        f"{count(plan.steps, 'step')} that read {about if plan.exact_steps else ''}{count(plan.tokens, 'token')}",
        f"model: {count(plan.parameters, 'parameter')}",
        f"disk: a checkpoint takes {_size(plan.checkpoint_bytes)}; while one is saved there are keep_checkpoints + "
        f"{saved_besides}, {_size((config.keep_checkpoints + saved_besides) * plan.checkpoint_bytes)}",
        f"memory of {where}: {_size(memory.total)} ({parts}), plus kernel and CUDA overhead (1 to 2 GB on a GPU)",
        f"mixture: {mixture}",
        f"mixture updates read {about_reads}{count(plan.probe_tokens, 'supervised token')} more, validation and test "
        f"{about_steps}{plan.validation_tokens:,}; {about}{count(plan.total_tokens, 'token')} read in all",
    ]
    if not plan.exact:
        what = "steps are exact; tokens and epochs assume" if plan.exact_steps else "steps and epochs assume"
        lines.append(f"the mixture is learned: {what} that it stays at its starting probabilities")
    for line in lines:
        console.print(line, markup=False, soft_wrap=soft_wrap)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style=WARNING_STYLE, markup=False, soft_wrap=soft_wrap)


_COLUMNS: dict[str, Callable[[TaskPlan], str]] = {
    "sup. tokens": lambda task: f"{task.supervised_tokens:,}",
    "share": lambda task: f"{task.share:.1%}",
    "sup./ex.": lambda task: f"{task.mean_supervised_tokens:,.1f}",
    "tok./ex.": lambda task: f"{task.mean_tokens:,.1f}",
    "start p": lambda task: f"{task.effective_probability:.3f}",
    "epochs": lambda task: f"{'! ' if _is_odd(task) else ''}{task.epochs:.3g}",
}


def _is_odd(task: TaskPlan) -> bool:
    return task.epochs == 0 or task.epochs > MANY_EPOCHS


def _check_mixture(mixture: Any, config: Any, *, num_tasks: int, num_targets: int) -> None:
    """Checks the mixture as its recipe does, which lists its signals in SIGNALS; one without updates has none."""
    recipe = sys.modules[type(config).__module__]
    measurable: Sequence[str] = ()
    if hasattr(config, "mixture_update_every"):
        measurable = getattr(recipe, "SIGNALS", getattr(mixture, "observes", ()))
    check_mixture(mixture, measurable, num_tasks=num_tasks, num_targets=num_targets, recipe=recipe.__name__)


@dataclass
class _Parts:
    """The components of a config, built and checked as in a recipe."""

    tasks: list[data.Task]
    targets: list[data.Task]
    available: Tensor  # (num_tasks,) int64, supervised tokens
    sampler: data.TokenSampler
    ledger: Ledger
    mixture: Any
    model: models.TokenLosses
    reward: Any
    probe: Any
    update: Update


def _build(config: Any) -> _Parts:
    # Data and mixture.
    tokenizer = config.tokenizer.build()
    all_tasks = data.load_tasks(config.tasks, tokenizer=tokenizer, max_seq_len=config.max_seq_len)
    tasks, targets = data.split_targets(all_tasks)
    names = [task.name for task in tasks]
    available = torch.stack([task.train.num_supervised.sum() for task in tasks])
    budget_tokens = config.budget.num_tokens(int(available.sum()), max_epochs=config.tasks.max_epochs_per_task)
    sampler = data.TokenSampler(
        tasks, seed=config.seed, max_epochs=config.tasks.max_epochs_per_task, sampling=config.sampling
    )
    ledger = Ledger(budget_tokens, len(tasks), caps=sampler.caps(budget_tokens))
    mixture = config.mixture.build(
        task_names=names,
        num_supervised_tokens=available,
        budget_tokens=budget_tokens,
        **config.mixture.taken(data.target_arguments(config.tasks, tasks, targets)),
    )
    _check_mixture(mixture, config, num_tasks=len(tasks), num_targets=len(targets))
    start_mixture(config.mixture, mixture, names)
    num_validated = sum(task.validation is not None for task in tasks)
    BestValidation(config.keep_best, config.stop_after, num_validated=num_validated, num_targets=len(targets))

    # Model and reward.
    model = models.build(config, all_tasks, device=torch.device("cpu"), checkpointer=None)
    model.activation_offloading = False
    reward = None
    if hasattr(config, "reward"):
        reward = config.reward.build(task_names=names, model=model) if config.reward else None
        check_reward(reward, mixture)

    # Probe and precision.
    probe = getattr(config, "probe", None)
    if probe is None and set(mixture.observes) - {"train_losses"}:
        raise ValueError(f"the recipe's Config has no 'probe', but the mixture observes {mixture.observes}")
    check_last_layers(getattr(probe, "last_layers", None), mixture, model)
    looks_ahead = OF_LOOKAHEAD & {*mixture.observes}
    takes_differences = bool(looks_ahead) and getattr(probe, "estimator", "") == "finite_difference"
    learning_rate = config.optimizer.arguments.get("lr", math.inf)
    steps = {"finite_differences": takes_differences, "step_gains": "step_gains" in mixture.observes}
    precision.check(config.dtype, learning_rate=learning_rate, **steps)
    update = update_of(mixture.observes, probe, reward, getattr(config, "levels", None))
    return _Parts(tasks, targets, available, sampler, ledger, mixture, model, reward, probe, update)


@dataclass
class _Drawn:
    """Counts of the examples that a run would draw."""

    task_tokens: Tensor  # (num_tasks,) int64, supervised
    tokens: int
    steps: int


def _draw(config: Any, parts: _Parts, probabilities: Tensor) -> _Drawn:
    """Draws as the run does, with constant probabilities of the mixture."""
    ledger, batch_size = parts.ledger, config.batch_size
    # After the causal shift.
    lengths = [(task.train.lengths - 1).numpy() for task in parts.tasks]
    tokens = 0
    while ledger.left > 0:
        p = ledger.capped(probabilities)
        spent = [0] * len(parts.tasks)
        target = ledger.step_target(config.batch_tokens)
        for draw in parts.sampler.draw(p, max_examples=batch_size, target_tokens=target, max_tokens=ledger.left):
            spent[draw.task] += draw.num_supervised_tokens
            tokens += int(lengths[draw.task][draw.example_index])
        ledger.spend(torch.tensor(spent), unique=0, batches=[])
    return _Drawn(ledger.task_tokens, tokens, ledger.steps)


class _Reads:
    """Numbers of tokens that probes, validation and test read."""

    def __init__(
        self,
        tasks: Sequence[data.Task],
        targets: Sequence[data.Task],
        *,
        count: int,
        seed: int,
        steps: int,
        levels: Any = None,
    ) -> None:
        self._tasks, self._validated, self._count, self._seed = tasks, [*tasks, *targets], count, seed
        self._steps, self._levels = steps, levels
        self.validation = _totals([task.validation for task in self._validated])
        self.test = _totals([task.test for task in self._validated])
        self._train = _totals([task.train for task in tasks])
        self.num_probed = max(count * len(self._validated), self._train.examples if levels else 0)
        self._always: dict[Source, tuple[int, int]] = {}

    def tokens(self, source: Source, update: int) -> tuple[int, int]:
        """(supervised, all) tokens that the update reads from a source; updates are numbered from 0."""
        if source == "train":
            return self._counted(data.random_examples(self._tasks, self._count, seed=self._seed, update=update))
        if source == "train_steps":
            of_steps = [self.tokens("train", update * self._steps + k) for k in range(self._steps)]
            return sum(step[0] for step in of_steps), sum(step[1] for step in of_steps)
        if source == "all_train":
            return self._train.supervised, self._train.tokens
        if source == "levels":
            return self._of_levels()
        if source not in self._always:
            self._always[source] = self._counted(
                data.validation_examples(self._validated, self._count)
                if source == "validation"
                else data.random_examples(self._tasks, self._count, seed=self._seed, update=None)
            )
        return self._always[source]

    def _of_levels(self) -> tuple[int, int]:
        """As if the examples of all levels of a task had its mean length."""
        supervised, tokens = 0.0, 0.0
        for task in self._tasks:
            of_task, sizes = _totals([task.train]), level_sizes(len(task.train), self._levels.number)
            share = sum(min(self._levels.examples, size) for size in sizes) / of_task.examples
            supervised, tokens = supervised + share * of_task.supervised, tokens + share * of_task.tokens
        return round(supervised), round(tokens)

    @staticmethod
    def _counted(examples: Sequence[tuple[int, data.Example]]) -> tuple[int, int]:
        supervised = sum(int((example.labels != data.IGNORE_INDEX).sum()) for _, example in examples)
        return supervised, sum(len(example.tokens) for _, example in examples)


class _Totals(NamedTuple):
    """Counts of all tasks."""

    examples: int
    supervised: int
    tokens: int


def _totals(splits: Sequence[data.Examples | None]) -> _Totals:
    """Those of the splits that there are."""
    present = [split for split in splits if split is not None]
    # After the causal shift.
    tokens = sum(int((split.lengths - 1).sum()) for split in present)
    return _Totals(sum(map(len, present)), sum(int(split.num_supervised.sum()) for split in present), tokens)


def _cost_of_probes(
    config: Any, update: Update, reads: _Reads, drawn: _Drawn, *, num_updates: int
) -> tuple[tuple[int, int], float]:
    """(supervised, all) tokens that all mixture updates read, and their cost in steps."""
    probe_tokens, probe_total_tokens, cost = 0, 0, 0.0
    first = update.first if getattr(config, "mixture_update_every", 0) else ()
    for number, passes in enumerate([first, *[update.passes] * num_updates], start=-1):
        for each in passes:
            supervised, tokens = reads.tokens(each.source, number)
            probe_tokens, probe_total_tokens = probe_tokens + supervised, probe_total_tokens + tokens
            cost += each.steps * tokens * drawn.steps / drawn.tokens
    return (probe_tokens, probe_total_tokens), cost


def _task_plans(
    tasks: Sequence[data.Task],
    probabilities: Tensor,  # (num_tasks,) float64
    effective: Tensor,  # (num_tasks,) float64
    task_tokens: Tensor,  # (num_tasks,) int64, spent
) -> dict[str, TaskPlan]:
    available = torch.stack([task.train.num_supervised.sum() for task in tasks])
    total = int(available.sum())
    return {
        task.name: TaskPlan(
            examples=len(task.train),
            dropped=task.left_out.examples,
            left_out=task.left_out,
            supervised_tokens=tokens,
            share=tokens / total,
            mean_supervised_tokens=tokens / len(task.train),
            mean_tokens=float((task.train.lengths - 1).double().mean()),
            probability=p,
            effective_probability=effective_p,
            epochs=spent / tokens,
        )
        for task, tokens, p, effective_p, spent in zip(
            tasks,
            available.tolist(),
            probabilities.tolist(),
            effective.tolist(),
            task_tokens.tolist(),
            strict=True,
        )
    }


def _most_examples(config: Any, tasks: Sequence[data.Task], ledger: Ledger) -> int:
    """An upper bound of the examples in a step. With ``batch_tokens`` all of them have the shortest answer.

    The target of a step is at most ``batch_tokens``, or what is left of the budget. Under caps it also is what earlier
    steps could not take.
    """
    if config.batch_size is not None:
        return config.batch_size
    most_tokens = ledger.budget_tokens if ledger.caps is not None else min(config.batch_tokens, ledger.budget_tokens)
    return math.ceil(most_tokens / min(int(task.train.num_supervised.min()) for task in tasks))


def _shapes(
    config: Any,
    tasks: Sequence[data.Task],
    reads: _Reads,
    num_processes: int,
    *,
    most_examples: int,
    all_tokens: bool,
) -> tuple[Shape, Shape]:
    """Upper bounds of the micro-batches of a step, and of those of probes, validation and test.

    They assume that all examples have the length of the longest, and the supervised share of the most supervised task,
    or (``all_tokens``, in a mixture update) logits at every position.
    """
    splits = [split for task in tasks for split in task.splits.values()]
    longest = max(int(split.lengths.max()) for split in splits) - 1
    supervised = max(int(s.num_supervised.sum()) / int((s.lengths - 1).sum()) for s in splits)

    def shape(num_examples: int, supervised: float) -> Shape:
        most = math.ceil(num_examples / num_processes) * longest
        computed = min(most, max(longest, config.micro_batch_tokens))
        return Shape(computed, longest, math.ceil(computed * supervised), several=most > computed)

    num_read = max(reads.validation.examples, reads.test.examples, reads.num_probed)
    return shape(most_examples, supervised), shape(num_read, 1.0 if all_tokens else supervised)


def _warnings(plan: Plan, *, update_every: int, learns: bool, reward: Any) -> list[str]:
    warnings = []
    for name, task in plan.tasks.items():
        if task.epochs == 0:
            warnings.append(f"task '{name}' would never be read: its p is {task.effective_probability:.3g}")
        elif task.epochs > MANY_EPOCHS:
            warnings.append(f"task '{name}' would be read {task.epochs:.3g} times over, more than {MANY_EPOCHS}")
    if learns and not plan.mixture_updates:
        when = f"every {update_every} steps of {plan.steps}" if update_every else "never (mixture_update_every)"
        warnings.append(f"the mixture would not be updated: {when}")
    if (read := plan.probe_tokens + plan.validation_tokens) > plan.budget_tokens:
        warnings.append(
            f"mixture updates, validation and test would read {read:,} supervised tokens, more than the budget of "
            f"{plan.budget_tokens:,}"
        )
    if reward is not None and not hasattr(reward, "gradients"):
        warnings.append(
            f"reward: {type(reward).__name__} has no attribute `gradients`, the number of gradients it keeps: 0 assumed"
        )
    return warnings


def _size(num_bytes: int) -> str:
    """In decimal GB or MB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
