"""Rewarded traces as an offline method trains on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Sample
from posttrain.data.steps import StepCutter


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
    def responses(self) -> dict[str, Sample]:
        """By role, as rows of pairs have them."""
        return {"trace": self.sample}


def offline_rows(
    traces: Sequence[KnownTrace], reward: Callable[[KnownTrace], float], delimiter: str | None, renderer: Renderer
) -> list[OfflineRow]:
    """Traces with their rewards, cut into steps where a delimiter is given.

    Raises:
        DataError: a trace without an outcome, from `reward`.
    """
    cutter = None if delimiter is None else StepCutter(renderer.text, delimiter)
    return [_row(trace, reward(trace), cutter) for trace in traces]


def _row(trace: KnownTrace, reward: float, cutter: StepCutter | None) -> OfflineRow:
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
    return OfflineRow(sample, reward, None if cutter is None else [0] * before + _gapless(cutter, trace))


def _gapless(cutter: StepCutter, trace: KnownTrace) -> list[int]:
    """Step numbers without a gap over the trained tokens; turns of others may hold whole steps."""
    numbers, renumbered, seen = cutter.numbers(trace.ids), [], {}
    for number, trained in zip(numbers, trace.mask, strict=True):
        if trained:
            seen.setdefault(number, len(seen))
        renumbered.append(seen.get(number, max(len(seen) - 1, 0)))
    return renumbered
