"""Equality of numbers, read from text without a mathematics package."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import ClassVar, Literal

from pydantic import Field

from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.verifiers import references
from posttrain.verifiers.pattern import compile_pattern, last_group
from posttrain.verifiers.verdict import Status, Verdict

# \d is every Unicode digit on purpose: a number written with other digits is found, and then refused as a whole.
_DIGITS = r"(?:\d+(?:[.,]\d+)*|(?<![\w.])\.\d+)"
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])(?P<sign>[-+\u2212]))?\\?[$\u20ac\u00a3]?"
    rf"(?:\\[dt]?frac\{{(?P<over>{_DIGITS})\}}\{{(?P<under>{_DIGITS})\}}"
    rf"|(?<![\w^])(?<!\w\.)(?<!\^\{{)(?P<number>{_DIGITS}(?:/{_DIGITS})*)"
    r"(?:[eE](?P<exponent>[-+\u2212]?\d+)|\s?(?:\\times|[x\u00d7*])\s?10\^\{?(?P<power>[-+\u2212]?\d+)\}?)?)"
    r"(?P<raised>[\u00b2\u00b3\u00b9\u2070-\u2079^])?"
)
_PLAIN = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?")
_TAIL, _MAX_LENGTH, _MAX_EXPONENT = 20_000, 400, 400


class NumericVerifier:
    r"""Correct if the last number of the completion (or of what `pattern` finds) equals the last of the reference.

    Numbers are compared as exact fractions. Understood: signs (also the Unicode minus), thousands separated by commas,
    decimals with a dot, `a/b` and `\frac{a}{b}`, `1.5e3`, `1.5 x 10^3`, a currency sign before and any unit after. A
    percent sign is a unit. A minus right after a letter, digit or bracket is an operator, so `10-4` ends in 4.

    Not guessed at but judged unparseable: digits other than 0-9, commas that do not separate thousands (`3,5`), more
    than one dot or slash, powers (`5^2`), a zero below the line, and more than 400 characters or decimal places. Only
    the last 20,000 characters are looked at.

    Raises:
        RecipeError: a pattern that is no regular expression or has no group.
    """

    name = "numeric"
    outcome = True

    class Config(VerifierConfig):
        """Equality of the last number (or of the first group of the last match of `pattern`)."""

        type: Literal["numeric"] = "numeric"
        needs_reference: ClassVar[bool] = True
        names_answers: ClassVar[bool] = True
        pattern: str | None = Field(
            None, description="regular expression whose last match states the answer; default: the last number"
        )
        tolerance: float = Field(0.0, ge=0.0, description="absolute or relative, whichever allows more")

        def gold(self, problem: Problem) -> str | None:
            return None if self.pattern is not None else problem.reference or ""

        def excludes(self, one: Problem, other: Problem) -> bool:
            return references.differ(one, other)

        def spoilt(self, problem: Problem, completion: str) -> list[tuple[str, str]]:
            if references.number(problem) is None or self.tolerance:
                return []
            return [("another number", f"{references.digits(problem)}1")]

    def __init__(self, config: NumericVerifier.Config) -> None:
        self.tolerance = Fraction(str(config.tolerance))
        self.pattern = None
        if config.pattern is not None:
            self.pattern = compile_pattern(config.pattern, where="verifier.numeric.pattern")

    def reads_plainly(self, reference: str) -> bool:
        """Whether it is a whole number of a few digits."""
        return len(reference) < 20 and reference.isascii() and reference.isdigit()

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        gold = _last_number(problem.reference or "")
        reference = None if gold is None else _value(gold)
        if reference is None:
            return Verdict(Status.BAD_REFERENCE, None, f"no number in the reference {str(problem.reference)[-40:]!r}")
        answer = completion if self.pattern is None else last_group(self.pattern, completion)
        found = None if answer is None else _last_number(answer)
        if found is None:
            return Verdict(Status.NO_ANSWER, 0.0, "no number" if answer is not None else "the pattern does not match")
        value = _value(found)
        if value is None:
            return Verdict(Status.UNPARSEABLE, 0.0, found[0][:40])
        allowed = max(self.tolerance, self.tolerance * abs(reference))
        if abs(value - reference) <= allowed:
            return Verdict(Status.CORRECT, 1.0, found[0], str(value))
        return Verdict(Status.WRONG, 0.0, found[0], str(value))


def _last_number(text: str) -> re.Match[str] | None:
    last = None
    for found in _NUMBER.finditer(text[-_TAIL:]):
        last = found
    return last


def _value(found: re.Match[str]) -> Fraction | None:
    """The number as written; None if it cannot be read with certainty."""
    if len(found[0]) > _MAX_LENGTH or found["raised"]:
        return None
    parts = found["number"].split("/") if found["number"] else [found["over"], found["under"]]
    if len(parts) > 2 or not all(part and _PLAIN.fullmatch(part) for part in parts):
        return None
    numbers = [Fraction(part.replace(",", "")) for part in parts]
    exponent = (found["exponent"] or found["power"] or "0").replace("\u2212", "-")
    if not exponent.isascii() or len(exponent) > 5 or abs(int(exponent)) > _MAX_EXPONENT:
        return None
    if len(numbers) == 2 and numbers[1] == 0:
        return None
    value = numbers[0] / (numbers[1] if len(numbers) == 2 else 1) * Fraction(10) ** int(exponent)
    return -value if found["sign"] in ("-", "\u2212") else value
