"""Collecting traces: many completions per prompt, verified, in a file that a killed run can go on with.

Reading order: `collect` is the whole story; `_Collection` does the rounds.

Which completions there are follows from the settings alone. Completion k of problem p is drawn with the numbers
(seed, p, k), whatever stands beside it in a batch; a problem is sampled in rounds, and whether it needs more is
decided at the end of a round from the verdicts so far. So a run that is killed and started again goes on with the
first completion that is not in the file, and ends with the same file as a run that was never broken off. What a kill
loses is the work of one call of the engine, which nobody has counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from posttrain.config.collection import SampleSettings
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.sources import problems
from posttrain.data.traces import Earlier, Manifest, Trace
from posttrain.data.truncation import fit_prompts
from posttrain.errors import DataError, StateError
from posttrain.models.loading import load_policy
from posttrain.models.size import non_embedding_parameters
from posttrain.rollouts.engine import Completion, Engine, Sampling
from posttrain.rollouts.guided import search_engine, value_identity
from posttrain.rollouts.provenance import content_hash, judged, manifest_of, policy_identity, problem_content
from posttrain.rollouts.revise import Chain, revise
from posttrain.rollouts.trace_file import TraceFile
from posttrain.tracking.ledger import ComputeLedger
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.verdict import Judge, Judgement

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
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = problems(config.data.prompts, "prompts")
    if not loaded:
        raise DataError("no problems", where="data.prompts")
    numbers = {problem.id: number for number, problem in enumerate(loaded)}
    asked = _distinct(loaded)
    judge = build_judge(config.verifier, config.verifier_pool)
    with closing(judge):
        policy, tokenizer = load_policy(config.model, seed=config.seed)
        policy.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
        renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
        prompts = [(problem, renderer.prompt_ids(problem)) for problem in asked]
        limit = _prompt_limit(config, policy)
        fitted, ledger = fit_prompts(prompts, limit, config.data.too_long, config.data.max_lost_share)
        say(f"prompts: {ledger.summary()}; {len(loaded) - len(asked)} repeats left out")
        engine = search_engine(
            policy,
            config.model,
            renderer,
            config.value,
            pad_id=tokenizer.pad_token_id,
            max_batch=config.rollouts.max_batch,
        )
        manifest = _manifest(config, policy, renderer, fitted, value_identity(engine, config.value))
        file = TraceFile(output, manifest)
        with closing(engine), closing(file):
            collection = _Collection(config, file, manifest, engine, judge, renderer, say)
            return collection.run([(numbers[problem.id], problem, ids) for problem, ids in fitted])


@dataclass(slots=True)
class _Prompt:
    """A problem with its number, and how far it is."""

    number: int
    problem: Problem
    ids: list[int]
    samples: int = 0
    correct: int = 0


class _Collection:
    def __init__(
        self,
        config: SampleSettings,
        file: TraceFile,
        manifest: Manifest,
        engine: Engine,
        judge: Judge,
        renderer: Renderer,
        say: Say,
    ) -> None:
        self.config, self.file, self.manifest, self.say = config, file, manifest, say
        self.engine, self.judge, self.renderer = engine, judge, renderer
        self.flops = ComputeLedger(manifest.parameters or 1).flops

    def run(self, prompts: Sequence[tuple[int, Problem, list[int]]]) -> Collected:
        states = [_Prompt(number, problem, ids) for number, problem, ids in prompts]
        traces = self.file.traces()
        self._restore(states, traces)
        found = len(traces)
        if found:
            self.say(f"found {found:,} completions in {self.file.path}")
        waiting = [state for state in states if self._wants(state)]
        for start in range(0, len(waiting), self.config.prompts_per_chunk):
            chunk = waiting[start : start + self.config.prompts_per_chunk]
            while chunk:
                for group in _alike(chunk, self._round_end):
                    traces += self._sample(group)
                chunk = [state for state in chunk if self._wants(state)]
            done = min(start + self.config.prompts_per_chunk, len(waiting))
            now = Collected.of(self.file.path, len(states), traces, found)
            self.say(f"{len(states) - len(waiting) + done:,} of {len(states):,} prompts done; {now.summary()}")
        return Collected.of(self.file.path, len(states), traces, found)

    def _restore(self, states: Sequence[_Prompt], traces: Sequence[Trace]) -> None:
        by_id = {state.problem.id: state for state in states}
        for trace in traces:
            state = by_id.get(trace.problem_id)
            if state is None or trace.sample != state.samples:
                raise StateError(
                    f"completion {trace.sample} of {trace.problem_id} is not what stands here in a file of this run",
                    where=str(self.file.path),
                    hint="the file was changed by hand; move it and its manifest away",
                )
            state.samples += 1
            state.correct += trace.correct

    def _wants(self, state: _Prompt) -> bool:
        if state.samples >= self.config.rollouts.samples_per_prompt:
            return False
        enough = self.config.stop_at_correct
        between_rounds = state.samples % self.config.round_size == 0
        return not (enough is not None and between_rounds and state.correct >= enough)

    def _round_end(self, state: _Prompt) -> int:
        size = self.config.round_size
        return min((state.samples // size + 1) * size, self.config.rollouts.samples_per_prompt)

    def _sample(self, group: Sequence[_Prompt]) -> list[Trace]:
        rollouts, first = self.config.rollouts, group[0].samples
        sampling = Sampling(
            n=self._round_end(group[0]) - first,
            max_new_tokens=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            top_p=rollouts.top_p,
            top_k=rollouts.top_k,
            seed=self.config.seed,
            first_sample=first,
            prompt_numbers=tuple(state.number for state in group),
        )
        answers = self._answers(group, sampling)
        readings = -(-sampling.n // rollouts.max_batch)  # the engine reads a prompt once for each batch it is in
        chains = [
            Chain(state.number, first + index, state.problem, state.ids, completion, 0 if index else readings)
            for state, answer in zip(group, answers, strict=True)
            for index, completion in enumerate(answer)
        ]
        if self.config.revisions:
            revise(self.engine, self.renderer, chains, self.config)
        verified = self._judged(chains)
        traces = []
        for state in group:
            for _ in range(sampling.n):
                traces.append(self._trace(state, *next(verified)))
                state.samples += 1
                state.correct += traces[-1].correct
        self.file.append(traces)
        return traces

    def _answers(self, group: Sequence[_Prompt], sampling: Sampling) -> list[list[Completion]]:
        prompts = [state.ids for state in group]
        if self.config.beams is None:
            return self.engine.generate(prompts, sampling)
        # A search gives all completions at once, so one that was broken off among them is made again.
        first, whole = sampling.first_sample, sampling.first_sample + sampling.n
        search = replace(sampling, n=whole, first_sample=0, beams=self.config.beams)
        return [found[first:] for found in self.engine.generate(prompts, search)]

    def _judged(self, chains: Sequence[Chain]) -> Iterator[tuple[Chain, list[str], list[Judgement]]]:
        """Each chain with the texts of its answers and what the verifiers say of them."""
        texts = [[self.renderer.text(completion.ids) for completion in chain.answers] for chain in chains]
        asked = [chain.problem for chain in chains for _ in chain.answers]
        lengths = [len(completion.ids) for chain in chains for completion in chain.answers]
        found = iter(self.judge.judge(asked, [text for written in texts for text in written], lengths))
        for chain, written in zip(chains, texts, strict=True):
            yield chain, written, [next(found) for _ in written]

    def _trace(self, state: _Prompt, chain: Chain, texts: list[str], judgements: list[Judgement]) -> Trace:
        problem, completion, read = state.problem, chain.answers[-1], chain.read_tokens
        *before, text = texts
        *verdicts, judgement = judgements
        earlier = [
            Earlier(said, verdict.status.value, verdict.outcome, len(answer.ids))
            for said, verdict, answer in zip(before, verdicts, chain.answers, strict=False)
        ]
        # A search is charged for all its beams, each as long as what it found.
        first, *revised = (len(answer.ids) for answer in chain.answers)
        beams = self.config.beams or 1
        kept = 1 if self.config.beams is None else self.config.rollouts.samples_per_prompt
        sampled = round(beams * first / kept) + beams * sum(revised)
        return Trace(
            problem_id=problem.id,
            sample=state.samples,
            prompt=problem.prompt,
            text=text,
            policy=self.manifest.policy["label"],
            manifest=self.manifest.id,
            reference=problem.reference,
            meta=problem.meta,
            chat=problem.chat,
            prompt_ids=chain.prompt_ids,
            ids=completion.ids,
            logps=[round(value, 6) for value in completion.logps],
            policy_version=completion.policy_version,
            finished=completion.finish == "stop",
            **judged(judgement),
            seed=self.config.seed,
            read_tokens=read,
            flops=self.flops({"prompt": read, "sampled": sampled}),
            earlier=earlier,
        )


# ------------------------------------------------------------------------------------------------------------ helpers


def _by_revision(traces: Sequence[Trace]) -> tuple[int, ...]:
    """Correct answers per round of revisions; a chain that ended early keeps its last answer."""
    rounds = max((len(trace.earlier) for trace in traces), default=0)
    verdicts = [[*(each.verdict for each in trace.earlier), trace.verdict] for trace in traces]
    return tuple(sum(v[min(i, len(v) - 1)] == "correct" for v in verdicts) for i in range(rounds + 1)) if rounds else ()


def _alike(chunk: Sequence[_Prompt], round_end: Callable[[_Prompt], int]) -> Iterator[list[_Prompt]]:
    """Prompts that go on at the same completion, to the same end; a kill can leave some in the middle of a round."""
    groups: dict[tuple[int, int], list[_Prompt]] = {}
    for state in chunk:
        groups.setdefault((state.samples, round_end(state)), []).append(state)
    yield from groups.values()


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
    value: dict[str, Any],
) -> Manifest:
    drawn = {"engine", "samples_per_prompt", "max_new_tokens", "temperature", "top_p", "top_k"}
    rollouts = config.rollouts.model_dump(mode="json", include=drawn)
    further = {"beams": config.beams, "revisions": config.revisions, "revision_template": config.revision_template}
    further = {name: given for name, given in (further | value).items() if given}  # absent where not asked for
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
