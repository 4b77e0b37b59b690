"""Fine-tuning on many tasks with a mixture that is learned while training (ADAPT, arXiv 2512.04555).

    tune run adapt_full_finetune --config yaml/tiny_adapt_planned.yaml [key=value ...]

The loop of ``sft_full_finetune``, and every ``mixture_update_every`` steps an update of the mixture: the recipe
measures what the mixture observes, and the mixture changes. Any mixture component works: ``adapt`` (our reading of the
paper's one-step form), ``adapt_ksteps``, ``adapt_planned`` and ``adapt_forecast`` (ours), group DRO, Exp3, a static
one, or yours.

Copy and edit it: ``tune cp adapt_full_finetune mine.py``, then ``tune run mine.py --config ...``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from adapt_recipes import data, models
from adapt_recipes.budget import Ledger
from adapt_recipes.config import STRICT, Steps, TrainConfig, command_line
from adapt_recipes.mixture.interface import OF_LOOKAHEAD, check_mixture, check_update
from adapt_recipes.run import Run
from adapt_recipes.signals import Probe, TrainLosses, passes
from adapt_recipes.signals.ksteps import check_last_layers
from adapt_recipes.signals.nonfinite import raise_nonfinite
from adapt_recipes.training import precision
from adapt_recipes.training.process_group import all_reduce_sum, raise_on_all_ranks, world_size
from adapt_recipes.training.sharding import clip_grad_norm


@dataclass(kw_only=True, config=STRICT)
class ProbeConfig:
    """How a mixture update measures the model. Only what the mixture observes is measured."""

    examples: PositiveInt = 32
    """per task: the first of the validation split, the same at every update, and as many random training examples"""
    estimator: Literal["finite_difference", "backward"] = "finite_difference"
    """how gradient dots are computed: by two forward passes over all tasks, or by one backward pass per task, which
    is more expensive and exact in any dtype; K-step differences: by the losses after 2 K steps, or exactly, by autograd
    through K steps, for small models on one process"""
    exact_lookahead: bool = False
    """measure the objective after the look-ahead step; false: before it (first order in its step size, cheaper)"""
    separate_batches: bool = True
    """take task gradients on training examples; false: on the validation examples of the objective itself"""
    steps: PositiveInt = 4
    """K of K-step differences: look-ahead steps, each on ``examples`` other training examples per task"""
    validation_weight: PositiveFloat = 0.1
    """lambda of K-step differences: the weight of the objective's gradient in the look-ahead steps"""
    last_layers: PositiveInt | None = None
    """of K-step differences: how many transformer layers, counted from the last, the look-ahead steps move, without the
    final norm and the head, to save memory; null: all trained weights"""


@dataclass(kw_only=True, config=STRICT)
class Config(TrainConfig):
    """The keys of this recipe's config, besides those that all recipes share."""

    mixture_update_every: Steps = 20
    """steps; 0: never"""
    probe: ProbeConfig = Field(default_factory=ProbeConfig)


# The signals that this recipe measures for a mixture, if it observes them.
SIGNALS = (
    *("train_losses", "validation_losses", "target_losses"),
    *("gradient_dots", "kstep_differences", "squared_gradient_norms", "gradient_variances", "step_gains"),
)


class Recipe:
    """One run: ``setup``, then ``train``, which calls ``step``, ``update_mixture``, ``validate`` and ``test``."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run

    def setup(self) -> None:
        """Builds data, mixture, model and optimizer, and loads what a resume continues from."""
        config, run = self.config, self.run

        # Data: tokenized or from the cache, and split. The order within a task depends on the seed alone.
        self.tokenizer, tasks = data.build_tasks(config.tasks, config.tokenizer, max_seq_len=config.max_seq_len)
        self.tasks, self.targets = data.split_targets(tasks)
        self.task_names = [task.name for task in self.tasks]
        available = torch.stack([task.train.num_supervised.sum() for task in self.tasks])  # (num_tasks,) tokens
        budget_tokens = config.budget.num_tokens(int(available.sum()), max_epochs=config.tasks.max_epochs_per_task)
        self.sampler = data.TokenSampler(
            self.tasks, seed=config.seed, max_epochs=config.tasks.max_epochs_per_task, sampling=config.sampling
        )
        self.ledger = Ledger(budget_tokens, len(self.tasks), caps=self.sampler.caps(budget_tokens))
        with raise_on_all_ranks():
            self.mixture = config.mixture.build(
                task_names=self.task_names,
                num_supervised_tokens=available,
                budget_tokens=budget_tokens,
                **config.mixture.taken(data.target_arguments(config.tasks, self.tasks, self.targets)),
            )
            sizes = {"num_tasks": len(self.tasks), "num_targets": len(self.targets)}
            check_mixture(self.mixture, SIGNALS, **sizes, recipe=Path(__file__).stem)
        self.validation = self.batches(data.validation_examples(tasks))
        self.probe_validation = self.batches(data.validation_examples(tasks, config.probe.examples))

        # Model: check that it fits its folder, shard it, and load the weights unless a checkpoint will.
        with raise_on_all_ranks():
            self.checkpointer = config.checkpointer.build()
        self.model = models.build(config, tasks, device=run.device, checkpointer=self.checkpointer)
        check_last_layers(config.probe.last_layers, self.mixture, self.model)
        models.prepare(self.model, config, device=run.device, checkpointer=self.checkpointer, load=run.saved is None)
        self.probe = Probe(self.model, self.ledger, self.tasks, self.targets)

        # Optimizer.
        self.optimizer = config.optimizer.build(params=[p for p in self.model.parameters() if p.requires_grad])
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.lr_schedule = config.lr_schedule.build()
        looks_ahead = OF_LOOKAHEAD & {*self.mixture.observes}
        takes_differences = bool(looks_ahead) and config.probe.estimator == "finite_difference"
        steps = {"finite_differences": takes_differences, "step_gains": "step_gains" in self.mixture.observes}
        precision.check(config.dtype, learning_rate=self.base_lrs[0], **steps)

        # What a checkpoint holds besides weights and optimizer. A resume loads them all here.
        self.train_losses = TrainLosses(len(self.tasks))
        states = {
            "ledger": self.ledger,
            "sampler": self.sampler,
            "mixture": self.mixture,
            "train_losses": self.train_losses,
        }
        run.start(self.tasks, self.ledger, self.mixture, self.model, self.optimizer, states, targets=self.targets)

    def train(self) -> int:
        """Spends the budget. Returns the exit status: 0, or 143 / 130 when SIGTERM / Ctrl-C stopped it."""
        config, run, ledger = self.config, self.run, self.ledger
        if ledger.steps == 0:
            run.log_mixture()
            self.validate()
        while not run.is_done and not run.should_stop():
            self.step()
            if run.due(config.mixture_update_every) and ledger.left > 0:
                self.update_mixture()
            if ledger.left == 0 or run.due(config.validate_every):
                self.validate()
            if run.is_done or run.is_best or run.should_stop() or run.due(config.checkpoint_every):
                run.save()
        if not run.is_done:
            return run.interrupted()
        models.save(self.model, self.checkpointer, run.output_dir / "model", tokenizer=self.tokenizer)
        if models.round_as_saved(self.model, self.checkpointer):
            self.validate(saved=True)
        self.test()
        if run.load_best():
            models.save(self.model, self.checkpointer, run.output_dir / "model_best", tokenizer=self.tokenizer)
        return run.finished()

    def step(self) -> None:
        """One optimizer step on examples drawn as the mixture says."""
        config, ledger = self.config, self.ledger

        # Draw: the task furthest behind its share comes next, unless ``sampling`` draws tasks at random.
        p = ledger.capped(self.mixture.probabilities())
        target = ledger.step_target(config.batch_tokens)
        draws = self.sampler.draw(p, max_examples=config.batch_size, target_tokens=target, max_tokens=ledger.left)
        batches = self.batches([(draw.task, self.sampler.example(draw)) for draw in draws])
        task_tokens = data.count_tokens(draws, len(self.tasks))
        step_tokens = int(task_tokens.sum())

        # Learning rate, by the share of the budget spent in the middle of the step.
        multiplier = self.lr_schedule(ledger.share(pending=step_tokens / 2))
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * multiplier

        # Forward and backward: the loss is the mean over the step's supervised tokens, all processes together.
        loss_sums = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.run.device)
        # One autocast context around all micro-batches casts the weights once, not for each of them.
        with self.model.autocast():
            for batch in batches:
                losses = self.model(batch.tokens, batch.labels)  # (num_supervised,) nats
                # FSDP2 averages gradients over the processes; multiplied by their number, they are summed.
                (losses.sum() * world_size() / step_tokens).backward()
                loss_sums.index_add_(0, batch.supervised_tasks, losses.detach().double())

        # Clip, count, check, update.
        grad_norm = clip_grad_norm(self.model.parameters(), config.clip_grad_norm)
        loss_sums = all_reduce_sum(loss_sums.cpu())
        loss = float(loss_sums.sum()) / step_tokens
        ledger.spend(task_tokens, unique=data.count_unique(draws), batches=batches)
        if not torch.isfinite(torch.tensor([loss, grad_norm])).all():
            names = data.draw_names(draws, self.tasks)
            raise_nonfinite(self.model, batches, names=names, step=ledger.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        # Log.
        self.train_losses.add(loss_sums, task_tokens)
        self.run.log_step(
            loss=loss,
            lr=multiplier * self.base_lrs[0],
            grad_norm=grad_norm,
            task_losses=loss_sums / task_tokens,
            num_drawn=self.sampler.num_drawn,
        )

    def update_mixture(self) -> None:
        """Measures what the mixture observes, with the current weights, and updates it."""
        observes, run = self.mixture.observes, self.run
        if not observes:
            return
        signals: dict[str, Tensor] = {}
        with run.timed("mixture", "updating the mixture"):
            # Losses per task: of training since the last update, and of validation examples now.
            if "train_losses" in observes:
                signals["train_losses"] = self.train_losses.mean()
            if {"validation_losses", "target_losses"} & {*observes} and not OF_LOOKAHEAD & {*observes}:
                signals |= self.by_name(self.probe.losses(self.probe_validation))
            # Gradients: ADAPT's one-step form, and that of K steps.
            if "gradient_dots" in observes:
                signals |= self.gradient_signals()
            if "kstep_differences" in observes:
                signals |= self.kstep_signals()
            # Each task alone: size and noise of its gradient, from two halves of its examples, and what a step gains.
            if {"squared_gradient_norms", "gradient_variances"} & {*observes}:
                examples = self.random_examples(run.num_updates)
                signals |= self.probe.gradient_moments([self.batches(examples[i::2]) for i in (0, 1)])
            if "step_gains" in observes:
                examples = self.random_examples(run.num_updates)
                own = [self.batches([each for each in examples if each[0] == i]) for i in range(len(self.tasks))]
                signals["step_gains"] = self.probe.step_gains(own, learning_rate=self.mixture.lookahead_lr)
            signals = {name: signals[name] for name in observes}
            with raise_on_all_ranks():
                logged = self.mixture.update(task_tokens=self.ledger.task_tokens.double(), **signals)
                check_update(self.mixture, logged, num_tasks=len(self.tasks), num_targets=len(self.targets))
            self.train_losses.reset()
        run.log_mixture({**signals, **logged})

    def gradient_signals(self) -> dict[str, Tensor]:
        """Equations (2) to (5) of ``mixture/adapt.py``: validation losses, and (num_tasks,) gradient dots."""
        config, probe = self.config.probe, self.probe
        train = self.probe_train(self.run.num_updates)
        with contextlib.ExitStack() as lookahead:
            if config.exact_lookahead:
                # (2): theta' = theta - eta * sum_i p_i grad L_train_i
                gradient = probe.gradient(train, self.mixture.probabilities(), of="training")
                lookahead.enter_context(passes.stepped(self.model, gradient, -self.mixture.lookahead_lr))
            # (3): L_val_j, at theta' or, to first order in eta, at theta
            losses = self.by_name(probe.losses(self.probe_validation))
            # (4): v = sum_j w_j / c_j * grad L_val_j
            weights = self.mixture.objective_weights(**losses)
            v = probe.gradient(self.probe_validation, weights, of="validation")
        # (5): <v, grad L_train_i>
        dots = probe.gradient_dots(train, v, estimator=config.estimator, dtype=self.config.dtype)
        return {**losses, "gradient_dots": dots}

    def kstep_signals(self) -> dict[str, Tensor]:
        """Equations (2) to (5) of ``mixture/adapt_ksteps.py``: validation losses, and (num_tasks,) differences."""
        config, mixture, K = self.config.probe, self.mixture, self.config.probe.steps
        losses = self.by_name(self.probe.losses(self.probe_validation))
        p, weights = mixture.probabilities(), mixture.objective_weights(**losses)
        train = [self.probe_train(self.run.num_updates * K + k) for k in range(K)]
        u = self.probe.kstep_differences(
            *(train, self.probe_validation, p, weights),
            estimator=config.estimator,
            learning_rate=mixture.lookahead_lr,
            validation_weight=config.validation_weight,
            num_last_layers=config.last_layers,
        )
        return {**losses, "kstep_differences": u}

    def probe_train(self, number: int) -> list[data.MicroBatch]:
        """Random training examples, others for each number; with ``separate_batches: false`` the validation's."""
        separate = self.config.probe.separate_batches
        return self.batches(self.random_examples(number)) if separate else self.probe_validation

    def random_examples(self, number: int) -> list[tuple[int, data.Example]]:
        """``probe.examples`` training examples per task, others for each number."""
        config = self.config
        return data.random_examples(self.tasks, config.probe.examples, seed=config.seed, update=number)

    def by_name(self, losses: Tensor) -> dict[str, Tensor]:
        """Losses of tasks and targets as signals."""
        signals = {"validation_losses": losses[: len(self.tasks)], "target_losses": losses[len(self.tasks) :]}
        return signals if self.targets else {"validation_losses": losses}

    def validate(self, *, saved: bool = False) -> None:
        """Measures every task on its whole validation split. ``saved``: the weights are those of ``model/`` by now."""
        with self.run.timed("validation", "validating"):
            scores = self.probe.scores(self.validation)
        self.run.log_validation(scores, saved=saved)

    def test(self) -> None:
        """Measures every task on its whole test split, if there is one. Nothing reads it before the end."""
        if examples := data.test_examples([*self.tasks, *self.targets]):
            with self.run.timed("validation", "testing"):
                scores = self.probe.scores(self.batches(examples), split="test")
            self.run.log_test(scores)

    def batches(self, examples: Sequence[tuple[int, data.Example]]) -> list[data.MicroBatch]:
        """This process's micro-batches of examples, each given with its task."""
        return data.build_batches(examples, max_tokens=self.config.micro_batch_tokens, device=self.run.device)


def main(config: Config) -> int:
    with Run(config) as run:
        if run.is_finished:
            return 0
        recipe = Recipe(config, run)
        with raise_on_all_ranks():
            recipe.setup()
        return recipe.train()


if __name__ == "__main__":
    command_line(main, Config)
