"""One pass over the problems of a benchmark, greedy or sampled: complete, verify and count, chunk by chunk."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from posttrain.config.own_code import digests
from posttrain.config.schema import BenchmarkConfig, EvaluationConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.errors import RecipeError
from posttrain.evaluation.journal import Chunk, Journal
from posttrain.evaluation.majority import answer_of, wrong_votes
from posttrain.evaluation.report import Pass, ProblemRecord, Written
from posttrain.rollouts import engine as rollouts
from posttrain.verifiers import VERIFIERS
from posttrain.verifiers.verdict import Judge, Status

BATCHES_PER_CHUNK = 4
"""Engine batches between two entries of the journal: enough to sort prompts by length, little enough to lose."""


KEPT_TEXTS = 8
"""Completions of a problem in one pass whose texts are kept in the report, so that it stays of a size to open."""


@dataclass(frozen=True, slots=True)
class PreparedBenchmark:
    """A benchmark with everything that can fail before the first completion done.

    Attributes:
        benchmark: its entry.
        problems: those that are asked.
        repeated: problems left out because an earlier one is the same.
        prompts: token ids, one list per problem.
        judge: open.
        problem_hash: see `runner.problem_hash`.
        revision: of the data, see `benchmarks.revision`.
    """

    benchmark: BenchmarkConfig
    problems: list[Problem]
    repeated: int
    prompts: list[list[int]]
    judge: Judge
    problem_hash: str
    revision: str | None

    @property
    def votes(self) -> bool:
        """Whether verdicts name the answers, so that maj@k can be counted."""
        return extracts_answers(self.benchmark)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All chunks of a pass together: (P, n) statuses and answers, texts, the counts, and the wall clock."""

    statuses: list[list[Status]]
    answers: list[list[str | None]]
    texts: list[list[str]]
    counts: Pass
    seconds: float


def extracts_answers(benchmark: BenchmarkConfig) -> bool:
    """Whether the verifier that judges the outcome says which answer it found."""
    return any(verifier.names_answers for verifier in benchmark.verifier)


def check_k(config: EvaluationConfig, benchmarks: Sequence[BenchmarkConfig]) -> None:
    """Refuse a pass@k or maj@k that these settings cannot give.

    Raises:
        RecipeError: a k that `samples` cannot give, or maj@k where no verifier says which answer it found.
    """
    for key, name in (("k", "pass"), ("maj", "maj")):
        for index, k in enumerate(getattr(config, key)):
            if not 1 <= k <= config.samples:
                raise RecipeError(
                    f"{name}@{k} cannot be estimated from {config.samples} samples per problem",
                    where=f"evaluation.{key}.{index}",
                    hint=f"raise evaluation.samples to at least {k}" if k > 1 else "k is at least 1",
                )
    if config.maj and not any(map(extracts_answers, benchmarks)):
        raise RecipeError(
            "maj@k has no effect: no benchmark has a verifier that says which answer it found",
            where="evaluation.maj",
            hint="verifiers that do: " + ", ".join(name for name, v in VERIFIERS.items() if v.Config.names_answers),
        )


@dataclass(frozen=True, slots=True)
class PassPlan:
    """A pass before it is run.

    Attributes:
        identity: what the result depends on, beside the model.
        step: problems per chunk.
        chunk: (engine, renderer, benchmark, key, problems) to what happened on them; picklable.
    """

    identity: Mapping[str, Any]
    step: int
    chunk: Callable[[rollouts.Engine, Renderer, PreparedBenchmark, str, slice], Chunk]


def plan_pass(prepared: PreparedBenchmark, settings: rollouts.Sampling, renderer: Renderer, max_batch: int) -> PassPlan:
    """The pass that samples by `settings`, whose `first_prompt` is set later, in engine batches of `max_batch`."""
    step = max(1, BATCHES_PER_CHUNK * max_batch // max(settings.n, settings.beams))
    return PassPlan(pass_identity(prepared, settings, renderer), step, partial(_chunk, settings))


def missing(problems: int, done: Sequence[Chunk], step: int) -> Iterator[slice]:
    """The problems that no chunk has, `step` at once at most. `done` is in order and may have gaps."""
    start = 0
    for begin, end in [*((chunk.start, chunk.start + len(chunk.statuses)) for chunk in done), (problems, problems)]:
        for first in range(start, begin, step):
            yield slice(first, min(first + step, begin))
        start = end


def run_pass(
    engine: rollouts.Engine, renderer: Renderer, prepared: PreparedBenchmark, plan: PassPlan, *, journal: Journal | None
) -> Outcome:
    """Do what the journal does not have yet.

    Args:
        engine: samples from the policy.
        renderer: gives the text of completions.
        prepared: the benchmark.
        plan: the pass.
        journal: None keeps nothing.
    """
    key = "" if journal is None else journal.key(plan.identity)
    chunks = [] if journal is None else journal.done(key)
    for part in list(missing(len(prepared.problems), chunks, plan.step)):
        chunk = plan.chunk(engine, renderer, prepared, key, part)
        if journal is not None:
            journal.append(chunk)
        chunks.append(chunk)
    return outcome_of(chunks)


def outcome_of(chunks: Sequence[Chunk]) -> Outcome:
    """All chunks of a pass together, in whatever order they were made."""
    chunks = sorted(chunks, key=lambda chunk: chunk.start)
    statuses = [row for chunk in chunks for row in chunk.statuses]
    flat = Counter(status for row in statuses for status in row)
    counts = Pass(
        completions=flat.total(),
        truncated=sum(chunk.truncated for chunk in chunks),
        statuses=dict(sorted(flat.items())),
        prompt_tokens=sum(chunk.prompt_tokens for chunk in chunks),
        new_tokens=sum(chunk.new_tokens for chunk in chunks),
        unrevised=sum(chunk.unrevised for chunk in chunks),
        drawn_tokens=sum(chunk.drawn_tokens for chunk in chunks),
    )
    answers = [row for chunk in chunks for row in chunk.answers]
    # Chunks of a journal that an earlier version wrote have none.
    texts = [row for chunk in chunks for row in chunk.texts or [[]] * len(chunk.statuses)]
    return Outcome(statuses, answers, texts, counts, sum(chunk.seconds for chunk in chunks))


def pass_identity(prepared: PreparedBenchmark, settings: rollouts.Sampling, renderer: Renderer) -> Mapping[str, Any]:
    """What the result of a pass depends on, beside the model."""
    sampling = asdict(settings)
    if settings.greedy or settings.beams > 1:  # nothing is drawn
        for name in ("temperature", "top_p", "top_k", "seed"):
            del sampling[name]
    return {
        "problems": prepared.problem_hash,
        "verifier": [verifier.model_dump(mode="json") for verifier in prepared.benchmark.verifier],
        **({"code": own} if (own := digests(prepared.benchmark.verifier)) else {}),
        "sampling": sampling,
        "template": renderer.template_hash,
        "stop": renderer.stop_ids,
    }


def records(
    prepared: PreparedBenchmark,
    renderer: Renderer,
    greedy: Outcome | None,
    sampled: Outcome,
    beam: Outcome | None = None,
    revised: Outcome | None = None,
) -> tuple[ProblemRecord, ...]:
    """One record per problem."""
    passes = {"greedy": greedy, "sampled": sampled, "beam": beam, "revised": revised}
    return tuple(
        ProblemRecord(
            id=problem.id,
            greedy=None if greedy is None else greedy.statuses[index][0],
            samples=len(sampled.statuses[index]),
            judged=sum(status.known for status in sampled.statuses[index]),
            correct=sampled.statuses[index].count(Status.CORRECT),
            votes=wrong_votes(sampled.answers[index]) if prepared.votes else None,
            beam=None if beam is None else beam.statuses[index][0],
            revised=() if revised is None else tuple(revised.statuses[index]),
            prompt=renderer.encoder.text(prepared.prompts[index], special=True),
            reference=problem.reference,
            completions=tuple(
                Written(made, status, text)
                for made, outcome in passes.items()
                if outcome is not None
                for status, text in zip(outcome.statuses[index], outcome.texts[index], strict=False)
            ),
        )
        for index, problem in enumerate(prepared.problems)
    )


def _chunk(
    settings: rollouts.Sampling,
    engine: rollouts.Engine,
    renderer: Renderer,
    prepared: PreparedBenchmark,
    key: str,
    part: slice,
) -> Chunk:
    started = time.perf_counter()
    prompts: Sequence[list[int]] = prepared.prompts[part]
    before = _drawn(engine)
    groups = engine.generate(prompts, replace(settings, first_prompt=part.start))
    flat = [completion for group in groups for completion in group]
    asked = [problem for problem in prepared.problems[part] for _ in range(settings.n)]
    texts, lengths = (
        [renderer.text(completion.ids) for completion in flat],
        [len(completion.ids) for completion in flat],
    )
    judgements = prepared.judge.judge(asked, texts, lengths, [completion.ids for completion in flat])
    outcomes = [next(iter(judgement.verdicts.values())) for judgement in judgements]
    statuses = [verdict.status for verdict in outcomes]
    answers = [answer_of(verdict) if prepared.votes else None for verdict in outcomes]
    rows = range(0, len(flat), settings.n)
    return Chunk(
        key=key,
        start=part.start,
        statuses=[statuses[row : row + settings.n] for row in rows],
        answers=[answers[row : row + settings.n] for row in rows],
        truncated=sum(completion.finish == "length" for completion in flat),
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=sum(lengths),
        seconds=time.perf_counter() - started,
        texts=[texts[row : row + min(settings.n, KEPT_TEXTS)] for row in rows],
        drawn_tokens=_drawn(engine) - before,
    )


def _drawn(engine: rollouts.Engine) -> int:
    return engine.tokens_drawn if isinstance(engine, rollouts.Searching) else 0
