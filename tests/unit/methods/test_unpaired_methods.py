"""kto and bco: what their reference points are made of, loss sums by hand, and what they refuse."""

import pytest
import torch

from posttrain.data.preferences import usable
from posttrain.data.sample import Problem, Unpaired
from posttrain.errors import DataError
from posttrain.methods import METHODS
from posttrain.objectives.batch import PreferenceBatch, TokenBatch

RATIOS, LABELS = (1.5, -0.5, 0.8), (1.0, 1.0, 0.0)


def build(name, **parameters):
    return METHODS[name](METHODS[name].Config(**parameters))


def batch(ratios=RATIOS, labels=LABELS):
    """Completions of two tokens after one of the prompt, whose log-ratios to a reference at -3 sum to these."""
    mask = torch.tensor([[False, True, True]] * len(ratios))
    ref = torch.where(mask, -3.0, 0.0).double()
    logps = ref + torch.where(mask, torch.tensor(ratios, dtype=torch.float64).unsqueeze(1) / 2, 0.0)
    tokens = TokenBatch(mask=mask, logps=logps, ref_logps=ref)
    return PreferenceBatch({"completion": tokens}, {"label": torch.tensor(labels)})


def means(part):
    return {name: float(value / n) for name, (value, n) in part.diagnostics.items()}


def row(number, label, completion="3"):
    return Unpaired(Problem(f"unpaired/{number}", "1+2=", where=f"votes.jsonl:{number + 1}"), completion, label)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_needs(name):
    needs = build(name).needs
    assert needs.data == ("unpaired",) and needs.reference and not needs.rollouts and not needs.samples


def test_kto_holds_rows_against_the_kl_of_the_step():
    method = build("kto", undesirable_weight=1.33)
    method.observe(0.3 - 0.1 + 0.2, 3)
    (part,) = method.loss(batch()).values()
    assert float(part.value) == pytest.approx(1.668872917431, abs=1e-11)
    assert (part.unit, int(part.count)) == ("sequences", 3)
    found = means(part)
    assert found["unpaired/reference_point"] == pytest.approx(0.1 * 0.4 / 3)
    assert found["unpaired/reward_good"] == pytest.approx(0.05)
    assert found["unpaired/reward_bad"] == pytest.approx(0.08)
    assert found["unpaired/accuracy"] == pytest.approx(1 / 3)  # the first alone is on its side
    assert found["unpaired/good_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("total", "n"), [(-4.0, 5), (0.0, 0)], ids=["below 0", "no partner"])
def test_a_kl_is_never_negative_and_0_where_nobody_estimates_it(total, n):
    method = build("kto")
    method.observe(2.0, 4)
    assert method.kl == 0.5
    method.observe(total, n)
    assert method.kl == 0.0


def test_clamping_and_averaging_of_the_kl_do_not_commute():
    """Why the step has one: micro-batches of 1 and 2 mismatched rows would have other ones."""
    whole, first, second = (build("kto") for _ in range(3))
    whole.observe(-0.4 + 0.6 + 0.6, 3)
    first.observe(-0.4, 1)
    second.observe(1.2, 2)
    assert whole.kl == pytest.approx(0.8 / 3)
    assert (first.kl + 2 * second.kl) / 3 == pytest.approx(0.4)


def test_the_mean_reward_of_bco_is_of_all_rows_so_far_and_survives():
    method = build("bco")
    method.observe(sum(RATIOS), 3)
    assert method.reference_point == pytest.approx(0.06)
    (part,) = method.loss(batch()).values()
    assert float(part.value) == pytest.approx(0.649159339026 + 0.749658918622 + 0.703197179727, abs=1e-11)
    method.observe(-9.0, 1)
    assert method.reference_point == pytest.approx(0.1 * (1.8 - 9.0) / 4)
    resumed = build("bco")
    resumed.load_state_dict(method.state_dict())
    assert resumed.reference_point == method.reference_point
    resumed.observe(0.0, 4)
    assert resumed.reference_point == pytest.approx(0.1 * (1.8 - 9.0) / 8)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_rows_of_one_label_are_refused(name):
    method = build(name)
    both = [row(0, True), row(1, False)]
    assert method.prepare(both) == both
    with pytest.raises(DataError, match="all 2 rows are labelled false") as caught:
        method.prepare([row(0, False), row(1, False)])
    assert caught.value.where == "votes.jsonl:1" and "data.unpaired.label" in caught.value.hint


def test_an_empty_completion_says_nothing_and_equal_ones_may_stand():
    rows = [row(0, True), row(1, False), row(2, True, "  ")]
    kept, left_out = usable(rows)
    assert kept == rows[:2] and (left_out.identical, left_out.empty) == (0, 1)
