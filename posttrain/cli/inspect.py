"""`posttrain inspect`: the figures of a trace file, and what they advise."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from posttrain.cli.tables import print_table
from posttrain.data.traces import read_traces
from posttrain.errors import RecipeError
from posttrain.evaluation.advice import Advice, advise
from posttrain.evaluation.inspect import Inspection, inspect_traces
from posttrain.methods import METHODS
from posttrain.safe_files import write_json_atomic
from posttrain.terminal import say


def inspect_command(paths: list[Path], *, policy: str | None, k: str, output: Path | None, as_json: bool) -> None:
    """Print the figures as a table or as JSON; also write them to `output` if there is one.

    Raises:
        RecipeError: `k` is no list of whole numbers from 1.
        DataError: as `read_traces` and `inspect_traces`.
    """
    if not all(part.strip().isdecimal() and int(part) > 0 for part in k.split(",")):
        raise RecipeError(f"whole numbers from 1, separated by commas, not {k!r}", where="--k")
    found = inspect_traces(read_traces(paths), policy=policy, ks=sorted({int(part) for part in k.split(",")}))
    advice = advise(found)
    whole = found.to_dict() | {"advice": [asdict(each) for each in advice]}
    if output is not None:
        write_json_atomic(output, whole)
    if as_json:
        say(json.dumps(whole, indent=1, ensure_ascii=False))
        return
    _print(found, advice)
    if output is not None:
        say(f"\nfigures per problem: {output}")


def _print(found: Inspection, advice: list[Advice]) -> None:
    rows = [
        (each.policy, each.kind, f"{each.traces:,}", f"{each.prompts:,}", _share(each.correct), f"{each.length:.1f}")
        for each in found.policies
    ]
    print_table(rows, "traces", header=("policy", "kind", "traces", "prompts", "correct", "mean length"))
    print_table(_figures(found), f"policy {found.policy}")
    informative = [
        (str(size), _share(each.value), f"{each.low:.1%} to {each.high:.1%}")
        for size, each in found.informative.items()
    ]
    if informative:
        print_table(informative, "informative groups", header=("G", "expected share", "95%"))
    print_table([_line(each) for each in advice], "advice", header=("word", "on", "methods", "because"))


def _figures(found: Inspection) -> list[tuple[str, str, str]]:
    rows = [("prompts", f"{found.prompts:,}", f"{found.traces:,} traces; {_share(found.unknown)} without a verdict")]
    for k, interval in found.pass_at.items():
        note = f"{interval.low:.1%} to {interval.high:.1%} ({found.pass_at_prompts[k]:,} prompts)"
        rows.append(("pass rate" if k == 1 else f"pass@{k}", _share(interval.value), note))
    if found.stopped_early:
        rows.append(("", "", "corrected for sampling that stops at enough correct ones"))
    solved = found.always + found.sometimes
    rows.append(("solved", f"{solved:,}", f"{found.always:,} always, {found.sometimes:,} sometimes"))
    rows.append(("unsolved", f"{found.never:,}", f"never solved by anyone here: {found.never_by_anyone:,}"))
    if found.returns is not None:
        note = f"spread {found.returns_between:.3f} between prompts, {found.returns_within:.3f} within"
        rows.append(("return", f"{found.returns:.3f}", note))
    rows.append(("distinct", _share(found.distinct), f"{_share(1 - found.distinct)} are repeats"))
    if found.distinct_correct is not None:
        rows.append(("", f"{found.distinct_correct:.2f}", "different correct texts per solved prompt"))
    if found.logp_per_token is not None:
        rows.append(
            ("log-prob", f"{found.logp_per_token:.3f}", f"per token; {found.logp_per_trace:.2f} per trace (nats)")
        )
    unit = "characters" if found.truncated is None else "tokens"
    note = f"{unit}; median {found.length_median:g}, 95% at most {found.length_95:g}; cut: {_share(found.truncated)}"
    rows.append(("length", f"{found.length:.1f}", note))
    rows.append(("pairs", _share(found.pairs), "of the prompts have a correct and a wrong text"))
    return rows


def _line(advice: Advice) -> tuple[str, str, str, str]:
    here = [name for name in advice.methods if name in METHODS]
    methods = ", ".join(here) if here or not advice.methods else "none in this version"
    return advice.word, advice.family, methods, advice.reason


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
