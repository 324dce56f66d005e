"""Prefixes of traces that a policy goes on from: where they are cut, and that they do not give the answer away.

A prefix is a number of the trace's own token ids, never decoded and encoded again. It ends at a token or at a line, it
is drawn from a range of fractions of the trace, and it ends before the final answer first appears. All cuts of a trace
are a function of (settings, seed, trace).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np

from posttrain.config.patterns import find
from posttrain.data.episodes import Replay
from posttrain.data.known_traces import KnownTrace
from posttrain.data.recorded import behind_turns, replay_of
from posttrain.errors import DataError

Text = Callable[[Sequence[int]], str]
"""Text of token ids, special tokens removed: `Renderer.text`."""


@dataclass(frozen=True, slots=True)
class CutRule:
    """Where a trace may be cut.

    Attributes:
        low, high: range of the drawn fraction of the trace's tokens, the end token not counted.
        boundary: `token`: at floor(fraction * tokens); `line`: behind the last separator before that; `turn`: behind
            floor(fraction * turns) turns of an episode.
        separator: text that ends a line.
        answer_pattern: regular expression that finds where the final answer begins; None: the problem's reference as a
            word of its own. What is before its first match may be in a prefix.
    """

    low: float = 0.4
    high: float = 0.8
    boundary: str = "token"
    separator: str = "\n"
    answer_pattern: str | None = None


@dataclass(frozen=True, slots=True)
class Prefix:
    """A piece of a trace.

    Attributes:
        ids: the first tokens of the trace.
        fraction: their share of its tokens.
        drawn: the fraction that was drawn; larger where a line or the answer came first.
        guarded: the answer came first.
        replay: of an episode, the turns that it is.
    """

    ids: tuple[int, ...]
    fraction: float
    drawn: float
    guarded: bool
    replay: Replay | None = None


class Cutter:
    """One trace, ready to be cut.

    Args:
        trace: a correct one.
        text: decoder of its ids.
        rule: where it may be cut.

    Raises:
        DataError: the problem has neither a reference nor the rule a pattern, so that nothing says what the answer is.
    """

    def __init__(self, trace: KnownTrace, text: Text, rule: CutRule) -> None:
        self.rule, self._ids, self._text = rule, tuple(trace.ids), text
        self._whole = text(trace.ids)
        self.tokens = self._within(len(self._whole)) if self._whole else 0
        found = answer_start(self._whole, trace.problem.reference, rule.answer_pattern, trace.problem.where)
        self.limit = 0 if found is None else self._within(found)
        """Largest number of tokens that does not show the answer; 0 where the answer is not found in the trace."""

    def at(self, fraction: float) -> Prefix | None:
        """The prefix for a fraction of the trace; None where there is no place to cut."""
        wanted = floor(fraction * self.tokens + 1e-9)
        length = self._at_line(min(wanted, self.limit))
        if not 0 < length < len(self._ids):
            return None
        return Prefix(self._ids[:length], length / self.tokens, fraction, wanted > self.limit)

    def draw(self, rng: np.random.Generator) -> Prefix | None:
        """The prefix for a fraction drawn from the rule's range."""
        return self.at(self.rule.low + (self.rule.high - self.rule.low) * rng.random())

    def _at_line(self, length: int) -> int:
        """The largest number of tokens up to `length` whose text ends with the separator; 0 without one."""
        if self.rule.boundary == "token":
            return length
        end = len(self._text(self._ids[:length]))
        while (at := self._whole.rfind(self.rule.separator, 0, end)) >= 0:
            end = at + len(self.rule.separator)
            length = self._within(end)
            if self._text(self._ids[:length]) == self._whole[:end]:
                return length
            end -= 1  # a token reaches over the end of this line; look for an earlier one
        return 0

    def _within(self, characters: int) -> int:
        """The largest number of tokens whose text is not longer, without trailing tokens that have none."""
        low, high = 0, len(self._ids)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._text(self._ids[:middle])) <= characters:
                low = middle
            else:
                high = middle - 1
        while low and self._text(self._ids[: low - 1]) == self._text(self._ids[:low]):
            low -= 1
        return low


class TurnCutter:
    """One episode, ready to be cut between its turns. What an environment is asked for is in no turn, so nothing is
    guarded.

    Args:
        trace: an episode.
        rule: the range of fractions, of its turns.
    """

    def __init__(self, trace: KnownTrace, rule: CutRule) -> None:
        self.trace, self.rule = trace, rule
        self.turns = sum(turn.step is not None for turn in trace.episode.turns)

    def at(self, fraction: float) -> Prefix | None:
        """The first turns, floor(fraction * turns) of them; None where that is none, or leaves none to the policy."""
        turns, trace = floor(fraction * self.turns + 1e-9), self.trace
        if not 0 < turns < self.turns:
            return None
        ids = tuple(trace.ids[: behind_turns(trace.mask, turns)])
        replay = replay_of(trace.episode, trace.ids, trace.mask, turns)
        return Prefix(ids, turns / self.turns, fraction, False, replay)

    def draw(self, rng: np.random.Generator) -> Prefix | None:
        """As `Cutter.draw`."""
        return self.at(self.rule.low + (self.rule.high - self.rule.low) * rng.random())


def cutter(trace: KnownTrace, text: Text, rule: CutRule) -> Cutter | TurnCutter:
    """What cuts a trace. Errors as for `Cutter`."""
    return TurnCutter(trace, rule) if rule.boundary == "turn" else Cutter(trace, text, rule)


def answer_start(text: str, reference: str | None, pattern: str | None, where: str) -> int | None:
    """Position of the first character of the final answer in a trace; None where it does not appear.

    Args:
        pattern: regular expression of where it begins; None: the reference, with no word character beside it.
        where: place of the problem, for the message.

    Raises:
        DataError: neither a reference nor a pattern.
    """
    if pattern is None:
        if not reference:
            raise DataError(
                "the problem has no reference, so nothing says where a trace gives the answer away",
                where=where,
                hint="set method.answer_pattern to a regular expression of where the answer begins",
            )
        pattern = rf"(?<!\w){re.escape(reference.strip())}(?!\w)"
    found = next(find(pattern, text, where="method.answer_pattern", multiline=True), None)
    return None if found is None else found.start()


def fixed_cuts(traces: Sequence[KnownTrace], text: Text, rule: CutRule, number: int, seed: int) -> list[Prefix]:
    """`number` cuts of a problem's traces, taken in turn; the same ones whenever they are made.

    Repeats, and cuts for which there is no place, are left out: there may be fewer, or none.

    Args:
        traces: correct ones of one problem.
        seed: of the fractions.
    """
    cutters = [cutter(trace, text, rule) for trace in traces[:number]]
    found: dict[tuple[int, ...], Prefix] = {}
    for index in range(number if cutters else 0):
        trace = traces[index % len(cutters)]
        rng = np.random.default_rng([seed, index, trace_key(trace)])
        prefix = cutters[index % len(cutters)].draw(rng)
        if prefix is not None:
            found.setdefault(prefix.ids, prefix)
    return list(found.values())


def trace_key(trace: KnownTrace) -> int:
    """A number of 64 bits for the content of a trace."""
    content = f"{trace.problem.prompt} {trace.prompt_ids} {trace.ids}"
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest())
