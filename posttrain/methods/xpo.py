"""XPO: online DPO between the policy's completions and the reference's, with a bonus for leaving the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from numpy.random import Generator
from pydantic import Field

from posttrain.config.metric import Metric
from posttrain.config.needs import Needs
from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Origin, Problem
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import Scored, Start, Weighed
from posttrain.methods.companions import Writer
from posttrain.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from posttrain.objectives.contrast import group_pairs, group_shares


class XPOConfig(OnlineDPOConfig):
    name: Literal["xpo"] = "xpo"  # type: ignore[assignment]  # a method of its own
    pairs: Literal["all"] = Field("all", description="every completion of the policy with every one of the reference")
    alpha: float = Field(
        1e-5,
        ge=0,
        description="weight of the reference's log-prob, a sum over tokens (that of TRL's former trainer); 0: no bonus",
    )
    own: int = Field(
        1, ge=1, description="completions of a prompt that the policy writes; the reference writes the rest"
    )


class XPO(OnlineDPO):
    """As `OnlineDPO`; the reference's completions are trained on too, paired or not."""

    Config = XPOConfig
    config: XPOConfig
    paper = "Exploratory Preference Optimization, arXiv 2405.21046"
    metrics = (
        Metric(
            "xpo/reference_logps",
            "Mean log-prob under the policy of the reference's completions, summed over tokens: what the bonus lowers.",
            "nats per completion",
        ),
    )

    @property
    def needs(self) -> Needs:
        writer = Writer(None, 1.0, begins=False)
        return replace(super().needs, companions=(writer,), min_samples_per_prompt=self.config.own + 1)

    def start(
        self, problem: Problem, prompt_ids: Sequence[int], traces: Sequence[KnownTrace], draw: Generator
    ) -> Start:
        return Start(handover=0.0, own=self.config.own)

    def _of_reference(self, scored: Scored) -> Tensor:
        """(N,) bool: known completions that the reference wrote."""
        return torch.tensor([kind is Origin.GUIDED for kind in scored.kinds]) & self.usable(scored)

    def pairs(self, scored: Scored) -> Tensor:
        found = group_pairs(scored.rewards, scored.groups, self.usable(scored), "all", self.config.margin)
        written = self._of_reference(scored)[found]
        return found[written[:, 0] != written[:, 1]]

    def keep(self, scored: Scored) -> Tensor:
        return super().keep(scored) | self._of_reference(scored)

    def weigh(self, scored: Scored, logps: Tensor, ref_logps: Tensor) -> Weighed:
        """L = mean over prompts of DPO's loss + alpha mean over prompts of the mean of log pi of the reference's."""
        made, places = super().weigh(scored, logps, ref_logps), self._of_reference(scored).nonzero().squeeze(1)
        if not len(places):
            return made
        shares = group_shares(scored.groups[places])
        bonus = torch.zeros_like(made.advantages)
        # As in `OnlineDPO.weigh`: the shell divides by the number of trained completions.
        bonus[places] = (self.config.alpha * int(self.keep(scored).sum()) / shares.sum() * shares).to(bonus)
        read = logps[places].to(shares)
        sums = made.metrics | {"xpo/reference_logps": (float((shares * read).sum()), float(shares.sum()))}
        return Weighed(made.advantages - bonus, sums)
