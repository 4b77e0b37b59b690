"""Full fine-tuning on many tasks, with a mixture that learns from rewards (Mixture-of-Skills, arXiv 2406.08811).

    tune run mos_full_finetune --config yaml/tiny_mos_cossim.yaml [key=value ...]

- draws examples so that each task gets the share of *supervised tokens* the mixture gives it, until the budget is spent
  to the token; with ``sampling: dataset``, as in the paper, each batch is of one task, drawn by the mixture;
- every ``mixture_update_every`` steps measures one reward a task, and lets the mixture learn from it;
- any reward of ``adapt_recipes.rewards`` works (MoS, MoSpec, MultiDDS, MultiUAT, HBO), and any of yours;
- fp32, bf16 (fp32 weights) and pure bf16, ``torch.compile``, activation checkpointing, micro-batches of like length;
- stopped at any moment, it resumes bit for bit; ends with a Hugging Face folder.

Meant to be copied and edited: ``tune cp mos_full_finetune mine.py``, then ``tune run mine.py --config ...``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from adapt_recipes import data, probe
from adapt_recipes.base_losses import base_losses
from adapt_recipes.budget import BudgetConfig, Ledger
from adapt_recipes.config import STRICT, Component, Given, command_line, to_dict
from adapt_recipes.display import Display
from adapt_recipes.mixture.contract import check_mixture, check_reward, check_update
from adapt_recipes.models import TokenLosses, check_decoder, huggingface_config, train_adapters_alone
from adapt_recipes.runlog import RunLog, Silent, holds_run, is_finished, write_resolved, write_summary
from adapt_recipes.training import checkpoint, precision
from adapt_recipes.training.distributed import (
    check_same,
    gathered,
    get_device,
    make_shared,
    processes,
    rank,
    summed,
    together,
    world_size,
)
from adapt_recipes.training.interrupt import StopSignals
from adapt_recipes.training.nonfinite import check_finite, check_rewards, raise_nonfinite
from adapt_recipes.training.resume import check_resume
from adapt_recipes.training.sharding import clip_grad_norm, load_weights, shard, without_weights

Steps = Annotated[int, Field(ge=0)]


@dataclass(kw_only=True, config=STRICT)
class ProbeConfig:
    """How a mixture update measures the model. Only what the reward reads is read."""

    examples: PositiveInt = 64
    """examples a task and update: the first of the validation split, random training examples, or those of the pool"""


@dataclass(kw_only=True, config=STRICT)
class Config:
    """All keys of this recipe's config. Nodes with a `_component_` take that component's arguments as well."""

    strategy: str
    """name of the way to set the mixture; configs and results are named by it"""
    output_dir: str
    """the run directory"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str | None = None
    """cpu, cuda, ...; default: the best there is"""
    dtype: precision.DType = "bf16"
    """fp32; bf16: fp32 weights and optimizer, bf16 compute; pure_bf16: bf16 weights"""
    deterministic: bool = False
    """bit-equal runs on CUDA, slower; on the CPU they always are"""
    model: Component
    """a torchtune builder"""
    tokenizer: Component
    checkpointer: Component
    """where weights come from"""
    tasks: data.TasksConfig
    max_seq_len: PositiveInt
    """rendered tokens; longer examples are dropped and counted, never cut"""
    budget: BudgetConfig
    mixture: Annotated[Component, Given("task_names", "num_supervised_tokens", "budget_tokens")]
    reward: Annotated[Component | None, Given("task_names", "model")] = None
    """what the mixture learns from; null for a mixture that observes no rewards"""
    mixture_update_every: Steps = 100
    """steps; 0: never"""
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    optimizer: Annotated[Component, Given("params")]
    lr_schedule: Component
    """multiplies the optimizer's learning rate, by the share of the budget spent in the middle of the step"""
    batch_size: PositiveInt
    """examples an optimizer step"""
    sampling: Literal["tokens", "dataset"] = "tokens"
    """tokens: p is a share of supervised tokens; dataset: each batch is of one task, and p is its chance (MoS)"""
    micro_batch_tokens: PositiveInt = 4096
    """bound on the tokens, padding included, computed in one forward"""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    """keep the inputs of layers alone, and compute the rest again in the backward"""
    activation_offloading: bool = False
    """keep those inputs in host memory"""
    loss_chunk_tokens: PositiveInt | None = None
    """supervised tokens whose logits are held at a time; default: all of a micro-batch"""
    fsdp_cpu_offload: bool = False
    """keep weights, gradients and optimizer in host memory; for several processes"""
    checkpoint_every: Steps = 0
    """steps between checkpoints; 0: only at the end"""
    keep_checkpoints: PositiveInt = 1
    async_checkpointing: bool = False
    """copy to host memory, and write while the run goes on"""
    validate_every: Steps = 0
    """steps between validations on the whole split; 0: only at start and end"""
    log_every: Steps = 10
    """steps between plain lines and metric logger calls; 0: only at start and end. log.jsonl has every step"""
    metric_logger: Component | None = None
    resume: bool = False
    """go on from the newest checkpoint in output_dir; where there is none, start"""

    def __post_init__(self) -> None:
        if self.activation_offloading and not self.activation_checkpointing:
            raise ValueError("activation_offloading: needs activation_checkpointing; set both, or neither")
        if self.micro_batch_tokens < self.max_seq_len:
            raise ValueError(
                f"micro_batch_tokens: {self.micro_batch_tokens} is less than max_seq_len, {self.max_seq_len}"
            )


SIGNALS = ("train_losses", "validation_losses", "rewards")


class MosFullFinetune:
    """setup, train, cleanup; ``train`` calls ``step``, ``update_mixture``, ``validate``, ``save`` and ``finish``."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.device = get_device(config.device)
        self.open_files = contextlib.ExitStack()

    def setup(self) -> None:
        """Build everything, load what a resume goes on from, and only then write to ``output_dir``."""
        config = self.config
        with together():
            if holds_run(self.output_dir) and not config.resume:
                advice = "set resume=true to go on with it, or choose another folder"
                raise ValueError(f"output_dir: {self.output_dir} holds a run; {advice}")
        self.checkpoints = checkpoint.Checkpoints(
            self.output_dir / "checkpoints", keep=config.keep_checkpoints, asynchronous=config.async_checkpointing
        )
        self.open_files.callback(self.checkpoints.close)
        saved = self.checkpoints.newest()
        torch.manual_seed(config.seed)
        if config.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)

        with together(in_turn=True):  # the first process fills the cache that the others read
            self.tokenizer = config.tokenizer.build()
            self.tasks = data.load_tasks(config.tasks, tokenizer=self.tokenizer, max_seq_len=config.max_seq_len)
        self.fingerprint = {"config": to_dict(config), "data": data.fingerprint(self.tasks)}
        check_same({"tasks": self.fingerprint["data"]}, advice="the data files have to be the same for all")
        self.task_names = [task.name for task in self.tasks]
        available = torch.stack([task.train.num_supervised.sum() for task in self.tasks])
        self.ledger = Ledger(config.budget.num_tokens(int(available.sum())), len(self.tasks))
        self.sampler = data.TokenSampler(self.tasks, seed=config.seed)
        with together():
            self.mixture = config.mixture.build(
                task_names=self.task_names, num_supervised_tokens=available, budget_tokens=self.ledger.budget_tokens
            )
            check_mixture(self.mixture, SIGNALS, num_tasks=len(self.tasks), recipe="mos_full_finetune")
        probabilities = self._by_task(self.mixture.probabilities())
        check_same({"mixture": probabilities}, advice="it may depend on nothing but what it is given")
        self.validation = self._batches(data.validation_examples(self.tasks))
        self.probe_validation = self._batches(data.validation_examples(self.tasks, config.probe.examples))
        pool = data.random_examples(self.tasks, config.probe.examples, seed=config.seed, update=None)
        self.pool = self._batches(pool)
        self.base_losses = torch.empty(0)  # of the pool's examples, where a reward reads it

        with together():
            self.checkpointer = config.checkpointer.build()
            from_folder = without_weights(self.checkpointer.config is not None)
            with training.set_default_dtype(precision.weights_dtype(config.dtype)), self.device, from_folder:
                decoder = config.model.build()
            check_decoder(decoder, max_seq_len=config.max_seq_len, max_token=data.max_token(self.tasks))
            self.adapters = train_adapters_alone(decoder)
            self.checkpointer.check(decoder)
        if config.activation_checkpointing:
            training.set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
        if config.compile:
            training.compile_model(decoder, verbose=False)
        self.model = TokenLosses(
            decoder,
            compute_dtype=precision.compute_dtype(config.dtype),
            loss_chunk_tokens=config.loss_chunk_tokens,
            activation_offloading=config.activation_offloading,
        ).train()
        shard(self.model, decoder.layers, device=self.device, cpu_offload=config.fsdp_cpu_offload)
        if saved is None and (weights := self.checkpointer.load()) is not None:
            load_weights(decoder, weights, seed=config.seed)
        torch.manual_seed(config.seed + rank())  # of dropout
        self.reward = config.reward.build(task_names=self.task_names, model=self.model) if config.reward else None
        check_reward(self.reward, self.mixture)
        self.optimizer = config.optimizer.build(params=[p for p in self.model.parameters() if p.requires_grad])
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        precision.check(config.dtype, learning_rate=self.learning_rates[0], finite_differences=False)
        self.lr_schedule = config.lr_schedule.build()

        self.num_steps = self.num_updates = 0
        self.seconds = self.mixture_seconds = self.validation_seconds = 0.0
        self.validation_losses = self.initial_validation_losses = torch.empty(0)
        self.window_losses = torch.zeros(len(self.tasks), dtype=torch.float64)  # summed since the last mixture update
        self.window_tokens = torch.zeros(len(self.tasks), dtype=torch.float64)
        if saved is not None:
            self._load(saved)

        with together():
            metric_logger = config.metric_logger.build() if config.metric_logger and rank() == 0 else None
        make_shared(self.output_dir)
        self.log: RunLog | Silent = Silent()
        if rank() == 0:
            self.log = RunLog(
                self.output_dir,
                keep_bytes=saved.shared["log_bytes"] if saved else 0,
                metric_logger=metric_logger,
                log_every=config.log_every,
                budget_tokens=self.ledger.budget_tokens,
            )
            write_resolved(self.output_dir, to_dict(config))
        self.checkpoints.clean()
        self.display = Display(self.tasks, budget_tokens=self.ledger.budget_tokens, log_every=config.log_every)
        for file in (self.log, self.display):
            self.open_files.callback(file.close)
        where = f"on {self.device.type} in {config.dtype}, seed {config.seed}"
        p = self.mixture.probabilities()
        one_task = config.sampling == "dataset"
        self.display.plan(p, ledger=self.ledger, batch_size=config.batch_size, where=where, one_task=one_task)
        if warning := checkpoint.too_slow_to_stop(self.model):
            self.display.say(warning)
        if saved is not None:
            self.log.write("resume", step=self.num_steps, supervised_tokens=self.ledger.supervised_tokens)
            self.display.say(f"resumed from {saved.folder}")
            self.display.mixture(p, self.mixture_seconds)

    def train(self) -> int:
        """Spend the budget. Returns the exit status: 0, or 143 / 130 when SIGTERM / Ctrl-C stopped it."""
        config, saved_at = self.config, self.num_steps
        self.clock = time.perf_counter() - self.seconds
        self.display.start()
        with StopSignals() as stop:
            if self.num_steps == 0:
                self.measure_base_model()
                self._log_mixture({})
                self.validate()
                self.initial_validation_losses = self.validation_losses
                if note := getattr(self.reward, "note", None):
                    self.log.write("note", step=0, text=note)
                    self.display.say(f"reward: {note}")
            while self.ledger.left > 0 and not stop.agreed():
                self.step()
                done = self.ledger.left == 0
                if config.mixture_update_every and self.num_steps % config.mixture_update_every == 0 and not done:
                    self.update_mixture()
                if done or (config.validate_every and self.num_steps % config.validate_every == 0):
                    self.validate()
                if done or stop.agreed() or (config.checkpoint_every and self.num_steps % config.checkpoint_every == 0):
                    self.save()
                    saved_at = self.num_steps
            if stop.received and self.ledger.left > 0:
                if saved_at != self.num_steps:
                    self.save()
                self.checkpoints.wait()
                self.log.write("end", reason="interrupted", step=self.num_steps, seconds=self._seconds())
                self.display.close()
                self.display.say(
                    f"stopped at step {self.num_steps} by {stop.received.name}; resume=true goes on from here"
                )
                return stop.exit_status
            self.finish()
        return 0

    def step(self) -> None:
        """One optimizer step on examples drawn as the mixture says."""
        config = self.config
        p = self.mixture.probabilities()
        if config.sampling == "dataset":
            p = data.one_task(p, seed=config.seed, step=self.num_steps)
        draws = self.sampler.draw(p, max_examples=config.batch_size, max_tokens=self.ledger.left)
        batches = self._batches([(draw.task, self.sampler.example(draw)) for draw in draws])
        task_tokens = torch.zeros(len(self.tasks), dtype=torch.int64)
        for draw in draws:
            task_tokens[draw.task] += draw.num_supervised_tokens
        step_tokens = int(task_tokens.sum())

        multiplier = self.lr_schedule(self.ledger.share(pending=step_tokens / 2))
        for group, learning_rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = learning_rate * multiplier
        loss_sums = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.device)
        with self.model.autocast():  # around all forwards, so that the weights are cast once
            for batch in batches:
                losses = self.model(batch.tokens, batch.labels)
                (losses.sum() * world_size() / step_tokens).backward()  # gradients are averaged over processes
                loss_sums.index_add_(0, batch.supervised_tasks, losses.detach().double())
        max_norm = config.clip_grad_norm or float("inf")
        grad_norm = clip_grad_norm(self.model.parameters(), max_norm)
        loss_sums = summed(loss_sums.cpu())
        loss = float(loss_sums.sum()) / step_tokens
        self.num_steps += 1
        if not torch.isfinite(torch.tensor([loss, grad_norm])).all():
            names = [f"training example {draw.example_index} of task '{self.task_names[draw.task]}'" for draw in draws]
            raise_nonfinite(self.model, batches, names=names, step=self.num_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        first_time = sum(draw.num_supervised_tokens for draw in draws if draw.first_time)
        self.ledger.spend(task_tokens, unique=first_time, batches=batches)
        self.window_losses += loss_sums
        self.window_tokens += task_tokens
        self._log_step(loss, multiplier * self.learning_rates[0], grad_norm, loss_sums / task_tokens)

    def update_mixture(self) -> None:
        """Measure what the mixture observes, at the weights as they are, and let it change."""
        observes = self.mixture.observes
        if not observes:
            return
        self.display.doing("updating the mixture")
        started, config = time.perf_counter(), self.config.probe
        signals: dict[str, Tensor] = {}
        if "train_losses" in observes:
            signals["train_losses"] = self.window_losses / self.window_tokens
        if "validation_losses" in observes:
            signals["validation_losses"] = self._validation_losses(self.probe_validation)
        if self.reward is not None:  # MoS, equations (7) to (10)
            reads, batches = self.reward.reads, {"validation": self.probe_validation, "pool": self.pool}
            if "train" in reads:
                examples = data.random_examples(
                    self.tasks, config.examples, seed=self.config.seed, update=self.num_updates
                )
                batches["train"] = self._batches(examples)
            read = {name: self._read(batches[name]) for name in reads}
            base = {"base_losses": self.base_losses} if "pool" in reads else {}
            rewards = signals["rewards"] = self.reward(**read, **base)
            name = type(self.reward).__name__
            check_rewards(rewards, read.values(), task_names=self.task_names, step=self.num_steps, reward=name)
        with together():
            logged = self.mixture.update(task_tokens=self.ledger.task_tokens.double(), **signals)  # (11), then (6)
            check_update(self.mixture, logged, num_tasks=len(self.tasks))
        probabilities = self._by_task(self.mixture.probabilities())
        check_same({"mixture": probabilities}, advice="it may depend on nothing but what it is given")
        self.window_losses.zero_()
        self.window_tokens.zero_()
        self.num_updates += 1
        self.mixture_seconds += time.perf_counter() - started
        self._log_mixture({**signals, **logged})

    def measure_base_model(self) -> None:
        """What rewards on the pool are relative to, (9). Read from the cache it is booked all the same."""
        if self.reward is not None and "pool" in self.reward.reads and self.config.mixture_update_every:
            self.display.doing("measuring the base model")
            started, folder = time.perf_counter(), self.config.tasks.cache_folder
            self.base_losses = base_losses(self.model, self._read(self.pool), cache_dir=folder)
            if not self.base_losses.isfinite().all():
                examples = data.random_examples(
                    self.tasks, self.config.probe.examples, seed=self.config.seed, update=None
                )
                names = [f"an example of task '{self.task_names[task]}' in the pool" for task, _ in examples]
                raise_nonfinite(self.model, self.pool, names=names, step=0)
            self.mixture_seconds += time.perf_counter() - started

    def validate(self) -> None:
        """Measure every task on its whole validation split."""
        self.display.doing("validating")
        started = time.perf_counter()
        self.validation_losses = self._validation_losses(self.validation)
        self.validation_seconds += time.perf_counter() - started
        losses, spent = self._by_task(self.validation_losses), self.ledger.supervised_tokens
        self.log.write("validation", step=self.num_steps, supervised_tokens=spent, losses=losses)
        self.display.validation(self.validation_losses)

    def save(self) -> None:
        """Write all that an exact resume needs, whole or not at all."""
        shared = {
            "fingerprint": self.fingerprint,
            "sampler": self.sampler.state_dict(),
            "mixture": self.mixture.state_dict(),
            "ledger": self.ledger.state_dict(),
            "log_bytes": self.log.num_bytes,
            "totals": {name: getattr(self, name) for name in self.TOTALS} | {"seconds": self._seconds()},
        }
        with together():
            self.checkpoints.save(self.num_steps, self.model, self.optimizer, shared=shared, own=checkpoint.rng_state())
        self.log.write("checkpoint", step=self.num_steps)

    TOTALS = (
        "num_steps",
        "num_updates",
        "mixture_seconds",
        "validation_seconds",
        "validation_losses",
        "initial_validation_losses",
        "window_losses",
        "window_tokens",
        "base_losses",
    )

    def _load(self, saved: checkpoint.Saved) -> None:
        check_resume(saved, self.fingerprint)
        self.checkpoints.load(saved, self.model, self.optimizer)
        self.sampler.load_state_dict(saved.shared["sampler"])
        self.mixture.load_state_dict(saved.shared["mixture"])
        self.ledger.load_state_dict(saved.shared["ledger"])
        for name, value in saved.shared["totals"].items():
            setattr(self, name, value)
        if len(saved.own) == world_size():
            checkpoint.set_rng_state(saved.own[rank()])

    def finish(self) -> None:
        """The budget is spent: write ``model/`` and, last of all, ``summary.json``."""
        ledger, losses, config = self.ledger, self.validation_losses, self.checkpointer.config
        self.log.write("end", reason="finished", step=self.num_steps, seconds=self._seconds())
        decoder, tokenizer = self.model.decoder, self.tokenizer
        token_ids = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
        self.checkpointer.save(
            decoder.state_dict(),
            self.output_dir / "model",
            config=config or huggingface_config(decoder, **token_ids),
            tokenizer=tokenizer,
            adapters=self.adapters,
        )
        summary = {
            "strategy": self.config.strategy,
            "seed": self.config.seed,
            "budget_tokens": ledger.budget_tokens,
            "supervised_tokens": ledger.supervised_tokens,
            **{name: getattr(ledger, name) for name in ledger.COUNTS},
            "task_tokens": self._by_task(ledger.task_tokens),
            "probabilities": self._by_task(self.mixture.probabilities()),
            "validation_losses": self._by_task(losses),
            "initial_validation_losses": self._by_task(self.initial_validation_losses),
            "worst_validation_loss": float(losses[~losses.isnan()].max()),
            "mean_validation_loss": float(losses.nanmean()),
            "seconds": self._seconds(),
            "mixture_seconds": self.mixture_seconds,
            "validation_seconds": self.validation_seconds,
            "steps": self.num_steps,
            "mixture_updates": self.num_updates,
        }
        self.checkpoints.wait()
        if rank() == 0:
            write_summary(self.output_dir, summary)
        self.display.close()
        self.display.results(summary, folder=self.output_dir)

    def cleanup(self, error: Exception | None = None) -> None:
        """Close what is open; the log says so where an error ended the run."""
        if error is not None and hasattr(self, "log"):
            with contextlib.suppress(OSError):  # the error may be a full disk
                self.log.write("end", reason="error", step=self.num_steps, message=str(error))
        self.open_files.close()

    def _batches(self, examples: Sequence[tuple[int, data.Example]]) -> list[data.MicroBatch]:
        tasks, rows = [task for task, _ in examples], [example for _, example in examples]
        batches = data.micro_batches(
            rows, tasks, max_tokens=self.config.micro_batch_tokens, rank=rank(), world_size=world_size()
        )
        return [batch.to(self.device) for batch in batches]

    def _read(self, batches: list[data.MicroBatch]) -> list[data.MicroBatch]:
        """Books what a probe is about to read once."""
        self.ledger.probe(batches)
        return batches

    def _validation_losses(self, batches: list[data.MicroBatch]) -> Tensor:
        """(num_tasks,) float64, nats a supervised token; NaN for tasks left out of the objective."""
        losses = probe.task_losses(self.model, self._read(batches), len(self.tasks))
        measured = losses[[task.validation is not None for task in self.tasks]]
        check_finite(self.model, batches, [measured], tasks=self.tasks, step=self.num_steps)
        return losses

    def _by_task(self, values: Tensor) -> dict[str, Any]:
        return dict(zip(self.task_names, values.tolist(), strict=True))

    def _seconds(self) -> float:
        """Seconds of training since the run began, down time left out."""
        return time.perf_counter() - self.clock

    def _log_step(self, loss: float, lr: float, grad_norm: float, task_losses: Tensor) -> None:
        ledger, step, seconds = self.ledger, self.num_steps, self._seconds()
        totals = {name: getattr(ledger, name) for name in ("supervised_tokens", "tokens", "computed_tokens")}
        by_task = {
            "task_tokens": self._by_task(ledger.task_tokens),
            "task_losses": {name: value for name, value in self._by_task(task_losses).items() if value == value},
        }
        self.log.write("step", step=step, loss=loss, lr=lr, grad_norm=grad_norm, **totals, **by_task, seconds=seconds)
        drawn = self.sampler.num_drawn
        self.display.step(step, loss, ledger, seconds, task_losses=task_losses, num_drawn=drawn)

    def _log_mixture(self, signals: dict[str, Any]) -> None:
        """The probabilities used from the next step on, and what led to them."""
        self.display.mixture(self.mixture.probabilities(), self.mixture_seconds)
        probabilities = self._by_task(self.mixture.probabilities())
        signals = {name: self._by_task(value) if value.dim() else value for name, value in signals.items()}
        totals: dict[str, Any] = {n: getattr(self.ledger, n) for n in ("supervised_tokens", "probe_tokens")}
        totals["mixture_seconds"] = self.mixture_seconds
        self.log.write("mixture", step=self.num_steps, **totals, probabilities=probabilities, **signals)


def main(config: Config) -> int:
    with processes(config.device, batch_size=config.batch_size):
        check_same(to_dict(config), advice="start all with the same command")
        if config.resume and gathered(is_finished(Path(config.output_dir)))[0]:  # all as the first one sees it
            print(f"the run in {config.output_dir} is finished already: see its summary.json")
            return 0
        recipe = MosFullFinetune(config)
        error = None
        try:
            with together():
                recipe.setup()
            return recipe.train()
        except Exception as exception:
            error = exception
            raise
        finally:
            recipe.cleanup(error)


if __name__ == "__main__":
    command_line(main, Config)
