"""Questions with known answers, from the tasks of a run or from tasks that it has not seen.

A model is asked as it was trained: with the same tokens, rendered by the chat template of its folder. Its greedy answer
is compared with all references of the source (exact match and ROUGE-L), and the likelihood of the first reference, end
token included, is measured as in training: in bits per UTF-8 byte, averaged over examples.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adapt_recipes.data.chat import ChatTokenizer
from adapt_recipes.data.examples import IGNORE_INDEX, Examples
from adapt_recipes.evaluation.metrics import exact_match, rouge_l
from adapt_recipes.evaluation.model import versions
from adapt_recipes.evaluation.records import Sample, Score

# Whether more is better, of each metric.
METRICS = {
    "exact_match": True,
    "rouge_l": True,
    "bits_per_byte": False,
    "answer_tokens": False,
    "unstopped": False,
}


class Question(NamedTuple):
    """One prompt with its answers.

    Attributes:
        id: a hash of the prompt's tokens and of the first reference's.
        prompt: rendered, up to where the answer begins.
        prompt_ids, answer_ids: the tokens of the prompt, and of the first reference with its end token.
        num_bytes: of the first reference, in UTF-8.
        references: all right answers.
    """

    id: str
    prompt: str
    prompt_ids: list[int]
    answer_ids: list[int]
    num_bytes: int
    references: list[str]


def questions_of(split: Examples, tokenizer: ChatTokenizer, *, limit: int | None) -> tuple[list[Question], int]:
    """The last questions of the conversations of a split.

    Args:
        split: of a task, tokenized with ``tokenizer``.
        tokenizer: that of the model.
        limit: ask no more than this many, those whose prompts have the smallest hashes; None: all.

    Returns:
        The questions, and the number of examples that have none, because their last answer is a call of a tool or is
        not supervised.
    """
    order = split.prompt_hashes.numpy().argsort(kind="stable")
    questions: list[Question] = []
    num_skipped = 0
    for index in order.tolist():
        if limit is not None and len(questions) == limit:
            break
        example, references = split.example(index), [each for each in split.references(index) if each.strip()]
        prompt, ids = tokenizer.encode_prompt(*split.prompt(index))
        # The last answer that counts in the loss: the last positions with a label that follow each other.
        counts = (example.labels != IGNORE_INDEX).numpy()
        end = int(counts.nonzero()[0][-1]) + 1
        first = end - int(np.append(counts[:end][::-1], False).argmin())
        prompt_ids, answer_ids = example.tokens[: first + 1].tolist(), example.labels[first:end].tolist()
        # A token that spans the end of the prompt is the answer's; if more is missing, it is an earlier answer.
        if not references or len(ids) > len(prompt_ids) + 1:
            num_skipped += 1
            continue
        digest = hashlib.blake2b(repr((prompt_ids, answer_ids)).encode(), digest_size=8)
        questions.append(
            Question(
                digest.hexdigest(),
                prompt,
                prompt_ids,
                answer_ids,
                split.answer_bytes(index)[-1],
                references,
            )
        )
    return questions, num_skipped


def ask(
    lm: Any, questions: Sequence[Question], *, max_answer_tokens: int, family: str, data: str, left_out: dict[str, int]
) -> tuple[Score, list[Sample]]:
    """Asks a model all questions of a task.

    Args:
        lm: see ``open_model``.
        questions: of the task.
        max_answer_tokens: after which an answer is cut.
        family, data, left_out: see ``Score``.

    Raises:
        ValueError: there is no question; or the tokenizer of lm-eval makes other tokens of a prompt than the model was
            trained on.
    """
    from lm_eval.api.instance import Instance

    if not questions:
        raise ValueError(
            "no example ends in an answer of text that counts in training; leave the task out with only=[...]"
        )
    began = time.monotonic()
    for question in questions:
        if lm.tok_encode(question.prompt)[: len(question.prompt_ids)] != question.prompt_ids:
            raise ValueError(
                "the tokenizer of the model's folder makes other tokens of a prompt than it was trained on: "
                f"{question.prompt[:60]!r}..."
            )
    until = {"until": [], "do_sample": False, "max_gen_toks": max_answer_tokens}
    requests = [
        Instance("generate_until", {}, (question.prompt, dict(until)), 0, (None, i, 1))
        for i, question in enumerate(questions)
    ]
    answers = lm.generate_until(requests)
    # As tokens, because those of a prompt and an answer together are not always those of each.
    likelihoods = lm._loglikelihood_tokens([(("", ""), each.prompt_ids, each.answer_ids) for each in questions])
    samples = []
    for question, answer, (log_likelihood, _) in zip(questions, answers, likelihoods, strict=True):
        # Counted on the text, because lm-eval returns no tokens.
        num_tokens = min(len(lm.tok_encode(answer, add_special_tokens=False)), max_answer_tokens)
        values = {
            "exact_match": exact_match(answer, question.references),
            "rouge_l": rouge_l(answer, question.references),
            "bits_per_byte": -log_likelihood / math.log(2) / question.num_bytes,
            "answer_tokens": float(num_tokens),
            "unstopped": float(num_tokens >= max_answer_tokens),
        }
        samples.append(
            Sample(
                id=question.id,
                prompt=question.prompt,
                references=question.references,
                answer=answer.strip(),
                values=values,
            )
        )
    means, stderrs = means_of(samples)
    score = Score(
        family=family,
        metric="exact_match",
        higher_is_better=METRICS,
        values=means,
        stderrs=stderrs,
        num_examples=len(samples),
        data=data,
        left_out={reason: number for reason, number in left_out.items() if number},
        seconds=time.monotonic() - began,
        versions=versions(),
    )
    return score, samples


def means_of(samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of every metric over samples, and its standard error; of one sample there is none."""
    columns = {name: np.array([sample.values[name] for sample in samples]) for name in samples[0].values}
    means = {name: float(values.mean()) for name, values in columns.items()}
    if len(samples) == 1:
        return means, {}
    return means, {name: float(values.std(ddof=1) / math.sqrt(len(values))) for name, values in columns.items()}
