"""The prefixes that `prefixrl` would cut from trace files, as a file for people and other programs, with a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.config.collection import PrefixSettings
from posttrain.config.schema import TraceSource
from posttrain.data.known_traces import KnownTrace, TraceBook, fit_traces, load_traces
from posttrain.data.prefixes import CutRule, Cutter, Prefix, fixed_cuts
from posttrain.data.rendering import Renderer
from posttrain.data.traces import read_traces
from posttrain.errors import DataError, RecipeError
from posttrain.safe_files import write_json_atomic, write_text_atomic


@dataclass(slots=True)
class PrefixReport:
    """What was made of the traces.

    Attributes:
        problems: with any trace.
        solved: those with a correct trace.
        cut: those with a prefix.
        traces: correct ones.
        own_ids: those whose token ids are used as they were sampled; the others are rendered from their text.
        unguarded: those in which the final answer was not found, so that they are not cut.
        prefixes: made.
        guarded: those that end earlier than drawn, so as not to show the answer.
        missing: cuts asked for and not made: repeats, and places where none is possible.
        fraction: mean, smallest and largest share of a trace's tokens.
        tokens: mean, smallest and largest number of tokens.
    """

    problems: int
    solved: int = 0
    cut: int = 0
    traces: int = 0
    own_ids: int = 0
    unguarded: int = 0
    prefixes: int = 0
    guarded: int = 0
    missing: int = 0
    fraction: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)


def write_prefixes(paths: Sequence[Path], out: Path, settings: PrefixSettings, renderer: Renderer) -> PrefixReport:
    """Cut the correct traces of trace files, and write the prefixes and their report (`<name>.report.json`).

    Rows: prompt, reference, prefix (text), prefix_ids, fraction, guarded, problem_id.

    Args:
        paths: trace files.
        out: ends in .jsonl; an existing file is replaced.
        settings: where to cut, as in `prefixrl`.
        renderer: of the model that is to go on from the prefixes.

    Raises:
        RecipeError: `out` is no .jsonl file.
        DataError: as `load_traces` and `prefixes.answer_start`, or no trace can be cut.
    """
    if out.suffix != ".jsonl":
        raise RecipeError("prefixes are written as .jsonl", where=str(out), hint=f"{out.stem}.jsonl")
    files = [str(path) for path in paths]
    everything = read_traces(files).traces
    report = PrefixReport(problems=len({trace.problem_id for trace in everything}))
    limits: dict[str, Any] = {"max_prompt_length": None, "max_length": None, "policy": "error", "max_lost_share": 0.0}
    known, _ = fit_traces(load_traces(TraceSource(path=files), "traces"), renderer, **limits)
    rule = CutRule(
        settings.fraction_low,
        settings.fraction_high,
        settings.boundary,
        settings.separator,
        settings.answer_pattern,
    )
    book, lines = TraceBook(known), []
    sampled = {(json.dumps(trace.prompt), tuple(trace.ids)) for trace in everything if trace.ids is not None}
    made: list[Prefix] = []
    for first in {json.dumps([trace.problem.prompt, trace.problem.reference]): trace for trace in known}.values():
        traces = book.of(first.problem, first.prompt_ids)
        cuts = fixed_cuts(traces, renderer.text, rule, settings.cuts_per_problem, settings.cut_seed)
        report.solved += 1
        report.cut += bool(cuts)
        report.missing += settings.cuts_per_problem - len(cuts)
        report.traces += len(traces)
        report.own_ids += sum((json.dumps(t.problem.prompt), tuple(t.ids)) in sampled for t in traces)
        report.unguarded += sum(Cutter(trace, renderer.text, rule).limit == 0 for trace in traces)
        lines += [json.dumps(_row(first, cut, renderer), ensure_ascii=False) + "\n" for cut in cuts]
        made += cuts
    if not made:
        raise DataError(
            f"none of {report.traces:,} correct traces can be cut; the answer shows at once or not at all in "
            f"{report.unguarded:,}",
            where=files[0],
            hint="set --answer-pattern to where the final answer begins, or a lower --low, or --boundary token",
        )
    report.prefixes, report.guarded = len(made), sum(cut.guarded for cut in made)
    report.fraction = _spread([cut.fraction for cut in made])
    report.tokens = _spread([float(len(cut.ids)) for cut in made])
    write_text_atomic(out, "".join(lines))
    write_json_atomic(out.with_suffix(".report.json"), asdict(report))
    return report


def _row(trace: KnownTrace, cut: Prefix, renderer: Renderer) -> dict[str, Any]:
    return {
        "prompt": trace.problem.prompt,
        "reference": trace.problem.reference,
        "prefix": renderer.text(cut.ids),
        "prefix_ids": list(cut.ids),
        "fraction": cut.fraction,
        "guarded": cut.guarded,
        "problem_id": trace.problem.id,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": fmean(values), "min": min(values), "max": max(values)}
