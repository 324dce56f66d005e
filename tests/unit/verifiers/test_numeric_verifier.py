"""Numbers in text."""

from __future__ import annotations

import pytest

from posttrain.data.sample import Problem
from posttrain.errors import RecipeError
from posttrain.verifiers.numeric import NumericVerifier


def judge(gold: str | None, completion: str, **config) -> str:
    return NumericVerifier(NumericVerifier.Config(type="numeric", **config))(Problem("p", "", gold), completion).status


@pytest.mark.parametrize(
    ("gold", "completion", "status"),
    [
        ("18", "18", "correct"),
        ("18", "2 + 16 = 18 eggs.\n", "correct"),
        ("18", "18, not 19", "wrong"),  # the last number counts
        ("16 - 3 = 13\n#### 13", "so 13", "correct"),  # a whole solution as the reference
        ("70000", "it costs $70,000.", "correct"),
        ("1234567.89", "1,234,567.89", "correct"),
        ("1e5", "100,000", "correct"),
        ("-5", "= -5", "correct"),
        ("-5", "= \u22125", "correct"),  # Unicode minus
        ("-5", "(-5)", "correct"),
        ("-5", "-$5", "correct"),
        ("5", "+5", "correct"),
        ("4", "10-4", "correct"),  # an operator
        ("-4", "x = -4", "correct"),
        ("5", "5.0", "correct"),
        ("0.5", ".5", "correct"),
        ("5", "so...5", "correct"),
        ("5", "it is 5.", "correct"),
        ("0.75", "3/4", "correct"),
        ("0.75", r"$\frac{3}{4}$", "correct"),
        ("-0.75", r"$-\dfrac{3}{4}$", "correct"),
        ("4", r"$\frac{3}{4}$", "wrong"),
        ("1500", "1.5e3", "correct"),
        ("1500", "1.5 x 10^3", "correct"),
        ("1500", r"$1.5 \times 10^{3}$", "correct"),
        ("0.0015", "1.5E-3", "correct"),
        ("50", "50%", "correct"),
        ("5", "**5**", "correct"),
        ("1024", "2^{10} = 1024", "correct"),
        ("10", "2^{10}", "unparseable"),
        ("2", "2^10", "unparseable"),
        ("5", "5\u00b2", "unparseable"),  # superscript
        ("7", "it is \u0667", "unparseable"),  # Arabic digit
        ("2", "2 plus 5 is \u0667", "unparseable"),  # and not the 5 before it
        ("5", "5\u0663", "unparseable"),
        ("5", "3,5", "unparseable"),
        ("70000", "70,00", "unparseable"),
        ("3", "1.2.3", "unparseable"),
        ("3", "1/2/3", "unparseable"),
        ("5", "5/0", "unparseable"),
        ("1", "1e9999", "unparseable"),
        ("1", "9" * 1_000_000, "unparseable"),
        ("1", "1 " * 500_000, "correct"),
        ("1", "1" + " " * 20_000, "no_answer"),
        ("2", "H2O", "no_answer"),
        ("5", "", "no_answer"),
        ("5", "five", "no_answer"),
        ("five", "5", "bad_reference"),
        ("", "5", "bad_reference"),
        (None, "5", "bad_reference"),
        ("3,5", "5", "bad_reference"),
    ],
)
def test_last_number(gold: str | None, completion: str, status: str) -> None:
    assert judge(gold, completion) == status


@pytest.mark.parametrize(
    ("gold", "completion", "status"),
    [
        ("5", "Answer: 5 apples. Sure? 6", "correct"),
        ("5", "Answer: 4. Answer: 5.", "correct"),
        ("5", "5", "no_answer"),
        ("5", "Answer: none", "no_answer"),
    ],
)
def test_pattern(gold: str, completion: str, status: str) -> None:
    assert judge(gold, completion, pattern=r"Answer: ([^.]*)") == status


@pytest.mark.parametrize(
    ("gold", "completion", "tolerance", "status"),
    [
        ("0.3", "0.1", 0.0, "wrong"),
        ("0.3", "0.30000000000000004", 0.0, "wrong"),  # exact fractions
        ("1/3", "0.333", 0.01, "correct"),
        ("1000", "1009", 0.01, "correct"),  # relative
        ("1000", "1011", 0.01, "wrong"),
        ("0", "0.01", 0.01, "correct"),  # absolute, the limit included
        ("-1000", "-1009", 0.01, "correct"),
    ],
)
def test_tolerance(gold: str, completion: str, tolerance: float, status: str) -> None:
    assert judge(gold, completion, tolerance=tolerance) == status


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), ("Answer: .*", "no group")])
def test_bad_patterns(pattern: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        NumericVerifier(NumericVerifier.Config(type="numeric", pattern=pattern))
    assert caught.value.where == "verifier.numeric.pattern"
