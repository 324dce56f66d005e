"""One rank's part of a batch of rollouts where these are episodes: playing them, and what they are as samples."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.data.episodes import Episode, Part, Stop, judge_episodes
from posttrain.data.sample import Sample
from posttrain.data.turns import Turns
from posttrain.errors import WorldError
from posttrain.methods.base import Start
from posttrain.objectives.turns import over_tokens
from posttrain.rollouts.episodes import EpisodeSampler, Played, environment_seed, replayed
from posttrain.tracking.metrics import Add
from posttrain.trainers.rollout_step import Item, SampleStep, sampling_of
from posttrain.trainers.shell import RunParts

_REPLAYED = 4
"""Episodes of the first rollout that are played again, to see whether they are functions of their actions."""


class EpisodeStep(SampleStep):
    """Plays and scores, for recipes with an environment."""

    def __init__(self, parts: RunParts, seed: int, record: Add) -> None:
        super().__init__(parts, seed, record)
        config = parts.recipe.environment
        self.config, self.turns = config, Turns(parts.renderer, config)
        self.sampler = EpisodeSampler(parts.engine, parts.environments, self.turns, config)
        self._tried = False

    def sample(self, window: int, items: Sequence[Item], first: int) -> list[Sample]:
        """Episodes of some prompts as samples.

        Raises:
            WorldError: the environment failed in too many of them.
        """
        sampling = sampling_of(self.parts.recipe.rollouts, self.seed, window, first)
        starts = [self.start(window, item, first + local, self.traces.of(*item)) for local, item in enumerate(items)]
        seeds = [
            environment_seed(self.seed, window, first + local) if start.replay is None else start.replay.seed
            for local, start in enumerate(starts)
        ]
        problems = [problem for problem, _ in items]
        played = self.sampler.play(problems, seeds, sampling, [start.replay for start in starts])
        self._refuse_failures(played.episodes)
        self._try_again(played.episodes)
        self._count(played)
        if self.parts.judge is not None:
            started = time.perf_counter()
            judge_episodes(self.parts.judge, played.episodes)
            self.record("verify_seconds", time.perf_counter() - started, 1)
        groups = [first + local for local in range(len(items)) for _ in range(sampling.n)]
        prompts = [ids for _, ids in items for _ in range(sampling.n)]
        begun = [start for start in starts for _ in range(sampling.n)]
        every = zip(played.episodes, groups, prompts, begun, strict=True)
        return [sample for one in every for sample in as_samples(*one)]

    def _refuse_failures(self, episodes: Sequence[Episode]) -> None:
        failed = [episode for episode in episodes if not episode.stop.known]
        if len(failed) <= self.config.max_unknown_share * len(episodes):
            return
        reasons = Counter(f"{episode.stop}: {episode.detail}" for episode in failed).most_common(3)
        raise WorldError(
            f"the environment failed in {len(failed)} of {len(episodes)} episodes",
            where="environment",
            hint="most often:\n  " + "\n  ".join(f"{number} times {reason}" for reason, number in reasons),
        )

    def _try_again(self, episodes: Sequence[Episode]) -> None:
        """Say once if the environment does not answer the same actions in the same way."""
        if self._tried:
            return
        self._tried = True
        known = [episode for episode in episodes if episode.stop.known][:_REPLAYED]
        for episode, difference in zip(known, replayed(self.parts.environments, known), strict=True):
            if difference is not None:
                self.parts.tracker.message(
                    "warning: the environment is no function of problem, seed and actions, so a resumed run differs "
                    f"and a killed process costs its episodes: {episode.problem.id}, {difference}"
                )
                return

    def _count(self, played: Played) -> None:
        self.parts.ledger.sampled(played.read_tokens, played.new_tokens, pixels=played.pixels)
        self.parts.ledger.acted(played.environment_steps)
        self.record("rollout_seconds", played.engine_seconds, 1)
        self.record("environment_seconds", played.environment_seconds, 1)
        episodes = played.episodes
        steps = [turn.step for episode in episodes for turn in episode.acted if turn.step is not None]
        observed = [len(turn.boundary) for episode in episodes for turn in episode.turns if turn.boundary]
        self.record("episode_turns", sum(len(episode.turns) for episode in episodes), len(episodes))
        self.record("invalid_action_share", sum(not step.valid for step in steps), len(steps))
        if observed:
            self.record("observation_length", sum(observed), len(observed))
        self.record("observation_cut_share", self.turns.shortened, len(episodes) + len(observed))
        self.turns.shortened = 0
        if played.drifted:
            self.record("template_drift_share", sum(played.drifted), len(played.drifted))
        stops = Counter(episode.stop for episode in episodes)
        for stop in Stop:  # those that did not happen too: elsewhere in the same entry they may have
            self.record(f"stop/{stop.value}", stops[stop], len(episodes))


def as_samples(episode: Episode, group: int, prompt_ids: Sequence[int], start: Start) -> list[Sample]:
    """An episode as rows, trained on their actions: one of prompt, action, boundary, action, ..., and more where the
    environment has changed the history.

    Args:
        episode: as it was played.
        group: of the rows.
        prompt_ids: what they consist of where the environment did not begin.
        start: where the policy began to act.
    """
    parts = episode.parts if episode.prompt_ids else [_unbegun(prompt_ids)]
    return [
        Sample(
            ids=part.ids,
            loss_mask=part.mask,
            origin=start.origin,
            problem_id=episode.problem.id,
            group=group,
            behaviour_logps=part.logps,
            policy_version=episode.policy_version,
            outcome=episode.outcome,
            reward=episode.reward,
            turn_rewards=part.rewards,
            part=number,
            finished=episode.stop in (Stop.DONE, Stop.GAVE_UP),
            prefix=part.mask.index(1) - len(episode.prompt_ids) if 1 in part.mask else 0,
            info=start.info,
            verdict=episode.status.value,
        )
        for number, part in enumerate(parts)
    ]


def _unbegun(prompt_ids: Sequence[int]) -> Part:
    return Part(list(prompt_ids), [0] * len(prompt_ids), [0.0] * len(prompt_ids), [])


def turn_rewards(rows: Sequence[Sample]) -> dict[str, Tensor]:
    """What `Scored` says of the turns of episodes: `turn_rewards`, `turns` and `episodes`."""
    longest = max(1, *(len(row.turn_rewards) for row in rows))
    padded = [[*row.turn_rewards, *([0.0] * (longest - len(row.turn_rewards)))] for row in rows]
    turns = torch.tensor([len(row.turn_rewards) for row in rows])
    episodes = torch.tensor([row.part == 0 for row in rows]).cumsum(0) - 1
    return {"turn_rewards": torch.tensor(padded), "turns": turns, "episodes": episodes}


def spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages of rows as they are, those of turns (B, K) as of tokens (B, T)."""
    return advantages if advantages.dim() == 1 else over_tokens(advantages, mask)
