"""The metrics of Super-NaturalInstructions (Wang et al. 2022, section 5.3): exact match and ROUGE-L over references.

As in the evaluation script of the collection, for its English tasks.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from typing import Any

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """The text in lower case, without ASCII punctuation, with single spaces."""
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalized answer is one of the normalized references, else 0."""
    return float(normalize_answer(answer) in map(normalize_answer, references))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The highest ROUGE-L F-measure over the references, with Porter's stemmer; 0 to 1."""
    scorer = _scorer()
    return max(float(scorer.score(target=each, prediction=answer)["rougeL"].fmeasure) for each in references)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
