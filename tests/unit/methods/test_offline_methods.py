"""Offline methods: which traces are used, what is refused, a critic with its own learning rate or trained apart."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Problem
from posttrain.errors import DataError, NeedsError
from posttrain.methods.oreo import OREO, OREOConfig, balanced
from posttrain.models.value import FILE
from posttrain.trainers.critic_first import refuse_where_sharded
from posttrain.trainers.offline import OfflineShell
from posttrain.trainers.run import train


def trace(problem, outcome, ids=(7, 8, 2)):
    return KnownTrace(Problem(problem, problem), [5], list(ids), [1] * len(ids), outcome)


def test_balance_keeps_no_more_right_traces_than_wrong_ones_but_one():
    traces = [trace("a", o) for o in (1, 1, 0, 1, 0)] + [trace("b", 1), trace("b", 1), trace("c", 0), trace("c", 0)]
    kept = [(t.problem.id, t.outcome) for t in balanced(traces, 4)]
    assert kept == [("a", 0), ("a", 0), ("a", 1), ("a", 1), ("b", 1), ("c", 0), ("c", 0)]
    assert len(balanced([trace("a", 0)] * 9 + [trace("a", 1)] * 9, 4)) == 8


def test_a_trace_without_an_outcome_is_refused():
    with pytest.raises(DataError, match="without an outcome"):
        assert trace("a", None).verified


def test_rewards_are_scaled():
    method = OREO(OREOConfig(reward_scale=2.0, reward_shift=-1.0))
    assert [method.reward(trace("a", outcome)) for outcome in (0.0, 1.0)] == [-1.0, 1.0]


def test_a_delimiter_without_steps_is_refused():
    with pytest.raises(ValueError, match="delimiter has no effect"):
        OREOConfig(delimiter=";")


def test_a_kind_of_kl_without_a_kl_is_refused():
    with pytest.raises(ValueError, match="unbiased_kl has no effect"):
        OREOConfig(kl_reg=0.0, unbiased_kl=False)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("changes", [{}, {"critic": {"trunk": "shared"}}], ids=["separate", "shared trunk"])
def test_the_actor_can_wait_for_the_critic(load, tiny_model, changes):
    """Not even weight decay moves it; of a critic on the policy's own trunk the head is trained alone."""
    changes = {**changes, "training.weight_decay": 0.1}
    result = train(load({"name": "oreo", "actor_freeze_steps": 3}, changes))
    found, start = weights(result.model_dir), weights(tiny_model)
    assert all(torch.equal(found[name], start[name]) for name in start)
    assert weights(result.run_dir / "critic")["score.weight"].abs().max() > 0


def test_a_waiting_adapter_does_not_move(load):
    result = train(load({"name": "oreo", "actor_freeze_steps": 2}, {**WAITING, "model.peft": {"r": 2}}))
    one, other, last = (
        load_file(result.run_dir / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (1, 2, 3)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], last[name]) for name in one)


WAITING = {"training.weight_decay": 0.1, "training.save_steps": 1}


def test_the_optimizer_sees_a_waiting_actor_from_its_first_own_update_on(load):
    """Adam corrects for the number of updates. And a run that is resumed while it waits ends at the same weights."""
    recipe = load({"name": "oreo", "actor_freeze_steps": 2}, WAITING)
    result = train(recipe)
    policy, critic = len(weights(result.model_dir)), len(load_file(last_checkpoint(result) / FILE))
    expected = weights(result.model_dir)
    assert counted(result) == [1] * policy + [3] * critic
    again = train(recipe, resume=str(result.run_dir / "checkpoints" / "checkpoint-1"))
    assert all(torch.equal(p, expected[name]) for name, p in weights(again.model_dir).items())


def last_checkpoint(result):
    return result.run_dir / "checkpoints" / f"checkpoint-{result.steps}"


def counted(result):
    """How many updates the optimizer has counted for each tensor, sorted."""
    found = torch.load(last_checkpoint(result) / "optimizer.pt", weights_only=True)
    return sorted(int(state["step"]) for state in found["state"].values())


def test_where_weights_are_sharded_a_waiting_actor_gets_zeros(load, tiny_model, monkeypatch, tmp_path):
    """The shell is told that it shards, nothing more: it checks the recipe, and the optimizer counts all updates."""
    bind = OfflineShell.bind

    def bound_as_sharded(shell, parts):
        shell.is_fsdp_enabled = True
        bind(shell, parts)
        shell.is_fsdp_enabled = False

    monkeypatch.setattr(OfflineShell, "bind", bound_as_sharded)
    waits = {"name": "oreo", "actor_freeze_steps": 3}
    result = train(load(waits, {"training.save_steps": 1, "output": str(tmp_path / "zeros")}))
    found, start = weights(result.model_dir), weights(tiny_model)
    assert all(torch.equal(found[name], start[name]) for name in start)
    assert counted(result) == [3] * (len(start) + len(load_file(last_checkpoint(result) / FILE)))
    with pytest.raises(NeedsError, match="weight decay moves a policy"):
        train(load(waits, {"training.weight_decay": 0.1, "output": str(tmp_path / "refused")}))


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"training.weight_decay": 0.1}, "training.weight_decay"), ({"critic": {"trunk": "shared"}}, "critic.trunk")],
)
def test_what_would_move_a_waiting_actor_where_weights_are_sharded_is_refused(load, changes, where):
    recipe = load({"name": "oreo", "actor_freeze_steps": 2}, changes)
    with pytest.raises(NeedsError, match="shall wait") as caught:
        refuse_where_sharded(recipe, OREO(recipe.method).needs)
    assert caught.value.where == where
    refuse_where_sharded(recipe, OREO(OREOConfig()).needs)  # it does not wait
    plain = load({"name": "oreo", "actor_freeze_steps": 2})
    refuse_where_sharded(plain, OREO(plain.method).needs)


def test_the_critic_has_a_learning_rate_of_its_own(load, tmp_path):
    heads = {}
    for rate in (1e-2, 1e-3):
        changes = {"critic": {"learning_rate": rate}, "training.max_steps": 1, "output": str(tmp_path / str(rate))}
        result = train(load({"name": "oreo"}, changes))
        heads[rate] = weights(result.run_dir / "critic")["score.weight"]
        policy = weights(result.model_dir)
    assert all(torch.equal(policy[name], one) for name, one in weights(tmp_path / "0.01" / "model").items())
    torch.testing.assert_close(heads[1e-2], heads[1e-3] * 10)  # Adam's first step is the rate


def test_a_shared_trunk_is_trained_by_both_and_saved_whole(load, tmp_path):
    result = train(load({"name": "oreo"}, {"critic": {"trunk": "shared"}}))
    critic, policy = weights(result.run_dir / "critic"), weights(result.model_dir)
    assert torch.equal(critic["model.layers.0.mlp.up_proj.weight"], policy["model.layers.0.mlp.up_proj.weight"])
    assert critic["score.weight"].abs().max() > 0
    assert not (result.model_dir / FILE).exists()


def test_a_critic_trained_apart_and_then_frozen(load, tiny_model, tmp_path):
    method = {"name": "dapo_step", "delimiter": ";", "phase": "critic"}
    changes = {"output": str(tmp_path / "critic"), "training.max_steps": 30}
    first = train(load(method, changes))
    losses = [
        json.loads(line)["critic/loss"]
        for line in (first.run_dir / "metrics.jsonl").read_text().splitlines()
        if "critic/loss" in line
    ]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and sum(losses[-10:]) / 10 < 0.68
    start = weights(tiny_model)
    assert all(torch.equal(p, start[name]) for name, p in weights(first.model_dir).items())
    critic = {"path": str(first.run_dir / "critic")}
    second = train(load({**method, "phase": "policy", "beta": 0.5}, {"critic": critic, "output": str(tmp_path / "p")}))
    one, other = weights(first.run_dir / "critic"), weights(second.run_dir / "critic")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(p, start[name]) for name, p in weights(second.model_dir).items())


def test_a_policy_phase_without_a_trained_critic_is_refused(load):
    with pytest.raises(NeedsError, match="takes a trained critic") as caught:
        train(load({"name": "dapo_step", "delimiter": ";"}, {"critic": {"learning_rate": 1e-3}}))
    assert caught.value.where == "critic.path"


@pytest.mark.parametrize("changes", [{}, {"model.peft": {"r": 2}}], ids=["full", "lora"])
def test_the_whole_vocabulary_needs_the_reference_in_every_step(load, tmp_path, changes):
    """With its log-probs read from a cache as well; and the first step finds no difference to it."""
    changes = {**changes, "reference": {"cache": str(tmp_path / "cache")}}
    klds = []
    for name in ("one", "other"):
        result = train(load({"name": "oreo", "kl_reg": 0.5}, {**changes, "output": str(tmp_path / name)}))
        rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        klds.append([row["kl"] for row in rows if "kl" in row])
    assert klds[0] == klds[1] and klds[0][0] == pytest.approx(0.0, abs=1e-6) and klds[0][-1] > 0


def test_the_reference_is_scored_once_and_kept_on_disk(load, tmp_path):
    cache = {"reference": {"cache": str(tmp_path / "cache")}}
    one = train(load({"name": "oreo"}, {**cache, "output": str(tmp_path / "one")}))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    other = train(load({"name": "oreo"}, {**cache, "output": str(tmp_path / "other")}))
    assert all(torch.equal(p, weights(other.model_dir)[name]) for name, p in weights(one.model_dir).items())
