"""`write_prefixes` and `posttrain prepare prefixes` on trace files: rows, report, refusals."""

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.collection import PrefixSettings
from posttrain.config.schema import ModelConfig
from posttrain.data.prefix_file import write_prefixes
from posttrain.data.rendering import Renderer
from posttrain.data.traces import Manifest, Trace, manifest_path
from posttrain.errors import DataError, RecipeError
from posttrain.models.tokenizer import load_tokenizer

LONG = "1+2=3;3+3=6;6+4=10;10+5=15;#15"


@pytest.fixture
def renderer(tiny_model):
    return Renderer(load_tokenizer(ModelConfig(path=str(tiny_model))))


@pytest.fixture
def traces(tmp_path, renderer):
    """A file with a sampled trace, a wrong one, one that is text only, and one that does not show its answer."""

    def trace(id, prompt, text, reference, correct=True, ids=True):
        tokens = renderer.tokenizer(text, add_special_tokens=False).input_ids + [renderer.tokenizer.eos_token_id]
        prompt_ids = renderer.tokenizer(prompt, add_special_tokens=False).input_ids
        known = {"ids": tokens, "prompt_ids": prompt_ids, "finished": True} if ids else {}
        verdict = "correct" if correct else "wrong"
        return Trace(id, 0, prompt, text, "m", "one", reference, verdict=verdict, outcome=float(correct), **known)

    rows = [
        trace("p/0", "1+2+3+4+5=", LONG, "15"),
        trace("p/1", "1+1=", "1+1=3;#3", "2", correct=False),
        trace("p/2", "1+2+3+4+6=", LONG.replace("5", "6"), "16", ids=False),
        trace("p/3", "7+7=", "7+7=14;#14", "41"),
    ]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
    manifest = Manifest("one", "sampled", {"label": "m"}, {}, "hash")
    manifest_path(path).write_text(json.dumps(asdict(manifest)), encoding="utf-8")
    return path


def test_prefixes_and_their_report(traces, renderer, tmp_path):
    out = tmp_path / "out" / "prefixes.jsonl"
    report = write_prefixes(
        [traces], out, PrefixSettings(cuts_per_problem=4, fraction_low=0.6, fraction_high=1.0), renderer
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["problem_id"] for row in rows} == {"p/0", "p/2"}
    for row in rows:
        whole = LONG if row["reference"] == "15" else LONG.replace("5", "6")
        assert whole.startswith(row["prefix"]) and row["reference"] not in row["prefix"]
        assert renderer.text(row["prefix_ids"]) == row["prefix"]
        assert row["fraction"] == len(row["prefix"]) / len(whole)
    assert (report.problems, report.solved, report.cut, report.traces) == (4, 3, 2, 3)
    assert (report.own_ids, report.unguarded) == (2, 1)
    assert report.prefixes == len(rows) and report.missing == 12 - len(rows)
    assert report.guarded == sum(row["guarded"] for row in rows) > 0
    assert json.loads(out.with_suffix(".report.json").read_text()) == asdict(report)


def test_it_is_repeatable(traces, renderer, tmp_path):
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for out in (one, other):
        write_prefixes([traces], out, PrefixSettings(), renderer)
    assert one.read_bytes() == other.read_bytes()


def test_refusals(traces, renderer, tmp_path):
    with pytest.raises(RecipeError, match=r"written as \.jsonl"):
        write_prefixes([traces], tmp_path / "prefixes.csv", PrefixSettings(), renderer)
    with pytest.raises(DataError, match="none of 3 correct traces can be cut") as caught:
        write_prefixes([traces], tmp_path / "p.jsonl", PrefixSettings(answer_pattern="boxed"), renderer)
    assert "--answer-pattern" in caught.value.hint


def test_on_the_command_line(traces, tiny_model, tmp_path):
    out = tmp_path / "prefixes.jsonl"
    words = ["prepare", "prefixes", str(traces), "--model", str(tiny_model), "--out", str(out)]
    printed = CliRunner().invoke(app, [*words, "--boundary", "line", "--separator", ";"], catch_exceptions=False).output
    assert "problems solved" in printed and f"data: {{traces: {{path: {traces}}}}}" in printed.replace("\n", "")
    assert all(json.loads(line)["prefix"].endswith(";") for line in out.read_text().splitlines())
    with pytest.raises(RecipeError, match="fraction_low"):
        CliRunner().invoke(app, [*words, "--low", "0.9"], catch_exceptions=False)
