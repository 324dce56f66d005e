"""NLPO: what it rewards, what it reduces to, its mask model in a run and over a checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

from posttrain.config.preflight import check_needs, estimate_memory
from posttrain.errors import NeedsError, StateError
from posttrain.methods.companions import UNMASKED_LOGPS, MaskModel
from posttrain.methods.nlpo import NLPO, NLPOConfig
from posttrain.objectives.action_mask import MaskRule
from posttrain.objectives.batch import TokenBatch
from posttrain.trainers.online_state import SHARED
from posttrain.trainers.run import train

MASKED = {"name": "nlpo", "top_p": 0.6, "min_tokens_to_keep": 2, "mask_update_interval": 2, "epochs": 2}


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_kl_reward_is_of_log_probs_without_the_mask():
    """The sheet's numbers: pi_old(a) = 0.2 of the whole vocabulary, 1/3 of the allowed tokens; pi_ref(a) = 0.25."""
    batch = TokenBatch(
        mask=t([[1.0]]).bool(),
        old_logps=t([[1 / 3]]).log(),
        further={UNMASKED_LOGPS: t([[0.2]]).log()},
        ref_logps=t([[0.25]]).log(),
        old_values=t([[0.0]]),
        advantages=t([0.0]),
    )
    method = NLPO(NLPOConfig())
    assert float(method.token_rewards(batch)) == pytest.approx(0.0223143551, abs=1e-10)
    assert float(method.estimate(batch, method.token_rewards(batch)).kl) == pytest.approx(-0.223143551, abs=1e-9)


def test_the_mask_it_asks_for():
    method = NLPO(NLPOConfig(top_p=0.8, min_tokens_to_keep=7, mask_update_interval=3))
    assert method.needs.companions == (MaskModel(MaskRule(0.8, 7, 3)),)
    free = NLPO(NLPOConfig(top_p=1.0))
    assert free.needs.companions == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl_in": "loss"}, "leave out kl_in"),
        ({"top_p": 1.0, "min_tokens_to_keep": 5}, "min_tokens_to_keep: no effect with top_p 1"),
    ],
)
def test_parameters_without_effect_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        NLPOConfig(**given)


def test_with_top_p_one_it_is_ppo_bit_for_bit(load, tmp_path, same):
    both = {"epochs": 2, "kl_coef": 0.1, "vf_coef": 0.5, "gamma": 0.99, "value_clip": None}
    ppo = train(load({"name": "ppo", **both}, {"output": str(tmp_path / "ppo")}))
    nlpo = train(load({"name": "nlpo", "top_p": 1.0, **both}, {"output": str(tmp_path / "nlpo")}))
    assert same(ppo.model_dir, nlpo.model_dir) and same(ppo.run_dir / "critic", nlpo.run_dir / "critic")
    masked = train(load({**MASKED, **both}, {"output": str(tmp_path / "masked")}))
    assert not same(ppo.model_dir, masked.model_dir)


def test_a_mask_that_bars_nothing_likely_is_ppo_up_to_rounding(load, tmp_path, weights):
    """All passes of the mask model run; the one token that it may bar has next to no probability."""
    both = {"epochs": 2, "kl_coef": 0.1, "vf_coef": 0.5, "gamma": 0.99, "value_clip": None}
    descent = {"training.optim": "sgd", "training.learning_rate": 0.1}
    ppo = train(load({"name": "ppo", **both}, {"output": str(tmp_path / "ppo"), **descent}))
    method = {"name": "nlpo", "top_p": 1 - 1e-12, "min_tokens_to_keep": 2, **both}
    nlpo = train(load(method, {"output": str(tmp_path / "nlpo"), **descent}))
    for name, one in weights(ppo.model_dir).items():
        torch.testing.assert_close(weights(nlpo.model_dir)[name], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"training.bf16": True}, {"model.peft": {"type": "lora", "r": 4}}], ids=["float32", "bf16", "lora"]
)
def test_the_first_update_finds_the_ratio_at_one_and_the_engine_draws_what_the_trainer_scores(changes, load, metrics):
    result = train(load(MASKED, changes))
    first = metrics(result.run_dir)[0]
    assert first["ratio_mean"] == 1.0 and first["approx_kl"] == 0.0
    assert first["engine_logp_diff_mean"] < (0.05 if "training.bf16" in changes else 1e-5)


def test_the_mask_model_lags_and_is_in_the_checkpoint(load, tmp_path, weights, same, metrics):
    """Resumed within a rollout, with a mask model that is older than the weights: bit for bit."""
    more = {"training.save_steps": 7}
    whole = train(load(MASKED, {"output": str(tmp_path / "whole"), "training.max_steps": 10, **more})).run_dir
    parts = {"output": str(tmp_path / "parts"), **more}
    train(load(MASKED, {**parts, "training.max_steps": 7}))
    folder = tmp_path / "parts" / "checkpoints" / "checkpoint-7"
    held = {k.removeprefix("masking."): v for k, v in load_file(folder / SHARED).items() if k.startswith("masking.")}
    now = weights(folder)
    assert held and not any("critic" in name for name in held)
    assert all(not torch.equal(held[name], now[name]) for name in held)
    resumed = train(load(MASKED, {**parts, "training.max_steps": 10}), resume="auto").run_dir
    assert same(whole / "model", resumed / "model")
    assert [row["loss"] for row in metrics(whole)] == [row["loss"] for row in metrics(resumed)]


def test_a_mask_cannot_begin_within_a_rollout(load, tmp_path):
    steps = {"training.save_steps": 3, "output": str(tmp_path / "run")}
    free = {"name": "nlpo", "top_p": 1.0, "epochs": 2}
    train(load(free, {**steps, "training.max_steps": 3}))
    later = load({**free, "top_p": 0.6}, {**steps, "training.max_steps": 5, "method.min_tokens_to_keep": 2})
    with pytest.raises(StateError, match="sampled without a mask model"):
        train(later, resume="auto", allow_changed=["method.top_p", "method.min_tokens_to_keep"])


def test_a_vocabulary_that_is_kept_whole_is_refused(load):
    with pytest.raises(NeedsError, match="100 tokens are always allowed, and the vocabulary has"):
        train(load({"name": "nlpo"}))


def test_the_memory_of_the_mask_model_is_estimated(load):
    sizes = {"sequence_tokens": 32, "sequences_per_rank": 16, "device": "cpu"}
    recipe = load(MASKED)
    found = estimate_memory(recipe, NLPO(recipe.method).needs, **sizes)
    terms = {name: size for name, size, _ in found.fixed}
    assert terms["mask model"] == found.trainable * 4 == terms["weights"]
    adapted = load(MASKED, {"model.peft": {"type": "lora", "r": 4}})
    lora = estimate_memory(adapted, NLPO(adapted.method).needs, **sizes)
    assert {name: size for name, size, _ in lora.fixed}["mask model"] == lora.trainable * 4 < terms["mask model"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollouts.engine": "vllm"}, "draws tokens by two models at once, which vllm cannot do"),
        ({"rollouts.delay": 1}, "masks actions by a model that may have changed"),
    ],
)
def test_rollouts_that_cannot_be_masked_are_refused(changes, says, load):
    recipe = load(MASKED, changes)
    with pytest.raises(NeedsError, match=says):
        check_needs(recipe, NLPO(recipe.method).needs, "nlpo")
