"""Played episodes as an evaluation report: a benchmark for each level, so that they are compared as any other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import posttrain
from posttrain.config.schema import Recipe
from posttrain.data.episodes import Episode
from posttrain.evaluation.episodes import by_level
from posttrain.evaluation.report import SCHEMA, BenchmarkReport, Pass, ProblemRecord, Report, SamplingReport, measures
from posttrain.evaluation.runner import problem_hash
from posttrain.evaluation.statistics import mean_interval
from posttrain.verifiers.verdict import Status


def episode_report(recipe: Recipe, episodes: Sequence[Episode], samples: int, seconds: float) -> Report:
    """What came of episodes, `samples` of each problem side by side. One that nobody could judge is not solved.

    Args:
        recipe: that they were played by.
        seconds: of wall clock that they took.
    """
    levels = by_level(episodes)
    return Report(
        schema=SCHEMA,
        model_label=recipe.model.path or "random weights",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        engine="" if recipe.rollouts is None else recipe.rollouts.engine,
        template_hash="",
        versions={"posttrain": posttrain.__version__},
        seconds=seconds,
        benchmarks=tuple(_benchmark(recipe, name, own, samples, seconds / len(levels)) for name, own in levels),
    )


def _benchmark(
    recipe: Recipe, level: str, episodes: Sequence[Episode], samples: int, seconds: float
) -> BenchmarkReport:
    groups = [episodes[first : first + samples] for first in range(0, len(episodes), samples)]
    records = tuple(
        ProblemRecord(
            id=group[0].problem.id,
            greedy=None,
            samples=samples,
            judged=samples,
            correct=sum(episode.status is Status.CORRECT for episode in group),
        )
        for group in groups
    )
    rollouts: Any = recipe.rollouts
    environment: Any = recipe.environment
    prompts: Any = recipe.data.prompts
    sampling = SamplingReport(
        greedy=False,
        samples=samples,
        k=(1,),
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        max_new_tokens=rollouts.max_new_tokens,
        seed=recipe.seed,
    )
    statuses = [episode.status for episode in episodes]
    return BenchmarkReport(
        name=f"{environment.type}{f'-{level}' if level else ''}",
        data=prompts.model_dump(mode="json", exclude_none=True),
        verifier=[],
        problem_hash=problem_hash([group[0].problem for group in groups]),
        repeated=0,
        sampling=sampling,
        metrics={name: mean_interval(measure(records)) for name, measure in measures(sampling).items()},
        greedy=None,
        sampled=Pass(
            completions=len(episodes),
            truncated=0,
            statuses={status: statuses.count(status) for status in set(statuses)},
            prompt_tokens=sum(len(group[0].prompt_ids) for group in groups),
            new_tokens=sum(sum(episode.mask) for episode in episodes),
        ),
        seconds=seconds,
        records=records,
    )
