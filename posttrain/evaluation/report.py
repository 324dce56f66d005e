"""What an evaluation found: numbers with intervals, what they rest on, one record per problem. Reads without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from posttrain.bounded_files import MAX_REPORT, parse_json, read_json
from posttrain.errors import DataError
from posttrain.evaluation.majority import majority_at_k
from posttrain.evaluation.statistics import Interval, pass_at_k
from posttrain.safe_files import write_text_atomic
from posttrain.verifiers.verdict import Status

SCHEMA = 1
"""Version of the JSON form; raised when an older reader would misread it."""


@dataclass(frozen=True, slots=True)
class Written:
    """A completion, to be read.

    Attributes:
        made: `greedy`, `sampled`, `beam`, or `revised` for the greedy answer and each revision of it.
        status: the verdict on it.
        text: without special tokens.
    """

    made: str
    status: Status
    text: str


@dataclass(frozen=True, slots=True)
class ProblemRecord:
    """What happened on one problem; enough to pair two reports.

    Attributes:
        id: identity of the problem.
        greedy: the verdict on the greedy completion; None if there was none.
        samples: sampled completions.
        judged: those with a known verdict.
        correct: those judged right.
        votes: how many completions gave each wrong answer, most first; None where the verifier names no answers.
        beam: the verdict on the completion that beam search found; None if there was no search.
        revised: the verdicts on the greedy answer and on each of its revisions; empty if none were made.
        prompt: as the model read it, special tokens shown.
        reference: the gold answer.
        completions: the first of each pass, see `passes.KEPT_TEXTS`.
    """

    id: str
    greedy: Status | None
    samples: int
    judged: int
    correct: int
    votes: tuple[int, ...] | None = None
    beam: Status | None = None
    revised: tuple[Status, ...] = ()
    prompt: str | None = None
    reference: str | None = None
    completions: tuple[Written, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingReport:
    """How the completions were made. Two reports can be compared only if all but seed, k and maj are the same.

    Attributes:
        greedy: whether one greedy completion per problem was made.
        samples: sampled completions per problem.
        k: the k of pass@k.
        temperature: of the sampled ones.
        top_p: of the sampled ones.
        max_new_tokens: limit of both, in tokens.
        seed: of the sampled ones.
        maj: the k of maj@k.
        beams: width of the beam search; None without one.
        revisions: times that the greedy answer was revised.
        revision_template: the prompt of a revision.
    """

    greedy: bool
    samples: int
    k: tuple[int, ...]
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    maj: tuple[int, ...] = ()
    beams: int | None = None
    revisions: int = 0
    revision_template: str | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """Counts over all completions of one pass over the problems.

    Attributes:
        completions: number of them.
        truncated: those cut at the token limit.
        statuses: verdict -> number; verdicts that did not occur are left out.
        prompt_tokens: tokens of the prompts, each prompt counted once.
        new_tokens: tokens of the completions.
        unrevised: answers that were left as they were, because the prompt of the revision would have been too long.
        drawn_tokens: tokens that a search by a value model drew, those of dropped texts included; 0 without one.
    """

    completions: int
    truncated: int
    statuses: dict[Status, int]
    prompt_tokens: int
    new_tokens: int
    unrevised: int = 0
    drawn_tokens: int = 0

    @property
    def truncation_rate(self) -> float:
        """Share of completions cut at the token limit."""
        return self.truncated / self.completions

    @property
    def no_answer_rate(self) -> float:
        """Share of completions without an answer."""
        return self.statuses.get(Status.NO_ANSWER, 0) / self.completions

    @property
    def mean_length(self) -> float:
        """Mean number of tokens of a completion."""
        return self.new_tokens / self.completions

    @property
    def unknown(self) -> dict[Status, int]:
        """Verdicts that say nothing about the answer; excluded from the metrics."""
        return {status: count for status, count in self.statuses.items() if not status.known}


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """A model on one benchmark.

    Attributes:
        name: of the benchmark.
        data: the source of its problems, as in a recipe.
        verifier: what judged the answers, as in a recipe.
        problem_hash: SHA-256 over what was asked, in order; see `runner.problem_hash`.
        repeated: problems left out because an earlier one has the same prompt and reference.
        sampling: how completions were made.
        metrics: `greedy`, `avg@n`, `pass@k`, `maj@k`, `beam@width`, `revision@i` -> estimate and interval; None if no
            problem could be judged.
        greedy: counts of the greedy pass; None if it was not asked for.
        sampled: counts of the sampled pass.
        seconds: wall clock of sampling and verifying, without the pauses of an interrupted evaluation.
        records: one per problem, in order.
        licence: of the problems; None if nobody wrote it down.
        revision: of the data, see `benchmarks.revision`.
        beam: counts of the beam search; None if it was not asked for.
        revised: counts over greedy answers and all their revisions; None if none were asked for.
    """

    name: str
    data: dict[str, Any]
    verifier: list[dict[str, Any]]
    problem_hash: str
    repeated: int
    sampling: SamplingReport
    metrics: dict[str, Interval | None]
    greedy: Pass | None
    sampled: Pass
    seconds: float
    records: tuple[ProblemRecord, ...]
    licence: str | None = None
    revision: str | None = None
    beam: Pass | None = None
    revised: Pass | None = None

    def headline(self) -> dict[str, Interval]:
        """The metrics that could be estimated."""
        return {name: interval for name, interval in self.metrics.items() if interval is not None}

    def tokens_of(self, measure: str) -> float:
        """Tokens sampled for one answer of a measure, mean over problems: of all samples that it takes, and of all that
        a search drops. A search by likelihood is charged for all its beams, each as long as what it found."""
        kind, _, number = measure.partition("@")
        if kind == "greedy":
            assert self.greedy is not None  # or it was not measured
            return self.greedy.mean_length
        if kind == "beam":
            assert self.beam is not None
            drawn = self.beam.drawn_tokens or int(number) * self.beam.new_tokens
            return drawn / self.beam.completions
        return self.sampled.mean_length * (int(number) if kind in ("pass", "maj") else 1)


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task of lm-evaluation-harness.

    Attributes:
        name: of the task.
        version: of the task, in the harness's count.
        settings: few-shot examples, limit, chat template.
        problem_hash: SHA-256 over the hashes of documents, prompts and targets, in order.
        metrics: `metric,filter` -> mean and interval, where the metric is a mean of values in [0, 1].
        other: `metric,filter` -> value as the harness gives it, without an interval.
        values: `metric,filter` -> one value per document, for those in `metrics`.
    """

    name: str
    version: str
    settings: dict[str, Any]
    problem_hash: str
    metrics: dict[str, Interval]
    other: dict[str, float]
    values: dict[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Report:
    """A model on all benchmarks of an evaluation.

    Attributes:
        schema: version of this form.
        model_label: what was evaluated, in the caller's words.
        created: UTC time in ISO 8601.
        engine: class of the rollout engine.
        template_hash: of the chat template that rendered the prompts.
        versions: package -> version.
        seconds: wall clock of the whole evaluation.
        benchmarks: in the order asked for.
        harness: tasks of lm-evaluation-harness.
    """

    schema: int
    model_label: str
    created: str
    engine: str
    template_hash: str
    versions: dict[str, str]
    seconds: float
    benchmarks: tuple[BenchmarkReport, ...]
    harness: tuple[HarnessTask, ...] = ()

    def metrics(self) -> dict[str, float]:
        """As what a run logs: `eval/<benchmark>/<measure>`, with the ends of the interval."""
        found: dict[str, float] = {}
        for benchmark in self.benchmarks:
            for name, estimate in benchmark.headline().items():
                stem = f"eval/{benchmark.name}/{name}"
                found |= {stem: estimate.value, f"{stem}_low": estimate.low, f"{stem}_high": estimate.high}
        return found

    def to_json(self) -> str:
        """JSON text; `from_json` gives an equal report back."""
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "") -> Report:
        """A report from JSON text.

        Raises:
            DataError: not a report, or of another schema version; `where` names its place.
        """
        return cls.from_data(parse_json(text, where), where=where)

    @classmethod
    def from_data(cls, raw: Any, *, where: str = "") -> Report:
        """A report from JSON values.

        Raises:
            DataError: as `from_json`.
        """
        if not isinstance(raw, dict) or "schema" not in raw or "benchmarks" not in raw:
            raise DataError("not an evaluation report", where=where, hint="`posttrain eval` writes one")
        if raw["schema"] != SCHEMA:
            raise DataError(
                f"report of schema version {raw['schema']}, this posttrain reads {SCHEMA}",
                where=where,
                hint="evaluate again, or use the posttrain version that wrote it",
            )
        try:
            return _ADAPTER.validate_python(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"damaged evaluation report: {place}: {first['msg']}", where=where) from error

    def save(self, path: Path) -> None:
        """Write the JSON form; a reader sees the old file or the whole new one."""
        write_text_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a saved report.

        Raises:
            DataError: no such file, or as `from_json`.
        """
        if not path.is_file():
            raise DataError("no such report", where=str(path))
        return cls.from_data(read_json(path, most=MAX_REPORT), where=str(path))


_ADAPTER = TypeAdapter(Report)

Measure = Callable[[Sequence[ProblemRecord]], NDArray[np.float64]]
"""Records (P,) to values (P,) in [0, 1]; NaN where a problem has too few judged completions."""


def measures(sampling: SamplingReport) -> dict[str, Measure]:
    """The metrics of an evaluation by name, each as a function from records to one value per problem."""
    greedy: dict[str, Measure] = {"greedy": _greedy} if sampling.greedy else {}
    passes = {f"pass@{k}": partial(_pass_at, k=k) for k in sampling.k}
    majorities = {f"maj@{k}": partial(_majority_at, k=k) for k in sampling.maj}
    beam: dict[str, Measure] = {} if sampling.beams is None else {f"beam@{sampling.beams}": _beam}
    rounds = range(sampling.revisions + 1) if sampling.revisions else ()
    revised = {f"revision@{i}": partial(_revised, i=i) for i in rounds}
    return greedy | beam | revised | {f"avg@{sampling.samples}": partial(_pass_at, k=1)} | passes | majorities


def _greedy(records: Sequence[ProblemRecord]) -> NDArray[np.float64]:
    return _right([record.greedy for record in records])


def _beam(records: Sequence[ProblemRecord]) -> NDArray[np.float64]:
    return _right([record.beam for record in records])


def _revised(records: Sequence[ProblemRecord], *, i: int) -> NDArray[np.float64]:
    return _right([record.revised[i] if i < len(record.revised) else None for record in records])


def _right(verdicts: Sequence[Status | None]) -> NDArray[np.float64]:
    return np.array([float(v is Status.CORRECT) if v is not None and v.known else np.nan for v in verdicts])


def _pass_at(records: Sequence[ProblemRecord], *, k: int) -> NDArray[np.float64]:
    judged = np.array([record.judged for record in records])
    correct = np.array([record.correct for record in records])
    values = np.full(len(records), np.nan)
    enough = judged >= k
    values[enough] = pass_at_k(judged[enough], correct[enough], k)
    return values


def _majority_at(records: Sequence[ProblemRecord], *, k: int) -> NDArray[np.float64]:
    return np.array(
        [
            np.nan
            if record.votes is None or record.judged < k
            else majority_at_k(record.judged, record.correct, record.votes, k)
            for record in records
        ]
    )
