"""Expert rows, prefixes, stale rollouts and replay through the real online shell."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file

from posttrain.contract.shell import CLOCK
from posttrain.data.sample import Origin, Sample
from posttrain.data.traces import Manifest, Trace, manifest_path
from posttrain.errors import BatchError, StateError
from posttrain.methods import METHODS
from posttrain.models.collate import token_batch
from posttrain.objectives.batch import TokenBatch
from posttrain.state import rollouts
from posttrain.trainers.online import OnlineShell
from posttrain.trainers.online_state import OF_RANK, SHARED, load_of_rank
from posttrain.trainers.run import build, train
from posttrain.trainers.stale import ReplayBuffer, fresh_positions

CONTRACTS = Path(__file__).parents[2] / "contracts"
CHORD = {"name": "chord", "expert_rows_per_step": 6, "phi": "none", "mu_valley": 0.4}
DESCENT = {"training.optim": "sgd", "training.learning_rate": 0.5, "training.max_grad_norm": 0.0}


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows if "loss" in row]


@pytest.fixture
def shell(load):
    """`shell(method, changes)` -> a bound shell before its first step."""
    built = []

    def make(method, changes=None):
        recipe = load(method, changes)
        built.append(build(recipe, METHODS[method["name"]](recipe.method), PartialState(cpu=True)).shell)
        return built[-1]

    yield make
    for each in built:
        each.parts.tracker.close(plots=False)
        if each.parts.judge is not None:
            each.parts.judge.close()


# ----------------------------------------------------------------------------------------------------- expert rows


def test_expert_rows_stand_apart_and_carry_no_advantage(shell):
    one = shell(CHORD, {"batch.micro_batch": 4})
    batches = one.step_batches(0)
    assert len(batches) == one.parts.plan.gradient_accumulation_steps == 4 + 2
    assert [len(rows) for rows in one.step_samples] == [4, 4, 4, 4, 3, 3]
    for tensors, rows in zip(batches, one.step_samples, strict=True):
        expert = [row.origin is Origin.EXPERT for row in rows]
        assert tensors["expert"].tolist() == expert and len(set(expert)) == 1
        assert not any(expert) or (tensors["advantages"] == 0).all()
    experts = [row for rows in one.step_samples for row in rows if row.origin is Origin.EXPERT]
    assert {row.problem_id for row in experts} <= set(one.problems)


def test_expert_rows_are_a_function_of_seed_and_step(shell):
    one, other = shell(CHORD), shell(CHORD, {"seed": 1})
    of_steps = [[row.ids for rows in one.experts.of_step(step) for row in rows] for step in (0, 1, 0)]
    assert of_steps[0] == of_steps[2] != of_steps[1]
    assert of_steps[0] != [row.ids for rows in other.experts.of_step(0) for row in rows]


def test_other_expert_rows_leave_every_rollout_metric_as_it_is(load, tmp_path):
    found = []
    for seed in (1, 2):
        out = tmp_path / str(seed)
        traces = {"task": "chain_sum", "levels": [seed + 1], "size": 20, "seed": seed}
        train(load(CHORD, {"data.traces": traces, "training.max_steps": 1, "output": str(out)}))
        found.append(metrics(out)[0])
    own = {name for name in found[0] if name.startswith(("expert/", "tokens_", "flops"))} | {"loss", "grad_norm"}
    assert found[0]["expert/nll"] != found[1]["expert/nll"] and found[0].keys() == found[1].keys()
    rest = {"reward", "accuracy", "entropy", "completion_length", "engine_logp_diff_mean", "informative_groups"}
    assert rest <= set(found[0]) - own
    for name in set(found[0]) - own:
        assert found[0][name] == found[1][name], name


def test_without_weight_chord_trains_the_model_of_grpo_bit_for_bit(load, tmp_path):
    grpo = {"name": "grpo", "aggregation": "tokens", "dual_clip": 3.0}
    plain = train(load(grpo, {**DESCENT, "output": str(tmp_path / "grpo")})).run_dir
    mixed = train(load({**CHORD, "mu_valley": 0.0}, {**DESCENT, "output": str(tmp_path / "chord")})).run_dir
    assert same(weights(plain), weights(mixed))
    for name in ("reward", "loss", "grad_norm", "entropy"):
        assert [row[name] for row in metrics(plain)] == [row[name] for row in metrics(mixed)]


def test_with_all_weight_chord_trains_the_model_of_sft(load, tmp_path, tiny_model):
    traces = {"task": "chain_sum", "levels": [2, 3], "size": 12}
    all_of_them = {"data.traces": traces, "output": str(tmp_path / "chord")}
    mixed = train(load({**CHORD, "mu_valley": 1.0, "expert_rows_per_step": 12}, {**DESCENT, **all_of_them})).run_dir
    rows = {"data.completions": traces, "batch.rows_per_step": 12, "batch.micro_batch": 12}
    sft = train(load({"name": "sft"}, {**DESCENT, **rows, "output": str(tmp_path / "sft")})).run_dir
    one, other, start = weights(mixed), weights(sft), load_file(tiny_model / "model.safetensors")
    assert max((one[name] - start[name]).abs().max() for name in one) > 0.01
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5


def test_sft_reads_traces_where_there_are_no_completions(load, tmp_path):
    traces = {"task": "chain_sum", "levels": [2, 4], "size": 64}
    written = train(load({"name": "sft"}, {"output": str(tmp_path / "a")})).run_dir
    changes = {"data": {"traces": traces}, "output": str(tmp_path / "b")}
    assert same(weights(written), weights(train(load({"name": "sft"}, changes)).run_dir))


@pytest.mark.parametrize("method", [{"name": "sft"}, CHORD], ids=["sft", "chord"])
def test_weighted_traces_are_drawn_by_their_weights(method, shell, tmp_path):
    path = tmp_path / "traces.jsonl"
    rewards = {"0": 0.0, "1": 1.0, "2": 0.5}
    traces = [Trace("p/0", i, "1+1=", f"1#{n}", "x", "m", reward=r) for i, (n, r) in enumerate(rewards.items())] * 4
    traces = [replace(trace, sample=number) for number, trace in enumerate(traces)]
    path.write_text("".join(trace.to_json() + "\n" for trace in traces))
    manifest_path(path).write_text(json.dumps(asdict(Manifest("m", "sampled", {}, {}, "0"))))
    source = {"path": str(path), "keep": "all", "weights": {"by": "return", "alpha": 0.05}}
    changes = (
        {"data": {"traces": source}, "batch.rows_per_step": 12, "batch.micro_batch": 4}
        if method["name"] == "sft"
        else {}
    )
    one = shell(method, changes or {"data.traces": source})
    drawn = []
    for step in range(4):
        one.step_batches(step)
        rows = [row for rows in one.step_samples for row in rows if row.origin is Origin.EXPERT]
        drawn += [one.parts.renderer.text(row.ids) for row in rows]
    assert len(drawn) in (48, 24) and set(drawn) == {"1+1=1#1"}


def test_more_expert_rows_than_traces_are_refused(load):
    with pytest.raises(BatchError, match="a step takes 6 expert rows, and there are 4 traces"):
        train(load(CHORD, {"data.traces": {"task": "chain_sum", "levels": [2], "size": 4}}))


# -------------------------------------------------------------------------------------------------------- prefixes


def test_prefix_tokens_have_exactly_no_gradient(shell):
    one = shell({"name": "prefixrl", "prefixed_share": 1.0}, {"batch.micro_batch": 8})
    for tensors, rows in zip(one.step_batches(0), one.step_samples, strict=True):
        assert all(row.prefix > 0 and row.origin is Origin.PREFIX for row in rows)
        logits = one.model(input_ids=tensors["ids"], attention_mask=tensors["attention_mask"]).logits
        logits.retain_grad()
        shifted = logits[:, :-1].log_softmax(-1).gather(2, tensors["ids"][:, 1:, None]).squeeze(2)
        batch = token_batch({**tensors, "advantages": torch.ones(len(rows))}, torch.nn.functional.pad(shifted, (1, 0)))
        assert isinstance(batch, TokenBatch)
        sum(part.value for part in one.method.loss(batch).values()).backward()
        for row, sample in enumerate(rows):
            first = sample.loss_mask.index(1)
            assert logits.grad[row, : first - 1].abs().max() == 0  # position t predicts token t + 1
            assert logits.grad[row, first - 1 : len(sample.ids) - 1].abs().amax(dim=1).min() > 0
            assert logits.grad[row, len(sample.ids) - 1 :].abs().max() == 0


def test_verdicts_are_on_prefix_and_completion_together(shell):
    one = shell({"name": "prefixrl", "prefixed_share": 1.0})
    judged = []
    original = one.parts.judge.judge
    one.parts.judge.judge = lambda problems, texts, lengths, ids: (
        judged.extend(zip(texts, lengths, strict=True)) or original(problems, texts, lengths, ids)
    )
    one.step_batches(0)
    rows = [row for rows in one.step_samples for row in rows]
    expected = []
    for row in rows:
        problem = one.problems[row.problem_id]
        answer = row.ids[len(one.parts.renderer.prompt_ids(problem)) :]
        expected.append((one.parts.renderer.text(answer), len(answer)))
        assert len(answer) == row.prefix + sum(row.loss_mask)
    assert sorted(judged) == sorted(expected)


def test_prefixed_and_plain_groups_are_measured_apart(load):
    run = train(load({"name": "prefixrl", "prefixed_share": 0.5}, {"training.max_steps": 4})).run_dir
    rows = metrics(run)
    kinds = {kind for row in rows for kind in ("policy", "prefix") if f"reward/{kind}" in row}
    assert kinds == {"policy", "prefix"}
    mixed = [row for row in rows if "reward/policy" in row and "reward/prefix" in row]
    assert mixed and all(row["prefix_length"] > 0 for row in mixed)
    entries = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    shown = [entry for entry in entries if "prefix" in entry]
    assert shown and all(entry["prefix"] for entry in shown)


# ------------------------------------------------------------------------------------------------- stale rollouts


class Recorder:
    """Notes the weights at every rollout and the micro-batches that were made of it."""

    def __init__(self, monkeypatch):
        self.weights, self.batches = [], []
        original = OnlineShell._rollout_batches

        def record(shell, window):
            self.weights.append({n: p.detach().clone() for n, p in shell.model.named_parameters()})
            self.shell = shell
            found = original(shell, window)
            self.batches.append(found[0])
            after = dict(shell.model.named_parameters())
            assert all(torch.equal(p, after[n]) for n, p in self.weights[-1].items())  # put back, bit for bit
            return found

        monkeypatch.setattr(OnlineShell, "_rollout_batches", record)

    @torch.no_grad()
    def distance(self, window, weights):
        """Largest difference of the log-probs that the rollout carries and those under the weights of a window."""
        before = self.shell.model.state_dict()
        before = {n: p.clone() for n, p in before.items()}
        self.shell.model.load_state_dict(self.weights[weights], strict=False)
        worst = 0.0
        for tensors in self.batches[window]:
            forward = self.shell.forward(self.shell.model, tensors)
            worst = max(worst, float(((forward.logps - tensors["old_logps"]) * tensors["mask"]).abs().max()))
        self.shell.model.load_state_dict(before)
        return worst


@pytest.mark.parametrize(
    ("changes", "sampled_by"),
    [
        ({"rollouts.sync_every": 3}, [0, 0, 0, 3, 3]),
        ({"rollouts.delay": 2}, [0, 0, 0, 1, 2]),
        ({"rollouts.sync_every": 2, "rollouts.delay": 1}, [0, 0, 0, 2, 2]),
    ],
    ids=["sync_every", "delay", "both"],
)
def test_stale_rollouts_come_from_the_weights_that_they_say(changes, sampled_by, load, monkeypatch):
    recorder = Recorder(monkeypatch)
    run = train(load({"name": "grpo"}, {**changes, "training.max_steps": 5})).run_dir
    for window, version in enumerate(sampled_by):
        assert recorder.distance(window, version) < 1e-5
        if version != window:
            assert recorder.distance(window, window) > 1e-3
    assert [row["rollout_age"] for row in metrics(run)] == [w - v for w, v in enumerate(sampled_by)]
    assert all("approx_kl" in row and "engine_logp_diff_mean" not in row for row in metrics(run))


def test_replayed_groups_keep_their_verdicts_and_log_probs(load, monkeypatch):
    recorder = Recorder(monkeypatch)
    changes = {"rollouts.replay": {"size": 6, "share": 0.5}, "training.max_steps": 4}
    run = train(load({"name": "grpo"}, changes)).run_dir
    shell = recorder.shell
    assert [row.get("replayed_share", 0.0) for row in metrics(run)] == [0, 0.5, 0.5, 0.5]
    assert len(shell.replay_buffer.groups) == 6 and {len(group) for group in shell.replay_buffer.groups} == {4}
    assert max(row["rollout_age"] for row in metrics(run)) <= 3 and metrics(run)[1]["rollout_age"] == 0.5
    seen = {tuple(row["ids"].tolist()) for row in rows_of(recorder.batches[0])}
    again = [row for row in rows_of(recorder.batches[1]) if tuple(row["ids"].tolist()) in seen]
    assert len(again) >= 8  # two groups of four, with the log-probs of the first rollout
    first = {tuple(row["ids"].tolist()): row["old_logps"] for row in rows_of(recorder.batches[0])}
    assert all(torch.equal(row["old_logps"], first[tuple(row["ids"].tolist())]) for row in again)


def rows_of(batches):
    for tensors in batches:
        for i, n in enumerate(tensors["attention_mask"].sum(1).tolist()):
            yield {"ids": tensors["ids"][i, :n], "old_logps": tensors["old_logps"][i, :n]}


def test_every_prompt_is_sampled_once_per_pass_beside_replayed_ones():
    ranges = [fresh_positions(window, 8, 3) for window in range(4)]
    assert [list(found) for found in ranges] == [list(range(8)), *(list(range(a, a + 5)) for a in (8, 13, 18))]


def sample(group, reward=1.0):
    return Sample(
        [1, 2, 3], [0, 1, 1], Origin.POLICY, "p/0", group, [0.0, -0.1, -1 / 3], 7, None, reward, False, "wrong"
    )


def test_the_buffer_keeps_the_newest_groups_and_draws_them_by_seed():
    buffer = ReplayBuffer(3, 2, seed=5)
    assert buffer.draw(1, 0) == []
    buffer.add([sample(group, reward) for reward, group in enumerate((2, 0, 1, 2))])
    assert [[row.reward for row in group] for group in buffer.groups] == [[1], [2], [0, 3]]
    buffer.add([sample(0, 9.0)])
    assert [[row.reward for row in group] for group in buffer.groups] == [[2], [0, 3], [9]]
    drawn = buffer.draw(4, first_group=6)
    assert [[row.group for row in group] for group in drawn] == [[6] * len(drawn[0]), [7] * len(drawn[1])]
    assert all(row.origin is Origin.REPLAY and row.policy_version == 7 for group in drawn for row in group)
    assert drawn == buffer.draw(4, 6) and buffer.groups[0][0].origin is Origin.POLICY
    assert len({str(buffer.draw(window, 6)) for window in range(8)}) > 1


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_samples_come_back_from_a_file_as_they_were(tmp_path):
    samples = [sample(3), Sample([5], [0], Origin.PREFIX, behaviour_logps=[0.0], prefix=1, info={"f": 0.1})]
    flat, rest = rollouts.pack(samples)
    rollouts.write(tmp_path / "x.safetensors", {f"a.{k}": v for k, v in flat.items()}, rest)
    tensors, values = rollouts.read(tmp_path / "x.safetensors")
    assert rollouts.unpack(rollouts.under(tensors, "a."), values) == samples
    assert rollouts.unpack(*rollouts.pack([])) == []


STALE = [
    {"rollouts.sync_every": 3},
    {"rollouts.delay": 2},
    {"rollouts.replay": {"size": 6, "share": 0.25}, "rollouts.sync_every": 2, "rollouts.delay": 1},
]


@pytest.mark.parametrize(
    ("changes", "peft"),
    [*((changes, None) for changes in ({}, *STALE)), (STALE[2], {"type": "lora", "r": 4})],
    ids=["fresh", "sync_every", "delay", "all", "all-lora"],
)
def test_a_checkpoint_within_a_rollout_resumes_bit_for_bit(changes, peft, load, tmp_path):
    method = {"name": "grpo", "updates_per_rollout": 3, "beta": 0.1}
    changes = {**changes, "model.peft": peft, "training.save_steps": 4, "data.prompts.size": 10}
    whole = train(load(method, {**changes, "training.max_steps": 11, "output": str(tmp_path / "whole")})).run_dir
    parts = {**changes, "output": str(tmp_path / "parts")}
    train(load(method, {**parts, "training.max_steps": 4}))
    assert (tmp_path / "parts" / "checkpoints" / "checkpoint-4" / OF_RANK.format(0, 1)).exists()
    resumed = train(load(method, {**parts, "training.max_steps": 11}), resume="auto").run_dir
    assert same(weights(whole), weights(resumed)) and metrics(whole) == metrics(resumed)
    assert (whole / "samples.jsonl").read_text() == (resumed / "samples.jsonl").read_text()


def test_files_are_written_only_where_there_is_something_to_remember(load, tmp_path):
    for name, method, changes in (
        ("grpo", {"name": "grpo"}, {}),
        ("chord", CHORD, {}),
        ("last update", {"name": "grpo", "updates_per_rollout": 2}, {}),
        ("lagging", {"name": "grpo"}, {"rollouts.sync_every": 2}),
    ):
        out = {"output": str(tmp_path / name), "training.save_steps": 2, "training.max_steps": 2}
        run = train(load(method, {**changes, **out})).run_dir
        found = {path.name for path in (run / "checkpoints" / "checkpoint-2").glob("rollouts-*")}
        assert found == ({SHARED} if name == "lagging" else set())


def test_rollouts_of_other_ranks_are_not_resumed_from(load, tmp_path):
    changes = {"rollouts.delay": 1, "training.save_steps": 2, "training.max_steps": 2}
    run = train(load({"name": "grpo"}, changes)).run_dir
    folder = tmp_path / "two"
    folder.mkdir()
    (run / "checkpoints" / "checkpoint-2" / OF_RANK.format(0, 1)).rename(folder / OF_RANK.format(0, 2))
    with pytest.raises(StateError, match="as many ranks as before"):
        load_of_rank(folder, rank=0, world=1)


def test_a_lag_that_is_allowed_on_resuming_begins_with_the_weights_as_they_are(load, tmp_path):
    changes = {"training.save_steps": 1, "output": str(tmp_path / "run")}
    train(load({"name": "grpo"}, {**changes, "training.max_steps": 1}))
    later = load({"name": "grpo"}, {**changes, "training.max_steps": 5, "rollouts.sync_every": 3})
    run = train(later, resume="auto", allow_changed=["rollouts.sync_every"]).run_dir
    assert [row.get("rollout_age") for row in metrics(run)] == [None, 0, 1, 0, 1]


def test_a_method_may_ask_for_the_log_probs_of_the_sampling_policy(shell, monkeypatch):
    from posttrain.methods.grpo import GRPO

    plain = shell({"name": "grpo"}).step_batches(0)
    assert all("old_logps" not in tensors for tensors in plain)
    needs = GRPO.needs.fget
    monkeypatch.setattr(GRPO, "needs", property(lambda self: replace(needs(self), old_logps=True)))
    for tensors in shell({"name": "grpo"}).step_batches(0):
        assert (tensors["old_logps"] - tensors["behaviour_logps"]).mul(tensors["mask"]).abs().max() < 1e-5


def test_a_signal_stops_within_a_rollout(load, monkeypatch):
    original = OnlineShell.compute_loss

    def interrupted(self, *arguments, **named):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **named)

    monkeypatch.setattr(OnlineShell, "compute_loss", interrupted)
    recipe = load({"name": "grpo", "updates_per_rollout": 3}, {"training.max_steps": 9})
    stopped = train(recipe)
    assert stopped.stopped and stopped.steps == 4
    monkeypatch.undo()
    assert train(recipe, resume="auto").steps == 9


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollouts.replay": {"size": 4, "share": 0.05}}, "nearest: share 0.25"),
        ({"rollouts.replay": {"size": 1, "share": 0.5}}, "raise size to at least 2"),
    ],
)
def test_a_replay_share_that_does_not_divide_is_refused(changes, says, load):
    with pytest.raises(BatchError) as caught:
        train(load({"name": "grpo"}, changes))
    assert says in str(caught.value)


# -------------------------------------------------------------------------------------------------------- two ranks


TWO_RANKS = {
    "stale": (
        {"name": "grpo", "updates_per_rollout": 2, "beta": 0.1},
        {"rollouts.replay": {"size": 6, "share": 0.5}, "rollouts.sync_every": 2, "rollouts.delay": 1},
    ),
    "red": ({"name": "red", "expert_rows_per_step": 4, "updates_per_rollout": 2}, {}),
    "chord": (CHORD | {"mu_valley": 0.2, "updates_per_rollout": 2}, {}),
    "prefixrl": ({"name": "prefixrl", "adapt": "success", "updates_per_rollout": 2}, {}),
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one_and_resume_within_a_rollout(tiny_model, make_recipe_data, load, tmp_path):
    changes = {**DESCENT, "batch.micro_batch": 4, "training.save_steps": 3, "data.prompts.size": 10}
    recipes: dict = {}
    launches: dict = {3: [], 7: []}
    for name, (method, more) in TWO_RANKS.items():
        recipes[name] = method, {**changes, **more}
        for steps, paths in launches.items():
            settings = {**recipes[name][1], "training.max_steps": steps, "output": str(tmp_path / name)}
            paths.append(tmp_path / f"{name}-{steps}.yaml")
            paths[-1].write_text(yaml.safe_dump(make_recipe_data(tiny_model, tmp_path, method, settings)))
    for paths in launches.values():
        launched = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
            + [str(CONTRACTS / "train_recipes.py"), *map(str, paths)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "RESUME": "auto"},
        )
        assert launched.returncode == 0, launched.stdout + launched.stderr
    for name, (method, settings) in recipes.items():
        found = {path.name for path in (tmp_path / name / "checkpoints" / "checkpoint-3").glob("rollouts-rank*")}
        assert found == {OF_RANK.format(0, 2), OF_RANK.format(1, 2)}
        alone = train(load(method, {**settings, "training.max_steps": 7, "output": str(tmp_path / f"{name}-alone")}))
        one, two = weights(alone.run_dir), weights(tmp_path / name)
        assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5
        for single, double in zip(metrics(alone.run_dir), metrics(tmp_path / name), strict=True):
            assert set(single) == set(double)
            assert all(double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5) for key in single)
