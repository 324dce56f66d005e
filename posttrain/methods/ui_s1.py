"""UI-S1: semi-online RL on recorded episodes, with advantages of turns and of episodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor, torch
from posttrain.methods.base import Scored
from posttrain.methods.grpo import GRPO, GRPOConfig
from posttrain.objectives.advantages import group_statistics
from posttrain.objectives.semi_online import episode_advantages, segment_returns, step_advantages


class UIS1Config(GRPOConfig):
    """The policy gradient has the parameters of `grpo`."""

    name: Literal["ui_s1"] = "ui_s1"  # type: ignore[assignment]  # a method of its own
    credit: Literal["turn"] = Field("turn", description="each turn of an episode has an advantage of its own")
    turn_discount: float = Field(0.5, gt=0, le=1, description="gamma: of later rewards, per turn")
    aggregation: Literal["sequences", "tokens", "constant"] = Field("tokens", description="mean over all tokens")
    scale_rewards: Literal["group", "none"] = Field("group", description="deviation that divides both advantages")
    beta: float = Field(1e-4, ge=0, description="weight of the KL to the starting policy, in the loss")
    step_weight: float = Field(1.0, ge=0, description="w_S: weight of the advantage among the same turns of the group")
    episode_weight: float = Field(1.0, ge=0, description="w_E: weight of the advantage among its episodes")
    return_rule: Literal["code", "paper"] = Field(
        "code", description="paper: the reward of a turn that does not match counts for the turns before it too"
    )
    episode_advantage: Literal["return", "pooled_steps"] = Field(
        "return", description="sum of an episode's rewards (paper), or single rewards of all turns (authors' code)"
    )
    filter_std: float = Field(
        0.3, ge=0, description="train on groups whose returns at the first turn deviate by more; 0: any difference"
    )

    @model_validator(mode="after")
    def _own_sum(self) -> UIS1Config:
        if self.terms is not None:
            raise ValueError("ui_s1 adds two advantages of its own and takes no terms: remove them")
        return self


class UIS1(GRPO):
    Config = UIS1Config
    config: UIS1Config
    paper = "UI-S1: Advancing GUI Automation via Semi-online Reinforcement Learning, arXiv 2509.11543"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, forks=True)

    def advantages(self, scored: Scored) -> Tensor:
        c, of = self.config, self._episodes(scored)
        rewards, turns, groups, known = of
        returns = self._returns(rewards)
        step = step_advantages(returns, turns, groups, known, c.scale_rewards)
        episode = episode_advantages(rewards, turns, groups, known, c.scale_rewards, c.episode_advantage)
        return self._of_rows(scored, c.step_weight * step + c.episode_weight * episode)

    def keep(self, scored: Scored) -> Tensor:
        rewards, _, groups, known = self._episodes(scored)
        _, deviations, _ = group_statistics(self._returns(rewards)[:, 0], groups, known)
        return super().keep(scored) & (deviations > self.config.filter_std)[scored.episodes]

    def _returns(self, rewards: Tensor) -> Tensor:
        # An action that is the expert's has the whole reward of a turn.
        return segment_returns(rewards, rewards > 1 - 1e-6, self.config.turn_discount, self.config.return_rule)

    def _episodes(self, scored: Scored) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rewards (E, K), turns, groups and known (E,) of whole episodes."""
        number, first = scored.episodes, _first_turns(scored)
        episodes = int(number.max()) + 1
        turns = torch.zeros(episodes, dtype=torch.long).index_add(0, number, scored.turns)
        rewards = scored.turn_rewards.new_zeros(episodes, max(1, int(turns.max())))
        groups, known = torch.zeros_like(turns), torch.zeros(episodes, dtype=torch.bool)
        groups[number], known[number] = scored.groups, scored.known  # the same for all rows of an episode
        for row, begin in enumerate(first):
            n = int(scored.turns[row])
            rewards[number[row], begin : begin + n] = scored.turn_rewards[row, :n]
        return rewards, turns, groups, known

    def _of_rows(self, scored: Scored, values: Tensor) -> Tensor:
        """(N, K) of rows from (E, K) of episodes."""
        found = torch.zeros_like(scored.turn_rewards)
        for row, begin in enumerate(_first_turns(scored)):
            n = int(scored.turns[row])
            found[row, :n] = values[scored.episodes[row], begin : begin + n]
        return found


def _first_turns(scored: Scored) -> list[int]:
    """Number of the first turn of each row within its episode."""
    seen: dict[int, int] = {}
    found = []
    for episode, turns in zip(scored.episodes.tolist(), scored.turns.tolist(), strict=True):
        found.append(seen.get(episode, 0))
        seen[episode] = found[-1] + turns
    return found
