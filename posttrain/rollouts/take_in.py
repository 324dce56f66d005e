"""Taking in completions that this project did not sample: texts of people, of files, of other models."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from posttrain.config.collection import TakeInConfig
from posttrain.data.sample import Example, Problem
from posttrain.data.sources import examples
from posttrain.data.traces import Trace, check_step_ends
from posttrain.errors import DataError, StateError
from posttrain.rollouts.collect import Collected
from posttrain.rollouts.provenance import content_hash, judged, manifest_of, problem_content
from posttrain.rollouts.trace_file import TraceFile
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.verdict import Judgement


def take_in(config: TakeInConfig) -> Collected:
    """Text-only traces of written completions, verified if the settings say how.

    Rows with the same prompt and reference are completions of one problem. A column `step_ends` says where the steps of
    a completion end.

    Raises:
        StateError: the output is there already.
        DataError: no rows, a bad row, or a completion that is not text.
    """
    output = Path(config.output)
    if output.exists():
        raise StateError("this file is there already", where=str(output), hint="choose another `output`")
    rows = examples(config.data.completions, "completions")
    problem_of: dict[str, Problem] = {}
    chosen = [problem_of.setdefault(problem_content(row.problem), row.problem) for row in rows]
    for row in rows:
        if not isinstance(row.completion, str):
            raise DataError("a trace is one text, not chat messages", where=row.problem.where)
    judgements: list[Judgement | None] = [None] * len(rows)
    if config.verifier is not None:
        with closing(build_judge(config.verifier, config.verifier_pool)) as judge:
            judgements = list(judge.judge(chosen, [str(row.completion) for row in rows]))
    manifest = manifest_of(
        kind="taken in",
        policy={"label": config.policy},
        data=config.data.completions.model_dump(mode="json", exclude_none=True),
        problems_hash=content_hash(problem_content(row.problem) + str(row.completion) for row in rows),
        verifier=[verifier.model_dump(mode="json", exclude_none=True) for verifier in config.verifier or ()],
        provenance=config.provenance,
    )
    counts: dict[str, int] = {}
    traces = []
    for row, problem, judgement in zip(rows, chosen, judgements, strict=True):
        number = counts[problem.id] = counts.get(problem.id, -1) + 1
        traces.append(
            Trace(
                problem_id=problem.id,
                sample=number,
                prompt=problem.prompt,
                text=str(row.completion),
                policy=config.policy,
                manifest=manifest.id,
                reference=problem.reference,
                meta=problem.meta,
                chat=problem.chat,
                step_ends=_step_ends(row),
                **({} if judgement is None else judged(judgement)),
            )
        )
    with closing(TraceFile(output, manifest)) as file:
        file.append(traces)
    return Collected.of(output, len(problem_of), traces)


def _step_ends(row: Example) -> list[int] | None:
    ends = row.problem.meta.get("step_ends")
    return None if ends is None else check_step_ends(ends, str(row.completion), row.problem.where or row.problem.id)
