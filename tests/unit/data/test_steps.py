"""Steps of a completion by a delimiter, whole tokens each."""

import pytest

from posttrain.data.known_traces import KnownTrace
from posttrain.data.offline_rows import offline_rows
from posttrain.data.sample import Problem
from posttrain.data.steps import StepCutter

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
    one, other = offline_rows([whole, holes], lambda trace: 2 * trace.outcome, ";", Reader())
    assert (one.reward, one.steps, one.length) == (2.0, [0, 0, 0, 1, 2, 2], 6)
    assert other.sample.loss_mask == [0, 0, 1, 0, 1, 1] and other.steps == [0, 0, 0, 0, 1, 2]
    assert offline_rows([whole], lambda trace: 1.0, None, Reader())[0].steps is None
