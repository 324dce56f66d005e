"""Where a solution states its final answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from posttrain.verifiers.math_around import corrected, denied, part_of_more, set_equal, taken_back
from posttrain.verifiers.math_units import plain_number

TAIL = 8_000
"""Characters at the end of a completion in which the final answer must stand."""

MAX_ANSWER = 1_000
"""Characters of an answer; longer ones are not parsed."""

MAX_BOXES = 4
"""Boxes within each other that are opened."""

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BARE_BOX = re.compile(r"\\boxed(?:\s+([^\s{}$\\]+)|([0-9]+(?:\.[0-9]+)?))")
_CLOSING = " \n.$*})]\\"
_PLACEHOLDER = re.compile(
    r"(?:\\text\s*\{)?\s*(?:\?|\.\.\.|\\[lc]?dots|\u2026|_+|(?:(?:your|the|final)\s+)*answer(?:\s+here)?)?\s*\}?",
    re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(.*)$")
_TAGS = re.compile(r"<answer>(.*?)(</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_SENTENCE = re.compile(r"[A-Za-z]{2,}[,;:]?\s+[A-Za-z]{2,}")
_SAID = re.compile(
    r".*(?:\b(?:is|are|be|was|were|equals?|becomes?|gives?|yields?|total(?:s|ling)?|of|to)\b:?|=)\s*(?=\S)", re.DOTALL
)
_NUMBERS = re.compile(r"(?<![\w.])-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?![\w^]|\.[0-9])")
_HEDGED = re.compile(
    r"n't\b|\b(?:not|never|cannot|least|most|less|more|fewer|than|about|around|between|or|other)\b", re.I
)
_TIMES = re.compile(r"(?<![0-9:])[0-2]?[0-9]:[0-5][0-9](?::[0-5][0-9])?(?:\s*[ap]\.?m\b\.?)?(?![0-9:])", re.IGNORECASE)
_ANSWER_IS = re.compile(
    r"\banswer\b[*_]*(?:\s+is\b|\s+to\b.{0,200}?\bis\b|\s*[:=])[*_]*(?:\s*:)?"
    r"(?:[\s,]+(?:therefore|thus|hence|then|simply|just|also|indeed|clearly|equal\s+to)\b,?)*[^\S\n]*",
    re.IGNORECASE,
)
# Chinese, Spanish, Portuguese, Italian, French, German and Russian.
_ANSWER_ELSEWHERE = re.compile(
    r"(?:\u7b54\u6848\s*(?:\u5e94\u8be5)?(?:\u662f|\u4e3a|\u70ba|[:\uff1a=])|\brespuesta(?:\s+final)?\s*(?:es\b|:)|\bresposta(?:\s+final)?\s*(?:\u00e9\b|:)"
    r"|\brisposta(?:\s+finale)?\s*(?:\u00e8\b|:)|\br\u00e9ponse(?:\s+finale)?\s*(?:est\b|:)|\bantwort\s*(?:ist|lautet|:)|(?<!\w)\u043e\u0442\u0432\u0435\u0442\s*:)"
    r"\s*[:\uff1a]?[^\S\n]*",
    re.IGNORECASE,
)
_IS_NOT = re.compile(
    r"\banswer\b[*_]*\s+(?:is\s*(?:not|never|n['\u2019]t)|can(?:not|['\u2019]t)\s+be)\s*[:$(\\ ]*(-?[0-9.][^.\s]*)",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[\s*_#]*(?:the\s+)?(?:final\s+)?answer[\s*_#:]*", re.IGNORECASE)
_REASON = re.compile(r"(?<=[0-9A-Za-z}$)])\s*,?\s+(?:because|since|which|where|rather\s+than|not)\b.*", re.DOTALL)
_SENTENCE_END = re.compile(r"[.;](?<!\bsq\.)(?<!\bcu\.)(?=[\s$*)\\]|$)|[!?](?=\s|$)|\n\s*\n|\u3002")
_OPTION_FIRST = re.compile(r"[\s*$(]*[A-J]\.(?=\s+\S)")
_TAKEN_BACK = re.compile(r"[\s*]*(?:or\b|no\s*[,.!])", re.IGNORECASE)
_DISPLAYED = re.compile(r"(\$\$|\\\[)\s*\n\s*([^\n]+?)\s*\n\s*(\$\$|\\\])")
_ALTERNATIVE = re.compile(
    r"\b(?:or|no(?=\s*[,:;-]))\b[,:;-]?(?:\s+(?:maybe|perhaps|possibly|probably|some|something)(?:\s+[a-z]+){0,6}"
    r"|(?:\s+[a-z]+){0,2})[\s$({]*(?:[-+\u2212]?\.?[0-9]|\\)",
    re.IGNORECASE,
)
_SAID_BEHIND = re.compile(
    r"\banswer\b[*_]*\s*(?:is|should be|must be|:|=)[\s:*_]*\$?(-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)"
    r"(?![\w^/%\\{]|\.[0-9])",
    re.IGNORECASE,
)
_ALONE_BEHIND = re.compile(
    r"(?:\banswer\b[\s:*_]*\n|(?<!#)####(?!#))[\s*_]*\$?(-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)\$?[*_.]*[ \t]*(?:\n|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Stated:
    """The final answer that a text states.

    Attributes:
        answer: the final answer as written; several joined by commas.
        problem: why it cannot count although something is stated; empty if it can.
        after: a number that the text calls the answer behind it; empty without one.
        marked: it is in a box, in tags or after `####`, so where it begins and ends is certain.
        denied: the words before it say that it is not the answer.
    """

    answer: str
    problem: str = ""
    marked: bool = True
    after: str = ""
    denied: bool = False


def final_answer(text: str, form: str = "any") -> Stated | None:
    r"""The one final answer of a solution, or None if it states none.

    Looked for in this order, in the last `TAIL` characters and there after `</think>`: `<answer>...</answer>`; the last
    `\boxed{...}`; what follows the last `####` in its line; `answer is ...` (or `answer: ...`) in the last line, or in
    a line of its own before the last one, as a heading may be; all that follows `</think>`, if it is no sentence.
    A thought that is closed with nothing behind it states none. A box with nothing in it is passed over where a
    sentence states the answer.
    Of several boxes the last counts. But a final sentence with several different boxes states several answers; they are
    kept together, so that they equal a reference with just these answers and no other. Boxes with nothing or with
    "answer" in them are those of the instructions, and count only where there are no others. An "or" and another value
    after the box is a problem, and so are words that deny or correct it, an expression that it is only a part of
    (`math_around`), tags with different answers and a tag that is not closed.

    Args:
        text: the solution.
        form: `boxed`, `hashes` or `tags`: the only form looked for; `any`: all of these.
    """
    text = text[-TAIL:]
    _, thought, after_thinking = text.rpartition("</think>")
    if thought and not after_thinking.strip():
        return None
    text = after_thinking
    if r"\boxed" in text:
        text = _BARE_BOX.sub(lambda m: rf"\boxed{{{m[1] or m[2]}}}", text)
    for name, find in (("tags", _tagged), ("boxed", _boxed), ("hashes", _behind_hashes)):
        found = find(text) if form in ("any", name) else None
        if found is None:
            continue
        if not found.answer[:1].isdecimal() and form == "any" and _is_empty(found) and _phrased(text):
            continue
        return found
    if form != "any":
        return None
    found = _phrased(text)
    behind = after_thinking.strip() if thought else ""
    if found is None and behind and "\n" not in behind and not _SENTENCE.search(behind):
        return Stated(behind, marked=False)
    return found


def _is_empty(stated: Stated) -> bool:
    """Whether a box is that of the instructions."""
    return not stated.problem and _PLACEHOLDER.fullmatch(stated.answer) is not None


def said_last(sentence: str) -> list[str]:
    """What a sentence may say: behind its last verb (`The largest n is 34`), and its only number, unless hedged."""
    said = [_SAID.sub("", sentence, count=1)]
    numbers = _NUMBERS.findall(sentence)
    return said + numbers if len(numbers) == 1 and not _HEDGED.search(sentence) else said


def last_time(text: str) -> str | None:
    """The time of day that a text names last; None without one."""
    found = _TIMES.findall(text)
    return found[-1] if found else None


def _tagged(text: str) -> Stated | None:
    found = list(_TAGS.finditer(text)) if "<" in text else []
    if not found:
        return None
    answers = list(dict.fromkeys(_within(each[1]) for each in found))
    if not found[-1][2]:
        return Stated(answers[-1], "the last <answer> is not closed")
    if len(answers) > 1:
        return Stated(answers[-1], "several answers in tags")
    return _in_context(text, [(*found[-1].span(), "")], Stated(answers[-1]))


def _within(content: str) -> str:
    """What tags hold, or a line behind hashes; a box in them is opened."""
    boxed = _boxed(content)
    return content.strip() if boxed is None or boxed.problem else boxed.answer


def _behind_hashes(text: str) -> Stated | None:
    lines = [line for line in text.split("\n") if "####" in line]
    found = [answer.strip() for line in lines for answer in _HASHES.findall(line) if not _HEADING.fullmatch(answer)]
    if not found or not found[-1]:
        return None
    return Stated(_within(found[-1]) if "boxed" in found[-1] else found[-1])


def _phrased(text: str) -> Stated | None:
    lines = [line for line in _DISPLAYED.sub(r"\1\2\3", text).splitlines() if line.strip(" *#_:")]
    if len(lines) > 1 and _HEADING.fullmatch(lines[-2]):
        return _sentence(lines[-1])
    for line, after in zip(lines[-1:] + lines[-2:-1], ("", "".join(lines[-1:])), strict=False):
        refused = _IS_NOT.search(line)
        if refused is not None:
            return Stated(refused[1], "denied by the words before it", marked=False, denied=True)
        phrases = list(_ANSWER_IS.finditer(line)) or list(_ANSWER_ELSEWHERE.finditer(line))
        if phrases:
            rest = line[phrases[-1].end() :]
            if after and rest.strip(" *_:"):
                return None
            found = _sentence(after or rest)
            if found is not None and denied(line, phrases[-1].start()):
                return replace(found, problem="denied by the words before it", denied=True)
            return found
    return None


def _boxed(text: str) -> Stated | None:
    if "\\" not in text:  # most references
        return None
    boxes: list[tuple[int, int, str]] = []
    position = 0
    while (start := _BOX.search(text, position)) is not None:
        end = _closing_brace(text, start.end())
        if end is None:
            return Stated("", "the last box is not closed")
        boxes.append((start.start(), end + 1, _unboxed(text[start.end() : end])))
        position = end + 1
    if not boxes:
        return None
    if len(boxes) > 1:
        boxes = [box for box in boxes if not _PLACEHOLDER.fullmatch(box[2])] or boxes[-1:]
    answers = [boxes[-1][2]]
    counted = boxes[-1:]
    for (before, end, content), (after, _, _) in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        if _SENTENCE_END.search(text, end, after) or end - after > 200:
            break
        if content not in answers:
            answers.insert(0, content)
            counted.insert(0, (before, end, content))
    stated = Stated(", ".join(answers))
    rest = text[boxes[-1][1] :]
    if rest.strip(_CLOSING):
        stated = replace(stated, after=_said_behind(rest, boxes[-1][2]))
    return _in_context(text, counted, stated)


def _said_behind(rest: str, content: str) -> str:
    """The number that a text behind a box calls the answer, in whatever way."""
    said = list(_SAID_BEHIND.finditer(rest)) if "nswer" in rest else []
    if not said and ("nswer" in rest or "####" in rest):
        said = list(_ALONE_BEHIND.finditer(rest))
    if said:
        return said[-1][1]
    return corrected(rest) or (set_equal(rest) if plain_number(content) is not None else "")


def _in_context(text: str, marks: list[tuple[int, int, str]], stated: Stated) -> Stated:
    """The same with what stands around the marks: denials, alternatives, an expression that they are only part of."""
    start, end, _ = marks[-1]
    if denied(text, start):
        return replace(stated, problem="denied by the words before it", denied=True)
    rest = text[end:]
    if rest.strip(_CLOSING):
        stop = _SENTENCE_END.search(rest)
        if _ALTERNATIVE.search(rest[: stop.start()] if stop else rest):
            return replace(stated, problem="an alternative follows it")
        if taken_back(rest):
            return replace(stated, problem="denied by the words behind it")
    if any(part_of_more(text, mark[0], mark[1]) for mark in marks):
        return replace(stated, problem="only a part of a larger expression")
    return stated


def _unboxed(content: str) -> str:
    """What a box holds; a box that holds nothing but another is one box."""
    content = content.strip()
    for _ in range(MAX_BOXES):
        inner = content.strip("$ ")
        start = _BOX.match(inner)
        if start is None or _closing_brace(inner, start.end()) != len(inner) - 1:
            break
        content = inner[start.end() : -1].strip()
    return content


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
    """The answer up to the end of its sentence; None if a digit or "or" follows: then it is not the last word."""
    text = _REASON.sub("", text)
    option = _OPTION_FIRST.match(text)
    stop = _SENTENCE_END.search(text, option.end() if option else 0)
    answer, rest = (text[: stop.start()], text[stop.end() :]) if stop else (text, "")
    if not answer.strip(" *$\t\n") or re.search(r"\d", rest) or _TAKEN_BACK.match(rest):
        return None
    return Stated(answer.strip(), marked=False)
