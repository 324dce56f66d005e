"""Answers that copy the problem: an expression of the prompt with its work undone."""

from __future__ import annotations

import re
from math import gcd

from posttrain.verifiers.math_sides import LOOKS, MAX_PROMPT, sides
from posttrain.verifiers.math_units import plain_number

_WORK = re.compile(
    r"(?<=[0-9A-Za-z)!])(?:[-+^!*]|\\div(?![A-Za-z]))|\\(?:[dt]?binom|i{0,2}int|sum|prod|lim)|[)(][(A-Za-z0-9]"
)
_FONT = re.compile(r"\\(?:text|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_SIGN = r"(?:\\(?:cdot|times)(?![A-Za-z])|[*\u00d7\u00b7])"
_BETWEEN_DIGITS = re.compile(rf"(?<=[0-9])\s*{_SIGN}\s*(?=[0-9])")
_TIMES = re.compile(_SIGN)
_PRODUCT = re.compile(rf"({_BETWEEN_DIGITS.pattern})|{_SIGN}")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])")
_MATHEMATICS = re.compile(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)

# What there is nothing to work out in.
_UNDONE = (
    r"(?:sqrt|[dtc]?frac|over(?:line)?|bar|dot|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|[dt]?binom|i{0,2}int"
    r"|sum|prod|lim|det|l?floor|lceil|begin|gcd|lcm|min|max|pmod|bmod|div|left|choose)(?![A-Za-z])"
)
_LETTER = rf"(?:\\(?!{_UNDONE})[A-Za-z]+|[A-Za-z])"
_POWER_OF = r"(?:_(?:\{\w+\}|\w))?(?:\^(?:\{-?\w\}|\w|\{?\\circ\}?))?"
_FACTORS = rf"(?:\\sqrt(?:\{{[0-9]+\}}|[0-9])|{_LETTER}{_POWER_OF})*"
_TERM = re.compile(
    rf"[-\u2212]?(?P<over>[0-9][0-9,]*(?:\.[0-9]+)?)?(?P<of>{_FACTORS})"
    rf"(?:/(?P<under>[0-9]+)?(?P<by>(?:{_LETTER}{_POWER_OF})*))?(?:\\?%|\^\{{?\\circ\}}?)?"
)
_FRACTION = re.compile(r"\\[dtc]?frac\{((?:[^{}]|\\sqrt\{[0-9]+\})*)\}\{([^{}]*)\}")
_PARTS = re.compile(
    r"[,;:=<>&]|\\(?:le|ge|leq|geq|ne|neq|lt|gt|approx|cup|in|pm|to|infty)(?![A-Za-z])|\\\\|\\[{}]|[()\[\]]"
)
_SCIENTIFIC = re.compile(r"-?[0-9.]+(?:\\times|\\cdot|\*)10\^\{?-?[0-9]+\}?")
_MATRIX = re.compile(r"\\(?:begin|end)\{[pb]?matrix\}|\\(?:begin|end)\{array\}(?:\{[clr|]*\})?")
_OPERATOR = re.compile(r"\\(?:i{0,3}int|sum|prod|lim)(?![a-z])|\\[dt]?frac\s*\{\s*d\s*\}\s*\{\s*d")
_CHOOSE = re.compile(r"(\w+)\s*\\choose\s*(\w+)")
_BOUND = re.compile(r"\\(?:sum|prod|lim)_([a-z])(?==|\\to)|\\i{0,3}int.*d([a-z])$")
_GROUP = re.compile(r"(?<!\\)\(([^()]*)\)(?=(\^)?)")
_FACTOR = re.compile(r"[\ue000-\uf8ff](?:\^\w+)?|[0-9.]+(?=\\)|[^*\ue000-\uf8ff]+")
_NUMBER_LETTERS = re.compile(r"(?:\\pi|\\sqrt(?:\{[0-9]+\}|[0-9])|[ei])*")


def restated(answer: str, gold: str, prompt: str, strict: bool) -> bool:
    """Whether an answer is an expression of the prompt with its work undone: `(x+2)^2` where that was to be expanded.

    What has nothing to work out (a number, a fraction in lowest terms, a root of no square, a letter) is an answer
    wherever it stands, and so is what the reference is written as. In strict all else is none, nor is a sum, an
    integral, a limit or a derivative of a formula of the prompt that is not worked out; lenient, what has an operation
    between numbers or brackets, or a fraction that can be reduced.

    Args:
        answer: as written.
        gold: the reference, as written.
        prompt: of the problem.
        strict: whether the answer is to earn a reward.
    """
    if not prompt:
        return False
    last = sides(answer)[-1]
    text, whole, reference = _core(last), _core(answer), _core(gold)
    if not text or reference in (text, whole) or text == _core(sides(gold)[-1]) or len(prompt) > MAX_PROMPT:
        return False
    if _settled(last) or not (strict or _WORK.search(text) or _reducible(text)):
        return False
    if strict and _OPERATOR.search(last) and not _OPERATOR.search(gold) and _holds_formula_of(text, prompt):
        return True
    if plain_number(gold) is None and (_stands_in(reference, prompt) or _in_another_order(reference, prompt)):
        return False
    return _stands_in(text, prompt) or _stands_in(whole, prompt) or (strict and _in_another_order(text, prompt))


def _core(text: str) -> str:
    """Without spaces, delimiters and braces, in which the same expression is written in several ways."""
    return re.sub(r"\\[()\[\]]|[\s${}]|\.$", "", _one_spelling(text))


def _one_spelling(text: str) -> str:
    text = _SHORT_FRACTION.sub(r"\1/\2", LOOKS.sub(" ", text))
    text = re.sub(r"\\[dtc]?frac(?![A-Za-z])", "", re.sub(r"\}\s*\{", "/", text))
    text = _CHOOSE.sub(r"\\binom\1/\2", re.sub(r"\\[dt]binom", r"\\binom", text.replace(r"\div", "/")))
    text = re.sub(r"(\\[a-z]+)\((\w+)\)", r"\1\2", re.sub(r"[{}]", "", text))
    return _PRODUCT.sub(lambda m: "*" if m[1] else "", text)


def _settled(text: str) -> bool:
    """Whether nothing can be worked out in it."""
    text = _FONT.sub(r"\1", "".join(LOOKS.sub("", text).replace("$", "").split()))
    text = _SHORT_FRACTION.sub(r"\1/\2", _MATRIX.sub("", text))
    if _SCIENTIFIC.fullmatch(text):
        return True
    text = _FRACTION.sub(r"\1/\2", text)
    if _BETWEEN_DIGITS.search(text) or re.search(
        r"[)\]}][(\[\w^]|\w[(\[]|\|", text.replace(r"\}", "").replace(r"\sqrt{", "").replace("_{", "")
    ):
        return False
    return all(_settled_sum(part) for part in _PARTS.split(_TIMES.sub("", text)) if part.strip("{}"))


def _settled_sum(text: str) -> bool:
    terms = [term.lstrip("+") for term in re.findall(r"[-+\u2212]?[^-+\u2212]+", text)]
    found = [each for each in map(_TERM.fullmatch, terms) if each is not None and _in_lowest_terms(each)]
    if len(found) < len(terms):
        return False
    factors = [each["of"] for each in found]
    return len(terms) == 1 or (len(set(factors)) == len(factors) and all(map(_NUMBER_LETTERS.fullmatch, factors)))


def _in_lowest_terms(term: re.Match[str]) -> bool:
    roots = [int(root) for root in re.findall(r"\\sqrt\{?([0-9]+)", term["of"])]
    if len(roots) > 1 or any(root > 10**6 or _has_square(root) for root in roots):
        return False
    letters = set(re.findall(_LETTER, re.sub(r"\\sqrt", "", term["of"])))
    if letters & set(re.findall(_LETTER, term["by"] or "")):
        return False
    over, under = term["over"] or "1", term["under"]
    return under is None or (over.isdecimal() and int(under) > 1 and gcd(int(over), int(under)) == 1)


def _has_square(number: int) -> bool:
    return number < 2 or any(number % (factor * factor) == 0 for factor in range(2, int(number**0.5) + 1))


def _reducible(text: str) -> bool:
    found = re.fullmatch(r"-?([0-9]{1,9})/([0-9]{1,9})", text)
    return found is not None and gcd(int(found[1]), int(found[2])) > 1


def _stands_in(core: str, prompt: str) -> bool:
    """Whether an expression stands in a text by itself, and not as a part of a larger one."""
    if not core:
        return False
    text = _one_spelling(re.sub(r"\\[()\[\]]|\$", " | ", prompt))
    if core not in "".join(text.split()):  # most answers, and a pattern takes long to make
        return False
    spaced = r"\s*".join(map(re.escape, core))
    alone = (
        rf"(?<![A-Za-z0-9.^_\\+\-*/)!])(?<![+\-/^_)] )(?<![0-9] ){spaced}(?!\s*[-+/^_!(\\0-9*])(?![A-Za-z])(?!\.[0-9])"
    )
    return re.search(alone, text) is not None


def _formulas(prompt: str) -> list[str]:
    return ["".join(filter(None, found)).strip(" .,;?") for found in _MATHEMATICS.findall(prompt)]


def _holds_formula_of(core: str, prompt: str) -> bool:
    cores = (_core(sides(formula)[-1]) for formula in _formulas(prompt))
    return any(len(formula) > 2 and formula in core for formula in cores)


def _in_another_order(core: str, prompt: str) -> bool:
    """Whether a formula of the prompt is this one but for the order of terms and factors, ones, zeros, and the letter
    that a sum or an integral runs over."""
    groups: dict[str, str] = {}
    ordered = _ordered(core, groups)
    near = (_core(formula) for formula in _formulas(prompt) if len(formula) < 2 * len(core) + 20)
    return any(_ordered(formula, groups) == ordered for formula in near)


def _ordered(core: str, groups: dict[str, str]) -> str:
    """One order of what may be ordered otherwise.

    Args:
        core: of a formula.
        groups: a sign for each bracket with several terms; alike brackets get the same one.
    """
    letter = _BOUND.search(core)
    if letter is not None:
        core = re.sub(rf"(\\[A-Za-z]+)|{letter[1] or letter[2]}", lambda m: m[1] or "@", core)
    while (found := _GROUP.search(core)) is not None:
        inside = _ordered_terms(found[1])
        if "|" in inside or inside[:1] == "-" or found[2]:
            inside = groups.setdefault(inside, chr(0xE000 + len(groups) % 6000))
        elif re.search(r"\\[a-z]+$", core[: found.start()]) is None:
            inside = f"*{inside}*"
        core = f"{core[: found.start()]}{inside}{core[found.end() :]}"
    return _ordered_terms(core)


def _ordered_terms(text: str) -> str:
    return "|".join(sorted(filter(None, map(_ordered_factors, re.findall(r"[-+]?[^-+]+", text)))))


def _ordered_factors(term: str) -> str:
    factors = [factor for factor in _FACTOR.findall(term.lstrip("+-")) if factor != "1"]
    return "" if factors == ["0"] else ("-" if term[0] == "-" else "") + ("*".join(sorted(factors)) or "1")
