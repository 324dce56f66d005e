"""Paired comparison on hand-made records, and what is printed."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from posttrain.errors import DataError
from posttrain.evaluation.compare import compare_reports, comparison_table, print_comparison, print_report
from posttrain.evaluation.report import SCHEMA, BenchmarkReport, Pass, ProblemRecord, Report, SamplingReport, measures
from posttrain.evaluation.statistics import difference_interval, mean_interval, paired_test
from posttrain.verifiers.verdict import Status

RIGHT, WRONG = Status.CORRECT, Status.WRONG
SAMPLING = SamplingReport(greedy=True, samples=4, k=(1, 4), temperature=1.0, top_p=1.0, max_new_tokens=64, seed=0)


def _benchmark(correct: list[int], greedy: list[Status] | None = None, name: str = "sums", **keys) -> BenchmarkReport:
    greedy = greedy or [RIGHT if count > 2 else WRONG for count in correct]
    records = tuple(
        ProblemRecord(f"{name}/{i}", g, 4, 4, c) for i, (g, c) in enumerate(zip(greedy, correct, strict=True))
    )
    values = {metric: measure(records) for metric, measure in measures(SAMPLING).items()}
    known = {metric: found[~np.isnan(found)] for metric, found in values.items()}
    total = 4 * len(records)
    benchmark = BenchmarkReport(
        name=name,
        data={"task": "chain_sum"},
        verifier=[{"type": "procedural"}],
        problem_hash="0123456789abcdef",
        repeated=0,
        sampling=SAMPLING,
        metrics={metric: mean_interval(found) if len(found) else None for metric, found in known.items()},
        greedy=Pass(len(records), 0, {RIGHT: greedy.count(RIGHT), WRONG: greedy.count(WRONG)}, 90, 300),
        sampled=Pass(total, 0, {RIGHT: sum(correct), WRONG: total - sum(correct)}, 90, 12 * total),
        seconds=1.0,
        records=records,
    )
    return replace(benchmark, **keys)


def _report(*benchmarks: BenchmarkReport, label: str = "base", **keys) -> Report:
    report = Report(
        schema=SCHEMA,
        model_label=label,
        created="2030-01-01T00:00:00+00:00",
        engine="TransformersEngine",
        template_hash="feedfacefeedface",
        versions={"torch": "2.0"},
        seconds=2.0,
        benchmarks=benchmarks,
    )
    return replace(report, **keys)


BEFORE, AFTER = [0, 1, 2, 3, 4, 0, 0, 1], [1, 2, 4, 3, 4, 0, 2, 4]


def test_differences_are_paired_by_problem():
    comparison = compare_reports(_report(_benchmark(BEFORE)), _report(_benchmark(AFTER), label="tuned"))
    assert (comparison.base, comparison.other, comparison.notes) == ("base", "tuned", ())
    changes = {change.metric: change for change in comparison.changes}
    assert list(changes) == ["greedy", "avg@4", "pass@1", "pass@4"]
    before, after = np.array(BEFORE) / 4, np.array(AFTER) / 4
    average = changes["avg@4"]
    assert average.base == mean_interval(before)
    assert average.other == mean_interval(after)
    assert average.difference == difference_interval(before, after)
    assert average.difference.value == pytest.approx(9 / 32)
    assert average.test == paired_test(before, after)
    assert changes["greedy"].difference.value == pytest.approx(2 / 8)  # problems 2 and 7 became right
    assert changes["greedy"].test.p == pytest.approx(0.5)
    assert changes["pass@4"].difference.value == pytest.approx(2 / 8)  # problems 0 and 6 became solvable


def test_problems_without_a_verdict_in_one_report_are_left_out_of_both():
    unjudged = tuple(
        ProblemRecord(f"sums/{i}", Status.TIMEOUT if i == 7 else RIGHT, 4, 0 if i == 7 else 4, 0 if i == 7 else c)
        for i, c in enumerate(AFTER)
    )
    comparison = compare_reports(_report(_benchmark(BEFORE)), _report(_benchmark(AFTER, records=unjudged)))
    change = next(change for change in comparison.changes if change.metric == "avg@4")
    assert change.left_out == 1
    assert change.base.problems == change.other.problems == change.difference.problems == 7
    assert change.base.value == pytest.approx(np.mean(np.array(BEFORE[:7]) / 4))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_report(_benchmark(AFTER), template_hash="another"), "chat template: feedfacefeed and another"),
        (
            _report(_benchmark(AFTER, problem_hash="fff")),
            "sums: problems or their prompt template: 8 problems, hash 0123456789ab",
        ),
        (_report(_benchmark(AFTER, verifier=[{"type": "math"}])), "sums: verifier"),
        (_report(_benchmark(AFTER, sampling=replace(SAMPLING, temperature=0.5))), "sums: temperature: 1.0 and 0.5"),
        (_report(_benchmark(AFTER, sampling=replace(SAMPLING, top_p=0.9))), "sums: top_p"),
        (_report(_benchmark(AFTER, sampling=replace(SAMPLING, samples=8))), "sums: samples: 4 and 8"),
        (_report(_benchmark(AFTER, sampling=replace(SAMPLING, max_new_tokens=8))), "sums: max_new_tokens"),
        (_report(_benchmark(AFTER, sampling=replace(SAMPLING, greedy=False))), "sums: greedy"),
        (_report(_benchmark(AFTER, name="else")), "share no benchmark"),
    ],
)
def test_reports_that_differ_in_more_than_the_model_are_refused(other: Report, message: str):
    with pytest.raises(DataError, match=message):
        compare_reports(_report(_benchmark(BEFORE)), other)


def test_harmless_differences_are_noted():
    other = _report(
        _benchmark(AFTER, sampling=replace(SAMPLING, seed=1, k=(4,))),
        _benchmark(AFTER, name="more"),
        engine="AnotherEngine",
        versions={"torch": "2.1"},
    )
    comparison = compare_reports(_report(_benchmark(BEFORE)), other)
    assert comparison.notes == (
        "seed differs: 0 and 1",
        "engine differs: TransformersEngine and AnotherEngine",
        "torch differs: 2.0 and 2.1",
    )
    assert comparison.only_in_one == ("more",)
    assert [change.metric for change in comparison.changes] == ["greedy", "avg@4", "pass@4"]


def test_the_table_gives_percent_points_and_p():
    comparison = compare_reports(_report(_benchmark(BEFORE)), _report(_benchmark(AFTER)))
    greedy, average, _ = comparison_table(comparison)
    assert greedy["base"].startswith("25.0 [")
    assert greedy["other"].startswith("50.0 [")
    assert greedy["difference"].startswith("+25.0 [-")
    assert greedy["p"] == "0.5000"
    assert (average["benchmark"], average["metric"]) == ("sums", "avg@4")


def _printed(show, value, width: int) -> list[str]:
    out = io.StringIO()
    show(value, Console(file=out, width=width, color_system=None, legacy_windows=False))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100])
def test_printed_comparison_fits_and_is_plain_ascii(width: int):
    rng = np.random.default_rng(0)
    before, after = rng.binomial(4, 0.3, 300).tolist(), rng.binomial(4, 0.9, 300).tolist()
    name = "variable-chain-4"
    comparison = compare_reports(
        _report(_benchmark(before, name=name)), _report(_benchmark(after, name=name), label="runs/[bold]tuned/model")
    )
    lines = _printed(print_comparison, comparison, width)
    text = "\n".join(lines)
    assert text.isascii()
    assert max(map(len, lines)) <= width
    assert "runs/[bold]tuned/model" in text
    (row,) = [line for line in lines if line.startswith("avg@4")]
    for cell in comparison_table(comparison)[1].values():
        assert cell in row or cell == name
    assert "…" not in text


def test_printed_report_fits_and_warns_of_truncation():
    benchmark = _benchmark(BEFORE)
    cut = Pass(32, 16, {RIGHT: 11, Status.NO_ANSWER: 16, WRONG: 3, Status.TIMEOUT: 2}, 90, 2000)
    lines = _printed(print_report, _report(replace(benchmark, sampled=cut, repeated=3)), 80)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert text.isascii()
    assert "cut 50.0%, no answer 50.0%, not judged 2 timeout" in text
    assert "raise max_new_tokens" in text
    assert "3 problems of the source repeat" in text
    assert "guarded t" in text
    assert "raise max_new_tokens" not in "\n".join(_printed(print_report, _report(benchmark), 80))


def test_metrics_without_a_judged_problem_are_printed_as_such():
    records = tuple(ProblemRecord(f"sums/{i}", Status.CRASH, 4, 0, 0) for i in range(3))
    benchmark = _benchmark([0, 0, 0])
    empty = replace(benchmark, records=records, metrics=dict.fromkeys(benchmark.metrics))
    assert "none judged" in "\n".join(_printed(print_report, _report(empty), 80))
    assert compare_reports(_report(empty), _report(benchmark)).changes == ()


def test_reports_survive_json_before_comparing():
    base, other = _report(_benchmark(BEFORE)), _report(_benchmark(AFTER))
    read = [Report.from_json(json.dumps(json.loads(report.to_json()))) for report in (base, other)]
    assert compare_reports(*read) == compare_reports(base, other)
