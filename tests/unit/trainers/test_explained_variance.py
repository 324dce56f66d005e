"""How well critics fit their targets: over the states that they learn, by head, over micro-batches, offline too."""

import json

import pytest
import torch

from posttrain.methods.base import Regression
from posttrain.methods.dapo_step import DAPOStep, DAPOStepConfig
from posttrain.methods.oreo import OREO, OREOConfig
from posttrain.methods.rlgf import RLGF, RLGFConfig
from posttrain.models.collate import FURTHER
from posttrain.objectives.batch import GUIDED, TokenBatch
from posttrain.objectives.returns import explained_variance, moments
from posttrain.trainers.critic import fitted, weigh
from posttrain.trainers.run import train


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def explained(method, parts):
    logged = {}
    weigh(method, parts, lambda name, total, n: logged.update({name: total / n}), main=True)
    return logged["critic/explained_variance"]


def guided_rows(roll_in):
    """Two rows of four tokens, of which the guide wrote the last two; its values are exactly its returns."""
    values = t([[roll_in, -roll_in, 0.5, 1.0], [roll_in, roll_in, 0.1, 0.2]])
    guided = t([[0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    further = {FURTHER + GUIDED: guided}
    return {"mask": torch.ones(2, 4).bool(), "old_values": values, "advantages": t([1.0, 0.2]), **further}


@pytest.mark.parametrize("roll_in", [0.0, 50.0])
def test_tokens_that_the_value_loss_leaves_out_do_not_count(roll_in):
    method = RLGF(RLGFConfig(variant="aggrevated", guide_model="g", kl_coef=0.0, gamma=0.5))
    assert explained(method, [guided_rows(roll_in)]) == pytest.approx(1.0)
    learned = guided_rows(roll_in)
    learned["old_values"][:, 2:] = 0.0  # a constant, on the tokens that count
    assert explained(method, [learned]) < 0.5


def test_each_head_is_measured_against_its_own_returns():
    """Values that miss the returns by one constant per head explain all of their variance."""
    method = RLGF(RLGFConfig(variant="lols", guide_model="g", kl_coef=0.0, gamma=1.0, lam=1.0))
    rows = [
        {
            "mask": torch.ones(2, 2).bool(),
            FURTHER + GUIDED: torch.full((2, 2), bool(head)),
            "old_values": t([[reward + miss] * 2 for reward in rewards]),
            "advantages": t(rewards),
        }
        for head, miss, rewards in ((0, 5.0, [1.0, 0.0]), (1, -3.0, [0.5, 0.25]))
    ]
    mixed, again = ([{name: torch.cat([part[name] for part in rows]) for name in rows[0]}] for _ in range(2))
    assert explained(method, mixed) == pytest.approx(1.0) == explained(method, rows)
    one = RLGF(RLGFConfig(variant="aggrevated", guide_model="g", kl_coef=0.0, gamma=1.0, lam=1.0))
    assert explained(one, again) < 0


# ------------------------------------------------------------------------------------------------------------ offline


def test_micro_batches_are_one_population():
    generator = torch.Generator().manual_seed(0)
    values, targets = (torch.rand(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 3, generator=generator) > 0.3
    targets[~mask] = float("nan")  # what is no state is not looked at
    logged = []
    parts = [Regression(values[i : i + 2], targets[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    fitted(parts, lambda *entry: logged.append(entry), main=True)
    expected = explained_variance(moments(targets - values, mask), moments(targets, mask))
    assert logged == [("critic/explained_variance", pytest.approx(float(expected)), 1)]
    fitted(parts, lambda *entry: logged.append(entry), main=False)
    assert len(logged) == 1


def test_the_critic_of_dapo_step_is_held_to_the_outcomes():
    """Probabilities 3/4, 1/4 and 1/2 of outcomes 1, 0 and 0: residuals 1/4, -1/4, -1/2."""
    batch = TokenBatch(
        mask=t([[0, 1, 1], [0, 1, 0]]).bool(),
        logps=torch.zeros(2, 3).double().requires_grad_(),
        values=t([[9.0, 3.0, -5.0], [9.0, 1 / 3, 9.0]]).abs().log(),
        rewards=t([1.0, 0.0]),
        steps=torch.tensor([[0, 0, 0], [0, 0, 0]]),
    )
    found = DAPOStep(DAPOStepConfig(phase="critic")).regression(batch)
    assert found.mask.tolist() == [[True], [True]]
    torch.testing.assert_close(found.values, t([[0.75], [0.25]]))
    torch.testing.assert_close(found.targets, t([[1.0], [0.0]]))
    assert not found.values.requires_grad
    assert DAPOStep(DAPOStepConfig()).regression(batch) is None


def test_the_values_of_oreo_are_held_to_the_soft_bellman_return():
    """R = 1, beta = 0.5, log-ratios 0.2 and -0.6: targets 1 - 0.5 * (0.2 - 0.6) and 1 - 0.5 * -0.6."""
    batch = TokenBatch(
        mask=t([[0, 1, 1]]).bool(),
        logps=t([[0.0, -1.0, -2.0]]).requires_grad_(),
        ref_logps=t([[0.0, -1.2, -1.4]]),
        values=t([[9.0, 0.3, 0.4]]).requires_grad_(),
        rewards=t([1.0]),
    )
    found = OREO(OREOConfig(beta=0.5)).regression(batch)
    torch.testing.assert_close(found.targets, t([[1.2, 1.3]]))
    torch.testing.assert_close(found.values, t([[0.3, 0.4]]))
    assert not found.targets.requires_grad and not found.values.requires_grad


@pytest.mark.parametrize(
    ("method", "logged"),
    [({"name": "oreo"}, True), ({"name": "dapo_step", "phase": "critic", "delimiter": ";"}, True)]
    + [({"name": "dapo_step", "delimiter": ";"}, False)],
    ids=["oreo", "critic", "policy"],
)
def test_offline_runs_log_it_alike_for_any_micro_batch(load, tmp_path, method, logged):
    found = []
    for size in (16, 4):
        run = train(load(method, {"batch.micro_batch": size, "output": str(tmp_path / str(size))})).run_dir
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([row.get("critic/explained_variance") for row in rows if "loss" in row])
    if not logged:
        assert found == [[None] * 3] * 2
        return
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4) and len(set(found[0])) == 3
    assert all(value < 1 for value in found[0])
