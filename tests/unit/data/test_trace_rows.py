"""Rows of n scored responses and of correct completions, out of traces."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.collection import CompletionSettings, ResponseSettings
from posttrain.config.schema import FileSource
from posttrain.data.sources import examples, preferences
from posttrain.data.trace_rows import (
    make_completions,
    make_responses,
    response_roles,
    write_completions,
    write_responses,
)
from posttrain.data.traces import Manifest, Trace, manifest_path
from posttrain.errors import DataError, RecipeError
from posttrain.methods.brain import BRAIn
from posttrain.methods.curry_dpo import CurryDPO


def trace(sample, score, problem="p", text=None, **more):
    verdict = {None: "", 1.0: "correct"}.get(score, "wrong")
    given = {"reward": score, "outcome": score, "verdict": verdict, "finished": True} | more
    return Trace(problem, sample, f"{problem}?", text or f"{sample}", "base", "m", **given)


def scores(row):
    return [row[f"score_{role}"] for role in response_roles(len(row["policies"]))]


# ---------------------------------------------------------------------------------------------------------- responses


@pytest.mark.parametrize(
    ("n", "expected"),
    [(2, [9, 0]), (3, [9, 0, 5]), (4, [9, 0, 6, 3]), (10, [9, 0, 8, 7, 6, 5, 4, 3, 2, 1])],
)
def test_spread_takes_best_worst_and_evenly_between(n, expected):
    group = [trace(i, float(i)) for i in (3, 9, 1, 0, 7, 2, 8, 5, 4, 6)]
    (row,), report = make_responses({"p": group}, ResponseSettings(n=n))
    assert scores(row) == expected and report.rows == 1
    assert [row[role] for role in response_roles(n)] == [str(int(score)) for score in expected]


def test_random_draws_from_all_and_ranks_what_it_drew():
    group = [trace(i, float(i)) for i in range(10)]
    drawn = []
    for seed in range(40):
        (row,), _ = make_responses({"p": group}, ResponseSettings(n=3, choose="random", seed=seed))
        best, worst, middle = scores(row)
        assert best > middle > worst
        drawn += [best, worst, middle]
    assert len(set(drawn)) == 10 and max(drawn.count(value) for value in set(drawn)) < 40
    again = make_responses({"p": group, "q": []}, ResponseSettings(n=3, choose="random", seed=39))[0]
    assert again == [row]


def test_what_is_left_out_is_counted():
    groups = {
        "few": [trace(0, 1.0, "few"), trace(1, 0.0, "few"), trace(2, 0.0, "few", text="1")],
        "tied": [trace(i, 0.5, "tied") for i in range(3)],
        "good": [trace(0, 1.0), trace(1, 0.5), trace(2, 0.0), trace(3, None), trace(4, 0.2, finished=False)],
    }
    rows, report = make_responses(groups, ResponseSettings(n=3))
    assert [row["problem_id"] for row in rows] == ["p"] and scores(rows[0]) == [1.0, 0.0, 0.5]
    assert (report.traces, report.repeated, report.unscored, report.unfinished) == (11, 1, 1, 1)
    assert (report.prompts, report.prompts_few, report.prompts_tied, report.rows) == (3, 1, 1, 1)


def test_log_probs_of_the_proposal_follow_the_roles():
    group = [replace(trace(i, float(i)), ids=[1, 2], logps=[-0.5 * i, -0.25]) for i in range(3)]
    (row,), _ = make_responses({"p": group}, ResponseSettings(n=3))
    assert row["proposal_logps"] == [-1.25, -0.25, -0.75]
    (text_only,), _ = make_responses({"p": [*group[:2], trace(2, 2.0)]}, ResponseSettings(n=3))
    assert "proposal_logps" not in text_only


# -------------------------------------------------------------------------------------------------------- completions


def test_only_different_correct_whole_texts():
    group = [
        *(trace(0, 1.0, text="a"), trace(1, 1.0, text="a"), trace(2, 0.0, text="b"), trace(3, 1.0, text="c")),
        *(trace(4, None), trace(5, 1.0, finished=False), trace(6, 1.0, text="  ", finished=None)),
    ]
    rows, report = make_completions({"p": group}, CompletionSettings())
    assert [row["completion"] for row in rows] == ["a", "c"]
    assert (report.incorrect, report.unverified, report.unfinished, report.empty, report.repeated) == (1, 1, 1, 1, 1)
    assert report.traces == 7 and report.rows == 2 and report.prompts_used == 1


def test_rows_are_prompts_for_the_verifier_of_their_traces():
    rows, _ = make_completions(
        {"p": [trace(0, 1.0, meta={"task": "t", "level": 2}, reference="4")]}, CompletionSettings()
    )
    known = {"prompt": "p?", "completion": "0", "task": "t", "level": 2, "reference": "4"}
    assert rows == [known | {"problem_id": "p", "policy": "base"}]


def test_at_most_k_per_problem_by_lot():
    groups = {name: [trace(i, 1.0, name) for i in range(8)] for name in ("p", "q")}
    groups["none"] = [trace(0, 0.0, "none")]
    rows, report = make_completions(groups, CompletionSettings(per_problem=3))
    assert [row["problem_id"] for row in rows] == ["p"] * 3 + ["q"] * 3
    assert (report.over_limit, report.prompts, report.prompts_used) == (10, 3, 2)
    alone = make_completions({"q": groups["q"]}, CompletionSettings(per_problem=3))[0]
    assert alone == rows[3:]  # more problems do not change the rows of others
    kept = {
        row["completion"]
        for seed in range(30)
        for row in make_completions({"p": groups["p"]}, CompletionSettings(per_problem=3, seed=seed))[0]
    }
    assert len(kept) == 8


# -------------------------------------------------------------------------------------------------- files and recipes


@pytest.fixture
def traces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("traces.jsonl")
    group = [replace(trace(i, float(i % 2), f"p{i // 6}"), ids=[1], logps=[-1.0 - i]) for i in range(24)]
    path.write_text("".join(one.to_json() + "\n" for one in group))
    manifest = Manifest("m", "sampled", {"label": "base"}, {}, "0")
    manifest_path(path).write_text(json.dumps({k: getattr(manifest, k) for k in manifest.__slots__}))
    return path


def call(*words):
    return CliRunner().invoke(app, list(words), catch_exceptions=False).output


def test_the_methods_read_the_rows(traces):
    out = call("prepare", "responses", str(traces), "--out", "rows.jsonl", "--n", "4")
    recipe = (
        "in a recipe: data: {preferences: {path: rows.jsonl, others: {response_3: response_3, response_4: response_4}}}"
    )
    assert recipe in out and "rows.jsonl: 4 rows" in out
    others = {"response_3": "response_3", "response_4": "response_4"}
    rows = preferences(FileSource(path="rows.jsonl", others=others), "preferences")
    assert json.loads(Path("rows.report.json").read_text())["rows"] == len(rows) == 4
    brain = BRAIn(BRAIn.Config(n=4, proposal_logps="proposal_logps"))
    values = brain.values(brain.prepare(rows)[0])
    assert values["rewards"][0] == 1.0 and values["rewards"][1] == 0.0 and len(values["proposal_logps"]) == 4
    assert len(CurryDPO(CurryDPO.Config()).prepare(rows)) > 0


def test_supervised_training_reads_the_rows(traces):
    out = call("prepare", "completions", str(traces), "--out", "sft.jsonl", "--per-problem", "2")
    assert "sft.jsonl: 8 rows" in out and "12 incorrect" in out and "4 more above per_problem" in out
    rows = examples(FileSource(path="sft.jsonl", completion="completion"), "completions")
    assert len(rows) == 8 and {row.problem.prompt for row in rows} == {f"p{i}?" for i in range(4)}


def test_nothing_to_write_is_an_error_and_writes_nothing(traces):
    with pytest.raises(DataError, match="no row of 9 responses can be made of 24 traces: 4 prompts with fewer"):
        write_responses([traces], Path("r.jsonl"), ResponseSettings(n=9))
    wrong = [json.loads(line) | {"verdict": "wrong"} for line in traces.read_text().splitlines()]
    traces.write_text("".join(json.dumps(one) + "\n" for one in wrong))
    with pytest.raises(DataError, match="none of 24 traces is a correct completion: 24 incorrect"):
        write_completions([traces], Path("c.jsonl"), CompletionSettings())
    assert not list(Path().glob("[rc].*"))


@pytest.mark.parametrize(("kind", "option"), [("responses", ["--n", "1"]), ("completions", ["--per-problem", "0"])])
def test_mistakes(kind, option, traces):
    with pytest.raises(RecipeError, match="written as .jsonl"):
        call("prepare", kind, str(traces), "--out", "rows.csv")
    with pytest.raises(RecipeError, match="at least"):
        call("prepare", kind, str(traces), "--out", "rows.jsonl", *option)
