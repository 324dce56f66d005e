"""Where the steps of a completion end, told by token positions: behind each delimiter, or where the data say.

A token that holds the end of a step ends it, so a step is a number of whole tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from posttrain.data.sample import Sample

Text = Callable[[Sequence[int]], str]
"""Text of token ids, special tokens removed: `Renderer.text`."""


@dataclass(frozen=True, slots=True)
class StepRule:
    """What ends the steps of traces.

    Attributes:
        delimiter: this text; None: each trace's own `step_ends`.
        turns: nothing; a step is a turn of the author's, in a conversation of several.
    """

    delimiter: str | None
    turns: bool = False


class StepCutter:
    """Divides traces into steps.

    Args:
        text: decoder of token ids.
        delimiter: what ends a step; not empty. None where `numbers` is always told the ends.
    """

    def __init__(self, text: Text, delimiter: str | None) -> None:
        self.text, self.delimiter = text, delimiter
        self._pieces: dict[int, int] = {}

    def numbers(self, ids: Sequence[int], ends: Sequence[int] | None = None) -> list[int]:
        """The step of each token, from 0. What follows the last end is a step of its own, the end token too.

        Args:
            ids: of a completion.
            ends: numbers of characters of its text up to the end of each step; default: where the delimiter says.
        """
        whole, found, step = self.text(ids), [], 0
        ends = self._ends(whole) if ends is None else ends
        within = self._lengths(ids, whole)
        boundaries = {bisect_left(within, end) for end in ends}
        for place in range(len(ids)):
            found.append(step)
            step += place in boundaries
        return found

    def _ends(self, whole: str) -> list[int]:
        """Numbers of characters up to the end of each run of delimiters."""
        assert self.delimiter is not None  # or `numbers` is told the ends
        ends, at = [], 0
        while (at := whole.find(self.delimiter, at)) >= 0:
            at += len(self.delimiter)
            while whole.startswith(self.delimiter, at):
                at += len(self.delimiter)
            ends.append(at)
        return ends

    def _lengths(self, ids: Sequence[int], whole: str) -> Sequence[int]:
        """Number of characters of the text up to and including each token."""
        total, lengths = 0, []
        for token in ids:
            if token not in self._pieces:
                self._pieces[token] = len(self.text([token]))
            total += self._pieces[token]
            lengths.append(total)
        if total == len(whole):
            return lengths
        return [len(self.text(ids[: n + 1])) for n in range(len(ids))]  # tokens that read differently on their own


def last_tokens(
    sample: Sample, cutter: StepCutter, stops: Collection[int], ends: Sequence[int] | None = None
) -> list[int]:
    """Positions of the last token of each step among those under the mask; the end token belongs to no step.

    Args:
        sample: prompt and completion.
        cutter: as in `StepCutter.numbers`, which also takes `ends`.
        stops: ids that end a completion.
    """
    places = [place for place, trained in enumerate(sample.loss_mask) if trained]
    if places and sample.ids[places[-1]] in stops:
        places.pop()
    numbers = cutter.numbers([sample.ids[place] for place in places], ends)
    return [
        place for place, this, following in zip(places, numbers, [*numbers[1:], -1], strict=True) if this != following
    ]
