"""Whether two expressions are equal, decided by digits that are known to be right instead of rounded ones."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any

from posttrain.verifiers.math_integrals import has_integral, worked_out
from posttrain.verifiers.math_integrals import value as value_of_integrals

SMALL, APART = Fraction(1, 100), Fraction(1, 500)
DIGITS = (60, 1_000)
"""Digits to which a difference is worked out before it is taken for zero: first few, since most answers differ."""

SURE = 10
"""Bits of a value from which on its sign is known."""

_POINTS = ((17, 7), (-13, 11), (5, 13), (-7, 3), (29, 5))
# Not farther: sympy takes digits for sure that are not where numbers of 60 digits cancel.
_FAR = ((10**12, 1), (-(10**12), 1))
_WHOLE = ((9, 4), (30, -3), (14, 5), (37, -6))
"""First value and step of whole numbers, in both orders, since `binom(n,k)` is 0 where n is less than k."""

MAX_FACTORIAL = 2_000
"""Factorials and binomial coefficients of larger numbers are not worked out."""


def same_number(gold: Fraction, answer: Fraction) -> bool:
    """Whether two plain numbers count as equal: by six decimals; below 0.01 within 0.2%; whole numbers exactly."""
    if gold.denominator == answer.denominator == 1:
        return gold == answer
    if min(abs(gold), abs(answer)) < SMALL and abs(gold - answer) > APART * max(abs(gold), abs(answer)):
        return False
    return round(gold, 6) == round(answer, 6)


def decided(gold: Any, answer: Any) -> bool | None:
    """Whether two expressions are the same; None where that takes more than arithmetic (sets, relations, integrals).

    Numbers: their difference is worked out by interval arithmetic until its sign is sure, so that neither cancellation
    nor underflow deceives; a difference that is zero to a thousand digits is zero. Where one is written as a decimal,
    `same_number` says how near is near enough. Expressions with variables: the same at several rational points, at
    which the reference is real (whole ones where a factorial is; also far away where there are bars, steps or roots
    and nothing grows exponentially). A number
    is no maximum or minimum of unknowns. The letter i is the imaginary unit where only that makes them equal.
    """
    if not (_plain(gold) and _plain(answer)):
        return None
    if not (gold.free_symbols or answer.free_symbols):
        return _same_value(gold, answer)
    gold, answer = _unassuming(gold), _unassuming(answer)
    from sympy import Float, I, Symbol

    if gold == answer:
        return True
    if gold.is_number and _picks_of_unknowns(answer):
        return False
    if _word_like(gold, answer):
        return None
    if gold.has(Float) or answer.has(Float):
        # As they are written; what they may be rounded from, math-verify says.
        return _same_function(_written_out(gold), _written_out(answer)) or None
    found = _same_function(gold, answer)
    names = {symbol.name for symbol in gold.free_symbols | answer.free_symbols}
    if not found and "i" in names and "j" not in names:
        unit = {Symbol("i"): I}
        as_unit = decided(gold.xreplace(unit), answer.xreplace(unit))
        return as_unit if as_unit is not None else found
    return found


def _word_like(gold: Any, answer: Any) -> bool:
    """Whether one is a name and the other a name or a product of letters, which may be the same name."""
    return (gold.is_Symbol and (answer.is_Symbol or answer.is_Mul)) or (answer.is_Symbol and gold.is_Mul)


def real_value(expression: Any) -> Fraction | None:
    """A real number to thirty digits, with decimals as they are written; None for other expressions."""
    if not getattr(expression, "is_number", False):
        return None
    if has_integral(expression := worked_out(expression)):
        return value_of_integrals(expression)
    try:
        value = _evaluated(_written_out(expression), 30)
    except (TypeError, ValueError):  # a decimal of more digits than Python reads
        return None
    if value is None or value[1]:
        return None
    return _fraction(value[0])


def _same_value(gold: Any, answer: Any) -> bool | None:
    from sympy import Float

    if gold.has(Float) or answer.has(Float):
        values = real_value(gold), real_value(answer)
        return None if None in values else same_number(*values)
    return _is_zero(gold - answer)


def _same_function(gold: Any, answer: Any) -> bool | None:
    from sympy import I

    symbols = sorted(gold.free_symbols | answer.free_symbols, key=lambda symbol: symbol.name)
    # Where the reference has the imaginary unit it is meant to be complex; elsewhere it is out of its domain.
    imaginary = gold.has(I)
    roots = [] if imaginary else _roots(gold)
    compared = 0
    counts = _factorials(gold) + _factorials(answer)
    if counts and _towers(gold, answer):
        return None
    for at in _whole_points(symbols) if counts else _points(symbols, gold, answer):
        if any(_vast(part, at) for part in counts):
            continue
        if any(_negative(base.xreplace(at)) for base in roots):
            continue
        one = gold.xreplace(at)
        value = _evaluated(one, 15)
        if value is None or (value[1] and not imaginary):
            continue
        zero = _is_zero(one - answer.xreplace(at))
        if zero is False:
            return False
        compared += zero is True
    return True if compared >= 2 else None


def _points(symbols: list[Any], gold: Any, answer: Any) -> list[dict[Any, Any]]:
    from sympy import Abs, Max, Min, Piecewise, Pow, ceiling, cosh, exp, floor, sign, sinh, tanh

    kinds = Abs, Max, Min, Piecewise, ceiling, floor, sign
    bent = gold.has(*kinds) or answer.has(*kinds)
    powers = [part for part in gold.atoms(Pow) | answer.atoms(Pow) if part.free_symbols]
    bent = bent or any(part.exp.is_Rational and not part.exp.is_Integer for part in powers)
    # What grows so fast has more digits there than there is memory.
    fast = exp, cosh, sinh, tanh
    bent = bent and not (gold.has(*fast) or answer.has(*fast) or any(part.exp.free_symbols for part in powers))
    return [
        {symbol: _rational(over * (3 * place + 2), under * (place + 2)) for place, symbol in enumerate(symbols)}
        for over, under in _POINTS + (_FAR if bent else ())
    ]


def _whole_points(symbols: list[Any]) -> list[dict[Any, Any]]:
    return [
        {symbol: _rational(first + step * place, 1) for place, symbol in enumerate(symbols)} for first, step in _WHOLE
    ]


def _picks_of_unknowns(expression: Any) -> bool:
    from sympy import Max, Min

    return any(part.free_symbols for part in expression.atoms(Max, Min))


def _factorials(expression: Any) -> list[Any]:
    """Its factorials and binomial coefficients."""
    from sympy import binomial, factorial, factorial2

    return sorted(expression.atoms(factorial, factorial2, binomial), key=str)


def _roots(expression: Any) -> list[Any]:
    """What stands under even roots: two of negative numbers may have a real product, which is not meant."""
    from sympy import Pow

    powers = expression.atoms(Pow)
    return [part.base for part in powers if part.exp.is_Rational and part.exp.q % 2 == 0 and part.base.free_symbols]


def _negative(number: Any) -> bool:
    value = _evaluated(number, 5)
    return value is not None and bool(value[0] < 0)


def _vast(part: Any, at: dict[Any, Any]) -> bool:
    """Whether a factorial or binomial coefficient is one of another, or of no small number at this point."""
    if any(_factorials(inner) for inner in part.args):
        return True
    values = [_evaluated(inner.xreplace(at), 5) for inner in part.args]
    return any(value is None or value[1] or abs(value[0]) > MAX_FACTORIAL for value in values)


def _towers(gold: Any, answer: Any) -> bool:
    """Whether there are powers in the exponents of powers, which are vast at whole numbers."""
    from sympy import Pow

    return any(part.exp.has(Pow) and part.exp.free_symbols for part in gold.atoms(Pow) | answer.atoms(Pow))


def _is_zero(difference: Any) -> bool | None:
    """None if it is not a number that can be worked out."""
    for digits in DIGITS:
        value = _evaluated(difference, 5, digits)
        if value is None:
            return None
        if any(value):
            return False
    return True


def _evaluated(number: Any, digits: int, most: int = 100) -> tuple[Any, Any] | None:
    """Real and imaginary part, each 0 unless its sign is sure; None if it has no finite value."""
    try:
        parts = number.evalf(digits, maxn=most).as_real_imag()
    # Which exceptions sympy raises depends on the function; all mean that there is no value.
    except (ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError, RecursionError):
        return None
    found = []
    for part in parts:
        if not part.is_Number or not part.is_finite:
            return None
        # What cancellation has eaten up comes back with the few bits that are left, however many were asked for.
        found.append(0 if part.is_zero or (part.is_Float and part._prec < SURE) else part)
    return found[0], found[1]


def _plain(expression: Any) -> bool:
    """Whether it is built from arithmetic and elementary functions alone."""
    from sympy import Expr

    return isinstance(expression, Expr) and not expression.has(*_beyond()) and not expression.is_Matrix


@lru_cache(maxsize=1)
def _beyond() -> tuple[Any, ...]:
    from sympy import Derivative, Integral, Limit, Product, Sum, Tuple, UnevaluatedExpr, nan, oo, zoo
    from sympy.core.function import AppliedUndef

    return Integral, Derivative, Sum, Product, Limit, Tuple, UnevaluatedExpr, AppliedUndef, oo, -oo, zoo, nan


def _unassuming(expression: Any) -> Any:
    """The grammar says of the same letter here that it is real, there that it is not."""
    from sympy import Symbol

    return expression.xreplace({symbol: Symbol(symbol.name) for symbol in expression.free_symbols})


def _written_out(expression: Any) -> Any:
    from sympy import Float, Rational

    return expression.xreplace({number: Rational(str(number)) for number in expression.atoms(Float)})


def _rational(over: int, under: int) -> Any:
    from sympy import Rational

    return Rational(over, under)


def _fraction(number: Any) -> Fraction:
    from sympy import Rational

    exact = number if number == 0 or number.is_Rational else Rational(number)
    return Fraction(int(exact.p), int(exact.q)) if exact != 0 else Fraction(0)
