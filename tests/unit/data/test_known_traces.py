"""Traces as material for training: which are used, as which tokens, and for which problems."""

import json
import math
from dataclasses import replace

import pytest

from posttrain.config.schema import TraceSource
from posttrain.data.known_traces import TraceBook, fit_traces, load_traces, trajectory_weights
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.traces import Manifest, Trace, manifest_path
from posttrain.errors import DataError

LIMITS = {"max_prompt_length": None, "max_length": None, "policy": "drop", "max_lost_share": 1.0}


@pytest.fixture(scope="module")
def renderer(tiny_model):
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture
def write(tmp_path):
    """`write(traces)` -> a source of a file with these traces."""

    def make(traces, **keys):
        path = tmp_path / "traces.jsonl"
        path.write_text("".join(trace.to_json() + "\n" for trace in traces))
        manifest = Manifest("m", "sampled", {"label": "p"}, {}, "0")
        manifest_path(path).write_text(json.dumps({name: getattr(manifest, name) for name in manifest.__slots__}))
        return TraceSource(path=str(path), **keys)

    return make


def trace(problem, sample, text="1#1", verdict="correct", **further):
    return Trace(f"prompts/{problem}", sample, f"{problem}+1=", text, "p", "m", verdict=verdict, **further)


def test_only_correct_traces_are_used_unless_all_are_asked_for(write):
    rows = [trace(0, 0), trace(0, 1, verdict="wrong"), trace(1, 0), trace(0, 2), trace(0, 3), trace(2, 0, text=" ")]
    chosen = [(w.trace.problem_id, w.trace.sample) for w in load_traces(write(rows), "traces")]
    assert chosen == [("prompts/0", 0), ("prompts/1", 0), ("prompts/0", 2), ("prompts/0", 3)]
    assert len(load_traces(write(rows, keep="all"), "traces")) == 5  # an empty one teaches nothing
    assert len(load_traces(write(rows, per_problem=1), "traces")) == 2


@pytest.mark.parametrize(
    ("verdict", "says"), [("wrong", "2 were verified"), ("", "0 were verified")], ids=["wrong", "not verified"]
)
def test_no_usable_trace_is_an_error_that_says_why(verdict, says, write):
    rows = [trace(0, 0, verdict=verdict), trace(0, 1, verdict=verdict)]
    with pytest.raises(DataError, match=f"none of the 2 traces is correct; {says}") as caught:
        load_traces(write(rows), "traces")
    assert ("keep: all" in str(caught.value)) == (verdict == "")


@pytest.mark.parametrize("keep", ["all", "correct"])
def test_traces_that_are_asked_for_and_hold_nothing_are_another_error(keep, write):
    with pytest.raises(DataError, match="none of the 2 traces can be used: 2 without text"):
        load_traces(write([trace(0, 0, text=" "), trace(0, 1, text="")], keep=keep), "traces")


def test_trajectory_weights_by_hand():
    weights = trajectory_weights([2, 0, -1], 0.1)
    assert weights == pytest.approx([0.9986837012, 0.0012709586, 0.0000453402], abs=1e-9)
    assert trajectory_weights([2, 0, -1], 1.0) == pytest.approx([0.5315483062, 0.272906, 0.1955456938], abs=1e-8)
    assert trajectory_weights([1, 1], 0.1) == [0.5, 0.5]
    assert trajectory_weights([1e6, 0.0], 1e-3)[0] == pytest.approx(1.0)


def test_traces_of_hard_problems_weigh_more(write):
    rows = [trace(0, n, verdict=v, reward=r) for n, (v, r) in enumerate([("correct", 1.0), ("wrong", 0.0)] * 2)]
    rows += [trace(1, n, reward=1.0) for n in range(4)]
    by_advantage = load_traces(write(rows, weights={"alpha": 0.5}), "traces")
    hard, easy = by_advantage[0].weight, by_advantage[-1].weight
    assert hard == pytest.approx(easy * math.exp(1 / 0.5)) and sum(w.weight for w in by_advantage) == pytest.approx(1)
    by_return = load_traces(write(rows, keep="all", weights={"by": "return", "alpha": 1.0}), "traces")
    assert by_return[0].weight == pytest.approx(by_return[1].weight * math.e)
    with pytest.raises(DataError, match="trace 0 of prompts/7 has no reward"):
        load_traces(write([trace(7, 0)], weights={}), "traces")


def known(source, renderer, **limits):
    return fit_traces(load_traces(source, "traces"), renderer, **(LIMITS | limits))


def test_text_is_rendered_and_own_ids_are_kept(write, renderer):
    prompt = renderer.prompt_ids(Problem("x", "0+1="))
    eos, ids = renderer.tokenizer.eos_token_id, renderer.tokenizer("1#1", add_special_tokens=False).input_ids
    sampled = {"prompt_ids": prompt, "ids": [*ids, eos], "logps": [-0.1] * len(ids) + [-0.2], "finished": True}
    cut = sampled | {"ids": ids, "logps": [-0.1] * len(ids), "finished": False}
    foreign = sampled | {"prompt_ids": [*prompt, 5]}
    rows = [trace(0, 0), trace(0, 1, **sampled), trace(0, 2, **cut), trace(0, 3, **foreign)]
    found, ledger = known(write(rows), renderer)
    assert ledger.kept == 4
    assert [(each.ids, each.finished) for each in found] == [
        ([*ids, eos], True),
        ([*ids, eos], True),
        (ids, False),
        ([*ids, eos], True),
    ]
    assert [each.logps is not None for each in found] == [False, True, True, False]
    assert all(each.prompt_ids == prompt and each.mask == [1] * len(each.ids) for each in found)
    assert found[1].logps == sampled["logps"]


def test_traces_fit_the_limits_of_the_recipe(write, renderer):
    rows = [trace(0, 0), trace(0, 1, text="1" * 40 + "#1")]
    found, ledger = known(write(rows), renderer, max_length=20)
    assert len(found) == ledger.kept == ledger.dropped == 1
    found, ledger = known(write(rows), renderer, max_length=20, policy="cut")
    assert found[1].length == 20 and not found[1].finished and ledger.eos_lost == 1


def test_traces_are_found_by_what_the_problem_says_not_by_its_number(write, renderer):
    rows = [trace(0, 0), replace(trace(1, 0), reference="2"), replace(trace(1, 1), reference="3")]
    book = TraceBook(known(write(rows), renderer)[0])

    def of(text, reference=None):
        problem = Problem("other/77", text, reference)
        return [each.problem.reference for each in book.of(problem, renderer.prompt_ids(problem))]

    assert of("0+1=") == [None] and of("0+1=", "1") == [None]
    assert of("1+1=") == ["2", "3"] and of("1+1=", "2") == ["2"]
    assert of("5+1=") == [] and book.of(Problem("x", "0+1="), [1, 2]) == []
