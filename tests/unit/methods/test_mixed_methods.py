"""CHORD and RED: terms, weights and state by hand, in float64."""

import json

import pytest
import torch
from pydantic import ValidationError

from posttrain.data.sample import Origin
from posttrain.methods import METHODS
from posttrain.methods.base import Scored
from posttrain.objectives.batch import TokenBatch


def build(name, **parameters):
    return METHODS[name](METHODS[name].Config(**parameters))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


RATIOS, EXPERT = tensor([[1.3, 0.7, 0.9], [1.5, 5.0, 1.0]]), tensor([[0.9, 0.5, 0.1]])


def mixed_batch(ratios=RATIOS, accuracy=0.0):
    """Two rollouts with these ratios, advantages 1 and -1, and an expert row with these probabilities."""
    old = torch.full_like(ratios, -2.0)
    logps = torch.cat([old + ratios.log(), EXPERT.log()]).requires_grad_()
    return TokenBatch(
        mask=tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool(),
        logps=logps,
        old_logps=torch.cat([old, torch.zeros_like(EXPERT)]),
        advantages=tensor([1.0, -1.0, accuracy]),
        entropies=torch.full((3, 3), 0.5, dtype=torch.float64),
        expert=torch.tensor([False, False, True]),
    )


def total(method, batch):
    return sum(part.value / part.count for part in method.loss(batch).values())


def test_chord_adds_both_parts_each_over_its_own_tokens():
    method, batch = build("chord", mu_valley=0.3), mixed_batch()
    terms = method.loss(batch)
    assert {name: float(part.count) for name, part in terms.items()} == {"policy": 5, "expert": 3}
    assert float(terms["policy"].value.detach() / 5) == pytest.approx(0.7 * 0.34, abs=1e-10)
    assert float(total(method, batch).detach()) == pytest.approx(0.2770001900, abs=1e-10)
    on_policy = mixed_batch(torch.ones_like(RATIOS))
    assert float(method.loss(on_policy)["policy"].value.detach() / 5) == pytest.approx(0.7 * -0.2, abs=1e-10)


def test_chord_without_weight_is_grpo_and_with_all_of_it_sft():
    batch = mixed_batch()
    none, all_of_it = build("chord", mu_valley=0.0), build("chord", mu_valley=1.0, phi="none")
    grpo = build("grpo", aggregation="tokens", dual_clip=3.0)
    pairs = [
        (total(none, batch), total(grpo, batch.rollouts)),
        (total(all_of_it, batch), total(build("sft"), batch.experts)),
    ]
    for found, expected in pairs:
        grads = [torch.autograd.grad(value, batch.logps, retain_graph=True)[0] for value in (found, expected)]
        assert torch.equal(found, expected) and torch.equal(*grads)


def test_more_expert_rows_do_not_dilute_the_policy_term():
    method, batch = build("chord", mu_valley=0.3), mixed_batch()
    index = torch.tensor([0, 1, 2, 2, 2])
    torch.testing.assert_close(total(method, batch.rows(index)), total(method, batch), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["chord", "red"])
@pytest.mark.parametrize("kept", [[0, 1], [2]], ids=["rollouts only", "experts only"])
def test_a_batch_of_one_kind_is_valid(name, kept):
    method, batch = build(name), mixed_batch()
    terms = method.loss(batch.rows(torch.tensor(kept)))
    absent = "expert" if kept == [0, 1] else "policy"
    assert float(terms[absent].count) == float(terms[absent].value.detach()) == 0
    (grad,) = torch.autograd.grad(sum(part.value for part in terms.values()), batch.logps)
    others = [row for row in range(3) if row not in kept]
    assert grad[others].abs().max() == 0 and grad[kept].abs().max() > 0


def test_without_expert_marks_all_rows_are_rollouts():
    batch = mixed_batch()
    bare = TokenBatch(batch.mask, batch.logps, old_logps=batch.old_logps, advantages=batch.advantages)
    terms = build("chord").loss(bare)
    assert float(terms["policy"].count) == 8 and float(terms["expert"].count) == 0


def test_the_schedule_follows_the_steps():
    method = build("chord", mu_warmup_steps=4, mu_decay_steps=8, mu_peak=0.9, mu_valley=0.05)
    found = []
    for step in (0, 4, 8, 12):
        method.begin_step(step)
        terms = method.loss(mixed_batch())
        found.append(float(terms["expert"].diagnostics["chord/mu"][0]))
    assert found == pytest.approx([0, 0.9, 0.475, 0.05])
    assert method.state_dict() == {}  # mu is a function of the step


def test_a_peak_that_is_never_reached_is_refused():
    with pytest.raises(ValidationError, match="mu_peak has no effect"):
        build("chord", mu_peak=0.9)


def scored(outcomes, problems, known=None):
    n = len(outcomes)
    return Scored(
        rewards=tensor(outcomes),
        outcomes=tensor(outcomes),
        known=torch.ones(n, dtype=torch.bool) if known is None else torch.tensor(known),
        groups=torch.arange(n) // 2,
        lengths=torch.full((n,), 3),
        finished=torch.ones(n, dtype=torch.bool),
        max_new_tokens=5,
        kinds=(Origin.POLICY,) * n,
        problem_ids=tuple(problems),
        infos=({},) * n,
    )


def test_red_adds_up_to_the_value_by_hand():
    method = build("red", shift="none")
    method.changes = {"entropy": 1.0, "expert/entropy": 3.0}
    batch = mixed_batch()
    terms = method.loss(batch)
    nll = float(-EXPERT.log().mean())
    assert float(terms["expert"].value.detach() / 3) == pytest.approx(0.1 * 3 * nll, abs=1e-7)


def test_red_weighs_rows_by_the_accuracy_on_their_problems():
    method = build("red")
    assert method.expert_values(["a"]) == [0.5]
    method.observe(scored([1, 0, 1, 1, 0], ["a", "a", "b", "b", "c"], known=[True, True, True, True, False]))
    assert method.expert_values(["a", "b", "c", "d"]) == [0.5, 1.0, 0.75, 0.75]
    method.observe(scored([0, 0], ["b", "b"]))
    assert method.expert_values(["a", "b", "c"]) == [0.5, 0.0, 0.0]
    for accuracy, weight in ((0.0, 5.0), (0.5, 1.0), (1.0, 1.0)):
        total_weight, n = method.loss(mixed_batch(accuracy=accuracy))["expert"].diagnostics["expert/weight"]
        assert float(total_weight / n) == pytest.approx(weight)


def test_red_averages_the_changes_of_entropy():
    method = build("red", ema=0.9)
    assert method.ratio == 1.0
    for policy, expert in ((2.0, 1.0), (1.9, 1.4), (1.9, 1.4)):
        method.end_step({"entropy": policy, "expert/entropy": expert})
    assert method.changes["entropy"] == pytest.approx(0.9 * 0.1 * -0.1)
    assert method.changes["expert/entropy"] == pytest.approx(0.9 * 0.1 * 0.4)
    assert method.ratio == pytest.approx(4.0, rel=1e-5)
    method.end_step({"entropy": float("nan")})
    assert method.ratio == pytest.approx(4.0, rel=1e-5)
    again = build("red", ema=0.9)
    again.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert again.state_dict() == method.state_dict() and again.ratio == method.ratio
