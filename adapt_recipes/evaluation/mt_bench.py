"""Answers to MT-bench (Zheng et al. 2023, arXiv 2306.05685), as its judges read them; the judging is done elsewhere.

The questions are ``fastchat/llm_judge/data/mt_bench/question.jsonl`` of FastChat. A file of answers goes to
``data/mt_bench/model_answer/`` there. Temperatures by category, and 1,024 tokens at most, are FastChat's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapt_recipes.evaluation.model import set_seeds, versions
from adapt_recipes.evaluation.questions import means_of
from adapt_recipes.evaluation.records import Sample, Score

MAX_ANSWER_TOKENS = 1024
# FastChat's ``temperature_config``; 0 for the others, and .7 for a category that it does not have.
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
SOURCE = "fastchat/llm_judge/data/mt_bench/question.jsonl of github.com/lm-sys/FastChat"


def read_mt_bench(path: Path) -> list[dict[str, Any]]:
    """The questions.

    Raises:
        ValueError: there is no such file, or a line is no question.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it is {SOURCE}")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            question = json.loads(line)
            questions.append({key: question[key] for key in ("question_id", "category", "turns")})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: is no question of MT-bench ({error})") from None
    return questions


def answer_mt_bench(
    lm: Any, questions: Sequence[dict[str, Any]], *, model_name: str, seed: int, data: str
) -> tuple[Score, list[Sample], list[dict[str, Any]]]:
    """Answers all turns of all questions.

    Args:
        lm: see ``open_model``.
        questions: see ``read_mt_bench``.
        model_name: for the judges.
        seed: of answers that are drawn.
        data: see ``Score``.

    Returns:
        A score without a metric, the answers as samples, and as lines for the judges.
    """
    from lm_eval.api.instance import Instance

    began = time.monotonic()
    set_seeds(seed)
    chats: list[list[dict[str, str]]] = [[] for _ in questions]
    prompts: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question["turns"])]
        requests = []
        for i in asked:
            chats[i].append({"role": "user", "content": questions[i]["turns"][turn]})
            prompts[i].append(lm.apply_chat_template(chats[i]))
            temperature = _TEMPERATURES.get(questions[i]["category"], 0.7)
            how = {"until": [], "max_gen_toks": MAX_ANSWER_TOKENS, "do_sample": temperature > 0}
            how |= {"temperature": temperature} if temperature else {}
            requests.append(Instance("generate_until", {}, (prompts[i][-1], how), 0, (None, i, 1)))
        for i, answer in zip(asked, lm.generate_until(requests), strict=True):
            chats[i].append({"role": "assistant", "content": answer.strip()})

    samples, lines = [], []
    for question, chat, asked_with in zip(questions, chats, prompts, strict=True):
        answers = [message["content"] for message in chat if message["role"] == "assistant"]
        lines.append(
            {
                "question_id": question["question_id"],
                "answer_id": f"{model_name}-{question['question_id']}",
                "model_id": model_name,
                "choices": [{"index": 0, "turns": answers}],
                "tstamp": time.time(),
            }
        )
        tokens = [len(lm.tok_encode(answer, add_special_tokens=False)) for answer in answers]
        values = {
            "answer_tokens": sum(tokens) / len(tokens),
            "unstopped": sum(number >= MAX_ANSWER_TOKENS for number in tokens) / len(tokens),
        }
        for turn, answer in enumerate(answers):
            name = f"{question['question_id']}-{turn + 1}"
            samples.append(Sample(id=name, prompt=asked_with[turn], references=[], answer=answer, values=values))
    means, stderrs = means_of(samples)
    score = Score(
        family="mt_bench",
        metric=None,
        higher_is_better={"answer_tokens": False, "unstopped": False},
        values=means,
        stderrs=stderrs,
        num_examples=len(questions),
        data=data,
        seconds=time.monotonic() - began,
        versions=versions(),
    )
    return score, samples, lines
