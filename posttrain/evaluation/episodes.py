"""Episodes played for people: by the policy of a recipe, by an agent that is a program, or by a person."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.config.schema import Recipe, RecordedConfig
from posttrain.data.episodes import Episode, Stop, Turn, judge_episodes, read_episodes
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.turns import Turns
from posttrain.environments.base import Failure
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.recorded import by_problem, problem_key
from posttrain.environments.rooms import Agent, Expert, Weak
from posttrain.evaluation.statistics import Interval, mean_interval
from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.objectives.semi_online import semi_online_performance
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.episodes import EpisodeSampler, environment_seed
from posttrain.rollouts.standalone import EngineSettings, Extent, open_engine
from posttrain.verifiers.audit import build_checked_judge

ROOMS: Mapping[str, Callable[[int], Agent]] = {
    "expert": lambda seed: Expert(),
    "weak": lambda seed: Weak(random.Random(seed), careless=0.5),
}
"""Agents of the environment `rooms`, made for each episode with a seed."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of some episodes.

    Attributes:
        group: level of the problems, or `all`.
        episodes: how many.
        solved: mean outcome of the problems, clipped to [0, 1]; an episode that nobody could judge is not solved.
        unknown: episodes that the environment failed in, or a verifier.
        total: mean reward of the others.
        turns: mean number of actions.
        action_tokens: mean number of sampled tokens of an episode.
        invalid: share of actions that were not understood.
        stops: episodes by why they ended.
    """

    group: str
    episodes: int
    solved: Interval
    unknown: int
    total: float
    turns: float
    action_tokens: float
    invalid: float
    stops: dict[str, int]


def by_policy(recipe: Recipe, problems: Sequence[Problem], *, samples: int, greedy: bool) -> list[Episode]:
    """So many episodes of each problem by the recipe's model, sampled as its rollouts are.

    Raises:
        PosttrainError: as for training.
    """
    config, rollouts = recipe.environment, recipe.rollouts
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    policy, tokenizer = load_policy(recipe.model, seed=recipe.seed)
    renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
    turns = Turns(renderer, config)
    settings = EngineSettings(rollouts.engine, recipe.model, rollouts.max_batch, rollouts.vllm)
    settings.require()
    sampling = Sampling(
        n=samples,
        max_new_tokens=rollouts.max_new_tokens,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        top_k=rollouts.top_k,
        greedy=greedy,
        seed=recipe.seed,
    )
    with closing(EnvironmentPool(config)) as pool:
        problems = pool.equipped(problems)
        prompts = [renderer.prompt_ids(problem) for problem in problems]
        extent = Extent.of([(ids, config.episode_tokens - len(ids)) for ids in prompts], policy, grows=False)
        with closing(open_engine(policy, tokenizer, renderer, settings, extent)) as engine:
            sampler = EpisodeSampler(engine, pool, turns, config)
            episodes = sampler.play(problems, _seeds(recipe, problems), sampling).episodes
    _judge(recipe, problems, episodes)
    return episodes


def by_agent(
    recipe: Recipe, problems: Sequence[Problem], make: Callable[[int], Agent], samples: int = 1
) -> Iterator[Episode]:
    """So many episodes of each problem by a program or a person, one after another, without tokens.

    Args:
        recipe: names the environment and its limit on turns.
        problems: what to play.
        make: makes the agent of an episode, with a seed.
    """
    config = recipe.environment
    with closing(EnvironmentPool(config)) as pool:
        pairs = zip(problems, _seeds(recipe, problems), strict=True)
        several = ((problem, seed, sample) for problem, seed in pairs for sample in range(samples))
        for number, (problem, seed, sample) in enumerate(several):
            episode, agent = Episode(problem, sample, seed), make(seed + sample)
            seen = pool.reset({number: (problem, seed)})[number]
            if not isinstance(seen, Failure):
                episode.opening = seen
                shown = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
                seen = "\n\n".join(text for text in (shown, seen) if text)
                episode.prompt = ({"role": "user", "content": seen},)
            while episode.stop is None:
                if isinstance(seen, Failure):
                    episode.stop, episode.detail = Stop(seen.fault.value), seen.detail
                    break
                action = agent.act(seen)
                step = pool.step({number: action})[number]
                if isinstance(step, Failure):
                    seen = step
                    continue
                episode.turns.append(Turn(action, step))
                seen = step.observation
                if step.done:
                    episode.stop = Stop.DONE
                elif len(episode.turns) == config.max_turns:
                    episode.stop = Stop.TURN_LIMIT
            pool.end([number])
            _judge(recipe, [problem], [episode])
            yield episode


def _judge(recipe: Recipe, problems: Sequence[Problem], episodes: Sequence[Episode]) -> None:
    judge = build_checked_judge(recipe, METHODS[recipe.method.name](recipe.method).needs, problems)
    if judge is not None:
        with closing(judge):
            judge_episodes(judge, episodes)


def summaries(episodes: Sequence[Episode]) -> list[Summary]:
    """By the level of the problems, where they have one, and of all."""
    levels = sorted({e.problem.meta["level"] for e in episodes if "level" in e.problem.meta})
    groups = [(str(level), [e for e in episodes if e.problem.meta.get("level") == level]) for level in levels]
    return [_summary(name, group) for name, group in [*groups, ("all", list(episodes))]]


def sop(config: RecordedConfig, episodes: Sequence[Episode]) -> tuple[float, float, float]:
    """Semi-online performance along recorded episodes, without patches (`objectives.semi_online`).

    Args:
        config: with `patches: 0`.
        episodes: played there; those that nobody could judge count as wrong from the first action on.
    """
    recorded = by_problem(episode for path in config.paths for episode in read_episodes(Path(path)))
    right, turns = [], []
    for episode in episodes:
        known = recorded[problem_key(episode.problem)]
        turns.append(len(known[episode.seed % len(known)].turns))
        wrong = episode.stop is Stop.DONE and not episode.steps[-1].success
        right.append((len(episode.steps) - wrong) if episode.stop.known else 0)
    return semi_online_performance(right, turns)


def _summary(name: str, episodes: list[Episode]) -> Summary:
    known = [episode for episode in episodes if episode.outcome is not None]
    outcomes: dict[str, list[float]] = {}
    for episode in episodes:
        solved = 0.0 if episode.outcome is None else min(max(episode.outcome, 0.0), 1.0)
        outcomes.setdefault(episode.problem.id, []).append(solved)
    steps = [step for episode in episodes for step in episode.steps]
    stops = [str(episode.stop) for episode in episodes]
    return Summary(
        group=name,
        episodes=len(episodes),
        solved=mean_interval([sum(own) / len(own) for own in outcomes.values()]),
        unknown=len(episodes) - len(known),
        total=sum(episode.reward or 0.0 for episode in known) / max(len(known), 1),
        turns=sum(len(episode.turns) for episode in episodes) / len(episodes),
        action_tokens=sum(sum(episode.mask) for episode in episodes) / len(episodes),
        invalid=sum(not step.valid for step in steps) / max(len(steps), 1),
        stops={stop: stops.count(stop) for stop in sorted(set(stops))},
    )


def _seeds(recipe: Recipe, problems: Sequence[Problem]) -> list[int]:
    return [environment_seed(recipe.seed, 0, number) for number in range(len(problems))]
