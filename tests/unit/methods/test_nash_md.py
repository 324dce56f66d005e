"""Nash-MD by hand in float64: both forms of its KL, who meets whom, and what the opponent draws from."""

import json
import math

import pytest
import torch

from posttrain.config.preflight import check_needs
from posttrain.config.schema import ModelConfig
from posttrain.data.sample import Origin
from posttrain.errors import NeedsError
from posttrain.methods.base import Scored
from posttrain.methods.nash_md import NashMD, NashMDConfig
from posttrain.models.loading import load_policy
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.contrast import win_shares
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.run import train

S, REF = [-0.5, -1.2, -0.3], [-0.6, -1.0, -0.5]


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def rows(rewards, kinds, groups=None, known=None):
    n = len(rewards)
    of = {"P": Origin.POLICY, "G": Origin.GUIDED}
    return Scored(
        rewards=t(rewards),
        outcomes=t(rewards),
        known=torch.tensor(known or [True] * n),
        groups=torch.tensor(groups or [0] * n),
        lengths=torch.full((n,), 3),
        finished=torch.ones(n, dtype=torch.bool),
        max_new_tokens=3,
        kinds=tuple(of[kind] for kind in kinds),
    )


@pytest.mark.parametrize(
    ("kl", "slopes", "value"),
    [("token", [-0.29, -0.32, -0.28], 0.613), ("sequence", [-0.29] * 3, 0.58)],
)
def test_value_and_gradient_by_hand(kl, slopes, value):
    """Of three tokens at a preference of 0.8 and beta 0.1; `token` are the values of TRL's former trainer."""
    method = NashMD(NashMDConfig(kl=kl, beta=0.1))
    two = rows([math.log(4), 0.0], "PG")
    logps, ref = t([sum(S), 0.0]), t([sum(REF), 0.0])
    made = method.weigh(two, logps, ref)
    assert made.metrics["nash_md/preference"] == (pytest.approx(0.8), 1)
    leaf = t([S]).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    part = method.loss(TokenBatch(mask, leaf, ref_logps=t([REF]), advantages=made.advantages[:1]))["policy"]
    part.value.backward()
    torch.testing.assert_close(leaf.grad, t([slopes]))
    assert part.value.item() == pytest.approx(value) and (part.unit, int(part.count)) == ("sequences", 1)


def test_each_meets_the_opponents_completions_of_its_prompt():
    kinds = "PPGGPG"
    wins, own = win_shares(
        t([1, 0, 0, 1, 1, 0]),
        torch.tensor([0, 0, 0, 0, 1, 1]),
        *(torch.tensor([kind == one for kind in kinds]) for one in "PG"),
        "better",
    )
    assert wins.tolist() == [0.75, 0.25, 0, 0, 1, 0]
    assert own.tolist() == [True, True, False, False, True, False]


def test_what_has_no_opponent_is_left_out():
    method = NashMD(NashMDConfig(preference="better"))
    alone = rows([1, 0, 1, 1], "PGPG", [0, 0, 1, 1], [True, True, True, False])
    assert method.keep(alone).tolist() == [True, False, False, False]
    assert method.advantages(alone).tolist() == [0.5, 0.0, 0.0, 0.0]


def test_the_opponent_draws_from_mixed_logits():
    """The log-probs of what it drew are those of one softmax over both models' logits at each token."""
    init = {"hidden_size": 16, "layers": 2, "heads": 2, "max_length": 64, "tokenizer": {"type": "characters"}}
    policy, tokenizer = load_policy(ModelConfig(init=init), seed=0)
    start, _ = load_policy(ModelConfig(init=init), seed=1)
    engine = TransformersEngine(start, stop_ids=[tokenizer.eos_token_id], pad_id=0, max_batch=4)
    prompts, sampling = [[5, 6, 7], [8, 9]], Sampling(n=2, max_new_tokens=6)
    plain = engine.generate(prompts, sampling)
    with engine.mixed(policy, 0.7):
        mixed = engine.generate(prompts, sampling)
    assert engine.generate(prompts, sampling) == plain != mixed
    for prompt, group in zip(prompts, mixed, strict=True):
        for one in group:
            ids = torch.tensor([[*prompt, *one.ids]])
            with torch.no_grad():
                logits = 0.3 * start(ids).logits[0] + 0.7 * policy(ids).logits[0]
            found = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(one.logps), found, rtol=1e-4, atol=1e-5)


def test_an_engine_that_cannot_draw_by_two_models_is_refused(load):
    recipe = load({"name": "nash_md"}, {"rollouts.engine": "vllm"})
    with pytest.raises(NeedsError, match="two models at once"):
        check_needs(recipe, NashMD(recipe.method).needs, "nash_md")


def test_while_policy_and_start_are_one_both_writers_are_alike(load):
    run = train(load({"name": "nash_md", "own": 2}, {"training.max_steps": 1})).run_dir
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["kl_sequence"] == pytest.approx(0.0, abs=1e-4)
    assert 0 < row["nash_md/preference"] < 1
    assert {"reward/policy", "reward/guided", "guided_length"} <= set(row)
