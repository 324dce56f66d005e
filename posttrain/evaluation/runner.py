"""Evaluate a policy: render, complete greedily and by sampling, verify, estimate. The engine may be the trainer's."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import posttrain
from posttrain.config.pictured import shows_pictures
from posttrain.config.pictures import PictureConfig
from posttrain.config.schema import BenchmarkConfig, EvaluationConfig, ModelConfig, VerifierPoolConfig
from posttrain.config.workers import EvaluationRun
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.sources import problems
from posttrain.errors import DataError, NeedsError, RecipeError
from posttrain.evaluation.benchmarks import resolve, revision
from posttrain.evaluation.choices import with_options
from posttrain.evaluation.journal import Journal
from posttrain.evaluation.on_workers import Evaluator, content_of, run_passes
from posttrain.evaluation.passes import Outcome, PassPlan, PreparedBenchmark, check_k, plan_pass, records, run_pass
from posttrain.evaluation.report import SCHEMA, BenchmarkReport, Report, SamplingReport, measures
from posttrain.evaluation.revising import plan_revisions
from posttrain.evaluation.statistics import mean_interval
from posttrain.models.loading import load_policy
from posttrain.phases import phase
from posttrain.rollouts import engine as rollouts
from posttrain.rollouts.standalone import EngineSettings, Extent, open_engine
from posttrain.rollouts.workers import require_ray
from posttrain.verifiers.judge import PooledJudge, build_judge

"""Verifier types that compare with the problem's reference."""

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "math-verify")


def evaluate(
    engine: rollouts.Engine,
    renderer: Renderer,
    judge_pool: VerifierPoolConfig,
    config: EvaluationConfig,
    *,
    model_label: str,
    journal: Journal | None = None,
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
        journal: what is done is kept there and not done again; None keeps nothing.

    Raises:
        RecipeError: an unknown benchmark, a k above `samples`, or maj@k where no verifier names answers.
        DataError: a benchmark without problems, or without references for a verifier that needs them.
    """
    started = time.perf_counter()
    prepared = _prepared(renderer, judge_pool, config)
    plans = [_plans(renderer, config, each) for each in prepared]

    def run(number: int, name: str) -> Outcome:
        return run_pass(engine, renderer, prepared[number], plans[number][name], journal=journal)

    reports = _reports(config, renderer, prepared, plans, run)
    return _report(type(engine).__name__, renderer, reports, _versions(), model_label, started)


def evaluate_model(
    model: ModelConfig,
    config: EvaluationConfig | EvaluationRun,
    output: Path | None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Load a model, on the GPU if there is one, and evaluate it; with several workers, each of them loads it.

    With an output file, what is done is kept in `<output>.partial.jsonl` until the report is written: an interrupted
    evaluation goes on there when it is started again with the same model and settings.

    Args:
        model: what to load; `dtype` is the type of its weights.
        config: what to measure; an `EvaluationRun` also says with which engine and how many workers.
        output: file for the report, or None.
        say: gets a line where an interrupted evaluation is found.

    Raises:
        RecipeError: as `evaluate`, or a `peft` section, which would have no effect.
        ModelError: the model cannot be loaded.
        DataError: as `evaluate`.
        StateError: another evaluation writes to the same output.
        StackError: vLLM or Ray is asked for and not installed.
        EngineError: the engine cannot start, or a worker died too often.
    """
    if not isinstance(config, EvaluationRun):
        config = EvaluationRun.model_validate(config.model_dump(exclude_unset=True))
    if model.adapted:
        raise RecipeError(
            "an adapter section has no effect on evaluation",
            where="model.peft",
            hint="leave it out, and give the folder of the trained model as path",
        )
    # Before the minutes that loading a model can take.
    benchmarks = resolve(config.benchmarks, config.benchmark_paths)
    check_k(config, benchmarks)
    model = _with_pictures(model, config, benchmarks)
    settings = EngineSettings(config.engine, model, config.max_batch, config.vllm, config.value)
    settings.require()
    if config.workers > 1:
        require_ray(config.address)
    versions = _versions() | settings.versions()
    phase(f"loading the model {model.path or 'from model.init'}")
    policy, tokenizer = load_policy(model, seed=config.seed)
    renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
    label = (model.path or "random weights") + (f"@{model.revision}" if model.revision else "")
    content, journal = content_of(renderer, policy), None
    if output is not None:
        identity = {"content": content, "versions": versions} | settings.identity(policy)
        journal = Journal(output.with_name(f"{output.name}.partial.jsonl"), identity)
    with closing(journal) if journal is not None else nullcontext():
        if journal is not None and journal.keys:
            say(f"{journal.path} holds results of an interrupted evaluation; those of this model and settings count")
        started = time.perf_counter()
        phase("reading the benchmarks and verifying their references")
        prepared = _prepared(renderer, VerifierPoolConfig(), config)
        phase(f"evaluating {sum(len(each.problems) for each in prepared):,} problems")
        plans = [_plans(renderer, config, each) for each in prepared]
        extent = Extent.of(
            [(ids, _new_tokens(config, each)) for each in prepared for ids in each.prompts],
            policy,
            grows=config.revisions > 0,
        )
        if config.workers > 1:
            del policy  # workers load it themselves
            job = Evaluator(settings, extent, config.seed, tuple(prepared), VerifierPoolConfig(), content)
            found = run_passes(job, plans, journal, workers=config.workers, address=config.address)
            reports = _reports(config, renderer, prepared, plans, lambda number, name: found[number, name])
        else:
            engine = open_engine(policy, tokenizer, renderer, settings, extent)
            del policy
            with closing(engine):

                def run(number: int, name: str) -> Outcome:
                    return run_pass(engine, renderer, prepared[number], plans[number][name], journal=journal)

                reports = _reports(config, renderer, prepared, plans, run)
        report = _report(settings.kind.__name__, renderer, reports, versions, label, started)
        if output is not None and journal is not None:
            report.save(output)
            journal.remove()
    return report


def _with_pictures(model: ModelConfig, config: EvaluationRun, benchmarks: Sequence[BenchmarkConfig]) -> ModelConfig:
    """The model, to be loaded as one of text and pictures where a benchmark shows some.

    Raises:
        NeedsError: that is not built for another engine, several workers or a value model.
    """
    if not any(shows_pictures(each.data) for each in benchmarks):
        return model
    for key, other in (("engine", config.engine != "transformers"), ("workers", config.workers > 1)):
        if other:
            raise NeedsError(
                f"evaluating on pictures with {key} {getattr(config, key)} is not built",
                where=key,
                hint="take engine: transformers and workers: 1",
            )
    if config.value is not None:
        raise NeedsError(
            "a search on pictures guided by a value model is not built", where="value", hint="leave it out"
        )
    return model.model_copy(update={"pictures": model.pictures or PictureConfig()})


def problem_hash(chosen: Sequence[Problem]) -> str:
    """SHA-256 over prompts, references and the wish for a chat, in order: what was asked, whatever the ids."""
    digest = hashlib.sha256()
    for problem in chosen:
        digest.update(_content(problem).encode() + b"\n")
    return digest.hexdigest()


def _prepared(renderer: Renderer, judge_pool: VerifierPoolConfig, config: EvaluationConfig) -> list[PreparedBenchmark]:
    """All data, before the first completion: a mistake in the last benchmark must not cost the work on others.

    Benchmarks of equal verifiers have one judge, whose workers need not start anew; not where the user's code or a
    budget of requests may remember what it judged before."""
    benchmarks = resolve(config.benchmarks, config.benchmark_paths)
    check_k(config, benchmarks)
    judges: list[tuple[BenchmarkConfig, PooledJudge]] = []
    prepared = []
    for benchmark in benchmarks:
        judge = next((judge for other, judge in judges if other.verifier == benchmark.verifier), None)
        if judge is None:
            judge = build_judge(benchmark.verifier, judge_pool)
            if not (judge.own or judge.batched):
                judges.append((benchmark, judge))
        prepared.append(_prepare(renderer, judge, benchmark, config.limit))
    return prepared


def _prepare(
    renderer: Renderer, judge: PooledJudge, benchmark: BenchmarkConfig, limit: int | None
) -> PreparedBenchmark:
    loaded = problems(benchmark.data, benchmark.name)
    if not loaded:
        raise DataError("no problems", where=f"benchmark {benchmark.name}")
    if benchmark.options is not None:
        loaded = [with_options(problem, benchmark.options) for problem in loaded]
    first: dict[str, Problem] = {}
    for problem in loaded:
        first.setdefault(_content(problem), problem)
    chosen = list(first.values())[:limit]
    needy = [verifier.type for verifier in benchmark.verifier if verifier.needs_reference]
    for problem in chosen:
        if problem.reference is None and needy:
            raise DataError(
                f"the {needy[0]} verifier needs a reference and this problem has none",
                where=problem.where or problem.id,
                hint=f"name the column with the gold answer: `reference` in the data of benchmark {benchmark.name!r}",
            )
    return PreparedBenchmark(
        benchmark=benchmark,
        problems=chosen,
        repeated=len(loaded) - len(first),
        prompts=[renderer.prompt_ids(problem) for problem in chosen],
        judge=judge,
        problem_hash=problem_hash(chosen),
        revision=revision(benchmark.data),
    )


def _content(problem: Problem) -> str:
    return json.dumps([problem.prompt, problem.reference, problem.chat], sort_keys=True)


def _new_tokens(config: EvaluationConfig, prepared: PreparedBenchmark) -> int:
    return prepared.benchmark.max_new_tokens or config.max_new_tokens


def _plans(renderer: Renderer, config: EvaluationConfig, prepared: PreparedBenchmark) -> dict[str, PassPlan]:
    """The passes over a benchmark, in the order in which they are run."""
    greedy = rollouts.Sampling(max_new_tokens=_new_tokens(config, prepared), greedy=True, seed=config.seed)
    sampled = replace(greedy, greedy=False, n=config.samples, temperature=config.temperature, top_p=config.top_p)
    plan = partial(plan_pass, prepared, renderer=renderer, max_batch=config.max_batch)
    plans = {"greedy": plan(greedy)} if config.greedy else {}
    plans["sampled"] = plan(sampled)
    if config.beams:
        plans["beam"] = plan(replace(greedy, greedy=False, beams=config.beams))
    if config.revisions:
        assert config.revision_template is not None  # the section asks for it
        how: dict[str, Any] = {"revisions": config.revisions, "template": config.revision_template}
        plans["revised"] = plan_revisions(prepared, greedy, renderer, config.max_batch, **how)
    return plans


def _reports(
    config: EvaluationConfig,
    renderer: Renderer,
    prepared: Sequence[PreparedBenchmark],
    plans: Sequence[Mapping[str, PassPlan]],
    run: Callable[[int, str], Outcome],
) -> list[BenchmarkReport]:
    """Run the passes of every benchmark, named by its number and theirs, and sum them up."""
    reports = []
    for number, (each, named) in enumerate(zip(prepared, plans, strict=True)):
        with ExitStack() as stack:
            stack.callback(each.judge.close)
            outcomes = {name: run(number, name) for name in named}
            if any(other.judge is each.judge for other in prepared[number + 1 :]):
                stack.pop_all()
        reports.append(_benchmark(config, renderer, each, outcomes))
    return reports


def _benchmark(
    config: EvaluationConfig, renderer: Renderer, prepared: PreparedBenchmark, outcomes: Mapping[str, Outcome]
) -> BenchmarkReport:
    benchmark = prepared.benchmark
    sampling = SamplingReport(
        greedy=config.greedy,
        samples=config.samples,
        k=tuple(sorted(set(config.k))),
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=_new_tokens(config, prepared),
        seed=config.seed,
        maj=tuple(sorted(set(config.maj))) if prepared.votes else (),
        beams=config.beams,
        revisions=config.revisions,
        revision_template=config.revision_template,
    )
    greedy, sampled, beam, revised = map(outcomes.get, ("greedy", "sampled", "beam", "revised"))
    assert sampled is not None
    found = records(prepared, renderer, greedy, sampled, beam, revised)
    values = {name: measure(found) for name, measure in measures(sampling).items()}
    known = {name: per_problem[~np.isnan(per_problem)] for name, per_problem in values.items()}
    return BenchmarkReport(
        name=benchmark.name,
        data=benchmark.data.model_dump(mode="json", exclude_none=True),
        verifier=[verifier.model_dump(mode="json", exclude_none=True) for verifier in benchmark.verifier],
        problem_hash=prepared.problem_hash,
        repeated=prepared.repeated,
        sampling=sampling,
        metrics={name: mean_interval(judged) if len(judged) else None for name, judged in known.items()},
        greedy=None if greedy is None else greedy.counts,
        sampled=sampled.counts,
        seconds=sum(each.seconds for each in outcomes.values()),
        records=found,
        licence=benchmark.licence,
        revision=prepared.revision,
        beam=None if beam is None else beam.counts,
        revised=None if revised is None else revised.counts,
    )


def _report(
    engine: str,
    renderer: Renderer,
    reports: Sequence[BenchmarkReport],
    versions: dict[str, str],
    model_label: str,
    started: float,
) -> Report:
    return Report(
        schema=SCHEMA,
        model_label=model_label,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        engine=engine,
        template_hash=renderer.template_hash,
        versions=versions,
        seconds=time.perf_counter() - started,
        benchmarks=tuple(reports),
    )


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in _PACKAGES}
    return {"posttrain": posttrain.__version__, "python": platform.python_version()} | packages
