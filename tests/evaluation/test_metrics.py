"""The metrics are those of Natural Instructions."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt_recipes.evaluation.metrics import exact_match, normalize_answer, rouge_l

# Enough to meet in other cases, with other punctuation and white space.
TEXTS = st.text(alphabet="aB c.,!?'\n\té", max_size=8)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("  Yes,\n it is. ", "yes it is"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("“quoted”", "“quoted”"),
        ("...", ""),
    ],
)
def test_answers_are_normalized(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@given(TEXTS)
def test_normalizing_again_changes_nothing(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
    assert not set(once) & {*string.punctuation, *string.ascii_uppercase}


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_an_answer_matches_if_any_reference_does(answer: str, references: list[str]) -> None:
    expected = any(normalize_answer(answer) == normalize_answer(each) for each in references)
    assert exact_match(answer, references) == expected
    assert exact_match(references[-1].upper() + "!", references) == 1


def test_rouge_l_is_the_longest_common_subsequence_of_stems() -> None:
    # "the cat sat on mat": 4 of 4 words of the answer and 4 of 6 of the reference.
    assert rouge_l("the cats on mats", ["the cat sat on the mat"]) == pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6))
    assert rouge_l("no", ["yes", "no"]) == 1
    assert rouge_l("no", ["yes"]) == rouge_l("", ["yes"]) == 0


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_rouge_l_is_the_maximum_over_references(answer: str, references: list[str]) -> None:
    assert rouge_l(answer, references) == max(rouge_l(answer, [each]) for each in references)
