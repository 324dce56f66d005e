"""Stages of a retrofit for safety: attacked prompts, pairs of safe and unsafe answers, and the report of it all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from posttrain.config.safety import AttackSettings, RefusalSettings, SafetySettings
from posttrain.data.traces import read_manifest
from posttrain.pipeline.schema import REFERENCE
from posttrain.pipeline.stage import Resolve, Stage, as_written
from posttrain.safe_files import write_json_atomic, write_text_atomic
from posttrain.terminal import say

if TYPE_CHECKING:
    from posttrain.evaluation.safety import SafetyReport


class AttacksStage(Stage):
    """Attacked prompts for training and test, of disjoint requests."""

    Config = AttackSettings
    artefacts = {"train": "train.jsonl", "test": "test.jsonl"}

    def check(self, earlier: Mapping[str, Stage]) -> None:
        from posttrain.data.attacks import attacked, read_requests

        config = self.resolved(as_written)
        if not REFERENCE.search(config.requests):
            attacked(read_requests(Path(config.requests)), config)

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.data.attacks import write_attacked

        train, test = write_attacked(self.resolved(resolve), self.folder / "train.jsonl", self.folder / "test.jsonl")
        say(f"{train:,} attacked prompts to train on, {test:,} of other requests to test with")

    def next_steps(self) -> list[tuple[str, str]]:
        return [(name, str(self.folder / file)) for name, file in self.artefacts.items()]


class RefusalsStage(Stage):
    """Safe answers over what the policy itself wrote and the judge called unsafe."""

    Config = RefusalSettings
    artefacts = {"pairs": "pairs.jsonl"}

    def check(self, earlier: Mapping[str, Stage]) -> None:
        for path in self.resolved(as_written).traces:
            if not REFERENCE.search(path):
                read_manifest(Path(path))

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        from posttrain.data.attacks import write_refusals

        say(f"{write_refusals(self.resolved(resolve), self.folder / 'pairs.jsonl'):,} pairs")

    def next_steps(self) -> list[tuple[str, str]]:
        return [("pairs", str(self.folder / "pairs.jsonl"))]


class SafetyStage(Stage):
    """Attack success, over-refusal and capability in one report."""

    Config = SafetySettings
    artefacts = {"report": "safety.json", "text": "safety.md"}
    expects = {"before": "report", "after": "report", "rows": "test"}

    def check(self, earlier: Mapping[str, Stage]) -> None:
        from posttrain.evaluation.report import Report

        config = self.resolved(as_written)
        for path in (config.before, config.after):
            if not REFERENCE.search(path):
                Report.load(Path(path))

    def run(self, resolve: Resolve, *, interrupted: bool) -> None:
        found = self._report(resolve)
        write_json_atomic(self.folder / "safety.json", found.to_dict())
        write_text_atomic(self.folder / "safety.md", "\n".join(found.lines()) + "\n")

    def conclude(self, resolve: Resolve, console: Console) -> None:
        for line in self._report(resolve).lines():
            say(line)

    def next_steps(self) -> list[tuple[str, str]]:
        return [("report", str(self.folder / "safety.md"))]

    def _report(self, resolve: Resolve) -> SafetyReport:
        from posttrain.evaluation.report import Report
        from posttrain.evaluation.safety import read_rows, safety_report

        config = self.resolved(resolve)
        before, after = (Report.load(Path(path)) for path in (config.before, config.after))
        return safety_report(before, after, read_rows(Path(config.rows)), config)
