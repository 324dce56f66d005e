"""Evaluate a policy: render, complete greedily and by sampling, verify, estimate. The engine may be the trainer's."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
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
from posttrain.evaluation.benchmarks import resolve, revision
from posttrain.evaluation.choices import with_options
from posttrain.evaluation.journal import Journal
from posttrain.evaluation.majority import EXTRACTS_ANSWERS
from posttrain.evaluation.passes import Outcome, Prepared, extracts_answers, records, run_pass
from posttrain.evaluation.report import SCHEMA, BenchmarkReport, Report, Sampling, measures
from posttrain.evaluation.revising import run_revisions
from posttrain.evaluation.statistics import mean_interval
from posttrain.models.loading import load_policy
from posttrain.rollouts import engine as rollouts
from posttrain.rollouts.guided import search_engine, value_identity
from posttrain.state.identity import contents
from posttrain.verifiers.judge import build_judge

NEED_REFERENCE = ("math", "exact", "numeric", "choice")
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
    benchmarks = resolve(config.benchmarks, config.benchmark_paths)
    check_k(config, benchmarks)
    # All data is loaded before the first completion: a mistake in the last benchmark must not cost the work on others.
    prepared = [_prepare(renderer, judge_pool, benchmark, config.limit) for benchmark in benchmarks]
    reports = [_benchmark(engine, renderer, config, each, journal) for each in prepared]
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


def evaluate_model(
    model: ModelConfig, config: EvaluationConfig, output: Path | None, *, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Load a model, on the GPU if there is one, and evaluate it.

    With an output file, what is done is kept in `<output>.partial.jsonl` until the report is written: an interrupted
    evaluation goes on there when it is started again with the same model and settings.

    Args:
        model: what to load; `dtype` is the type of its weights.
        config: what to measure.
        output: file for the report, or None.
        say: gets a line where an interrupted evaluation is found.

    Raises:
        RecipeError: as `evaluate`, or a `peft` section, which would have no effect.
        ModelError: the model cannot be loaded.
        DataError: as `evaluate`.
        StateError: another evaluation writes to the same output.
    """
    if model.peft is not None:
        raise RecipeError(
            "an adapter section has no effect on evaluation",
            where="model.peft",
            hint="leave it out, and give the folder of the trained model as path",
        )
    # Before the minutes that loading a model can take.
    check_k(config, resolve(config.benchmarks, config.benchmark_paths))
    policy, tokenizer = load_policy(model, seed=config.seed)
    policy.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
    engine = search_engine(
        policy, model, renderer, config.value, pad_id=tokenizer.pad_token_id, max_batch=config.max_batch
    )
    label = (model.path or "random weights") + (f"@{model.revision}" if model.revision else "")
    if output is None:
        with closing(engine):
            return evaluate(engine, renderer, VerifierPoolConfig(), config, model_label=label)
    identity = {"content": contents((), (), renderer.template_hash, policy)["content"], "versions": _versions()}
    identity |= value_identity(engine, config.value)
    journal = Journal(output.with_name(f"{output.name}.partial.jsonl"), identity)
    if journal.keys:
        say(f"{journal.path} holds results of an interrupted evaluation; those of this model and these settings count")
    with closing(engine), closing(journal):
        report = evaluate(engine, renderer, VerifierPoolConfig(), config, model_label=label, journal=journal)
        report.save(output)
        journal.remove()
    return report


def problem_hash(chosen: Sequence[Problem]) -> str:
    """SHA-256 over prompts, references and the wish for a chat, in order: what was asked, whatever the ids."""
    digest = hashlib.sha256()
    for problem in chosen:
        digest.update(_content(problem).encode() + b"\n")
    return digest.hexdigest()


def check_k(config: EvaluationConfig, benchmarks: Sequence[BenchmarkConfig]) -> None:
    """Raises:
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
            hint="verifiers that do: " + ", ".join(EXTRACTS_ANSWERS),
        )


def _prepare(
    renderer: Renderer, judge_pool: VerifierPoolConfig, benchmark: BenchmarkConfig, limit: int | None
) -> Prepared:
    loaded = problems(benchmark.data, benchmark.name)
    if not loaded:
        raise DataError("no problems", where=f"benchmark {benchmark.name}")
    if benchmark.options is not None:
        loaded = [with_options(problem, benchmark.options) for problem in loaded]
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
    return Prepared(
        benchmark=benchmark,
        problems=chosen,
        repeated=len(loaded) - len(first),
        prompts=[renderer.prompt_ids(problem) for problem in chosen],
        judge=build_judge(benchmark.verifier, judge_pool),
        problem_hash=problem_hash(chosen),
        revision=revision(benchmark.data),
    )


def _content(problem: Problem) -> str:
    return json.dumps([problem.prompt, problem.reference, problem.chat], sort_keys=True)


def _benchmark(
    engine: rollouts.Engine, renderer: Renderer, config: EvaluationConfig, prepared: Prepared, journal: Journal | None
) -> BenchmarkReport:
    benchmark = prepared.benchmark
    sampling = Sampling(
        greedy=config.greedy,
        samples=config.samples,
        k=tuple(sorted(set(config.k))),
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=benchmark.max_new_tokens or config.max_new_tokens,
        seed=config.seed,
        maj=tuple(sorted(set(config.maj))) if prepared.votes else (),
        beams=config.beams,
        revisions=config.revisions,
        revision_template=config.revision_template,
    )
    greedy_settings = rollouts.Sampling(max_new_tokens=sampling.max_new_tokens, greedy=True, seed=config.seed)
    sampled_settings = rollouts.Sampling(
        n=config.samples,
        max_new_tokens=sampling.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    run = partial(run_pass, engine, renderer, prepared, max_batch=config.max_batch, journal=journal)
    with closing(prepared.judge):
        greedy = run(greedy_settings) if config.greedy else None
        sampled = run(sampled_settings)
        beam = run(replace(greedy_settings, greedy=False, beams=config.beams)) if config.beams else None
        revised = _revised(engine, renderer, config, prepared, greedy_settings, journal) if config.revisions else None
    found = records(prepared, greedy, sampled, beam, revised)
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
        seconds=sum(each.seconds for each in (greedy, sampled, beam, revised) if each is not None),
        records=found,
        licence=benchmark.licence,
        revision=prepared.revision,
        beam=None if beam is None else beam.counts,
        revised=None if revised is None else revised.counts,
    )


def _revised(
    engine: rollouts.Engine,
    renderer: Renderer,
    config: EvaluationConfig,
    prepared: Prepared,
    settings: rollouts.Sampling,
    journal: Journal | None,
) -> Outcome:
    assert config.revision_template is not None  # the section asks for it
    return run_revisions(
        engine,
        renderer,
        prepared,
        settings,
        revisions=config.revisions,
        template=config.revision_template,
        max_batch=config.max_batch,
        journal=journal,
    )


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in _PACKAGES}
    return {"posttrain": posttrain.__version__, "python": platform.python_version()} | packages
