"""Traces as material for training: read, filtered, rendered as the policy would continue them, and found by problem.

A trace that the same model sampled keeps its own token ids. That is decided by content: its prompt has the ids that
the prompt has now, and its ids read as its text. All others are rendered from their text like written completions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.config.mixtures import parts
from posttrain.config.schema import FileSource, TaskSource, Traces, TraceSource, TraceWeights
from posttrain.data.bad_rows import BadRows
from posttrain.data.episodes import Episode, holds_episodes, read_episodes
from posttrain.data.recorded import example_of, own_sample, trace_of
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Message, Problem, Sample
from posttrain.data.sources import examples
from posttrain.data.traces import Trace, read_traces
from posttrain.data.truncation import Ledger, fit_samples
from posttrain.errors import DataError, RecipeError


@dataclass(frozen=True, slots=True)
class WrittenTrace:
    """A trace as read.

    Attributes:
        example: problem and completion as text.
        trace: what else is known, for rows of trace files.
        weight: how often it is drawn, relative to others.
        source: name of its source.
        episode: that it is, for rows of files of episodes.
    """

    example: Example
    trace: Trace | None = None
    weight: float = 1.0
    source: str = ""
    episode: Episode | None = None

    @property
    def problem(self) -> Problem:
        """That it answers."""
        return self.example.problem


@dataclass(frozen=True, slots=True)
class KnownTrace:
    """A trace as tokens.

    Attributes:
        problem: that it answers.
        prompt_ids: of the rendered prompt.
        ids: of the completion, the end token included; without one if it was cut.
        outcome: what the verifier said; None for traces that were not verified.
        policy: who wrote it; empty where nobody said.
        logps: of `ids` under the policy that sampled them; None where that is unknown or the ids are not its own.
        finished: it ends with its end token.
        mask: of each of `ids`, whether the author wrote it; 0 where a conversation has turns of others.
        weight: as in `WrittenTrace`.
        step_ends: as in `Trace`.
        source, episode: as in `WrittenTrace`.
    """

    problem: Problem
    prompt_ids: list[int]
    ids: list[int]
    mask: list[int]
    outcome: float | None = None
    policy: str = ""
    logps: list[float] | None = None
    finished: bool = True
    weight: float = 1.0
    step_ends: list[int] | None = None
    source: str = ""
    episode: Episode | None = None

    @property
    def length(self) -> int:
        """Tokens, prompt included."""
        return len(self.prompt_ids) + len(self.ids)

    @property
    def verified(self) -> float:
        """What the verifier said.

        Raises:
            DataError: nothing.
        """
        if self.outcome is None:
            raise DataError(
                "a trace without an outcome, and the reward is made of it",
                where=self.problem.where or self.problem.id,
                hint="verify the traces: `posttrain sample` and `posttrain prepare traces` do so with a `verifier`",
            )
        return self.outcome

    @property
    def asked(self) -> Problem:
        """The problem as the data give it: without what an environment has shown at the beginning."""
        return self.problem if self.episode is None else self.episode.problem


def load_trace_sources(
    section: Traces | list[Traces], *, offline: bool = False, bad: BadRows | None = None
) -> list[WrittenTrace]:
    """The traces of `data.traces`, source after source. Errors as for `load_traces`.

    Raises:
        RecipeError: only some sources draw by weight.
    """
    sources = parts(section, "traces")
    weighted = {name: getattr(source, "weights", None) is not None for name, source in sources}
    if len(set(weighted.values())) > 1:
        name = next(name for name, given in weighted.items() if not given)
        raise RecipeError(
            f"{name} has no `weights`, and other sources of traces have",
            where="data.traces",
            hint="give every source some, or none",
        )
    return [
        replace(written, source=name)
        for name, source in sources
        for written in load_traces(source, name, offline=offline, bad=bad)
    ]


def load_traces(source: Traces, name: str, *, offline: bool = False, bad: BadRows | None = None) -> list[WrittenTrace]:
    """The traces of a source that its `keep` and `per_problem` let through, in its order.

    Raises:
        DataError: a missing file or bad row, or none is left.
    """
    if isinstance(source, FileSource | TaskSource):
        return [WrittenTrace(example) for example in examples(source, name, offline=offline, bad=bad)]
    return _from_files(source, name, bad or BadRows())


def _from_files(source: TraceSource, name: str, bad: BadRows) -> list[WrittenTrace]:
    every = _written(source)
    traces = [trace for trace, _ in every]
    kept: list[WrittenTrace] = []
    taken: dict[str, int] = {}
    why: Counter[str] = Counter()
    for trace, episode in every:
        if episode is not None and not episode.stop.known:
            why["the environment failed"] += 1
        elif source.keep == "correct" and not trace.correct:
            why["not correct (`keep`)"] += 1
        elif not trace.text.strip():
            why["without text"] += 1
        elif source.per_problem is not None and taken.get(trace.problem_id, 0) >= source.per_problem:
            why["beyond `per_problem`"] += 1
        else:
            taken[trace.problem_id] = taken.get(trace.problem_id, 0) + 1
            example = Example(trace.problem, trace.text) if episode is None else example_of(episode)
            kept.append(WrittenTrace(example, trace, episode=episode))
    for reason, number in why.items():
        bad.leave_out(name, reason, number)
    if not kept and (source.keep == "all" or any(trace.correct for trace in traces)):
        reasons = ", ".join(f"{number} {reason}" for reason, number in why.items())
        raise DataError(f"none of the {len(traces)} traces can be used: {reasons}", where=name)
    if not kept:
        judged = sum(trace.judged for trace in traces)
        raise DataError(
            f"none of the {len(traces)} traces is correct; {judged} were verified",
            where=name,
            hint="`keep: all` takes them as they are" if not judged else "sample more of them, or from a better policy",
        )
    return kept if source.weights is None else _weighted(kept, traces, source.weights, name)


def _written(source: TraceSource) -> list[tuple[Trace, Episode | None]]:
    """What the files hold: traces, or episodes."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    told = [path for path in paths if holds_episodes(Path(path))]
    episodes = [episode for path in told for episode in read_episodes(Path(path))]
    others = [path for path in paths if path not in told]
    traces = read_traces(others).traces if others else []
    return [*((trace, None) for trace in traces), *((trace_of(episode), episode) for episode in episodes)]


def _weighted(kept: list[WrittenTrace], traces: list[Trace], weights: TraceWeights, name: str) -> list[WrittenTrace]:
    """The traces with their weights; the mean reward of a problem is over all its traces, also those that are not kept.

    Raises:
        DataError: a trace without a reward.
    """
    unknown = next((written.trace for written in kept if written.trace.reward is None), None)
    if unknown is not None:
        raise DataError(
            f"trace {unknown.sample} of {unknown.problem_id} has no reward to weigh it by",
            where=f"{name}.weights",
            hint="leave `weights` out, or take traces that a verifier has judged",
        )
    rewards: dict[str, list[float]] = {}
    for trace in traces:
        if trace.reward is not None:
            rewards.setdefault(trace.problem_id, []).append(trace.reward)
    means = {problem: sum(found) / len(found) for problem, found in rewards.items()}
    values = [
        written.trace.reward - (means[written.trace.problem_id] if weights.by == "advantage" else 0.0)
        for written in kept
    ]
    return [replace(w, weight=x) for w, x in zip(kept, trajectory_weights(values, weights.alpha), strict=True)]


def trajectory_weights(values: Sequence[float], alpha: float) -> list[float]:
    """exp(scaled / alpha), normalised to a sum of 1, with scaled = (value - smallest) / (largest - smallest).

    Equal values get equal weights. Source: arXiv 2306.13085, section 4.
    """
    low, high = min(values), max(values)
    scaled = [(value - low) / (high - low) if high > low else 0.0 for value in values]
    powers = [math.exp((x - 1.0) / alpha) if high > low else 1.0 for x in scaled]  # the largest is 1: no overflow
    total = math.fsum(powers)
    return [power / total for power in powers]


def fit_traces(
    traces: Sequence[WrittenTrace],
    renderer: Renderer,
    *,
    max_prompt_length: int | None,
    max_length: int | None,
    policy: str,
    max_lost_share: float,
    bad: BadRows | None = None,
    name: str = "traces",
) -> tuple[list[KnownTrace], Ledger]:
    """The traces as tokens within the limits; see `data.truncation`.

    Raises:
        DataError: as `fit_samples`, or `step_ends` that count characters which the rendered completion has not.
    """
    bad = bad or BadRows("error")

    def numbered_sample(pair: tuple[int, WrittenTrace]) -> Sample:
        sample = trace_sample(pair[1], renderer)
        _check_ends(pair[1], sample, renderer)
        sample.problem_id = f"{pair[0]}"
        return sample

    numbered = {f"{number}": written for number, written in enumerate(traces)}
    samples = bad.made(enumerate(traces), numbered_sample, name)
    rules: dict[str, Any] = {"policy": policy, "max_lost_share": max_lost_share, "head_ids": renderer.head_ids}
    fitted, ledger = fit_samples(samples, max_prompt_length, max_length, ledger=bad.ledger(name), **rules)
    return [_known(sample, numbered[sample.problem_id]) for sample in fitted], ledger


def trace_sample(written: WrittenTrace, renderer: Renderer) -> Sample:
    """The trace as one sequence; its own token ids where it is this model's."""
    rendered, trace = renderer.sample(written.example), written.trace
    rendered.weight = written.weight
    if written.episode is not None:
        return own_sample(written.episode, rendered, renderer)
    if trace is None or trace.ids is None or trace.prompt_ids is None:
        return rendered
    prompt = renderer.prompt_ids(trace.problem)
    if list(trace.prompt_ids) != prompt or renderer.text(trace.ids) != trace.text:
        return rendered
    rendered.ids = prompt + list(trace.ids)
    rendered.loss_mask = [0] * len(prompt) + [1] * len(trace.ids)
    rendered.finished = bool(trace.finished)
    if trace.logps is not None:
        rendered.behaviour_logps = [0.0] * len(prompt) + list(trace.logps)
    return rendered


def _check_ends(written: WrittenTrace, sample: Sample, renderer: Renderer) -> None:
    """A chat template may strip or add characters, and then the numbers would point elsewhere."""
    ends = None if written.trace is None else written.trace.step_ends
    if not ends:
        return
    rendered = renderer.text(sample.ids[sample.loss_mask.index(1) :])
    if not rendered.startswith(written.trace.text[: ends[-1]]):
        raise DataError(
            "the rendered completion begins otherwise than the text of the trace, so its `step_ends` do not fit",
            where=written.example.problem.where or written.example.problem.id,
            hint="leave out the column and set `method.delimiter`, or set `chat: false`",
        )


def _known(sample: Sample, written: WrittenTrace) -> KnownTrace:
    start = sample.prompt_length
    trace, logps = written.trace, sample.behaviour_logps
    return KnownTrace(
        problem=written.example.problem,
        prompt_ids=sample.ids[:start],
        ids=sample.ids[start:],
        mask=sample.loss_mask[start:],
        outcome=None if trace is None else trace.outcome,
        policy="" if trace is None else trace.policy,
        logps=None if logps is None else logps[start:],
        finished=sample.finished,
        weight=sample.weight,
        step_ends=None if trace is None else trace.step_ends,
        source=written.source,
        episode=written.episode,
    )


class TraceBook:
    """Known traces by the content of their problem: ids are numbers of rows and mean nothing across files."""

    def __init__(self, traces: Iterable[KnownTrace]) -> None:
        self._by_prompt: dict[str, list[KnownTrace]] = {}
        for trace in traces:
            self._by_prompt.setdefault(prompt_key(trace.asked.prompt), []).append(trace)

    def of(self, problem: Problem, prompt_ids: Sequence[int]) -> list[KnownTrace]:
        """Traces for this prompt, unless they name another gold answer or were rendered for other prompt ids.

        Those that are episodes must have the same columns too, as an environment reads them; their prompt ids hold what
        it showed at the beginning.
        """
        return [
            trace
            for trace in self._by_prompt.get(prompt_key(problem.prompt), [])
            if (
                trace.prompt_ids == list(prompt_ids)
                if trace.episode is None
                else _as_json(trace.asked.meta) == _as_json(problem.meta)
            )
            and (None in (trace.problem.reference, problem.reference) or trace.problem.reference == problem.reference)
        ]


def _as_json(value: Any) -> Any:
    """The value as it would be read from a file."""
    return json.loads(json.dumps(value))


def prompt_key(prompt: str | tuple[Message, ...]) -> str:
    """Equal for equal prompts."""
    return json.dumps(prompt, sort_keys=True)
