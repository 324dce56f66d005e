"""Sets, tuples and inequalities, told apart by how they are written."""

from __future__ import annotations

import re
from itertools import pairwise
from math import inf
from typing import Any, Literal

from posttrain.verifiers.math_exact import real_value
from posttrain.verifiers.math_parse import parse
from posttrain.verifiers.math_shapes import set_by

_ROWS = re.compile(
    r"(?:\\left\s*\\\{)?\s*\\begin\{(array|matrix|aligned|gathered|split|cases)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}.{0,8}",
    re.DOTALL,
)
_SIZED = re.compile(r"\\(?:left|right)(?![A-Za-z])\s*")
_NAMED = re.compile(
    r"^[A-Za-z](?:_\{?\w\}?)?\s*(?:=|\\in(?![A-Za-z]))\s*|^\(\s*(?:[a-z]|\\[a-z]+)(?:\s*,\s*(?:[a-z]|\\[a-z]+))+\s*\)\s*=\s*"
)
_VALUE = re.compile(r"([a-z])\s*=\s*([^=<>]+)")
_AND = re.compile(r",|\\text\s*\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])|(?<![A-Za-z\\])or(?![A-Za-z])")
_RELATION = re.compile(
    r"(<=|>=|<|>|\\leq?(?:slant)?(?![A-Za-z])|\\geq?(?:slant)?(?![A-Za-z])|\\lt|\\gt|\\neq?(?![A-Za-z]))"
)
_IN_BRACKETS = re.compile(
    r"(?:\\left\s*)?[(\[]\s*\\begin\{(array|matrix|smallmatrix)\}(?:\{[lcr\s]*\})?((?:(?!\\begin).)*?)\\end\{\1\}\s*"
    r"(?:\\right\s*)?[)\]]",
    re.DOTALL,
)
_ROW_GAP = re.compile(r"\\\\\s*\[\s*-?[0-9.]+\s*(?:pt|em|ex|mm|cm)\s*\]")
_TURNED = r"\^\s*\{?\s*(?:T|\\top|\\intercal|\\mathrm\{T\}|\\mathsf\{T\}|\\text\{T\})\s*\}?"
_ROW_TURNED = re.compile(rf"([A-Za-z]\s*=\s*)?[(\[]([^()\[\]=]+)[)\]]\s*{_TURNED}")
_MATRIX_NAME = re.compile(
    r"^\s*(?:\\(?:vec|mathbf|boldsymbol|bm|mathrm|hat|overrightarrow)(?![A-Za-z])\s*\{?\s*)?([A-Za-z])\s*\}?\s*"
    r"(?:\^\s*\{?\s*(?:-1|T|\\top|[0-9])\s*\}?)?\s*=(?=.{0,60}\\begin)",
    re.DOTALL,
)
_CELL = re.compile(r"-?(?:[0-9]+(?:[./][0-9]+)?|\\frac\{[0-9]+\}\{[0-9]+\})")
_SCALED = re.compile(
    r"([A-Za-z](?:_\{?\w\}?|\^\{?-1\}?)?\s*=\s*)?([-\u2212]?(?:[^-\u2212+=,;&\\]|\\(?:[dtc]?frac|sqrt|pi)(?![A-Za-z]))*)(?:\\cdot|\\times)?\s*"
    rf"\\begin\{{pmatrix\}}((?:(?!\\begin).)*)\\end\{{pmatrix\}}\s*({_TURNED})?",
    re.DOTALL,
)
_BOTH = re.compile(
    r",|\\text\s*\{\s*,?\s*and\s*\}|\\(?:land|wedge)(?![A-Za-z])|(?<![A-Za-z\\])and(?![A-Za-z])|\\text\s*\{\s*but\s*\}"
)
_GAPS = re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])")
_BIG_UNION = re.compile(
    r"\\bigcup(?![A-Za-z])(?!\s*(?:\\limits|[_^]))\s*|(?<=[)\]])\s*(?:U|\\text\s*\{\s*U\s*\})\s*(?=[(\[])"
)
_ENDS = re.compile(r"([(\[])([^()\[\],]+),([^()\[\],]+)([)\]])")
_UNEQUAL = (r"\ne", r"\neq")
_SIZE = re.compile(r"\\?\|\s*[a-z]\s*\\?\||\\lvert\s*[a-z]\s*\\rvert")
_OF_REALS = re.compile(r"(?:^|,)\s*[a-z]\s*\\in\s*\\mathbb\s*\{?R\}?\s*(?:,|$)")
_MEMBER_OF = re.compile(r"[a-z]\s*\\in\s*[(\[\]]")
_COMMANDS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_VARIABLE = re.compile(r"\s*[a-z]\s*")
_BOUND = re.compile(r"[^=,<>]*[0-9][^=,<>]*|\s*[-+]?\\(?:infty|pi)\s*")


Writing = Literal["set", "tuple", "range", "list"]
UNLIKE: tuple[set[Writing | None], ...] = ({"set", "tuple"}, {"set", "range"}, {"list", "range"})
"""Ways of writing that never mean the same: `2, 5` is no `2 < x < 5`."""


def written_as(latex: str, text: str) -> Writing | None:
    r"""How several values are written: None for one value, and for what is none of these.

    `set`: in braces. `tuple`: in round or square brackets, which may be an interval. `range`: by inequalities, or as
    elements of an interval. `list`: side by side, with commas, a sign for two values, or an "or" between equations.

    Args:
        latex: of the answer, in which inequalities may be intervals already.
        text: the answer as written.
    """
    if _RELATION.search(text) or text.startswith("]") or text.endswith("["):
        return "range"
    sized = _SIZED.sub("", latex.strip())
    text = _NAMED.sub("", sized).strip()
    if text.startswith(r"\{") and text.endswith(r"\}") and r"\{" not in text[2:]:
        return "set"
    if _MEMBER_OF.match(sized):
        return "range"
    depth, several = 0, False
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and place == len(text) - 1 and text[:1] in ("(", "[") and "," in text and not several:
            return "tuple"
        several = several or depth == 0
    listed = several and (r"\pm" in text or "," in re.sub(r"[({\[][^(){}\[\]]*[)}\]]", "", text) or _OR.search(text))
    return "list" if listed else None


def left_unsolved(gold: str, answer: str) -> bool:
    r"""Whether an answer is an inequality to be solved, where the reference says which numbers solve it.

    `x > 3` and `(3,\infty)` are answered by `3 < x` or `|x| \le 2` of one variable, but not by `2x > 6` or `x-3 > 0`.
    """
    if not _RELATION.search(answer) or _solved(answer):
        return False
    if _RELATION.search(gold):
        return _solved(gold, number=True)
    return _ENDS.search(_SIZED.sub("", gold)) is not None or gold.strip() in (r"\emptyset", r"\mathbb{R}")


def _solved(latex: str, *, number: bool = False) -> bool:
    """Whether it is made of bounds for one variable; with `number` of bounds without letters."""
    text = _GAPS.sub(" ", latex)
    pieces = [piece for part in _OR.split(text) for piece in _BOTH.split(part)]
    if number and len(set(re.findall("[A-Za-z]", _COMMANDS.sub("", text)))) != 1:
        return False
    return all(_interval(_SIZE.sub("x", piece)) or _VALUE.fullmatch(piece.strip()) for piece in pieces)


def as_matrix(latex: str) -> str:
    r"""A matrix in brackets of any make as `pmatrix`, with a number before it and a transposition of its one row done.

    `\left[\begin{array}{c}1\\[4pt]2\end{array}\right]`, `(1\ 2)^T`, `\frac{1}{5}\begin{bmatrix}1\\2\end{bmatrix}`.
    """
    row = _ROW_TURNED.fullmatch(_SIZED.sub("", latex.strip())) if "^" in latex else None
    if row is not None:
        cells = [cell.strip() for cell in re.split(r",|&", row[2])]
        if len(cells) == 1:
            # Side by side only numbers are cells: `(1 + r)^T` is a power.
            cells = re.split(r"(?:\s|\\[,;:! ]|\\q?quad(?![A-Za-z]))+", row[2].strip())
            cells = cells if all(map(_CELL.fullmatch, cells)) else []
        return _matrix(row[1], [[cell] for cell in cells]) if len(cells) > 1 else latex
    if r"\begin" not in latex:
        return latex
    latex = _MATRIX_NAME.sub(r"\1=", latex)
    text = _IN_BRACKETS.sub(r"\\begin{pmatrix}\2\\end{pmatrix}", latex)
    text = _ROW_GAP.sub(r"\\\\ ", re.sub(r"\\(begin|end)\{bmatrix\}", r"\\\1{pmatrix}", text))
    found = _SCALED.fullmatch(text.strip())
    if found is None:
        return text
    named, scalar, inside, turned = found.groups()
    rows = [row.split("&") for row in inside.split(r"\\") if row.strip()]
    if turned and min(len(rows), len(rows[0])) == 1:
        rows = [[cell] for cell in rows[0]] if len(rows) == 1 else [[row[0] for row in rows]]
    elif turned:
        return text
    if scalar:
        factor = "-1" if scalar.strip() in ("-", "\u2212") else scalar.strip()
        rows = [[rf"({factor})\cdot ({cell.strip()})" for cell in row] for row in rows]
    return _matrix(named, rows)


def _matrix(named: str | None, rows: list[list[str]]) -> str:
    lines = r" \\ ".join("&".join(row) for row in rows)
    return rf"{named or ''}\begin{{pmatrix}}{lines}\end{{pmatrix}}"


def as_union(latex: str) -> str:
    r"""Inequalities of one variable as intervals: `x < -1 \text{ or } x > 2`, `0 < x < 2, x \ne 1`. All else stays.

    Those joined by "or" are a union, and so are intervals; those joined by "and" or a comma hold together.
    """
    latex = _BIG_UNION.sub(r"\\cup ", latex)
    condition = set_by(latex)
    if condition is not None:
        found = as_union(condition)
        return found if found != condition else _interval(condition) or latex
    text = _GAPS.sub(" ", latex) if "\\" in latex else latex
    if r"\mathbb" in text and _RELATION.search(text):
        text = latex = _OF_REALS.sub("", text)
    pieces = _OR.split(text)
    if len(pieces) > 1:
        intervals = [_joint(piece) or _interval(piece) or _written_interval(piece) for piece in pieces]
        return r" \cup ".join(filter(None, intervals)) if all(intervals) else latex
    return _joint(text) or latex


def _joint(text: str) -> str | None:
    """The numbers for which several inequalities hold; None if these are not some of one variable that can be met."""
    pieces = _BOTH.split(text)
    if len(pieces) < 2 or not all(map(_RELATION.search, pieces)):
        return None
    variables = {side.strip() for piece in pieces for side in _RELATION.split(piece)[::2] if _VARIABLE.fullmatch(side)}
    intervals = [_interval(piece) for piece in pieces]
    if len(variables) != 1 or None in intervals:
        return None
    low: tuple[Any, ...] = (-inf, True, r"-\infty")
    high: tuple[Any, ...] = (inf, True, r"\infty")
    gaps = []
    for interval in filter(None, intervals):
        written = _ENDS.fullmatch(interval.partition(r" \cup ")[0])
        if written is None:
            return None
        left, begin, end, right = written.groups()
        ends = [real_value(next(iter(parse(each)), None)) for each in (begin, end) if not each.endswith("infty")]
        if None in ends:
            return None
        if r"\cup" in interval:
            gaps.append((ends[0], end))
            continue
        # Of two open and closed ends at one place the open one is the narrower.
        if not begin.endswith("infty"):
            low = max(low, (ends[0], left == "(", begin), key=lambda each: each[:2])
        if not end.endswith("infty"):
            high = min(high, (ends[-1], right == ")", end), key=lambda each: (each[0], not each[1]))
    if low[0] >= high[0]:
        return None
    inner = sorted({at: bound for at, bound in gaps if low[0] < at < high[0]}.items())
    at_ends = {at for at, _ in gaps}
    first = "(" if low[1] or low[0] in at_ends else "["
    last = ")" if high[1] or high[0] in at_ends else "]"
    bounds = [low[2], *(bound for _, bound in inner), high[2]]
    spans = [f"({begin},{end})" for begin, end in pairwise(bounds)]
    spans[0] = first + spans[0][1:]
    spans[-1] = spans[-1][:-1] + last
    return r" \cup ".join(spans)


def _written_interval(piece: str) -> str | None:
    """An interval without an end, or one that is half open: two numbers in like brackets may be a point."""
    text = _SIZED.sub("", piece.strip().strip("$"))
    found = _ENDS.fullmatch(text)
    if found is None or not (r"\infty" in text or (found[1], found[4]) in (("[", ")"), ("(", "]"))):
        return None
    return text


def as_vector(latex: str) -> str | None:
    """A matrix of one row or column, or values of several variables, as a tuple; None for anything else.

    Variables are put in the order of the alphabet, so that `y=2, x=1` is (1, 2).
    """
    rows = _ROWS.fullmatch(latex.strip())
    if rows is not None:
        entries = [row.replace("&", " ").strip(" ,;.") for row in rows[2].split(r"\\") if row.strip()]
        listed = ", ".join(entries)
        return (as_vector(listed) or (listed if "=" in listed else f"({listed})")) if len(entries) > 1 else None
    values = [_VALUE.fullmatch(part.strip()) for part in _AND.split(latex.strip().strip("$"))]
    if len(values) > 1 and all(values) and len({value[1] for value in values}) == len(values):
        return f"({', '.join(value[2].strip() for value in sorted(values, key=lambda value: value[1]))})"
    matrix = _MATRIX.fullmatch(_NAMED.sub("", _SIZED.sub("", latex.strip())))
    if matrix is None:
        return None
    lines = [row.strip() for row in matrix[2].split(r"\\") if row.strip()]
    entries = lines if len(lines) > 1 else matrix[2].split("&")
    return None if len(entries) < 2 or any("&" in entry for entry in entries) else f"({', '.join(entries)})"


def _interval(piece: str) -> str | None:
    parts = _RELATION.split(piece.strip().strip("$"))
    if (
        len(parts) == 5
        and not set(parts) & set(_UNEQUAL)
        and _VARIABLE.fullmatch(parts[2])
        and _points_up(parts[1]) == _points_up(parts[3])
    ):
        low, first, _, second, high = parts if _points_up(parts[1]) else parts[::-1]
        if not (_BOUND.fullmatch(low) and _BOUND.fullmatch(high)):
            return None
        return f"{'(' if _strict(first) else '['}{low},{high}{')' if _strict(second) else ']'}"
    if len(parts) != 3:
        return None
    left, relation, right = parts
    if _VARIABLE.fullmatch(left) and _BOUND.fullmatch(right):
        bound, below = right, _points_up(relation)
    elif _VARIABLE.fullmatch(right) and _BOUND.fullmatch(left):
        bound, below = left, not _points_up(relation)
    else:
        return None
    if relation in _UNEQUAL:
        return rf"(-\infty,{bound}) \cup ({bound},\infty)"
    strict = _strict(relation)
    return f"(-\\infty,{bound}{')' if strict else ']'}" if below else f"{'(' if strict else '['}{bound},\\infty)"


def _points_up(relation: str) -> bool:
    """Whether the right side is the larger one."""
    return relation.startswith(("<", r"\l"))


def _strict(relation: str) -> bool:
    return relation in ("<", ">", r"\lt", r"\gt")
