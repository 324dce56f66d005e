"""Rows as token ids within the limits, in the forms that shells train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from posttrain.data.offline_rows import OfflineRow
from posttrain.data.sample import Preference, Problem, Sample, Stepwise, Unpaired


class PromptRow(NamedTuple):
    """A problem that completions are sampled for.

    Attributes:
        problem: as read.
        prompt_ids: its prompt.
    """

    problem: Problem
    prompt_ids: list[int]


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Responses that are compared with each other, or one that stands for itself.

    Attributes:
        row: as prepared by the method.
        responses: role -> token sequence.
        values: numbers that the method's loss reads, by name.
    """

    row: Preference | Unpaired | Stepwise
    responses: dict[str, Sample]
    values: dict[str, float | list[float]]

    @property
    def length(self) -> int:
        """Tokens of the longest response, prompt included."""
        return max(len(sample.ids) for sample in self.responses.values())

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt, as rollouts have it."""
        sample = next(iter(self.responses.values()))
        return sample.ids[: sample.prompt_length]


def token_ids(item: PromptRow | PreferenceRow | OfflineRow | Sample) -> list[int]:
    """The tokens of a row of any shell: of one to be completed its prompt, of several responses the first."""
    if isinstance(item, tuple):
        return item[1]
    if isinstance(item, PreferenceRow):
        return next(iter(item.responses.values())).ids
    return item.sample.ids if isinstance(item, OfflineRow) else item.ids
