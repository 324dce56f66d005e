"""LaTeX as an expression, by math-verify's grammar: read as a whole or not at all, and with bounded work."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

from posttrain.verifiers.math_dimensions import UNIT_NAMES
from posttrain.verifiers.math_units import is_symbol
from posttrain.verifiers.math_unknowns import as_unknowns

MAX_DEPTH = 20
"""Brackets within brackets, once doubled ones are closed up; the grammar takes a second for that many."""

MAX_GROUPS = 120
"""Brackets, bars, primes and roots in one answer; the work of the grammar grows faster than their number."""

MAX_FUNCTIONS = 16
"""Functions in one answer: each may take all that follows as its argument."""

MAX_EXPONENT = 10_000
"""Powers of numbers above it are not evaluated, nor factorials and binomial coefficients of larger numbers."""

_TWO_NUMBERS = re.compile(r"(?<![_^0-9.,])(?<![a-z] )[0-9]+(?:[.,][0-9]+)*(?:\s|\\[,;: !]|\\q?quad|~)+[0-9]")
_TELLING_WORDS = re.compile(
    r"[0-9}]\s*(?:\\[,; ])?\s*\\(?:text|mathrm)\s*\{[^{}]*"
    r"\b(?:and|or|half|halves|thirds|quarters|dozen|hundred|thousand|million|billion)\b[^{}]*\}\s*$"
)
_AMOUNTS = re.compile(
    r"[0-9}]\s*(?:\\[,; ])?\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*(?:and|or|,)*\s*\})[^{}]*\}"
    r"(?:[\s,]|\\[,;: !])*(?:[-\u2212.]?[0-9]|\\[dt]?frac|\\sqrt|\\\$)"
)
_SAYS_MORE = re.compile(
    r"[0-9}]\s*(?:\\[,; ])?\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\b(?:is|are|was|were|isn't|not|if|when|unless|except"
    r"|otherwise|else|mod|modulo|plus|minus|than|maybe|perhaps|possibly|probably|wrong|incorrect|options?|either|neither"
    r"|something|unknown|instead)\b"
)
_INDEXED = re.compile(r"[0-9]\s*\)?\s*_")
_CHANGING_WORDS = re.compile(r"[0-9}]\s*(?:\\[,; ])?\s*\\(?:text|mathrm)\s*\{\s*(?:squared|cubed|tens|dozens|[kKM])\b")
_MARKED = re.compile(r"(?<![A-Za-z])[0-9]+\}?\s*(?:'|\u2032|\^\s*\{?\s*(?:\\prime|'))")
_CUT_OFF = re.compile(r"[-+\u2212]?[0-9]+\s*(?:\\[lc]?dots[cbi]?|\.\.\.|\u2026)")
_TOWER = re.compile(r"[0-9)}]\s*\^\s*\{?\s*([0-9]+)\s*(?:\^\s*\{?\s*([0-9]+))?")
_CHOSEN = re.compile(r"\\[dt]?binom\s*\{\s*([0-9]+)\s*\}|([0-9]+)\s*\\choose")
_FACTORIALS = re.compile(r"!(?:\s*\)*\s*!){2,}")
_LETTERS_AT_END = re.compile(r"(?<![\\A-Za-z])([A-Za-z]+)\s*$")
_GAP = re.compile(r"(?:\s|\\[,;: ]|\\q?quad(?![A-Za-z])|~)+$")
_AMOUNT = re.compile(
    r"(?:[0-9.,!%+\-\u2212*/^(){}\s]|\\(?:[dtc]?frac|sqrt|cdot|times|left|right|pi)(?![A-Za-z])|\\[,;:! %$])+"
)
_PRIMES = re.compile(r"(?<=[A-Za-z)}])'+")
_SAYS_SOMETHING = re.compile(r"[0-9A-Za-z\\]")
_DOUBLED = re.compile(r"\(\(([^()]*)\)\)|\{\{([^{}]*)\}\}|\\left\(\\left\(([^()]*)\\right\)\\right\)")
_FUNCTIONS = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp)h?(?![A-Za-z])")
_POWERS = re.compile(r"(?:\^\s*[^\s{}^]\s*){4}")
_GROUPS = re.compile(r"[{(\[|']|\\sqrt|\\frac")
_UNREADABLE = (
    _POWERS,
    _SAYS_MORE,
    _INDEXED,
    _TWO_NUMBERS,
    _TELLING_WORDS,
    _AMOUNTS,
    _CHANGING_WORDS,
    _MARKED,
    _FACTORIALS,
)


@lru_cache(maxsize=1024)
def parse(latex: str) -> list[Any]:
    """The expression as a list of one, or an empty list if it cannot be read as a whole, or not without vast work."""
    latex = _closed_up(latex)
    if not _SAYS_SOMETHING.search(latex) or r"\boxed" in latex or not readable(latex):
        return []
    grammar = _grammar()
    try:
        found = grammar(_normalized(as_unknowns(latex)))
    # The grammar raises plain exceptions of every kind on text that is not mathematics.
    except Exception:
        return []
    return [] if "!" in latex and _vast(found) else [_with_unknown_derivatives(found) if "d" in latex else found]


def readable(latex: str) -> bool:
    """Whether all of it can be read at all: balanced, not too deep, no number beside another, no vast power."""
    braces = brackets = 0
    for character in latex.replace(r"\{", "(").replace(r"\}", ")"):
        braces += (character == "{") - (character == "}")
        brackets += (character in "([") - (character in ")]")
        if braces < 0 or braces + brackets > MAX_DEPTH:
            return False
    if (
        braces
        or len(_GROUPS.findall(latex)) > MAX_GROUPS
        or latex.count("|") > 8
        or len(_FUNCTIONS.findall(latex)) > MAX_FUNCTIONS
    ):
        return False
    # math-verify drops words, marks and dots at the end, also those that change the value.
    if _CUT_OFF.fullmatch(latex) or any(bad.search(latex) for bad in _UNREADABLE):
        return False
    for exponent, above in _TOWER.findall(latex):
        if len(exponent) > 5 or len(above) > 2 or int(exponent) ** int(above or 1) > MAX_EXPONENT:
            return False
    return all(len(a or b) < 6 and int(a or b) <= MAX_EXPONENT for a, b in _CHOSEN.findall(latex))


def search(text: str) -> list[Any]:
    """What math-verify finds in a text."""
    return math_verify().parse(text, parsing_timeout=None)


def math_verify() -> Any:
    """The package, without its warning that its time limits are off, which they are meant to be."""
    import logging

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


@cache
def _grammar() -> Any:
    """math-verify's reading of LaTeX, with letters in the case in which they are written: it takes `R-r` for 0."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify.grader import should_treat_as_complex
    from math_verify.parser import get_last_eq

    def read(latex: str) -> Any:
        return latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )

    def read_all_or_the_last_equation(latex: str) -> Any:
        try:
            return read(latex)
        # It raises plain exceptions of every kind.
        except Exception:
            last = get_last_eq(latex)
            if last == latex:
                raise
            return read(last)

    return read_all_or_the_last_equation


@cache
def _normalizers() -> tuple[Any, Any, Any, Any]:
    from latex2sympy2_extended import math_normalization as package
    from math_verify.parser import LatexExtractionConfig

    config = replace(LatexExtractionConfig().normalization_config, boxed="none", units=False)
    spelling = partial(package.normalize_latex, config=replace(config, nits=False, malformed_operators=False))
    mending = partial(package.normalize_latex, config=replace(config, basic_latex=False))
    return spelling, mending, package.unit_superscript_regex, package.units_regex


def _normalized(latex: str) -> str:
    """As math-verify normalises it, but for units: it drops any letter at the end that may be one, `\\sin 2t`."""
    spelling, mending, in_words, _ = _normalizers()
    text = spelling(_PRIMES.sub(_prime, _without_bare_unit(_without_bare_unit(latex))))
    return mending(in_words.sub("", text).strip() or text)


def _without_bare_unit(latex: str) -> str:
    """A number without the unit behind it, in letters and no font: `5 m`, `\\frac{3}{4} kg`; all else as it is.

    A single letter right behind a number, `5m`, is a variable here.
    """
    found = _LETTERS_AT_END.search(latex)
    if found is None or _normalizers()[3].fullmatch(f"1{found[1]}") is None:
        return latex
    before = latex[: found.start()]
    rest = _GAP.sub("", before)
    word, apart = found[1], rest != before
    known = is_symbol(word) or word in UNIT_NAMES
    if not (known and (apart or len(word) > 1)) and len(word) < 3:
        return latex
    amount = re.split(r"=|\\approx(?![A-Za-z])", rest)[-1].strip()
    if not _AMOUNT.fullmatch(amount) or not re.search(r"[0-9]", amount) or re.search(r".[-+]", _without_groups(amount)):
        return latex
    return rest


def _without_groups(latex: str) -> str:
    while (shorter := re.sub(r"[{(][^{}()]*[})]", "", latex)) != latex:
        latex = shorter
    return latex


def _prime(found: re.Match[str]) -> str:
    return "^{" + r"\prime" * len(found[0]) + "}"


def _closed_up(latex: str) -> str:
    """Without brackets around what brackets hold already: the grammar's work doubles with each pair of braces."""
    while len(latex) < 1_000:
        shorter = _DOUBLED.sub(_single, latex)
        if shorter == latex:
            return latex
        latex = shorter
    return latex


def _single(found: re.Match[str]) -> str:
    if found[1] is not None:
        return f"({found[1]})"
    return rf"\left({found[3]}\right)" if found[2] is None else f"{{{found[2]}}}"


def _with_unknown_derivatives(expression: Any) -> Any:
    """With an unknown for each derivative of unknowns that do not show the variable: sympy takes them for constants."""
    from sympy import Basic, Derivative, Symbol

    derivatives = expression.atoms(Derivative) if isinstance(expression, Basic) else ()
    unknown = {each: Symbol(str(each)) for each in derivatives if each.expr.free_symbols.isdisjoint(each.variables)}
    return expression.xreplace({each: name for each, name in unknown.items() if each.expr.free_symbols})


def _vast(expression: Any) -> bool:
    """Whether a factorial in it is of no small number."""
    from sympy import Basic, factorial, factorial2, preorder_traversal

    if not isinstance(expression, Basic):
        return False
    for part in preorder_traversal(expression):
        if isinstance(part, factorial | factorial2):
            inner = part.args[0]
            if inner.is_number and (inner.has(factorial, factorial2) or not inner.evalf(5) <= MAX_EXPONENT):
                return True
    return False
