"""Commands as math-verify's grammar reads them: letters in fonts, indices in words, degrees, short forms."""

from __future__ import annotations

import re

from posttrain.verifiers.math_units import without_symbol

_FONT = r"\\(?:mathrm|mathbf|mathit|mathsf|mathnormal|boldsymbol|bm|operatorname|text|textrm|textit|textbf|rm|bf|mbox)"
_LETTER = re.compile(rf"{_FONT}\s*\{{\s*([A-Za-z])\s*\}}(\s*[A-Za-z0-9])?")
_FUNCTION = re.compile(
    rf"{_FONT}\*?\s*\{{\s*((?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|lg|exp|max|min|gcd|lcm|det|deg)\s*\}}"
)
_INDEX = re.compile(rf"_\s*(?:\{{\s*)?(?:{_FONT}\s*\{{\s*([A-Za-z0-9 ]+?)\s*\}}|\\(max|min|odot)\b)\s*(\}})?")
_ARGUMENT = r"\s*(\{(?:[^{}]|\{[^{}]*\})*\}|\\(?!sqrt|frac|[dtc]frac|left|text|math|binom)[A-Za-z]+|[0-9A-Za-z])"
_SHORT = re.compile(rf"(\\(?:[dtc]?frac|[dt]?binom)){_ARGUMENT}{_ARGUMENT}")
_PRODUCT = re.compile(r"(?<![_^A-Za-z0-9.,])([0-9]+(?:\.[0-9]+)?)\s*(?:\\left\s*)?\((?=[^(),]*\))")
_ANGLE_MINUTES = re.compile(
    r"([0-9]+)\s*\^\s*\{?\s*\\circ\s*\}?\s*([0-9]+(?:\.[0-9]+)?)\s*(?:'|\u2032|\^\s*\{?\s*\\prime\s*\}?)(?!\s*[0-9'])"
)
_OF_ANGLE = re.compile(r"(?<!arc)(?:\\|(?<![A-Za-z]))(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(
    r"([0-9]+(?:\.[0-9]+)?|[0-9]*\\frac\{[0-9]+\}\{[0-9]+\})\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))"
)
_CALL = re.compile(
    r"\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp)(?:\s*[_^]\s*(?:\{[^{}]*\}|[0-9A-Za-z]))*\s*"
    r"(\{)\s*(?:\\left\s*)?\("
)
_BARE_ARGUMENT = re.compile(
    r"(\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp)(?![A-Za-z])(?:\s*[_^]\s*(?:\{[^{}]*\}|[0-9A-Za-z]))*)\s*"
    r"((?<![_^])[0-9]+(?:\.[0-9]+)?|(?<=\s)[A-Za-z]|\\pi)\s*(?=\\(?:cdot|times)(?![A-Za-z]))"
)
_UNIT_VECTOR = re.compile(
    r"\\(?:hat|vec|widehat|overrightarrow)\s*\{?\s*(?:\\(?:mathbf|mathrm|bm)\s*\{?\s*)?\\?([ijk])(?:math)?(?![A-Za-z])\s*\}{0,2}"
)
_LG = re.compile(r"\\lg(?![A-Za-z])")
_ELSEWHERE = {"tg": "tan", "ctg": "cot", "cotg": "cot", "cosec": "csc", "sh": "sinh", "ch": "cosh", "th": "tanh"}
_NAMED_ELSEWHERE = re.compile(
    rf"(?:\\(arc)?({'|'.join(_ELSEWHERE)})(?![A-Za-z])"
    rf"|{_FONT}\*?\s*\{{\s*(arc)?({'|'.join(_ELSEWHERE)})\s*\}}(?=\s*[\\({{0-9A-Za-z^]))\s*"
)
_CIS = re.compile(
    rf"(?:\\cis(?![A-Za-z])|{_FONT}\*?\s*\{{\s*cis\s*\}}|(?<![A-Za-z\\])cis(?![A-Za-z]))(?:\s|\\[,;:! ])*"
    r"(?:\\left\s*\(\s*([^()]*?)\s*\\right\s*\)|\(([^()]*)\)"
    r"|((?:[0-9.]+\s*)?(?:\\frac\{[^{}]*\}\{[^{}]*\}(?:\s*\\pi(?![A-Za-z]))?|\\(?:pi|theta|alpha|phi)(?![A-Za-z]))"
    r"|[0-9.]+(?:\s*\^\s*\{?\s*\\circ\s*\}?)?|[a-z](?![A-Za-z])))"
)
# The grammar takes `d\\sqrt` for a differential.
_FACTOR_D = re.compile(
    r"(\\[A-Za-z]+)|d(?=\s*\\(?:[dtc]?frac|sqrt|sin|cos|tan|cot|sec|csc|ln|log|lg|exp|pi|left|end)(?![A-Za-z]))"
)
_OTHER_FRACTION = re.compile(r"\\(?:nice|s|x|flat)frac(?![A-Za-z])")
_ODD_ROOT = re.compile(r"\\sqrt\s*\[\s*([0-9]*[13579])\s*\]\s*\{\s*-\s*((?:[^{}+\-\u2212]|\{[^{}]*\})+)\}")
_CHOICES = re.compile(
    r"(?:\{\s*\}|)\s*[_^]\s*\{?\s*([0-9]+|[a-z])\s*\}?\s*(?:\\(?:text|mathrm)\s*\{\s*C\s*\}|C)\s*_\s*\{?\s*([0-9]+|[a-z])\s*\}?"
)


def spelt(latex: str) -> str:
    """The same with each of these written out; see the patterns."""
    text = _FUNCTION.sub(r"\\\1 ", latex) if "\\" in latex else latex
    if "C" in text and "_" in text:
        text = _CHOICES.sub(r"\\binom{\1}{\2}", text)
    if "\\" in text:
        text = _NAMED_ELSEWHERE.sub(_of_elsewhere, _OTHER_FRACTION.sub(r"\\frac", text))
        # The grammar's root of a negative number is complex; the one that is meant is real.
        text = _ODD_ROOT.sub(r"\\left(-\\sqrt[\1]{\2}\\right)", text)
        text = text.replace(r"\left\langle", r"\left(").replace(r"\right\rangle", r"\right)")
        text = re.sub(r"\\langle(?![A-Za-z])\s*", "(", re.sub(r"\s*\\rangle(?![A-Za-z])", ")", text))
        # The grammar takes what is multiplied with a sign into the argument too.
        text = _BARE_ARGUMENT.sub(r"\1(\2) ", _bracketed_arguments(_INDEX.sub(_index, text)))
        # A letter behind a number may be a unit: it stays in its font, and is dropped where the reference is a number.
        if without_symbol(text) is None:
            text = _LETTER.sub(_letter, text)
        text = _UNIT_VECTOR.sub(r" \1 ", text)
        text = _SHORT.sub(_short, _LG.sub(r"\\log_{10}", text))
        text = text if r"\int" in text else _FACTOR_D.sub(lambda m: m[1] or "{d} ", text)
        text = _CIS.sub(_cis, text) if "cis" in text else text
        text = _ANGLE_MINUTES.sub(r"\1\\frac{\2}{60}^{\\circ}", text)
        if _OF_ANGLE.search(text):
            text = _DEGREES.sub(r"{\\frac{\1\\pi}{180}}", text)
    return _PRODUCT.sub(r"\1\\cdot (", text)


def _bracketed_arguments(latex: str) -> str:
    r"""Functions of what stands in brackets, `\log{\left(x\right)}`, without the braces that nobody sees.

    With them the grammar takes powers and factors behind the bracket into the argument.
    """
    text, start = latex, 0
    while (found := _CALL.search(text, start)) is not None:
        opened, bracket, start = found.start(1), found.end() - 1, found.end()
        closed, end = _closing(text, opened), _closing(text, bracket)
        if closed is not None and end is not None and not text[end + 1 : closed].strip():
            text = f"{text[:opened]} {text[opened + 1 : closed]} {text[closed + 1 :]}"
    return text


def _closing(text: str, start: int) -> int | None:
    """Where the brace or bracket at `start` is closed; None if it is not."""
    pair, depth = {"{": "{}", "(": "()"}[text[start]], 0
    for place in range(start, len(text)):
        if text[place] in pair and (text[place] in "()" or text[place - 1 : place] != "\\"):
            depth += 1 if text[place] == pair[0] else -1
            if depth == 0:
                return place
    return None


def _of_elsewhere(found: re.Match[str]) -> str:
    return f"\\{found[1] or found[3] or ''}{_ELSEWHERE[found[2] or found[4]]} "


def _letter(found: re.Match[str]) -> str:
    behind = f" {found[2].strip()}" if found[2] else ""
    # `\\pi\\text{r}` is no command `\\pir`.
    before = " " if found.string[: found.start()][-1:].isalpha() else ""
    return f"{before}{found[1]}{behind}"


def _index(found: re.Match[str]) -> str:
    return f"_{{{''.join((found[1] or found[2]).split())}}}"


def _cis(found: re.Match[str]) -> str:
    angle = found[1] or found[2] or found[3]
    return rf"\left(\cos({angle})+i\sin({angle})\right)"


def _short(found: re.Match[str]) -> str:
    return found[1] + "".join(part if part[0] == "{" else f"{{{part}}}" for part in found.groups()[1:])
