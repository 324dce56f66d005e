"""Steps of a completion by a delimiter, whole tokens each."""

import pytest

from posttrain.data.known_traces import KnownTrace
from posttrain.data.offline_rows import offline_rows
from posttrain.data.sample import Problem
from posttrain.data.steps import StepCutter, StepRule
from posttrain.data.traces import check_step_ends
from posttrain.errors import DataError

WORDS = {0: "", 1: "a", 2: "b;", 3: ";", 4: "c;d", 5: "\n"}


def text(ids):
    return "".join(WORDS[i] for i in ids)


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        ([1, 1, 0], [0, 0, 0]),
        ([1, 3, 1, 0], [0, 0, 1, 1]),
        ([2, 2, 0], [0, 1, 2]),
        ([2, 3, 3, 1], [0, 0, 0, 1]),  # a run of delimiters ends one step
        ([4, 1], [0, 1]),  # a token that holds the end of a delimiter ends the step
        ([], []),
    ],
)
def test_numbers(ids, numbers):
    assert StepCutter(text, ";").numbers(ids) == numbers


def test_tokens_that_read_differently_on_their_own():
    def merged(ids):  # a decoder that drops the space at the beginning of a text
        return "".join([" x;", " y", " z"][i] for i in ids).lstrip()

    assert StepCutter(merged, ";").numbers([0, 1, 0, 2]) == [0, 1, 1, 2]


class Reader:
    text = staticmethod(text)


def test_rows_carry_rewards_and_gapless_steps():
    problem = Problem("p", "?")
    whole = KnownTrace(problem, [1, 1], [2, 2, 1, 0], [1] * 4, 1.0)
    holes = KnownTrace(problem, [1, 1], [2, 2, 2, 1], [1, 0, 1, 1], 0.0)  # the second step is somebody else's turn
    one, other = offline_rows([whole, holes], lambda trace: 2 * trace.outcome, StepRule(";"), Reader())
    assert (one.reward, one.steps, one.length) == (2.0, [0, 0, 0, 1, 2, 2], 6)
    assert other.sample.loss_mask == [0, 0, 1, 0, 1, 1] and other.steps == [0, 0, 0, 0, 1, 2]
    assert offline_rows([whole], lambda trace: 1.0, None, Reader())[0].steps is None


@pytest.mark.parametrize(
    ("ends", "numbers"),
    [([1, 3], [0, 1, 2]), ([2], [0, 0, 1]), ([], [0, 0, 0]), ([4], [0, 0, 0]), ([1, 99], [0, 1, 1])],
    ids=["each", "inside of a token", "none", "the last", "behind a cut"],
)
def test_steps_may_end_where_the_data_say(ends, numbers):
    rule, problem = StepRule(None), Problem("p", "?")
    trace = KnownTrace(problem, [1], [1, 2, 1], [1] * 3, 1.0, step_ends=ends)
    assert offline_rows([trace], lambda trace: 1.0, rule, Reader())[0].steps == [0, *numbers]


def test_a_trace_that_does_not_say_where_its_steps_end_is_refused():
    trace = KnownTrace(Problem("p", "?", where="traces.jsonl:3"), [1], [1, 2], [1, 1], 1.0)
    with pytest.raises(DataError, match="without `step_ends`") as caught:
        offline_rows([trace], lambda trace: 1.0, StepRule(None), Reader())
    assert caught.value.where == "traces.jsonl:3"


@pytest.mark.parametrize("ends", ["1,2", [2, 2], [0, 1], [1, 9], [1.0], [True]], ids=str)
def test_ends_that_are_none_are_refused(ends):
    with pytest.raises(DataError, match="for a text of 3 characters"):
        check_step_ends(ends, "a;b", "traces.jsonl:1")
    assert check_step_ends([2, 3], "a;b", "traces.jsonl:1") == [2, 3]
