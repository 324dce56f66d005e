"""OPD: the loss against hand-computed values, its two terms, what it refuses, and runs without a verifier."""

import json

import pytest
import torch
from pydantic import ValidationError

from posttrain.cli.check import check_recipe
from posttrain.config.preflight import check_needs
from posttrain.config.schema import ModelConfig
from posttrain.contract.recipes import write_model
from posttrain.errors import ModelError, NeedsError
from posttrain.methods.companions import DIVERGENCE, SCORER_LOGPS
from posttrain.methods.opd import OPD, OPDConfig
from posttrain.models.loading import load_policy
from posttrain.objectives.batch import TokenBatch
from posttrain.trainers.run import train

S, TEACHER, OLD = [-0.5, -2.0, -0.1], [-0.3, -0.5, -3.0], [-0.6, -1.9, -0.1]


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def opd(**parameters):
    return OPD(OPDConfig(teacher="teacher", **parameters))


def batch(logps, **further):
    mask = torch.ones(1, 3, dtype=torch.bool)
    made = {"old_logps": t([OLD]), "further": {SCORER_LOGPS: t([TEACHER])}, "advantages": t([0.0])}
    return TokenBatch(mask, logps, **(made | further))


def test_the_policy_gradient_form():
    logps = t([S]).requires_grad_()
    term = opd().loss(batch(logps))["policy"]
    assert (term.value.item(), int(term.count)) == (pytest.approx(1.301676339327, abs=1e-11), 3)
    term.value.backward()
    torch.testing.assert_close(logps.grad, t([[-0.331551275423, -1.266772385250, 2.9]]), rtol=0, atol=1e-11)


def test_without_old_logps_the_loss_is_the_mean_log_ratio():
    logps = t([S]).requires_grad_()
    term = opd().loss(batch(logps, old_logps=None))["policy"]
    assert term.value.item() == pytest.approx(sum(S) - sum(TEACHER))
    term.value.backward()
    torch.testing.assert_close(logps.grad, t([S]) - t([TEACHER]))


def test_the_outcome_is_added_to_the_teachers_word_before_one_ratio():
    logps = t([OLD]).requires_grad_()
    advantages = opd(coef=0.5, outcome_coef=2.0, epsilon=0.2).loss(batch(logps, advantages=t([0.3])))["policy"]
    advantages.value.backward()
    torch.testing.assert_close(-logps.grad, 0.3 + 0.5 * (t([TEACHER]) - t([OLD])))


def test_traces_are_a_term_of_their_own_with_their_own_count():
    method = opd(objective="full", beta=0.5, on_policy_share=0.25, expert_rows_per_step=1, coef=2.0)
    apart = t([[0.1, 0.2, 0.3], [0.5, 0.7, 9.0]]).requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    given = {"advantages": torch.zeros(2), "further": {DIVERGENCE: apart}}
    both = TokenBatch(mask, torch.zeros(2, 3, dtype=torch.float64), **given)
    terms = method.loss(TokenBatch(**{**{f: getattr(both, f) for f in both.__slots__}, "expert": t([0, 1]).bool()}))
    assert {name: (term.value.item(), int(term.count)) for name, term in terms.items()} == {
        "policy": (pytest.approx(0.25 * 2 * 0.6), 3),
        "expert": (pytest.approx(0.75 * 2 * 1.2), 2),
    }


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"beta": 0.5}, "beta has no effect with objective policy_gradient"),
        ({"objective": "full", "discount": 1.0}, "discount has no effect with objective full"),
        ({"objective": "full", "top_k": 8}, "top_k has no effect with objective full"),
        ({"objective": "full", "epsilon": 0.2}, "epsilon has no effect"),
        ({"on_policy_share": 0.5}, "go together"),
        ({"objective": "full", "expert_rows_per_step": 2}, "go together"),
        ({"on_policy_share": 0.5, "expert_rows_per_step": 2}, "a trace is no sample of the policy"),
        ({"objective": "full", "on_policy_share": 0.0}, "greater than 0"),
    ],
)
def test_parameters_without_an_effect_are_refused(parameters, says):
    with pytest.raises(ValidationError, match=says):
        OPDConfig(teacher="teacher", **parameters)


def test_a_verifier_is_for_a_task_reward(load):
    recipe = load({"name": "opd", "teacher": "GUIDE"}, {"verifier": [{"type": "procedural"}]})
    with pytest.raises(NeedsError, match="opd takes no reward"):
        check_needs(recipe, OPD(recipe.method).needs, "opd")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_comes_near_the_teacher_without_a_verifier(load, tmp_path):
    """Of a random student and a random teacher, which nobody judges; the numbers of judged rollouts are not logged."""
    write_model(tmp_path / "teacher", seed=7)
    method, changes = {"name": "opd", "objective": "full"}, {"method.teacher": str(tmp_path / "teacher")}
    run = train(load(method, {**changes, "training.max_steps": 12, "training.learning_rate": 0.01})).run_dir
    rows = [row for row in metrics(run) if "loss" in row]
    assert rows[-1]["teacher/divergence"] < 0.5 * rows[0]["teacher/divergence"]
    assert not {"reward", "accuracy", "reward_std", "unknown_share"} & set(rows[0])
    assert rows[0]["completion_length"] > 0


def test_a_teacher_with_other_weights_of_the_same_shape_is_read(load, tmp_path):
    """The first step's loss is the mean log-ratio of student to teacher; to the student itself it is 0."""
    student = write_model(tmp_path / "student", seed=0)
    one = {"training.max_steps": 1}
    own = train(load({"name": "opd"}, {**one, "method.teacher": str(student)})).run_dir
    assert metrics(own)[0]["loss"] == pytest.approx(0, abs=1e-6)
    other = write_model(tmp_path / "teacher", seed=7)
    run = train(load({"name": "opd"}, {**one, "method.teacher": str(other), "output": str(tmp_path / "b")}))
    assert metrics(run.run_dir)[0]["teacher/kl"] > 1e-4


def test_a_teacher_with_more_padding_behind_the_same_vocabulary_is_taken(load, tmp_path):
    teacher, tokenizer = load_policy(ModelConfig(path=str(write_model(tmp_path / "t", seed=7))), seed=0)
    method, one = {"name": "opd", "objective": "full"}, {"training.max_steps": 1}
    plain = train(load(method, {**one, "method.teacher": str(tmp_path / "t")}))
    rows = teacher.get_input_embeddings().num_embeddings
    teacher.resize_token_embeddings(rows + 5)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[rows:] = 0.3
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "padded")
    changes = {"method.teacher": str(tmp_path / "padded"), "output": str(tmp_path / "b")}
    padded = train(load(method, {**one, **changes}))
    assert metrics(padded.run_dir)[0]["loss"] == pytest.approx(metrics(plain.run_dir)[0]["loss"], rel=1e-5)


def test_a_teacher_that_is_not_there_is_named_by_its_key(load, write_recipe, tmp_path):
    changes = {"method.teacher": str(tmp_path / "away" / "model")}
    for run in (
        lambda: train(load({"name": "opd"}, changes)),
        lambda: check_recipe(write_recipe({"name": "opd"}, changes), [], online=False, world_size=1),
    ):
        with pytest.raises(ModelError, match="no model folder") as raised:
            run()
        assert raised.value.where == "method.teacher"


def test_a_teacher_with_another_vocabulary_is_refused(load, write_recipe, tmp_path):
    """Of the same size."""
    init = {"hidden_size": 16, "layers": 1, "heads": 2}
    init |= {"tokenizer": {"type": "characters", "alphabet": "0123456789+=;*"}}
    for part in load_policy(ModelConfig(init=init), seed=0):
        part.save_pretrained(tmp_path / "other")
    changes = {"method.teacher": str(tmp_path / "other")}
    says = r"the teacher has another vocabulary.* 1 of \d+ ids differ.*'#' here.*'\*' there"
    with pytest.raises(ModelError, match=says):
        train(load({"name": "opd"}, changes))
    with pytest.raises(ModelError, match=says):  # without loading a model
        check_recipe(write_recipe({"name": "opd"}, changes), [], online=False, world_size=1)
