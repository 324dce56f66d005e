"""Prefixes: exact ids, fractions, lines, and no prefix that gives the answer away."""

import dataclasses

import numpy as np
import pytest

from posttrain.config.schema import TaskSource
from posttrain.data.known_traces import KnownTrace
from posttrain.data.prefixes import CutRule, Cutter, answer_start, fixed_cuts
from posttrain.data.sample import Problem
from posttrain.data.tasks import generate_examples
from posttrain.errors import DataError

END = 0
TOKENS = CutRule()
LINES = CutRule(boundary="line", separator=";")


def characters(ids):
    """Text where a token is a character."""
    return "".join(chr(i) for i in ids if i != END)


def trace(text, reference="16", prompt="3+8+5="):
    problem = Problem("p/0", prompt, reference, where="rows.jsonl:1")
    ids = [*map(ord, text), END]
    return KnownTrace(problem, [1], ids, [1] * len(ids), outcome=1.0)


SUM = trace("3+8=11;11+5=16;#16")


def cut(fraction, rule=TOKENS, of=SUM, text=characters):
    return Cutter(of, text, rule).at(fraction)


@pytest.mark.parametrize(("fraction", "tokens"), [(0.40, 8), (0.55, 11), (0.80, 16), (0.29, 5)])
def test_token_cuts_are_the_floor_of_the_fraction(fraction, tokens):
    twenty = trace("a" * 20, reference=None)
    prefix = cut(fraction, CutRule(answer_pattern="$"), of=twenty)
    assert len(prefix.ids) == tokens and prefix.fraction == tokens / 20 and not prefix.guarded


def test_the_ids_are_the_traces_own():
    assert cut(0.5).ids == tuple(SUM.ids[:9])


def test_a_prefix_ends_before_the_answer_first_appears():
    prefix = cut(1.0)
    assert characters(prefix.ids) == "3+8=11;11+5=" and prefix.guarded
    assert cut(1.0, dataclasses.replace(LINES)).ids == cut(0.4, LINES).ids


@pytest.mark.parametrize("fraction", [0.39, 0.5, 0.9, 1.0])
def test_line_cuts_end_with_the_separator(fraction):
    assert characters(cut(fraction, LINES).ids) == "3+8=11;"


def test_no_place_to_cut_gives_none():
    assert cut(0.3, LINES) is None
    assert cut(0.01) is None
    assert cut(0.9, of=trace("16")) is None
    assert cut(0.9, CutRule(answer_pattern="boxed")) is None  # the answer is not found, so any cut might show it


def test_the_reference_must_be_a_word():
    assert answer_start("116 = 16", "16", None, "here") == 6
    assert answer_start("1.6", "1.6", None, "here") == 0
    assert answer_start("a\n#b", None, "^#", "here") == 2


def test_without_reference_and_pattern_it_is_refused():
    with pytest.raises(DataError, match="no reference") as caught:
        Cutter(trace("1", reference=None), characters, CutRule())
    assert caught.value.where == "rows.jsonl:1" and "answer_pattern" in caught.value.hint


def test_tokens_that_reach_over_the_end_of_a_line_are_not_cut():
    pieces = {1: "1+1", 2: "=2;2+", 3: "1=3;", 4: "3+4=7", 5: ";", 6: "#7", END: ""}

    def text(ids):
        return "".join(pieces[i] for i in ids)

    of = KnownTrace(Problem("p/0", "p", "7"), [9], [1, 2, 3, 4, 5, 6, END], [1] * 7)
    assert cut(0.99, LINES, of, text).ids == (1, 2, 3)
    assert cut(0.40, LINES, of, text) is None  # the only line that ends there ends within a token


def test_fixed_cuts_are_the_same_again_and_differ_between_seeds():
    long = trace(";".join(f"{i}+{i}={2 * i}" for i in range(1, 30)) + ";#999", reference="999")
    one = fixed_cuts([long], characters, CutRule(), 3, seed=0)
    assert one == fixed_cuts([long], characters, CutRule(), 3, seed=0)
    assert [p.ids for p in one] != [p.ids for p in fixed_cuts([long], characters, CutRule(), 3, seed=1)]
    assert len({p.ids for p in one}) == len(one) == 3
    assert all(0.4 <= p.drawn <= 0.8 for p in one)
    assert fixed_cuts([], characters, CutRule(), 3, seed=0) == []


def test_repeated_cuts_are_given_once():
    assert [characters(p.ids) for p in fixed_cuts([SUM], characters, LINES, 5, seed=0)] == ["3+8=11;"]


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "variable_chain"])
def test_no_prefix_of_a_generated_trace_shows_its_answer(task):
    source = TaskSource(task=task, levels=[4], size=40)
    rng = np.random.default_rng(0)
    cuts = 0
    for example in generate_examples(source, "t"):
        ids = [*map(ord, example.completion), END]
        of = KnownTrace(example.problem, [1], ids, [1] * len(ids))
        cutter = Cutter(of, characters, CutRule(0.0, 1.0))
        shown = answer_start(example.completion, example.problem.reference, None, "")
        for prefix in filter(None, (cutter.draw(rng) for _ in range(20))):
            cuts += 1
            assert len(characters(prefix.ids)) <= shown
            assert prefix.ids == tuple(of.ids[: len(prefix.ids)])
    assert cuts > 100
