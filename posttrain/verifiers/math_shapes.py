"""Answers of several parts that no single expression holds: ratios, chains, cases, sets by a condition, lists that go
on, congruences, numerals in a base."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.verifiers.math_exact import decided
from posttrain.verifiers.math_parse import parse, readable

Alike = Callable[[str, str], bool]

_RELATION = re.compile(
    r"(<=|>=|<|>|\\leq?(?:slant)?(?![A-Za-z])|\\geq?(?:slant)?(?![A-Za-z])|\\lt(?![A-Za-z])|\\gt(?![A-Za-z]))"
)
_CASES = re.compile(
    r"(?:[^=]{1,20}=)?\s*(?:\\left\s*\\\{)?\s*\\begin\{(cases|array|aligned)\}(?:\{[lcr]*\})?(.*)\\end\{\1\}\s*(?:\\right\s*\.)?",
    re.DOTALL,
)
_CONDITION_WORDS = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:if|when|for|where)?\s*\}"
    r"|(?<![A-Za-z\\])(?:if|when|for)(?![A-Za-z])|\\q?quad|\\[,;: !]|[,;]\s*$"
)
_OTHERWISE = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{\s*(?:otherwise|else)\s*\.?\s*\}|(?:otherwise|else)\.?", re.IGNORECASE
)
_SET = re.compile(
    r"(?:[A-Z]\s*=\s*)?\\\{\s*(.+?)\s*(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|\||:)\s*(.+?)\s*\\\}", re.DOTALL
)
_MEMBER = re.compile(r"\\in(?![A-Za-z])\s*\\math(?:bb|bf|rm)\s*\{?\s*R\s*\}?")
_TERM = r"[^:=<>,{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^:=<>,{}]*)*"
_RATIO = re.compile(rf"(?:[A-Za-z:/\s\\]+=)?\s*({_TERM}:{_TERM}(?::{_TERM})*)")
_BRACKETED = re.compile(r"^\(([^()]*)\)$")
_TO = re.compile(r"([0-9]+)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b|\\colon(?![A-Za-z])|\\,:\\,)\s*(?=[0-9])")


_DOTS = r"(?:\\[lc]?dots[cbi]?(?![A-Za-z])|\.\.\.|\u2026)"
_GOES_ON = re.compile(rf"(?:^|[,(\[{{])\s*{_DOTS}\s*(?:$|[,)\]}}\\])")
_BRACED = re.compile(r"(?:[A-Z]\s*=\s*)?(\\\{|\(|\[)?\s*(.*?)\s*(\\\}|\)|\])?", re.DOTALL)
_MODULUS = re.compile(
    r"(.+?)\s*(?:\\pmod\s*\{?\s*([0-9]+|[a-z])\s*\}?|\(\s*\\[bp]?mod\s*\{?\s*([0-9]+|[a-z])\s*\}?\s*\)"
    r"|\\(?:text|mathrm)\s*\{\s*\(?\s*mod(?:ulo)?\s*\}?\s*([0-9]+|[a-z])\s*\)?\s*\}?\s*\)?"
    r"|\(?\s*\bmod(?:ulo)?\s+([0-9]+|[a-z])\s*\)?)",
    re.DOTALL,
)
_CONGRUENT = re.compile(r"(?:[A-Za-z](?:_\{?\w\}?)?\s*(?:\\equiv(?![A-Za-z])|=|\u2261)\s*)?(.+)", re.DOTALL)
_NUMERAL = re.compile(
    r"\(?\s*(?:\\(?:text|mathrm)\s*\{)?([0-9](?:[0-9A-Fa-f]|\\(?:text|mathrm)\s*\{[A-Fa-f]+\})*|[A-F][0-9A-F]+)\}?\s*\)?"
    r"\s*_\s*\{?\s*(?:\\(?:text|mathrm)\s*\{\s*)?\(?([0-9]{1,2}|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen)"
    r"\)?\s*\}?\s*\}?"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"twelve": 12, "sixteen": 16}


@dataclass(frozen=True, slots=True)
class Shape:
    """What kind of thing a formula is.

    Attributes:
        kind: `ratio`, `chain`, `cases`, `set`, `list` (that goes on), `congruence` or `numeral`.
        parts: in the order in which they are compared; of cases value and condition in turn; of a list its brackets
            first, of a congruence the modulus; of a numeral its digits and its base.
        signs: of a chain, whether each relation is strict.
    """

    kind: str
    parts: tuple[str, ...]
    signs: tuple[bool, ...] = ()

    def same_as(self, other: Shape, alike: Alike) -> bool:
        """Whether another answer of this kind has the same parts; `alike` says it of one part."""
        if self.kind != other.kind or len(self.parts) != len(other.parts) or self.signs != other.signs:
            return False
        if self.kind == "ratio":
            return self._same_ratio(other)
        if self.kind == "cases":
            return self._same_cases(other, alike)
        if self.kind == "congruence":
            return self._same_congruence(other)
        if self.kind == "numeral":
            return self.parts == other.parts
        return all(alike(*pair) for pair in zip(self.parts, other.parts, strict=True))

    def quotient(self) -> str | None:
        """A ratio of two terms as a fraction; None for all else."""
        return (
            rf"\frac{{{self.parts[0]}}}{{{self.parts[1]}}}" if self.kind == "ratio" and len(self.parts) == 2 else None
        )

    def value(self) -> str:
        """The number that a numeral is, in decimal."""
        return str(int(self.parts[0], int(self.parts[1])))

    def _same_congruence(self, other: Shape) -> bool:
        """The same residues by the same modulus, in any order."""
        if self.parts[0] != other.parts[0]:
            return False
        residues = []
        for shape in (self, other):
            modulus, *terms = shape.parts
            whole = modulus.isdecimal() and int(modulus) > 0 and all(re.fullmatch(r"-?[0-9]{1,18}", t) for t in terms)
            residues.append(sorted(str(int(t) % int(modulus)) for t in terms) if whole else sorted(terms))
        return residues[0] == residues[1]

    def _same_ratio(self, other: Shape) -> bool:
        ours, theirs = ([parse(part)[0] for part in shape.parts] for shape in (self, other))
        first, its_first = ours[0], theirs[0]
        pairs = list(zip(ours, theirs, strict=True))[1:]
        return all(decided(mine * its_first, its * first) is True for mine, its in pairs)

    def _same_cases(self, other: Shape, alike: Alike) -> bool:
        left = list(zip(other.parts[::2], other.parts[1::2], strict=True))
        for value, condition in zip(self.parts[::2], self.parts[1::2], strict=True):
            found = next(
                (row for row in left if alike(value, row[0]) and _alike_condition(condition, row[1], alike)), None
            )
            if found is None:
                return False
            left.remove(found)
        return True


def shape_of(latex: str) -> Shape | None:
    """The parts of an answer; None if it is not written in one of these ways."""
    return (
        _cases(latex)
        or _set(latex)
        or _numeral(latex)
        or _congruence(latex)
        or _list(latex)
        or _chain(latex)
        or _ratio(latex)
    )


def _list(latex: str) -> Shape | None:
    """A list or set with dots for what is left out."""
    if not _GOES_ON.search(latex.replace(r"\left", "").replace(r"\right", "")):
        return None
    found = _BRACED.fullmatch(latex.replace(r"\left", "").replace(r"\right", "").strip())
    terms = [re.sub(_DOTS, "...", term).strip() for term in found[2].split(",")]
    return Shape("list", (f"{found[1] or ''}{found[3] or ''}", *terms))


def _congruence(latex: str) -> Shape | None:
    found = _MODULUS.fullmatch(re.sub(r"\\[,;: ]|\\q?quad", " ", latex).strip()) if "mod" in latex else None
    if found is None:
        return None
    modulus = next(part for part in found.groups()[1:] if part)
    terms = re.split(r",|\\text\s*\{\s*(?:,\s*)?(?:or|and)\s*\}", _CONGRUENT.fullmatch(found[1].strip().rstrip("("))[1])
    terms = ["".join(term.split()) for term in terms]
    return Shape("congruence", (modulus, *terms)) if all(terms) else None


def _numeral(latex: str) -> Shape | None:
    found = _NUMERAL.fullmatch(latex.strip()) if "_" in latex else None
    if found is None:
        return None
    digits = re.sub(r"\\(?:text|mathrm)|[{}\s]", "", found[1]).upper().lstrip("0") or "0"
    base = _BASES.get(found[2]) or int(found[2])
    good = 2 <= base <= 36 and len(digits) <= 200 and all(int(digit, 36) < base for digit in digits)
    return Shape("numeral", (digits, str(base))) if good else None


def _ratio(latex: str) -> Shape | None:
    text = _TO.sub(r"\1:", latex)
    found = _RATIO.fullmatch(text) if ":" in text and r"\{" not in text else None
    if found is None:
        return None
    parts = [_BRACKETED.sub(r"\1", part.strip()) for part in found[1].split(":")]
    good = all(part and readable(part) and parse(part) and hasattr(parse(part)[0], "is_number") for part in parts)
    return Shape("ratio", tuple(parts)) if good and not any(parse(part)[0].free_symbols for part in parts) else None


def _chain(latex: str) -> Shape | None:
    """Terms from the smallest to the largest."""
    pieces = _RELATION.split(latex)
    if (
        len(pieces) < 5
        or any(sign in latex for sign in (",", "=<", r"\text", r"\{", r"\cup"))
        or "=" in "".join(pieces[::2])
    ):
        return None
    terms, signs = [piece.strip() for piece in pieces[::2]], pieces[1::2]
    up = {sign.startswith(("<", r"\l")) for sign in signs}
    if len(up) != 1 or not all(terms):
        return None
    strict = [sign in ("<", ">", r"\lt", r"\gt") for sign in signs]
    order = slice(None) if up == {True} else slice(None, None, -1)
    return Shape("chain", tuple(terms[order]), tuple(strict[order]))


def _cases(latex: str) -> Shape | None:
    found = _CASES.fullmatch(latex.strip()) if r"\begin" in latex else None
    if found is None:
        return None
    rows = [row.split("&") for row in found[2].split(r"\\") if row.strip()]
    if len(rows) < 2 or any(len(row) != 2 or not all(cell.strip() for cell in row) for row in rows):
        return None
    cells: list[str] = []
    for value, condition in rows:
        if condition.strip().startswith("="):
            return None
        cells += [value.strip().rstrip(",;. "), _condition(condition)]
    return Shape("cases", tuple(cells))


def _set(latex: str) -> Shape | None:
    found = _SET.fullmatch(latex.replace(r"\left", "").replace(r"\right", "").strip()) if r"\{" in latex else None
    if found is None or "," in found[1]:
        return None
    return Shape("set", (_MEMBER.sub("", found[1]).strip(), found[2].strip()))


def _condition(text: str) -> str:
    if _OTHERWISE.fullmatch(text.strip().rstrip(".,;")):
        return "otherwise"
    return _CONDITION_WORDS.sub(" ", text).strip().rstrip(".,; ")


def _alike_condition(one: str, other: str, alike: Alike) -> bool:
    return one == other if "otherwise" in (one, other) else alike(one, other)


def set_by(latex: str) -> str | None:
    r"""The condition of a set of numbers, `x > 2` of `\{x \mid x > 2\}`; None for all else."""
    shape = _set(latex)
    if shape is None or not re.fullmatch("[a-z]", shape.parts[0]):
        return None
    return shape.parts[1]
