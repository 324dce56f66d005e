"""An answer as people write it, as LaTeX that math-verify reads as it was meant, or as a plain number."""

from __future__ import annotations

import re
from fractions import Fraction

_AROUND = " \t\r\n*"
_WRAPPED = re.compile(r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(([^)]*)\\\)|\\\[([^]]*)\\\]")
_PLAIN_NUMBER = r"[-+\u2212]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)"
_MONEY = "$\u20ac\u00a3\u00a5"
_CURRENCY = re.compile(rf"^([-\u2212]?)\s*(?:\\?[{_MONEY}]|\\text\s*\{{\s*\\?[{_MONEY}]\s*\}})\s*(?=[.0-9])")
_CURRENCY_AFTER = re.compile(rf"(?<=[0-9])\s*\\?[{_MONEY}]$")
_SPACED_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,;: !]|~|[ \u00a0\u202f])(?=[0-9]{3}(?![0-9]))")
_BRACED_COMMA = re.compile(r"(?<=[0-9])\{,\}(?=[0-9]{3})")
_BARE_POINT = re.compile(r"(?<=[0-9])\.(?=/)")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([-+]?[0-9]{1,4})(?![A-Za-z0-9.])")
_MIXED = re.compile(r"([-\u2212]?[0-9]{1,9})\s+([0-9]{1,9})\s*/\s*([0-9]{1,9})")
_ABOUT = re.compile(r"^(?:\\approx|\\simeq|\u2248|=)\s*")
_ORDINAL = re.compile(r"^([0-9]+)\s*(?:\^?\{?\\(?:text|mathrm)\{(?:st|nd|rd|th)\}\}?|st|nd|rd|th)$")
_REMARK = re.compile(rf"^({_PLAIN_NUMBER})\s*\([A-Za-z ]+\)$")
_WITH_UNIT = re.compile(
    rf"({_PLAIN_NUMBER}(?:/[0-9]+)?)\s+((?:[a-z]{{3,}}|[ckm]m|[km]g|ml|lb|oz|ft|hr|pm|am)(?:[ /][a-z]+)*)",
    re.IGNORECASE,
)
_SCALED = re.compile(
    rf"({_PLAIN_NUMBER})\s*(?:\\[,;: !]|~)?\s*(?:\\text\s*\{{\s*)?(hundred|thousand|million|billion|trillion)"
    r"(?:\s+[a-z]{3,})?\s*\}?",
    re.IGNORECASE,
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_TEXT_UNIT = re.compile(
    rf"({_PLAIN_NUMBER})\s*(?:\\[,; ])?\s*\\(?:text|mathrm)\{{\s*([A-Za-z]{{2,}}(?:[ /][A-Za-z]+)*)\s*\}}"
)
_NOT_UNITS = set("plus minus times squared cubed and or if percent dozen choose half halves thirds quarters".split())
_NOT_UNITS |= set(_SCALES)
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "mod"}
_WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z]+(?:[ -][A-Za-z]+)*")
_NUMBER_WORDS = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split(),
        map(str, range(21)),
        strict=True,
    )
)
_LETTER = re.compile(r"\(?([A-J])\)?")
_OPTION = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s))\s*\S.*", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")

_INVISIBLE = str.maketrans("", "", "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")
_SYMBOLS = {
    "\u2212": "-",
    "\u2013": "-",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00f7": "/",
    "\u2044": "/",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u221e": r"\infty ",
    "\u03c0": r"\pi ",
    "\u03b8": r"\theta ",
    "\u00b1": r"\pm ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u00b0": r"^{\circ}",
}
_TRANSLATED = str.maketrans(_SYMBOLS)
_ROOT = re.compile("\u221a\\s*(?:\\(([^()]*)\\)|([0-9]+|[A-Za-z]))")
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
_RAISED_RUN = re.compile(f"[{_RAISED}]+")
_LOWERED = str.maketrans(_RAISED, "0123456789-")
_VULGAR = {
    "\u00bd": (1, 2), "\u2153": (1, 3), "\u2154": (2, 3), "\u00bc": (1, 4), "\u00be": (3, 4), "\u2155": (1, 5),
    "\u2156": (2, 5), "\u2157": (3, 5), "\u2158": (4, 5), "\u2159": (1, 6), "\u215a": (5, 6), "\u215b": (1, 8),
    "\u215c": (3, 8), "\u215d": (5, 8), "\u215e": (7, 8),
}  # fmt: skip
_VULGAR_SIGN = re.compile(f"([0-9]*)\\s*([{''.join(_VULGAR)}])")


def as_latex(answer: str) -> str:
    r"""The same answer, with what math-verify would misread written out.

    Delimiters, a currency sign and a unit in plain words after a number are taken off; digits in groups of three are
    closed up; `1.5e3`, `1 1/2`, `3 million` and `five` become numbers of LaTeX; mathematical signs of Unicode become
    commands; marks that nobody sees are dropped; bare words become `\text{...}` (else they are products of letters, and
    anagrams of each other are equal).
    """
    text = answer.translate(_INVISIBLE).strip(_AROUND)
    while (wrapped := _WRAPPED.fullmatch(text)) is not None:
        text = next(group for group in wrapped.groups() if group is not None).strip(_AROUND)
    text = _ABOUT.sub("", text.rstrip(".").replace("~", " ").replace("{:}", ":"))
    in_words = _TEXT.fullmatch(text)
    if in_words is not None and in_words[1].strip()[:1].isdecimal():
        text = in_words[1].strip()
    text = _REMARK.sub(r"\1", _ORDINAL.sub(r"\1", text))
    text = _CURRENCY_AFTER.sub("", _CURRENCY.sub(r"\1", text))
    text = _BRACED_COMMA.sub(",", _SPACED_THOUSANDS.sub("", text))
    with_unit = _WITH_UNIT.fullmatch(text) or _TEXT_UNIT.fullmatch(text)
    if with_unit is not None and not (_NOT_UNITS | _FUNCTIONS) & set(re.split("[ /]", with_unit[2].lower())):
        text = with_unit[1]
    scaled = _SCALED.fullmatch(text)
    if scaled is not None:
        value = plain_number(scaled[1]) * 10 ** _SCALES[scaled[2].lower()]
        return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    word = _TEXT.sub(r"\1", text).strip().lower()
    if word in _NUMBER_WORDS:
        return _NUMBER_WORDS[word]
    if _WORDS.fullmatch(text):
        return rf"\text{{{text}}}"
    return _in_commands(text)


def _in_commands(text: str) -> str:
    if not text.isascii():
        text = _VULGAR_SIGN.sub(_vulgar, text)
        text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
        text = _RAISED_RUN.sub(lambda m: f"^{{{m[0].translate(_LOWERED)}}}", text).translate(_TRANSLATED)
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", _BARE_POINT.sub("", text))
    # Spellings that the grammar does not know: a sun as index, an energy that it takes for the number e, numpy.
    text = text.replace(r"\varnothing", r"\emptyset").replace(r"_{\odot}", "_{odot}").replace(r"_\odot", "_{odot}")
    text = re.sub(r"(?<![A-Za-z\\])E(?=_)", r"\\Xi ", text)
    return re.sub(r"\bnp\.(?=arc|sin|cos|tan|exp|log|sqrt|pi)", r"\\", text)


def _vulgar(found: re.Match[str]) -> str:
    over, under = _VULGAR[found[2]]
    return rf"{found[1]}\frac{{{over}}}{{{under}}}"


def plain_number(text: str) -> Fraction | None:
    """The value of digits with a sign, commas between thousands and a decimal point; None for all else."""
    if len(text) > 40 or not re.fullmatch(_PLAIN_NUMBER, text):
        return None
    return Fraction(text.replace(",", "").replace("\u2212", "-"))


def option_letter(text: str) -> str | None:
    """The letter, if the text is one from A to J, in brackets or not."""
    found = _LETTER.fullmatch(_TEXT.sub(r"\1", text).strip(" \t\n*$"))
    return found[1] if found else None


def option_with_text(text: str) -> str | None:
    """The letter of an answer like `(B) 12` or `B. 12`."""
    found = _OPTION.fullmatch(_TEXT.sub(r"\1", text).replace("\\ ", " ").strip(" \t\n*$"))
    return found[1] if found else None
