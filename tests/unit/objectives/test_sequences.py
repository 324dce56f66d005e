"""Sums over the completion's tokens, by hand, in float64."""

import pytest
import torch

from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.objectives.sequences import lengths, log_ratios, mean_logps, sequence_logps, sequence_ref_logps

LOGITS = torch.tensor([[0, 1, 2], [1, 0, 0], [0, 0, 3], [2, 2, 0]], dtype=torch.float64)
IDS = torch.tensor([2, 0, 2, 1])  # the tokens that the four positions predict


def batch(mask):
    logps = LOGITS.log_softmax(-1).gather(1, IDS.unsqueeze(1)).T
    return TokenBatch(mask=torch.tensor([mask]).bool(), logps=logps, ref_logps=torch.full_like(logps, -0.5))


def test_token_logps():
    expected = [-0.407605964444, -0.551444713932, -0.094922956421, -0.758623675680]
    assert batch([1, 1, 1, 1]).logps[0].tolist() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(
    ("mask", "total"), [([0, 1, 1, 0], -0.646367670353), ([0, 0, 1, 1], -0.853546632100), ([0, 0, 0, 0], 0.0)]
)
def test_sums_follow_the_mask(mask, total):
    tokens, n = batch(mask), sum(mask)
    assert float(sequence_logps(tokens)) == pytest.approx(total, abs=1e-11)
    assert float(lengths(tokens)) == n
    assert float(mean_logps(tokens)) == pytest.approx(total / max(n, 1), abs=1e-11)
    assert float(sequence_ref_logps(tokens)) == -0.5 * n
    assert float(log_ratios(tokens)) == pytest.approx(total + 0.5 * n, abs=1e-11)


def test_what_is_outside_the_mask_is_not_read():
    tokens = batch([0, 1, 1, 0])
    tokens.logps[0, 0] = float("nan")
    assert float(sequence_logps(tokens)) == pytest.approx(-0.646367670353, abs=1e-11)


def test_rows_are_usable_if_all_their_responses_have_tokens():
    def tokens(*rows):
        return TokenBatch(mask=torch.tensor(rows).bool())

    both = PreferenceBatch({"chosen": tokens([0, 1], [0, 1], [0, 0]), "rejected": tokens([1], [0], [1])})
    assert both.usable.tolist() == [True, False, False]
    assert PreferenceBatch({}, {}, tokens([1])).usable.tolist() == []
