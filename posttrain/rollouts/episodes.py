"""Plays many episodes at once: each round asks the engine for one action of every live episode, then the environments.

A draw depends on (seed, number of the episode, number of the turn) and on nothing else. So an episode does not depend
on which others are played with it, and a run that is repeated plays the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from posttrain.config.environment import EnvironmentConfig
from posttrain.data.episodes import Episode, Replay, Stop, Turn
from posttrain.data.sample import Problem
from posttrain.data.turns import Conversation, Turns
from posttrain.environments.base import Failure, Fault, Step
from posttrain.environments.pool import EnvironmentPool
from posttrain.errors import DataError
from posttrain.rollouts.engine import Completion, Engine, Sampling

ENVIRONMENT_STREAM = 2
"""Tells the seeds of environments from other draws of the same seed and rollout."""


@dataclass(frozen=True, slots=True)
class Played:
    """Episodes in the order of their problems, and what they took.

    Attributes:
        read_tokens, new_tokens: that the engine read and sampled, over all rounds.
        pixels: of the pictures that it looked at, in each round at those of all contexts.
        environment_steps: actions that the environments answered.
        engine_seconds, environment_seconds: of wall clock.
        drifted: whether the template shows an episode otherwise than it was sampled, of those of prompt 0 with more
            than one turn.
    """

    episodes: list[Episode]
    read_tokens: int
    new_tokens: int
    pixels: int
    environment_steps: int
    engine_seconds: float
    environment_seconds: float
    drifted: list[bool]


@dataclass(slots=True)
class _Live:
    """An episode that is being played.

    Attributes:
        number: in the pool.
        key: for the draws.
        talk: what has been said; None until the environment has begun.
        invalid: actions in a row that were not understood.
    """

    number: int
    key: int
    episode: Episode
    talk: Conversation | None = None
    invalid: int = 0


class EpisodeSampler:
    """Plays episodes.

    Args:
        engine: acts.
        pool: of environments.
        turns: renders.
        config: limits of an episode.
    """

    def __init__(self, engine: Engine, pool: EnvironmentPool, turns: Turns, config: EnvironmentConfig) -> None:
        self.engine, self.pool, self.turns, self.config = engine, pool, turns, config
        self._numbers = count()

    def play(
        self,
        problems: Sequence[Problem],
        seeds: Sequence[int],
        sampling: Sampling,
        replays: Sequence[Replay | None] | None = None,
    ) -> Played:
        """`sampling.n` episodes of each problem.

        Args:
            problems: the prompt of the first has the number `sampling.first_prompt` for the draws.
            seeds: of the environment, one for each problem.
            sampling: how; `max_new_tokens` is for one action.
            replays: for each problem, the turns that its episodes begin with, of an episode with the same seed. One
                whose environment answers otherwise than it did has diverged.

        Raises:
            PosttrainError: the environment cannot be loaded, the template refuses what it says, or there is no room for
                an action.
        """
        first, most = sampling.first_prompt * sampling.n, self.config.max_turns
        if (first + len(problems) * sampling.n) * most >= 1 << 32:
            raise ValueError("more turns in a rollout than the draws can tell apart")
        pairs = zip(problems, seeds, strict=True)
        version = self.engine.policy_version
        episodes = [
            Episode(problem, sample, seed, policy_version=version)
            for problem, seed in pairs
            for sample in range(sampling.n)
        ]
        lives = [_Live(next(self._numbers), first + place, episode) for place, episode in enumerate(episodes)]
        started, read, new, pixels, engine_seconds = time.perf_counter(), 0, 0, 0, 0.0
        self._begin(lives)
        begun = [replay for replay in replays or [None] * len(problems) for _ in range(sampling.n)]
        self._replay([(live, replay) for live, replay in zip(lives, begun, strict=True) if replay is not None])
        with self.engine.together():
            for _ in range(most):
                acting = [live for live in lives if self._may_act(live, sampling.max_new_tokens)]
                if not acting:
                    break
                contexts = [live.talk.ids for live in acting]
                numbers = tuple(live.key * most + len(live.episode.turns) for live in acting)
                asked = replace(sampling, n=1, prompt_numbers=numbers)
                before = time.perf_counter()
                completions = [completion for (completion,) in self.engine.generate(contexts, asked)]
                engine_seconds += time.perf_counter() - before
                read += self.engine.read_tokens(contexts, asked)
                pixels += self.turns.renderer.pixels(contexts)
                new += sum(len(completion.ids) for completion in completions)
                self._act(acting, completions)
        self.pool.end(live.number for live in lives)
        looked = lives[: sampling.n if sampling.first_prompt == 0 else 0]  # the same ones on any number of ranks
        several = (live for live in looked if live.talk is not None and len(live.episode.turns) > 1)
        drifted = [self.turns.drifts(live.talk) for live in several]
        steps = sum(len(episode.steps) for episode in episodes)
        beside = time.perf_counter() - started - engine_seconds
        return Played(episodes, read, new, pixels, steps, engine_seconds, beside, drifted)

    def _begin(self, lives: Sequence[_Live]) -> None:
        """Reset the environments, and render what they show."""
        seen = self.pool.reset({live.number: (live.episode.problem, live.episode.seed) for live in lives})
        for live in lives:
            opening, episode = seen[live.number], live.episode
            if isinstance(opening, Failure):
                _fail(episode, opening)
                continue
            live.talk = self.turns.open(episode.problem, opening)
            episode.opening, episode.prompt = opening, tuple(live.talk.messages)
            episode.prompt_ids = list(live.talk.ids)

    def _replay(self, pairs: Sequence[tuple[_Live, Replay]]) -> None:
        """Play what was recorded again, to where the policy goes on."""
        for live, replay in pairs:
            if live.episode.stop is None and live.episode.opening != replay.opening:
                self._diverge(live, f"at the beginning it was {replay.opening!r}, and is {live.episode.opening!r}")
        for number in range(max((len(replay.turns) for _, replay in pairs), default=0)):
            going = [
                (live, r.turns[number]) for live, r in pairs if number < len(r.turns) and live.episode.stop is None
            ]
            steps = self.pool.step({live.number: turn.action for live, turn in going})
            for live, turn in going:
                step = steps[live.number]
                if isinstance(step, Failure):
                    _fail(live.episode, step)
                elif step != turn.step:
                    self._diverge(live, f"turn {number}, {turn.action!r}: it was {turn.step!r}, and is {step!r}")
                else:
                    boundary = tuple(self.turns.go_on(live.talk, turn.ids, step))
                    live.episode.turns.append(replace(turn, boundary=boundary))

    def _diverge(self, live: _Live, what: str) -> None:
        _fail(live.episode, Failure(Fault.DIVERGED, what[:300]))

    def _may_act(self, live: _Live, action_tokens: int) -> bool:
        """Whether an episode goes on. There must be room for the longest action, so that no limit cuts one."""
        episode = live.episode
        if episode.stop is not None:
            return False
        if len(live.talk.ids) + action_tokens <= self.config.episode_tokens:
            return True
        if not episode.turns:
            raise DataError(
                f"the beginning of an episode has {len(live.talk.ids)} tokens, and with an action of {action_tokens} "
                f"it is longer than environment.episode_tokens {self.config.episode_tokens}",
                where=episode.problem.where or episode.problem.id,
                hint="raise environment.episode_tokens, or lower environment.observation_tokens",
            )
        episode.stop = Stop.TOKEN_LIMIT
        return False

    def _act(self, acting: Sequence[_Live], completions: Sequence[Completion]) -> None:
        """Hand actions to the environments. One that its limit has cut is not done: where it ends is not known."""
        texts = [self.turns.renderer.text(completion.ids) for completion in completions]
        pairs = list(zip(acting, completions, texts, strict=True))
        steps = self.pool.step({live.number: text for live, made, text in pairs if made.finish == "stop"})
        for live, made, text in pairs:
            episode, step = live.episode, steps.get(live.number)
            turn = Turn(text, step if isinstance(step, Step) else None, tuple(made.ids), tuple(made.logps))
            if isinstance(step, Failure):
                _fail(episode, step)
            elif step is None:
                episode.stop = Stop.CUT
            else:
                live.invalid = 0 if step.valid else live.invalid + 1
                episode.stop = self._stop(live, step, last=len(episode.turns) + 1 == self.config.max_turns)
                if episode.stop is None:
                    patch = () if step.patch is None else self.turns.action_ids(step.patch)
                    boundary = tuple(self.turns.go_on(live.talk, patch or made.ids, step))
                    turn = replace(turn, boundary=boundary, patch=patch)
            episode.turns.append(turn)

    def _stop(self, live: _Live, step: Step, *, last: bool) -> Stop | None:
        if step.done:
            return Stop.DONE
        if live.invalid >= self.config.invalid_in_a_row:
            return Stop.GAVE_UP
        return Stop.TURN_LIMIT if last else None


def replayed(pool: EnvironmentPool, episodes: Sequence[Episode], first: int = 1 << 48) -> list[str | None]:
    """Whether environments that are given the same actions again answer as before: None, or the first difference.

    All episodes are played side by side in fresh instances, the last first, so that what leaks from one to another
    shows.

    Args:
        pool: that the episodes were played in, or another of the same environment.
        episodes: with the environment's answers.
        first: number of the first of them in the pool.

    Raises:
        WorldError, StackError: as `EnvironmentPool.start`.
    """
    numbers = {first + place: episode for place, episode in reversed(list(enumerate(episodes)))}
    found: dict[int, str | None] = dict.fromkeys(numbers)
    seen = pool.reset({number: (episode.problem, episode.seed) for number, episode in numbers.items()})
    for number, episode in numbers.items():
        if seen[number] != episode.opening:
            found[number] = f"at the beginning it was {episode.opening!r}, and is {seen[number]!r}"
    for turn in range(max((len(episode.steps) for episode in episodes), default=0)):
        going = {n: e for n, e in numbers.items() if found[n] is None and turn < len(e.steps)}
        steps = pool.step({number: episode.turns[turn].action for number, episode in going.items()})
        for number, episode in going.items():
            was, now = episode.steps[turn], steps[number]
            if now != was:
                found[number] = f"turn {turn}, {episode.turns[turn].action!r}: it was {was!r}, and is {now!r}"
    pool.end(numbers)
    return [found[first + place] for place in range(len(episodes))]


def environment_seed(seed: int, window: int, number: int) -> int:
    """The seed of the environments of one prompt in a rollout; 63 bits, the same for all its episodes."""
    key = [seed, window, number, ENVIRONMENT_STREAM]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _fail(episode: Episode, failure: Failure) -> None:
    episode.stop, episode.detail = Stop(failure.fault.value), failure.detail
