"""Traces: completions with all that is known about them, in files that other work can read.

A trace file has one completion per line, as JSON or in Parquet; every row stands on its own, with its problem. Beside
it lies a manifest, `<name>.manifest.json`, with what all rows share: who wrote them and how. Sampled traces carry
token ids and log-probs. Traces taken in from files carry text only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from posttrain.bounded_files import read_json
from posttrain.data.encoding import PICTURE
from posttrain.data.files import iter_rows
from posttrain.data.sample import Message, Problem
from posttrain.errors import DataError, nearest

FORMAT = 1
"""Version of rows and manifest."""

KNOWN = ("correct", "wrong", "no_answer", "unparseable")
"""Verdicts that judge the answer; see `verifiers.verdict.Status`."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """An answer that was revised: its text, verdict and outcome as in `Trace`, and the number of its tokens."""

    text: str
    verdict: str
    outcome: float | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One completion.

    Attributes:
        problem_id: identity of the problem within its file.
        sample: number of the completion within its problem, from 0.
        prompt: as in `Problem`.
        text: the completion, special tokens removed.
        policy: who wrote it: model folder, Hub id, or a name that the user gave.
        manifest: id of the manifest that says how.
        reference: as in `Problem`.
        meta: as in `Problem`; JSON values.
        chat: as in `Problem`.
        prompt_ids: token ids of the rendered prompt; None for text.
        ids: sampled token ids, the stop token included; None for text.
        logps: log-prob of each of `ids` under the policy at the sampling temperature; None for text.
        policy_version: weight syncs of the engine that sampled it; None for text.
        finished: ended by a stop token; False means cut at the token limit; None for text.
        verdict: status of the verifier that judges the outcome; empty if not verified.
        scores: by verifier; None where one could not judge.
        outcome: what that verifier said; None if it could not judge or was not asked.
        reward: outcome plus shaping; None if a verifier could not judge or was not asked.
        seed: of the draws; None for text.
        read_tokens: prompt tokens that the engine read for it. The completions of one call share one reading, which is
            entered with the first of them.
        flops: spent on reading and sampling it, without verification; 0 for text.
        earlier: the answers that it revises, first to last; its `prompt_ids` are then those of the last revision.
        step_ends: numbers of characters of `text` up to the end of each step, rising; None where nobody said.
    """

    problem_id: str
    sample: int
    prompt: str | tuple[Message, ...]
    text: str
    policy: str
    manifest: str
    reference: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    chat: bool | None = None
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None
    logps: list[float] | None = None
    policy_version: int | None = None
    finished: bool | None = None
    verdict: str = ""
    scores: dict[str, float | None] = field(default_factory=dict)
    outcome: float | None = None
    reward: float | None = None
    seed: int | None = None
    read_tokens: int = 0
    flops: int = 0
    earlier: list[Earlier] = field(default_factory=list)
    step_ends: list[int] | None = None

    @property
    def problem(self) -> Problem:
        """The problem as verifiers and renderers take it."""
        return Problem(self.problem_id, self.prompt, self.reference, self.meta, self.problem_id, self.chat)

    @property
    def judged(self) -> bool:
        """Whether a verifier said anything about the answer."""
        return self.verdict in KNOWN

    @property
    def correct(self) -> bool:
        return self.verdict == "correct"

    def to_json(self) -> str:
        """One line, without its end."""
        values = {name: getattr(self, name) for name in _NAMES if name != "earlier"}
        if self.earlier:
            values["earlier"] = [asdict(each) for each in self.earlier]
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the traces of a file have in common.

    Attributes:
        id: of this manifest; the traces name it.
        kind: `sampled` or `taken in`.
        policy: who wrote the traces: label, and for models path, revision, dtype and a hash of the weights.
        sampling: how they were drawn; None for text.
        seed: of the draws; None for text.
        data: the source of the problems, as in a recipe.
        problems_hash: SHA-256 over problems and rendered prompts, in order.
        verifier: what judged them, as in a recipe; empty if nothing did.
        template_hash: of the rendering of the prompts; None for text.
        parameters: of the model, as FLOPs are counted; None for text.
        provenance: in the user's words.
        versions: package -> version.
        format: version of the file format.
    """

    id: str
    kind: str
    policy: dict[str, Any]
    data: dict[str, Any]
    problems_hash: str
    sampling: dict[str, Any] | None = None
    seed: int | None = None
    verifier: list[dict[str, Any]] = field(default_factory=list)
    template_hash: str | None = None
    parameters: int | None = None
    provenance: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class TraceSet:
    """The traces of one file or several.

    Attributes:
        traces: in the order of the files.
        manifests: by id.
    """

    traces: list[Trace]
    manifests: dict[str, Manifest]

    def by_problem(self) -> dict[str, list[Trace]]:
        """The traces of each problem, in the order of their numbers."""
        groups: dict[str, list[Trace]] = {}
        for trace in self.traces:
            groups.setdefault(trace.problem_id, []).append(trace)
        return {key: sorted(group, key=lambda trace: (trace.manifest, trace.sample)) for key, group in groups.items()}


_NAMES = [each.name for each in fields(Trace)]
_AS_JSON = ("meta", "prompt", "scores", "earlier")
"""Columns whose type differs from row to row: Parquet holds them as JSON."""
_TRACE, _MANIFEST = TypeAdapter(Trace), TypeAdapter(Manifest)


def manifest_path(path: Path) -> Path:
    """Where the manifest of a trace file lies."""
    return path.with_name(path.name.removesuffix(".gz").rpartition(".")[0] + ".manifest.json")


def read_traces(paths: Sequence[str | Path]) -> TraceSet:
    """The traces of files written by `posttrain sample` or `posttrain prepare traces`, JSON Lines or Parquet.

    Problems of several files are the same if their prompt and reference are, and have the id of the first one then;
    where different ones have the same id, that of the later file gets the number of the file, from 0, in front.

    Raises:
        DataError: a missing or empty file, a missing manifest, a bad row, or a row that stands there twice.
    """
    traces: list[Trace] = []
    manifests: dict[str, Manifest] = {}
    ids: dict[str, str] = {}
    seen: set[tuple[str, str, int]] = set()
    for number, path in enumerate(map(Path, paths)):
        manifest = read_manifest(path)
        manifests[manifest.id] = manifest
        for row in iter_rows(path):
            trace = parse_trace(row.values, row.where)
            if texts := pictured(trace):
                from posttrain.data.pictures import folder_beside, take_back

                take_back(texts, folder_beside(path), row.where)
            if (key := (trace.manifest, trace.problem_id, trace.sample)) in seen:
                raise DataError(f"completion {trace.sample} of {trace.problem_id} was read before", where=row.where)
            seen.add(key)
            traces.append(trace if len(paths) == 1 else _renamed(trace, number, ids))
    return TraceSet(traces, manifests)


def pictured(trace: Trace) -> list[str]:
    """The texts of a trace's prompt that have pictures; those lie beside the file (`data.pictures`)."""
    prompt = trace.prompt
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [text for text in texts if isinstance(text, str) and PICTURE in text]


def read_manifest(path: Path) -> Manifest:
    """The manifest of a trace file.

    Raises:
        DataError: missing, damaged or of another format.
    """
    beside = manifest_path(path)
    if not path.is_file() and not beside.is_file():
        others = [other.name for other in path.parent.glob("*") if manifest_path(other).is_file()]
        raise DataError("no such trace file", where=str(path), hint=nearest(path.name, others))
    if not beside.is_file():
        raise DataError(
            "no manifest lies beside the trace file",
            where=str(beside),
            hint="traces of your own: `posttrain prepare traces` takes them in",
        )
    try:
        raw = read_json(beside)
        if isinstance(raw, dict) and raw.get("format", FORMAT) != FORMAT:
            raise DataError(f"traces of format {raw['format']}, this version reads {FORMAT}", where=str(beside))
        return _MANIFEST.validate_python(raw)
    except ValidationError as error:
        raise DataError(f"damaged manifest: {str(error).splitlines()[0]}", where=str(beside)) from error


def parse_trace(values: dict[str, Any], where: str) -> Trace:
    """A row as a trace.

    Raises:
        DataError: a missing column or one of another type, or ids and log-probs of different length.
    """
    if isinstance(values.get("meta"), str):  # Parquet has one type for all rows, so it holds JSON there
        values = {**values, **{key: json.loads(values[key]) for key in _AS_JSON if key in values}}
    try:
        trace = _TRACE.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        column = ".".join(str(part) for part in first["loc"])
        raise DataError(f"not a trace: {first['msg']}", where=f"{where}, column {column!r}") from error
    if trace.ids is not None and trace.logps is not None and len(trace.ids) != len(trace.logps):
        raise DataError(f"{len(trace.ids)} ids but {len(trace.logps)} log-probs", where=where)
    if trace.step_ends is not None:
        check_step_ends(trace.step_ends, trace.text, where)
    return trace


def check_step_ends(ends: Any, text: str, where: str) -> list[int]:
    """The argument, if it is what `Trace.step_ends` may be.

    Raises:
        DataError: it is not.
    """
    whole = isinstance(ends, list) and all(type(end) is int for end in ends)
    if not whole or any(a >= b for a, b in zip([0, *ends], ends, strict=False)) or ends and ends[-1] > len(text):
        raise DataError(
            f"`step_ends` is {str(ends)[:80]}, for a text of {len(text)} characters",
            where=where,
            hint="give the number of characters up to the end of each step, each larger than the one before",
        )
    return ends


def write_parquet(path: Path, traces: Iterable[Trace]) -> None:
    """The traces as one Parquet file. Problem, meta and scores differ in type from row to row and are held as JSON."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for trace in traces:
        values = asdict(trace)
        rows.append(values | {key: json.dumps(values[key], ensure_ascii=False) for key in _AS_JSON})
    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    types: dict[str, pyarrow.DataType] = dict.fromkeys(_NAMES, text)
    types |= dict.fromkeys(("sample", "policy_version", "read_tokens", "flops"), whole) | {"seed": pyarrow.int64()}
    types |= dict.fromkeys(("outcome", "reward"), real) | dict.fromkeys(("chat", "finished"), pyarrow.bool_())
    types |= dict.fromkeys(("prompt_ids", "ids", "step_ends"), pyarrow.list_(whole)) | {"logps": pyarrow.list_(real)}
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(types.items())), path)


def _renamed(trace: Trace, number: int, ids: dict[str, str]) -> Trace:
    """The trace under the id of its problem over all files; `ids` holds the ids by content."""
    content = json.dumps([trace.prompt, trace.reference, trace.chat], sort_keys=True)
    if content not in ids:
        id = trace.problem_id
        while id in ids.values():
            id = f"{number}:{id}"
        ids[content] = id
    return replace(trace, problem_id=ids[content])
