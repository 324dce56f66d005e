"""Training rows out of traces beside pairs: n scored responses of a prompt, and correct completions to imitate.

The same traces and settings give the same rows. Among equally good completions the choice is random, from the seed and
the problem's id alone, so that more problems do not change the rows of others.

- Responses (BRAIn, Curry-DPO, A-LoL): one row per prompt with n different texts and their scores, the best one as
  `chosen`, the worst as `rejected`, the others as `response_3` to `response_n` by falling score. Left out are what
  pairs leave out (`data.pairs`), and prompts with fewer texts or equal scores.
- Completions (rejection sampling, SFT): one row per different correct text, at most so many of a problem. Correct is
  what the verifier of the outcome called so; unfinished texts never are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.config.collection import CompletionSettings, ResponseSettings
from posttrain.data.pairs import distinct_scored, response_of
from posttrain.data.pictures import by_path
from posttrain.data.traces import Trace, read_traces
from posttrain.errors import DataError, RecipeError
from posttrain.safe_files import write_json_atomic, write_text_atomic


@dataclass(slots=True)
class ResponseReport:
    """What was made of the traces. Every trace is used, unused or one of the kinds left out.

    Attributes:
        traces: all of them.
        unscored, unfinished, empty, repeated: left out; as in `PairReport`.
        prompts: problems.
        prompts_few: those with fewer different texts than a row takes.
        prompts_tied: those whose chosen texts all score the same.
        rows: made.
    """

    traces: int = 0
    unscored: int = 0
    unfinished: int = 0
    empty: int = 0
    repeated: int = 0
    prompts: int = 0
    prompts_few: int = 0
    prompts_tied: int = 0
    rows: int = 0


@dataclass(slots=True)
class CompletionReport:
    """What was made of the traces.

    Attributes:
        traces: all of them.
        unverified: without a verdict.
        incorrect: judged, and not correct.
        unfinished: correct, but cut at the token limit.
        empty: without text.
        repeated: correct texts that stand there before.
        over_limit: different correct texts above `per_problem`, left out.
        prompts: problems.
        prompts_used: those with a row.
        rows: made.
    """

    traces: int = 0
    unverified: int = 0
    incorrect: int = 0
    unfinished: int = 0
    empty: int = 0
    repeated: int = 0
    over_limit: int = 0
    prompts: int = 0
    prompts_used: int = 0
    rows: int = 0


def response_roles(n: int) -> list[str]:
    """Roles of the n responses of a row: the columns of their texts."""
    return ["chosen", "rejected", *(f"response_{number}" for number in range(3, n + 1))]


def make_responses(
    groups: Mapping[str, Sequence[Trace]], settings: ResponseSettings
) -> tuple[list[dict[str, Any]], ResponseReport]:
    """Rows of n scored responses, in the order of the problems, with columns that `data.preferences` reads.

    Where all traces of a row carry log-probs, `proposal_logps` holds their sums in the order of `response_roles`: the
    log-prob of each response under the policy that sampled it, at the temperature of the sampling.

    Args:
        groups: problem id -> its traces (`TraceSet.by_problem`).
        settings: how many, and which.
    """
    report = ResponseReport(prompts=len(groups))
    rows: list[dict[str, Any]] = []
    for problem_id, traces in groups.items():
        rng = random.Random(f"{settings.seed} {problem_id}")
        found = distinct_scored(traces, settings, report)
        if len(found) < settings.n:
            report.prompts_few += 1
            continue
        rng.shuffle(found)
        if settings.choose == "random":
            found = found[: settings.n]
        found.sort(key=lambda candidate: -candidate[1])  # stable: equal scores stay shuffled
        last = len(found) - 1
        taken = [found[round(place * last / (settings.n - 1))] for place in range(settings.n)]
        if taken[0][1] == taken[-1][1]:
            report.prompts_tied += 1
            continue
        rows.append(_response_row([taken[0], taken[-1], *taken[1:-1]]))
    report.rows = len(rows)
    return rows, report


def make_completions(
    groups: Mapping[str, Sequence[Trace]], settings: CompletionSettings
) -> tuple[list[dict[str, Any]], CompletionReport]:
    """Rows of correct completions, in the order of the problems, with columns that `data.completions` reads."""
    report = CompletionReport(prompts=len(groups))
    rows: list[dict[str, Any]] = []
    for problem_id, traces in groups.items():
        found = _correct(traces, report)
        if settings.per_problem is not None and len(found) > settings.per_problem:
            report.over_limit += len(found) - settings.per_problem
            rng = random.Random(f"{settings.seed} {problem_id}")
            found = [found[index] for index in sorted(rng.sample(range(len(found)), settings.per_problem))]
        report.prompts_used += bool(found)
        rows += [_completion_row(trace) for trace in found]
    report.rows = len(rows)
    return rows, report


def write_responses(paths: Sequence[Path], out: Path, settings: ResponseSettings) -> ResponseReport:
    """Make rows of n responses of trace files, and write them and their report (`<name>.report.json`).

    Raises:
        RecipeError: `out` is no .jsonl file.
        DataError: as `read_traces`, or no row can be made.
    """
    _check_name(out)
    rows, report = make_responses(read_traces(paths).by_problem(), settings)
    if not rows:
        raise DataError(
            f"no row of {settings.n} responses can be made of {report.traces:,} traces: {report.prompts_few:,} prompts "
            f"with fewer different texts, {report.prompts_tied:,} with equal scores",
            where=str(paths[0]),
            hint="sample more per prompt, or lower n: `posttrain inspect`",
        )
    _write(out, rows, asdict(report))
    return report


def write_completions(paths: Sequence[Path], out: Path, settings: CompletionSettings) -> CompletionReport:
    """Make rows of correct completions of trace files, and write them and their report. Errors as above."""
    _check_name(out)
    rows, report = make_completions(read_traces(paths).by_problem(), settings)
    if not rows:
        raise DataError(
            f"none of {report.traces:,} traces is a correct completion: {report.incorrect:,} incorrect, "
            f"{report.unverified:,} without a verdict, {report.unfinished:,} cut at the token limit",
            where=str(paths[0]),
            hint="verify them (posttrain prepare traces), sample more, or take easier problems: `posttrain inspect`",
        )
    _write(out, rows, asdict(report))
    return report


# --------------------------------------------------------------------------------------------------------------- rows


def _response_row(taken: Sequence[tuple[Trace, float]]) -> dict[str, Any]:
    roles, first = response_roles(len(taken)), taken[0][0]
    row: dict[str, Any] = {"prompt": first.prompt}
    row |= {role: response_of(trace) for role, (trace, _) in zip(roles, taken, strict=True)}
    row |= {f"score_{role}": score for role, (_, score) in zip(roles, taken, strict=True)}
    if all(trace.logps is not None for trace, _ in taken):
        row["proposal_logps"] = [sum(trace.logps) for trace, _ in taken]
    row |= {"problem_id": first.problem_id, "policies": [trace.policy for trace, _ in taken]}
    return row | ({} if first.reference is None else {"reference": first.reference})


def _correct(traces: Sequence[Trace], report: CompletionReport) -> list[Trace]:
    """The different correct texts of a problem, in their order."""
    found: dict[str, Trace] = {}
    for trace in traces:
        report.traces += 1
        if not trace.judged:
            report.unverified += 1
        elif not trace.correct:
            report.incorrect += 1
        elif trace.finished is False:
            report.unfinished += 1
        elif not trace.text.strip():
            report.empty += 1
        elif trace.text in found:
            report.repeated += 1
        else:
            found[trace.text] = trace
    return list(found.values())


def _completion_row(trace: Trace) -> dict[str, Any]:
    # With what its verifier needs, so that the rows are prompts for RL too: the problems that were solved.
    row = {**trace.meta, "prompt": trace.prompt, "completion": response_of(trace)}
    row |= {"problem_id": trace.problem_id, "policy": trace.policy}
    return row | ({} if trace.reference is None else {"reference": trace.reference})


def _check_name(out: Path) -> None:
    if out.suffix != ".jsonl":
        raise RecipeError("rows are written as .jsonl", where=str(out), hint=f"{out.stem}.jsonl")


def _write(out: Path, rows: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
    rows = by_path(rows, out)
    write_text_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json_atomic(out.with_suffix(".report.json"), report)
