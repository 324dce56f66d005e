"""An answer as people write it, as LaTeX that math-verify reads as it was meant, or as a plain number."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from posttrain.verifiers.math_commands import spelt
from posttrain.verifiers.math_units import PLAIN_NUMBER, SCALES, scaled, without_money, without_unit

_AROUND = " \t\r\n*`"
_WRAPPED = re.compile(r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(([^)]*)\\\)|\\\[([^]]*)\\\]")
_BEHIND_FORMULA = re.compile(
    r"(?:\$((?:[^$\\]|\\.)+)\$|\\\(((?:[^\\]|\\[^()])*)\\\))\**\s*"
    r"(?:(?=[A-Za-z(])([A-Za-z ()./,'-]*)(\$?\^\{?[-0-9]+\}?\$?|[\u00b2\u00b3])?|(\\?%|\u00b0))[\s.*]*"
)
_SAYS_ANSWER = re.compile(
    r"^(?:\\text\s*\{\s*(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:|=)?\s*:?\s*\}\s*[:=]?"
    r"|(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\b|:|=)\s*:?)\s*",
    re.IGNORECASE,
)
_LOOKS = re.compile(
    r"\\(?:(?:display|text)style|bf|rm|it|large|Large|LARGE|huge|Huge|small|[bB]igg?[lrm]?)(?![A-Za-z])"
    r"|\\color\s*\{[^{}]*\}"
)
_SPACING = re.compile(r"\\[hv]space\*?\s*\{[^{}]*\}|\\h?phantom\s*\{[^{}]*\}")
_UNDERLINED = re.compile(r"\\(?:underline|textcolor\s*\{[^{}]*\})\s*\{([^{}]*)\}")
_BEFORE = re.compile(r"^(?:\s|\\[,;:! ]|\\q?quad|~)+")
_AFTER = re.compile(r"(?:[\s,;~\u2713]|(?<!\.)\.(?!\.)|\\[,;:! ]|\\q?quad|\\checkmark|\\(?=\\?$))+$")
_SPACED_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,;: !]|~|[ \u00a0\u202f])(?=[0-9]{3}(?![0-9]))")
_BRACED_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,\s*\\!)\s*(?=[0-9]{3}(?![0-9]))")
_BARE_POINT = re.compile(r"(?<=[0-9])\.(?=/)")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([-+]?[0-9]{1,4})(?![A-Za-z0-9.])")
_TIMES_TEN = re.compile(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)")
_INTERVAL = re.compile(r"(?<![A-Za-z0-9)}\\])([\[\](])\s*([^\[\];,]+?)\s*([;,])\s*([^\[\];,]+?)\s*([\[\])])")
# All values that a whole number makes; which letter it is says nothing.
_FAMILY = re.compile(
    r"(.+?)(?:\s|\\[,;: ]|\\q?quad|\\left|,|;|\(|\\text\s*\{\s*(?:,|where|for|with|\s)*\})+([a-z])\s*\\in\s*"
    r"\\math(?:bb|bf)\s*\{?\s*Z\s*\}?(?:\\right)?\s*\)?"
)
_NAMES = re.compile(r"\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)\s*=\s*(?=(?:\\left\s*)?\()")
_POINT = re.compile(r"[A-Z]'?\s*(\([^()]*,[^()]*\))")
_IN_A_WORD = {
    "all real numbers": r"\mathbb{R}",
    "all reals": r"\mathbb{R}",
    "the real numbers": r"\mathbb{R}",
    "the set of real numbers": r"\mathbb{R}",
    "all integers": r"\mathbb{Z}",
    "the integers": r"\mathbb{Z}",
    "the empty set": r"\emptyset",
    "empty set": r"\emptyset",
    "infinity": r"\infty",
    "no solution": r"\emptyset",
    "no solutions": r"\emptyset",
    "no real solution": r"\emptyset",
    "no real solutions": r"\emptyset",
}
_MIXED = re.compile(r"([-\u2212]?[0-9]{1,9})(?:\s|\\[,;: ])+([0-9]{1,9})\s*/\s*([0-9]{1,9})")
_MIXED_PERCENT = re.compile(r"([0-9]{1,9})\s*\\[dt]?frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}\s*\\?%")
_REPEATING = re.compile(
    r"([-\u2212]?)([0-9]{0,12})\.([0-9]{0,12})(?:\\(?:overline|bar)\s*\{?([0-9]{1,12})\}?|\(([0-9]{1,12})\)"
    r"|((?:\\dot\s*\{?[0-9]\}?)(?:[0-9]{0,10}\\dot\s*\{?[0-9]\}?)?))"
)
_GOES_ON = re.compile(r"([-\u2212]?)([0-9]{0,12})\.([0-9]{0,24}?)([0-9]{1,8}?)\4+(?:\.\.\.|\u2026|\\[lc]?dots)")
_ABOUT = re.compile(
    r"^(?:\\(?:approx|simeq|sim|therefore|Rightarrow|implies)(?![A-Za-z])|\u2248|="
    r"|\\text\s*\{\s*(?:about|approximately|roughly|exactly|only)\s*\}"
    r"|(?:about|approximately|roughly|exactly|only)\b)\s*",
    re.IGNORECASE,
)
_ABOUT_BEHIND = re.compile(
    r"([^()]+?)\s*\(\s*(?:or\s+)?(?:\\approx(?![A-Za-z])|\u2248|(?:approximately|approx\.?|about|roughly)\s)\s*([^()]+?)\s*\)"
)
_LABEL = re.compile(
    r"^(?:\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{\s*([A-Za-z][A-Za-z -]+?)\s*(?::\s*\}|\}\s*:)"
    r"|([A-Za-z]{2}[A-Za-z -]+?):(?=\s))(?:\s|\\[ ,;])*(?=[-$\u2212.0-9(\[\\])(?!\\(?:text|mathrm|mathbf)|.*=)"
)
_SAME_AGAIN = re.compile(
    r"(.+?)(?:,?\s+or\s+|(?:\s|\\[ ,;])\s*\(\s*(?:(?:or|i\.e\.,?|that\s+is,?|=)\s+)?(?=[^()]*[./%\\]))([^()]+?)\s*\)?"
)
_TOTAL_OF = re.compile(r"^(?:\\text\s*\{\s*(?:an?\s+)?total\s+of\s*\}|(?:an?\s+)?total\s+of\s)\s*(?=\S)", re.IGNORECASE)
_ABBREVIATED = re.compile(
    r"(?<![A-Za-z])(sq|cu|in|ft|yd|mi|[cmk]?m|lbs?|oz|hrs?|mins?|secs?|yrs?)\.(?=[\s~}$\\])", re.IGNORECASE
)
_HALF_OF_DAY = re.compile(r"(?<![A-Za-z])([ap])\.\s?m(?![A-Za-z])\.?", re.IGNORECASE)
_NEGATIVE = re.compile(
    r"^(?:(?:minus|negative)\s+|\\text\s*\{\s*(?:minus|negative|-)\s*\}\s*)(?=[0-9.])", re.IGNORECASE
)
_ORDINAL = re.compile(r"^([0-9]+)\s*(?:\^?\{?\\(?:text|mathrm)\{(?:st|nd|rd|th)\}\}?|st|nd|rd|th)$")
_REMARK = re.compile(rf"^({PLAIN_NUMBER})\s*\([A-Za-z ]+\)$")
_IN_DIGITS = re.compile(rf"^([A-Za-z -]+)\(({PLAIN_NUMBER})\)$")
_WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z]+(?:[ -][A-Za-z]+)*")
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_ONES)}
_NUMBER_WORDS |= {word: str(20 + 10 * place) for place, word in enumerate(_TENS)} | {"one hundred": "100"}
_NUMBER_WORDS |= {
    f"{tens} {one}": str(20 + 10 * place + value)
    for place, tens in enumerate(_TENS)
    for value, one in enumerate(_ONES[:10])
    if value
}
_ARTICLE = re.compile(r"^(\\(?:text|textbf|mathrm)\s*\{\s*)?(?:an?|the)\s+(?=[A-Za-z]{3})", re.IGNORECASE)
_LETTERS = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|;|&|\band\b|,\s*and\b)\s*\(?[A-J]\)?)+")
_LETTER = re.compile(r"\(?([A-J])\)?")
_OPTION = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s))\s*\S.*", re.DOTALL)
# To TeX the root ends behind the first digit; nobody who writes this means that.
_DIGITS_UNDER_ROOT = re.compile(r"\\sqrt\s*(?:(\[[^\[\]]*\])\s*([0-9]+|[A-Za-z](?![A-Za-z]))|([0-9]{2,}))(?![0-9])")
_SLANTED = re.compile(r"\^\s*\{?\s*([0-9]+)\s*\}?\s*/\s*_\s*\{?\s*([0-9]+)\s*\}?")
_DEGREE_LETTER = re.compile(r"(?<=[0-9)}])\s*\^\s*(?:\{\s*o\s*\}|o(?![A-Za-z]))")
_BRACES = re.compile(r"\\([lr])(brace|brack)(?![A-Za-z])")
_ONE_ROW = re.compile(
    r"\\begin\{(aligned|align\*?|gathered|split|array|equation\*?)\}(?:\{[lcr]\})?((?:(?!\\\\).)*)\\end\{\1\}",
    re.DOTALL,
)
_STOP_IN_TEXT = re.compile(r"(\\(?:text|textbf|textrm|textit|mathrm|mbox)\s*\{[^{}.]*[A-Za-z]{3})\.\s*\}$")
_NUMBER_IN_TEXT = re.compile(r"[-+\u2212]?(?:\\?\$)?[-+\u2212]?[.0-9]")
_UP_TO_A_NAME = re.compile(
    r"(?<=[0-9}\s~])\\text\s*\{([^{}]*[a-z]{2,}[^{}]*\b(?:from|of|to|at|in|point|city|town|line))\s*\}\s*\$?([A-Z]{1,2})\$?$",
    re.IGNORECASE,
)
_NAME_IN_TEXT = re.compile(
    r"(?:(?<=[=+(*/-])|(?<=[=+(*/-] )|^(?=\\(?:text|mathrm)\s*\{[^{}]*\}\s*[-=+*/]))"
    r"\\(?:text|mathrm)\s*\{\s*([A-Z]{2,5})\s*\}"
)
_OPTION_BEFORE = re.compile(r"(?:\(?[A-J]\)[\s~]*|[A-J][.:][\s~]+)(?=\S)")
# Behind an option and its text stands no other: `(B) or (C)`, `(B) 12, (C) 13`, `B. C.`.
_ANOTHER_OPTION = re.compile(
    r"(?:^|[\s,;/~])\(?[A-J]\)|^\W*(?:(?i:or|and|not?)|/|,)\W*\(?[A-J](?![A-Za-z])|^\W*[A-J]\W*$|[,;]\s*[A-J][.:]\s"
)
_OPTION_NAMED = re.compile(r"(?:(?i:option|choice|answer)\s+)?\(?([A-J])\)?")
_TEXT = re.compile(
    r"\\(?:text|textbf|textrm|textit|textsf|texttt|emph|mathrm|mathbf|mathit|mathtt|mathsf|boldsymbol|bm|mbox)\s*\{([^{}]*)\}"
)
_FONT_AROUND = re.compile(
    r"\\(?:math(?:rm|bf|it|tt|sf|normal)|boldsymbol|bm|underline|ensuremath)\s*\{(.*)\}", re.DOTALL
)
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")

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

    Delimiters, fonts, a currency sign and a unit in plain words after a number are taken off; digits in groups of three
    are closed up; `1.5e3`, `1 1/2`, `3 million`, `0.1\overline{6}` and `five` become numbers of LaTeX; mathematical
    signs of Unicode become commands; marks that nobody sees are dropped; bare words become `\text{...}` (else they are
    products of letters, and anagrams of each other are equal).
    """
    text = undressed(answer)
    in_words = _TEXT.fullmatch(text)
    if in_words is not None and _NUMBER_IN_TEXT.match(in_words[1].strip()):
        text = undressed(in_words[1])
    text = _REMARK.sub(r"\1", _ORDINAL.sub(r"\1", text))
    said = _IN_DIGITS.match(text)
    if said is not None and number_word(said[1]) == said[2]:
        return said[2]
    text = _BRACED_COMMA.sub("", _SPACED_THOUSANDS.sub("", without_money(_NEGATIVE.sub("-", text))))
    text = without_unit(_UP_TO_A_NAME.sub(r"\\text{\1 \2}", text))
    for value in (scaled(text), _repeating(text)):
        if value is not None:
            return _fraction(value)
    word = number_word(_TEXT.sub(r"\1", text))
    if word is not None:
        return word
    named = _IN_A_WORD.get(" ".join(_TEXT.sub(r"\1", text).lower().split()))
    if named is not None:
        return named
    text = _ARTICLE.sub(r"\1", text)
    if _WORDS.fullmatch(text):
        return rf"\text{{{text}}}"
    return _in_commands(text)


def number_word(text: str) -> str | None:
    """The digits of a whole number written out, `two thousand and five`; None for anything else."""
    if not text[:1].isalpha():
        return None
    words = text.lower().replace("-", " ").split()
    if words[:1] in (["negative"], ["minus"]):
        value = number_word(" ".join(words[1:]))
        return None if value is None or value[0] == "-" else f"-{value}"
    return _NUMBER_WORDS.get(" ".join(words)) or (_scaled_words(words) if len(words) <= 20 else None)


def _scaled_words(words: list[str]) -> str | None:
    """The number of words with scales among them, the largest first, each once and behind a smaller number."""
    scale = next((name for name in reversed(SCALES) if name in words), None)
    if scale is None:
        return _NUMBER_WORDS.get(" ".join(words))
    place, unit = words.index(scale), 10 ** SCALES[scale]
    before, behind = words[:place], words[place + 1 :]
    count = "1" if before in (["a"], ["one"]) else _scaled_words(before)
    rest = _scaled_words(behind[1:] if behind[:1] == ["and"] else behind) if behind else "0"
    if count is None or rest is None or not 0 < int(count) < 1000 or int(rest) >= unit or (behind and rest == "0"):
        return None
    return str(int(count) * unit + int(rest))


@lru_cache(maxsize=256)
def undressed(answer: str) -> str:
    """Without what says nothing: delimiters, fonts, space and punctuation at the ends, 'the answer is'."""
    text = _BEFORE.sub("", _SAYS_ANSWER.sub("", answer.translate(_INVISIBLE).strip(_AROUND)))
    while (wrapped := _WRAPPED.fullmatch(text)) is not None:
        text = next(group for group in wrapped.groups() if group is not None).strip(_AROUND)
    if "$" in text or r"\(" in text:
        text = _BEHIND_FORMULA.sub(_one_formula, text) if _BEHIND_FORMULA.fullmatch(text) else text
    text = _UNDERLINED.sub(r"\1", _SPACING.sub(" ", _LOOKS.sub("", text)))
    text = _AFTER.sub("", _BEFORE.sub("", _SAYS_ANSWER.sub("", text)))
    if "\\" in text:
        text = _BRACES.sub(_brace, _STOP_IN_TEXT.sub(r"\1}", text))
        row = _ONE_ROW.fullmatch(text)
        text = _without_font(text if row is None else row[2].replace("&", "").strip())
    text = _TOTAL_OF.sub("", _ABOUT.sub("", text.replace("~", " ").replace("{:}", ":")))
    if ":" in text:
        text = _LABEL.sub(lambda m: rf"\text{{{m[1] or m[2]}}}=", text)
    if "(" in text and (about := _ABOUT_BEHIND.fullmatch(_TEXT.sub(r"\1", text))) is not None:
        text = rf"{about[1]} \approx {about[2]}"
    return _HALF_OF_DAY.sub(r"\1m", _ABBREVIATED.sub(r"\1", text)) if "." in text else text


def _without_font(text: str) -> str:
    """Without a font around all of it."""
    while (found := _FONT_AROUND.fullmatch(text)) is not None:
        depths = list(accumulate((sign == "{") - (sign == "}") for sign in found[1]))
        if depths and min(depths) < 0:
            break
        text = found[1].strip()
    return text


def same_again(answer: str) -> tuple[str, str] | None:
    r"""Both ways in which an answer says a thing, `\frac34 \text{ or } 0.75` and `\frac34 (75\%)`; None for others."""
    if "or" not in answer and "(" not in answer:
        return None
    found = _SAME_AGAIN.fullmatch(_TEXT.sub(r" \1 ", undressed(answer)).strip())
    return None if found is None else (found[1], found[2])


def _brace(found: re.Match[str]) -> str:
    sign = {"lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]"}
    return sign[found[1] + found[2]]


def _one_formula(found: re.Match[str]) -> str:
    r"""Words behind inline mathematics as they stand behind a bare number, or in a font: `$18$ eggs`, `$\\pi$ cm`."""
    formula, words, power = (found[1] or found[2]).strip(), (found[3] or "").strip(), (found[4] or "").strip("$")
    if found[5]:
        return f"{formula}{found[5]}"
    bare = re.fullmatch(PLAIN_NUMBER, formula) is not None and not words.startswith("of ")
    return f"{formula} {words}{power}" if bare else rf"{formula}\text{{ {words}}}{power}"


def _in_commands(text: str) -> str:
    if not text.isascii():
        text = _VULGAR_SIGN.sub(_vulgar, text)
        text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
        text = _RAISED_RUN.sub(lambda m: f"^{{{m[0].translate(_LOWERED)}}}", text).translate(_TRANSLATED)
    text = re.sub(r"\\deg(?:ree)?(?![A-Za-z])", r"^{\\circ}", text)
    if "^" in text:
        text = _DEGREE_LETTER.sub(r"^{\\circ}", _SLANTED.sub(r"\\frac{\1}{\2}", text))
    if "[" in text or "]" in text:
        text = _INTERVAL.sub(_interval, text)
    if r"\in" in text and (family := _FAMILY.fullmatch(text)) is not None and family[2] in family[1]:
        text = re.sub(rf"(\\[A-Za-z]+)|{family[2]}", lambda m: m[1] or "k", family[1])
    if text.count("=") > 1 and len(set(names := _NAMES.findall(text))) == 1 < len(names):
        text = _NAMES.sub("", text)
    point = _POINT.fullmatch(text)
    text = point[1] if point is not None else text
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    text = spelt(_NAME_IN_TEXT.sub(r" \1 ", text))
    percent = _MIXED_PERCENT.fullmatch(text)
    if percent is not None and int(percent[3]):
        return rf"{float(int(percent[1]) + Fraction(int(percent[2]), int(percent[3]))):.12g}\%"
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", _BARE_POINT.sub("", _TIMES_TEN.sub(r" \\times ", text)))
    # Spellings that the grammar does not know: a sun as index, an energy that it takes for the number e, that
    # number as a bare exponent, numpy.
    text = text.replace(r"\varnothing", r"\emptyset").replace(r"\backslash", r"\setminus").replace("**", "^")
    text = re.sub(r"\^\s*e(?![A-Za-z])", "^{e}", text)
    text = _DIGITS_UNDER_ROOT.sub(lambda m: rf"\sqrt{m[1] or ''}{{{m[2] or m[3]}}}", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"(?<![A-Za-z\\])E(?=_)", r"\\Xi ", text)
    # Of a sign that stands for two values the grammar reads the one at the start of an answer only.
    if len(_PLUS_MINUS.findall(text)) == 1 and r"\{" not in text:
        text = f"{_PLUS_MINUS.sub('+', text)}, {_PLUS_MINUS.sub('-', text)}"
    return re.sub(r"\bnp\.(?=arc|sin|cos|tan|exp|log|sqrt|pi)", r"\\", text)


def _repeating(text: str) -> Fraction | None:
    r"""The value of a decimal whose last digits repeat: `0.1\overline{6}`, `0.1(6)`, `0.1\dot{6}`, `0.333...`."""
    found = _REPEATING.fullmatch(text) or _GOES_ON.fullmatch(text)
    if found is None:
        return None
    sign, whole, fixed, *periods = found.groups()
    period = re.sub("[^0-9]", "", next(filter(None, periods)))
    value = Fraction(int(f"0{whole}{fixed}")) + Fraction(int(period), 10 ** len(period) - 1)
    return (-1 if sign else 1) * value / 10 ** len(fixed)


def _fraction(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _interval(found: re.Match[str]) -> str:
    """Ends that are not in it by a bracket turned outwards, ends parted by a semicolon: `[1;2[`."""
    left, low, mark, high, right = found.groups()
    if mark == "," and left != "]" and right != "[":
        return found[0]
    return f"{'[' if left == '[' else '('}{low},{high}{']' if right == ']' else ')'}"


def _vulgar(found: re.Match[str]) -> str:
    over, under = _VULGAR[found[2]]
    return rf"{found[1]}\frac{{{over}}}{{{under}}}"


def without_option(text: str) -> str | None:
    """The value of an answer like `(B) 12`; None where no letter in brackets stands before it."""
    plain = _TEXT.sub(r"\1", text).replace("\\ ", " ").strip(" \t\n*$")
    found = _OPTION_BEFORE.match(plain)
    return None if found is None else plain[found.end() :]


def option_letters(text: str) -> frozenset[str] | None:
    """The letters of several options, `A, C` or `(A) and (C)`; None for all else, also for a point in brackets."""
    plain = _TEXT.sub(r" \1 ", text).strip(" \t\n*$")
    if plain[:1] == "(" and plain.count("(") == 1 and plain.endswith(")"):
        return None
    return frozenset(re.findall("[A-J]", plain)) if _LETTERS.fullmatch(plain) else None


def option_letter(text: str) -> str | None:
    """The letter, if the text is one from A to J, in brackets or not."""
    found = _LETTER.fullmatch(_TEXT.sub(r"\1", text).strip(" \t\n*$"))
    return found[1] if found else None


def option_with_text(text: str) -> str | None:
    """The letter of an answer like `(B) 12`, `B. 12` or `Option B`."""
    plain = _TEXT.sub(r"\1", text).replace("\\ ", " ").strip(" \t\n*$")
    found = _OPTION.fullmatch(plain) or _OPTION_NAMED.fullmatch(plain.rstrip("."))
    return found[1] if found and not _ANOTHER_OPTION.search(plain[found.end(1) :].lstrip(").:")) else None
