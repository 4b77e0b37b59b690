"""The toy tasks are what their docstring says."""

from __future__ import annotations

import math
from collections import Counter

from adapt_recipes.data import ByteTokenizer, toy_tasks
from adapt_recipes.data.conversations import checked_conversation
from adapt_recipes.data.toy import NUM_FACTS, NUM_TRAIN_ROWS


def test_tables() -> None:
    tasks = toy_tasks()
    assert [task.name for task in tasks] == [f"facts_{n}" for n in NUM_FACTS]
    for task, num_facts, num_rows in zip(tasks, NUM_FACTS, NUM_TRAIN_ROWS, strict=True):
        train = [(row[0]["content"], row[1]["content"]) for row in task.conversations]
        validation = [(row[0]["content"], row[1]["content"]) for row in task.validation or []]
        assert (len(train), len(validation), task.entropy) == (num_rows, 256, 0.0)
        assert len(set(train)) == len(dict(train)) == num_facts, "every fact occurs, with one answer"
        assert set(validation) <= set(train), "memorising is the task"
        counts = Counter(validation).values()
        assert max(counts) - min(counts) <= 1, "validation reads every fact as often"
    prompts = [row[0]["content"] for task in tasks for row in task.conversations]
    assert all(len(prompt) == 3 for prompt in prompts)


def test_noise_has_a_fresh_label_every_time() -> None:
    noise = toy_tasks(noise=True)[-1]
    assert (noise.name, noise.entropy) == ("noise", math.log(16))
    answers: dict[str, set[str]] = {}
    for prompt, answer in noise.conversations:
        answers.setdefault(prompt["content"], set()).add(answer["content"])
    assert sum(len(labels) > 1 for labels in answers.values()) > 900


def test_the_seed_determines_them() -> None:
    assert toy_tasks(noise=True, seed=1) == toy_tasks(noise=True, seed=1)
    assert toy_tasks(seed=1) != toy_tasks(seed=2)
    assert toy_tasks(noise=True)[:7] == toy_tasks()


def test_one_supervised_token_a_row() -> None:
    row = checked_conversation(toy_tasks()[0].conversations[0])
    tokens, spans = ByteTokenizer(supervise_end=False).encode(row)
    assert len(tokens) == 4 and spans == [(3, 4)]
