"""Random expressions, each with an equal one written otherwise and with one that differs."""

from __future__ import annotations

import random
from dataclasses import dataclass

import sympy
from sympy import Rational, cos, exp, latex, log, pi, sin, sqrt

X, Y = sympy.symbols("x y")
POINTS = ({X: 0.731, Y: 1.377}, {X: 2.293, Y: 0.519}, {X: 1.113, Y: 3.071})


@dataclass(frozen=True)
class Triple:
    """LaTeX of an expression, of the same written otherwise, and of one that differs."""

    expression: str
    equal: str
    perturbed: str


def triples(count: int, seed: int = 0) -> list[Triple]:
    """Made from the seed alone. Every perturbed expression differs by more than a millionth at one of three points."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        expression = _expression(rng, rng.choice((1, 2, 2, 3)), rng.choice(((), (X,), (X, Y))))
        if expression.has(sympy.zoo, sympy.nan, sympy.oo, sympy.I) or len(latex(expression)) > 150:
            continue
        equal, perturbed = _rewritten(rng, expression), _perturbed(rng, expression)
        values = [_values(each) for each in (expression, equal, perturbed)]
        if None in values or not _near(values[0], values[1]) or _near(values[0], values[2]):
            continue
        found.append(Triple(*(latex(each) for each in (expression, equal, perturbed))))
    return found


def _expression(rng: random.Random, depth: int, symbols: tuple) -> sympy.Expr:
    if depth == 0:
        leaves = [
            sympy.Integer(rng.randint(1, 12)),
            Rational(rng.randint(1, 9), rng.randint(2, 9)),
            pi,
            sqrt(rng.randint(2, 7)),
        ]
        return rng.choice([*leaves, *symbols, *symbols, *symbols])
    one, other = (_expression(rng, depth - 1, symbols) for _ in range(2))
    kinds = [
        lambda: one + other,
        lambda: one - other,
        lambda: one * other,
        lambda: one / other,
        lambda: one ** rng.randint(2, 3),
        lambda: sqrt(one**2 + other**2),
        lambda: rng.choice((sin, cos))(one),
        lambda: exp(one / 4),
        lambda: log(one**2 + 1),
    ]
    return rng.choices(kinds, (4, 4, 4, 3, 2, 1, 1, 1, 1))[0]()


def _rewritten(rng: random.Random, expression: sympy.Expr) -> sympy.Expr:
    number = rng.randint(2, 9)
    angle = rng.choice([X, Y, sympy.Integer(1)])
    ways = [
        lambda: sympy.expand(expression),
        lambda: sympy.factor(expression),
        lambda: sympy.together(expression),
        lambda: sympy.Add(expression + number, -number, evaluate=False),
        lambda: sympy.Mul(Rational(1, number), sympy.expand(number * expression), evaluate=False),
        lambda: sympy.expand(expression + X) - X,
        lambda: sympy.Mul(expression, sin(angle) ** 2 + cos(angle) ** 2, evaluate=False),
        lambda: sympy.expand(expression, trig=True, log=False),
    ]
    return rng.choice(ways)()


def _perturbed(rng: random.Random, expression: sympy.Expr) -> sympy.Expr:
    ways = [
        lambda: expression + rng.choice((1, -1, Rational(1, 7), Rational(1, 1000))),
        lambda: -expression,
        lambda: 2 * expression,
        lambda: expression * (1 + Rational(1, 100)),
        lambda: expression + X / 50,
        lambda: expression.xreplace({pi: sympy.Integer(3), X: X + 1, sympy.Integer(2): sympy.Integer(3)}),
        lambda: 1 / expression,
    ]
    return rng.choice(ways)()


def _values(expression: sympy.Expr) -> list[float] | None:
    found = [expression.evalf(20, subs=point) for point in POINTS]
    good = all(value.is_Float or value.is_Integer or value.is_Rational for value in found)
    return [float(value) for value in found] if good and all(abs(value) < 1e6 for value in found) else None


def _near(one: list[float], other: list[float]) -> bool:
    return all(abs(a - b) <= 1e-6 * (1 + abs(a)) for a, b in zip(one, other, strict=True))
