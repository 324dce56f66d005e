"""Each method's own oracles: parameters, advantages and loss values by hand, in float64."""

import pytest
import torch
from pydantic import ValidationError

from posttrain.methods import METHODS
from posttrain.methods.base import Scored
from posttrain.objectives.batch import TokenBatch


def build(name, **parameters):
    return METHODS[name](METHODS[name].Config(**parameters))


def scored(rewards, *, known=None, lengths=None, finished=None):
    rows = torch.tensor(rewards, dtype=torch.float64)
    n = rows.numel()
    return Scored(
        rewards=rows.flatten(),
        outcomes=rows.flatten(),
        known=torch.ones(n, dtype=torch.bool) if known is None else torch.tensor(known),
        groups=torch.arange(rows.size(0)).repeat_interleave(rows.size(1)),
        lengths=torch.full((n,), 5) if lengths is None else torch.tensor(lengths),
        finished=torch.ones(n, dtype=torch.bool) if finished is None else torch.tensor(finished),
        max_new_tokens=20,
    )


def on_policy(lengths, advantages):
    """A batch whose ratios are all 1, with rows of the given lengths."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, :n] = True
    logps = torch.full(mask.shape, -1.0, dtype=torch.float64).requires_grad_()
    return TokenBatch(mask=mask, logps=logps, advantages=advantages)


def value(method, batch):
    (part,) = method.loss(batch).values()
    return float(part.value.detach() / part.count)


def test_every_method_has_the_name_it_is_registered_under():
    for name, cls in METHODS.items():
        assert cls.Config.model_fields["name"].default == name
        assert cls.paper and cls.__module__ == f"posttrain.methods.{name}"


def test_lite_ppo_token_mean_and_grpo_sequence_mean():
    rewards = [[1, 0, 0, 0], [1, 1, 1, 0]]
    lengths = [2, 4, 4, 6, 3, 3, 2, 5]
    lite, grpo = build("lite_ppo"), build("grpo")
    assert value(lite, on_policy(lengths, lite.advantages(scored(rewards)))) == pytest.approx(0.2418722533, abs=1e-9)
    token_grpo = build("grpo", aggregation="tokens")
    batch = on_policy(lengths, grpo.advantages(scored(rewards)))
    assert value(token_grpo, batch) == pytest.approx(0.2585689759, abs=1e-9)
    assert value(grpo, batch) == pytest.approx(0.0, abs=1e-12)


def test_dr_grpo_divides_by_the_length_limit():
    method = build("grpo", scale_rewards="none", aggregation="constant")
    advantages = method.advantages(scored([[1, 0]]))
    assert advantages.tolist() == [0.5, -0.5]
    batch = on_policy([2, 4], advantages)
    batch = TokenBatch(mask=batch.mask, logps=batch.logps, advantages=advantages, max_length=20)
    assert value(method, batch) == pytest.approx((-0.5 * 2 + 0.5 * 4) / 20 / 2)


def test_kl_is_added_with_weight_beta():
    mask = torch.ones(1, 1, dtype=torch.bool)
    logps = torch.tensor([[0.5]], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([[0.25]], dtype=torch.float64).log()
    batch = TokenBatch(mask=mask, logps=logps, ref_logps=ref, advantages=torch.tensor([2.0], dtype=torch.float64))
    k3 = 0.5 + 0.6931471806 - 1
    for importance, gradient in ((True, -2 + 0.1 * ((1 - 0.5) + k3)), (False, -2 + 0.1 * (1 - 0.5))):
        method = build("grpo", beta=0.1, kl_importance=importance)
        part = method.loss(batch)["policy"]
        assert float(part.value.detach()) == pytest.approx(-2 + 0.1 * k3)
        (found,) = torch.autograd.grad(part.value, logps)
        assert float(found) == pytest.approx(gradient)
        total, n = part.diagnostics["kl"]
        assert (float(total), float(n)) == (pytest.approx(k3), 1.0)


def test_needs_follow_the_parameters():
    assert not build("grpo").needs.reference
    assert build("grpo", beta=0.01).needs.reference
    assert build("grpo").needs.batch_key == "prompts_per_step"
    assert build("sft").needs.batch_key == "rows_per_step"


def test_truncated_rows_are_masked_only_when_asked():
    rows = scored([[1, 0]], finished=[True, False])
    assert build("grpo").keep(rows).tolist() == [True, True]
    assert build("grpo", mask_truncated=True).keep(rows).tolist() == [True, False]


def test_overlong_penalty_enters_the_reward():
    rows = scored([[1, 1]], lengths=[10, 20])
    advantages = build("grpo", overlong_cache=4, scale_rewards="none").advantages(rows)
    assert advantages.tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"surrogate": "cispo", "epsilon": 0.1}, "epsilon"),
        ({"cispo_cap": 3.0}, "cispo_cap"),
        ({"kl_importance": False}, "kl_importance"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_parameters_without_effect_or_out_of_range_are_refused(parameters, word):
    with pytest.raises(ValidationError, match=word):
        METHODS["grpo"].Config(**parameters)
