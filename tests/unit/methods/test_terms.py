"""Terms that add up: sums, counts and clips by hand, schedules and rows, refusals, and a run with all of them."""

import json

import pytest
import torch
from pydantic import ValidationError

from posttrain.cli.check import check_recipe
from posttrain.contract.batches import scored
from posttrain.contract.recipes import write_critic, write_model
from posttrain.data.sample import Origin
from posttrain.errors import ModelError
from posttrain.methods.companions import SCORER_LOGPS, RowValues, Scorer
from posttrain.methods.grpo import GRPO, GRPOConfig
from posttrain.methods.prefixrl import PrefixRLConfig
from posttrain.methods.rlsp import RLSP, RLSPConfig
from posttrain.methods.terms import ROWS, SHAPING, TermConfig
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.exploration import entropy_advantages
from posttrain.objectives.process import step_progress
from posttrain.trainers.run import train

TEACHER = {"path": "teacher", "weight": 0.3}


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def grpo(terms, **parameters):
    return GRPO(GRPOConfig(terms=terms, aggregation="tokens", **({"scale_rewards": "none"} | parameters)))


def four_rows(**further):
    """Rows of 2, 1, 3 and 1 tokens with advantages of a half, and what a teacher says of their tokens."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
    says = t([[-0.1, 0.4, 9], [-0.3, 9, 9], [-2.5, 0.2, 0], [0.1, 9, 9]])
    logps = torch.zeros(4, 3, dtype=torch.float64).requires_grad_()
    further = {SCORER_LOGPS: says} | further
    return TokenBatch(mask, logps, entropies=logps.detach(), advantages=t([0.5, -0.5, -0.5, 0.5]), further=further)


@pytest.mark.parametrize(("clip", "first"), [(1.0, -0.65), (None, -1.1)])
def test_the_weighted_sum_of_bounded_signals(clip, first):
    method = grpo({"mix": "advantage", "outcome": {"weight": 0.7}, "teacher": {**TEACHER, "clip": clip}})
    batch = four_rows()
    part = method.loss(batch)["policy"]
    part.value.backward()
    expected = t([[0.32, 0.47, 0], [-0.44, 0, 0], [first, -0.29, -0.35], [0.38, 0, 0]])
    torch.testing.assert_close(-batch.logps.grad, expected)
    assert int(part.count) == 7
    clipped, tokens = part.diagnostics["terms/teacher_clipped"]
    assert (int(clipped), int(tokens)) == (int(clip is not None), 7)


def test_each_term_is_over_its_own_rows_and_their_count():
    terms = {"outcome": {"weight": 0.7}, "teacher": {**TEACHER, "clip": 1.0, "rows": "whole"}}
    three = {ROWS + "teacher": t([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])}
    apart = grpo(terms).loss(four_rows(**three))
    counts = grpo(terms).counts(four_rows(**three))
    assert {name: int(part.count) for name, part in apart.items()} == {"outcome": 7, "teacher": 6}
    assert {name: int(n) for name, n in counts.items()} == {"outcome": 7, "teacher": 6}
    assert sum(part.value / part.count for part in apart.values()).item() == pytest.approx(0.09)
    assert [float(n) for n in apart["teacher"].diagnostics["terms/teacher_rows"]] == [3, 4]
    together = grpo({"mix": "advantage", **terms}).loss(four_rows(**three))["policy"]
    assert (together.value / together.count).item() == pytest.approx(0.084285714286)


@pytest.mark.parametrize(("mix", "expected"), [("advantage", [0.75, 0.4]), ("loss", [0.9, 0.5])])
def test_one_clip_of_the_sum_is_another_loss_than_a_clip_for_each(mix, expected):
    method = grpo({"mix": mix, "outcome": {"weight": 0.5}, "teacher": {"path": "teacher", "weight": 0.5}})
    for ratio, value in zip((1.5, 0.6), expected, strict=True):
        old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
        given = {"old_logps": old, "advantages": t([1.0]), "further": {SCORER_LOGPS: old - 2}}
        terms = method.loss(TokenBatch(mask, t([[ratio]]).log(), **given))
        assert sum(part.value for part in terms.values()).item() == pytest.approx(value)


def test_both_ways_agree_where_masks_coincide_and_nothing_is_clipped():
    terms = {"outcome": {"weight": 0.7}, "teacher": TEACHER, "entropy": {"weight": 0.1}}
    grads = []
    for mix in ("loss", "advantage"):
        batch = four_rows()
        sum(part.value / part.count for part in grpo({"mix": mix, **terms}).loss(batch).values()).backward()
        grads.append(batch.logps.grad)
    torch.testing.assert_close(*grads)


def test_the_outcome_alone_is_grpo():
    plain, alone = four_rows(), four_rows()
    GRPO(GRPOConfig(aggregation="tokens")).loss(plain)["policy"].value.backward()
    grpo({"outcome": {}}).loss(alone)["outcome"].value.backward()
    torch.testing.assert_close(alone.logps.grad, plain.logps.grad)


def test_beside_several_terms_the_kl_has_a_count_of_its_own():
    batch = four_rows(**{ROWS + "teacher": torch.zeros(4, 3)})
    batch = TokenBatch(batch.mask, batch.logps, None, None, batch.logps.detach() - 0.5, batch.advantages, 3)
    parts = grpo({"outcome": {"rows": "wrong"}}, beta=0.1).loss(batch)
    assert {name: int(part.count) for name, part in parts.items()} == {"outcome": 7, "kl": 7}
    assert parts["kl"].value.item() == pytest.approx(0.1 * 7 * (torch.tensor(-0.5).exp().item() - 0.5))


def test_the_policy_gradient_of_the_entropy_signal_is_that_of_the_entropy():
    """Summed over all tokens by their probability; the last line is -q (log q + H) by hand."""
    logits = t([0.4, 1.2, -0.3]).requires_grad_()
    logps = logits.log_softmax(0)
    entropy = -(logps.exp() * logps).sum()
    assert entropy.item() == pytest.approx(0.929347615179)
    signal = entropy_advantages(logps, entropy)
    assert (logps.exp() * signal).sum().item() == pytest.approx(0, abs=1e-12)
    (logps.exp().detach() * signal * logps).sum().backward()
    torch.testing.assert_close(logits.grad, t([0.10342138703, -0.248169020298, 0.144747633269]), rtol=0, atol=1e-11)


def test_shaping_stands_beside_the_outcome_as_rlsp_mixes_it():
    rows = scored()
    method = grpo({"outcome": {"weight": 0.7}, "shaping": {"weight": 0.3}})
    parts = 0.7 * method.advantages(rows) + 0.3 * method.shaping(rows)
    mixed = RLSP(RLSPConfig(alpha=0.7, no_answer=0.0, scale_rewards="none")).advantages(rows)
    torch.testing.assert_close(parts, mixed)


def test_what_steps_have_changed():
    assert step_progress([0.6, 0.5, 1.0], [0, 1, 1, 2], 0.4) == pytest.approx([0.2, -0.1, -0.1, 0.5])
    assert step_progress([0.9], [0, 0, 1], 1.0) == pytest.approx([-0.1, -0.1, 0.0])
    assert step_progress([], [0, 0], 1.0) == [0.0, 0.0]


def test_weights_follow_their_schedule():
    term = TermConfig(start_weight=1.0, weight=0.2, decay_steps=10)
    assert [term.at(step) for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert TermConfig(weight=0.4).at(3) == 0.4
    method = grpo({"outcome": {}, "teacher": {"path": "t", "start_weight": 1.0, "weight": 0.0, "decay_steps": 2}})
    method.begin_step(2)
    assert method.loss(four_rows())["teacher"].value.item() == 0


def test_rows_are_chosen_by_verdict_and_by_start():
    rows = scored()
    kinds = (Origin.PREFIX,) * 4 + (Origin.POLICY,) * 4
    rows = type(rows)(**{name: getattr(rows, name) for name in rows.__slots__} | {"kinds": kinds})
    terms = {"outcome": {"rows": "whole"}, "teacher": {**TEACHER, "rows": "right"}, "entropy": {"rows": "prefixed"}}
    values = grpo(terms).needs.companion(RowValues).of(rows)
    right = rows.known & (rows.outcomes == 1)
    assert values[ROWS + "teacher"].bool().tolist() == right.tolist() and right.any()
    assert values[ROWS + "outcome"].tolist() == [0.0] * 4 + [1.0] * 4
    assert values[ROWS + "entropy"].tolist() == [1.0] * 4 + [0.0] * 4


def test_what_is_needed_follows_from_the_signals():
    needs = GRPO(GRPOConfig(terms={"teacher": TEACHER})).needs
    assert not needs.verifier and needs.min_samples_per_prompt == 1
    assert needs.companion(Scorer).path == "teacher"
    assert GRPO(GRPOConfig(terms={"teacher": {**TEACHER, "rows": "wrong"}})).needs.verifier
    assert grpo({"outcome": {}, "shaping": {}}).needs.companion(RowValues).names == (SHAPING,)


@pytest.mark.parametrize(
    ("config", "terms", "more", "says"),
    [
        (GRPOConfig, {}, {}, "at least one of"),
        (GRPOConfig, {"outcome": {"start_weight": 1.0}}, {}, "go together"),
        (GRPOConfig, {"outcome": {"weight": -1.0}}, {}, "greater than or equal to 0"),
        (GRPOConfig, {"teacher": TEACHER}, {"scale_rewards": "none"}, "scale_rewards has no effect"),
        (GRPOConfig, {"shaping": {}}, {"credit": "turn"}, "whole completions"),
        (RLSPConfig, {"outcome": {}, "shaping": {}}, {}, "alpha mixes"),
        (PrefixRLConfig, {"teacher": TEACHER}, {"adapt": "success"}, "add terms.outcome"),
    ],
)
def test_terms_without_an_effect_are_refused(config, terms, more, says):
    with pytest.raises(ValidationError, match=says):
        config(terms=terms, **more)


def test_a_run_with_all_signals_logs_each(load, tmp_path):
    judge = write_critic(tmp_path / "prm", write_model(tmp_path / "start", seed=3))
    terms = {
        "outcome": {},
        "shaping": {"weight": 0.5},
        "teacher": {"path": "GUIDE", "start_weight": 1.0, "weight": 0.1, "decay_steps": 2, "rows": "wrong"},
        "process": {"path": str(judge), "separator": ";", "weight": 0.2},
        "entropy": {"weight": 0.01},
    }
    run = train(load({"name": "grpo", "terms": terms}, {"training.max_steps": 2})).run_dir
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [row for row in rows if "loss" in row]
    assert [row["terms/teacher_weight"] for row in logged] == pytest.approx([1.0, 0.55])
    for signal in terms:
        assert {f"terms/{signal}_size", f"terms/{signal}_rows"} <= set(logged[0])
    assert logged[0]["terms/process_size"] > 0 and logged[0]["terms/process_unscored"] < 1
    assert logged[0]["terms/teacher_rows"] == pytest.approx(1 - logged[0]["accuracy"])


def test_a_process_reward_model_that_is_none_is_named_before_anything_is_sampled(load, write_recipe, tmp_path):
    method = {"name": "grpo", "terms": {"process": {"path": str(tmp_path / "none")}}}
    with pytest.raises(ModelError, match="cannot load"):
        train(load(method, {}))
    with pytest.raises(ModelError, match="no model folder") as raised:
        check_recipe(write_recipe(method, {}), [], online=False, world_size=1)
    assert raised.value.where == "method.terms.process.path"


def test_a_teacher_grades_what_is_written_behind_replayed_prefixes(load):
    """Of every row; the prefix is no part of the loss, nothing is judged and nothing compared."""
    method = {
        "name": "prefixrl",
        "prefixed_share": 1.0,
        "aggregation": "tokens",
        "terms": {"teacher": {"path": "GUIDE"}},
    }
    changes = {"training.max_steps": 1, "rollouts.samples_per_prompt": 1, "batch.micro_batch": 4}
    run = train(load(method, changes)).run_dir
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["prefix_length"] > 0
    assert row["terms/teacher_rows"] == 1 and row["terms/teacher_size"] > 0
    assert "accuracy" not in row
