"""Integrals: of polynomials exactly, all else by quadrature, since the search for an antiderivative may never end."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

MAX_DEGREE = 7
"""Of the quadrature: some 800 values of the integrand."""

MAX_INTEGRALS = 4
"""In one expression."""

_NEAR = 1e-9
_POINTS = ((17, 7), (5, 13), (29, 5))


def has_integral(expression: Any) -> bool:
    """Whether there is an integral in it."""
    from sympy import Basic, Integral

    return isinstance(expression, Basic) and expression.has(Integral)


def worked_out(expression: Any) -> Any:
    """The same with the integrals of polynomials done."""
    from sympy import Basic, Integral

    if not isinstance(expression, Basic) or not expression.has(Integral):
        return expression
    easy = {each: each.doit() for each in expression.atoms(Integral) if _is_polynomial(each)}
    return expression.xreplace(easy)


def same_integrals(gold: Any, answer: Any) -> bool:
    """Whether two expressions with integrals are written alike, or equal to nine digits wherever they are evaluated.

    Two equations are compared side by side; of one, the right side is compared with the other expression.
    """
    from sympy import Eq, Expr, Symbol

    if gold == answer:
        return True
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        return all(same_integrals(ours, theirs) for ours, theirs in zip(gold.args, answer.args, strict=True))
    gold, answer = (each.rhs if isinstance(each, Eq) else each for each in (gold, answer))
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return False
    gold, answer = (each.xreplace({old: Symbol(old.name) for old in each.free_symbols}) for each in (gold, answer))
    if gold.as_dummy() == answer.as_dummy():
        return True
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=lambda symbol: symbol.name)
    for over, under in _POINTS if symbols else _POINTS[:1]:
        at = {symbol: _rational(over + 3 * place, under) for place, symbol in enumerate(symbols)}
        ours, theirs = value(gold, at), value(answer, at)
        if ours is None or theirs is None or abs(ours - theirs) > _NEAR * float(1 + abs(ours)):
            return False
    return True


def value(expression: Any, at: dict[Any, Any] | None = None) -> Fraction | None:
    """A number with integrals in it, to some ten digits; None if an integral is not one over one known range."""
    from sympy import Float, Integral

    integrals = expression.atoms(Integral)
    if len(integrals) > MAX_INTEGRALS:
        return None
    done: dict[Any, Any] = {}
    for each in integrals:
        found = _quadrature(each.subs(at or {}))
        if found is None:
            return None
        done[each] = Float(str(found), 20)
    try:
        number = expression.xreplace(done).subs(at or {}).evalf(18, maxn=100)
    # As in `math_exact`: all of these mean that there is no value.
    except (ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError, RecursionError):
        return None
    return Fraction(str(number)) if number.is_Float or number.is_Rational else None


def _is_polynomial(integral: Any) -> bool:
    return integral.function.is_polynomial(*integral.variables) and len(integral.limits) <= 3


def _quadrature(integral: Any) -> Any:
    import mpmath
    from sympy import lambdify
    from sympy.core.function import AppliedUndef

    if len(integral.limits) != 1 or len(integral.limits[0]) != 3:
        return None
    variable, low, high = integral.limits[0]
    if (integral.function.free_symbols - {variable}) or low.free_symbols or high.free_symbols:
        return None
    # `lambdify` writes source code: no name that a completion chose may stand in it.
    if integral.function.has(AppliedUndef):
        return None
    try:
        with mpmath.workdps(20):
            ends = [mpmath.mpf(str(end.evalf(20)).replace("oo", "inf")) for end in (low, high)]
            integrand = lambdify(variable, integral.function, "mpmath", dummify=True)
            found, error = mpmath.quad(integrand, ends, error=True, maxdegree=MAX_DEGREE)
            sure = mpmath.isfinite(found) and error <= _NEAR * (1 + abs(found))
    # What the integrand raises depends on its functions, a name error where mpmath lacks one; all mean that there is no
    # value.
    except (ArithmeticError, ValueError, TypeError, AttributeError, NotImplementedError, RecursionError, NameError):
        return None
    return found if sure and not isinstance(found, mpmath.mpc) else None


def _rational(over: int, under: int) -> Any:
    from sympy import Rational

    return Rational(over, under)
