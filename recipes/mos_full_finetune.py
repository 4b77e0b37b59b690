"""Fine-tuning on many tasks with a mixture that learns from rewards (Mixture-of-Skills, arXiv 2406.08811).

    tune run mos_full_finetune --config yaml/tiny_mos_cossim.yaml [key=value ...]

The loop of ``sft_full_finetune``, and every ``mixture_update_every`` steps one reward per task, from which the mixture
learns. Any reward of ``adapt_recipes.signals.rewards`` works (MoS, MoSpec, MultiDDS, MultiUAT, HBO), and any of yours.
With ``sampling: example``, as in the authors' code, the task of every example is drawn by the mixture; with ``sampling:
dataset``, as in their paper, that of every batch is. With ``levels`` each task has a mixture of its own (HBO).

Copy and edit it: ``tune cp mos_full_finetune mine.py``, then ``tune run mine.py --config ...``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from adapt_recipes import data, models
from adapt_recipes.budget import Ledger
from adapt_recipes.config import STRICT, Component, Injected, Steps, TrainConfig, command_line
from adapt_recipes.mixture.interface import check_mixture, check_update
from adapt_recipes.run import Run
from adapt_recipes.signals import BaseLosses, BaseWeights, Levels, LevelsConfig, Probe, TrainLosses
from adapt_recipes.signals.nonfinite import raise_nonfinite
from adapt_recipes.signals.reward_interface import check_reward, tokens_of
from adapt_recipes.training import precision
from adapt_recipes.training.process_group import all_reduce_sum, raise_on_all_ranks, world_size
from adapt_recipes.training.sharding import clip_grad_norm


@dataclass(kw_only=True, config=STRICT)
class ProbeConfig:
    """How a mixture update measures the model. Only what the reward reads is read."""

    examples: PositiveInt = 64
    """per task and update: the first of the validation split, random training examples, or those of the pool"""


@dataclass(kw_only=True, config=STRICT)
class Config(TrainConfig):
    """The keys of this recipe's config, besides those that all recipes share."""

    reward: Annotated[Component | None, Injected("task_names", "model")] = None
    """what the mixture learns from; null for a mixture that observes no rewards"""
    mixture_update_every: Steps = 100
    """steps; 0: never"""
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    levels: LevelsConfig | None = None
    """difficulty levels inside each task, whose shares are learned too (HBO's local actors); null: none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels and (not self.mixture_update_every or self.tasks.max_epochs_per_task is not None):
            raise ValueError("levels: needs mixture_update_every above 0, and no tasks.max_epochs_per_task")


# The signals that this recipe measures for a mixture, if it observes them.
SIGNALS = ("train_losses", "validation_losses", "rewards")


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
        seed, sampling = config.seed, config.sampling
        self.levels = Levels(self.tasks, config.levels, seed=seed, sampling=sampling) if config.levels else None
        self.sampler = data.TokenSampler(
            self.tasks,
            seed=seed,
            max_epochs=config.tasks.max_epochs_per_task,
            sampling=sampling,
            next_example=self.levels.draw if self.levels else None,
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
        self.probe_validation = self.batches(data.validation_examples(self.tasks, config.probe.examples))
        pool = data.random_examples(self.tasks, config.probe.examples, seed=config.seed, update=None)
        self.pool_tasks, self.pool = [task for task, _ in pool], self.batches(pool)
        # Of the pool's examples, if the reward reads them.
        self.base_losses = BaseLosses()

        # Model and reward: check that it fits its folder, shard it, and load the weights unless a checkpoint will.
        with raise_on_all_ranks():
            self.checkpointer = config.checkpointer.build()
        self.model = models.build(config, tasks, device=run.device, checkpointer=self.checkpointer)
        self.reward = config.reward.build(task_names=self.task_names, model=self.model) if config.reward else None
        check_reward(self.reward, self.mixture)
        needs_base = bool(config.mixture_update_every and self.reward and "base_losses" in self.reward.reads)
        load = run.saved is None or needs_base
        models.prepare(self.model, config, device=run.device, checkpointer=self.checkpointer, load=load)
        # In no checkpoint: a resume takes them from where the run did.
        self.base_weights = BaseWeights(self.model) if needs_base else None
        self.probe = Probe(self.model, self.ledger, self.tasks, self.targets)

        # Optimizer.
        self.optimizer = config.optimizer.build(params=[p for p in self.model.parameters() if p.requires_grad])
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.lr_schedule = config.lr_schedule.build()
        precision.check(config.dtype, learning_rate=self.base_lrs[0], finite_differences=False)

        # What a checkpoint holds besides weights and optimizer. A resume loads them all here.
        self.train_losses = TrainLosses(len(self.tasks))
        states = {
            "ledger": self.ledger,
            "sampler": self.sampler,
            "mixture": self.mixture,
            "train_losses": self.train_losses,
            "base_losses": self.base_losses,
            **({"levels": self.levels} if self.levels else {}),
        }
        run.start(self.tasks, self.ledger, self.mixture, self.model, self.optimizer, states, targets=self.targets)

    def train(self) -> int:
        """Spends the budget. Returns the exit status: 0, or 143 / 130 when SIGTERM / Ctrl-C stopped it."""
        config, run, ledger = self.config, self.run, self.ledger
        if ledger.steps == 0:
            self.measure_base_model()
            run.log_mixture()
            self.validate()
            if note := getattr(self.reward, "note", None):
                run.note("reward", note)
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
        observes, run, tokens = self.mixture.observes, self.run, tokens_of(self.reward)
        if not observes and self.levels is None:
            return
        signals: dict[str, Tensor] = {}
        logged: dict[str, Tensor] = {}
        with run.timed("mixture", "updating the mixture"):
            # Losses per task: of training since the last update, and of validation examples now.
            if "train_losses" in observes:
                signals["train_losses"] = self.train_losses.mean()
            if "validation_losses" in observes:
                signals["validation_losses"] = self.probe.losses(self.probe_validation)
            # MoS, equations (7) to (10): the reward of each task.
            if self.reward is not None:
                batches = {"validation": self.probe_validation, "pool": self.pool}
                if "train" in self.reward.reads:
                    count, seed = self.config.probe.examples, self.config.seed
                    examples = data.random_examples(self.tasks, count, seed=seed, update=run.num_updates)
                    batches["train"] = self.batches(examples)
                base_losses = self.base_losses.values
                if self.base_weights is not None:
                    base_losses = self.probe.base_losses(self.base_weights, batches["train"], tokens=tokens)
                signals["rewards"] = self.probe.rewards(self.reward, batches, base_losses)
            # (11), the average over updates, and (6), one step of the scorer.
            if observes:
                with raise_on_all_ranks():
                    logged = self.mixture.update(task_tokens=self.ledger.task_tokens.double(), **signals)
                    check_update(self.mixture, logged, num_tasks=len(self.tasks))
            self.train_losses.reset()
            # HBO's local actors: the rewards of the levels inside each task, and one update of their shares.
            if self.levels is not None:
                logged = {**logged, **self.levels.update(self.probe, self.batches, run.num_updates, tokens=tokens)}
        run.log_mixture({**signals, **logged})

    def measure_base_model(self) -> None:
        """Measures its losses on the pool, (9), and for levels on all training examples; cached ones count as read."""
        cache, tokens = self.config.tasks.cache_folder, tokens_of(self.reward)
        if self.levels is not None:
            with self.run.timed("mixture", "measuring the base model on all training examples"):
                self.levels.measure(self.probe, self.batches, cache_dir=cache, tokens=tokens)
        if self.reward is None or "pool" not in self.reward.reads or not self.config.mixture_update_every:
            return
        with self.run.timed("mixture", "measuring the base model"):
            self.ledger.probe(self.pool)
            self.base_losses.measure(self.model, self.pool, cache_dir=cache, tokens=tokens)
            if not self.base_losses.values.isfinite().all():
                names = [f"an example of task '{self.task_names[task]}' in the pool" for task in self.pool_tasks]
                raise_nonfinite(self.model, self.pool, names=names, step=0)

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
