"""Episodes played for people: by the policy of a recipe, by an agent that is a program, or by a person."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.config.schema import Recipe
from posttrain.data.episodes import Episode, Stop, Turn, judge_episodes, read_episodes
from posttrain.data.preparation import load_rows
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.turns import Turns
from posttrain.environments.base import Failure
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.recorded import Recorded, by_problem, problem_key
from posttrain.environments.rooms import Agent, Expert, Rooms, Weak
from posttrain.errors import RecipeError, nearest
from posttrain.evaluation.statistics import Interval, mean_interval
from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.models.size import size_of
from posttrain.objectives.semi_online import semi_online_performance
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.episodes import EpisodeSampler, environment_seed
from posttrain.rollouts.standalone import EngineSettings, Extent, open_engine
from posttrain.tracking.ledger import AMOUNTS, ComputeLedger
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


@dataclass(frozen=True, slots=True)
class PlayedEpisodes:
    """Episodes of each problem in turn, and what they took by the names of `tracking.ledger.AMOUNTS`."""

    episodes: list[Episode]
    spent: dict[str, float]


def play(
    recipe: Recipe,
    agent: str,
    number: int,
    *,
    samples: int = 1,
    greedy: bool = False,
    further: Mapping[str, Callable[[int], Agent]] | None = None,
) -> PlayedEpisodes:
    """Episodes of the first problems of a recipe, by its policy or an agent of its environment.

    Args:
        agent: who acts: `policy`, or as of `agent_of`.
        number: of problems.
        samples: episodes of each.
        greedy: take the likeliest tokens; policy only.
        further: agents beside those of the environment.

    Raises:
        PosttrainError: as for training; an agent that the environment does not have, or fewer problems.
    """
    make, problems = agent_of(recipe, agent, further), problems_of(recipe, number)
    if make is None:
        return by_policy(recipe, problems, samples=samples, greedy=greedy)
    episodes = list(by_agent(recipe, problems, make, samples))
    return PlayedEpisodes(episodes, {"environment_steps": sum(len(episode.steps) for episode in episodes)})


def agent_of(
    recipe: Recipe, name: str, further: Mapping[str, Callable[[int], Agent]] | None = None
) -> Callable[[int], Agent] | None:
    """What makes an agent of the recipe's environment, or one of `further`; None for the policy.

    Raises:
        RecipeError: there is none of that name.
    """
    of_rooms = isinstance(recipe.environment, Rooms.Config) or getattr(recipe.data.prompts, "task", None) == "rooms"
    known: dict[str, Callable[[int], Agent] | None] = {
        "policy": None,
        **(further or {}),
        **(ROOMS if of_rooms else {}),
    }
    if name not in known:
        raise RecipeError(f"there is no agent {name!r} here", where="agent", hint=nearest(name, known))
    return known[name]


def problems_of(recipe: Recipe, number: int) -> list[Problem]:
    """The first problems of `data.prompts`.

    Raises:
        RecipeError: there are fewer.
    """
    problems: Any = load_rows(recipe, METHODS[recipe.method.name](recipe.method).needs)
    if len(problems) < number:
        raise RecipeError(
            f"there are {len(problems)} problems, and {number} are to be played",
            where="data.prompts",
            hint=f"play {len(problems)}, or give more problems",
        )
    return problems[:number]


def by_policy(recipe: Recipe, problems: Sequence[Problem], *, samples: int, greedy: bool) -> PlayedEpisodes:
    """So many episodes of each problem by the recipe's model, sampled as its rollouts are.

    Raises:
        PosttrainError: as for training.
    """
    config, rollouts = recipe.environment, recipe.rollouts
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    policy, tokenizer = load_policy(recipe.model, seed=recipe.seed)
    size = size_of(policy)
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
            played = sampler.play(problems, _seeds(recipe, problems), sampling)
    _judge(recipe, problems, played.episodes)
    ledger = ComputeLedger({"policy": size}, acts=True)
    ledger.sampled(played.read_tokens, played.new_tokens, pixels=played.pixels)
    ledger.acted(played.environment_steps)
    spent = {name: amount for name, amount in ledger.step().items() if name in AMOUNTS and "seconds" not in name}
    return PlayedEpisodes(played.episodes, spent)


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
    groups = [(level, own) for level, own in by_level(episodes) if level]
    return [_summary(name, group) for name, group in [*groups, ("all", list(episodes))]]


def by_level(episodes: Sequence[Episode]) -> list[tuple[str, list[Episode]]]:
    """Levels of the problems with their episodes; those of problems without a level under an empty one."""
    found: dict[str, list[Episode]] = {}
    for episode in episodes:
        found.setdefault(str(episode.problem.meta.get("level", "")), []).append(episode)
    return sorted(found.items(), key=lambda pair: (len(pair[0]), pair[0]))


def sop(config: Recorded.Config, episodes: Sequence[Episode]) -> tuple[float, float, float]:
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
