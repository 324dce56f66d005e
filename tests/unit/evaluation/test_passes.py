"""Which problems of a pass are still to be done."""

import pytest

from posttrain.evaluation.journal import Chunk
from posttrain.evaluation.passes import missing, outcome_of
from posttrain.verifiers.verdict import Status


def chunk(start: int, size: int) -> Chunk:
    return Chunk("k", start, [[Status.CORRECT]] * size, [[str(start)]] * size, 1, 2, 3, 0.5)


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ([], [(0, 4), (4, 8), (8, 10)]),
        ([(0, 4)], [(4, 8), (8, 10)]),
        ([(4, 4)], [(0, 4), (8, 10)]),  # another worker was faster
        ([(3, 2), (9, 1)], [(0, 3), (5, 9)]),  # with other sizes
        ([(0, 10)], []),
    ],
)
def test_gaps_are_filled(done, expected):
    parts = missing(10, [chunk(start, size) for start, size in done], 4)
    assert [(part.start, part.stop) for part in parts] == expected


def test_chunks_are_put_together_in_order():
    found = outcome_of([chunk(4, 1), chunk(0, 4)])
    assert found.answers == [["0"]] * 4 + [["4"]] and found.counts.completions == 5
    assert found.counts.truncated == 2 and found.counts.new_tokens == 6 and found.seconds == 1.0
