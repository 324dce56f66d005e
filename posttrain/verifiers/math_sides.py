"""Equations as answers: which left sides name what was asked, so that only the right side is the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from posttrain.verifiers.math_exact import real_value
from posttrain.verifiers.math_parse import parse

MAX_PROMPT = 20_000
"""Characters of a prompt in which an answer is looked for."""

MAX_NAME = 200
"""Characters of a left side."""

_ROUNDING = Fraction(1, 100)
_SIDES = re.compile(r"(?<![<>!\\:])=|\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])")
_PIECES = re.compile(
    r",(?![0-9]{3}(?![0-9]))|;|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)
_NOT_COMPARED = re.compile(r"[_,%<>]|\\(?:text|mathrm|le|ge|pm|circ|pmod|bmod)")
LOOKS = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])|\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\\$|\$")
"""Marks of a formula that say nothing: sizes of brackets, gaps, signs of money and of mathematics."""

_IN_WORDS = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_TELLING = re.compile(r"\b(?:twice|half|double|triple|thrice|third|quarter|times|plus|minus|squared?|cubed?)\b", re.I)
_DENIES = re.compile(r"(?:not|never|wrong|incorrect|false)\b|.*\b(?:than|at\s+(?:least|most))\s*$", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?:[ '-]+[A-Za-z]+)+|(?<!\\)\b(?![A-Z]+\b)[A-Za-z]{4,}")
_NUMBERS = re.compile(
    r"(?:[0-9.,:!%+\-\u2212*/^_(){}\[\]| ]|\\(?:[dtc]?frac|sqrt|[dt]?binom|cdot|times|div|pi|circ|sin|cos|tan|cot|log"
    r"|ln|over|choose|%)(?![A-Za-z])|\\%)*"
)

_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|(?:var)?rho"
    r"|sigma|tau|upsilon|(?:var)?phi|chi|psi|omega|ell|[A-Z][a-z]+)(?![A-Za-z])"
)
_INDEX = (
    r"(?:_\s*(?:\{[^{}]*\}|\\?[A-Za-z]+|[0-9])|'"
    r"|\^\s*\{?-1\}?(?=\s*\()|\^\s*\{?\s*(?:\\prime|\*|'|\([a-z0-9]\))+\s*\}?)"
)
_LETTERS = rf"(?:(?:[A-Za-z]|{_GREEK})\s*{_INDEX}*\s*)"
_OVER = r"(?:\\(?:over|under|wide|vec|hat|bar|tilde|dot|ddot|mathbb|mathcal|boldsymbol|measuredangle)[a-z]*\s*)"
_FIGURE = (
    r"(?:(?:m\s*(?=\\(?:measured)?angle))?\\(?:angle|measuredangle|triangle|Delta|square|odot|partial|nabla|#)\s*)"
)
_CALLED = r"(?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\[\]]*\])"
_NAME = re.compile(
    rf"(?:{_FIGURE}*(?:{_OVER}(?:\{{[^{{}}]*\}}|[A-Za-z])\s*{_INDEX}*|{_LETTERS})+(?:{_CALLED}{_INDEX}*)?"
    rf"|\\?\|\s*(?:{_OVER}\{{[^{{}}]*\}}|{_FIGURE}*(?:[A-Zz]|[a-z]*_)[^|+\-=]*)\s*\\?\|"
    rf"|\\(?:\||lVert(?![A-Za-z]))[^|=]+\\(?:\||rVert)|\(\s*[A-Za-z]\s*\\circ\s*[A-Za-z]\s*\)\s*{_CALLED}"
    rf"|\\lvert\s*[A-Zz][^|]*\\rvert|\[\s*{_FIGURE}?[A-Z]{{3,}}\s*\]|\(\s*(?:[A-Za-z]\w*|{_GREEK})(?:\s*,\s*(?:[A-Za-z]\w*|{_GREEK}))+\s*\)"
    rf"|\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\(?\s*(?:{_FIGURE}?\s*[A-Z]+|{_GREEK})\s*\)?|\{{[A-Z]\}})"
    rf"|\\(?:gcd|lcm|det|dim|deg|arg|Re|Im|Pr|max|min|sup|inf|lim|sum|prod)(?![A-Za-z]).*"
    rf"|\\i{{0,2}}int(?![A-Za-z])\s*(?:\\limits\s*)?[_^].*"
    rf"|(?:gcd|lcm|max|min|det){_CALLED}|\\frac\s*\{{\s*(?:d|\\partial)[^{{}}]*\}}\s*\{{\s*(?:d|\\partial)[^{{}}]*\}}.*)\s*"
)
# A letter stands for a length or a number; two capitals name a segment.
_UNKNOWN = rf"{_OVER}?\{{?{_LETTERS}\}}?"
_OF_UNKNOWNS = re.compile(rf"[-\u2212]?\s*(?:{_UNKNOWN})+")
_CAPITALS = re.compile(r"[A-Z](?:\s*[A-Z])+")
_RATIO = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|([^:/]*)[:/]([^:/]*)(?:[:/]([^:/]*))?")
_DERIVED = re.compile(r"\\[dtc]?frac\s*\{\s*(?:d|\\partial)(?![a-z]{2}).*|d[a-z]\s*/\s*d[a-z]", re.DOTALL)
_BETWEEN_NAMES = re.compile(r"\s*(?:[+\-\u2212]|\\cdot(?![A-Za-z])|\\times(?![A-Za-z]))\s*")


def sides(latex: str) -> list[str]:
    """An answer at its signs of equality, exact or not, that stand outside of brackets."""
    return _cut(latex, _SIDES)


def agree(parts: Sequence[str]) -> bool:
    """Whether those sides of an equation that are numbers are the same, within rounding: `5 = 6` states nothing."""
    if len(parts) < 2:
        return True
    values = [real_value(parse(side)[0]) for side in parts if not _NOT_COMPARED.search(side) and parse(side)]
    known = [value for value in values if value is not None]
    return all(abs(value - known[-1]) <= _ROUNDING * max(abs(value), abs(known[-1])) for value in known)


def unsolved(latex: str, prompt: str = "") -> bool:
    """Whether an answer is an equation whose left side is more than a name for the right one: `2x=5`.

    What names it: a variable, a quantity, a function value, a ratio, sum or product of different ones, words, or an
    expression of numbers. In a chain the first side decides. `x+y=5` is not solved where the prompt holds just this.

    Args:
        latex: of the answer; several may be joined by commas.
        prompt: of the problem.
    """
    for piece in _cut(LOOKS.sub(" ", latex), _PIECES):  # the comma of a thin space parts nothing
        left, *right = sides(piece)
        if right and not _names(left):
            return True
        if len(right) == 1 and _BETWEEN_NAMES.search(left) and _bare(piece) in _bare(prompt):
            return True
    return False


def between_unknowns(latex: str) -> bool:
    """Whether an answer is an equation of which one side is none: `x+y=10`, `xy=12`, `x/y=2`, `PV=nRT`.

    A sum, a product or a quotient of letters names nothing, but for capitals that stand for a name, `AB=5` and
    `MR=SRMC`; in `PV=nRT` they do not.
    """
    for piece in _cut(LOOKS.sub(" ", latex), _PIECES):
        left, *right = sides(piece)
        if right and _combines(_plain(left), re.sub(r"\\[A-Za-z]+", "", right[-1])):
            return True
    return False


def named_value(latex: str) -> str | None:
    """The last side of one equation whose first side names it; None for all else."""
    parts = sides(latex)
    if len(parts) < 2 or len(_cut(LOOKS.sub(" ", latex), _PIECES)) > 1 or not parts[-1] or not _names(parts[0]):
        return None
    return parts[-1]


def solved_for_the_right(parts: Sequence[str]) -> bool:
    """Whether a value stands before the sign and its name behind it: `5 = x`."""
    return len(parts) == 2 and _is_number(_plain(parts[0])) and _NAME.fullmatch(_plain(parts[1])) is not None


def _names(side: str) -> bool:
    text = _plain(side)
    if len(text) > MAX_NAME or _DENIES.match(text):
        return False
    if not text or _is_number(text):
        return True
    if _WORD.search(text) and not re.search(r"[0-9+*/^]", text):
        return not _TELLING.search(text)
    if _NAME.fullmatch(text):
        return True
    ratio = _RATIO.fullmatch(text)
    if ratio is not None:
        return _different([part for part in ratio.groups() if part is not None])
    return _different(_BETWEEN_NAMES.split(text))


def _combines(left: str, right: str) -> bool:
    """Whether a left side is made of several letters, of which none is the name of what stands on the right."""
    if re.fullmatch(r"\([^()]*\)", left):
        left = left[1:-1]
    ratio = _RATIO.fullmatch(left)
    terms = _BETWEEN_NAMES.split(left) if ratio is None else [part for part in ratio.groups() if part is not None]
    if _DERIVED.fullmatch(left) or _WORD.search(left) or not all(map(_OF_UNKNOWNS.fullmatch, terms)):
        return False
    if all(map(_CAPITALS.fullmatch, terms)):
        return re.search("[a-z]", right) is not None and re.search("[A-Z]", right) is not None
    return len(terms) > 1 or len(re.findall(_LETTERS, left)) > 1


def _different(parts: Sequence[str]) -> bool:
    parts = [part.strip() for part in parts]
    names = all(_NAME.fullmatch(part) or (_is_sum(part) and _different(_BETWEEN_NAMES.split(part))) for part in parts)
    return len(parts) > 1 and len(set(parts)) == len(parts) and names


def _is_sum(part: str) -> bool:
    return _BETWEEN_NAMES.search(part) is not None


def _is_number(text: str) -> bool:
    return re.search(r"[0-9]|\\pi", text) is not None and _NUMBERS.fullmatch(text) is not None


def _plain(side: str) -> str:
    return _IN_WORDS.sub(r"\1", LOOKS.sub(" ", side)).strip()


def _bare(text: str) -> str:
    return re.sub(r"\s+|\\cdot", "", LOOKS.sub("", text))


def _cut(latex: str, at: re.Pattern[str]) -> list[str]:
    """A text cut where a pattern is found outside of brackets."""
    ends, depth = [0], 0
    for found in re.finditer(r"[({\[]|[)}\]]|" + at.pattern, latex):
        if found[0] in ("(", "{", "["):
            depth += 1
        elif found[0] in (")", "}", "]"):
            depth -= 1
        elif depth == 0:
            ends += [found.start(), found.end()]
    ends.append(len(latex))
    return [latex[start:end].strip() for start, end in zip(ends[::2], ends[1::2], strict=True)]
