"""A copied recipe with a changed loss: ``sft_full_finetune`` with the z-loss of PaLM (arXiv 2204.02311).

    tune run examples/z_loss_full_finetune.py --config yaml/tiny_uniform.yaml output_dir=runs/z_loss z_loss=0.0001

It was made by ``tune cp sft_full_finetune z_loss_full_finetune.py`` and three edits: a key of the config, two imports,
and the forward pass in ``step``. ``diff recipes/sft_full_finetune.py examples/z_loss_full_finetune.py`` shows them. All
else stays the recipe's: draws, budget, validation, log, checkpoints and resume, which also refuses another ``z_loss``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from adapt_recipes import data, models
from adapt_recipes.budget import Ledger
from adapt_recipes.config import STRICT, TrainConfig, command_line
from adapt_recipes.mixture.interface import check_mixture
from adapt_recipes.run import Run
from adapt_recipes.signals import Probe
from adapt_recipes.signals.nonfinite import raise_nonfinite
from adapt_recipes.training import precision
from adapt_recipes.training.process_group import all_reduce_sum, raise_on_all_ranks, world_size
from adapt_recipes.training.sharding import clip_grad_norm


@dataclass(kw_only=True, config=STRICT)
class Config(TrainConfig):
    """The keys of this recipe's config, besides those that all recipes share."""

    z_loss: NonNegativeFloat = 1e-4
    """weight of the squared logarithm of the softmax's normalizer, log^2 Z, at every supervised position"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_chunk_tokens is not None:
            raise ValueError("loss_chunk_tokens: this recipe needs all logits of a micro-batch at once; remove it")


# The signals that this recipe measures for a mixture: none.
SIGNALS = ()


class Recipe:
    """One run: ``setup``, then ``train``, which calls ``step``, ``validate`` and ``test``."""

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

        # Model: check that it fits its folder, shard it, and load the weights unless a checkpoint will.
        with raise_on_all_ranks():
            self.checkpointer = config.checkpointer.build()
        self.model = models.build(config, tasks, device=run.device, checkpointer=self.checkpointer)
        models.prepare(self.model, config, device=run.device, checkpointer=self.checkpointer, load=run.saved is None)
        self.probe = Probe(self.model, self.ledger, self.tasks, self.targets)

        # Optimizer.
        self.optimizer = config.optimizer.build(params=[p for p in self.model.parameters() if p.requires_grad])
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.lr_schedule = config.lr_schedule.build()
        precision.check(config.dtype, learning_rate=self.base_lrs[0], finite_differences=False)

        # What a checkpoint holds besides weights and optimizer. A resume loads them all here.
        states = {"ledger": self.ledger, "sampler": self.sampler, "mixture": self.mixture}
        run.start(self.tasks, self.ledger, self.mixture, self.model, self.optimizer, states, targets=self.targets)

    def train(self) -> int:
        """Spends the budget. Returns the exit status: 0, or 143 / 130 when SIGTERM / Ctrl-C stopped it."""
        config, run, ledger = self.config, self.run, self.ledger
        if ledger.steps == 0:
            run.log_mixture()
            self.validate()
        while not run.is_done and not run.should_stop():
            self.step()
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
                logits = self.model(batch.tokens, batch.labels, output="logits")  # (num_supervised, vocab_size) fp32
                labels = batch.labels[batch.labels != data.IGNORE_INDEX]
                losses = F.cross_entropy(logits, labels, reduction="none")  # (num_supervised,) nats
                # PaLM, section 5: z_loss * log^2 Z keeps log Z near 0.
                objective = losses + config.z_loss * logits.logsumexp(-1).square()
                # FSDP2 averages gradients over the processes; multiplied by their number, they are summed.
                (objective.sum() * world_size() / step_tokens).backward()
                # The log, and a mixture, have the cross-entropy alone, so that runs compare.
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
        self.run.log_step(
            loss=loss,
            lr=multiplier * self.base_lrs[0],
            grad_norm=grad_norm,
            task_losses=loss_sums / task_tokens,
            num_drawn=self.sampler.num_drawn,
        )

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
