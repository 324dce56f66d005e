"""Methods over seeds: run folders in, decisions, compute, advice and files out."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.comparison import CompareConfig
from posttrain.config.loading import parse_config
from posttrain.errors import DataError, RecipeError
from posttrain.evaluation.report import SCHEMA, BenchmarkReport, Pass, ProblemRecord, Report, SamplingReport
from posttrain.evaluation.seeds import check_continued, compare_seeds, notes, print_seed_comparison
from posttrain.evaluation.statistics import mean_interval
from posttrain.verifiers.verdict import Status

SAMPLING = SamplingReport(greedy=True, samples=1, k=(1,), temperature=1.0, top_p=1.0, max_new_tokens=64, seed=0)
STEPS = (0, 10, 20)


def _report(scores: dict[str, float]) -> Report:
    benchmarks = []
    for name, score in scores.items():
        right = round(score * 1000)
        statuses = [Status.CORRECT] * right + [Status.WRONG] * (1000 - right)
        records = tuple(ProblemRecord(f"{name}/{i}", status, 1, 1, 0) for i, status in enumerate(statuses))
        interval = mean_interval([float(status is Status.CORRECT) for status in statuses])
        counts = Pass(1000, 0, {Status.WRONG: 1000}, 9, 9)
        metrics = {"greedy": interval, "avg@1": mean_interval([0.0] * 1000)}
        arguments = (
            {"task": "t"},
            [{"type": "procedural"}],
            f"hash of {name}",
            0,
            SAMPLING,
            metrics,
            None,
            counts,
            1.0,
        )
        benchmarks.append(BenchmarkReport(name, *arguments, records))
    return Report(SCHEMA, "step", "2030-01-01", "Engine", "template", {}, 1.0, tuple(benchmarks))


def _run(folder: Path, score: float, flops: float = 1e12, **others: float) -> Path:
    """A run folder; its score grows to `score` over the steps, its compute to `flops`."""
    lines = []
    for step in STEPS:
        share = step / STEPS[-1]
        scores = {"sums": score * share} | {name: value * share for name, value in others.items()}
        _report(scores).save(folder / "evaluation" / f"step-{step:06d}.json")
        values = {f"eval/{name}/greedy": value for name, value in scores.items()}
        if step:
            values |= {"flops_total": flops * share, "tokens_trained_total": 1e6 * share}
            values["cpu_seconds_total"] = 60 * share
        lines.append(json.dumps({"step": step, "time": 0.0, **values}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "model").mkdir(exist_ok=True)
    return folder


@pytest.fixture
def methods(tmp_path: Path) -> dict[str, list[str]]:
    """Two methods of six seeds, far apart."""
    rng = np.random.default_rng(0)
    centres = {"base": 0.3, "better": 0.6}
    return {
        name: [str(_run(tmp_path / f"{name}-{seed}", centre + 0.02 * rng.normal())) for seed in range(6)]
        for name, centre in centres.items()
    }


def _config(methods: dict[str, list[str]], **keys) -> CompareConfig:
    return parse_config({"methods": methods} | keys, CompareConfig)


def _printed(comparison) -> str:
    out = io.StringIO()
    print_seed_comparison(comparison, Console(file=out, width=80, color_system=None))
    return out.getvalue()


def test_a_difference_is_found_and_told(methods: dict):
    comparison = compare_seeds(_config(methods))
    (decision,) = comparison.result.decisions
    assert (decision.outcome, decision.look) == ("second", 2)
    assert decision.difference == pytest.approx(-0.3, abs=0.05)
    assert [method.mean for method in comparison.methods] == pytest.approx([0.3, 0.6], abs=0.03)
    assert comparison.compute_gap == 0.0
    assert (comparison.advice, comparison.unused) == ((), {})
    text = _printed(comparison)
    assert "better is better than base by" in text
    assert "compute: equal" in text
    assert max(map(len, text.splitlines())) <= 80
    spent = text.splitlines()[text.splitlines().index("median run trained cpu s") + 1]
    assert spent.split() == ["base", "1e+06", "60"]
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["plan"]["measure"] == "greedy"


def test_too_few_seeds_say_how_many_more(methods: dict):
    few = {name: runs[:4] for name, runs in methods.items()}
    comparison = compare_seeds(_config(few))
    (decision,), (advice,) = comparison.result.decisions, comparison.advice
    assert (decision.outcome, comparison.result.looks) == ("undecided", 1)
    assert advice.next_look == (2, 2)
    assert advice.in_all == 6  # a large difference: the next look would do
    assert advice.within_plan
    assert comparison.unused == {"base": 1, "better": 1}
    text = "\n".join(notes(comparison))
    assert "2 of base, 2 of better more seeds" in text
    assert "about 6 of each in all" in text
    assert "no look has seen" in text
    assert "fewer than 5 seeds" in text


def test_before_the_first_look_there_is_no_difference_to_tell(methods: dict):
    one = {name: runs[:1] for name, runs in methods.items()}
    comparison = compare_seeds(_config(one))
    assert comparison.result.decisions[0].difference is None
    assert comparison.advice[0].in_all is None
    assert "the first look needs more seeds" in _printed(comparison)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_a_small_difference_needs_more_than_the_plan_has(tmp_path: Path):
    scores = {"a": [0.50, 0.55, 0.45], "b": [0.51, 0.56, 0.46]}
    methods = {
        name: [str(_run(tmp_path / f"{name}{i}", score)) for i, score in enumerate(found)]
        for name, found in scores.items()
    }
    comparison = compare_seeds(_config(methods))
    assert comparison.advice[0].in_all > 100
    assert "beyond the plan's 15" in "\n".join(notes(comparison))


def test_scores_of_several_benchmarks_are_averaged(tmp_path: Path):
    methods = {
        name: [str(_run(tmp_path / f"{name}{i}", score, words=0.2)) for i in range(2)]
        for name, score in (("a", 0.4), ("b", 0.8))
    }
    comparison = compare_seeds(_config(methods, looks=5))
    assert comparison.plan["benchmarks"] == ["sums", "words"]
    assert [method.mean for method in comparison.methods] == pytest.approx([0.3, 0.5])
    only = compare_seeds(_config(methods, benchmarks=["words"]))
    assert [method.mean for method in only.methods] == pytest.approx([0.2, 0.2])


# ----------------------------------------------------------------------------------------------------------- compute


@pytest.fixture
def unequal(tmp_path: Path) -> dict[str, list[str]]:
    """The second method spends twice as much."""
    flops = {"cheap": 1e12, "costly": 2e12}
    return {
        name: [str(_run(tmp_path / f"{name}-{seed}", 0.5, spent)) for seed in range(3)] for name, spent in flops.items()
    }


def test_unequal_compute_is_refused(unequal: dict):
    with pytest.raises(DataError, match=r"more than 10%: a run of cheap spent 1e\+12 FLOPs, one of costly 2e\+12"):
        compare_seeds(_config(unequal))
    assert compare_seeds(_config(unequal, tolerance=1.0)).compute_gap == pytest.approx(1.0)


def test_unequal_compute_is_matched_within_the_smallest_budget(unequal: dict):
    comparison = compare_seeds(_config(unequal, compute="match"))
    cheap, costly = comparison.methods
    assert {run.step for run in cheap.runs} == {20}
    assert {run.step for run in costly.runs} == {10}
    assert (cheap.mean, costly.mean) == pytest.approx((0.5, 0.25))
    assert comparison.compute_gap == pytest.approx(0.0)


def test_evaluations_too_far_apart_cannot_be_matched(tmp_path: Path):
    methods = {"a": [str(_run(tmp_path / "a", 0.5, 1e12))], "b": [str(_run(tmp_path / "b", 0.5, 1.5e12))]}
    with pytest.raises(DataError, match="compute differs") as caught:
        compare_seeds(_config(methods, compute="match"))
    assert "evaluate more often" in caught.value.hint


def test_unequal_compute_can_be_reported_and_is_flagged(unequal: dict):
    comparison = compare_seeds(_config(unequal, compute="report"))
    assert "compute differs by 100%, more than the 10%" in "\n".join(notes(comparison))


def test_runs_without_a_ledger_are_refused_or_flagged(methods: dict):
    metrics = Path(methods["base"][0]) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("flops_total", "flops_other"))
    with pytest.raises(DataError, match="flops_total"):
        compare_seeds(_config(methods))
    comparison = compare_seeds(_config(methods, compute="report"))
    assert comparison.compute_gap is None
    assert "no comparison at equal compute" in "\n".join(notes(comparison))


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_a_report_made_afterwards_can_be_named(methods: dict):
    for runs in methods.values():
        for run in runs:
            _report({"sums": 0.7}).save(Path(run) / "evaluation" / "final.json")
    comparison = compare_seeds(_config(methods, report="evaluation/final.json"))
    assert [method.mean for method in comparison.methods] == pytest.approx([0.7, 0.7])
    assert comparison.methods[0].flops == 1e12
    with pytest.raises(DataError, match="no report 'other.json'"):
        compare_seeds(_config(methods, report="other.json"))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"measure": "gredy"}, DataError, "no measure 'gredy'"),
        ({"benchmarks": ["summs"]}, DataError, "not every run was evaluated on 'summs'"),
        ({"looks": 1}, RecipeError, "never tell"),
        ({"alpa": 0.1}, RecipeError, "alpa"),
        ({"alpha": 2}, RecipeError, "alpha"),
    ],
)
def test_mistakes_are_named(methods: dict, keys: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        compare_seeds(_config(methods, **keys))


def test_a_run_is_not_given_twice_and_must_exist(methods: dict, tmp_path: Path):
    with pytest.raises(RecipeError, match="given twice"):
        _config({"a": [methods["base"][0]], "b": [methods["base"][0]]})
    with pytest.raises(DataError, match="no such run folder"):
        compare_seeds(_config({"a": [str(tmp_path / "none")], "b": methods["base"]}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no evaluations"):
        compare_seeds(_config({"a": [str(tmp_path / "empty")], "b": methods["base"]}))


def test_runs_that_were_asked_otherwise_are_refused(methods: dict):
    path = Path(methods["better"][2]) / "evaluation" / "step-000020.json"
    replace(Report.load(path), template_hash="another").save(path)
    with pytest.raises(DataError, match="chat template"):
        compare_seeds(_config(methods))


# -------------------------------------------------------------------------------------------------------------- plan


def test_a_later_look_continues_the_plan(methods: dict):
    few = {name: runs[:3] for name, runs in methods.items()}
    before = json.loads(json.dumps(compare_seeds(_config(few)).to_dict()))
    now = compare_seeds(_config(methods))
    check_continued(before, now, where="out.json")
    for changed, message in (
        ({"alpha": 0.1}, "alpha was 0.05, is 0.1"),
        ({"looks": 6}, "looks was 5, is 6"),
        ({"measure": "avg@1"}, "measure was greedy"),
    ):
        with pytest.raises(DataError, match=message):
            check_continued(before, compare_seeds(_config(methods, **changed)), where="out.json")
    shuffled = {"base": methods["base"][::-1], "better": methods["better"]}
    with pytest.raises(DataError, match="'base' are left out or in another order"):
        check_continued(before, compare_seeds(_config(shuffled)), where="out.json")
    with pytest.raises(DataError, match="not a comparison"):
        check_continued({"hello": 1}, now, where="out.json")


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_json_and_png(methods: dict, tmp_path: Path):
    arguments = [f"{name}={','.join(runs)}" for name, runs in methods.items()]
    files = ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, ["compare", *arguments, *files], catch_exceptions=False)
    assert "better is better than base" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["methods"][1]["name"] == "better"
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="the plan changed: alpha"):
        CliRunner().invoke(app, ["compare", *arguments, *files, "--alpha", "0.2"], catch_exceptions=False)


def test_the_command_reads_yaml_and_its_options_win(methods: dict, tmp_path: Path):
    path = tmp_path / "compare.yaml"
    path.write_text(json.dumps({"methods": methods, "alpha": 0.01}))  # JSON is YAML
    result = CliRunner().invoke(app, ["compare", str(path), "--looks", "4"], catch_exceptions=False)
    assert "look 2 of 4" in result.output
    assert "at most 0.01" in result.output
    path.write_text(json.dumps({"methods": methods, "lokks": 4}))
    with pytest.raises(RecipeError, match="lokks"):
        CliRunner().invoke(app, ["compare", str(path)], catch_exceptions=False)


def test_single_runs_are_compared_problem_by_problem(methods: dict):
    first, second = methods["base"][0], methods["better"][0]
    result = CliRunner().invoke(app, ["compare", first, second], catch_exceptions=False)
    assert "sums, 1,000 problems" in result.output
    assert "not two methods" in result.output


def test_unfinished_runs_are_left_out_with_a_word(methods: dict, tmp_path: Path):
    first, second, third = methods["base"][:3]
    (Path(second) / "model").rmdir()
    (tmp_path / "base-model" / "model").mkdir(parents=True)
    arguments = ["compare", first, second, third, str(tmp_path / "base-model")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert f"{second}: holds no finished run, left out" in result.output.replace("\n", "")
    assert "the run has no evaluations, left out" in result.output
    assert result.output.count("sums, 1,000 problems") == 1  # two that are left, compared once
    with pytest.raises(RecipeError, match="one run cannot be compared"):
        CliRunner().invoke(app, ["compare", first, second], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a=x", "b"], "cannot be mixed"),
        (["a=x", "a=y"], "given twice"),
        (["a=x"], "at least 2"),
        (["a=x", "b="], "has no runs"),
        (["x.json"], "one run cannot be compared"),
        (["x.json", "y.json", "--alpha", "0.1"], "`alpha` has no effect"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: list[str], message: str):
    with pytest.raises((RecipeError, DataError), match=message):
        CliRunner().invoke(app, ["compare", *arguments], catch_exceptions=False)
