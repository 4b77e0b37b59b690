"""The parts of a run that are the same for every recipe: processes, folder, log, display, clock, checkpoints, signals.

``Run`` never calls the model. A recipe enters it, builds what it trains, calls ``start``, and owns the loop::

    with Run(config) as run:
        if run.is_finished:
            return 0
        recipe = Recipe(config, run)
        with raise_on_all_ranks():
            recipe.setup()
        return recipe.train()
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from adapt_recipes import data
from adapt_recipes.budget import Ledger
from adapt_recipes.config import FREE_AT_RESUME, TrainConfig, to_dict
from adapt_recipes.display import Display
from adapt_recipes.errors import warn
from adapt_recipes.events import (
    ByTask,
    CheckpointEvent,
    DataEvent,
    EndEvent,
    MixtureEvent,
    NoteEvent,
    ResumeEvent,
    SavedValidationEvent,
    StepEvent,
    Summary,
    TestEvent,
    ValidationEvent,
)
from adapt_recipes.output import take_warnings
from adapt_recipes.results import Split, by_unit, summarized
from adapt_recipes.run_directory import (
    ADAPTER,
    check_output_dir,
    has_checkpoint,
    has_model,
    has_run,
    is_finished,
    keep_results,
    one_run_at_a_time,
)
from adapt_recipes.runlog import (
    NullLog,
    RunLog,
    close_metric_logger,
    log_config,
    read_resolved,
    read_summary,
    write_resolved,
    write_summary,
)
from adapt_recipes.signals.passes import Scores
from adapt_recipes.start_from import start_mixture
from adapt_recipes.steps import batch_tokens_warning, expected_steps
from adapt_recipes.stop import end_is_printed
from adapt_recipes.strict import config_differences, marked
from adapt_recipes.training.best import BestValidation
from adapt_recipes.training.checkpoint import Checkpoints
from adapt_recipes.training.interrupt import StopSignals, checkpoint_timeout_warning
from adapt_recipes.training.memory import out_of_memory
from adapt_recipes.training.process_group import (
    all_gather_object,
    check_same,
    create_shared_dir,
    get_device,
    process_group,
    raise_on_all_ranks,
    rank,
    world_size,
)
from adapt_recipes.training.resume import check_budget, check_resume, check_same_run
from adapt_recipes.training.rng import rng_state, set_rng_state


class Stateful(Protocol):
    """What a checkpoint holds beside weights, optimizer and generators."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


class Run:
    """One run: its folder, its log, its clock, its checkpoints, and the signals that stop it.

    Args:
        config: of the recipe.

    Attributes:
        output_dir: the run directory.
        device: of this process.
        is_finished: the folder holds a finished run, which ``resume: true`` leaves as it is.
        saved: the checkpoint that ``start`` resumes from; None: the run begins.
        num_updates: mixture updates so far.
        validation_scores: of the last validation, those of the tasks and then of the targets.
        initial_validation_losses: (num_tasks + num_targets,) float64 of the first one.
        saved_validation_losses: the same of the model as it is in ``model/``; None: they are the last ones.
        test_scores: of the test; None: there is none. As the line above, they come after the last checkpoint, and a
            resume from there measures them again.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.num_updates = 0
        self.validation_scores = Scores(torch.empty(0), torch.empty(0))
        self.initial_validation_losses = torch.empty(0)
        self.saved_validation_losses: Tensor | None = None
        self.test_scores: Scores | None = None
        self._phase_seconds = {"mixture": 0.0, "validation": 0.0}
        # When the run would have begun without its down time, by time.perf_counter().
        self._began = 0.0
        self._log: RunLog | NullLog = NullLog()
        self._metric_logger: Any = None
        self._ledger: Ledger | None = None
        self._open = contextlib.ExitStack()

    # ---- begin and end

    def __enter__(self) -> Run:
        """Joins the processes, and looks at what the folder holds."""
        config = self.config
        try:
            self._open.enter_context(process_group(config.device, batch_size=config.batch_size))
            check_same(to_dict(config), advice="start all with the same command")
            with raise_on_all_ranks():
                self._check_output_dir()
                finished = self._is_finished()
            # As process 0 sees it.
            self.is_finished = all_gather_object(finished)[0]
            if self.is_finished:
                self._check_finished()
                print(f"the run in {self.output_dir} is finished already: see its summary.json")
                return self
            with raise_on_all_ranks():
                self.device = get_device(config.device)
                if rank() == 0:
                    self._open.enter_context(one_run_at_a_time(self.output_dir))
                    # A run that had the lock until now may have written there.
                    self._check_output_dir()
                    if config.metric_logger:
                        self._metric_logger = config.metric_logger.build()
                        self._open.callback(close_metric_logger, self._metric_logger)
            with raise_on_all_ranks():
                self.checkpoints = Checkpoints(
                    self.output_dir / "checkpoints",
                    keep=config.keep_checkpoints,
                    asynchronous=config.async_checkpointing,
                )
                self._open.callback(self.checkpoints.close)
                self.saved = self.checkpoints.newest()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        torch.manual_seed(config.seed)
        if config.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            torch.use_deterministic_algorithms(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes what is open; the log says so where an error ended the run."""
        if isinstance(error, Exception) and self._ledger is not None:
            cause, step = error, self._ledger.steps
            error = out_of_memory(error, self._model, self._optimizer, step=step + 1) or error
            # The error may be a full disk.
            with contextlib.suppress(OSError):
                self._log.write(EndEvent(reason="error", step=step, message=str(error)))
            self._open.__exit__(type(error), error, traceback)
            if error is not cause:
                raise error from cause
        else:
            self._open.__exit__(kind, error, traceback)

    def start(
        self,
        tasks: Sequence[data.Task],
        ledger: Ledger,
        mixture: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        states: Mapping[str, Stateful],
        *,
        targets: Sequence[data.Task] = (),
    ) -> None:
        """Loads what a resume continues from, and only then writes to ``output_dir``.

        Args:
            tasks: in the order of the mixture.
            ledger: of the run; it counts the steps.
            mixture: with ``probabilities()``.
            model, optimizer: sharded as they train. A checkpoint holds their state.
            states: what else an exact resume needs, by name; ledger and mixture included.
            targets: tasks that are validated on and never trained.

        Raises:
            ValueError: the checkpoint is of another config or of other data, or the recipe does not use a key; it names
                the keys.
        """
        config, saved, other_budget = self.config, self.saved, None
        if config.tasks.max_epochs_per_task is not None and ledger.caps is None:
            raise ValueError("tasks.max_epochs_per_task: the recipe has to give it to TokenSampler, and caps to Ledger")
        if config.sampling != getattr(states.get("sampler"), "sampling", "tokens"):
            raise ValueError("sampling: the recipe has to give it to TokenSampler")
        if any(task.is_target for task in tasks):
            raise ValueError("tasks.targets: the recipe has to split them off (data.split_targets)")
        self._ledger = ledger
        self._tasks, self._targets = tasks, targets
        self._task_names = [task.name for task in tasks]
        self._model, self._optimizer, self._mixture = model, optimizer, mixture
        num_validated = sum(task.validation is not None for task in tasks)
        self._best = BestValidation(
            config.keep_best, config.stop_after, num_validated=num_validated, num_targets=len(targets)
        )
        self._states: dict[str, Stateful] = {**states, "run": self, "best": self._best}
        read = data.fingerprint([*tasks, *targets], cache_dir=config.tasks.cache_folder)
        self._fingerprint: dict[str, Any] = {"config": to_dict(config), "data": read}
        check_same({"tasks": self._fingerprint["data"]}, advice="the data files have to be the same for all")
        if saved is not None:
            check_resume(saved, self._fingerprint, free=self._free)
            other_budget = check_budget(saved, self._fingerprint, budget_tokens=ledger.budget_tokens)
            self.checkpoints.load(saved, model, optimizer)
            for name, state in self._states.items():
                state.load_state_dict(saved.shared["states"][name])
            if other_budget is not None and self._best.is_over:
                reason = f"stop_after has ended the run at step {ledger.steps}, and not its budget"
                raise ValueError(f"change_budget: {reason}; use another output_dir")
            if len(saved.own) == world_size():
                set_rng_state(saved.own[rank()])
        with raise_on_all_ranks():
            started = start_mixture(config.mixture, mixture, self._task_names) if saved is None else None
        self._check_same_mixture()

        create_shared_dir(self.output_dir)
        with raise_on_all_ranks():
            if rank() == 0 and other_budget is not None and is_finished(self.output_dir):
                keep_results(self.output_dir, read_summary(self.output_dir)["steps"])
        if rank() == 0:
            # First: it says that what the folder holds is of a run.
            write_resolved(self.output_dir, to_dict(config))
            if self._metric_logger is not None:
                log_config(self._metric_logger, to_dict(config))
            self._log = RunLog(
                self.output_dir,
                keep_bytes=saved.shared["log_bytes"] if saved else 0,
                metric_logger=self._metric_logger,
                log_every=config.log_every,
                budget_tokens=ledger.budget_tokens,
            )
            self._open.callback(self._log.close)
        self._left_out = {task.name: asdict(task.left_out) for task in (*tasks, *targets)}
        if saved is None and any(task.left_out != data.LeftOut() for task in (*tasks, *targets)):
            self._log.write(DataEvent(step=0, left_out=self._left_out))
        self.checkpoints.clean(best=self._best.step)
        self._saved_at = ledger.steps
        self._show_plan(tasks)
        self._began += time.perf_counter()
        self._stop = self._open.enter_context(StopSignals())
        if started is not None:
            self.note("mixture.start_from", started)
        if other_budget is not None:
            self.note("change_budget", other_budget)

    def _check_output_dir(self) -> None:
        """Refuses a folder with something of someone else, or with a run that is not to be resumed."""
        check_output_dir(to_dict(self.config))
        if has_run(self.output_dir) and not self.config.resume:
            advice = "set resume=true to continue it, or choose another folder"
            raise ValueError(f"output_dir: {self.output_dir} holds a run; {advice}")

    def _is_finished(self) -> bool:
        """Whether there is nothing to do.

        A finished run goes on with another budget, and one without ``model/`` writes it again, from its checkpoint.
        """
        folder = self.output_dir
        if not (self.config.resume and is_finished(folder)):
            return False
        if self.config.change_budget and read_resolved(folder).get("budget") != to_dict(self.config)["budget"]:
            if not has_checkpoint(folder):
                reason = "is finished, and has no checkpoint to go on from"
                raise ValueError(f"change_budget: the run in {folder} {reason}; choose another output_dir")
            return False
        if not has_model(folder) and not has_checkpoint(folder):
            reason = "is finished, but has neither model/ nor a checkpoint to write it from"
            raise ValueError(f"output_dir: the run in {folder} {reason}; choose another folder")
        return has_model(folder)

    @property
    def _free(self) -> list[str]:
        """The keys of the config in which this run may differ from the one in the folder."""
        return [*marked(type(self.config), FREE_AT_RESUME), *(["budget"] if self.config.change_budget else [])]

    def _check_finished(self) -> None:
        """Refuses to call a run finished that is not the run of this config."""
        config, free = self.config, self._free
        with raise_on_all_ranks():
            # Runs of earlier versions have no hash of the data.
            before = {
                "config": read_resolved(self.output_dir),
                "data": read_summary(self.output_dir).get("data_fingerprint"),
            }
            now = {"config": to_dict(config), "data": before["data"]}
            check_same_run(before, now, free=free)
        if before["data"] is not None:
            _, tasks = data.build_tasks(config.tasks, config.tokenizer, max_seq_len=config.max_seq_len)
            with raise_on_all_ranks():
                now["data"] = data.fingerprint(tasks, cache_dir=config.tasks.cache_folder)
                check_same_run(before, now, free=free)
        if "checkpointer.save_dtype" in config_differences(read_resolved(self.output_dir), to_dict(config), ()):
            warn("checkpointer.save_dtype changed: remove model/ first, and it is written again")

    def _show_plan(self, tasks: Sequence[data.Task]) -> None:
        """What is about to happen, on the terminal."""
        config, ledger = self.config, self.ledger
        self._display = Display(
            tasks, targets=self._targets, budget_tokens=ledger.budget_tokens, log_every=config.log_every
        )
        self._open.callback(self._display.close)
        p = ledger.capped(self._mixture.probabilities())
        where = f"on {self.device.type} in {config.dtype}, seed {config.seed}"
        steps = expected_steps(tasks, p, ledger, config)
        self._display.plan(p, ledger=ledger, steps=str(steps), where=where)
        if text := batch_tokens_warning(tasks, ledger, config.batch_tokens, num_steps=steps.number):
            warn(text)
        if warning := checkpoint_timeout_warning(self._model):
            self._display.say(warning)
        if self.saved is not None:
            self._log.write(ResumeEvent(step=ledger.steps, supervised_tokens=ledger.supervised_tokens))
            self._display.say(f"resumed from {self.saved.folder}")
            self._display.mixture(p, self._phase_seconds["mixture"])
        self._display.start()

    # ---- the loop

    @property
    def ledger(self) -> Ledger:
        assert self._ledger is not None, "start comes first"
        return self._ledger

    @property
    def seconds(self) -> float:
        """Since the run began, without down time."""
        return time.perf_counter() - self._began

    @property
    def is_done(self) -> bool:
        """Whether the budget is spent, or ``stop_after`` validations have shown no progress."""
        return self.ledger.left == 0 or self._best.is_over

    @property
    def is_best(self) -> bool:
        """Whether the validation at this step is the best so far, as ``keep_best`` defines it."""
        return 0 < self.ledger.steps == self._best.step

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; 0: never."""
        return every > 0 and self.ledger.steps % every == 0

    def should_stop(self) -> bool:
        """Whether any process has received a signal to stop; all processes call this at the same points."""
        return self._stop.agreed()

    @contextlib.contextmanager
    def timed(self, phase: Literal["mixture", "validation"], doing: str) -> Iterator[None]:
        """Counts the time of a phase separately (the test's as validation), and shows ``doing`` on the display."""
        self._display.doing(doing)
        began = time.perf_counter()
        yield
        self._phase_seconds[phase] += time.perf_counter() - began

    def _log_warnings(self) -> None:
        """Logs that a stream was silenced, which nobody may have seen."""
        for text in take_warnings():
            self._log.write(NoteEvent(step=self.ledger.steps, text=text))

    def log_step(
        self,
        *,
        loss: float,  # mean over the step's supervised tokens, nats
        lr: float,
        grad_norm: float,
        task_losses: Tensor,  # (num_tasks,) float64; NaN for a task that is not in the step
        num_drawn: Tensor,  # (num_tasks,) int64, examples since the run began
    ) -> None:
        """A training step that the ledger has counted."""
        ledger, seconds = self.ledger, self.seconds
        losses = {name: value for name, value in self._by_task(task_losses).items() if value == value}
        self._log.write(
            StepEvent(
                step=ledger.steps,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                supervised_tokens=ledger.supervised_tokens,
                total_tokens=ledger.total_tokens,
                tokens=ledger.tokens,
                computed_tokens=ledger.computed_tokens,
                task_tokens=self._by_task(ledger.task_tokens),
                task_losses=losses,
                seconds=seconds,
            )
        )
        self._display.step(ledger.steps, loss, ledger, seconds, task_losses=task_losses, num_drawn=num_drawn)
        self._log_warnings()

    def log_mixture(self, signals: Mapping[str, Tensor] | None = None) -> None:
        """The probabilities used from the next step on, the same on all processes.

        ``signals`` are what an update measured and logs, () or (num_tasks,) each, or (num_targets,) if their names
        begin with ``target_``; None: there was no update.
        """
        if signals is not None:
            self._check_same_mixture()
            self.num_updates += 1
        effective = self.ledger.capped(self._mixture.probabilities())
        self._display.mixture(effective, self._phase_seconds["mixture"])
        values = {name: self._by_name(name, value) for name, value in (signals or {}).items()}
        self._log.write(
            MixtureEvent(
                **self._spent(),
                probe_tokens=self.ledger.probe_tokens,
                mixture_seconds=self._phase_seconds["mixture"],
                probabilities=self._by_task(self._mixture.probabilities()),
                effective_probabilities=None if self.ledger.caps is None else self._by_task(effective),
                signals=values,
            )
        )

    def log_validation(self, scores: Scores, *, saved: bool = False) -> None:
        """What ``Probe.scores`` measures on the whole validation split.

        ``saved``: of the model after ``models.round_as_saved``.
        """
        measured = self._measured(scores, "validation")
        losses = scores.losses
        if saved:
            self.saved_validation_losses = losses
            self._log.write(SavedValidationEvent(**measured))
            stages = (self.initial_validation_losses, self.validation_scores.losses, losses)
            has_adapters = (self.output_dir / ADAPTER).is_dir()
            if text := rounding_warning(*(float(each.nanmean()) for each in stages), has_adapters=has_adapters):
                warn(text)
                self._log.write(NoteEvent(step=self.ledger.steps, text=text))
            return
        self.validation_scores = scores
        if self.ledger.steps == 0:
            self.initial_validation_losses = losses
        self._log.write(ValidationEvent(**measured))
        self._display.validation(losses[: len(self._tasks)])
        self._best.observe(self.ledger.steps, *self._split(losses))
        if self._best.is_over and self.ledger.left:
            text = f"no progress in {self._best.num_since} validations after step {self._best.step}"
            self.note("stop_after", f"{text}; the run ends with {self.ledger.left:,} tokens of the budget not spent")

    def log_test(self, scores: Scores) -> None:
        """What ``Probe.scores`` measures on the whole test split."""
        self._log.write(TestEvent(**self._measured(scores, "test")))
        self.test_scores = scores

    def note(self, component: str, text: str) -> None:
        """Logs and prints a remark of a component about the run."""
        self._log.write(NoteEvent(step=self.ledger.steps, text=text))
        self._display.say(f"{component}: {text}")

    def save(self) -> None:
        """Writes a checkpoint of all that an exact resume needs, whole or not at all; once per step."""
        if self._saved_at == self.ledger.steps:
            return
        shared = {
            "fingerprint": self._fingerprint,
            "log_bytes": self._log.num_bytes,
            "states": {name: state.state_dict() for name, state in self._states.items()},
        }
        with raise_on_all_ranks():
            self.checkpoints.save(
                self.ledger.steps, self._model, self._optimizer, shared=shared, own=rng_state(), best=self._best.step
            )
        self._log.write(CheckpointEvent(step=self.ledger.steps))
        self._saved_at = self.ledger.steps

    def load_best(self) -> bool:
        """Gives the model the weights of the best validation; false, and nothing is done, without ``keep_best``."""
        if not self._best.step:
            return False
        self.checkpoints.wait()
        with raise_on_all_ranks():
            self.checkpoints.load_weights(self._best.step, self._model)
        return True

    def interrupted(self) -> int:
        """Saves the run after a signal to stop. Returns the exit status."""
        assert self._stop.received is not None
        self.save()
        self.checkpoints.wait()
        self._log.write(EndEvent(reason="interrupted", step=self.ledger.steps, seconds=self.seconds))
        self._display.close()
        name = self._stop.received.name
        self._display.say(f"stopped at step {self.ledger.steps} by {name}; resume=true goes on from here")
        end_is_printed()
        return self._stop.exit_status

    def finished(self) -> int:
        """All is trained, written and tested: write ``summary.json``. Returns the exit status."""
        ledger, losses = self.ledger, self.validation_scores.losses
        saved_losses = losses if self.saved_validation_losses is None else self.saved_validation_losses
        (initial, initial_of_targets), (saved, _) = map(self._split, (self.initial_validation_losses, saved_losses))
        of_tasks, of_targets = self._by_unit(self.validation_scores, "validation")
        results = summarized("validation", of_tasks)
        if of_targets:
            initial_target_losses = self._by_target(initial_of_targets)
            results |= summarized("target", of_targets) | {"initial_target_losses": initial_target_losses}
        if self.test_scores:
            of_tasks, of_targets = self._by_unit(self.test_scores, "test")
            results |= summarized("test", of_tasks) | (summarized("target_test", of_targets) if of_targets else {})
        self._log.write(EndEvent(reason="finished", step=ledger.steps, seconds=self.seconds))
        summary = Summary(
            strategy=self.config.strategy,
            seed=self.config.seed,
            budget_tokens=ledger.budget_tokens,
            supervised_tokens=ledger.supervised_tokens,
            stopped_early=ledger.left > 0,
            unspent_tokens=ledger.left,
            total_tokens=ledger.total_tokens,
            tokens=ledger.tokens,
            computed_tokens=ledger.computed_tokens,
            unique_supervised_tokens=ledger.unique_supervised_tokens,
            probe_tokens=ledger.probe_tokens,
            probe_total_tokens=ledger.probe_total_tokens,
            validation_tokens=ledger.validation_tokens,
            validation_total_tokens=ledger.validation_total_tokens,
            task_tokens=self._by_task(ledger.task_tokens),
            probabilities=self._by_task(self._mixture.probabilities()),
            **results,
            initial_validation_losses=self._by_task(initial),
            saved_validation_losses=self._by_task(saved),
            seconds=self.seconds,
            mixture_seconds=self._phase_seconds["mixture"],
            validation_seconds=self._phase_seconds["validation"],
            steps=ledger.steps,
            best_step=self._best.step or None,
            mixture_updates=self.num_updates,
            left_out=self._left_out,
            data_fingerprint=self._fingerprint["data"],
        )
        self.checkpoints.wait()
        if rank() == 0:
            write_summary(self.output_dir, summary)
        self._display.close()
        self._display.results(summary, folder=self.output_dir)
        return 0

    # ---- what a checkpoint holds of the run itself

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "phase_seconds": dict(self._phase_seconds),
            "num_updates": self.num_updates,
            "validation_scores": tuple(self.validation_scores),
            "initial_validation_losses": self.initial_validation_losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._began = -state["seconds"]
        self._phase_seconds = dict(state["phase_seconds"])
        self.num_updates = state["num_updates"]
        self.validation_scores = Scores(*state["validation_scores"])
        self.initial_validation_losses = state["initial_validation_losses"]

    def _spent(self) -> dict[str, Any]:
        """What events have in common: what the run has spent so far."""
        ledger = self.ledger
        return {
            "step": ledger.steps,
            "supervised_tokens": ledger.supervised_tokens,
            "total_tokens": ledger.total_tokens,
            "seconds": self.seconds,
        }

    def _measured(self, scores: Scores, split: Split) -> dict[str, Any]:
        """The values of an event about a whole split."""
        if isinstance(scores, Tensor):
            raise ValueError(f"log_{split}: takes what Probe.scores returns, and the recipe gives losses alone")
        tasks, targets = self._by_unit(scores, split)
        of_targets = {f"target_{unit}": by_task for unit, by_task in targets.items()}
        counts = {**self._spent(), "validation_tokens": self.ledger.validation_tokens}
        return {**counts, **tasks, "targets": of_targets}

    def _by_unit(self, scores: Scores, split: Split) -> tuple[dict[str, ByTask], dict[str, ByTask]]:
        """The scores of tasks and those of targets; {} without targets."""
        of_tasks, of_targets = (Scores(*each) for each in zip(*map(self._split, scores), strict=True))
        return by_unit(of_tasks, self._tasks, split), by_unit(of_targets, self._targets, split) if self._targets else {}

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The values of tasks, and those of targets."""
        return values[: len(self._tasks)], values[len(self._tasks) :]

    def _by_task(self, values: Tensor) -> ByTask:
        return dict(zip(self._task_names, values.tolist(), strict=True))

    def _by_target(self, values: Tensor) -> ByTask:
        return dict(zip([task.name for task in self._targets], values.tolist(), strict=True))

    def _by_name(self, name: str, value: Tensor) -> Any:
        """What an update measured or logs under this name."""
        is_of_targets = self._targets and name.startswith("target_")
        return value if not value.dim() else self._by_target(value) if is_of_targets else self._by_task(value)

    def _check_same_mixture(self) -> None:
        probabilities = self._by_task(self._mixture.probabilities())
        check_same({"mixture": probabilities}, advice="it may depend on nothing but what it is given")


def rounding_warning(initial: float, trained: float, saved: float, *, has_adapters: bool) -> str | None:
    """Says that saving lost a part of what was learned.

    Args:
        initial, trained, saved: mean validation losses of the model at first, as trained, and as in ``model/``.
        has_adapters: there is ``adapter/`` beside it.

    Returns:
        None: ``saved`` is less than 1e-4 nats above ``trained``, or less than 1 % of what training has gained.
    """
    gain, lost = initial - trained, saved - trained
    if lost < max(0.01 * gain, 1e-4):
        return None
    share = f" ({lost / gain:.0%} of the gain lost)" if gain > 0 else ""
    cause, advice = "saving", "checkpointer.save_dtype=fp32 keeps it: remove model/ and run again with resume=true"
    if has_adapters:
        cause, advice = "merging the adapters", "adapter/ has them as trained, for PEFT"
    losses = f"mean validation loss {saved:.4f} in model/, {trained:.4f} as trained{share}"
    return f"{cause} rounded the weights: {losses}; {advice}"
