"""Rows whose text responses repeat their prompt, so that what follows the prompt is the response.

One response may begin like its prompt by chance; that nearly all of a source do is how the source is written. Which of
the two it is, is seen from rows spread over the source, the same ones whether it is read as a whole or row by row. The
prompt is then cut off in each row that repeats it. Prompts of a single word alone do not count: of a sum, `1+2=`, a
worked solution begins so too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from posttrain.data.sample import Row
from posttrain.errors import DataError

LOOKED_AT = 1000
"""Rows of a source that decide."""

NEARLY_ALL = 0.9
"""Share of them that must repeat their prompt for it to be cut off."""

WORTH_SAYING = 0.5
"""Share from which the other rows are a thing to be told of."""


@dataclass(frozen=True, slots=True)
class RepeatedPrompts:
    """Whether the rows of a source repeat their prompts.

    Attributes:
        prompt: the column of the prompt.
        responses: the columns of the responses.
        cut: the prompt is cut off where all responses of a row repeat it.
    """

    prompt: str
    responses: tuple[str, ...]
    cut: bool

    @classmethod
    def of(cls, prompt: str, responses: Iterable[str], length: int, row: Callable[[int], Row]) -> RepeatedPrompts:
        """As rows spread over a source say, of which those that cannot be read say nothing.

        Args:
            length: rows of the source.
            row: gives one by its number.
        """
        found = cls(prompt, tuple(responses), False)
        repeating, counted, of_words = found._counts(spread(length, row))
        return cls(found.prompt, found.responses, of_words and repeating >= NEARLY_ALL * counted)

    def cut_in(self, row: Row) -> bool:
        """Whether the prompt is to be cut off the responses of a row."""
        return self.cut and self._repeats(row) is True

    def note(self, rows: Iterable[Row]) -> str | None:
        """One line for people where many of these rows repeat their prompt, but not all; else None."""
        repeating, counted, of_words = self._counts(rows)
        if not of_words or not WORTH_SAYING * counted <= repeating < counted:
            return None
        done = "cut off there, and the others stay as they are" if self.cut else "not cut off, as it is not nearly all"
        what = " and ".join(self.responses)
        return f"{repeating:,} of {counted:,} rows repeat the prompt in {what}: {done}"

    def _counts(self, rows: Iterable[Row]) -> tuple[int, int, bool]:
        """Rows that repeat their prompt, rows of text, and whether a prompt has several words."""
        repeating = counted = 0
        of_words = False
        for row in rows:
            repeats = self._repeats(row)
            if repeats is not None:
                counted += 1
                repeating += repeats
                of_words = of_words or len(row.values[self.prompt].split()) > 1
        return repeating, counted, of_words

    def _repeats(self, row: Row) -> bool | None:
        """None where the row is not text, or has no prompt."""
        begin, rest = row.values.get(self.prompt), [row.values.get(column) for column in self.responses]
        if not isinstance(begin, str) or not begin.strip() or not all(isinstance(text, str) for text in rest):
            return None
        return all(str(text).startswith(begin) for text in rest)


def spread(length: int, row: Callable[[int], Row]) -> Iterator[Row]:
    """Rows spread evenly over a source, the first and the last among them, without those that cannot be read."""
    for number in np.linspace(0, length - 1, min(LOOKED_AT, length)).astype(int).tolist():
        try:
            found = row(number)
        except DataError:
            continue
        yield found
