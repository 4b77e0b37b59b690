"""The test split is read once, after the training has ended, and a summary has its losses whatever has happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from running import Runs, assert_same_run, before, events, load_recipe, recipe_class, sequence, summary
from transformers import AutoModelForCausalLM

from adapt_recipes import data
from adapt_recipes.models import TokenLosses

ONE_OF_EACH_RECIPE = ["uniform", "adapt", "mos_diff"]
TEST = {"tasks.test_examples": 3}
# Of these four tasks d is not in the results.
MEASURED = ["a", "b", "c"]
SPLITS = ("train", "validation", "test")


def tasks_of(runs: Runs, **changes: Any) -> list[data.Task]:
    config = runs.config("uniform", Path("unused"), **(TEST | changes))
    return data.build_tasks(config.tasks, config.tokenizer, max_seq_len=config.max_seq_len)[1]


# ---- when it is read

Text = tuple[int, ...]  # the tokens of an example


def texts(splits: Iterable[data.Examples | None]) -> set[Text]:
    return {tuple(split.example(k).tokens.tolist()) for split in splits if split for k in range(len(split))}


class Reads:
    """Every example that the model reads, with the time; and when the training ended.

    Attributes:
        examples: (time, tokens), a line for each time that one is read.
        ended: the budget is spent, and ``model/`` about to be written.
    """

    def __init__(self) -> None:
        self.examples: list[tuple[float, Text]] = []
        self.ended = 0.0

    @contextmanager
    def watch(self, strategy: str) -> Iterator[None]:
        forward = TokenLosses.forward

        def noted(model: TokenLosses, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
            # The tasks are of text, so no token but those of the padding is 0.
            now = time.perf_counter()
            self.examples += [(now, tuple(token for token in row if token)) for row in tokens.tolist()]
            return forward(model, tokens, *arguments)

        with mock.patch.object(TokenLosses, "forward", noted), before(strategy, "finish", self.end):
            yield

    def end(self) -> None:
        self.ended = time.perf_counter()

    def check(self, test: set[Text]) -> None:
        """All of the test split is read once after the training, nothing else is, and nothing of it earlier."""
        early = [text for moment, text in self.examples if moment < self.ended and text in test]
        assert not early, f"{len(early)} examples of the test split are read before the training has ended"
        late = [text for moment, text in self.examples if moment >= self.ended]
        assert sorted(late) == sorted(test)


def watched(runs: Runs, strategy: str, folder: Path) -> tuple[Reads, set[Text]]:
    """A run to its end."""
    reads, tasks = Reads(), tasks_of(runs)
    with reads.watch(strategy):
        assert runs.run(strategy, folder, **TEST) == 0
    train, validation, test = (texts(getattr(task, split) for task in tasks) for split in SPLITS)
    assert len(test) == 9 and not test & (train | validation)
    seen = {text for _, text in reads.examples}
    assert validation <= seen and len(train & seen) > 40, "the spy sees what is read"
    return reads, test


@pytest.mark.parametrize("strategy", ONE_OF_EACH_RECIPE)
def test_nothing_reads_the_test_split_before_the_training_has_ended(runs: Runs, tmp_path: Path, strategy: str) -> None:
    reads, test = watched(runs, strategy, tmp_path / "run")
    assert summary(tmp_path / "run")["mixture_updates"] > 2 or strategy == "uniform"
    reads.check(test)


def in_validation() -> Any:
    """Every validation reads it, and so do the probes."""
    original = data.validation_examples
    return mock.patch.object(
        data, "validation_examples", lambda tasks, *count: original(tasks, *count) + data.test_examples(tasks)
    )


def in_training_probe() -> Any:
    """A mixture update takes its gradients on it."""
    return mock.patch.object(data, "random_examples", lambda tasks, *count, **keys: data.test_examples(tasks))


def in_loop(strategy: str) -> Any:
    """A recipe that tests at every validation."""
    recipe = recipe_class(strategy)
    validate = recipe.validate

    def wrong(self: Any) -> None:
        validate(self)
        self.test()

    return mock.patch.object(recipe, "validate", wrong)


@pytest.mark.parametrize(
    ("strategy", "wrong"),
    [
        ("uniform", in_validation),
        ("adapt", in_training_probe),
        ("mos_diff", in_training_probe),
        ("adapt", lambda: in_loop("adapt")),
    ],
    ids=["validation", "gradients", "pool", "recipe"],
)
def test_a_recipe_that_reads_it_early_is_caught(
    runs: Runs, tmp_path: Path, strategy: str, wrong: Callable[[], Any]
) -> None:
    """What the test above finds, it finds."""
    with wrong():
        reads, test = watched(runs, strategy, tmp_path / "run")
    with pytest.raises(AssertionError, match="are read before the training has ended"):
        reads.check(test)


# ---- what is measured


@pytest.mark.parametrize("strategy", ONE_OF_EACH_RECIPE)
def test_losses_are_those_of_the_model_that_is_saved(runs: Runs, strategy: str) -> None:
    """Computed by transformers, one example at a time."""
    folder = runs.whole(strategy, **TEST)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    expected = {}
    for task in tasks_of(runs):
        if task.test is not None:
            losses = []
            for k in range(len(task.test)):
                tokens, labels = task.test.example(k)
                with torch.no_grad():
                    logits = model(tokens[None]).logits[0]
                kept = labels != data.IGNORE_INDEX
                losses.append(F.cross_entropy(logits[kept], labels[kept], reduction="none"))
            expected[task.name] = float(torch.cat(losses).double().mean())
    done = summary(folder)
    assert list(expected) == MEASURED
    assert done["test_losses"] == {task: pytest.approx(loss, abs=1e-5) for task, loss in expected.items()} | {"d": None}
    assert done["worst_test_loss"] == max(done["test_losses"][task] for task in MEASURED)
    assert done["mean_test_loss"] == pytest.approx(sum(done["test_losses"][task] for task in MEASURED) / 3)
    assert done["test_losses"] != done["validation_losses"]


@pytest.mark.parametrize("strategy", ONE_OF_EACH_RECIPE)
def test_the_log_has_it_once_at_the_end(runs: Runs, strategy: str) -> None:
    done = summary(runs.whole(strategy, **TEST))
    *_, checkpoint, test, end = events(runs.whole(strategy, **TEST))
    spent = {key: done[key] for key in ("supervised_tokens", "total_tokens", "validation_tokens")}
    del test["seconds"]
    scores = {"losses": done["test_losses"]} | {key: done[f"test_{key}"] for key in ("exact_match", "bits_per_byte")}
    assert test == {"event": "test", "step": done["steps"], **spent, **scores}
    assert (checkpoint["event"], end["event"]) == ("checkpoint", "end")
    assert [event["event"] for event in sequence(runs.whole(strategy, **TEST))].count("test") == 1


def test_what_it_reads_is_counted_once(runs: Runs) -> None:
    """Beside what each validation reads."""
    tasks, done = tasks_of(runs), summary(runs.whole("uniform", **TEST))
    test, validation = (
        sum(int((example.labels != data.IGNORE_INDEX).sum()) for _, example in examples)
        for examples in (data.test_examples(tasks), data.validation_examples(tasks))
    )
    num_validations = sum(event["event"] == "validation" for event in events(runs.whole("uniform", **TEST)))
    assert num_validations > 2 and done["validation_tokens"] == num_validations * validation + test


@pytest.mark.parametrize("strategy", ONE_OF_EACH_RECIPE)
def test_without_a_test_split_there_is_none(runs: Runs, strategy: str) -> None:
    done = summary(runs.whole(strategy))
    assert all(value is None for key, value in done.items() if "test" in key)
    assert "test" not in {event["event"] for event in events(runs.whole(strategy))}


def test_recipes_have_the_same_test() -> None:
    """Word for word, in the method and where it is called."""
    sources = [
        Path(load_recipe(name).__file__).read_text()
        for name in ("sft_full_finetune", "adapt_full_finetune", "mos_full_finetune")
    ]
    methods = {source.split("    def test(self)")[1].split("    def ")[0] for source in sources}
    ends = {source.split("        if not run.is_done:")[1].split("    def ")[0] for source in sources}
    assert len(methods) == len(ends) == 1


# ---- stopped and resumed

# In the loop; before model/; before and after the measurement; before the summary.
MOMENTS = [("step", 5), ("finish", 0), ("test", 0), ("log_test", 0), ("finished", 0)]


@pytest.mark.parametrize("strategy", ONE_OF_EACH_RECIPE)
def test_a_run_that_is_stopped_at_any_moment_has_the_same_test(runs: Runs, tmp_path: Path, strategy: str) -> None:
    """One after the other: each resume gets up to the next moment."""
    for method, after in MOMENTS:
        runs.stop(strategy, tmp_path / "run", method=method, after=after, **TEST)
        assert not (tmp_path / "run" / "summary.json").exists()
    assert events(tmp_path / "run")[-1]["event"] == "test", "it has been measured, and will be again"
    assert runs.run(strategy, tmp_path / "run", **TEST) == 0
    assert_same_run(tmp_path / "run", runs.whole(strategy, **TEST))
    assert [event["event"] for event in events(tmp_path / "run")].count("test") == 1


def test_a_model_that_is_gone_is_written_again_with_the_same_summary(runs: Runs, tmp_path: Path) -> None:
    """The test is measured again with it."""
    folder = runs.whole("adapt", **TEST)
    assert runs.run("adapt", tmp_path / "run", **TEST) == 0
    (tmp_path / "run" / "model").rename(tmp_path / "gone")
    assert runs.run("adapt", tmp_path / "run", **TEST) == 0
    assert_same_run(tmp_path / "run", folder)


@pytest.mark.slow
def test_killed_before_operations_at_the_end(runs: Runs, tmp_path: Path) -> None:
    """kill -9, from model/ to the summary."""
    runs.stop("uniform", tmp_path / "run", method="finish", **TEST)
    operation, status = 0, None
    while status != 0:
        operation += 3
        status = runs.finish("uniform", tmp_path / "run", die_at_operation=operation, **TEST)
        assert status in (0, -9)
    assert operation > 10
    assert_same_run(tmp_path / "run", runs.whole("uniform", **TEST))


def test_another_test_split_is_refused(runs: Runs, tmp_path: Path) -> None:
    """Which examples are tested is part of the run, as is which are trained on."""
    runs.stop("uniform", tmp_path / "run", after=3, **TEST)
    with pytest.raises(ValueError, match=r"^resume: tasks\.test_examples changed since the run began; "):
        runs.run("uniform", tmp_path / "run", **{"tasks.test_examples": 2})


def test_two_processes_measure_the_same(runs: Runs, tmp_path: Path) -> None:
    assert runs.finish_group("uniform", tmp_path / "run", **TEST, **{"model.attn_dropout": 0}) == [0, 0]
    assert runs.run("uniform", tmp_path / "alone", **TEST, **{"model.attn_dropout": 0}) == 0
    both, alone = (summary(tmp_path / name) for name in ("run", "alone"))
    assert both["validation_tokens"] == alone["validation_tokens"] > 0
    assert {task: both["test_losses"][task] for task in MEASURED} == {
        task: pytest.approx(alone["test_losses"][task], abs=1e-4) for task in MEASURED
    }
    assert both["test_exact_match"] == alone["test_exact_match"]


# ---- a source with its own

OWN = """
import json
from adapt_recipes.data import RawTask

def tasks(path):
    def split(name, *numbers):
        turns = lambda i: [{"role": "user", "content": f"{name}{i}"}, {"role": "assistant", "content": str(i % 7)}]
        return [turns(i) for i in range(*numbers)]
    return [RawTask("a", split("a", 40), test=split("a", 60, 63)), RawTask("b", split("b", 40))]
"""


@pytest.mark.parametrize("test_examples", [0, 3])
def test_a_test_split_of_its_own(runs: Runs, tmp_path: Path, test_examples: int) -> None:
    """Without ``test_examples`` the other task is not tested."""
    Path("own_tasks.py").write_text(OWN)
    source = {"tasks": "own_tasks.tasks", "tasks.no_validation": "[]", "tasks.test_examples": test_examples}
    assert runs.run("uniform", tmp_path / "run", **source) == 0
    done = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [task for task, loss in done["test_losses"].items() if loss] == (["a", "b"] if test_examples else ["a"])
    assert done["worst_test_loss"] == max(loss for loss in done["test_losses"].values() if loss)
    own, other = tasks_of(runs, **source)
    assert texts([own.test]) == {(*f"a{i}{i % 7}".encode(),) for i in range(60, 63)}
    assert (other.test is not None) == bool(test_examples)
