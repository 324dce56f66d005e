"""What an answer means, and whether two answers mean the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from posttrain.verifiers.math_dimensions import unit_of
from posttrain.verifiers.math_exact import APART, SMALL, decided, real_value, same_number
from posttrain.verifiers.math_integrals import has_integral, same_integrals, worked_out
from posttrain.verifiers.math_notation import as_latex, option_letter, option_letters, option_with_text, without_option
from posttrain.verifiers.math_parse import math_verify, parse
from posttrain.verifiers.math_sets import UNLIKE, as_matrix, as_union, as_vector, left_unsolved, written_as
from posttrain.verifiers.math_shapes import Shape, shape_of
from posttrain.verifiers.math_sides import agree, between_unknowns, named_value, sides, solved_for_the_right, unsolved
from posttrain.verifiers.math_units import percent, plain_number, scientific, without_symbol
from posttrain.verifiers.math_words import Words, on_the_hour, words

_FRACTION = re.compile(r"(-?)(?:\\[dtc]?frac\{([0-9]{1,20})\}\{([0-9]{1,20})\}|([0-9]{1,20})/([0-9]{1,20}))")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?\s*$")
_EACH_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_MAX_NESTING = 4


@dataclass(frozen=True, slots=True)
class Value:
    """What an answer means.

    Attributes:
        text: the answer as written.
        latex: the same as `math_notation.as_latex` writes it.
        number: its value, if it is written as a plain number.
        percent: the number before the sign, if it is a plain number in percent.
        words: the same as text, if it is a date, a time or words with a number.
        parsed: the expression, as a list of one; empty if it cannot be read, or is a plain number not parsed yet.
        shape: its parts, if no single expression holds them (`math_shapes`).
    """

    text: str
    latex: str
    number: Fraction | None = None
    percent: Fraction | None = None
    words: Words | None = None
    parsed: tuple[Any, ...] = ()
    shape: Shape | None = None

    @property
    def expression(self) -> list[Any]:
        """The expression as a list of one, parsed now if it was not needed before."""
        return list(self.parsed) or parse(self.latex)

    @property
    def plain(self) -> bool:
        """Whether it is written as a plain number and nothing else."""
        return self.number is not None and self.text == self.latex

    @property
    def is_number(self) -> bool:
        """Whether it is one number, however written."""
        if self.number is not None or self.percent is not None:
            return True
        return self.words is None and self.shape is None and real_value(next(iter(self.expression), None)) is not None


def read(answer: str) -> Value | None:
    """An answer as a value; None if it cannot be read."""
    number = plain_number(answer)
    if number is not None:
        return Value(answer, answer, number)
    latex = as_union(as_matrix(as_latex(answer)))
    number = plain_number(latex)
    if number is None:
        found = scientific(latex)
        number, latex = found or (None, latex)
    if number is not None:
        return Value(answer, latex, number)
    share = percent(latex)
    if share is not None:
        return Value(answer, re.sub(r"(?:\\text\s*\{\s*)?per\s?cent\s*\}?$", r"\\%", latex), percent=share)
    parsed, text = tuple(parse(latex)), words(answer)
    shape = None if text else shape_of(latex)
    if not (parsed or text or shape):
        # The grammar does not know every name, `P(A|B)` and `[ABC]`.
        parsed = tuple(parse(named_value(latex) or ""))
    # Options keep their letter even where what follows it cannot be read.
    if parsed or text or shape or as_vector(latex) or option_with_text(answer):
        return Value(answer, latex, words=text, parsed=parsed, shape=shape)
    return None


def equal(gold: Value, answer: Value, prompt: str = "") -> bool:
    """Whether an answer means what the reference does.

    Args:
        gold: the reference.
        answer: what is judged.
        prompt: of the problem, as text: an equation that stands there is no answer.
    """
    return _equal(gold, answer, prompt, 0)


def spelling(value: Value) -> str:
    """One text for answers that are easily seen to be equal: `0.50`, `.5` and `1/2`; `$x + 1$` and `x+1`."""
    if value.number is not None:
        return str(value.number)
    text = _spaceless(value.latex)
    fraction = _FRACTION.fullmatch(text)
    if fraction is not None and int(fraction[3] or fraction[5]):
        return str(Fraction(int(fraction[1] + (fraction[2] or fraction[4])), int(fraction[3] or fraction[5])))
    return text


def same(gold: list[Any], answer: list[Any]) -> bool:
    """Whether two expressions are equal: exactly, or where that decides nothing by math-verify.

    Letters count in either case, unless one of the two has the same letter in both: `R-r`.
    """
    if _same_as_written(gold, answer):
        return True
    folded = [_in_lower_case(expression) for expression in (*gold, *answer)]
    changed = any(one is not other for one, other in zip(folded, (*gold, *answer), strict=True))
    if not changed or any(expression is None for expression in folded):
        return False
    return _same_as_written(folded[: len(gold)], folded[len(gold) :])


def _same_as_written(gold: list[Any], answer: list[Any]) -> bool:
    if gold and answer:
        exact = decided(gold[0], answer[0])
        if exact is not None:
            return exact
        ours, theirs = worked_out(gold[0]), worked_out(answer[0])
        if has_integral(ours) or has_integral(theirs):
            return same_integrals(ours, theirs)
        if ours is not gold[0] or theirs is not answer[0]:
            return _same_as_written([ours], [theirs])
    return by_math_verify(gold, answer)


def _in_lower_case(expression: Any) -> Any:
    """The same with all letters in lower case; None if one is there in both."""
    symbols = getattr(expression, "free_symbols", None)
    if not symbols:
        return expression
    lower = {symbol: symbol.name.lower() for symbol in symbols if isinstance(symbol.name, str)}
    if len(set(lower.values())) < len(lower):
        return None
    changed = {
        symbol: symbol.func(name, **symbol.assumptions0) for symbol, name in lower.items() if name != symbol.name
    }
    return expression.xreplace(changed) if changed else expression


def by_math_verify(gold: list[Any], answer: list[Any]) -> bool:
    """Whether math-verify calls two expressions equal, and rounding to six decimals has not hidden a difference."""
    if not math_verify().verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    return not (gold and answer) or not _far_apart(gold[0], answer[0])


def _equal(gold: Value, answer: Value, prompt: str, nesting: int) -> bool:
    unit = unit_of(gold.text)
    theirs = None if unit is None else unit_of(answer.text)
    if unit is not None and theirs is not None:
        # Only numbers are converted.
        amounts = _amount(gold), _amount(answer)
        if unit != theirs and (unit.measures != theirs.measures or None in amounts):
            return False
        if None not in amounts:
            return same_number(amounts[0] * unit.factor, amounts[1] * theirs.factor)
    if gold.words is not None or gold.text != gold.latex:  # no bare number
        times = gold.words or on_the_hour(gold.text), answer.words or on_the_hour(answer.text)
        if None not in times:
            return times[0].answered_by(times[1])
    if gold.number is not None and answer.number is not None:
        return same_number(gold.number, answer.number)
    if gold.percent is not None and answer.percent is not None:
        return same_number(gold.percent, answer.percent)
    for one, other in ((gold, answer), (answer, gold)):
        if one.percent is not None and unit_of(other.text) is not None:
            return False
        if one.percent is not None and other.number is not None:
            return same_number(one.percent, other.number) or same_number(one.percent / 100, other.number)
    letter = option_letter(gold.text)
    if letter is not None and option_with_text(answer.text) is not None:
        return option_with_text(answer.text) == letter
    letters = option_letters(gold.text)
    if letters is not None and option_letters(answer.text) is not None:
        return option_letters(answer.text) == letters
    value = without_option(answer.text) if gold.is_number else None
    if value is not None and nesting < _MAX_NESTING:
        read_value = read(value)
        return read_value is not None and _equal(gold, read_value, prompt, nesting + 1)
    # `6:16` is a time of day by itself, and a ratio where the reference is one.
    if gold.shape is not None and answer.words is not None and gold.shape.kind == "ratio":
        ratio = shape_of(answer.latex)
        return ratio is not None and gold.shape.same_as(ratio, lambda one, other: one == other)
    if gold.words is not None or answer.words is not None:
        return gold.words is not None and answer.words is not None and gold.words.answered_by(answer.words)
    if nesting < _MAX_NESTING and (gold.shape or answer.shape):
        found = _same_shape(gold, answer, nesting)
        if found is not None:
            return found
    if gold.number is None:
        ways = {written_as(each.latex, each.text) for each in (gold, answer)}
        if ways in UNLIKE or left_unsolved(gold.latex, answer.latex):
            return False
    return _same_expression(gold, answer, prompt)


def _amount(value: Value) -> Fraction | None:
    """The number before a unit, also before one of a single letter; None without one."""
    if value.number is not None:
        return value.number
    before = without_symbol(value.latex)
    amount = value if before is None else read(before)
    if amount is None or amount.number is not None:
        return None if amount is None else amount.number
    return real_value(next(iter(amount.expression), None))


def _same_expression(gold: Value, answer: Value, prompt: str) -> bool:
    vectors = as_vector(gold.latex), as_vector(answer.latex)
    if (vectors[0] is None) != (vectors[1] is None) or (vectors[0] and not (gold.parsed and answer.parsed)):
        return same(parse(vectors[0] or gold.latex), parse(vectors[1] or answer.latex))
    parts = sides(answer.latex)
    if len(parts) > 1 and gold.number is None and _identity(gold, parts):
        return True
    if not agree(parts) or (_is_value(gold) and unsolved(answer.latex, prompt)):
        return False
    if len(parts) == 1 and between_unknowns(gold.latex):
        return False
    if same(gold.expression, answer.expression) or _same_right_side(gold, answer, prompt):
        return True
    if _is_value(gold) and solved_for_the_right(parts):
        return same(gold.expression, parse(parts[0]))
    if gold.number is None:
        return _in_degrees(gold.latex, answer.latex)
    # A unit in symbols is a product of variables where the reference is no number.
    amount = without_symbol(parts[-1])
    if amount is not None and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", amount)):
        return same(gold.expression, parse(as_latex(amount)))
    return r"\approx" in answer.latex and any(same(gold.expression, parse(side)) for side in parts)


def _identity(gold: Value, parts: list[str]) -> bool:
    """Whether all sides of an answer are what the reference is: nothing is left to solve in `(x+1)^2 = x^2+2x+1`."""
    return len(sides(gold.latex)) == 1 and all(same(gold.expression, parse(side)) for side in parts)


def _same_right_side(gold: Value, answer: Value, prompt: str) -> bool:
    """Whether they are equal once the name before one of them, or the same name before both, is left out."""
    ours, theirs = named_value(gold.latex), named_value(answer.latex)
    if ours is None and theirs is None:
        return False
    if ours is not None and theirs is not None:
        if _spaceless(sides(gold.latex)[0]) != _spaceless(sides(answer.latex)[0]):
            return False
    elif len(sides(gold.latex if ours is None else answer.latex)) > 1 or unsolved(answer.latex, prompt):
        return False
    return same(parse(ours or gold.latex), parse(theirs or answer.latex))


def _is_value(gold: Value) -> bool:
    """Whether the reference says what something is, so that an equation to be solved is no answer."""
    parts = sides(gold.latex)
    return len(parts) == 1 or (not unsolved(gold.latex) and real_value(next(iter(parse(parts[-1])), None)) is not None)


def _same_shape(gold: Value, answer: Value, nesting: int) -> bool | None:
    def alike(one: str, other: str) -> bool:
        if _spaceless(one) == _spaceless(other):
            return True
        values = read(one), read(other)
        return None not in values and _equal(*values, "", nesting + 1)

    if gold.shape is not None and answer.shape is not None:
        found = gold.shape.same_as(answer.shape, alike)
        # The parser may know more of two chains than that they are written alike.
        return found or (None if gold.parsed and answer.parsed else False)
    shape, other = (gold.shape, answer) if gold.shape is not None else (answer.shape, gold)
    if shape.kind == "numeral":
        # Asked for a numeral one may leave out its base, but not write another number for it.
        return _spaceless(other.latex) == shape.parts[0] if gold.shape else alike(other.latex, shape.value())
    if shape.kind in ("list", "congruence"):
        return False
    quotient = shape.quotient()
    return None if quotient is None or other.shape is not None else alike(quotient, sides(other.latex)[-1])


def _in_degrees(gold: str, answer: str) -> bool:
    """Whether one is an angle in degrees and the other the same in radians, which has a pi."""
    for one, other in ((gold, answer), (answer, gold)):
        if "," in one and _EACH_DEGREES.search(one) and r"\pi" in other:
            return same(parse(other), parse(_EACH_DEGREES.sub(r"\\frac{\1\\pi}{180}", one)))
        side = sides(one)[-1]
        if _DEGREES.search(side) and r"\pi" in other:
            return same(parse(sides(other)[-1]), parse(rf"\frac{{({_DEGREES.sub('', side)})\pi}}{{180}}"))
    return False


def _far_apart(gold: Any, answer: Any) -> bool:
    """Whether both are small numbers that differ, which rounding to six decimals does not see."""
    values = real_value(gold), real_value(answer)
    if None in values:
        return False
    largest = max(map(abs, values))
    return 0 < largest < SMALL and abs(values[0] - values[1]) > APART * largest


def _spaceless(latex: str) -> str:
    return "".join(latex.replace(r"\left", "").replace(r"\right", "").split())
