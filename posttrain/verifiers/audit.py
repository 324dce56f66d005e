"""Audits verifiers on a data set: is gold right, is what is not gold wrong, do the profiles agree, how fast is it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config.audit import AuditConfig
from posttrain.config.mixtures import all_verifiers, source_of, verifiers
from posttrain.config.needs import Needs
from posttrain.config.schema import Recipe, VerifierPoolConfig
from posttrain.config.verifier import VerifierConfig
from posttrain.data.sample import Problem
from posttrain.errors import DataError
from posttrain.verifiers.by_source import JudgeBySource
from posttrain.verifiers.gold import Written, gold_answers, wrong_answers
from posttrain.verifiers.judge import PooledJudge, build_judge
from posttrain.verifiers.verdict import ReadsPlainly, Status, Verdict

_OTHER_PROFILE = {"strict": "lenient", "lenient": "strict"}
_WARM_UP = 8


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """One verdict that people should look at.

    Attributes:
        kind: what was written: `gold`, or what was done to it.
        where: file and line, or the problem's id.
        reference: its end.
        completion: its end.
        status, detail: of the verdict.
        other: status by the other profile, where that is the finding.
    """

    kind: str
    where: str
    reference: str
    completion: str
    status: str
    detail: str
    other: str = ""


@dataclass(slots=True)
class AuditReport:
    """What an audit found.

    Attributes:
        rows: problems of the data set.
        gold_correct: of their gold answers.
        min_gold: share that must be.
        per_second: gold answers judged per second of wall clock, all verifiers together.
        table: statuses of the outcome verifier, by what was written.
        unreadable: references that no answer can be compared with.
        rejected: gold answers that are not correct, for another reason.
        accepted: spoilt answers that are correct.
        disagreements: answers that one profile calls correct and the other does not.
        lenient_only: gold answers, and what a model wrote, that are right by the lenient profile only, by what was
            written.
    """

    rows: int
    gold_correct: int
    min_gold: float
    per_second: float
    table: dict[str, dict[str, int]]
    unreadable: list[AuditFinding] = field(default_factory=list)
    rejected: list[AuditFinding] = field(default_factory=list)
    accepted: list[AuditFinding] = field(default_factory=list)
    disagreements: list[AuditFinding] = field(default_factory=list)
    lenient_only: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether enough gold answers are correct."""
        return self.gold_correct >= self.min_gold * self.rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"passed": self.passed}


def audit(config: AuditConfig, *, offline: bool = False) -> AuditReport:
    """Judge gold answers, answers spoilt on purpose, and what a model wrote if the data hold it.

    Raises:
        DataError: no rows, or as `data.sources.problems`.
        RecipeError: nothing says how right answers are written, or as `build_judge`.
    """
    chief = next((verifier for verifier in config.verifier if verifier.judges_outcome), config.verifier[0])
    judge = build_judge(config.verifier, config.verifier_pool)
    other = _other_profile(config, chief)
    try:
        gold = gold_answers(config.data, chief, offline=offline)
        if not gold:
            raise DataError("no rows to audit", where="data")
        _judge(judge, gold[:_WARM_UP])
        started = time.perf_counter()
        verdicts = _judge(judge, gold)
        seconds = time.perf_counter() - started
        report = AuditReport(len(gold), 0, config.min_gold, len(gold) / seconds, {})
        _note_gold(report, gold, verdicts)
        written = {"gold": gold} | wrong_answers(chief, gold) | _outputs(config, gold)
        for kind, rows in written.items():
            found = verdicts if kind == "gold" else _judge(judge, rows)
            report.table[kind] = {status.value: count for status, count in Counter(v.status for v in found).items()}
            if kind not in ("gold", "model"):
                right = [pair for pair in zip(rows, found, strict=True) if pair[1].status is Status.CORRECT]
                report.accepted += [_finding(kind, row, verdict) for row, verdict in right]
            if other is not None:
                theirs = _judge(other, rows)
                report.disagreements += _compare(kind, rows, found, theirs)
                if kind in ("gold", "model"):
                    strict, lenient = (found, theirs) if _profile(chief) == "strict" else (theirs, found)
                    report.lenient_only[kind] = _more(strict, lenient)
        return report
    finally:
        judge.close()
        if other is not None:
            other.close()


def check_references(judge: PooledJudge, problems: Sequence[Problem]) -> None:
    """Refuse problems whose reference the outcome verifier cannot read; only one of ours that runs in workers is asked.

    Raises:
        DataError: names the rows.
    """
    if 0 in judge.batched or 0 in judge.own:
        return
    chief = judge.pool.verifiers[judge.pooled.index(0)]
    asked = [p for p in problems if not (isinstance(chief, ReadsPlainly) and chief.reads_plainly(p.reference or ""))]
    if not asked:
        return
    bad = [(p, v) for (p, _), v in zip(_blank(asked), _judge(judge, _blank(asked)), strict=True) if _unread(v)]
    if bad:
        listed = "\n  ".join(f"{problem.where or problem.id}: {verdict.detail}" for problem, verdict in bad[:10])
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(
            f"{len(bad)} of {len(problems)} references cannot be read, so no answer could be judged",
            where=bad[0][0].where or bad[0][0].id,
            hint=f"mend or leave out these rows:\n  {listed}{more}",
        )


def right_by_lenient_only(
    configs: Sequence[VerifierConfig], pool: VerifierPoolConfig, rows: Sequence[Written]
) -> int | None:
    """How many answers earn nothing although they are right: by the lenient profile, not by the strict one.

    Args:
        configs: of a recipe's verifiers.
        pool: in which they run.
        rows: problems with what was written.

    Returns:
        None where the verifier of the outcome has no profiles, or is lenient.
    """
    chief = next((config for config in configs if config.judges_outcome), configs[0])
    if _profile(chief) != "strict":
        return None
    judges = build_judge([chief], pool), build_judge([_other(chief)], pool)
    try:
        return _more(*(_judge(judge, rows) for judge in judges))
    finally:
        for judge in judges:
            judge.close()


def build_checked_judge(
    recipe: Recipe, needs: Needs, rows: Sequence[Any], *, run_own_code: bool = True, log: Path | None = None
) -> PooledJudge | JudgeBySource | None:
    """The judge of a run, after it has read the reference of every problem among its rows; None if none is needed.

    Args:
        run_own_code: load code of the user's own and look at what it asks for; its workers start now.
        log: file for what that code prints.

    Raises:
        DataError: as `check_references`.
        RecipeError, StackError: as `build_judge`.
        VerifierError: as `PooledJudge.start`.
    """
    if not needs.verifier or not all_verifiers(recipe):
        return None
    problems = [row for row in rows if isinstance(row, Problem)]
    by_source = verifiers(recipe)
    if all(own is recipe.verifier for own in by_source.values()):
        return _checked(build_judge(recipe.verifier, recipe.verifier_pool, log), problems, run_own_code)
    grouped: dict[str, list[Problem]] = {name: [] for name in by_source}
    for problem in problems:
        grouped[source_of(problem.id)].append(problem)
    judges: dict[str, PooledJudge] = {}
    for name, own in by_source.items():
        judge = next((judges[other] for other in judges if by_source[other] is own), None)
        judge = judge or build_judge(own, recipe.verifier_pool, log)
        judges[name] = judge
        try:
            _checked(judge, grouped[name], run_own_code)
        except BaseException:
            JudgeBySource(judges).close()
            raise
    return JudgeBySource(judges)


def _checked(judge: PooledJudge, problems: Sequence[Problem], run_own_code: bool) -> PooledJudge:
    """The judge, after it has read the references; closed if it cannot."""
    try:
        if run_own_code:
            judge.start(problems)
        check_references(judge, problems)
    except BaseException:
        judge.close()
        raise
    return judge


def _blank(problems: Sequence[Problem]) -> list[Written]:
    return [(problem, "") for problem in problems]


def _unread(verdict: Verdict) -> bool:
    return verdict.status is Status.BAD_REFERENCE


def _other_profile(config: AuditConfig, chief: VerifierConfig) -> PooledJudge | None:
    return None if _profile(chief) is None else build_judge([_other(chief)], config.verifier_pool)


def _other(chief: VerifierConfig) -> VerifierConfig:
    return chief.model_copy(update={"profile": _OTHER_PROFILE[_profile(chief) or ""], "answer_format": "any"})


def _profile(chief: VerifierConfig) -> str | None:
    """`strict` or `lenient`; None for a verifier without the two."""
    profile = getattr(chief, "profile", None)
    return profile if profile in _OTHER_PROFILE else None


def _more(strict: Sequence[Verdict], lenient: Sequence[Verdict]) -> int:
    pairs = zip(strict, lenient, strict=True)
    return sum(one.status is not Status.CORRECT and other.status is Status.CORRECT for one, other in pairs)


def _judge(judge: PooledJudge, rows: Sequence[Written]) -> list[Verdict]:
    """Verdicts on the outcome."""
    texts = [text for _, text in rows]
    # Nobody sampled these, so their tokens are not known; words stand for them where a length is wanted.
    tokens = [len(text.split()) for text in texts]
    judgements = judge.judge([problem for problem, _ in rows], texts, tokens)
    return [next(iter(judgement.verdicts.values())) for judgement in judgements]


def _note_gold(report: AuditReport, gold: Sequence[Written], verdicts: Sequence[Verdict]) -> None:
    for row, verdict in zip(gold, verdicts, strict=True):
        if verdict.status is Status.CORRECT:
            report.gold_correct += 1
        else:
            (report.unreadable if _unread(verdict) else report.rejected).append(_finding("gold", row, verdict))


def _outputs(config: AuditConfig, gold: Sequence[Written]) -> dict[str, list[Written]]:
    if config.outputs is None:
        return {}
    rows: list[Written] = []
    for problem, _ in gold:
        column = problem.meta.get(config.outputs)
        texts = column if isinstance(column, list) else [column]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"column {config.outputs!r} holds no text",
                where=problem.where or problem.id,
                hint="columns: " + ", ".join(map(str, problem.meta)),
            )
        rows += [(problem, text) for text in texts]
    return {"model": rows}


def _compare(
    kind: str, rows: Sequence[Written], mine: Sequence[Verdict], theirs: Sequence[Verdict]
) -> list[AuditFinding]:
    return [
        _finding(kind, row, one, other.status)
        for row, one, other in zip(rows, mine, theirs, strict=True)
        if (one.status is Status.CORRECT) != (other.status is Status.CORRECT)
    ]


def _finding(kind: str, row: Written, verdict: Verdict, other: str = "") -> AuditFinding:
    problem, completion = row
    where = problem.where or problem.id
    reference, answer = ((text or "")[-120:] for text in (problem.reference, completion))
    return AuditFinding(kind, where, reference, answer, verdict.status.value, verdict.detail, str(other))
