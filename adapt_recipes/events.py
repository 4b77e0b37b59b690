"""The lines of ``log.jsonl`` and the keys of ``summary.json``: a public contract, listed in docs/watching.md.

Every line is a JSON object whose first key is ``event``. Values per task are mappings of task names; numbers that are
not finite become null.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

ByTask = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataEvent:
    """What of the rows is not trained on; the first line of the log of a run that leaves something out."""

    event: ClassVar[str] = "data"
    step: int
    left_out: ByTask
    """the fields of ``data.LeftOut``"""


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """An optimizer step. All but ``loss``, ``lr``, ``grad_norm`` and ``task_losses`` are totals since the run began."""

    event: ClassVar[str] = "step"
    step: int
    loss: float
    """mean over the step's supervised tokens, nats"""
    lr: float
    """of the first parameter group"""
    grad_norm: float
    """before clipping"""
    supervised_tokens: int
    total_tokens: int
    """read in training, by mixture updates and validations, including prompts, excluding padding"""
    tokens: int
    """those read in training"""
    computed_tokens: int
    """those computed in training: beginnings that examples share are computed once"""
    task_tokens: ByTask
    task_losses: ByTask
    """of the tasks in the step"""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MixtureEvent:
    """The probabilities of the mixture from the next step on, and what led to them."""

    event: ClassVar[str] = "mixture"
    step: int
    supervised_tokens: int
    total_tokens: int
    probe_tokens: int
    """supervised tokens read by mixture updates so far, in addition to the budget"""
    seconds: float
    mixture_seconds: float
    probabilities: ByTask
    effective_probabilities: ByTask | None = None
    """what the sampler draws by under ``tasks.max_epochs_per_task``; the line has the key only with that"""
    signals: dict[str, Any] = field(default_factory=dict)
    """the measured signals and the values that the mixture logs; keys of the line by their own names"""


@dataclass(frozen=True, kw_only=True)
class ValidationEvent:
    """A validation of every task on its whole validation split."""

    event: ClassVar[str] = "validation"
    step: int
    supervised_tokens: int
    total_tokens: int
    validation_tokens: int
    """supervised tokens read by validations and the test so far, in addition to the budget"""
    seconds: float
    losses: ByTask
    """nats per supervised token; null, as the next two, for a task without a validation split"""
    exact_match: ByTask
    """share of the examples whose answers greedy decoding generates to the token, end token included"""
    bits_per_byte: ByTask
    """bits of the supervised tokens per UTF-8 byte of the answers; null for a task whose answers have no known bytes"""
    targets: dict[str, ByTask] = field(default_factory=dict)
    """the same of the targets, if there are any: ``target_losses`` and so on, keys of the line"""


@dataclass(frozen=True, kw_only=True)
class SavedValidationEvent:
    """A validation of the model as it is saved in ``model/``, where that is not bit for bit what was trained."""

    event: ClassVar[str] = "saved_validation"
    step: int
    supervised_tokens: int
    total_tokens: int
    validation_tokens: int
    """supervised tokens read by validations and the test so far, in addition to the budget"""
    seconds: float
    losses: ByTask
    """nats per supervised token; null, as the next two, for a task without a validation split"""
    exact_match: ByTask
    """share of the examples whose answers greedy decoding generates to the token, end token included"""
    bits_per_byte: ByTask
    """bits of the supervised tokens per UTF-8 byte of the answers; null for a task whose answers have no known bytes"""
    targets: dict[str, ByTask] = field(default_factory=dict)
    """the same of the targets, if there are any: ``target_losses`` and so on, keys of the line"""


@dataclass(frozen=True, kw_only=True)
class TestEvent:
    """The test of every task on its whole test split, once, of the model as it is saved in ``model/``."""

    event: ClassVar[str] = "test"
    step: int
    supervised_tokens: int
    total_tokens: int
    validation_tokens: int
    """supervised tokens read by validations and the test so far, in addition to the budget"""
    seconds: float
    losses: ByTask
    """nats per supervised token; null, as the next two, for a task without a test split"""
    exact_match: ByTask
    """share of the examples whose answers greedy decoding generates to the token, end token included"""
    bits_per_byte: ByTask
    """bits of the supervised tokens per UTF-8 byte of the answers; null for a task whose answers have no known bytes"""
    targets: dict[str, ByTask] = field(default_factory=dict)
    """the same of the targets, if there are any: ``target_losses`` and so on, keys of the line"""


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent:
    """A checkpoint was written, or is being written in the background."""

    event: ClassVar[str] = "checkpoint"
    step: int


@dataclass(frozen=True, kw_only=True)
class ResumeEvent:
    """The run continues from a checkpoint; later lines of the log were removed."""

    event: ClassVar[str] = "resume"
    step: int
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True)
class NoteEvent:
    """A remark of a component about the run."""

    event: ClassVar[str] = "note"
    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class EndEvent:
    """How a process of the run ended."""

    event: ClassVar[str] = "end"
    reason: Literal["finished", "interrupted", "error"]
    step: int
    seconds: float | None = None
    message: str | None = None


Event = (
    DataEvent
    | StepEvent
    | MixtureEvent
    | ValidationEvent
    | SavedValidationEvent
    | TestEvent
    | CheckpointEvent
    | ResumeEvent
    | NoteEvent
    | EndEvent
)


def to_line(event: Event) -> dict[str, Any]:
    """An event as an object of ``log.jsonl``."""
    values = {each.name: getattr(event, each.name) for each in fields(event)}
    inlined = values.pop("signals", {}) | values.pop("targets", {})
    if isinstance(event, EndEvent | MixtureEvent):
        values = {name: value for name, value in values.items() if value is not None}
    return {"event": event.event, **values, **inlined}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``summary.json``. Losses are nats per supervised token on a whole split; see ``ValidationEvent`` for other units.

    Those of validation are with the weights as they were trained, ``saved_validation_losses`` and those of the test
    with the weights as they are in ``model/``.
    """

    strategy: str
    seed: int
    budget_tokens: int
    supervised_tokens: int
    """trained on: the budget, to the token, unless ``stopped_early``"""
    stopped_early: bool
    """because ``stop_after`` validations have shown no progress"""
    unspent_tokens: int
    """of the budget; 0 unless ``stopped_early``"""
    total_tokens: int
    """read in training, by mixture updates, validations and the test"""
    tokens: int
    """those read in training"""
    computed_tokens: int
    unique_supervised_tokens: int
    probe_tokens: int
    """supervised tokens read by mixture updates"""
    probe_total_tokens: int
    validation_tokens: int
    """supervised tokens read by validations and the test"""
    validation_total_tokens: int
    task_tokens: ByTask
    probabilities: ByTask
    validation_losses: ByTask
    initial_validation_losses: ByTask
    worst_validation_loss: float
    """over tasks, unweighted"""
    mean_validation_loss: float
    """over tasks, unweighted"""
    saved_validation_losses: ByTask
    """equal to ``validation_losses`` where saving rounded no weight and merged no adapter"""
    validation_exact_match: ByTask
    mean_validation_exact_match: float
    """over tasks, unweighted"""
    validation_bits_per_byte: ByTask
    mean_validation_bits_per_byte: float
    """over tasks, unweighted"""
    initial_target_losses: ByTask | None = None
    """None, as all that is of targets: there are none. They are validated on and never trained"""
    target_losses: ByTask | None = None
    worst_target_loss: float | None = None
    """over targets, unweighted"""
    mean_target_loss: float | None = None
    """over targets, unweighted"""
    target_exact_match: ByTask | None = None
    mean_target_exact_match: float | None = None
    target_bits_per_byte: ByTask | None = None
    mean_target_bits_per_byte: float | None = None
    test_losses: ByTask | None = None
    """None, as all that is of the test: no task has a test split"""
    worst_test_loss: float | None = None
    """over tasks, unweighted"""
    mean_test_loss: float | None = None
    """over tasks, unweighted"""
    test_exact_match: ByTask | None = None
    mean_test_exact_match: float | None = None
    """over tasks, unweighted"""
    test_bits_per_byte: ByTask | None = None
    mean_test_bits_per_byte: float | None = None
    """over tasks, unweighted"""
    target_test_losses: ByTask | None = None
    """of the targets' test splits"""
    worst_target_test_loss: float | None = None
    mean_target_test_loss: float | None = None
    target_test_exact_match: ByTask | None = None
    mean_target_test_exact_match: float | None = None
    target_test_bits_per_byte: ByTask | None = None
    mean_target_test_bits_per_byte: float | None = None
    seconds: float
    mixture_seconds: float
    validation_seconds: float
    """of validations and of the test"""
    steps: int
    best_step: int | None = None
    """the one whose weights are in ``model_best/``; None: without ``keep_best``"""
    mixture_updates: int
    left_out: ByTask
    """what of each task's rows is not trained on: the fields of ``data.LeftOut``"""
    data_fingerprint: str
    """a hash of the tasks as the run read them"""
