"""Evaluate a policy: render, complete greedily and by sampling, verify, estimate. The engine may be the trainer's."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import posttrain
from posttrain.config.schema import BenchmarkConfig, EvaluationConfig, ModelConfig, VerifierPoolConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.sources import problems
from posttrain.errors import DataError, RecipeError
from posttrain.evaluation.benchmarks import resolve
from posttrain.evaluation.report import SCHEMA, BenchmarkReport, Pass, Record, Report, Sampling, measures
from posttrain.evaluation.statistics import mean_interval
from posttrain.models.loading import load_policy
from posttrain.rollouts import engine as rollouts
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.verdict import Judge, Status

NEED_REFERENCE = ("math", "exact", "numeric")
"""Verifier types that compare with the problem's reference."""

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "math-verify")


def evaluate(
    engine: rollouts.Engine,
    renderer: Renderer,
    judge_pool: VerifierPoolConfig,
    config: EvaluationConfig,
    *,
    model_label: str,
) -> Report:
    """Evaluate the policy behind `engine` on every benchmark of `config`.

    Problems with the same prompt and reference count once, because a repeat tells nothing new and would make the
    intervals too narrow. Completions whose verdict is unknown are left out and counted; a problem with fewer than k
    judged samples is left out of pass@k.

    Args:
        engine: samples from the policy; left open.
        renderer: the one of training, so that prompts are rendered as they were trained on.
        judge_pool: how verifiers run.
        config: the recipe's `evaluation` section; `every` is not read.
        model_label: name of the policy in the report.

    Raises:
        RecipeError: an unknown benchmark, or a k above `samples`.
        DataError: a benchmark without problems, or without references for a verifier that needs them.
    """
    started = time.perf_counter()
    benchmarks = resolve(config.benchmarks)
    _check_k(config)
    # All data is loaded before the first completion: a mistake in the last benchmark must not cost the work on others.
    prepared = [_prepare(renderer, judge_pool, benchmark, config.limit) for benchmark in benchmarks]
    reports = [_benchmark(engine, renderer, config, each) for each in prepared]
    return Report(
        schema=SCHEMA,
        model_label=model_label,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        engine=type(engine).__name__,
        template_hash=renderer.template_hash,
        versions=_versions(),
        seconds=time.perf_counter() - started,
        benchmarks=tuple(reports),
    )


def evaluate_model(model: ModelConfig, config: EvaluationConfig, output: Path | None) -> Report:
    """Load a model, on the GPU if there is one, and evaluate it.

    Args:
        model: what to load; `dtype` is the type of its weights.
        config: what to measure.
        output: file for the report, or None.

    Raises:
        RecipeError: as `evaluate`, or a `peft` section, which would have no effect.
        ModelError: the model cannot be loaded.
        DataError: as `evaluate`.
    """
    if model.peft is not None:
        raise RecipeError(
            "an adapter section has no effect on evaluation",
            where="model.peft",
            hint="leave it out, and give the folder of the trained model as path",
        )
    resolve(config.benchmarks)  # before the minutes that loading a model can take
    _check_k(config)
    policy, tokenizer = load_policy(model, seed=config.seed)
    policy.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
    engine = TransformersEngine(
        policy, stop_ids=renderer.stop_ids, pad_id=tokenizer.pad_token_id, max_batch=config.max_batch
    )
    label = (model.path or "random weights") + (f"@{model.revision}" if model.revision else "")
    with closing(engine):
        report = evaluate(engine, renderer, VerifierPoolConfig(), config, model_label=label)
    if output is not None:
        report.save(output)
    return report


def problem_hash(chosen: Sequence[Problem]) -> str:
    """SHA-256 over prompts, references and the wish for a chat, in order: what was asked, whatever the ids."""
    digest = hashlib.sha256()
    for problem in chosen:
        digest.update(_content(problem).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A benchmark with everything that can fail before the first completion done."""

    benchmark: BenchmarkConfig
    problems: list[Problem]
    repeated: int
    prompts: list[list[int]]
    judge: Judge


def _prepare(
    renderer: Renderer, judge_pool: VerifierPoolConfig, benchmark: BenchmarkConfig, limit: int | None
) -> _Prepared:
    loaded = problems(benchmark.data, benchmark.name)
    if not loaded:
        raise DataError("no problems", where=f"benchmark {benchmark.name}")
    first: dict[str, Problem] = {}
    for problem in loaded:
        first.setdefault(_content(problem), problem)
    chosen = list(first.values())[:limit]
    needy = [verifier.type for verifier in benchmark.verifier if verifier.type in NEED_REFERENCE]
    for problem in chosen:
        if problem.reference is None and needy:
            raise DataError(
                f"the {needy[0]} verifier needs a reference and this problem has none",
                where=problem.where or problem.id,
                hint=f"name the column with the gold answer: `reference` in the data of benchmark {benchmark.name!r}",
            )
    prompts = [renderer.prompt_ids(problem) for problem in chosen]
    return _Prepared(benchmark, chosen, len(loaded) - len(first), prompts, build_judge(benchmark.verifier, judge_pool))


def _content(problem: Problem) -> str:
    return json.dumps([problem.prompt, problem.reference, problem.chat], sort_keys=True)


def _benchmark(
    engine: rollouts.Engine, renderer: Renderer, config: EvaluationConfig, prepared: _Prepared
) -> BenchmarkReport:
    started, benchmark = time.perf_counter(), prepared.benchmark
    sampling = Sampling(
        greedy=config.greedy,
        samples=config.samples,
        k=tuple(sorted(set(config.k))),
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=benchmark.max_new_tokens or config.max_new_tokens,
        seed=config.seed,
    )
    greedy_settings = rollouts.Sampling(max_new_tokens=sampling.max_new_tokens, greedy=True, seed=config.seed)
    sampled_settings = rollouts.Sampling(
        n=config.samples,
        max_new_tokens=sampling.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    with closing(prepared.judge):
        greedy = _run(engine, renderer, prepared, greedy_settings) if config.greedy else None
        sampled = _run(engine, renderer, prepared, sampled_settings)
    records = _records(prepared.problems, None if greedy is None else greedy[0], sampled[0])
    values = {name: measure(records) for name, measure in measures(sampling).items()}
    known = {name: per_problem[~np.isnan(per_problem)] for name, per_problem in values.items()}
    return BenchmarkReport(
        name=benchmark.name,
        data=benchmark.data.model_dump(mode="json", exclude_none=True),
        verifier=[verifier.model_dump(mode="json", exclude_none=True) for verifier in benchmark.verifier],
        problem_hash=problem_hash(prepared.problems),
        repeated=prepared.repeated,
        sampling=sampling,
        metrics={name: mean_interval(found) if len(found) else None for name, found in known.items()},
        greedy=None if greedy is None else greedy[1],
        sampled=sampled[1],
        seconds=time.perf_counter() - started,
        records=records,
    )


def _run(
    engine: rollouts.Engine, renderer: Renderer, prepared: _Prepared, settings: rollouts.Sampling
) -> tuple[list[list[Status]], Pass]:
    """The verdict on every completion, (P, n), and the counts over all."""
    answers = engine.generate(prepared.prompts, settings)
    flat = [completion for group in answers for completion in group]
    asked = [problem for problem in prepared.problems for _ in range(settings.n)]
    judgements = prepared.judge.judge(asked, [renderer.text(completion.ids) for completion in flat])
    statuses = [judgement.status for judgement in judgements]
    counts = Pass(
        completions=len(flat),
        truncated=sum(completion.finish == "length" for completion in flat),
        statuses={status: count for status, count in sorted(Counter(statuses).items())},
        prompt_tokens=sum(map(len, prepared.prompts)),
        new_tokens=sum(len(completion.ids) for completion in flat),
    )
    return [statuses[start : start + settings.n] for start in range(0, len(statuses), settings.n)], counts


def _records(
    chosen: Sequence[Problem], greedy: list[list[Status]] | None, sampled: list[list[Status]]
) -> tuple[Record, ...]:
    return tuple(
        Record(
            id=problem.id,
            greedy=None if greedy is None else greedy[index][0],
            samples=len(sampled[index]),
            judged=sum(status.known for status in sampled[index]),
            correct=sampled[index].count(Status.CORRECT),
        )
        for index, problem in enumerate(chosen)
    )


def _check_k(config: EvaluationConfig) -> None:
    for index, k in enumerate(config.k):
        if not 1 <= k <= config.samples:
            raise RecipeError(
                f"pass@{k} cannot be estimated from {config.samples} samples per problem",
                where=f"evaluation.k.{index}",
                hint=f"raise evaluation.samples to at least {k}" if k > 1 else "k is at least 1",
            )


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in _PACKAGES}
    return {"posttrain": posttrain.__version__, "python": platform.python_version()} | packages
