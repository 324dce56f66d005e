"""The loss contract, swept over every registered method: sums with a unit, divided once by global counts.

A row of VARIANTS per set of parameters that changes the formula; every method must have one.
"""

import dataclasses

import pytest
import torch

from posttrain.methods import METHODS
from posttrain.methods.base import OnlineMethod, Scored
from posttrain.objectives.batch import TokenBatch

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
    ],
    "lite_ppo": [{}],
}
CASES = [(name, parameters) for name, rows in VARIANTS.items() for parameters in rows]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in p.items()) or 'defaults'}" for name, p in CASES]

ROWS, WIDTH, VOCABULARY = 8, 6, 5
LENGTHS = [4, 1, 0, 5, 3, 5, 2, 1]  # trained tokens per row; one row has none


def test_every_method_is_swept():
    assert set(VARIANTS) == set(METHODS)


@pytest.fixture(params=CASES, ids=IDS)
def method(request):
    name, parameters = request.param
    return METHODS[name](METHODS[name].Config(**parameters))


def scored(n=ROWS):
    generator = torch.Generator().manual_seed(1)
    return Scored(
        rewards=torch.rand(n, generator=generator, dtype=torch.float64),
        outcomes=torch.randint(0, 2, (n,), generator=generator).double(),
        known=torch.tensor([True, True, True, False, True, True, True, True])[:n],
        groups=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])[:n],
        lengths=torch.tensor(LENGTHS)[:n],
        finished=torch.tensor([True, True, True, True, True, False, True, True])[:n],
        max_new_tokens=5,
    )


def model_logits():
    """The 'parameters' of the sweep: logits per row and position."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(ROWS, WIDTH, VOCABULARY, generator=generator, dtype=torch.float64)


def batch_of(method, logits):
    """A batch as a shell would build it from these logits, off-policy and with a reference."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=generator)
    mask = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        mask[row, WIDTH - 5 : WIDTH - 5 + length] = 1

    def noisy(logps, scale):
        return logps.detach() + scale * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)

    logps = logits.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    logps = torch.where(mask > 0, logps, torch.zeros_like(logps))
    advantages = None
    if isinstance(method, OnlineMethod):
        rows = scored()
        advantages = method.advantages(rows)
        mask = mask * method.keep(rows).unsqueeze(1)
    return TokenBatch(
        mask=mask,
        logps=logps,
        old_logps=noisy(logps, 0.3),
        ref_logps=noisy(logps, 0.3),
        advantages=advantages,
        max_length=5,
    )


def gradient(method, rows_per_micro_batch, transform=lambda batch: batch):
    """Gradient and value after the shell's arithmetic: sums over micro-batches, divided by global counts."""
    logits = model_logits().requires_grad_()
    batch = transform(batch_of(method, logits))
    starts = range(0, ROWS, rows_per_micro_batch)
    parts = [batch.rows(slice(s, s + rows_per_micro_batch)) for s in starts]
    counts: dict[str, torch.Tensor] = {}
    for part in parts:
        for term, n in method.counts(dataclasses.replace(part, logps=None)).items():
            counts[term] = counts.get(term, torch.zeros(())) + n
    total = 0.0
    for part in parts:
        sums = method.loss(part)
        assert set(sums) == set(counts)
        for term, loss_sum in sums.items():
            total = total + loss_sum.value / counts[term].clamp(min=1)
    (grad,) = torch.autograd.grad(total, logits)
    return grad, total.detach()


@pytest.mark.parametrize("rows_per_micro_batch", [1, 2, 3, 4])
def test_any_split_gives_the_same_gradient(method, rows_per_micro_batch):
    whole, value = gradient(method, ROWS)
    split, split_value = gradient(method, rows_per_micro_batch)
    assert whole.abs().max() > 0
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(split_value, value, rtol=1e-12, atol=1e-14)


def test_counts_before_the_forward_are_those_of_the_loss(method):
    batch = batch_of(method, model_logits())
    counts = method.counts(dataclasses.replace(batch, logps=None))
    for term, loss_sum in method.loss(batch).items():
        assert float(loss_sum.count) == float(counts[term])
        assert loss_sum.unit in ("tokens", "sequences", "pairs")
        expected = batch.mask.sum() if loss_sum.unit == "tokens" else (batch.mask.sum(1) > 0).sum()
        assert float(loss_sum.count) == float(expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(method, side):
    def pad(batch):
        widths = (3, 0) if side == "left" else (0, 3)
        grown = {
            f.name: torch.nn.functional.pad(v, widths)
            for f in dataclasses.fields(batch)
            if isinstance(v := getattr(batch, f.name), torch.Tensor) and v.dim() == 2
        }
        return dataclasses.replace(batch, **grown)

    plain, value = gradient(method, ROWS)
    padded, padded_value = gradient(method, ROWS, pad)
    torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(padded_value, value, rtol=1e-12, atol=1e-14)


def test_values_outside_the_mask_change_nothing(method):
    def poison(batch):
        def spoil(values):
            return torch.where(batch.mask > 0, values, torch.full_like(values, 7.0))

        changed = {name: spoil(getattr(batch, name)) for name in ("logps", "old_logps", "ref_logps")}
        return dataclasses.replace(batch, **changed)

    plain, value = gradient(method, ROWS)
    poisoned, poisoned_value = gradient(method, ROWS, poison)
    torch.testing.assert_close(poisoned, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(poisoned_value, value, rtol=1e-12, atol=1e-14)


def test_an_empty_batch_gives_a_zero_with_a_gradient(method):
    def empty(batch):
        return dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))

    grad, value = gradient(method, ROWS, empty)
    assert float(value) == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_gradcheck(method):
    def loss(logits):
        return sum(part.value for part in method.loss(batch_of_fixed(method, logits)).values())

    def batch_of_fixed(method, logits):
        reference = batch_of(method, model_logits())
        fresh = batch_of(method, logits)
        return dataclasses.replace(fresh, old_logps=reference.old_logps, ref_logps=reference.ref_logps)

    if getattr(method.config, "surrogate", None) == "cispo":
        pytest.skip("CISPO detaches its weight: its gradient is not that of its value; see the unit test")
    assert torch.autograd.gradcheck(loss, (model_logits().requires_grad_(),), atol=1e-6)


def test_diagnostics_are_detached_sums_with_counts(method):
    for loss_sum in method.loss(batch_of(method, model_logits().requires_grad_())).values():
        for total, n in loss_sum.diagnostics.values():
            assert not total.requires_grad and not n.requires_grad
            assert float(n) > 0


def test_advantages_leave_unknown_rows_out(method):
    if not isinstance(method, OnlineMethod):
        pytest.skip("no advantages")
    rows = scored()
    advantages = method.advantages(rows)
    assert advantages.shape == (ROWS,)
    assert (advantages[~rows.known] == 0).all() and not method.keep(rows)[~rows.known].any()
    poisoned = dataclasses.replace(rows, rewards=torch.where(rows.known, rows.rewards, torch.tensor(99.0).double()))
    assert torch.equal(method.advantages(poisoned), advantages)


def test_advantages_follow_a_permutation_of_rows(method):
    if not isinstance(method, OnlineMethod):
        pytest.skip("no advantages")
    rows = scored()
    order = torch.tensor([5, 0, 7, 2, 4, 1, 3, 6])
    shuffled = dataclasses.replace(
        rows, **{k: getattr(rows, k)[order] for k in ("rewards", "outcomes", "known", "groups", "lengths", "finished")}
    )
    torch.testing.assert_close(method.advantages(shuffled), method.advantages(rows)[order], rtol=1e-12, atol=1e-14)
