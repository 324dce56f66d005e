"""What a report collects and says, and that nothing foreign in it can act."""

import base64
import gzip
import html
import json
import math
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

import posttrain
from posttrain.cli.main import app
from posttrain.config.comparison import CompareConfig
from posttrain.errors import DataError
from posttrain.evaluation.compare import compare_reports
from posttrain.evaluation.seeds import compare_seeds
from posttrain.report.collect import collect
from posttrain.report.findings import findings
from posttrain.report.page import columns, page, payload
from posttrain.safe_files import write_json_atomic

BEFORE, AFTER = "+---" * 25, "++-+" * 25
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>\u2028&amp;\"'"


def data_of(text):
    packed = re.search(r'<script id="data" type="text/plain">(.*?)</script>', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def stage(folder, started):
    write_json_atomic(folder / "stage.json", {"started": started})


@pytest.fixture
def pipeline(tmp_path, make_run, make_report):
    """Evaluate, train, evaluate, compare: as `posttrain run` leaves it."""
    base, tuned = make_report("start", BEFORE), make_report("runs/elsewhere/grpo/model", AFTER)
    base.save(tmp_path / "p" / "base_eval" / "report.json")
    make_run(tmp_path / "p" / "grpo")
    tuned.save(tmp_path / "p" / "grpo_eval" / "report.json")
    write_json_atomic(tmp_path / "p" / "result" / "table.json", compare_reports(base, tuned).to_dict())
    for order, name in enumerate(("base_eval", "grpo", "grpo_eval", "result")):
        stage(tmp_path / "p" / name, f"2030-01-01T00:0{order}:00+00:00")
    return tmp_path / "p"


def test_a_pipeline_says_whether_it_worked(pipeline):
    collected = collect([pipeline])
    assert list(collected.runs) == ["grpo"]
    assert [each.name for each in collected.evaluations] == ["base_eval", "grpo_eval"]
    assert [each.name for each in collected.comparisons] == ["result"]  # the table it has is not made again
    (finding,) = findings(collected)
    assert (finding.tone, finding.about) == ("better", "grpo: grpo from start")
    assert finding.found == "Greedy accuracy on sums rose from 25.0% to 75.0%."
    assert "+50.0 points, 95% interval [+" in finding.sure and "100 problems, paired" in finding.sure
    assert "20 steps" in finding.on and "2e+10 FLOPs" in finding.on and "2,000 trained" in finding.on


@pytest.mark.parametrize(("after", "tone"), [(AFTER, "better"), (BEFORE, "unclear"), ("-" * 100, "worse")])
def test_the_tone_is_that_of_the_interval(tmp_path, make_report, after, tone):
    for name, verdicts in (("a.json", BEFORE), ("b.json", after)):
        make_report(name, verdicts).save(tmp_path / name)
    (finding,) = findings(collect([tmp_path / "a.json", tmp_path / "b.json"]))
    assert finding.tone == tone and "other seeds" in finding.sure and finding.about == "b.json against a.json"
    assert finding.found == f"Greedy accuracy on sums is {after.count('+')}.0%, against 25.0%."


def test_evaluations_between_the_steps_of_a_run_are_compared(tmp_path, make_run, make_report):
    evaluations = {
        0: make_report("step 0", BEFORE),
        10: make_report("step 10", AFTER),
        20: make_report("step 20", AFTER),
    }
    collected = collect([make_run(tmp_path / "run", evaluations=evaluations)])
    (finding,) = findings(collected)
    assert finding.tone == "better" and "from 25.0% to 75.0%" in finding.found and "another seed" in finding.sure
    assert [(each.name, each.run, each.step) for each in collected.evaluations] == [
        (f"run, step {step}", "run", step) for step in (0, 10, 20)
    ]


def test_completions_are_those_of_the_first_and_the_last_evaluation(tmp_path, make_run, make_report):
    evaluations = {step: make_report(f"step {step}", "+-") for step in (0, 10, 20)}
    make_report("alone", "--").save(tmp_path / "alone.json")
    shown = payload(collect([make_run(tmp_path / "run", evaluations=evaluations), tmp_path / "alone.json"]))
    kept = [each["benchmarks"][0]["records"].get("completions") for each in shown["evaluations"]]
    assert [None if each is None else each["values"][1][0]["text"] for each in kept] == [
        "Written 1 by step 0",
        None,
        "Written 1 by step 20",
        "Written 1 by alone",
    ]


def test_a_study_over_seeds_says_which_is_better(tmp_path, make_run, make_report):
    methods = {}
    for name, right in (("grpo", 20), ("rloo", 80)):
        for seed in range(4):
            verdicts = "+" * (right + seed) + "-" * (100 - right - seed)
            run = make_run(tmp_path / name / str(seed), steps=1, evaluations={1: make_report("step 1", verdicts)})
            methods.setdefault(name, []).append(str(run))
    config = CompareConfig(methods=methods, seeds_per_look=4, looks=1)
    write_json_atomic(tmp_path / "study.json", compare_seeds(config).to_dict())
    collected = collect([tmp_path / "study.json"])
    (finding,) = findings(collected)
    assert finding.found == "rloo is better than grpo by 60.0 points." and finding.tone == "better"
    assert "4 of grpo, 4 of rloo" in finding.on and "at most 0.05" in finding.sure
    assert payload(collected)["over_seeds"]["study.json"]["methods"][0]["name"] == "grpo"


def test_a_study_says_in_its_first_sentence_which_arm_is_best(tmp_path, make_study):
    arms = {
        "grpo": [0.2, 0.21, 0.22, 0.23, 0.215],
        "sft": [0.5, 0.53, 0.51, 0.52, 0.515],
        "both": [0.51, 0.5, 0.53, 0.52, 0.515],
    }
    collected = collect([make_study(tmp_path / "hybrid", arms)])
    (finding,) = findings(collected)
    assert (finding.tone, finding.about) == ("better", "hybrid: grpo against sft against both")
    assert finding.found.startswith("sft has the highest mean, 51.5% [") or "both has the highest" in finding.found
    assert "sft is better than grpo by 30.0 points." in finding.found and "both and sft" not in finding.found
    assert finding.on == "greedy on sums; 3e+09 FLOPs for each arm and seed"
    assert "5 of grpo, 5 of sft, 5 of both" in finding.sure and "at most 0.05 over all pairs and looks" in finding.sure
    (study,) = payload(collected)["studies"]
    amounts, mean, low, high = study["arms"][0]["bands"]["flops"]
    assert (amounts[0], amounts[-1], mean[-1]) == (0.0, 3e9, pytest.approx(0.215)) and low[-1] < mean[-1] < high[-1]
    pair = next(each for each in study["pairs"] if (each["base"], each["other"]) == ("grpo", "sft"))
    assert pair["value"] == pytest.approx(0.3) and pair["said"] == "better" and pair["low"] < 0.3 < pair["high"]
    assert payload(collected)["title"] == "hybrid"


def test_a_study_of_few_seeds_says_that_nothing_is_told_apart_and_why(tmp_path, make_study):
    (finding,) = findings(collect([make_study(tmp_path / "two", {"a": [0.5, 0.6], "b": [0.3, 0.5]})]))
    assert finding.tone == "unclear" and finding.found.startswith("a has the highest mean, 55.0% [")
    assert "b against a, paired by seed: -15.0 [" in finding.found and "No test: 2 seeds of each arm" in finding.sure


def test_a_damaged_study_is_one_message(tmp_path, make_study):
    path = make_study(tmp_path / "two", {"a": [0.5, 0.6], "b": [0.3, 0.5]}) / "study.json"
    data = json.loads(path.read_text())
    del data["arms"][0]["cells"][0]["score"]
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"not the file of a study: KeyError\('score'\)"):
        collect([path])


def test_tokens_are_with_their_sample_and_pairs_by_themselves(tmp_path, make_run, make_samples, make_pairs):
    tokens = {"text": ["a", "b"], "trained": [1, 1], "logp": [-0.5, -1.0]}
    run = make_run(
        tmp_path / "run",
        samples=make_samples(8),
        tokens=[{"step": 3, "rollout": 1, "place": 2} | tokens, *make_pairs(2)],
    )
    shown = payload(collect([run]))["runs"][0]
    assert shown["samples"]["tokens"]["values"] == [None] * 6 + [tokens, None]
    assert shown["trained"] == 2 and shown["tokens"]["margin"]["values"] == [-1.0, 3.0]


def test_a_mixture_has_a_panel_of_what_it_is_made_of(tmp_path, make_run):
    shares = {"source/a/share": 0.25, "source/b/share": 0.75, "source/a/nll": 1.0, "loss": 1.0}
    shown = payload(collect([make_run(tmp_path / "run", method="sft", values=lambda step: shares)]))
    panels = {panel["title"]: panel["metrics"] for panel in shown["panels"] if not panel["more"]}
    assert panels["Rows by source"] == ["source/a/share", "source/b/share"]
    assert panels["Loss by source"] == ["source/a/nll"]


def test_all_that_the_page_is_made_of_is_in_the_wheel():
    root = Path(posttrain.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text(encoding="utf-8"))
    packed = {
        file for pattern in project["tool"]["setuptools"]["package-data"]["posttrain"] for file in root.glob(pattern)
    }
    assert {file for file in (root / "report").rglob("*.*") if file.is_file() and "py" not in file.suffix} <= packed


def test_reports_that_cannot_be_compared_are_shown_with_the_reason(tmp_path, make_report):
    make_report("a", BEFORE).save(tmp_path / "a.json")
    make_report("b", BEFORE, name="others").save(tmp_path / "b.json")
    (finding,) = findings(collect([tmp_path / "a.json", tmp_path / "b.json"]))
    assert finding.tone == "unmeasured" and "share no benchmark" in finding.sure


def test_what_was_seen_in_training_alone_is_no_measurement(tmp_path, make_run):
    (finding,) = findings(collect([make_run(tmp_path / "run")]))
    assert finding.tone == "unmeasured" and "nothing was measured on problems held out" in finding.sure
    assert finding.found == "reward rose from 0.075 to 0.975 (means of the first and last 2 of 20 values)."


def test_a_preference_run_shows_its_own_curves(tmp_path, make_run):
    pairs = {"pairs/accuracy": 0.6, "pairs/margin": 1.0, "pairs/logps_chosen": -3.0, "pairs/logps_rejected": -4.0}
    run = make_run(tmp_path / "run", method="dpo", values=lambda step: pairs | {"loss": 1 / step})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "time": 1.0, "own/number": 1.0}\n')  # of a plugin that is not loaded here
    shown = payload(collect([run]))
    titles = [panel["title"] for panel in shown["panels"] if not panel["more"]]
    assert titles == ["Pair accuracy", "Margin of pairs", "Log-probs of pairs", "Loss"]
    drawn = {name for panel in shown["panels"] for name in panel["metrics"]}
    assert set(shown["metrics"]) == drawn and "own/number" in drawn  # nothing that was logged is left out


@pytest.fixture
def preferring(tmp_path, make_run):
    """`preferring(name, right)`: a run of which `right` of 40 held-out pairs moved to what was chosen, one a prompt."""

    def make(name, right):
        run = make_run(tmp_path / name, method="dpo", values=lambda step: {"loss": 0.5})
        for step, margins in ((0, [0.0] * 40), (20, [1.0] * right + [-1.0] * (40 - right))):
            names = [f"{row:02}" for row in range(40)]
            rows = {"pairs": names, "prompts": names, "margins": margins, "margins_per_token": margins}
            write_json_atomic(run / "held_out" / f"step-{step:06d}.json", {"rows": rows | {"tie": 1e-6, "kl": []}})
        share = right / 40
        values = {
            "held_out/accuracy": share,
            "held_out/accuracy_low": share - 0.1,
            "held_out/accuracy_high": share + 0.1,
        }
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 20, "time": 1.0} | values) + "\n")
        return run

    return make


@pytest.mark.parametrize(("right", "tone"), [(32, "better"), (21, "unclear"), (8, "worse")])
def test_held_out_pairs_are_held_against_chance(preferring, right, tone):
    """Their accuracy is against the start, where every pair is a tie, so it is never compared with that of step 0."""
    collected = collect([preferring("run", right)])
    assert [change.measure for change in collected.comparisons[0].pairs] == ["accuracy per token", "margin"]
    (finding,) = findings(collected)
    assert finding.tone == tone and "50% would be chance" in finding.sure
    assert finding.found == f"{right / 40:.1%} of held-out pairs have moved towards what was chosen."


def test_two_preference_runs_are_compared_on_their_pairs(preferring):
    *_, last = findings(collect([preferring("dpo", 8), preferring("ipo", 32)]))
    assert (last.about, last.tone) == ("ipo against dpo, held-out pairs", "better")
    assert last.found == "Accuracy on held-out pairs is 80.0%, against 20.0%."
    assert last.sure.startswith("Held-out pairs: +60.0 [+") and "40 prompts" in last.sure


def test_a_critic_has_panels_of_its_own(tmp_path, make_run):
    values = {"critic/value": 0.4, "critic/explained_variance": 0.2, "critic/loss": 1.0}
    shown = payload(collect([make_run(tmp_path / "run", values=lambda step: values)]))
    titles = [panel["title"] for panel in shown["panels"] if not panel["more"]]
    assert titles == ["Values", "Explained variance of values", "Loss of the critic"]


def test_entries_of_a_step_are_one_row_with_what_was_spent_by_then(tmp_path, make_report, make_run):
    run = make_run(tmp_path / "run", steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 0, "time": 0.5, "eval/sums/greedy": 0.25}\n{"step": 2, "time": 9, "eval/sums/greedy": 0.5}\n'
        )
    curves = payload(collect([run]))["runs"][0]["curves"]
    assert curves["step"] == [0, 1, 2]
    assert curves["eval/sums/greedy"] == [0.25, None, 0.5]
    assert curves["flops_total"] == [0.0, 10**9, 2 * 10**9] and curves["wall_seconds"] == [0.0, 1.5, 3.0]


def test_texts_that_repeat_are_kept_once():
    found = columns([{"a": "x", "b": 1}, {"a": "y"}, {"a": "x", "b": None}, {"a": "x", "c": "z"}])
    assert found["a"] == {"table": ["x", "y"], "at": [0, 1, 0, 0]}
    assert found["b"] == {"values": [1, None, None, None]}
    assert found["c"] == {"table": ["z"], "at": [None, None, None, 0]}


def test_nothing_foreign_is_in_the_page_but_as_data(tmp_path, make_run):
    sample = {"step": 0, "problem": HOSTILE, "prompt": HOSTILE, "completion": HOSTILE + "\ud800", "verdict": HOSTILE}
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", samples=[sample | {"reward": math.nan}])
    text = page(collect([run]))
    assert HOSTILE not in text and "window.hit" not in text and "<img" not in text
    assert text.count("<script") == text.count("</script>") == 3 and text.count("<style>") == 2
    assert html.escape(run.name) in text
    row = data_of(text)["runs"][0]
    assert row["samples"]["prompt"]["values"] == [HOSTILE] and row["samples"]["reward"]["values"] == [None]
    assert row["samples"]["completion"]["values"] == [HOSTILE + "?"]  # a lone surrogate has no UTF-8


def test_the_page_may_ask_for_nothing(tmp_path, make_run):
    text = page(collect([make_run(tmp_path / "run")]))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy and policy.count("sha256-") == 4
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_the_chart_library_is_there_with_version_and_licence():
    folder = files("posttrain.report") / "vendor"
    assert "(v1.6.32)" in (folder / "uPlot.iife.min.js").read_text()[:100]
    assert "MIT License" in (folder / "uPlot.LICENSE").read_text()


def test_a_run_that_has_just_begun_or_diverged_is_shown(tmp_path):
    for name, line in (("begun", ""), ("diverged", '{"step": 1, "time": 1.0, "loss": null, "nonfinite": ["loss"]}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(line + '{"step": 2, "ti')  # being written
    collected = collect([tmp_path / "begun", tmp_path / "diverged"])
    diverged, begun = findings(collected)
    assert (diverged.tone, diverged.found) == ("worse", "No value of loss is finite.")
    assert (begun.tone, begun.found) == ("unmeasured", "No metric says how it went.")
    runs = data_of(page(collected))["runs"]
    assert [run["curves"].get("loss") for run in runs] == [None, [None]]


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(DataError, match="neither a run"):
        collect([tmp_path])
    with pytest.raises(DataError, match="no such folder or file"):
        collect([tmp_path / "nowhere"])
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(DataError, match="neither an evaluation report nor a comparison"):
        collect([tmp_path / "x.json"])
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        collect([tmp_path / "x.json"])


def test_runs_of_one_name_are_told_apart(tmp_path, make_run):
    runs = [make_run(tmp_path / method / "seed-0") for method in ("grpo", "rloo")]
    assert list(collect([*runs, runs[0]]).runs) == ["grpo/seed-0", "rloo/seed-0"]


def test_the_command_writes_one_file(pipeline, tmp_path):
    out = tmp_path / "new" / "page.html"
    found = CliRunner().invoke(app, ["report", str(pipeline), "--output", str(out)])
    assert found.exit_code == 0 and "Greedy accuracy on sums rose from 25.0% to 75.0%." in found.output
    assert data_of(out.read_text(encoding="utf-8"))["title"] == "grpo"
