"""online_dpo: pairs of a step's completions, what the shell divides by, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from posttrain.errors import NeedsError
from posttrain.methods.base import Scored
from posttrain.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from posttrain.objectives.batch import TokenBatch
from posttrain.trainers.run import train


def method(**parameters):
    return OnlineDPO(OnlineDPOConfig(**parameters))


def scored(rewards=(1.0, 0.0, 0.0, 1.0, 0.5, 0.5), groups=(0, 0, 0, 1, 1, 1), finished=None, lengths=None):
    n = len(rewards)
    return Scored(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        outcomes=torch.tensor(rewards, dtype=torch.float64),
        known=torch.ones(n, dtype=torch.bool),
        groups=torch.tensor(groups),
        lengths=torch.tensor(lengths or [2] * n),
        finished=torch.tensor(finished or [True] * n),
        max_new_tokens=4,
    )


def test_the_loss_of_the_step_is_the_mean_over_prompts_of_dpos():
    """Advantages times log-probs over the number of trained completions, as the shell divides, have its gradient."""
    rows = scored()
    logps = torch.tensor([-10.0, -12.0, -3.0, -1.0, -2.0, -9.0], dtype=torch.float64)
    ref = torch.tensor([-11.0, -11.5, -3.0, -1.5, -2.0, -9.0], dtype=torch.float64)
    one = method()
    assert one.pairs(rows).tolist() == [[0, 1], [3, 4]]
    made = one.weigh(rows, logps, ref)
    # Margins 1.5 and 0.5 at beta 0.1; each prompt weighs a half, four of six completions are trained.
    first = 0.1 / (1 + torch.tensor(0.15, dtype=torch.float64).exp())
    second = 0.1 / (1 + torch.tensor(0.05, dtype=torch.float64).exp())
    expected = torch.stack([first, -first, 0 * first, second, -second, 0 * first]) * 4 / 2
    torch.testing.assert_close(made.advantages, expected)
    assert one.keep(rows).tolist() == [True, True, False, True, True, False]
    means = {name: total / n for name, (total, n) in made.metrics.items()}
    softplus = torch.nn.functional.softplus(-torch.tensor([0.15, 0.05], dtype=torch.float64))
    assert means["pairs/loss"] == pytest.approx(float(softplus.mean()))
    assert means["pairs/margin"] == pytest.approx(0.1) and means["pairs/accuracy"] == 1.0


def test_the_surrogate_sums_whole_completions():
    mask = torch.tensor([[False, True, True], [False, True, False], [False, False, False]])
    logps = torch.where(mask, -1.5, 0.0).double().requires_grad_()
    batch = TokenBatch(mask=mask, logps=logps, ref_logps=logps.detach(), advantages=torch.tensor([0.5, -0.25, 9.0]))
    (part,) = method().loss(batch).values()
    assert float(part.value.detach()) == pytest.approx(0.5 * 3.0 - 0.25 * 1.5)
    assert (part.unit, int(part.count)) == ("sequences", 2)


@pytest.mark.parametrize(
    ("parameters", "changes", "pairs"),
    [
        ({"pairs": "all"}, {}, 4),
        ({"margin": 0.75}, {}, 1),
        ({"mask_truncated": True}, {"finished": [True, False, False, True, True, True]}, 1),
        ({}, {"lengths": [0, 2, 2, 2, 2, 2]}, 1),
        ({}, {"rewards": [0.5] * 6}, 0),
    ],
    ids=["all", "margin", "truncated", "empty completion", "ties"],
)
def test_pairs(parameters, changes, pairs):
    one, rows = method(**parameters), scored(**changes)
    assert len(one.pairs(rows)) == pairs
    assert int(one.keep(rows).sum()) == len(one.pairs(rows).unique())
    assert bool(one.weigh(rows, *[torch.zeros(6)] * 2).advantages.any()) == bool(pairs)


@pytest.mark.parametrize(
    ("parameters", "word"),
    [({"loss": "ipo", "beta": 0.2}, "set tau"), ({"tau": 0.2}, "set beta"), ({"margin": -1}, "0")],
)
def test_parameters_without_effect_are_refused(parameters, word):
    with pytest.raises(ValidationError, match=word):
        OnlineDPOConfig(**parameters)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rollouts.samples_per_prompt": 1}, "samples_per_prompt"),
        ({"rollouts.importance_cap": 2.0, "rollouts.engine": "vllm"}, "importance_cap"),
    ],
)
def test_runs_without_pairs_or_with_weights_that_it_cannot_carry_are_refused(load, changes, key):
    with pytest.raises(NeedsError) as caught:
        train(load({"name": "online_dpo"}, changes))
    assert key in caught.value.where
