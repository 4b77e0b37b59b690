"""What each event looks like as a line of log.jsonl."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest

from adapt_recipes import events
from adapt_recipes.events import (
    CheckpointEvent,
    DataEvent,
    EndEvent,
    Event,
    MixtureEvent,
    NoteEvent,
    ResumeEvent,
    SavedValidationEvent,
    StepEvent,
    ValidationEvent,
    to_line,
)

STEP = {
    "step": 3,
    "loss": 0.5,
    "lr": 0.1,
    "grad_norm": 2.0,
    "supervised_tokens": 8,
    "total_tokens": 40,
    "tokens": 16,
    "computed_tokens": 24,
    "task_tokens": {"b": 5, "a": 3},
    "task_losses": {"b": 0.5},
    "seconds": 1.5,
}
MIXTURE = {
    "step": 3,
    "supervised_tokens": 8,
    "total_tokens": 40,
    "probe_tokens": 4,
    "seconds": 1.5,
    "mixture_seconds": 0.5,
    "probabilities": {"b": 0.5, "a": 0.5},
}
EFFECTIVE: dict[str, Any] = {"effective_probabilities": {"b": 0.25, "a": 0.75}}
MEASURED = {"step": 3, "supervised_tokens": 8, "total_tokens": 40, "validation_tokens": 6, "seconds": 1.5}
SCORES = {"losses": {"b": 1.0, "a": None}, "exact_match": {"b": 0.5, "a": None}}
SCORES |= {"bits_per_byte": {"b": 2.0, "a": None}}
SIGNALS = {"validation_losses": {"b": 1.0, "a": 2.0}, "objective": 1.5}

LINES: list[tuple[Any, dict[str, Any]]] = [
    (
        DataEvent(step=0, left_out={"a": {"too_long": 1}}),
        {"event": "data", "step": 0, "left_out": {"a": {"too_long": 1}}},
    ),
    (StepEvent(**STEP), {"event": "step"} | STEP),
    (MixtureEvent(**MIXTURE), {"event": "mixture"} | MIXTURE),
    (MixtureEvent(**MIXTURE, signals=SIGNALS), {"event": "mixture"} | MIXTURE | SIGNALS),
    (MixtureEvent(**MIXTURE, **EFFECTIVE), {"event": "mixture"} | MIXTURE | EFFECTIVE),
    (ValidationEvent(**MEASURED, **SCORES), {"event": "validation", **MEASURED, **SCORES}),
    (SavedValidationEvent(**MEASURED, **SCORES), {"event": "saved_validation", **MEASURED, **SCORES}),
    (events.TestEvent(**MEASURED, **SCORES), {"event": "test", **MEASURED, **SCORES}),
    (CheckpointEvent(step=3), {"event": "checkpoint", "step": 3}),
    (ResumeEvent(step=3, supervised_tokens=8), {"event": "resume", "step": 3, "supervised_tokens": 8}),
    (NoteEvent(step=0, text="so it is"), {"event": "note", "step": 0, "text": "so it is"}),
    (
        EndEvent(reason="finished", step=3, seconds=1.5),
        {"event": "end", "reason": "finished", "step": 3, "seconds": 1.5},
    ),
    (
        EndEvent(reason="error", step=3, message="no"),
        {"event": "end", "reason": "error", "step": 3, "message": "no"},
    ),
    (
        EndEvent(reason="interrupted", step=0, seconds=0.0),
        {"event": "end", "reason": "interrupted", "step": 0, "seconds": 0.0},
    ),
]


@pytest.mark.parametrize(("event", "line"), LINES, ids=lambda each: getattr(each, "event", ""))
def test_a_line_and_the_order_of_its_keys(event: Event, line: dict[str, Any]) -> None:
    assert list(to_line(event).items()) == list(line.items())


def test_every_event_is_here_and_has_a_name_of_its_own() -> None:
    kinds = get_args(Event)
    assert {type(event) for event, _ in LINES} == set(kinds)
    assert len({kind.event for kind in kinds}) == len(kinds)
    assert all("event" not in {field.name for field in fields(kind)} for kind in kinds)
