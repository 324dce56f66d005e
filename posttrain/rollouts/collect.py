"""Collecting traces: many completions per prompt, verified, in a file that a killed run can go on with.

Reading order: `collect` is the whole story; `rounds` does the sampling, here or in several workers; `_Collection` keeps
what comes back.

Which completions there are follows from the settings alone (see `rounds`). So a run that is killed and started again
goes on with the first completion that is not in the file, and ends with the same completions as a run that was never
broken off, with as many workers as before or not. What a kill loses is the work of one call of the engine of each
worker, which nobody has counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from posttrain.config.collection import SampleSettings
from posttrain.config.own_code import digests
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.sources import problems
from posttrain.data.traces import Manifest, Trace
from posttrain.data.truncation import fit_prompts
from posttrain.errors import DataError, EngineError, StateError
from posttrain.models.loading import load_policy
from posttrain.models.size import non_embedding_parameters, size_of
from posttrain.phases import phase
from posttrain.rollouts.provenance import content_hash, manifest_of, policy_identity, problem_content
from posttrain.rollouts.rounds import RoundProgress, Rounds, wants_more
from posttrain.rollouts.standalone import EngineSettings, Extent, open_engine
from posttrain.rollouts.trace_file import TraceFile
from posttrain.rollouts.workers import require_ray, run_on_workers
from posttrain.verifiers.judge import build_judge

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a trace file holds, and what it cost: the ledger is the sum over its rows.

    Attributes:
        path: the file.
        prompts: problems that are sampled for.
        solved: problems with a correct completion.
        traces: completions.
        correct: correct ones among them.
        unknown: those that no verifier could judge.
        read_tokens: prompt tokens read by the engine.
        new_tokens: tokens sampled.
        flops: for both.
        found: completions that were in the file before.
        by_revision: correct answers after 0, 1, ... revisions; empty where nothing was revised.
    """

    path: Path
    prompts: int
    solved: int
    traces: int
    correct: int
    unknown: int
    read_tokens: int
    new_tokens: int
    flops: int
    found: int = 0
    by_revision: tuple[int, ...] = ()

    @classmethod
    def of(cls, path: Path, prompts: int, traces: Sequence[Trace], found: int = 0) -> Collected:
        return cls(
            path=path,
            prompts=prompts,
            solved=len({trace.problem_id for trace in traces if trace.correct}),
            traces=len(traces),
            correct=sum(trace.correct for trace in traces),
            unknown=sum(not trace.judged for trace in traces),
            read_tokens=sum(trace.read_tokens for trace in traces),
            new_tokens=sum(len(trace.ids or ()) + sum(each.tokens for each in trace.earlier) for trace in traces),
            flops=sum(trace.flops for trace in traces),
            found=found,
            by_revision=_by_revision(traces),
        )

    def summary(self) -> str:
        """One line for people."""
        shares = [f"{number / self.traces:.1%}" for number in self.by_revision]
        revised = f"; correct after 0, 1, ... revisions: {', '.join(shares)}" if shares else ""
        return (
            f"{self.traces:,} traces of {self.prompts:,} prompts ({self.found:,} of them found): "
            f"{self.correct:,} correct, {self.unknown:,} not judged; {self.solved:,} prompts solved; "
            f"{self.read_tokens:,} tokens read, {self.new_tokens:,} sampled, {self.flops:.3g} FLOPs{revised}"
        )


def collect(config: SampleSettings, output: Path, *, say: Say) -> Collected:
    """Sample until every prompt has its completions; goes on with a file of the same settings.

    Problems with the same prompt and reference are sampled once.

    Args:
        config: what to sample.
        output: the trace file, .jsonl.
        say: gets a line of progress per chunk.

    Raises:
        StateError: the file was made with other settings, or another process writes to it.
        DataError: no problems, or too many of them are too long.
        ModelError: the model cannot be loaded.
        StackError: vLLM or Ray is asked for and not installed.
        EngineError: the engine cannot start, or a worker died too often.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = engine_settings(config)
    settings.require()
    if config.workers > 1:
        require_ray(config.address)
    phase("reading the prompts")
    loaded = problems(config.data.prompts, "prompts")
    if not loaded:
        raise DataError("no problems", where="data.prompts")
    numbers = {problem.id: number for number, problem in enumerate(loaded)}
    asked = _distinct(loaded)
    judge = build_judge(config.verifier, config.verifier_pool)
    with closing(judge):
        phase(f"loading the model {config.model.path or 'from model.init'}")
        policy, tokenizer = load_policy(config.model, seed=config.seed)
        phase(f"rendering {len(asked):,} prompts")
        renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
        prompts = [(problem, renderer.prompt_ids(problem)) for problem in asked]
        limit = _prompt_limit(config, policy)
        fitted, ledger = fit_prompts(prompts, limit, config.data.too_long, config.data.max_lost_share)
        say(f"prompts: {ledger.summary()}; {len(loaded) - len(asked)} repeats left out")
        states = [RoundProgress(numbers[problem.id], problem, ids) for problem, ids in fitted]
        tokens = config.rollouts.max_new_tokens
        grows = config.revisions > 0 or config.sentences is not None
        extent = Extent.of([(ids, tokens) for _, ids in fitted], policy, grows=grows)
        identity = settings.identity(policy)
        manifest = _manifest(config, policy, renderer, fitted, identity)
        with closing(TraceFile(output, manifest)) as file:
            collection = _Collection(config, file, states, say)
            if config.workers > 1:
                del policy  # workers load it themselves
                collection.sample_on_workers(Sampler(config, manifest, extent))
            elif collection.chunks():
                looks = size_of(policy).looks
                engine = open_engine(policy, tokenizer, renderer, settings, extent)
                del policy
                with closing(engine):
                    collection.sample_here(Rounds(config, manifest, engine, judge, renderer, looks))
            collection.sort()
            return collection.result()


@dataclass(frozen=True, slots=True)
class Sampler:
    """A `Job`: what a worker that is another process needs to sample like this one.

    Attributes:
        config: how.
        manifest: of the traces.
        extent: sizes the engine.
    """

    config: SampleSettings
    manifest: Manifest
    extent: Extent

    def open(self) -> Rounds:
        """Load the policy.

        Raises:
            ModelError: as `load_policy`.
            EngineError: another model is found at that place than the command found.
        """
        config = self.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        policy, tokenizer = load_policy(config.model, seed=config.seed)
        if policy_identity(config.model, policy, config.seed) != self.manifest.policy:
            raise EngineError(
                f"a worker finds another model at {config.model.path!r} than the command did",
                where="model.path",
                hint="give a folder that all machines of the cluster share",
            )
        renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
        judge = build_judge(config.verifier, config.verifier_pool)
        looks = size_of(policy).looks
        engine = open_engine(policy, tokenizer, renderer, engine_settings(config), self.extent)
        return Rounds(config, self.manifest, engine, judge, renderer, looks)


def engine_settings(config: SampleSettings) -> EngineSettings:
    """The engine that `config` asks for."""
    rollouts = config.rollouts
    return EngineSettings(
        name=rollouts.engine,
        model=config.model,
        max_batch=rollouts.max_batch,
        vllm=rollouts.vllm,
        value=config.value,
        restricted=rollouts.top_p < 1.0 or rollouts.top_k is not None,
    )


class _Collection:
    """The file, what is in it and what is still to be sampled."""

    def __init__(self, config: SampleSettings, file: TraceFile, states: Sequence[RoundProgress], say: Say) -> None:
        self.config, self.file, self.say = config, file, say
        self.states = {state.problem.id: state for state in states}
        self.traces = file.traces()
        self.found = len(self.traces)
        for trace in self.traces:
            state = self.states.get(trace.problem_id)
            if state is None or trace.sample != state.samples:
                raise StateError(
                    f"completion {trace.sample} of {trace.problem_id} is not what stands here in a file of this run",
                    where=str(file.path),
                    hint="the file was changed by hand; move it and its manifest away",
                )
            state.count(trace)
        if self.found:
            say(f"found {self.found:,} completions in {file.path}")

    def chunks(self) -> list[list[RoundProgress]]:
        """Problems that need more, those together that an unbroken run gives to the engine together.

        So one that was broken off batches as that one does, except in the chunks that it had begun.
        """
        states, size = list(self.states.values()), self.config.prompts_per_chunk
        chunks = [states[start : start + size] for start in range(0, len(states), size)]
        wanting = [[state for state in chunk if wants_more(self.config, state)] for chunk in chunks]
        return [chunk for chunk in wanting if chunk]

    def sample_here(self, rounds: Rounds) -> None:
        """In this process, chunk by chunk."""
        for chunk in self.chunks():
            for traces in rounds.run(chunk):
                self._keep(traces)
            self._report()

    def sample_on_workers(self, sampler: Sampler) -> None:
        """In other processes, a chunk each; traces are kept as they come."""
        chunks, config = self.chunks(), self.config
        waiting = [{state.problem.id for state in chunk} for chunk in chunks]
        with closing(run_on_workers(sampler, chunks, workers=config.workers, address=config.address)) as results:
            for number, traces in results:
                for trace in traces:
                    self._count(trace)
                self._keep(traces)
                waiting[number] -= {id for id in waiting[number] if not wants_more(config, self.states[id])}
                if not waiting[number]:
                    self._report()

    def result(self) -> Collected:
        """What the file holds now."""
        return Collected.of(self.file.path, len(self.states), self.traces, self.found)

    def sort(self) -> None:
        """Put the file into the order of problems, which that of workers and restarts need not be."""
        places = {id: place for place, id in enumerate(self.states)}
        self.file.sort([(places[trace.problem_id], trace.sample) for trace in self.traces])

    def _count(self, trace: Trace) -> None:
        """Raises:
        EngineError: not the completion that comes next; a worker that started anew went another way.
        """
        state = self.states[trace.problem_id]
        if trace.sample != state.samples:
            raise EngineError(
                f"a worker gave completion {trace.sample} of {trace.problem_id} where {state.samples} is next",
                where="workers",
                hint="what is kept is right, and the same command goes on",
            )
        state.count(trace)

    def _keep(self, traces: list[Trace]) -> None:
        self.file.append(traces)
        self.traces += traces

    def _report(self) -> None:
        done = sum(not wants_more(self.config, state) for state in self.states.values())
        self.say(f"{done:,} of {len(self.states):,} prompts done; {self.result().summary()}")


# ------------------------------------------------------------------------------------------------------------ helpers


def _by_revision(traces: Sequence[Trace]) -> tuple[int, ...]:
    """Correct answers per round of revisions; a chain that ended early keeps its last answer."""
    rounds = max((len(trace.earlier) for trace in traces), default=0)
    verdicts = [[*(each.verdict for each in trace.earlier), trace.verdict] for trace in traces]
    return tuple(sum(v[min(i, len(v) - 1)] == "correct" for v in verdicts) for i in range(rounds + 1)) if rounds else ()


def _prompt_limit(config: SampleSettings, policy: PreTrainedModel) -> int | None:
    positions = getattr(policy.config, "max_position_embeddings", None)
    room = None if positions is None else positions - config.rollouts.max_new_tokens
    limits = [limit for limit in (config.data.max_prompt_length, room) if limit is not None]
    return min(limits, default=None)


def _manifest(
    config: SampleSettings,
    policy: PreTrainedModel,
    renderer: Renderer,
    prompts: Sequence[tuple[Problem, list[int]]],
    engine: dict[str, Any],
) -> Manifest:
    drawn = {"engine", "samples_per_prompt", "max_new_tokens", "temperature", "top_p", "top_k"}
    rollouts = config.rollouts.model_dump(mode="json", include=drawn)
    further: dict[str, Any] = {"beams": config.beams, "revisions": config.revisions}
    further |= {"sentences": None if config.sentences is None else config.sentences.model_dump(mode="json")}
    further |= {"revision_template": config.revision_template, "verifier_code": digests(config.verifier)}
    further = {name: given for name, given in (further | engine).items() if given}  # absent where not asked for
    return manifest_of(
        kind="sampled",
        policy=policy_identity(config.model, policy, config.seed),
        data=config.data.model_dump(mode="json", exclude_none=True),
        problems_hash=content_hash(problem_content(problem) + str(ids) for problem, ids in prompts),
        sampling=rollouts | {"stop_at_correct": config.stop_at_correct, "round_size": config.round_size} | further,
        seed=config.seed,
        verifier=[verifier.model_dump(mode="json", exclude_none=True) for verifier in config.verifier],
        template_hash=renderer.template_hash,
        parameters=non_embedding_parameters(policy),
    )


def _distinct(loaded: Sequence[Problem]) -> list[Problem]:
    """The first of every problem that stands there several times."""
    first: dict[str, Problem] = {}
    for problem in loaded:
        first.setdefault(problem_content(problem), problem)
    return list(first.values())
