"""Exact match is what greedy decoding gets, and bits per byte are those of the texts; both in log and summary."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from running import Runs, events, summary
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt_recipes import data
from adapt_recipes.signals import Probe

SPLITS = ("validation", "test")
NUM_HELD_OUT = 6


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tasks of texts beyond ASCII: one that can be learned, one whose answers are random, one that is not validated."""
    folder, generator = tmp_path_factory.mktemp("texts"), random.Random(0)
    answers = {"same": ["né"], "random": ["ja", "nö", "ñ"], "unmeasured": ["x"]}
    for name, some in answers.items():
        rows = [{"prompt": f"{name[0]}é{i}", "response": generator.choice(some)} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "tasks.path": folder,
        "tasks.no_validation": "[unmeasured]",
        "tasks.validation_examples": NUM_HELD_OUT,
        "tasks.test_examples": NUM_HELD_OUT,
        "model.attn_dropout": 0,
        "budget.tokens": 1500,
        "validate_every": 0,
    }


@pytest.fixture(scope="module")
def folder(runs: Runs, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert runs.run("uniform", folder, **changes) == 0
    return folder


def held_out(runs: Runs, changes: dict[str, Any]) -> Iterator[tuple[str, str, data.Examples]]:
    config = runs.config("uniform", Path("unused"), **changes)
    tasks = data.build_tasks(config.tasks, config.tokenizer, max_seq_len=config.max_seq_len)[1]
    for task in tasks:
        for split in SPLITS:
            if (examples := task.splits.get(split)) is not None:
                assert len(examples) == NUM_HELD_OUT
                yield task.name, split, examples


def test_exact_match_is_what_greedy_decoding_gets(runs: Runs, changes: dict[str, Any], folder: Path) -> None:
    """By ``generate`` of transformers, from the prompt, for as many tokens as the answer has."""
    model, done = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval(), summary(folder)
    shares: dict[str, dict[str, Any]] = {split: {"unmeasured": None} for split in SPLITS}
    for name, split, examples in held_out(runs, changes):
        matches = []
        for i in range(len(examples)):
            tokens, labels = examples.example(i)
            answer = labels[labels != data.IGNORE_INDEX].tolist()
            prompt = tokens[None, : len(tokens) + 1 - len(answer)]
            generated = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False
            )
            matches.append(generated[0, prompt.shape[1] :].tolist() == answer)
        shares[split][name] = sum(matches) / len(matches)
    for split in SPLITS:
        assert done[f"{split}_exact_match"] == {name: pytest.approx(share) for name, share in shares[split].items()}
        measured = [share for share in shares[split].values() if share is not None]
        assert done[f"mean_{split}_exact_match"] == pytest.approx(sum(measured) / 2)
        assert 0 < sum(measured) < 2, "some match and some do not"


def test_bits_per_byte_are_those_of_the_texts(runs: Runs, changes: dict[str, Any], folder: Path) -> None:
    """From prompts and answers as text, with the tokenizer and the model of ``model/``."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer, done = AutoTokenizer.from_pretrained(folder / "model"), summary(folder)
    expected: dict[str, dict[str, Any]] = {split: {"unmeasured": None} for split in SPLITS}
    for name, split, examples in held_out(runs, changes):
        bits = num_bytes = 0.0
        for i in range(len(examples)):
            (question,), _ = examples.prompt(i)
            (answer,) = examples.references(i)
            num_prompt = len(tokenizer(question["content"])["input_ids"])
            ids = torch.tensor(tokenizer(question["content"] + answer + tokenizer.eos_token)["input_ids"])
            with torch.no_grad():
                log_p = torch.log_softmax(model(ids[None]).logits[0].double(), dim=-1)
            bits -= sum(float(log_p[t - 1, ids[t]]) for t in range(num_prompt, len(ids))) / math.log(2)
            num_bytes += len(answer.encode("utf-8"))
        expected[split][name] = pytest.approx(bits / num_bytes, abs=1e-4)
    for split in SPLITS:
        values = done[f"{split}_bits_per_byte"]
        assert values == expected[split]
        assert done[f"mean_{split}_bits_per_byte"] == pytest.approx((values["same"] + values["random"]) / 2)


def test_every_validation_and_the_test_log_them(folder: Path) -> None:
    done, log = summary(folder), events(folder)
    first, last = (line for line in log if line["event"] == "validation")
    (test,) = (line for line in log if line["event"] == "test")
    for key in ("exact_match", "bits_per_byte"):
        assert last[key] == done[f"validation_{key}"] and test[key] == done[f"test_{key}"]
        assert first[key].keys() == last[key].keys() and first[key] != last[key]
    assert first["bits_per_byte"]["same"] > 10 * last["bits_per_byte"]["same"]
    # Of the same bytes and tokens.
    ratios = [line["bits_per_byte"]["random"] / line["losses"]["random"] for line in (first, last)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-12)


def test_answers_without_known_bytes_have_no_bits_per_byte(runs: Runs, changes: dict[str, Any]) -> None:
    with mock.patch.object(data.Examples, "num_answer_bytes", torch.zeros(1)):
        assert runs.run("uniform", Path("run"), **changes | {"budget.tokens": 8}) == 0
    done = summary(Path("run"))
    assert done["validation_bits_per_byte"] == dict.fromkeys(done["validation_losses"])
    assert done["mean_test_bits_per_byte"] is None and done["mean_test_exact_match"] is not None


def test_a_recipe_that_logs_losses_alone_is_refused(runs: Runs, changes: dict[str, Any]) -> None:
    """One copied before there were scores."""

    def losses(probe: Probe, batches: Any, **_: Any) -> Tensor:
        return probe.losses(batches)

    with mock.patch.object(Probe, "scores", losses), pytest.raises(ValueError) as error:
        runs.run("uniform", Path("run"), **changes)
    assert str(error.value) == "log_validation: takes what Probe.scores returns, and the recipe gives losses alone"
