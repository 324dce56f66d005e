"""Rewarded traces as an offline method trains on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Sample
from posttrain.data.steps import StepCutter, StepRule
from posttrain.errors import DataError


@dataclass(frozen=True, slots=True)
class OfflineRow:
    """One trace.

    Attributes:
        sample: its tokens.
        reward: of the whole.
        steps: the step of each token of `sample`, 0 before the first trained one; None if the method takes no steps.
    """

    sample: Sample
    reward: float
    steps: list[int] | None = None

    @property
    def length(self) -> int:
        """Tokens, prompt included."""
        return len(self.sample.ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The longest sequence that an engine may be asked to go on from some of: the row itself."""
        return self.sample.ids

    @property
    def turn_starts(self) -> list[int]:
        """Columns of the first trained token of each run of them."""
        mask = self.sample.loss_mask
        return [place for place, trained in enumerate(mask) if trained and not (place and mask[place - 1])]

    @property
    def responses(self) -> dict[str, Sample]:
        """By role, as rows of pairs have them."""
        return {"trace": self.sample}


def offline_rows(
    traces: Sequence[KnownTrace], reward: Callable[[KnownTrace], float], rule: StepRule | None, renderer: Renderer
) -> list[OfflineRow]:
    """Traces with their rewards, cut into steps if there is a rule for that.

    Raises:
        DataError: a trace without an outcome, from `reward`, or without the `step_ends` that the rule asks for.
    """
    if rule is not None and rule.turns:
        return [_row(trace, reward(trace), turn_numbers) for trace in traces]
    cutter = None if rule is None else StepCutter(renderer.text, rule.delimiter)
    if rule is not None and rule.delimiter is None:
        for trace in traces:
            if trace.step_ends is None:
                raise DataError(
                    "a trace without `step_ends`, and its steps are to end where the data say",
                    where=trace.problem.where or trace.problem.id,
                    hint="set `method.delimiter` to a text that ends a step, or give every trace the column",
                )
    numbers = None if cutter is None else partial(_gapless, cutter)
    return [_row(trace, reward(trace), numbers) for trace in traces]


def _row(trace: KnownTrace, reward: float, numbers: Callable[[KnownTrace], list[int]] | None) -> OfflineRow:
    before = len(trace.prompt_ids)
    sample = Sample(
        ids=trace.prompt_ids + trace.ids,
        loss_mask=[0] * before + trace.mask,
        origin=Origin.EXPERT,
        problem_id=trace.problem.id,
        outcome=trace.outcome,
        reward=reward,
        finished=trace.finished,
    )
    return OfflineRow(sample, reward, None if numbers is None else [0] * before + numbers(trace))


def turn_numbers(trace: KnownTrace) -> list[int]:
    """The turn of each token, from 0: the runs of tokens that the author wrote. What stands between has that before."""
    number, found, before = -1, [], 0
    for trained in trace.mask:
        number += trained > before
        before = trained
        found.append(max(number, 0))
    return found


def _gapless(cutter: StepCutter, trace: KnownTrace) -> list[int]:
    """Step numbers without a gap over the trained tokens; turns of others may hold whole steps."""
    ends = trace.step_ends if cutter.delimiter is None else None
    seen: dict[int, int] = {}
    numbers, renumbered = cutter.numbers(trace.ids, ends), []
    for number, trained in zip(numbers, trace.mask, strict=True):
        if trained:
            seen.setdefault(number, len(seen))
        renumbered.append(seen.get(number, max(len(seen) - 1, 0)))
    return renumbered
