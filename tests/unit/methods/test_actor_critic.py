"""PPO, DR-PO and RTO: estimates by hand, the adaptive KL, resets, and what each reduces to."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from posttrain.config.schema import ModelConfig
from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Origin, Problem
from posttrain.errors import ModelError
from posttrain.methods.base import Scored, Start
from posttrain.methods.companions import SCORER_LOGPS
from posttrain.methods.drpo import DRPO, DRPOConfig
from posttrain.methods.ppo import PPO, PPOConfig
from posttrain.methods.rto import RTO, RTOConfig
from posttrain.models.loading import load_policy
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.returns import discounted_returns
from posttrain.trainers.critic import weigh
from posttrain.trainers.run import train


def t(values):
    return torch.tensor(values, dtype=torch.float64)


OLD, REF = t([[0.2, 0.1, 0.5, 0.4]]).log(), t([[0.25, 0.2, 0.4, 0.5]]).log()
VALUES = t([[0.1, 0.2, 0.3, 0.5]])


def batch(mask, **further):
    return TokenBatch(
        mask=t(mask).bool(), old_logps=OLD, ref_logps=REF, old_values=VALUES, advantages=t([1.0]), **further
    )


def test_token_rewards_and_estimates_as_in_the_sheet():
    method = PPO(PPOConfig())
    everything = batch([[1, 1, 1, 1]])
    expected = t([[0.0111571776, 0.034657359, -0.0111571776, 1.0111571776]])
    torch.testing.assert_close(method.token_rewards(everything), expected, rtol=0, atol=1e-9)
    found = method.estimate(everything, method.token_rewards(everything))
    torch.testing.assert_close(
        found.advantages, t([[0.847765701, 0.7753773931, 0.6744421411, 0.5111571776]]), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(found.kl, (OLD - REF).sum(1))


def test_rewards_are_whitened_over_a_rollout_and_keep_their_mean_as_in_the_sheet():
    """0, 0, 1, 0 in two micro-batches; the third token of the second is nobody's."""
    found, seen = [], {}

    class Seen(PPO):
        def estimate(self, batch, rewards):
            found.append(rewards)
            return super().estimate(batch, rewards)

    def tensors(mask, advantage):
        shape = (1, len(mask))
        made = {name: torch.zeros(shape) for name in ("old_logps", "ref_logps", "old_values")}
        return made | {"mask": torch.tensor([mask]), "advantages": torch.tensor([advantage])}

    for whitens in (True, False):
        found.clear()
        method = Seen(PPOConfig(whiten_rewards=whitens, kl_coef=0.0))
        batches = [tensors([True, True], 0.0), tensors([True, True, False], 1.0)]
        weigh(method, batches, lambda name, total, n: seen.setdefault(name, total), main=True)
        rewards = [*found[0][0].tolist(), *found[1][0].tolist()]
        low, high = (-0.3273502538, 1.9820507614) if whitens else (0.0, 1.0)
        assert rewards == pytest.approx([low, low, low, high, 0.0])
    assert DRPO(DRPOConfig()).whitens_rewards and not PPO(PPOConfig()).whitens_rewards


def test_a_reset_changes_nothing_for_the_tokens_behind_it():
    method = PPO(PPOConfig())
    batches = batch([[1, 1, 1, 1]]), batch([[0, 0, 1, 1]])
    whole, rest = (method.estimate(each, method.token_rewards(each)) for each in batches)
    torch.testing.assert_close(rest.advantages, whole.advantages * t([[0, 0, 1, 1]]))
    torch.testing.assert_close(rest.returns, whole.returns * t([[0, 0, 1, 1]]))


def test_loss_as_in_the_sheet():
    """The sheet's reference numbers: whitened over all four, policy loss without the first two tokens."""
    advantages = t([[1.1526040376, 0.5794827303, -0.2196538324, -1.5124329355]])
    logps = OLD + t([[0.5, -0.5, 0.3, -0.05]])
    values, returns = t([[0.4, 0.1, 0.6, 0.9]]), t([[0, 0, 0.9744421411, 1.0111571776]])
    rows = batch([[0, 0, 1, 1]], logps=logps, values=values, returns=returns)
    found = PPO(PPOConfig()).loss(dataclasses.replace(rows, advantages=advantages))
    assert float(found["policy"].value / 2) == pytest.approx(0.8675861856, abs=1e-9)
    assert float(found["value"].value / 2) == pytest.approx(0.1 * 0.0804785336, abs=1e-9)


def kl_rows(reference=True):
    """Two tokens of the policy with pi / pi_old = 1.1 and 0.6, and one outside of the mask; (batch, log-probs)."""
    logps = t([[0.44, 0.3, 0.9]]).log().requires_grad_()
    rows = TokenBatch(
        mask=t([[1, 1, 0]]).bool(),
        logps=logps,
        old_logps=t([[0.4, 0.5, 0.1]]).log(),
        ref_logps=t([[0.25, 0.5, 0.1]]).log() if reference else None,
        advantages=t([[1.0, -1.0, 9.0]]),
        values=t([[0.4, 0.1, 9.0]]),
        old_values=t([[0.1, 0.2, 9.0]]),
        returns=t([[0.9, 0.0, 9.0]]),
    )
    return rows, logps


def test_a_kl_in_the_loss_by_hand():
    """Surrogate -1.1 and, clipped, 0.8; k3 = pi_ref / pi - log(pi_ref / pi) - 1 of pi_ref / pi = 25 / 44 and 5 / 3."""
    rows, logps = kl_rows()
    policy = PPO(PPOConfig(kl_in="loss", kl_coef=0.1)).loss(rows)["policy"]
    k3 = 0.1334956275 + 0.1558410429
    assert policy.value.item() == pytest.approx(-1.1 + 0.8 + 0.1 * k3, abs=1e-9) and float(policy.count) == 2
    assert float(policy.diagnostics["kl"][0]) == pytest.approx(k3, abs=1e-9)
    (grad,) = torch.autograd.grad(policy.value, logps)
    torch.testing.assert_close(grad, t([[-1.1 + 0.1 * (1 - 25 / 44), 0.1 * (1 - 5 / 3), 0.0]]))


def test_a_kl_in_the_loss_is_not_in_the_reward_too():
    rows = dataclasses.replace(kl_rows()[0], advantages=t([0.7]))
    assert PPO(PPOConfig(kl_in="loss", kl_coef=0.1)).token_rewards(rows).tolist() == [[0.0, 0.7, 0.0]]
    in_reward = PPO(PPOConfig(kl_coef=0.1)).token_rewards(rows)
    expected = t([[0.4 / 0.25, 0.5 / 0.5, 1.0]]).log() * -0.1
    torch.testing.assert_close(in_reward, expected + t([[0.0, 0.7, 0.0]]))


def test_a_kl_with_weight_zero_is_none_wherever_it_stands():
    """Loss, gradient, rewards and needs are those of PPO that has no reference at all."""
    rows, logps = kl_rows(reference=False)
    found = []
    for place in ("loss", "reward"):
        method = PPO(PPOConfig(kl_in=place, kl_coef=0.0))
        assert not method.needs.reference
        assert method.token_rewards(dataclasses.replace(rows, advantages=t([0.7]))).tolist() == [[0.0, 0.7, 0.0]]
        terms = method.loss(rows)
        assert terms["policy"].value.item() == pytest.approx(-1.1 + 0.8)
        found.append(torch.autograd.grad(terms["policy"].value, logps)[0])
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], t([[-1.1, 0.0, 0.0]]))


def test_without_a_value_and_with_lambda_one_it_is_reinforce_with_the_kl_in_the_reward():
    method = PPO(PPOConfig(lam=1.0))
    rows = dataclasses.replace(batch([[1, 1, 1, 1]]), old_values=torch.zeros(1, 4, dtype=torch.float64))
    expected = discounted_returns(method.token_rewards(rows), rows.mask)
    torch.testing.assert_close(method.estimate(rows, method.token_rewards(rows)).advantages, expected)


def test_whitening_is_over_all_micro_batches():
    method = PPO(PPOConfig(kl_coef=0.0))
    generator = torch.Generator().manual_seed(0)
    parts = [
        {
            "mask": torch.rand(2, 5, generator=generator) > 0.3,
            "old_values": torch.rand(2, 5, generator=generator),
            "advantages": torch.rand(2, generator=generator),
        }
        for _ in range(3)
    ]
    logged = {}
    weigh(method, parts, lambda name, total, n: logged.update({name: total / n}), main=True)
    mask, advantages = (torch.cat([part[name] for part in parts]) for name in ("mask", "advantages"))
    trained = advantages[mask > 0].double()
    assert float(trained.mean()) == pytest.approx(0, abs=1e-6)
    assert float(trained.var(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert set(logged) == {"critic/explained_variance"}


def test_adaptive_kl_moves_towards_the_target_and_is_state():
    method = PPO(PPOConfig(kl_coef=0.1, kl_target=2.0, kl_horizon=100))
    method.settle(2.2, 50)
    assert method.kl_coef == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    method.settle(0.0, 100)  # the error is bounded at a fifth
    assert method.kl_coef == pytest.approx(0.105 * 0.8)
    other = PPO(method.config)
    other.load_state_dict(method.state_dict())
    assert other.kl_coef == method.kl_coef
    fixed = PPO(PPOConfig())
    fixed.settle(99.0, 100)
    assert fixed.kl_coef == 0.05 and fixed.state_dict() == {}


def test_cut_completions_get_the_penalty_in_place_of_their_reward():
    scored = Scored(
        rewards=t([1.0, 0.5, 0.7]),
        outcomes=t([1.0, 0.0, 0.0]),
        known=torch.tensor([True, True, False]),
        groups=torch.tensor([0, 0, 0]),
        lengths=torch.tensor([3, 5, 5]),
        finished=torch.tensor([True, False, False]),
        max_new_tokens=5,
    )
    assert PPO(PPOConfig(missing_eos_reward=-1.0)).advantages(scored).tolist() == [1.0, -1.0, 0.0]
    assert PPO(PPOConfig()).advantages(scored).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (PPOConfig, {"kl_horizon": 5}, "without kl_target"),
        (PPOConfig, {"kl_target": 1.0, "kl_coef": 0.0}, "above 0"),
        (PPOConfig, {"kl_target": 1.0, "kl_in": "loss"}, "kl_in: reward"),
        (DRPOConfig, {"optimizer": "group", "lam": 0.9}, "lam: no effect with optimizer group"),
    ],
)
def test_parameters_without_effect_are_refused(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls(**given)


# ---------------------------------------------------------------------------------------------------------- resets

PROBLEM = Problem("p", "1+2=")
TRACES = [KnownTrace(PROBLEM, [5, 6], [7, 8, 9, 10, 2], [1] * 5, 1.0), KnownTrace(PROBLEM, [5, 6], [2], [1], 1.0)]


def starts(method, n=4000, traces=TRACES):
    return [method.start(PROBLEM, [5, 6], traces, np.random.default_rng([0, number])) for number in range(n)]


def test_reset_lengths_are_uniform_below_the_length():
    found = Counter(len(start.prefix) for start in starts(DRPO(DRPOConfig())))
    assert set(found) == {1, 2, 3, 4}
    assert all(abs(n / 4000 - 0.25) < 0.03 for n in found.values())


def test_half_of_the_starts_are_reset_and_their_mean_length_is_that_of_the_sheet():
    found = starts(DRPO(DRPOConfig(reset_share=0.5)))
    assert np.mean([len(start.prefix) for start in found]) == pytest.approx(1.25, abs=0.08)
    assert np.mean([start.origin == Origin.RESET for start in found]) == pytest.approx(0.5, abs=0.03)
    reset = next(start for start in found if start.prefix)
    assert reset.prefix == (7, 8, 9, 10)[: len(reset.prefix)]


def test_without_a_usable_trace_it_starts_at_the_prompt():
    assert starts(DRPO(DRPOConfig()), 5, TRACES[1:]) == [Start()] * 5


def test_without_resets_it_is_ppo_bit_for_bit(load, tmp_path, same):
    both = {"epochs": 2, "kl_coef": 0.1, "whiten_rewards": True}
    ppo = train(load({"name": "ppo", **both}, {"output": str(tmp_path / "ppo")}))
    drpo = train(load({"name": "drpo", "reset_share": 0.0, **both}, {"output": str(tmp_path / "drpo")}))
    assert same(ppo.model_dir, drpo.model_dir) and same(ppo.run_dir / "critic", drpo.run_dir / "critic")
    reset = train(load({"name": "drpo", **both}, {"output": str(tmp_path / "reset")}))
    assert not same(ppo.model_dir, reset.model_dir)


def test_without_resets_and_with_groups_it_is_grpo_bit_for_bit(load, tmp_path, same):
    grpo = train(load({"name": "grpo", "beta": 0.1}, {"output": str(tmp_path / "grpo")}))
    method = {"name": "drpo", "reset_share": 0.0, "optimizer": "group", "kl_coef": 0.1, "epochs": 1}
    drpo = train(load(method, {"output": str(tmp_path / "drpo")}))
    assert same(grpo.model_dir, drpo.model_dir)
    assert not (drpo.run_dir / "critic").exists()


# --------------------------------------------------------------------------------------------------------------- RTO


def rto_batch(score):
    logps = t([[-1.1, -1.8, -1.0]])
    return TokenBatch(
        mask=torch.ones(1, 3, dtype=torch.bool),
        old_logps=logps,
        ref_logps=t([[-1.4, -1.5, -3.5]]),
        further={SCORER_LOGPS: t([[-1, -2, -0.5]])},
        old_values=t([[0.2, 0.3, 0.4]]),
        advantages=t([score]),
    )


def test_rewards_of_rto_as_in_the_sheet():
    method = RTO(RTOConfig(dpo_model="dpo"))
    torch.testing.assert_close(method.token_rewards(rto_batch(12.0)), t([[0.017, -0.022, 10.025]]))
    found = method.token_rewards(rto_batch(0.8))
    torch.testing.assert_close(found, t([[0.017, -0.022, 0.825]]))
    estimates = method.estimate(rto_batch(0.8), found)
    torch.testing.assert_close(estimates.advantages, t([[0.5746625, 0.48175, 0.425]]))
    torch.testing.assert_close(estimates.returns, t([[0.7746625, 0.78175, 0.825]]))
    free = RTO(RTOConfig(dpo_model="dpo", dpo_reward_clip=None, kl_coef=0.0)).token_rewards(rto_batch(0.0))
    assert float(free.sum()) == pytest.approx(0.145)


def test_rto_normalises_a_completions_reward_before_it_is_bounded():
    method = RTO(RTOConfig(dpo_model="dpo", reward_mean=2.0, reward_std=0.5))
    torch.testing.assert_close(method.token_rewards(rto_batch(3.5))[0, 2], t(0.025 + 3.0))
    torch.testing.assert_close(method.token_rewards(rto_batch(-9.0))[0, 2], t(0.025 - 10.0))


def test_rto_with_the_reference_as_its_dpo_model_is_ppo_bit_for_bit(load, tiny_model, tmp_path, same):
    both = {"epochs": 2, "kl_coef": 0.1}
    ppo = train(load({"name": "ppo", **both}, {"output": str(tmp_path / "ppo")}))
    same_model = {"output": str(tmp_path / "rto"), "method.dpo_model": str(tiny_model)}
    rto = train(load({"name": "rto", "dpo_model": "GUIDE", **both}, same_model))
    assert same(ppo.model_dir, rto.model_dir)
    other = train(load({"name": "rto", "dpo_model": "GUIDE", **both}, {"output": str(tmp_path / "other")}))
    assert not same(ppo.model_dir, other.model_dir)


def test_a_guide_with_another_vocabulary_is_refused(load, tmp_path):
    init = {"hidden_size": 16, "layers": 1, "heads": 2, "tokenizer": {"type": "characters", "alphabet": "01"}}
    for part in load_policy(ModelConfig(init=init), seed=0):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="has another vocabulary than the policy"):
        train(load({"name": "rto", "dpo_model": "GUIDE"}, {"method.dpo_model": str(tmp_path / "other")}))
