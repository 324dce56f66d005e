"""Traces by beam search, and traces that the model revises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config.collection import SampleConfig
from posttrain.config.loading import parse_config
from posttrain.data.traces import read_manifest, read_traces, write_parquet
from posttrain.errors import PosttrainError
from posttrain.rollouts.collect import collect

REVISED = {"revisions": 2, "revision_template": "{prompt}{answer};"}


@pytest.fixture
def settings(tiny_model, tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": "0123456789+=;#"[2 * i]} for i in range(5)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**keys) -> dict:
        whole = {
            "model": {"path": str(tiny_model)},
            "data": {"prompts": {"path": str(data), "reference": "answer"}},
            "verifier": [{"type": "exact", "pattern": "^(.)"}],
            "verifier_pool": {"workers": 0},
            "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 6},
            "prompts_per_chunk": 2,
            "threads": 1,
            "output": str(tmp_path / "traces.jsonl"),
        }
        return whole | keys

    return make


def run(whole, lines=None):
    """Traces of a run; with `lines`, of one that was broken off after so many and started again."""
    config = parse_config(json.loads(json.dumps(whole)), SampleConfig)
    path = Path(config.output)
    done = collect(config, path, say=lambda _: None)
    if lines is not None:
        kept = path.read_text().splitlines(keepends=True)[:lines]
        path.write_text("".join(kept) + '{"problem_id": "prom')
        done = collect(config, path, say=lambda _: None)
        assert done.found == lines
    return done, read_traces([path]).traces


def test_a_search_gives_the_best_first_and_knows_no_seed(settings, tmp_path):
    done, traces = run(settings(beams=6))
    assert done.traces == 20
    for start in range(0, 20, 4):
        group = traces[start : start + 4]
        totals = [sum(trace.logps) for trace in group]
        assert totals == sorted(totals, reverse=True) and len({tuple(trace.ids) for trace in group}) == 4
    manifest = read_manifest(done.path)
    assert manifest.sampling["beams"] == 6
    written = done.read_tokens + 6 / 4 * done.new_tokens  # all beams are paid for
    assert done.flops == pytest.approx(2 * manifest.parameters * written, rel=0.01)
    _, other = run(settings(beams=6, seed=5, prompts_per_chunk=5, output=str(tmp_path / "other.jsonl")))
    assert [trace.ids for trace in other] == [trace.ids for trace in traces]


@pytest.mark.parametrize("keys", [{"beams": 6}, REVISED, {"beams": 6, **REVISED}], ids=["beams", "revised", "both"])
@pytest.mark.parametrize("lines", [3, 9])
def test_broken_off_within_a_prompt_it_ends_the_same(settings, tmp_path, keys, lines):
    _, expected = run(settings(**keys))
    _, found = run(settings(**keys, output=str(tmp_path / "other.jsonl")), lines)
    assert [(t.problem_id, t.sample, t.ids, t.earlier) for t in found] == [
        (t.problem_id, t.sample, t.ids, t.earlier) for t in expected
    ]


def test_revisions_answer_the_template_and_are_counted(settings, tmp_path):
    plain, first = run(settings())
    done, traces = run(settings(**REVISED, output=str(tmp_path / "revised.jsonl")))
    vocabulary = "0123456789+=;#"
    for before, trace in zip(first, traces, strict=True):
        # The first answers are those that are drawn without revisions.
        assert [each.text for each in trace.earlier][:1] == [before.text]
        assert trace.earlier[0].verdict == before.verdict and trace.earlier[0].tokens == len(before.ids)
        asked = "".join(vocabulary[id - 4] for id in trace.prompt_ids)
        assert asked == trace.prompt + trace.earlier[1].text + ";"
        assert trace.prompt == before.prompt and len(trace.logps) == len(trace.ids)
    assert len({trace.text for trace in traces}) > 5
    assert done.by_revision == (
        plain.correct,
        sum(trace.earlier[1].verdict == "correct" for trace in traces),
        sum(trace.correct for trace in traces),
    )
    assert "correct after 0, 1, ... revisions" in done.summary() and plain.by_revision == ()
    assert done.new_tokens == sum(len(t.ids) + sum(each.tokens for each in t.earlier) for t in traces)
    parameters = read_manifest(done.path).parameters
    assert done.flops == 2 * parameters * (done.read_tokens + done.new_tokens)
    assert len({tuple(trace.ids) for trace in traces[:4]}) > 1, "the completions of a problem are revised alike"
    write_parquet(tmp_path / "t.parquet", traces)
    (tmp_path / "t.manifest.json").write_text((tmp_path / "revised.manifest.json").read_text())
    assert read_traces([tmp_path / "t.parquet"]).traces == traces


def test_an_answer_without_room_for_a_revision_stays(settings, tmp_path):
    # 96 positions; a template that all but fills them.
    template = "{prompt}{answer}" + 81 * ";"
    _, traces = run(settings(revisions=2, revision_template=template))
    fits = [len(t.earlier[0].text if t.earlier else t.text) + 4 + 81 <= 90 for t in traces]
    assert [bool(t.earlier) for t in traces] == fits and len(set(fits)) == 2


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"revisions": 2}, "needs `revision_template`"),
        ({"revision_template": "{prompt}{answer}"}, "no effect without `revisions`"),
        ({"revisions": 1, "revision_template": "{prompt}"}, "no {answer}"),
        ({"beams": 3}, "at least rollouts.samples_per_prompt"),
        ({"beams": 6, "stop_at_correct": 1}, "stop_at_correct would have no effect"),
        (
            {"beams": 6, "rollouts": {"samples_per_prompt": 2, "temperature": 0.5}},
            "rollouts.temperature would have no effect",
        ),
    ],
)
def test_settings_without_sense_are_refused(settings, keys, word):
    with pytest.raises(PosttrainError, match=word):
        parse_config(settings(**keys), SampleConfig)
