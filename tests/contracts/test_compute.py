"""What runs of all methods are charged, against a count by hand: passes x tokens x parameters.

The passes stand in a table, made from the methods' formulas; the tokens are those of the batches that the shells made;
the parameters are counted from the shape of the tiny model. Every registered method must have a row.
"""

import dataclasses
import json
from collections import Counter

import pytest
from transformers import AutoConfig

from posttrain.methods import METHODS
from posttrain.methods.base import ContrastMethod
from posttrain.methods.companions import ValueHeads
from posttrain.tracking.ledger import spent_in_words
from posttrain.trainers import step_ratios
from posttrain.trainers.run import train
from posttrain.trainers.shell import Shell
from posttrain.trainers.writer import WritingModel


@dataclasses.dataclass(frozen=True)
class Passes:
    """Forward passes without gradient, over the tokens of the rollouts of each window unless it says otherwise.

    Attributes:
        policy, reference, scorer: by these models; `policy` for old log-probs.
        critic: for old values.
        rows: by the reference, over fixed rows before the first step: those that the steps use, or all.
        drawn: by policy and by reference, over completions drawn in every step.
        each, each_by_scorer, each_by_critic: by the reference, by the scorer, by a critic that follows, over every
            trained row in every step.
        told: the model that scores the self-teacher's rows in every step; empty without one.
        own: by the policy, over every trained row in every step.
        mismatched: by policy and by reference, over the rows of a step with each other's completions.
        masks: whether a mask model of the policy's size follows sampling, scoring and training.
        mixes: whether the policy follows what the writer samples.
    """

    policy: int = 0
    reference: int = 0
    scorer: int = 0
    critic: int = 0
    rows: str = ""
    drawn: int = 0
    each: int = 0
    each_by_scorer: int = 0
    each_by_critic: int = 0
    told: str = ""
    own: int = 0
    mismatched: int = 0
    masks: bool = False
    mixes: bool = False


PPO = Passes(policy=1, reference=1, critic=1)
ROWS = Passes(rows="used")
TABLE = {
    "sft": [({}, Passes())],
    "grpo": [
        ({"beta": 0.1}, Passes(reference=1)),
        ({"updates_per_rollout": 2}, Passes(policy=1)),
        ({"terms": {"outcome": {}, "teacher": {"path": "GUIDE"}}}, Passes(scorer=1)),
        ({"clip_cov": 0.1}, Passes(policy=1)),
    ],
    "lite_ppo": [({}, Passes())],
    "chord": [({"expert_rows_per_step": 2, "updates_per_rollout": 2, "beta": 0.1}, Passes(policy=1, reference=1))],
    "red": [({"expert_rows_per_step": 4}, Passes())],
    "prefixrl": [({"answer_pattern": "#"}, Passes()), ({"terms": {"teacher": {"path": "GUIDE"}}}, Passes(scorer=1))],
    "rec": [({"updates_per_rollout": 2}, Passes(policy=1))],
    "a_star_po": [({}, Passes(reference=1))],
    "sdft": [
        ({"template": "{context};{prompt}", "teacher": "start", "context": "reference"}, Passes(told="reference")),
        ({"template": "{context};{prompt}"}, Passes(told="policy")),
    ],
    "opmd": [({"divergence": "sequence"}, Passes())],
    "asymre": [({}, Passes())],
    "opd": [
        ({"teacher": "GUIDE"}, Passes(scorer=1)),
        (
            {"teacher": "GUIDE", "objective": "full", "on_policy_share": 0.5, "expert_rows_per_step": 2},
            Passes(each_by_scorer=1),
        ),
    ],
    "ui_s1": [({"filter_std": 0.0}, Passes(reference=1))],
    "ldc": [({"controllers": {"1": [0.0, 1.0]}}, Passes())],
    "rlsp": [({}, Passes())],
    "dpo": [({}, ROWS)],
    "simpo": [({}, Passes())],
    "hypo": [({"lam": 0.05}, Passes(rows="used", drawn=1))],
    "curry_dpo": [({}, ROWS)],
    "asft": [({}, Passes())],
    "tpo": [({}, Passes())],
    "cpl": [({}, Passes())],
    "srpo": [({}, ROWS)],
    "brain": [({"n": 3}, ROWS)],
    "a_lol": [({}, ROWS)],
    "oreo": [
        ({"level": "step", "delimiter": ";", "kl_reg": 0.5}, Passes(rows="all", each=1)),
        ({"unbiased_kl": False}, Passes(rows="all")),
    ],
    "digirl": [({"actor_freeze_steps": 0}, Passes())],
    "archer": [
        ({"actor_freeze_steps": 0}, Passes(each_by_critic=1)),
        ({"actor_freeze_steps": 0, "actions": "recorded"}, Passes(each_by_critic=1)),
    ],
    "dapo_step": [
        ({"delimiter": ";"}, Passes(rows="all")),
        ({"delimiter": ";", "phase": "critic"}, Passes()),
    ],
    "ppo": [
        ({}, PPO),
        ({"epochs": 2, "minibatches": 2}, PPO),
        ({"kl_coef": 0.0}, Passes(policy=1, critic=1)),
    ],
    "rto": [({"dpo_model": "GUIDE"}, Passes(policy=1, reference=1, critic=1, scorer=1))],
    "drpo": [({}, PPO), ({"optimizer": "group", "epochs": 2}, Passes(policy=1, reference=1))],
    "rlgf": [
        ({"expert_rows_per_step": 4}, PPO),
        ({"variant": "lols", "ppo_pp_share": 0.5, "guide_model": "GUIDE"}, PPO),
    ],
    "sophia": [
        ({"reasoner": "GUIDE", "reasonings": 2, "right": 0.5, "alpha_c": 0.0, "template": "{prompt}{answer}"}, Passes())
    ],
    "nlpo": [({"top_p": 0.6, "min_tokens_to_keep": 2}, Passes(policy=1, reference=1, critic=1, masks=True))],
    "kto": [({}, Passes(rows="used", mismatched=1))],
    "bco": [({}, Passes(rows="used", own=1))],
    "orpo": [({}, Passes())],
    "online_dpo": [({}, Passes(policy=1, reference=1))],
    "xpo": [({}, Passes(policy=1, reference=1))],
    "nash_md": [({}, Passes(policy=1, reference=1, mixes=True))],
    "salmon": [
        (
            {"principles": {"long": {"text": "1", "negative": "2"}}, "template": "{principles}={prompt}"},
            Passes(),
        )
    ],
    "reward": [({}, Passes())],
    "prm": [({"separator": ";"}, Passes())],
}
CASES = [({"name": name, **keys}, passes) for name, rows in TABLE.items() for keys, passes in rows]
LORA = {"model.peft.r": 4, "model.peft.target_modules": ["q_proj"]}


def test_every_method_is_counted():
    assert set(TABLE) == set(METHODS)


@dataclasses.dataclass
class Batches:
    """Tokens of what the shells trained on; `rollouts` once for each window."""

    shell: Shell | None = None
    trained: int = 0
    rollouts: int = 0
    drawn: int = 0
    policy_wrote: int = 0
    told: int = 0
    mismatched: int = 0
    written_for: int = 0


@pytest.fixture
def batches(monkeypatch):
    found, real, other_rows = Batches(), Shell.get_batch_samples, step_ratios.mismatched

    def paired(rows, limit):
        made = other_rows(rows, limit)
        found.mismatched += sum(len((other or row).ids) for row, other in zip(rows, made, strict=True))
        return made

    def counted(shell, *args):
        made = real(shell, *args)
        found.shell, update = shell, shell.state.global_step % shell.method.updates_per_rollout
        first = update < shell.method.needs.minibatches
        for inputs in shell.step_inputs:
            tokens = int(inputs["attention_mask"].sum())
            found.trained += tokens
            if "told_attention_mask" in inputs:
                found.told += int(inputs["told_attention_mask"].sum())
            if "samples/attention_mask" in inputs:
                found.trained += int(inputs["samples/attention_mask"].sum())
                found.drawn += int(inputs["samples/attention_mask"].sum())
            if first and not ("expert" in inputs and bool(inputs["expert"].any())):
                found.rollouts += tokens
                found.policy_wrote += int(inputs["mask"].sum())
        return made

    real_end = WritingModel.end

    def ended(writer, *args, **kwargs):
        made, spent = real_end(writer, *args, **kwargs)
        found.written_for += spent.read + spent.sampled
        return made, spent

    monkeypatch.setattr(WritingModel, "end", ended)
    monkeypatch.setattr(Shell, "get_batch_samples", counted)
    monkeypatch.setattr(step_ratios, "mismatched", paired)
    return found


def parameters(folder, *, lora=0):
    """Trunk and output of the tiny Llama, matrix by matrix; `lora` low-rank columns on the query projections."""
    c = AutoConfig.from_pretrained(folder)
    kv = c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    layer = 2 * c.hidden_size**2 + 2 * c.hidden_size * kv + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    trunk = c.num_hidden_layers * layer + c.hidden_size
    low_rank = c.num_hidden_layers * 2 * lora * c.hidden_size
    return trunk + low_rank, c.vocab_size * c.hidden_size, low_rank, c.hidden_size


def reference_rows(shell, which):
    """Tokens of the fixed rows that the reference scored."""
    if which == "all":
        return sum(len(row.sample.ids) for row in shell.rows)
    found, seen = 0, set()
    for step in range(shell.parts.plan.max_steps):
        stage = shell.order.stage(step)
        for row in shell.order.items(step):
            # A refreshed reference scores the rows of its stage anew.
            key = (stage if shell.method.refresh_reference else 0, row)
            if key not in seen:
                seen.add(key)
                found += sum(len(sample.ids) for sample in shell.rows[row].responses.values())
    return found


def totals(result):
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "flops_total" in line][-1]


@pytest.mark.parametrize(("method", "passes"), CASES, ids=["-".join(map(str, row.values())) for row, _ in CASES])
def test_a_run_is_charged_for_its_passes(method, passes, load, tiny_model, batches):
    spent = totals(train(load(method, {"training.max_steps": 2})))
    trunk, output, _, hidden = parameters(tiny_model)
    several = batches.shell.method.needs.companion(ValueHeads)
    heads = 1 if several is None else several.number
    policy, critic = trunk + output, trunk + heads * hidden
    if METHODS[method["name"]].shell == "reward" or batches.shell.method.needs.classifier:
        policy = trunk + hidden  # one score in place of the vocabulary
    scored = Counter(policy=passes.policy, reference=passes.reference, scorer=passes.scorer)
    scored = {role: n * batches.rollouts for role, n in scored.items()}
    scored["policy"] += passes.drawn * batches.drawn
    scored["reference"] += passes.drawn * batches.drawn + passes.each * batches.trained
    scored["scorer"] += passes.each_by_scorer * batches.trained
    scored["policy"] += passes.mixes * batches.written_for
    scored["policy"] += passes.own * batches.trained + passes.mismatched * batches.mismatched
    scored["reference"] += passes.mismatched * batches.mismatched
    if passes.told:
        scored[passes.told] += batches.told
    if passes.rows:
        scored["reference"] += reference_rows(batches.shell, passes.rows)
    written = spent["tokens_prompt_total"] + spent["tokens_sampled_total"]
    if passes.masks:
        scored["policy"] += written + 2 * batches.rollouts + batches.trained
    expected = 2 * policy * (written + sum(scored.values()))
    trains = batches.shell.method.needs.trains
    of_critic = passes.critic * batches.rollouts + passes.each_by_critic * batches.trained
    tokens = sum(scored.values()) + of_critic
    if trains == "critic":  # the policy stays as it is, and gives no gradient
        expected += 2 * policy * batches.trained
        tokens += batches.trained
    else:
        expected += 6 * policy * batches.trained
    if batches.shell.method.needs.critic:
        expected += 2 * critic * of_critic
        expected += (2 if trains == "policy" else 6) * critic * batches.trained
        tokens += batches.trained if trains == "policy" else 0
    assert spent["flops_total"] == expected
    assert spent["tokens_trained_total"] == batches.trained
    assert spent["tokens_scored_total"] == tokens
    # Masks are empty where another model wrote, where a completion is in no pair, or a group is left out.
    partly = {"guide_model", "filter_std", "reasoner"} & set(method) or issubclass(
        METHODS[method["name"]], ContrastMethod
    )
    if METHODS[method["name"]].shell == "online" and not partly:
        assert spent["tokens_sampled_total"] == batches.policy_wrote


def test_a_critic_on_the_policys_trunk_is_one_model_and_a_head(load, tiny_model, batches, capsys):
    spent = totals(train(load({"name": "ppo"}, {"training.max_steps": 2, "critic.trunk": "shared"})))
    trunk, output, _, hidden = parameters(tiny_model)
    policy, head = trunk + output, hidden
    written = spent["tokens_prompt_total"] + spent["tokens_sampled_total"]
    # Old log-probs with values, and the reference, over the rollouts; forward and backward over what is trained.
    expected = 2 * policy * written + 2 * (policy + head + policy) * batches.rollouts
    assert spent["flops_total"] == expected + 6 * (policy + head) * batches.trained
    assert spent["tokens_scored_total"] == 2 * batches.rollouts
    # Beside FLOPs the run says tokens and seconds.
    in_all = {name.removesuffix("_total"): amount for name, amount in spent.items() if name.endswith("_total")}
    assert f"spent: {spent_in_words(in_all)}" in capsys.readouterr().out


def test_an_adapter_is_trained_without_gradients_of_frozen_weights(load, tiny_model, batches):
    method = {"name": "ppo", "kl_coef": 0.1}
    spent = totals(train(load(method, {"training.max_steps": 2, **LORA})))
    base, output, _, hidden = parameters(tiny_model)
    trunk, _, low_rank, _ = parameters(tiny_model, lora=4)
    policy, reference, critic = trunk + output, base + output, trunk + hidden
    written = spent["tokens_prompt_total"] + spent["tokens_sampled_total"]
    expected = 2 * policy * written + 2 * (policy + critic + reference) * batches.rollouts
    forward_and_through = 4 * (policy + critic)
    assert (
        spent["flops_total"] == expected + (forward_and_through + 2 * (low_rank + low_rank + hidden)) * batches.trained
    )
