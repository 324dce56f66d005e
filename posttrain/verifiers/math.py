"""Mathematical equality, judged by math-verify's grammar and comparison."""

from __future__ import annotations

import importlib.util
import logging
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from posttrain.config.schema import MathVerifierConfig
from posttrain.data.sample import Problem
from posttrain.errors import StackError
from posttrain.verifiers.math_answer import MAX_ANSWER, TAIL, Stated, final_answer
from posttrain.verifiers.math_notation import as_latex, option_letter, option_with_text
from posttrain.verifiers.math_sets import as_union, as_vector, written_as
from posttrain.verifiers.math_units import percent, plain_number, without_symbol
from posttrain.verifiers.math_words import Words, words
from posttrain.verifiers.verdict import Status, Verdict

MAX_DEPTH = 20
"""Brackets within brackets; the parser takes seconds for some hundred of them."""

MAX_EXPONENT = 10_000
"""Powers of numbers above it are not evaluated."""

_ROUNDING = 0.01
_SMALL, _APART = Fraction(1, 100), Fraction(1, 500)
_TWO_NUMBERS = re.compile(r"(?<![_^0-9.,])(?<![a-z] )[0-9]+(?:[.,][0-9]+)*(?:\s|\\[,;: !]|\\q?quad|~)+[0-9]")
_TELLING_WORDS = re.compile(
    r"[0-9}]\s*(?:\\[,; ])?\s*\\(?:text|mathrm)\s*\{[^{}]*"
    r"\b(?:and|or|half|halves|thirds|quarters|dozen|hundred|thousand|million|billion)\b[^{}]*\}\s*$"
)
_AMOUNTS = re.compile(
    r"[0-9}]\s*(?:\\[,; ])?\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*(?:and|or|,)*\s*\})[^{}]*\}"
    r"(?:[\s,]|\\[,;: !])*(?:[-\u2212.]?[0-9]|\\[dt]?frac|\\sqrt|\\\$)"
)
_CHANGING_WORDS = re.compile(r"[0-9}]\s*(?:\\[,; ])?\s*\\(?:text|mathrm)\s*\{\s*(?:squared|cubed|tens|dozens|[kKM])\b")
_SIDES = re.compile(r"=|\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])")
_NOT_COMPARED = re.compile(r"[_,%<>]|\\(?:text|mathrm|le|ge|pm|circ|pmod|bmod)")
_FRACTION = re.compile(r"(-?)(?:\\[dtc]?frac\{([0-9]{1,20})\}\{([0-9]{1,20})\}|([0-9]{1,20})/([0-9]{1,20}))")
_TOWER = re.compile(r"[0-9)}]\s*\^\s*\{?\s*([0-9]+)\s*(?:\^\s*\{?\s*([0-9]+))?")


@dataclass(frozen=True, slots=True)
class _Value:
    """What an answer means.

    Attributes:
        text: the answer as written.
        latex: the same as `math_notation.as_latex` writes it.
        number: its value, if it is written as a plain number.
        percent: the number before the sign, if it is a plain number in percent.
        words: the same as text, if it is a date, a time or words with a number.
        parsed: the expression, as a list of one; empty if it cannot be read, or is a plain number not parsed yet.
    """

    text: str
    latex: str
    number: Fraction | None
    percent: Fraction | None
    words: Words | None
    parsed: list[Any]


class MathVerifier:
    r"""Correct if the final answer is mathematically equal to the reference.

    Strict, for rewards: the completion must state one final answer, by `\boxed{...}`, `#### ...` or `answer is ...`
    (see `math_answer.final_answer`). Lenient, for evaluation: where none is stated, also what math-verify finds in the
    text; where it is stated in a sentence that cannot be read, what it finds in that sentence; and a box counts
    whatever follows it.

    The reference may be the bare answer, or a whole solution that ends in one of these ways. Equality is
    math-verify's: six decimals, `18%` equals 18 and 0.18, `x=5` equals 5, `(1,2)` is an interval and a pair. Beyond
    that, numbers below 0.01 must agree within 0.2%, two numbers side by side are not a product, and an expression is
    read as a whole or not at all. Plain numbers are compared as fractions, without math-verify. Its time limits, which
    need signals and so the main thread, are off; the pool stops what takes too long.

    Raises:
        StackError: math-verify is not installed.
    """

    name = "math"
    outcome = True

    def __init__(self, config: MathVerifierConfig) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise StackError("math_verify is not installed", hint="pip install 'math-verify[antlr4_13_2]'")
        self.profile = config.profile

    def prepare(self) -> None:
        """Import sympy and build the grammar, which takes seconds, before a clock runs."""
        _parse("x+1")

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        gold = _reference(problem.reference or "")
        if gold is None:
            return Verdict(Status.BAD_REFERENCE, None, f"cannot be parsed: {str(problem.reference)[-60:]!r}")
        stated = final_answer(completion)
        if stated is not None and stated.answer and self.profile == "lenient":
            stated = replace(stated, problem="")
        verdict = Verdict(Status.NO_ANSWER, 0.0) if stated is None else _judge(gold, stated)
        if self.profile == "strict" or (
            stated is not None and (stated.marked or verdict.status is not Status.UNPARSEABLE)
        ):
            return verdict
        text = completion[-TAIL:] if stated is None else stated.answer
        found = _search(text) if stated is None or _readable(text) else []
        if not found:
            return verdict
        correct = _same(_parsed(gold), found)
        text = str(found[-1])
        return Verdict(Status.CORRECT if correct else Status.WRONG, float(correct), text[:100], text)


def _judge(gold: _Value, stated: Stated) -> Verdict:
    if stated.problem:
        status = Status.WRONG if stated.answer else Status.UNPARSEABLE
        return Verdict(status, 0.0, stated.problem)
    if len(stated.answer) > MAX_ANSWER:
        return Verdict(Status.UNPARSEABLE, 0.0, f"an answer of {len(stated.answer)} characters")
    answer = _read(stated.answer)
    if answer is None and gold.number is not None:
        amount = without_symbol(as_latex(stated.answer))
        answer = None if amount is None else _read(amount)
    if answer is None:
        return Verdict(Status.UNPARSEABLE, 0.0, stated.answer[:100])
    correct = _equal(gold, answer)
    return Verdict(Status.CORRECT if correct else Status.WRONG, float(correct), stated.answer[:100], _spelling(answer))


def _spelling(value: _Value) -> str:
    """One text for answers that are easily seen to be equal: `0.50`, `.5` and `1/2`; `$x + 1$` and `x+1`."""
    if value.number is not None:
        return str(value.number)
    text = "".join(value.latex.replace(r"\left", "").replace(r"\right", "").split())
    fraction = _FRACTION.fullmatch(text)
    if fraction is not None and int(fraction[3] or fraction[5]):
        return str(Fraction(int(fraction[1] + (fraction[2] or fraction[4])), int(fraction[3] or fraction[5])))
    return text


@lru_cache(maxsize=4096)
def _reference(reference: str) -> _Value | None:
    stated = final_answer(reference) or Stated(reference.strip())
    return _read(stated.answer) if len(stated.answer) <= MAX_ANSWER else None


def _read(answer: str) -> _Value | None:
    number = plain_number(answer)
    latex = answer if number is not None else as_union(as_latex(answer))
    number = plain_number(latex) if number is None else number
    if number is not None:
        return _Value(answer, latex, number, None, None, [])
    share = percent(latex)
    if share is not None:
        return _Value(answer, latex, None, share, None, [])
    parsed, text = _parse(latex), words(answer)
    # Options keep their letter even where what follows it cannot be read.
    return _Value(answer, latex, None, None, text, parsed) if parsed or text or option_with_text(answer) else None


def _parsed(value: _Value) -> list[Any]:
    return value.parsed or _parse(value.latex)


def _equal(gold: _Value, answer: _Value) -> bool:
    if gold.number is not None and answer.number is not None:
        return same_number(gold.number, answer.number)
    if gold.percent is not None and answer.percent is not None:
        return same_number(gold.percent, answer.percent)
    for one, other in ((gold, answer), (answer, gold)):
        if one.percent is not None and other.number is not None:
            return same_number(one.percent, other.number) or same_number(one.percent / 100, other.number)
    letter = option_letter(gold.text)
    if letter is not None and option_with_text(answer.text) is not None:
        return option_with_text(answer.text) == letter
    if gold.words is not None or answer.words is not None:
        return gold.words is not None and answer.words is not None and gold.words.answered_by(answer.words)
    if {written_as(gold.latex), written_as(answer.latex)} == {"set", "tuple"}:
        return False
    vectors = as_vector(gold.latex), as_vector(answer.latex)
    if (vectors[0] is None) != (vectors[1] is None):
        return _same(_parse(vectors[0] or gold.latex), _parse(vectors[1] or answer.latex))
    sides = _sides(answer.latex)
    if not _agree(sides):
        return False
    if _same(_parsed(gold), _parsed(answer)):
        return True
    if gold.number is None:
        return False
    # A unit in symbols is a product of variables where the reference is no number.
    amount = without_symbol(sides[-1])
    if amount is not None and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", amount)):
        return _same(_parsed(gold), _parse(as_latex(amount)))
    return r"\approx" in answer.latex and any(_same(_parsed(gold), _parse(side)) for side in sides)


def _sides(latex: str) -> list[str]:
    """An answer at its signs of equality, exact or not, that stand outside of brackets."""
    ends, depth = [0], 0
    for found in re.finditer(r"[({\[]|[)}\]]|" + _SIDES.pattern, latex):
        if _SIDES.fullmatch(found[0]):
            ends += [found.start(), found.end()] if depth == 0 else []
        else:
            depth += 1 if found[0] in "({[" else -1
    ends.append(len(latex))
    return [latex[start:end].strip() for start, end in zip(ends[::2], ends[1::2], strict=True)]


def _agree(sides: list[str]) -> bool:
    """Whether those sides of an equation that are numbers are the same, within rounding: `5 = 6` states nothing."""
    if len(sides) < 2:
        return True
    values = [_number(_parse(side)[0]) for side in sides if not _NOT_COMPARED.search(side) and _parse(side)]
    known = [value for value in values if value is not None]
    return all(abs(value - known[-1]) <= _ROUNDING * max(abs(value), abs(known[-1])) for value in known)


def same_number(gold: Fraction, answer: Fraction) -> bool:
    """Whether two plain numbers count as equal: by six decimals; below 0.01 within 0.2%; whole numbers exactly."""
    if gold.denominator == answer.denominator == 1:
        return gold == answer
    if min(abs(gold), abs(answer)) < _SMALL and abs(gold - answer) > _APART * max(abs(gold), abs(answer)):
        return False
    return round(gold, 6) == round(answer, 6)


@lru_cache(maxsize=1024)
def _parse(latex: str) -> list[Any]:
    """The expression as a list of one, or an empty list if it cannot be read as a whole."""
    if not latex or r"\boxed" in latex or not _readable(latex):
        return []
    normalize, config, parse = _grammar()
    try:
        return [parse(normalize(latex, config=config))]
    # The grammar raises plain exceptions of every kind on text that is not mathematics.
    except Exception:
        return []


@cache
def _grammar() -> tuple[Any, Any, Any]:
    from latex2sympy2_extended.math_normalization import normalize_latex
    from math_verify.parser import LatexExtractionConfig, parse_latex_cached

    return normalize_latex, replace(LatexExtractionConfig().normalization_config, boxed="none"), parse_latex_cached


def _search(text: str) -> list[Any]:
    return _math_verify().parse(text, parsing_timeout=None)


def _same(gold: list[Any], answer: list[Any]) -> bool:
    if not _math_verify().verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    return not (gold and answer) or not _far_apart(gold[0], answer[0])


def _far_apart(gold: Any, answer: Any) -> bool:
    """Whether both are small numbers that differ, which rounding to six decimals does not see."""
    values = [_number(gold), _number(answer)]
    if None in values:
        return False
    largest = max(map(abs, values))
    return 0 < largest < _SMALL and abs(values[0] - values[1]) > _APART * largest


def _number(expression: Any) -> float | None:
    """The value of a real number; None for other expressions."""
    if not getattr(expression, "is_number", False) or not getattr(expression, "is_real", False):
        return None
    value = expression.evalf(15)
    return float(value) if value.is_Float or value.is_Rational else None


def _readable(latex: str) -> bool:
    """Whether all of it can be read at all: balanced, not too deep, no number beside another, no vast power."""
    braces = brackets = 0
    for character in latex.replace(r"\{", "(").replace(r"\}", ")"):
        braces += (character == "{") - (character == "}")
        brackets += (character in "([") - (character in ")]")
        if braces < 0 or braces + brackets > MAX_DEPTH:
            return False
    # math-verify drops words at the end, also those that change the value.
    if braces or any(bad.search(latex) for bad in (_TWO_NUMBERS, _TELLING_WORDS, _AMOUNTS, _CHANGING_WORDS)):
        return False
    for exponent, above in _TOWER.findall(latex):
        if len(exponent) > 5 or len(above) > 2 or int(exponent) ** int(above or 1) > MAX_EXPONENT:
            return False
    return True


def _math_verify() -> Any:
    import math_verify

    # It warns once per process that its time limits are off, which they are meant to be.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
