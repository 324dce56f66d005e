"""The loss contract, swept over every registered method: sums with a unit, divided once by global counts.

The checks are those of `posttrain contract`. A row of VARIANTS per set of parameters that changes the formula; every
method must have one.
"""

import dataclasses
import math

import pytest
import torch

from posttrain.contract.batches import ROWS, batch_of, each, logits_of, shifted
from posttrain.contract.loss import CHECKS, Broken, gradient
from posttrain.methods import METHODS
from posttrain.methods.dpo import DPO
from posttrain.methods.grpo import GRPO
from posttrain.methods.ppo import PPO
from posttrain.methods.sft import SFT
from posttrain.objectives import policy_gradient
from posttrain.objectives.aggregation import aggregate
from posttrain.objectives.batch import LossSum, PreferenceBatch
from posttrain.tracking.metrics import require

VARIANTS = {
    "sft": [{}, {"aggregation": "sequences"}],
    "grpo": [
        {},
        {"beta": 0.1},
        {"beta": 0.1, "kl_importance": False, "dual_clip": 3.0},
        {"scale_rewards": "none", "aggregation": "constant"},
        {"aggregation": "tokens", "epsilon_high": 0.28, "mask_truncated": True, "overlong_cache": 2},
        {"baseline": "leave_one_out", "scale_rewards": "none", "ratio": "trajectory"},
        {"ratio": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"surrogate": "cispo", "aggregation": "tokens"},
        {"updates_per_rollout": 2},
        {"surrogate": "sapo", "scale_rewards": "mean"},
        {"scale_rewards": "tokens", "aggregation": "tokens"},
        {
            "beta": 0.1,
            "terms": {
                "outcome": {"weight": 0.7},
                "teacher": {"path": "teacher", "clip": 0.2, "rows": "wrong", "discount": 0.5},
                "shaping": {"weight": 0.5},
                "entropy": {"weight": 0.1},
            },
        },
        {"aggregation": "tokens", "terms": {"mix": "advantage", "outcome": {}, "process": {"path": "prm"}}},
        {"terms": {"teacher": {"path": "teacher"}}},
        {"clip_cov": 0.1},
    ],
    "lite_ppo": [{}],
    "chord": [
        {},
        {"phi": "none", "mu_valley": 0.4, "dual_clip": None, "beta": 0.1},
        {"phi": "probability", "cutoff_prob": 0.3, "aggregation": "sequences"},
    ],
    "red": [{}, {"shift": "ratio"}, {"shift": "none", "alpha": 0.5}],
    "prefixrl": [{}, {"aggregation": "tokens", "adapt": "success"}, {"terms": {"teacher": {"path": "teacher"}}}],
    "rec": [
        {},
        {"weight": "importance", "clip": "two_side", "updates_per_rollout": 2},
        {"clip": "ring", "regularizer": "forward_kl"},
        {"clip": "sequence_one_side", "weight": "sequence_importance", "epsilon_low": 0.1, "epsilon_high": 0.1},
        {"clip": "none", "weight": "advantage", "regularizer": "k2", "scale_rewards": "group"},
        {"clip": "none", "drop": "balanced"},
    ],
    "a_star_po": [{}, {"beta_2": 0.5, "beta_1": 0.5}],
    "sdft": [
        {},
        {"objective": "policy_gradient", "context": "success", "teacher": "live", "taught": "wrong"},
        {"objective": "top_k", "top_k": 2, "outcome_coef": 0.5, "epsilon": 0.2, "beta": 0.5, "teacher": "start"},
    ],
    "opmd": [{}, {"divergence": "sequence", "baseline": "log_mean_exp"}, {"divergence": "none"}],
    "asymre": [{}],
    "opd": [
        {"teacher": "teacher"},
        {"teacher": "teacher", "discount": 1.0, "epsilon": 0.2, "outcome_coef": 0.5, "aggregation": "sequences"},
        {"teacher": "teacher", "objective": "full", "beta": 0.0},
        {"teacher": "teacher", "objective": "top_k", "top_k": 2, "support": "policy", "tail": False},
        {
            "teacher": "teacher",
            "objective": "top_k",
            "top_k": 2,
            "beta": 0.5,
            "on_policy_share": 0.5,
            "expert_rows_per_step": 3,
            "outcome_coef": 0.5,
        },
    ],
    "ldc": [{"controllers": {"1": [0.0, 1.0]}}],
    "rlsp": [{}, {"length_cost": 2.0, "alpha": 0.8, "filter": "outcome", "overlong_cache": 2}],
    "dpo": [
        {},
        {"loss": "conservative", "label_smoothing": 0.2},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "ipo", "per_token": True},
        {"loss": "hinge", "beta": 0.4},
        {"divergence": "forward_kl"},
        {"divergence": "js"},
        {"divergence": "alpha", "alpha": 0.3},
    ],
    "online_dpo": [{}, {"pairs": "all", "beta": 0.5}, {"loss": "ipo", "mask_truncated": True}],
    "xpo": [{}, {"alpha": 0.1, "beta": 0.5}],
    "nash_md": [{}, {"kl": "token", "preference": "better", "beta": 0.5}],
    "simpo": [{}, {"gamma": 1.0, "label_smoothing": 0.1, "sft_weight": 0.3}, {"loss": "hinge"}],
    "hypo": [{}, {"lam": 0.1, "baseline": "none", "k": 1}, {"lam": 0.0}],
    "curry_dpo": [{}, {"curriculum": "gap", "pairs": "all", "refresh_reference": False}],
    "asft": [{}, {"lam": 0.3, "b": 0.5}],
    "tpo": [{}, {"variant": "tpo_l", "gamma": 0.3}, {"alpha": 0.0}],
    "cpl": [{}, {"kl": True, "per_token": True}, {"bc_weight": 1.0, "lam": 1.0}, {"responses": 4, "per_token": True}],
    "orpo": [{}, {"lam": 1.0}],
    "srpo": [{}, {"beta": 0.1, "alpha": 0.3}],
    "kto": [{}, {"beta": 0.5, "undesirable_weight": 1.33}],
    "bco": [{}, {"beta": 0.5}],
    "brain": [{"n": 2}, {"n": 4, "tau": 0.5}, {"n": 3, "proposal_logps": "proposal"}],
    "a_lol": [
        {},
        {"variant": "seq", "epsilon": 0.3},
        {"variant": "ref_free"},
        {"variant": "kl", "beta": 0.1},
        {"variant": "r_lol"},
        {"variant": "w_bc"},
        {"variant": "r_gold"},
    ],
    "ui_s1": [{"filter_std": 0.0}, {"filter_std": 0.0, "episode_advantage": "pooled_steps", "return_rule": "paper"}],
    "oreo": [
        {},
        {"level": "step", "beta": 0.5, "kl_reg": 0.0},
        {"level": "turn", "beta": 0.5},
        {"level": "response", "beta": 0.5, "unbiased_kl": False},
        {"level": "step", "single_step_actor_loss": True},
    ],
    "digirl": [{"actor_freeze_steps": 0}, {"actor_freeze_steps": 0, "rule": "recalled", "instruction_margin": 0.0}],
    "archer": [
        {"actor_freeze_steps": 0},
        {"actor_freeze_steps": 0, "token_baseline": True, "target": "smaller", "turn_discount": 0.5},
        {"actor_freeze_steps": 0, "actions": "recorded", "expectile": 0.7, "inverse_temperature": 3.0},
    ],
    "dapo_step": [{}, {"beta": 0.5, "min_advantage": 0.3}, {"phase": "critic"}],
    "ppo": [
        {},
        {"kl_in": "loss", "value_clip": None, "whiten_advantages": False},
        {"kl_target": 1.0, "missing_eos_reward": -1.0, "epochs": 1, "minibatches": 2},
    ],
    "sophia": [{"reasoner": "r", "right": 0.2}, {"reasoner": "r", "reasonings": 2, "right": 0.5, "alpha_c": 0.0}],
    "rto": [{"dpo_model": "dpo"}, {"dpo_model": "dpo", "dpo_reward_clip": None, "value_clip": None}],
    "drpo": [{}, {"optimizer": "group", "epochs": 1}],
    "rlgf": [
        {},
        {"expert_rows_per_step": 3, "nll_coef": 0.5, "whiten_advantages": True},
        {"variant": "d2lols", "tau": 2, "guide_model": "guide"},
        {"variant": "lols", "ppo_pp_share": 0.5, "guide_model": "guide"},
    ],
    "nlpo": [{}, {"top_p": 1.0, "value_clip": 0.2}],
    "prm": [{}, {"train_on": "until_wrong"}, {"train_on": "last"}],
    "salmon": [{"principles": {"long": {"text": "1", "negative": "2"}}}],
    "reward": [{}, {"center_rewards_coefficient": 0.01}, {"margin": "value"}],
}
CASES = [(name, parameters) for name, rows in VARIANTS.items() for parameters in rows]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in p.items()) or 'defaults'}" for name, p in CASES]


def test_every_method_is_swept():
    assert set(VARIANTS) == set(METHODS)


@pytest.fixture(params=CASES, ids=IDS)
def method(request):
    name, parameters = request.param
    return METHODS[name](METHODS[name].Config(**parameters))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(method, check):
    if reason := check(method):
        pytest.skip(reason)


def test_every_diagnostic_of_ours_is_declared(method):
    for part in method.loss(batch_of(method, logits_of(method))).values():
        for name in part.diagnostics:
            require(name)


def test_within_the_bound_log_ratios_are_the_formulas(method, monkeypatch):
    shifts = torch.tensor([0.0, 18.0, 0.0, 0.0, -18.0, 0.0], dtype=torch.float64)
    bounded = gradient(method, ROWS, lambda tokens: shifted(tokens, shifts))
    monkeypatch.setattr(policy_gradient, "MAX_LOG_RATIO", math.inf)
    unbounded = gradient(method, ROWS, lambda tokens: shifted(tokens, shifts))
    torch.testing.assert_close(bounded, unbounded, rtol=0, atol=0)


def test_tokens_beyond_the_bound_are_counted(method):
    shifts = torch.tensor([0.0, 30.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    batch = each(batch_of(method, logits_of(method)), lambda tokens: shifted(tokens, shifts))
    seen = {k: v for part in method.loss(batch).values() for k, v in part.diagnostics.items()}
    if isinstance(batch, PreferenceBatch) or "ratio_clamped_share" not in seen:
        # What takes no ratio of tokens has nothing to count, and gives the same with and without a bound.
        assert not {"ratio_mean", "clip_share_high"} & set(seen)
        return
    total, n = seen["ratio_clamped_share"]
    mask = batch.rollouts.mask
    level = getattr(method.config, "ratio", "token")
    clip = getattr(method.config, "clip", "")
    if level == "trajectory":
        expected = mask[mask[:, 1]].sum()
    elif level == "sequence" or clip == "sequence_one_side":
        means = mask[:, 1] * 30.0 / mask.sum(1).clamp(min=1)
        expected = mask[means > 20].sum()
    else:
        expected = mask[:, 1].sum()
    assert (int(total), int(n)) == (int(expected), int(mask.sum()))


class Mean(SFT):
    """Divides by what belongs to the micro-batch."""

    def loss(self, batch):
        (part,) = super().loss(batch).values()
        return {"nll": dataclasses.replace(part, value=part.value / part.count.clamp(min=1))}


class OverAll(SFT):
    """Sums over positions that are not trained on."""

    def loss(self, batch):
        return {"nll": LossSum(-batch.logps.sum(), "tokens", batch.mask.sum())}


class Widths(SFT):
    """Divides by the width of the padded batch."""

    def loss(self, batch):
        (part,) = super().loss(batch).values()
        return {"nll": dataclasses.replace(part, value=part.value / batch.mask.shape[1])}


class Uncounted(SFT):
    """Counts sequences before the forward pass and tokens after it."""

    def counts(self, batch):
        return {"nll": batch.mask.any(dim=1).sum()}


class NoSum(SFT):
    """A mean that is not a number where nothing is trained on."""

    def loss(self, batch):
        (part,) = super().loss(batch).values()
        return {"nll": dataclasses.replace(part, value=part.value * (batch.mask.sum() / batch.mask.sum()))}


class Wrong(torch.autograd.Function):
    """A square whose backward forgets the factor 2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class Backward(SFT):
    """A gradient that is not that of the value, beside a factor that is detached on purpose."""

    def loss(self, batch):
        return {"nll": aggregate(Wrong.apply(batch.logps) * batch.logps.detach(), batch.mask, "tokens")}


class Attached(SFT):
    """Diagnostics that keep the graph."""

    def loss(self, batch):
        (part,) = super().loss(batch).values()
        part.diagnostics["entropy"] = (part.value, part.count)
        return {"nll": part}


class EmptyRows(DPO):
    """Rows whose response is empty take part."""

    def loss(self, batch):
        (part,) = super().loss(batch).values()
        return {"preference": dataclasses.replace(part, value=part.value + batch.responses["chosen"].logps.sum())}


class Unjudged(GRPO):
    """What could not be judged counts as wrong."""

    def advantages(self, scored):
        return super().advantages(dataclasses.replace(scored, known=torch.ones_like(scored.known)))


class ByPlace(GRPO):
    """The first row of a group is favoured."""

    def advantages(self, scored):
        return super().advantages(scored) * torch.arange(1, len(scored.rewards) + 1)


class Stale(GRPO):
    """Fresh rollouts are weighed otherwise than old ones of the same policy."""

    def loss(self, batch):
        (part,) = super().loss(batch).values()
        return {"policy": part if batch.old_logps is not None else dataclasses.replace(part, value=2 * part.value)}


class Unbounded(GRPO):
    """A ratio that overflows."""

    def loss(self, batch):
        ratio = (batch.logps - (batch.logps.detach() if batch.old_logps is None else batch.old_logps)).exp()
        return {"policy": aggregate(-ratio * batch.advantages.unsqueeze(1), batch.mask, "sequences")}


class Beside(PPO):
    """Advantages are centred over the micro-batch."""

    def estimate(self, batch, rewards):
        made = super().estimate(batch, rewards)
        return dataclasses.replace(made, returns=made.returns - made.returns.mean())


BREAKS = {
    Mean: "any_split_gives_the_same_gradient",
    OverAll: "values_outside_the_mask_change_nothing",
    Widths: "padding_changes_nothing",
    Uncounted: "counts_are_those_of_the_loss",
    NoSum: "an_empty_batch_gives_a_zero",
    Backward: "the_gradient_is_that_of_the_value",
    Attached: "diagnostics_are_detached_sums",
    EmptyRows: "a_row_with_an_empty_response_says_nothing",
    Unjudged: "advantages_leave_unknown_rows_out",
    ByPlace: "advantages_follow_their_rows",
    Stale: "fresh_rollouts_need_no_old_logps",
    Unbounded: "log_ratios_of_any_size_are_finite",
    Beside: "estimates_are_of_one_row_each",
}


def test_every_check_has_a_method_that_breaks_it():
    assert set(BREAKS.values()) == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize("cls", BREAKS)
def test_a_method_that_breaks_the_contract_is_told_so(cls):
    (check,) = [check for check in CHECKS if check.__name__ == BREAKS[cls]]
    with pytest.raises(Broken):
        check(cls(cls.Config()))
