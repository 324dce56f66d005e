"""Multiple choice. Rows come from what models write, or from the rules."""

from __future__ import annotations

import pytest

from posttrain.data.sample import Problem
from posttrain.verifiers.choice import ChoiceVerifier, option_texts

STRICT = ChoiceVerifier(ChoiceVerifier.Config(type="choice"))
LENIENT = ChoiceVerifier(ChoiceVerifier.Config(type="choice", profile="lenient"))
CITIES = ["Paris", "London", "New York", "York"]

# reference, completion, options known, strict status, lenient status
ROWS = [
    ("B", "The answer is B.", False, "correct", "correct"),
    ("B", "The answer is (B).", False, "correct", "correct"),
    ("B", r"\boxed{B}", False, "correct", "correct"),
    ("B", r"\boxed{\text{(B)}}", False, "correct", "correct"),
    ("B", "B", False, "correct", "correct"),
    ("B", "(B)", False, "correct", "correct"),
    ("B", " B.\n", False, "correct", "correct"),
    ("B", "#### B", False, "correct", "correct"),
    ("B", "**Answer: B**", False, "correct", "correct"),
    ("B", r"Answer: \textbf{B}", False, "correct", "correct"),
    ("B", "The correct answer is option B.", False, "correct", "correct"),
    ("B", "The answer is \uff22.", False, "correct", "correct"),  # full-width letter
    ("b", "The answer is b.", False, "correct", "correct"),
    ("C", "The answer is B.", False, "wrong", "wrong"),
    ("B", "The answer is A. Wait, the answer is B.", False, "correct", "correct"),  # the last counts
    ("A", "The answer is A. Wait, the answer is B.", False, "wrong", "wrong"),
    ("B", "The answer is A or B.", False, "wrong", "correct"),  # several
    ("B", r"\boxed{A, B}", False, "wrong", "correct"),
    ("B", r"\boxed{A} or \boxed{B}", False, "wrong", "correct"),
    ("B", "The answer is B and C.", False, "wrong", "wrong"),
    ("B", "The answer is not A but B", False, "correct", "correct"),
    ("B", "The answer is B, not A.", False, "correct", "correct"),
    ("A", "The answer is B, not A.", False, "wrong", "wrong"),
    ("B", "So it must be (B) because", False, "no_answer", "correct"),  # not stated
    ("B", "Option B looks right", False, "no_answer", "correct"),
    ("B", "A cat sat", False, "no_answer", "no_answer"),  # an article
    ("A", "A man. I am.\nThe answer is A.", False, "correct", "correct"),
    ("B", "", False, "no_answer", "no_answer"),
    ("B", "The answer is 42.", False, "unparseable", "unparseable"),
    ("E", "The answer is E", False, "bad_reference", "bad_reference"),
    (None, "The answer is A", False, "bad_reference", "bad_reference"),
    ("B", "The answer is London.", True, "correct", "correct"),
    ("London", "The answer is B.", True, "correct", "correct"),
    ("1", "The answer is B.", True, "correct", "correct"),  # a number from 0
    ("4", "The answer is B.", True, "bad_reference", "bad_reference"),
    ("B", "The answer is B) London.", True, "correct", "correct"),
    ("B", "The correct answer is option (B): London", True, "correct", "correct"),
    ("B", "The answer is (B) London, not (A) Paris.", True, "correct", "correct"),
    ("C", r"\boxed{New York}", True, "correct", "correct"),
    ("D", r"\boxed{New York}", True, "wrong", "wrong"),  # which holds the text of D
    ("D", r"\boxed{York}", True, "correct", "correct"),
    ("B", "I think London is nice", True, "no_answer", "no_answer"),
    ("B", r"\boxed{B}" * 100_000, False, "correct", "correct"),
    ("B", "A" * 1_000_000, False, "no_answer", "no_answer"),
    ("B", "(" * 1_000_000, False, "no_answer", "no_answer"),
    ("B", "\x00B\u200f", False, "no_answer", "correct"),
]


@pytest.mark.parametrize(("reference", "completion", "known", "strict", "lenient"), ROWS)
def test_verdicts(reference: str, completion: str, known: bool, strict: str, lenient: str) -> None:
    problem = Problem("p", "", reference, {"choices": CITIES} if known else {})
    assert STRICT(problem, completion).status == strict
    assert LENIENT(problem, completion).status == lenient


def test_letters_follow_the_number_of_options() -> None:
    problem = Problem("p", "", "F", {"choices": list("uvwxyz")})
    assert STRICT(problem, "The answer is F.").status == "correct"
    short = ChoiceVerifier(ChoiceVerifier.Config(type="choice", letters="AB"))
    assert short(Problem("p", "", "C"), "C").status == "bad_reference"


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (["x", 2], ["x", "2"]),
        ({"text": ["x", "y"], "label": ["A", "B"]}, ["x", "y"]),
        ({"B": "y", "A": "x"}, ["x", "y"]),
        ("['x', 'y']", ["x", "y"]),
        ("[" * 100_000, []),
        ("plain", []),
        (None, []),
        (["x"] * 27, []),
    ],
)
def test_option_texts(column, texts: list[str]) -> None:
    assert option_texts(column) == texts
