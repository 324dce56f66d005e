"""Multiple choice: a letter, or the text of an option."""

from __future__ import annotations

import ast
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.math_answer import TAIL, final_answer
from posttrain.verifiers.verdict import Status, Verdict

_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm)\s*\{([^{}]*)\}")
_AROUND = " \t\r\n*_`$.,:;!\"'"
_LETTER = r"(?<![A-Za-z0-9'\u2019])[\[(<{{]*([{letters}])(?![A-Za-z0-9'\u2019])"
_LEADING = re.compile(r"^\s*(?:options?|choices?|answers?)?\s*[\[(<{]*([A-Za-z])(?:[\])>}]|\s*[.:,)]|\s+-|\s*$)", re.I)
_BETWEEN = re.compile(r"[\s\])}>.*]*(?:,|/|\band\b|\bor\b|&|\bor maybe\b)[\s*]*(?:options?\b)?\s*", re.I)
_WORD_FOLLOWS = re.compile(r" (?!or\b|and\b|but\b|is\b)[a-z]")
_NEGATED = re.compile(
    r"\b(?:not|isn't|cannot be|n't|rather than|instead of|eliminates?)\s+(?:options?|choices?|answers?)?\W*$", re.I
)


class ChoiceVerifier:
    r"""Correct if the letter stated last is the reference's.

    A letter is stated in a final answer as `math_answer.final_answer` finds it (a box, `####`, `answer is`), or by a
    completion that is nothing but the letter. The final answer may also be the text of an option, where the texts are
    known, or both. Strict: a final answer with several options is wrong. Lenient: without a final answer, the last
    letter in brackets or on a line of its own, then the last capital letter that stands alone, counts; of several
    options, the last.

    The reference is a letter, the text of an option, or its number from 0 where it is a number.
    """

    name = "choice"
    outcome = True

    class Config(VerifierConfig):
        """Multiple choice: the letter stated last, or an option by its text. Options:
        a column, or lines of the prompt.
        """

        type: Literal["choice"] = "choice"
        needs_reference: ClassVar[bool] = True
        names_answers: ClassVar[bool] = True
        profile: Literal["strict", "lenient"] = Field(
            "strict", description="strict for rewards, lenient for evaluation"
        )
        options: str = Field("choices", description="column with the texts of the options, in order; may be absent")
        letters: str = Field(
            "ABCD", pattern=r"^[A-Z]{2,26}$", description="letters of the options, without their texts"
        )

        @model_validator(mode="after")
        def _different_letters(self) -> ChoiceVerifier.Config:
            if len(set(self.letters)) != len(self.letters):
                raise ValueError(f"letters {self.letters!r} holds a letter twice")
            return self

        def gold(self, problem: Problem) -> str | None:
            _, gold = letters_and_gold(self, problem)
            return rf"\boxed{{{gold}}}" if gold else problem.reference or ""

        def excludes(self, one: Problem, other: Problem) -> bool:
            return letters_and_gold(self, one)[1] != letters_and_gold(self, other)[1]

        def spoilt(self, problem: Problem, completion: str) -> list[tuple[str, str]]:
            letters, letter = letters_and_gold(self, problem)
            if letter is None:
                return []
            other = letters[(letters.index(letter) + 1) % len(letters)]
            rows = [("another letter", rf"\boxed{{{other}}}")]
            return rows + ([("two answers", f"The answer is {letter} or {other}.")] if self.profile == "strict" else [])

    def __init__(self, config: ChoiceVerifier.Config) -> None:
        self.config = config

    def __call__(self, problem: Problem, completion: str, /) -> Verdict:
        options = option_texts(problem.meta.get(self.config.options))
        letters, gold = letters_and_gold(self.config, problem)
        if gold is None:
            return Verdict(Status.BAD_REFERENCE, None, f"no option: {str(problem.reference)[:60]!r}")
        found = self._stated(completion[-TAIL:], letters, options)
        if found is None:
            return Verdict(Status.NO_ANSWER, 0.0)
        if not found:
            return Verdict(Status.UNPARSEABLE, 0.0, "the final answer names no option")
        if len(set(found)) > 1 and self.config.profile == "strict":
            several = ", ".join(found)
            return Verdict(Status.WRONG, 0.0, f"several options: {several}", several)
        if found[-1] == gold:
            return Verdict(Status.CORRECT, 1.0, found[-1], found[-1])
        return Verdict(Status.WRONG, 0.0, found[-1], found[-1])

    def _stated(self, text: str, letters: str, options: Sequence[str]) -> list[str] | None:
        """The options named by the final answer; None without one."""
        whole = _plain(text)
        if len(whole.strip("()[]{}<> ")) == 1:
            return _letters(whole, letters)
        stated = final_answer(text)
        found: list[str] = []
        if stated is not None:
            found = named(stated.answer, letters, options)
            if stated.problem:
                found += [letter for letter in _letters(text.rpartition("boxed")[2], letters) if letter not in found]
        if found or self.config.profile == "strict":
            return found if stated is not None else None
        bracketed = re.findall(rf"[(\[]([{letters}])[)\]]|^\W*([{letters}])\W*$", text, re.MULTILINE)
        alone = ["".join(groups) for groups in bracketed] or _letters(text, letters)
        return alone[-1:] or (found if stated is not None else None)


def named(answer: str, letters: str, options: Sequence[str]) -> list[str]:
    """Letters of the options that an answer names, in its order and each once.

    By the letter at its start ("B) the second"), else by the text of exactly one option, else by lone letters.
    """
    text = _plain(answer)
    if options:
        same = [letter for letter, option in zip(letters, options, strict=True) if _folded(option) == _folded(text)]
        if len(same) == 1:
            return same
    leading = _LEADING.match(text)
    if leading and leading[1].upper() in letters:
        first = leading[1].upper()
        rest = text[leading.end() :]
        joined = _BETWEEN.match(text, leading.end(1))
        others = _letters(rest, letters) if joined or len(rest) < 12 else []
        index = letters.index(first)
        if options and _folded(options[index]) in _folded(text):
            others = []
        return list(dict.fromkeys([first, *others]))
    found = list(dict.fromkeys(_letters(text, letters)))
    if found or not options:
        return found
    inside = [letter for letter, option in zip(letters, options, strict=True) if _holds(text, option)]
    return inside


def option_texts(column: Any) -> list[str]:
    """Texts of the options: a list, `{"text": [...]}`, an object by letter, or one of these written out."""
    if isinstance(column, str) and column[:1] in "[{":
        try:
            column = ast.literal_eval(column)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return []
    if isinstance(column, dict):
        column = column["text"] if "text" in column else [column[key] for key in sorted(column)]
    return [str(option) for option in column] if isinstance(column, list | tuple) and len(column) <= 26 else []


def letters_and_gold(config: ChoiceVerifier.Config, problem: Problem) -> tuple[str, str | None]:
    """The letters of a problem's options, and the right one; None if the reference names no option."""
    options = option_texts(problem.meta.get(config.options))
    letters = string.ascii_uppercase[: len(options)] if options else config.letters
    return letters, _gold((problem.reference or "").strip(), letters, options)


def _gold(reference: str, letters: str, options: Sequence[str]) -> str | None:
    if reference.isascii() and reference.isdigit() and reference not in options:
        return letters[int(reference)] if int(reference) < len(letters) else None
    found = named(reference, letters, options)
    return found[0] if len(found) == 1 else None


def _letters(text: str, letters: str) -> list[str]:
    """Capital letters that stand alone and name an option; an article or pronoun is no option."""
    found = []
    for match in re.finditer(_LETTER.format(letters=letters), text):
        article = match[1] in "AI" and match[0] == match[1] and _WORD_FOLLOWS.match(text, match.end())
        if not article and not _NEGATED.search(text, 0, match.start()):
            found.append(match[1])
    return found


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)
    while (unwrapped := _TEXT.sub(r"\1", text)) != text:
        text = unwrapped
    return text.strip(_AROUND)


def _folded(text: str) -> str:
    return " ".join(_plain(text).casefold().split())


def _holds(text: str, option: str) -> bool:
    return bool(_folded(option)) and re.search(rf"(?<!\w){re.escape(_folded(option))}(?!\w)", _folded(text)) is not None
