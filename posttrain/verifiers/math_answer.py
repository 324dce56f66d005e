"""Where a solution states its final answer, and that answer as LaTeX that math-verify reads as it was meant."""

from __future__ import annotations

import re
from dataclasses import dataclass

TAIL = 8_000
"""Characters at the end of a completion in which the final answer must stand."""

MAX_ANSWER = 1_000
"""Characters of an answer; longer ones are not parsed."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(.*)$", re.MULTILINE)
_ANSWER_IS = re.compile(r"\banswer\b(?:\s+is\b|\s+to\b.{0,200}?\bis\b|\s*[:=])\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;](?=[\s$*)\\]|$)|[!?](?=\s|$)|\n\s*\n|\u3002")
_ALTERNATIVE = re.compile(r"\bor\b(?:\s+[a-z]+){0,2}[\s$({]*(?:[-+\u2212]?\.?[0-9]|\\)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stated:
    """Attributes:
    answer: the final answer as written; several joined by commas.
    problem: why it cannot count although something is stated; empty if it can.
    """

    answer: str
    problem: str = ""


def final_answer(text: str) -> Stated | None:
    r"""The one final answer of a solution, or None if it states none.

    Looked for in this order, in the last `TAIL` characters: the last `\boxed{...}`; the last line `#### ...`;
    `answer is ...` (or `answer: ...`) in the last line. Of several boxes the last counts. But a final sentence with
    several different boxes states several answers; they are kept together, so that they equal a reference with just
    these answers and no other. An "or" and another value after the box is a problem.
    """
    text = text[-TAIL:]
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    hashes = _HASHES.findall(text)
    if hashes:
        return Stated(hashes[-1].strip()) if hashes[-1].strip() else None
    last_line = text.strip().rpartition("\n")[2]
    phrases = list(_ANSWER_IS.finditer(last_line))
    return _sentence(last_line[phrases[-1].end() :]) if phrases else None


def _boxed(text: str) -> Stated | None:
    boxes: list[tuple[int, int, str]] = []
    position = 0
    while (start := _BOX.search(text, position)) is not None:
        end = _closing_brace(text, start.end())
        if end is None:
            return Stated("", "the last box is not closed")
        boxes.append((start.start(), end + 1, text[start.end() : end].strip()))
        position = end + 1
    if not boxes:
        return None
    answers = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        if _SENTENCE_END.search(text, end, start) or end - start > 200:
            break
        if content not in answers:
            answers.insert(0, content)
    rest = text[boxes[-1][1] :]
    stop = _SENTENCE_END.search(rest)
    if _ALTERNATIVE.search(rest[: stop.start()] if stop else rest):
        return Stated(", ".join(answers), "an alternative follows the box")
    return Stated(", ".join(answers))


def _closing_brace(text: str, position: int) -> int | None:
    r"""Index of the brace that closes the one before `position`; escaped braces are text."""
    depth = 1
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def _sentence(text: str) -> Stated | None:
    """The answer up to the end of its sentence; None if a digit follows, since then it is not the last word."""
    stop = _SENTENCE_END.search(text)
    answer, rest = (text[: stop.start()], text[stop.end() :]) if stop else (text, "")
    if not answer.strip(" *$\t\n") or re.search(r"\d", rest):
        return None
    return Stated(answer.strip())


# ------------------------------------------------------------------------------------------------- the answer as LaTeX

_AROUND = " \t\n*"
_WRAPPED = re.compile(r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\(([^)]*)\\\)|\\\[([^]]*)\\\]")
_PLAIN_NUMBER = r"[-+\u2212]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)"
_CURRENCY = re.compile(r"^([-\u2212]?)\s*(?:\\?[$\u20ac\u00a3]|\\text\s*\{\s*\\?[$\u20ac\u00a3]\s*\})\s*(?=[.0-9])")
_SPACED_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,;: !]|~|[ \u00a0\u202f])(?=[0-9]{3}(?![0-9]))")
_BRACED_COMMA = re.compile(r"(?<=[0-9])\{,\}(?=[0-9]{3})")
_BARE_POINT = re.compile(r"(?<=[0-9])\.(?=/)")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([-+]?[0-9]{1,4})(?![A-Za-z0-9.])")
_WITH_UNIT = re.compile(
    rf"({_PLAIN_NUMBER})\s+((?:[a-z]{{3,}}|[ckm]m|[km]g|ml|lb|oz|ft|hr)(?:[ /][a-z]+)*)", re.IGNORECASE
)
_NOT_UNITS = {
    "plus",
    "minus",
    "times",
    "squared",
    "cubed",
    "and",
    "percent",
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "dozen",
    "choose",
}
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "mod"}
_WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z]+(?:[ -][A-Za-z]+)*")


def as_latex(answer: str) -> str:
    r"""The same answer, with what math-verify would misread written out.

    Delimiters, a currency sign and a unit in plain words after a number are taken off; `1.5e3` becomes a power of ten,
    digits in groups of three are closed up, and bare words become `\text{...}` (else they are products of letters,
    and anagrams of each other are equal).
    """
    text = answer.strip(_AROUND)
    while (wrapped := _WRAPPED.fullmatch(text)) is not None:
        text = next(group for group in wrapped.groups() if group is not None).strip(_AROUND)
    text = text.rstrip(".")
    text = _CURRENCY.sub(r"\1", text)
    text = _BRACED_COMMA.sub(",", _SPACED_THOUSANDS.sub("", text))
    with_unit = _WITH_UNIT.fullmatch(text)
    if with_unit is not None and not (_NOT_UNITS | _FUNCTIONS) & set(re.split("[ /]", with_unit[2].lower())):
        text = with_unit[1]
    if _WORDS.fullmatch(text):
        return rf"\text{{{text}}}"
    text = _BARE_POINT.sub("", text)
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
