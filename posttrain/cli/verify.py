"""`posttrain verify`: an audit of verifiers on a data set, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.tables import print_table
from posttrain.config.audit import AuditConfig
from posttrain.config.loading import load_config, load_recipe
from posttrain.errors import RecipeError
from posttrain.safe_files import write_json_atomic
from posttrain.terminal import say
from posttrain.verifiers.audit import AuditFinding, AuditReport, audit
from posttrain.verifiers.verdict import Status

SHOWN = 12
"""Findings of one kind that are printed; the JSON file has all."""


def verify_command(recipe: Path | None, config: Path | None, overrides: list[str], output: Path | None) -> bool:
    """Audit and print; writes the report to `output` if there is one. Whether enough gold answers are correct.

    Raises:
        RecipeError: neither a recipe nor a configuration, or one without prompts or verifiers.
        DataError: the data cannot be read.
    """
    settings = audit_config(recipe, config, overrides)
    report = audit(settings)
    print_audit(report)
    if output is not None:
        write_json_atomic(output, report.to_dict())
        say(f"report: {output}")
    return report.passed


def audit_config(recipe: Path | None, config: Path | None, overrides: list[str]) -> AuditConfig:
    """What to audit: a file of its own, or the prompts and verifiers of a recipe."""
    if config is not None:
        return load_config(config, AuditConfig, [*([str(recipe)] if recipe else []), *overrides])
    if recipe is None:
        raise RecipeError("nothing to verify", hint="posttrain verify RECIPE, or posttrain verify --config FILE")
    from posttrain.methods import CONFIGS

    loaded = load_recipe(recipe, overrides, CONFIGS)
    if loaded.data.prompts is None or loaded.verifier is None:
        missing = "data.prompts" if loaded.data.prompts is None else "verifier"
        raise RecipeError(f"the recipe has no `{missing}`, so it has nothing to verify", where=str(recipe))
    if isinstance(loaded.data.prompts, list):
        raise RecipeError(
            "the recipe has several sources of problems, and an audit reads one",
            where=str(recipe),
            hint="posttrain verify --config FILE, with one of them as `data`",
        )
    return AuditConfig(data=loaded.data.prompts, verifier=loaded.verifier, verifier_pool=loaded.verifier_pool)


def print_audit(report: AuditReport) -> None:
    """Verdict table, findings, and a last line that says whether the audit is passed."""
    used = [status for status in Status if any(status.value in counts for counts in report.table.values())]
    rows = [
        [kind, str(sum(counts.values())), *(str(counts.get(status.value, 0)) for status in used)]
        for kind, counts in report.table.items()
    ]
    print_table(rows, "verdicts", header=["written", "rows", *(status.value for status in used)])
    say(f"\n  {report.per_second:,.0f} gold answers per second")
    _print_findings("gold that cannot be read", report.unreadable)
    _print_findings("gold that is not correct", report.rejected)
    _print_findings("spoilt answers that are correct", report.accepted)
    _print_findings("answers on which the profiles disagree", report.disagreements)
    for kind, count in report.lenient_only.items():
        if count or kind == "model":
            answers = sum(report.table[kind].values())
            say(f"\n{kind}: {count:,} of {answers:,} answers are right by the lenient profile only: no strict reward")
    share = report.gold_correct / report.rows
    line = f"gold: {report.gold_correct} of {report.rows} correct ({share:.1%}, at least {report.min_gold:.1%} wanted)"
    say(f"\n{line}", fg=None if report.passed else "red", bold=True)


def _print_findings(title: str, findings: Sequence[AuditFinding]) -> None:
    if not findings:
        return
    say(f"\n{title}: {len(findings)}", bold=True)
    for found in findings[:SHOWN]:
        detail = f": {_line(found.detail)}" if found.detail else ""
        other = f", other profile {found.other}" if found.other else ""
        say(f"  {found.where} ({found.kind}): {found.status}{other}{detail}")
        say(f"    reference {_line(found.reference)!r}, written {_line(found.completion)!r}")
    if len(findings) > SHOWN:
        say(f"  and {len(findings) - SHOWN} more; --output FILE writes all")


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 90 else "..." + text[-90:]
