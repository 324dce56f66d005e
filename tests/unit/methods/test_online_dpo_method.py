"""online_dpo: pairs of a step's completions, what the shell divides by, and what is refused."""

import json

import pytest
import torch
from pydantic import ValidationError

from posttrain.data.sample import Origin, Problem
from posttrain.errors import NeedsError
from posttrain.methods.base import Scored
from posttrain.methods.companions import Writer
from posttrain.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from posttrain.methods.xpo import XPO, XPOConfig
from posttrain.objectives.batch import TokenBatch
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.trainers.run import train
from posttrain.trainers.writer import WritingModel


def method(**parameters):
    return OnlineDPO(OnlineDPOConfig(**parameters))


def scored(rewards=(1.0, 0.0, 0.0, 1.0, 0.5, 0.5), groups=(0, 0, 0, 1, 1, 1), finished=None, lengths=None, kinds=()):
    n = len(rewards)
    return Scored(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        outcomes=torch.tensor(rewards, dtype=torch.float64),
        known=torch.ones(n, dtype=torch.bool),
        groups=torch.tensor(groups),
        lengths=torch.tensor(lengths or [2] * n),
        finished=torch.tensor(finished or [True] * n),
        max_new_tokens=4,
        kinds=kinds,
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


def two(own_wins):
    """One completion of the policy and one of the reference, with margin 1.5 if the chosen one is the policy's."""
    rewards = (1.0, 0.0) if own_wins else (0.0, 1.0)
    rows = scored(rewards, (0, 0), kinds=(Origin.POLICY, Origin.GUIDED))
    better, worse = (0, 1) if own_wins else (1, 0)
    logps, ref = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    logps[better], logps[worse], ref[better], ref[worse] = -10.0, -12.0, -11.0, -11.5
    return rows, logps, ref


@pytest.mark.parametrize(
    ("own_wins", "alpha", "of_reference"),
    [(True, 0.0, 0.046257015466), (True, 0.01, 0.056257015466), (False, 0.01, -0.036257015466)],
    ids=["no bonus", "the reference's loses", "the reference's wins"],
)
def test_the_bonus_of_xpo_is_added_to_what_is_minimised(own_wins, alpha, of_reference):
    rows, logps, ref = two(own_wins)
    made = XPO(XPOConfig(alpha=alpha)).weigh(rows, logps, ref)
    slopes = -made.advantages / 2  # the shell divides by the two trained completions
    assert slopes.tolist()[1] == pytest.approx(of_reference, abs=1e-11)
    assert slopes.tolist()[0] == pytest.approx(-0.046257015466 if own_wins else 0.046257015466, abs=1e-11)
    loss = made.metrics["pairs/loss"][0] + alpha * made.metrics["xpo/reference_logps"][0]
    assert loss == pytest.approx(0.620957047790 + alpha * (-12.0 if own_wins else -10.0), abs=1e-11)


def test_xpo_pairs_the_policys_completions_with_the_references_only():
    kinds = (Origin.POLICY, Origin.POLICY, Origin.GUIDED, Origin.GUIDED)
    rows, one = scored((1.0, 0.0, 0.0, 1.0), (0,) * 4, kinds=kinds), XPO(XPOConfig())
    assert one.pairs(rows).tolist() == [[0, 2], [3, 1]]
    tied = scored((1.0, 1.0, 1.0, 1.0), (0,) * 4, kinds=kinds)
    assert not len(one.pairs(tied)) and one.keep(tied).tolist() == [False, False, True, True]
    made = one.weigh(tied, torch.full((4,), -3.0), torch.zeros(4))
    assert made.advantages.tolist() == pytest.approx([0.0, 0.0, -1e-5, -1e-5])


class Reference:
    """An engine that writes 40s up to each prompt's limit."""

    def generate(self, prompts, sampling, limits):
        self.asked = prompts
        return [[Completion([40] * limit, [-9.0] * limit, "length", 0)] for limit in limits]

    def read_tokens(self, prompts, sampling):
        return sum(map(len, prompts))


def test_the_writer_leaves_the_policys_share_and_writes_the_rest_from_the_prompt():
    engine, start = Reference(), XPO(XPOConfig(own=1)).start(None, [], [], None)
    begun = [[Completion([7 + i, 2], [-1.0, -1.0], "stop", 5) for i in range(3)]] * 2
    sampling = Sampling(n=3, max_new_tokens=4)
    ended, spent = WritingModel(engine, Writer(None, 1.0), seed=0).end(
        0, [Problem(str(i), "", "", {}) for i in range(2)], [start] * 2, [[1], [1, 2]], begun, sampling, [4, 3]
    )
    assert [[one.guided for one in group] for group in ended] == [[0, 4, 4], [0, 3, 3]]
    assert [group[0].completion for group in ended] == [group[0] for group in begun]
    assert all(one.completion.ids == [40] * one.guided for group in ended for one in group[1:])
    assert engine.asked == [[1], [1], [1, 2], [1, 2]] and spent.sampled == 14


def test_the_reference_writes_its_share_and_is_scored_as_such(load, tmp_path):
    """While the policy is its start, both writers' completions have log-ratio 0, and each group has both kinds."""
    changes = {"rollouts.samples_per_prompt": 4, "training.max_steps": 1}
    run = train(load({"name": "xpo", "own": 1}, changes)).run_dir
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["kl_sequence"] == pytest.approx(0.0, abs=1e-4)
    assert {"reward/policy", "reward/guided", "guided_length"} <= set(row)
