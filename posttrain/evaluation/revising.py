"""Answers that the model revises: each answer goes into the revision prompt, and what it writes there is the next one.

The use of a model that was trained to revise (SRPO, arXiv 2406.01660). All answers are greedy, so that accuracy after
i revisions is one measure with nothing drawn. An answer whose revision prompt would not leave room for an answer stays
as it is, and is counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from posttrain.data.rendering import Renderer
from posttrain.data.revisions import revision
from posttrain.data.sample import Problem
from posttrain.evaluation.journal import Chunk
from posttrain.evaluation.majority import answer_of
from posttrain.evaluation.passes import BATCHES_PER_CHUNK, KEPT_TEXTS, PassPlan, PreparedBenchmark, pass_identity
from posttrain.rollouts.engine import Completion, Engine, Sampling


def plan_revisions(
    prepared: PreparedBenchmark,
    settings: Sampling,
    renderer: Renderer,
    max_batch: int,
    *,
    revisions: int,
    template: str,
) -> PassPlan:
    """The pass that answers and revises. Row i of its outcome holds answer and revisions.

    Args:
        prepared: the benchmark.
        settings: greedy, one completion.
        renderer: of prompts and completions.
        max_batch: sequences per engine batch.
        revisions: of each answer, at least 1.
        template: of the revision prompt.
    """
    identity = {
        **pass_identity(prepared, settings, renderer),
        "revisions": revisions,
        "revision_template": template,
    }
    return PassPlan(identity, BATCHES_PER_CHUNK * max_batch, partial(_chunk, settings, revisions, template))


def next_prompts(
    renderer: Renderer, problems: Sequence[Problem], answers: Sequence[str], template: str, longest: int | None
) -> dict[int, list[int]]:
    """Place -> token ids of its revision prompt; places whose prompt has more than `longest` tokens are left out."""
    asked = zip(problems, answers, strict=True)
    prompts = [renderer.prompt_ids(revision(problem, answer, template)) for problem, answer in asked]
    return {place: ids for place, ids in enumerate(prompts) if longest is None or len(ids) <= longest}


def _chunk(
    settings: Sampling,
    revisions: int,
    template: str,
    engine: Engine,
    renderer: Renderer,
    prepared: PreparedBenchmark,
    key: str,
    part: slice,
) -> Chunk:
    started = time.perf_counter()
    problems, prompts = prepared.problems[part], prepared.prompts[part]
    longest = None if engine.positions is None else engine.positions - settings.max_new_tokens
    latest = [group[0] for group in engine.generate(prompts, settings)]
    rounds, read, unrevised = [latest], sum(map(len, prompts)), 0
    for _ in range(revisions):
        answers = [renderer.text(completion.ids) for completion in latest]
        asked = next_prompts(renderer, problems, answers, template, longest)
        groups = engine.generate(list(asked.values()), settings) if asked else []
        revised = dict(zip(asked, (group[0] for group in groups), strict=True))
        latest = [revised.get(place, completion) for place, completion in enumerate(latest)]
        rounds.append(latest)
        read += sum(map(len, asked.values()))
        unrevised += len(problems) - len(asked)
    flat: list[Completion] = [latest[place] for place in range(len(problems)) for latest in rounds]
    texts, lengths = [renderer.text(each.ids) for each in flat], [len(each.ids) for each in flat]
    asked_again = [problem for problem in problems for _ in rounds]
    judgements = prepared.judge.judge(asked_again, texts, lengths, [each.ids for each in flat])
    verdicts = [next(iter(judgement.verdicts.values())) for judgement in judgements]
    answers = [answer_of(verdict) if prepared.votes else None for verdict in verdicts]
    rows = range(0, len(flat), len(rounds))
    return Chunk(
        key=key,
        start=part.start,
        statuses=[[verdict.status for verdict in verdicts[row : row + len(rounds)]] for row in rows],
        answers=[answers[row : row + len(rounds)] for row in rows],
        truncated=sum(completion.finish == "length" for completion in flat),
        prompt_tokens=read,
        new_tokens=sum(lengths),
        seconds=time.perf_counter() - started,
        unrevised=unrevised,
        texts=[texts[row : row + min(len(rounds), KEPT_TEXTS)] for row in rows],
    )
