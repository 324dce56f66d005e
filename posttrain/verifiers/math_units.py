"""What stands around a number in an answer without changing it: money, units, degrees. And words that scale it."""

from __future__ import annotations

import re
from fractions import Fraction

MINUS = "\u2212"
PLAIN_NUMBER = rf"[-+{MINUS}]?(?:[0-9]+(?:,[0-9]{{3}})*(?:\.[0-9]+)?|\.[0-9]+)"
_PLAIN = re.compile(PLAIN_NUMBER)
_TEXT_COMMAND = r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|operatorname)"

_MONEY = "$\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd"
_CODES = r"(?:USD|EUR|GBP|INR|CAD|AUD|Rs\.?|US\s?\\?\$)"
_CURRENCY = re.compile(
    rf"^([-{MINUS}]?)\s*(?:\\?[{_MONEY}]|\\pounds|{_TEXT_COMMAND}\s*\{{\s*\\?[{_MONEY}]\s*\}}|{_CODES})\s*(?=[.0-9])"
)
_CURRENCY_AFTER = re.compile(rf"(?<=[0-9])\s*(?:\\?[{_MONEY}]|\u00a2|\\cents?)$")

_WITH_UNIT = re.compile(
    rf"([0-9]+\s+[0-9]+/[0-9]+|{PLAIN_NUMBER}(?:/[0-9]+)?)\s+"
    r"((?:[a-z]{3,}|sq|cu|[ckm]m|[km]g|ml|lb|oz|ft|hr|pm|am)(?:[ /][a-z]+)*)",
    re.IGNORECASE,
)
_PER = re.compile(rf"({PLAIN_NUMBER})\s*/\s*(?:{_TEXT_COMMAND}\{{\s*)?([a-z]{{2,}})\s*\}}?", re.IGNORECASE)
_TEXT_UNIT = re.compile(
    rf"({PLAIN_NUMBER})\s*(?:\\[,; ])?\s*{_TEXT_COMMAND}\{{\s*([A-Za-z]{{2,}}(?:[ /][A-Za-z]+)*)\s*\}}"
)
_JOINED_UNIT = re.compile(rf"({PLAIN_NUMBER})((?=[a-z]*[aeiou])[a-z]{{4,}})", re.IGNORECASE)
_NOT_UNITS = set("plus minus times squared cubed and or if percent dozen choose half halves thirds quarters".split())
_NOT_UNITS |= set("is are was were not when unless except otherwise else modulo than maybe perhaps possibly".split())
_NOT_UNITS |= set("probably wrong incorrect option options either neither something unknown instead".split())
_NOT_UNITS |= {
    "tens",
    "dozens",
    "k",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "exp",
    "sqrt",
    "mod",
    "vs",
    "not",
    "pi",
}

HOW_OFTEN = frozenset("per a an each every in".split())
"""Behind "times", where that counts and does not multiply: 3 times a day."""

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NOT_UNITS |= set(SCALES)
_SCALED = re.compile(
    rf"({PLAIN_NUMBER})\s*(?:\\[,;: !]|~)?\s*(?:\\text\s*\{{\s*)?({'|'.join(SCALES)})(?:\s+[a-z]{{3,}})?\s*\}}?",
    re.IGNORECASE,
)

_SCIENTIFIC = re.compile(
    rf"({PLAIN_NUMBER})\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*([-+]?[0-9]{{1,4}})\s*\}}|([-+]?[0-9]{{1,4}}))"
)
_PERCENT = re.compile(
    rf"({PLAIN_NUMBER})\s*(?:\\[,; ])?\s*(?:\\text\s*\{{\s*)?(?:\\?%|per\s?cent)\s*\}}?", re.IGNORECASE
)
_DEGREES = re.compile(
    rf"({PLAIN_NUMBER})\s*(?:\^\s*\{{?\s*\\circ\s*\}}?|\u00b0)\s*(?:[CFK]|{_TEXT_COMMAND}\{{\s*~?[CFK]\s*\}})"
)
_SYMBOLS = (
    r"[cdkmn]?m|[km]?g|[mn]?s|min|hr?s?|[mdc]?[lL]|k?[NJWVA]|mA|[CF]|k?Pa|[kMG]?Hz|rad|mol|[kM]?eV|mi|ft|in|yd|lbs?|oz|mph"
    r"|erg|\\Omega|(?:\\mu|[\u00b5\u03bc])\s*[mFCAgsL]"
)
_SYMBOL = (
    rf"(?:{_SYMBOLS}|(?:\\mu\s*)?{_TEXT_COMMAND}\{{\s*~?(?:{_SYMBOLS})\s*\}})(?:\s*\^\s*(?:\{{?\s*-?[1-4]\s*\}}?))?"
)
_BETWEEN = r"(?:\s*(?:/|\\cdot|\\,|~)\s*|\s+)"
_SPACE = r"(?:\s|\\[,;: !]|\\q?quad|~)*"
_SYMBOLIC_UNIT = re.compile(
    rf"(.{{0,80}}(?:[0-9.)}}]|\\pi(?![A-Za-z]))){_SPACE}(?:{_SYMBOL}(?:{_BETWEEN}{_SYMBOL})*"
    rf"|\\[dt]?frac\s*\{{\s*{_SYMBOL}\s*\}}\s*\{{\s*{_SYMBOL}\s*\}})"
)


def without_money(text: str) -> str:
    """The amount without the sign or code of a currency before or after it."""
    return _CURRENCY_AFTER.sub("", _CURRENCY.sub(r"\1", text))


def without_unit(text: str) -> str:
    """A plain number without the unit in words after it; anything else as it is."""
    found = (
        _WITH_UNIT.fullmatch(text) or _JOINED_UNIT.fullmatch(text) or _TEXT_UNIT.fullmatch(text) or _PER.fullmatch(text)
    )
    if found is not None and not _NOT_UNITS & set(without_times(re.split("[ /]", found[2].lower()))):
        return found[1]
    degrees = _DEGREES.fullmatch(text)
    return text if degrees is None else degrees[1]


def without_times(words: list[str]) -> list[str]:
    """The words behind a number without "times" before them, where that counts: `3 times`, `3 times a day`."""
    counts = words[:1] == ["times"] and (len(words) == 1 or words[1] in HOW_OFTEN)
    return words[1:] if counts else words


def is_symbol(word: str) -> bool:
    """Whether a word is the symbol of a unit, `kHz`."""
    return re.fullmatch(_SYMBOLS, word) is not None


def without_symbol(latex: str) -> str | None:
    r"""What stands before a unit in symbols, such as `5 m/s^2` or `5\,\frac{m}{s}`; None without one.

    Letters may be variables: ask only where the reference is a number, so that they cannot be.
    """
    found = _SYMBOLIC_UNIT.fullmatch(latex)
    return found[1].rstrip(" ~\\,;") if found is not None else None


def scaled(text: str) -> Fraction | None:
    """The value of `2.5 million`, also with a noun after it; None for anything else."""
    found = _SCALED.fullmatch(text)
    if found is None:
        return None
    return plain_number(found[1]) * 10 ** SCALES[found[2].lower()]


def percent(text: str) -> Fraction | None:
    """The number before a percent sign, or the word; None for anything else."""
    found = _PERCENT.fullmatch(text)
    return None if found is None else plain_number(found[1])


def scientific(text: str) -> tuple[Fraction, str] | None:
    r"""The value of `3.33 \times 10^{-1}`, and a text of the same that the grammar reads; None for anything else."""
    found = _SCIENTIFIC.fullmatch(text)
    if found is None:
        return None
    power = int(found[2] or found[3])
    value = plain_number(found[1]) * Fraction(10) ** power
    if abs(power) > 20:
        return value, text
    return value, str(value) if value.denominator == 1 else f"{float(value):.40f}".rstrip("0")


def plain_number(text: str) -> Fraction | None:
    """The value of digits with a sign, commas between thousands and a decimal point; None for all else."""
    if len(text) > 40:
        return None
    if text.isdecimal() and text.isascii():  # most numbers
        return Fraction(int(text))
    return None if not _PLAIN.fullmatch(text) else Fraction(text.replace(",", "").replace(MINUS, "-"))
