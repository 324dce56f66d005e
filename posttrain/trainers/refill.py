"""Groups without a signal replaced by those of further prompts (`rollouts.refill`; dynamic sampling, arXiv 2503.14476).

The prompts of a rollout are drawn in order, a wave of as many as it trains on at a time, until that many groups have
completions whose rewards differ. Groups are taken by the number of their draw, never by when they were done, so short
answers are not preferred. What a rollout draws is a function of the seed, its number, and the place in the order of
prompts where it begins, which is all that is remembered: a run that dies within a wave repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from accelerate.utils import gather_object
from torch import Tensor

from posttrain.config.schema import RefillConfig
from posttrain.data.sample import Sample
from posttrain.methods.base import Scored
from posttrain.tracking.metrics import Add


@dataclass(frozen=True, slots=True)
class Filled:
    """The groups of a rollout, all ranks', numbered from 0.

    Attributes:
        groups: those with a signal in the order of their draws, then others up to the number that is trained on.
        informative: how many have a signal; the others are not trained on.
        draws: groups that were looked at, the one that filled the rollout last.
        surplus: groups that were sampled behind it.
        factor: what makes the mean over the groups with a signal an unbiased estimate of that over all draws, if the
            others give no gradient: (B - 1) / (draws - 1) where they filled up, else their share.
        seen: completions of all draws, for metrics.
        tokens: sampled tokens of groups that are not trained on.
    """

    groups: list[list[Sample]]
    informative: int
    draws: int
    surplus: int
    factor: float
    seen: list[Sample]
    tokens: int


class Refill:
    """Fills rollouts with groups that have a signal.

    Args:
        config: of the recipe.
        wanted: groups of a rollout over all ranks.

    Attributes:
        drawn: place in the order of prompts where the next rollout begins.
        last: the latest rollout; None before the first one of this process.
    """

    def __init__(self, config: RefillConfig, wanted: int) -> None:
        self.config, self.wanted = config, wanted
        self.drawn = 0
        self.last: Filled | None = None
        self._advised = False

    def fill(self, sample: Callable[[int], list[Sample]]) -> Filled:
        """The groups of one rollout. Called on all ranks, which find the same.

        Args:
            sample: number of the first draw of a wave -> this rank's completions of its draws.
        """
        kept: list[list[Sample]] = []
        others: list[list[Sample]] = []
        seen: list[Sample] = []
        draws = surplus = 0
        for wave in range(self.config.waves):
            groups = in_order(gather_object(sample(wave * self.wanted)))
            for group in groups:
                if len(kept) == self.wanted:
                    surplus += 1
                    others.append(group)
                    continue
                draws += 1
                seen += group
                (kept if informative(group) else others).append(group)
            if len(kept) == self.wanted:
                break
        self.drawn += draws
        chosen = [*kept, *others][: self.wanted]
        left_out = [*kept, *others][self.wanted :] + chosen[len(kept) :]
        self.last = Filled(
            [[replace(sample, group=number) for sample in group] for number, group in enumerate(chosen)],
            len(kept),
            draws,
            surplus,
            factor(len(kept), self.wanted, draws),
            seen,
            sum(sum(sample.loss_mask) for group in left_out for sample in group),
        )
        return self.last

    def taken(self, scored: Scored, advantages: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and rows of the latest rollout as they are trained on: without groups that have no signal."""
        weight = self.last.factor if self.config.unbiased else 1.0
        return weight * advantages, keep & (scored.groups < self.last.informative)

    def kept(self) -> tuple[Mapping[str, Tensor], int]:
        return {}, self.drawn

    def take(self, tensors: Mapping[str, Tensor], values: int) -> None:
        self.drawn = values

    def report(self, add: Add, say: Callable[[str], None]) -> None:
        """Metrics of all draws of the latest rollout, and advice at the first that did not fill up.

        `record_rollouts` has those of the groups that were taken.
        """
        filled = self.last
        outcomes = [sample.outcome for sample in filled.seen if sample.outcome is not None]
        add("refill/accuracy", sum(outcomes), len(outcomes))
        add("refill/draws", filled.draws, 1)
        add("refill/surplus", filled.surplus, 1)
        add("refill/factor", filled.factor, 1)
        add("refill/filled_share", filled.informative, self.wanted)
        add("refill/thrown_tokens", filled.tokens, 1)
        if filled.informative < self.wanted and not self._advised:
            self._advised = True
            right = sum(outcomes) / max(len(outcomes), 1)
            easy = "harder prompts" if right > 0.5 else "easier prompts, prefixes or a supervised start"
            say(
                f"refill: of {filled.draws} prompts {filled.informative} gave completions that differ in reward, and "
                f"{self.wanted} are wanted; {right:.0%} of the answers are right. The step goes on with what there is: "
                f"take {easy}, more samples_per_prompt, or raise rollouts.refill.waves. Later steps like this one show "
                "in refill/filled_share"
            )


def in_order(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Groups by the number of their draw."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    return [groups[number] for number in sorted(groups)]


def informative(group: Sequence[Sample]) -> bool:
    """Whether the rewards that are known differ."""
    return len({sample.reward for sample in group if sample.reward is not None}) > 1


def factor(informative: int, wanted: int, draws: int) -> float:
    """See `Filled.factor`. With one group wanted the first that has a signal says nothing of their share: 1 / draws."""
    if informative < wanted:
        return informative / draws
    return (wanted - 1) / (draws - 1) if wanted > 1 and draws > 1 else 1 / draws
