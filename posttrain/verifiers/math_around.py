"""What stands around a marked answer: an expression that it is a part of, words that deny it, a later correction.

Written after the outputs of models and the solutions of Minerva: units, powers of units, percent and money behind a
box, bullets, dashes and stars before it leave its value alone; operators, powers, roots and factors do not.
"""

from __future__ import annotations

import re

WINDOW = 120
"""Characters before and behind an answer that are looked at."""

_NUMBER = r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?"
_FONTS = frozenset(
    "text textbf textrm textit mathrm mathbf mathit mathsf boldsymbol bm bf underline color textcolor large Large huge"
    " mbox hbox displaystyle ensuremath emph tag".split()
)
_OPENED = re.compile(r"(?:\\([A-Za-z]+)\*?\s*(?:\{[^{}]*\}\s*|\[[^\[\]]*\]\s*)*|([\^_])\s*)?\{$")
_COMMAND = re.compile(r"\\([A-Za-z]+)$")
_SPACES = re.compile(r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z])|\\left(?![A-Za-z])|\\\$)+$")
_SPACES_BEHIND = re.compile(r"(?:[ \t~]|\\[,;:! ]|\\q?quad(?![A-Za-z]))*")
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda nu xi pi rho sigma tau phi chi psi omega".split()
)
_FUNCTIONS = "sqrt sin cos tan cot sec csc arcsin arccos arctan log ln lg exp".split()
_OPERATORS_BEFORE = frozenset(["cdot", "times", "div", "pm", "mp", "ne", "neq", *_GREEK, *_FUNCTIONS])
_FACTORS_BEHIND = frozenset([*_GREEK, *_FUNCTIONS])
_PRODUCT_BEFORE = re.compile(r"\\[dtc]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}$|\\sqrt\s*\{[^{}]*\}$|(?<![A-Za-z\\])[a-z]$")
_FUNCTION_BEFORE = re.compile(r"\\(?:log|sin|cos|tan|cot|sec|csc|ln)\s*[_^]\s*(?:\{[^{}]*\}|\w)$")
_VERB = re.compile(r"\b(?:is|are|be|was|equals?|to|get|minus)$", re.IGNORECASE)
_WHOLE_BEFORE_POINT = re.compile(r"[0-9][.,]$")
_COUNTS_A_POINT = re.compile(r"(?:\s*|.*\b(?:step|part|case|problem|question)\s+)[1-9][0-9]?\.", re.IGNORECASE)
_SAID_ALREADY = re.compile(r"(?<![0-9.,])([0-9]+(?:[.,][0-9]+)*)\.$")
_TEXT_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}$|\([a-z0-9]\)$")
_IN_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_OPERAND = r"(?:[0-9.({]|\\(?:frac|dfrac|tfrac|sqrt|pi|left|binom)(?![A-Za-z])|[A-Za-z](?![A-Za-z]))"
_ADDED = re.compile(rf"(?:[+\-\u2212]|\*(?!\*)|[\u00d7\u00b7\u00f7]|\\(?:cdot|times|div)(?![A-Za-z]))\s*{_OPERAND}")
_DIVIDED = re.compile(r"/\s*(?:[0-9(]|\\(?:frac|sqrt|pi)(?![A-Za-z])|[a-fi-ln-rt-z](?![A-Za-z]))")
_POWER = re.compile(
    r"\^\s*(?!\s*\{?\s*(?:\\circ|\\prime|\\text|\\mathrm|\\degree|'|st\b|nd\b|rd\b|th\b|o\b))|[\u00b2\u00b3]"
)
_FACTORIAL = re.compile(r"!+\s*(?:\$|\\[)\]]|[-+*/=])")
# Letters that are no unit: m, s, g, h, l, d and capitals may be one.
_VARIABLE = "[bcefijkn-rt-z]"
_FACTOR = re.compile(
    rf"[0-9]|{_VARIABLE}(?![A-Za-z])|\\[dtc]?frac\s*\{{\s*(?:[0-9]|\\pi|\\sqrt)"
    r"|(?:\\left\s*)?\((?=[^()]*[+\-])(?![^()]*[A-Za-z]{2})[^()]*\)"
)
_BESIDE = re.compile(rf"[0-9][0-9.,]*\s*(?:\$|\\[)\]]|$)|{_VARIABLE}\s*(?:\$|\\[)\]]|\^)")

_DENYING = (
    *"n' not never nor other rather instead but except unlike hardly doubt deny false wrong untrue nicht".split(),
    *("no ", " ne "),
)
_DENIAL = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|except|unlike)|n['\u2019]t|\b(?:other|rather)\s+than|\binstead\s+of|\banything\s+but)"
    r"(?:\s+(?:be|been|equal(?:\s+to)?|equals|only|just|really|simply|(?:the\s+)?(?:final\s+|correct\s+|right\s+)*answer"
    r"(?:\s+is)?))*$",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"(?:(?:\b(?:not|never|hardly|cannot)|n['\u2019]t)\s+(?:\w+\s+){0,2}(?:think|believe|say|claim|mean|agree|true|certain|sure|case"
    r"|convinced)\b|\b(?:doubt|deny)\b|\b(?:false|wrong|untrue)\s+(?:that|to\s+say)\b)(?!.*\b(?:but|so|thus|hence|then|yet)\b)"
    r"[^.;,]*$",
    re.IGNORECASE | re.DOTALL,
)
_NO_ = r"(?:not|never|cannot|hardly|nobody|no\s+one|n['\u2019]t)"
# Two denials that cancel.
_AFFIRMED = re.compile(
    rf"\b(?:no|without|beyond|little)\s+(?:(?:any|all|a|an|the|shadow|of|reasonable|slightest|real|serious)\s+)*doubt\b"
    rf"|\bno\s+denying\b|{_NO_}\s+(?:(?!but\b)\w+\s+){{0,2}}(?:doubt|deny)\b"
    rf"|{_NO_}\s+(?:\w+\s+){{0,2}}(?:wrong|false|untrue|incorrect)\b"
    rf"|\b(?:none|nothing|no\s+one|nobody|no\s+(?:\w+\s+){{1,2}}|{_NO_}\s+(?:\w+\s+){{0,2}}any(?:thing|one)?\s+(?:\w+\s+)?)"
    r"\s*(?:other\s+than|but|except(?:\s+for)?)$",
)
# Values that are said to be left out of all others: what cannot be is what was asked for.
_LEFT_OUT = re.compile(
    r"(?:\b(?:can|could|may|might)\s+(?:\w+\s+){1,2}(?:any|every|all)\w*|\bfor\s+(?:any|every|all|each)\b"
    r"|\b(?:all|every|each)\s|\b(?:everywhere|everything|defined)\b)"
    r"[^.;,]{0,40}\b(?:other\s+than|but|except(?:\s+(?:for|at|when|where))?)(?:\s+\$?[a-z]\s*(?:=|is|equals))?$"
)
_DENIED_BEHIND = re.compile(
    r"\?\s*\**(?:no|nope|wrong|incorrect)\b"
    r"|(?:is|was|would\s+be)\s+(?:\w+ly\s+|also\s+)?(?:wrong|incorrect|false|invalid|a\s+mistake)\b"
    r"|(?:is|was|does|can|could|would|will)\s*(?:not|n['\u2019]t)\s+(?:be\s+)?(?:the\s+|a\s+|my\s+|our\s+)?"
    r"(?:final\s+|correct\s+|right\s+|valid\s+)*(?:answer|solution|correct|right|valid|true|work|it)\b(?!-)"
    r"|\(\s*(?:wrong|incorrect|not\s+(?:right|correct))\b",
    re.IGNORECASE,
)
_OPENING = " \t\n$*({}\\[:\uff1a"
# "Is not" in Chinese, Japanese, Spanish, Portuguese, Italian, French, German and Russian; before and behind.
_DENIED_ELSEWHERE = re.compile(
    r"(?:(?<!\u662f)\u4e0d(?:\u662f|\u4e3a|\u7b49\u4e8e|\u7b49\u65bc|\u53ef\u80fd\u662f|\u80fd\u662f|\u5e94\u4e3a|\u5e94\u8be5\u662f|\u6703\u662f|\u4f1a\u662f)|\u5e76\u975e"
    r"|\bno\s+(?:es|son|era|sea|puede\s+ser)(?:\s+igual\s+a)?|\bn\u00e3o\s+(?:\u00e9|s\u00e3o|era|pode\s+ser)"
    r"|\bnon\s+(?:\u00e8|sono|era|pu\u00f2\s+essere)|\bn['\u2019](?:est|\u00e9tait)\s+(?:\w+\s+)?pas|\bne\s+(?:sont|peut|vaut)\s+pas(?:\s+\u00eatre)?"
    r"|\bnicht(?:\s+gleich)?|(?<!\w)\u043d\u0435(?:\s+(?:\u0440\u0430\u0432\u0435\u043d|\u0440\u0430\u0432\u043d\u0430|\u0440\u0430\u0432\u043d\u043e|\u0440\u0430\u0432\u043d\u044f\u0435\u0442\u0441\u044f|\u044f\u0432\u043b\u044f\u0435\u0442\u0441\u044f))?)$"
)
_WRONG_ELSEWHERE = re.compile(
    r"(?:\u4e0d\u662f(?:\u6b63\u786e)?\u7b54\u6848|\u4e0d\u5bf9|\u4e0d\u6b63\u786e|\u662f\u9519|\u9519\u4e86|(?:\u3067\u306f|\u3058\u3083)(?:\u306a\u3044|\u3042\u308a\u307e\u305b\u3093)|\u4e0d\u6210\u7acb"
    r"|no\s+es\s+(?:la\s+|una\s+)?(?:respuesta|soluci\u00f3n|correct[ao])|es\s+(?:incorrect[ao]|fals[ao])\b"
    r"|n['\u2019]est\s+pas\s+(?:la\s+|une\s+)?(?:(?:bonne\s+)?r\u00e9ponse|solution|juste|correct)|est\s+(?:fau(?:x|sse)|incorrecte?)\b"
    r"|ist\s+(?:falsch|nicht\s+(?:die|richtig|korrekt|das))\b)",
    re.IGNORECASE,
)
_INTERJECTION = r"(?:(?:wait|but|no|hmm+|oh|oops|sorry|actually|however|unfortunately|yet)\b[,.!\u2026\s]*)"
_WITHDRAWN = re.compile(
    rf"[\s.,;!]*{_INTERJECTION}{{0,3}}(?:that|this|it|my\s+answer|the\s+answer)(?:'s|\s+is|\s+was|\s+must\s+be|\s+seems"
    r"|\s+looks)\s+(?:\w+ly\s+)?(?:wrong|incorrect|false|not\s+(?:right|correct|true)|a\s+mistake|an\s+error)\b(?!\s+(?:to|that)\b)",
    re.IGNORECASE,
)
_CORRECTED = re.compile(
    r"(?:\b(?:(?:wait|no|hmm+|oh|oops|sorry|actually|correction|rather|scratch\s+that|(?:just\s+)?kidding|jk|nope|on\s+second\s+thoughts?|i\s+(?:meant?|think|guess|believe)|alternatively|make\s+that)"
    r"\b[,.:!\u2026\s]*){1,4}(?:(?:it|that|this|the\s+answer|[a-z])\s*(?:'s|\s+is|\s+should\s+be|\s+must\s+be|=)\s+)?"
    r"|\A[\s.,;!$*)\]}\\]*(?:it|that|this|the\s+value)\s+(?:should|must)\s+(?:\w+ly\s+)?(?:be|have\s+been)\s+)"
    rf"\$?({_NUMBER})\$?\s*(?:[.,;!)](?!\w)|\n|$|(?!fails|works|does|will|would|is|was|has|can)[a-z]+\s*(?:[.!]|$))",
    re.IGNORECASE,
)
_LISTED = re.compile(
    rf"\$?\s*(?:[,;&]|\\?\band\b|\.\s+Or\b)\s*(?:and\s+|maybe\s+)?\$?{_NUMBER}\$?\s*(?:[.;]?\s*$|[.;,]\s|\n)"
)
_EQUALS = re.compile(rf"\s*=\s*({_NUMBER})\s*(?:\$|\\[)\]]|\.?\s*$|\.\s|\n)")


def part_of_more(text: str, start: int, end: int) -> bool:
    r"""Whether the answer between two places is an operand of a larger expression: `1/\boxed{6}`, `\boxed{6}^2`.

    Args:
        text: of a solution.
        start: where the mark begins.
        end: behind the mark.
    """
    if text[start - 1 : start] == text[end : end + 1] == "$" and text[start - 2 : start - 1] == " ":  # most answers
        return False
    line = text[max(0, start - WINDOW) : start].rpartition("\n")[2]
    said = _SAID_ALREADY.search(line) if line.endswith(".") else None
    if said is not None and text[:end].rstrip("$}").endswith(f"{{{said[1]}"):  # a sentence that ends in the same number
        line = ""
    return _operand_behind_of(line) or _operand_before_of(text[end : end + WINDOW].partition("\n")[0])


def denied(text: str, start: int) -> bool:
    """Whether the words right before a place deny what stands there: `is not`, `I do not think the answer is`."""
    before = text[max(0, start - 80) : start].lower()
    if before.isascii() and not any(map(before.__contains__, _DENYING)):
        return False
    if _DENIED_ELSEWHERE.search(before.rstrip(_OPENING)):
        return True
    whole = text[max(0, start - WINDOW) : start].lower().rstrip(_OPENING)
    if "nswer" not in whole and _LEFT_OUT.search(whole):
        return False
    before = _AFFIRMED.sub(" ", whole)[-80:].rstrip()
    return (_DENIAL.search(before) or _DOUBT.search(before)) is not None


def taken_back(behind: str) -> bool:
    """Whether the words right behind an answer deny it, or list another beside it: `is wrong`, `, 6`."""
    if _LISTED.match(behind):
        return True
    words = behind.lstrip(" \t$*})\\]")
    return (_DENIED_BEHIND.match(words) or _WITHDRAWN.match(words) or _WRONG_ELSEWHERE.match(words)) is not None


def corrected(behind: str) -> str:
    """The number that a text behind an answer puts in its place: `Wait, it should be 6`; empty without one."""
    found = _CORRECTED.findall(behind)
    return found[-1] if found else ""


def set_equal(behind: str) -> str:
    """The plain number that an equation says the answer before it is: `= 6`; empty without one."""
    found = _EQUALS.match(behind)
    return found[1] if found else ""


def _operand_behind_of(line: str) -> bool:
    """Whether the end of a line makes what follows an operand."""
    if line.endswith((" ", "$")) and line.rstrip()[-2:].isalpha() and "\\" not in line[-12:]:
        return False
    if line.endswith("$") and not line.endswith(r"\$"):
        return False
    while True:
        text = _SPACES.sub("", line)
        spaced = len(text) < len(line)
        if text.endswith("{") and not text.endswith(r"\{"):
            opened = _OPENED.search(text)
            if opened[2] or (opened[1] and opened[1] not in _FONTS):
                return True
            line = text[: opened.start()]
        elif text.endswith("(") and not text.endswith(r"\("):
            if re.search(r"(?<![A-Za-z])[A-Za-z]\($", text):
                return True
            line = text[:-1]
        else:
            break
    last = text[-1:]
    if last in (".", ",") and not spaced:
        return _WHOLE_BEFORE_POINT.search(text) is not None and _COUNTS_A_POINT.fullmatch(text) is None
    if last in "-\u2212\u2013" and last:
        return not _is_dash(text[:-1], spaced)
    if last == "+":
        return re.search(r"[0-9A-Za-z)}]\s*\+$", text) is not None
    if last == "*":
        return re.search(r"[0-9)}]\*$" if not spaced else r"[0-9)}]\s+\*$", text) is not None
    if last == "=":
        # `3!=` is a factorial.
        return text.endswith(r"\not=") or re.search(r"(?<![0-9A-Za-z)}])!=$", text) is not None
    if last and last in "^_/\u00f7\u00d7\u00b7\u221a\u2260":
        return True
    if _FUNCTION_BEFORE.search(text):
        return True
    command = _COMMAND.search(text)
    if command is not None:
        return command[1] in _OPERATORS_BEFORE
    return not spaced and (last.isdigit() or _PRODUCT_BEFORE.search(text) is not None)


def _is_dash(before: str, spaced: bool) -> bool:
    """Whether a minus sign is the bullet of a list or the dash of a sentence."""
    text = before.rstrip(" \t*_")
    if not text:
        return spaced
    if _VERB.search(text):
        return False
    if _TEXT_WORD.search(text):
        return spaced or text == before
    in_formula = before.count("$") % 2 == 1 or r"\(" in before or r"\[" in before or "=" in before
    return spaced and not in_formula and _IN_WORDS.search(before) is not None


def _operand_before_of(behind: str) -> bool:
    """Whether the beginning of a text makes what stands before it an operand."""
    closed = behind.lstrip("})")
    text = closed[_SPACES_BEHIND.match(closed).end() :]
    if re.match(r"\.\d|,\d{3}(?!\d)", closed):
        return True
    first = text[:1]
    if not first or first in "$.,;:?'\"":
        return False
    for pattern in (_ADDED, _DIVIDED, _POWER, _FACTORIAL):
        if pattern.match(text):
            return True
    command = re.match(r"\\([A-Za-z]+)", text)
    if command is not None and command[1] in _FACTORS_BEHIND:
        return True
    return (_FACTOR if text == closed else _BESIDE).match(text) is not None
