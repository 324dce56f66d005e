"""Answers that are dates, times of day, or words with a number: compared as text, never as arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMAND = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_TIME = re.compile(r"([01]?[0-9]|2[0-4]):([0-5][0-9])(?::([0-5][0-9]))?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_ON_THE_HOUR = re.compile(r"(0?[1-9]|1[0-2])\s*([ap])\.?\s?m\.?", re.IGNORECASE)
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]{1,2}/[0-9]{1,2}/[0-9]{4}")
_WORDS = re.compile(r"(?=.*[0-9])([A-Za-z]{3,})(?:[ ,.'-]+[A-Za-z0-9]+)+\.?")
_FUNCTIONS = re.compile(
    r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|exp|sqrt|abs|max|min|det|gcd|lcm|mod", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Words:
    """A reference that is words.

    Attributes:
        text: one spelling of it.
        half: `a` or `p` of a time of day on a clock of twelve hours, if it says so.
    """

    text: str
    half: str | None = None

    def answered_by(self, other: Words) -> bool:
        """Whether another answer says the same; it may name the half of the day where this one does not."""
        if self.text == other.text and self.half in (None, other.half):
            return True
        late = self._on_24_hours()
        return self.half != other.half and late == other._on_24_hours() and re.match("1[3-9]|2|0:", late) is not None

    def _on_24_hours(self) -> str:
        hour, _, rest = self.text.partition(":")
        return self.text if self.half is None else f"{int(hour) % 12 + 12 * (self.half == 'p')}:{rest}"


def on_the_hour(answer: str) -> Words | None:
    r"""A time of day without minutes, `5\text{ PM}`, as text; None for all else."""
    if answer[-3:].lower().find("m") < 0:
        return None
    time = _ON_THE_HOUR.fullmatch(_plain(answer))
    return None if time is None else Words(f"{int(time[1])}:00:00", time[2].lower())


def words(answer: str) -> Words | None:
    """An answer as text, if it is a date, a time of day, or begins with a word and has a number; else None."""
    text = _plain(answer)
    time = _TIME.fullmatch(text)
    if time is not None:
        return Words(f"{int(time[1])}:{time[2]}:{time[3] or '00'}", time[4] and time[4].lower())
    if _DATE.fullmatch(text):
        return Words(text)
    found = _WORDS.fullmatch(text)
    if found is None or _FUNCTIONS.fullmatch(found[1]):
        return None
    return Words(re.sub(r"[^a-z0-9]+", " ", text.lower()).strip())


def _plain(answer: str) -> str:
    text = _COMMAND.sub(r"\1", answer).replace("{:}", ":").replace(r"\!", "").replace("~", " ")
    text = re.sub(r"\\[ ,;:]", " ", text)
    return " ".join(text.strip(" \t\r\n*$").rstrip(".,;").split())
