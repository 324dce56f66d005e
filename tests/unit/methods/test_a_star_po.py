"""A*-PO against hand-computed values, and its fixed point."""

import json
import math

import pytest
import torch

from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Problem
from posttrain.methods.a_star_po import VALUE, AStarPO, AStarPOConfig
from posttrain.methods.base import Scored
from posttrain.objectives.optimal_advantage import advantage_regression, optimal_value
from posttrain.trainers.run import train

TWO_OF_EIGHT = [1.0, 0, 0, 1, 0, 0, 0, 0]


def t(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("beta", "value"),
    [(0.001, 0.998613705639), (0.05, 0.930685282253), (0.5, 0.477229296397), (5, 0.269365594200), (1e6, 0.25)],
)
def test_optimal_value(beta, value):
    assert optimal_value(TWO_OF_EIGHT, beta) == pytest.approx(value, abs=1e-7 if beta == 1e6 else 1e-11)


def test_the_estimate_is_too_low_for_few_samples():
    """A quarter right, eight samples, beta a half."""
    expected = sum(
        math.comb(8, k) * 0.25**k * 0.75 ** (8 - k) * optimal_value([1.0] * k + [0.0] * (8 - k), 0.5) for k in range(9)
    )
    assert expected == pytest.approx(0.438236532598, abs=1e-11)
    assert 0.5 * math.log(0.25 * math.exp(2) + 0.75) == pytest.approx(0.477229296397, abs=1e-11)


@pytest.mark.parametrize(
    ("reward", "ratio", "loss", "slope"),
    [
        (1.0, 0.0, 0.273289208546, -0.001045541407),
        (0.0, 0.0, 0.227747801339, 0.000954458593),
        (1.0, 40.0, 0.233067552258, -0.000965541407),
    ],
)
def test_the_regression(reward, ratio, loss, slope):
    """The paper's square and its slope are 2 beta times as large; a masked token is no part of the ratio."""
    logps = t([[ratio / 2, ratio / 2, 7.0]]).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    advantage = t([reward - optimal_value(TWO_OF_EIGHT, 0.5)])
    found = advantage_regression(logps, torch.zeros_like(logps), advantage, mask, 1e-3)
    assert 2e-3 * found.item() == pytest.approx(loss, abs=1e-11)
    found.sum().backward()
    assert (2e-3 * logps.grad[0]).tolist() == pytest.approx([slope, slope, 0], abs=1e-11)


@pytest.mark.parametrize("value", [0.0, 0.6])
def test_on_fresh_samples_the_value_is_a_baseline_only(value):
    """The expected gradient over three answers is that of minus reward plus beta KL, for any V."""
    logits, reference, rewards, beta = t([0.3, -0.2, 0.1]), t([0.5, 0.3, 0.2]).log(), t([1.0, 0, 0]), 0.1
    gradient = torch.zeros(3, dtype=torch.float64)
    for answer in range(3):
        z = logits.clone().requires_grad_()
        own = z.log_softmax(0)[answer].view(1, 1)
        mask = torch.ones(1, 1, dtype=torch.bool)
        loss = advantage_regression(own, reference[answer].view(1, 1), rewards[answer : answer + 1] - value, mask, beta)
        loss.sum().backward()
        gradient += logits.softmax(0)[answer] * z.grad
    expected = t([-0.050479087776, 0.019454788254, 0.031024299523]) / (2 * beta)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_the_fixed_point_is_the_reference_tilted_by_the_advantage():
    """With one beta V* normalises it; with two the masses do not sum to 1."""
    reference, rewards = t([0.5, 0.3, 0.2]), t([1.0, 0.0, 0.0])
    value = 0.5 * float((reference * (rewards / 0.5).exp()).sum().log())
    assert value == pytest.approx(0.716890415242, abs=1e-11)
    best = reference * ((rewards - value) / 0.5).exp()
    assert best.tolist() == pytest.approx([0.880797077978, 0.071521753213, 0.047681168809], abs=1e-11)
    losses = [
        advantage_regression(p.log().view(1, 1), q.log().view(1, 1), (r - value).view(1), torch.ones(1, 1).bool(), 0.5)
        for p, q, r in zip(best, reference, rewards, strict=True)
    ]
    assert float(torch.cat(losses).abs().max()) < 1e-20
    assert float((reference * ((rewards - value) / 0.1).exp()).sum()) == pytest.approx(8.482405405790, abs=1e-10)


def test_values_come_from_the_traces_of_the_problem():
    method = AStarPO(AStarPOConfig())
    problem = Problem("p/0", "q")
    traces = [KnownTrace(problem, [0], [1], [1], outcome) for outcome in [*TWO_OF_EIGHT, None]]
    assert method.start(problem, [0], traces, None).info[VALUE] == pytest.approx(0.477229296397, abs=1e-11)
    assert VALUE not in method.start(problem, [0], [], None).info
    wrong = traces[1:3]
    assert method.start(problem, [0], wrong, None).info[VALUE] == 0
    assert VALUE not in AStarPO(AStarPOConfig(skip_all_wrong=True)).start(problem, [0], wrong, None).info


def test_rows_without_a_value_are_left_out_and_shaping_is_not_read():
    known = torch.tensor([True, True, False])
    infos = ({VALUE: 0.25}, {}, {VALUE: 0.5})
    scored = Scored(t([9.0, 9, 0]), t([1.0, 1, 0]), known, torch.arange(3), torch.ones(3), known, 8, infos=infos)
    method = AStarPO(AStarPOConfig())
    assert method.advantages(scored).tolist() == [0.75, 0, 0]
    assert method.keep(scored).tolist() == [True, False, False]


def test_a_run_over_stored_samples(load, offline_inputs):
    """The stored file has problems of its own; prompts are drawn from the same ones."""
    traces, _ = offline_inputs
    prompts = {"task": "chain_sum", "levels": [2, 4], "size": 32}
    changes = {"data.prompts": prompts, "data.traces": {"path": str(traces), "keep": "all"}, "training.max_steps": 2}
    run = train(load({"name": "a_star_po"}, changes)).run_dir
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["a_star_po/log_ratio"] for row in rows if "loss" in row][0] == pytest.approx(0, abs=1e-6)
