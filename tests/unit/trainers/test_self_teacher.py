"""The policy as its own teacher: what it is told, where its word goes, and with which weights."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Problem
from posttrain.errors import NeedsError
from posttrain.methods.companions import Attempt
from posttrain.methods.sdft import SDFT, SDFTConfig, filled
from posttrain.models import saving
from posttrain.models.loading import DTYPES
from posttrain.objectives.next_token import generalised_jsd
from posttrain.trainers.run import train
from posttrain.trainers.self_teacher import OwnTeacher
from posttrain.trainers.stale import LaggingPolicy

TEMPLATE = "{context};{prompt}"


def told(problem, traces=(), group=(), **parameters):
    method = SDFT(SDFTConfig(template="{prompt}|{context}", **parameters))
    method._text = lambda ids: "".join(map(str, ids))
    return method.told(problem, traces, group)


def test_what_the_teacher_is_told():
    problem = Problem("p/0", "q", reference="r")
    wrong, right = KnownTrace(problem, [0], [1, 2], [1, 1], 0.0), KnownTrace(problem, [0], [3, 4], [1, 1], 1.0)
    group = [Attempt("a", 1.0), Attempt("b", 0.0), Attempt("c", 1.0), Attempt("d", None)]
    assert told(problem, [wrong, right], group) == ["q|34"] * 4
    assert told(problem, [wrong], group) == [None] * 4
    assert told(problem, (), group, context="reference") == ["q|r"] * 4
    assert told(problem, (), group, context="success") == ["q|c", "q|a", "q|a", "q|a"]  # no row its own answer
    assert told(problem, (), group, context="reference", taught="wrong") == [None, "q|r", None, None]
    assert told(problem, (), group, context="reference", taught="right") == ["q|r", None, "q|r", None]
    assert told(problem, (), group[1:2], context="success") == [None]


def test_of_a_chat_the_last_user_message_is_filled_in():
    chat = ({"role": "system", "content": "s"}, {"role": "user", "content": "q {context}"})
    assert filled("{prompt} / {context}", chat, "{prompt}") == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q {context} / {prompt}"},
    )


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"template": "{prompt}"}, "{context} is not there"),
        ({"teacher": "live", "average_rate": 0.1}, "average_rate has no effect with teacher live"),
        ({"discount": 1.0}, "discount has no effect with objective full"),
    ],
)
def test_parameters_without_an_effect_are_refused(parameters, says):
    with pytest.raises(ValidationError, match=says):
        SDFTConfig(**parameters)


def test_a_moving_average():
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    average, found = LaggingPolicy(lambda: [("w", weight)], 1), []
    average.follow(0.05)
    with torch.no_grad():
        weight.fill_(2.0)
    for _ in range(10):
        average.follow(0.05)
        found.append(average.weights["w"].item())
    assert [found[0], found[1], found[9]] == pytest.approx([1.05, 1.0975, 1.401263060762], abs=1e-11)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture
def seen(monkeypatch):
    """The rows of policy and teacher of each rollout."""
    rows, found = OwnTeacher.rows, []

    def watched(self, samples):
        found.append(rows(self, samples))
        return found[-1]

    monkeypatch.setattr(OwnTeacher, "rows", watched)
    return found


def by_whole_logits(policy, teacher, own, told, beta):
    """The mean divergence, from the models' own logits, one row at a time."""
    total = count = 0
    for one, other in zip(own, told, strict=True):
        places = [[t for t, kept in enumerate(sample.loss_mask) if kept] for sample in (one, other)]
        assert [one.ids[t] for t in places[0]] == [other.ids[t] for t in places[1]]
        with torch.no_grad():
            logps = [
                model(torch.tensor([sample.ids])).logits[0].log_softmax(-1)[[t - 1 for t in of]]
                for model, sample, of in zip((policy, teacher), (one, other), places, strict=True)
            ]
        total, count = total + generalised_jsd(*logps, beta).sum().item(), count + len(places[0])
    return total / count


@pytest.mark.parametrize("teacher", ["live", "start", "average"])
def test_its_word_is_that_of_the_same_tokens_behind_the_other_prompt(teacher, load, tiny_model, seen, monkeypatch):
    """In the second step, when the weights have moved: those of the start, of the policy, and halfway between."""
    monkeypatch.setitem(DTYPES, "float32", torch.float64)
    monkeypatch.setitem(saving.BYTES, "float64", 8)
    method = {"name": "sdft", "template": TEMPLATE, "teacher": teacher, "beta": 0.5, "skip_tokens": 2}
    method |= {"average_rate": 0.5} if teacher == "average" else {}
    changes = {"training.max_steps": 2, "training.learning_rate": 0.05, "training.save_steps": 1}
    run = train(load(method, changes)).run_dir
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    policy = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "checkpoint-1", dtype=torch.float64)
    middle = copy.deepcopy(start)
    for mine, other in zip(middle.parameters(), policy.parameters(), strict=True):
        mine.data.lerp_(other.data, 0.5)
    reads = {"live": policy, "start": start, "average": middle}[teacher]
    own, told = seen[1]
    expected = by_whole_logits(policy, reads, own, told, 0.5)
    found = metrics(run)[1]
    assert expected > 1e-6
    assert found["teacher/divergence"] == pytest.approx(expected, rel=1e-6)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["teacher/told_share"] == 1


def test_the_first_tokens_are_left_out_in_both_rows(load, seen):
    train(load({"name": "sdft", "template": TEMPLATE, "skip_tokens": 3}, {"training.max_steps": 1}))
    for one, other in zip(*seen[0], strict=True):
        written = len(one.behaviour_logps) - one.behaviour_logps.count(0.0)
        assert sum(one.loss_mask) == sum(other.loss_mask) == max(written - 3, 0)
        assert one.ids[-1] == other.ids[-1] and len(other.ids) > len(one.ids)


def test_rows_that_nothing_is_told_of_are_not_trained_on(load, seen):
    """A random model is never right, so no group has an answer to show."""
    method = {"name": "sdft", "template": TEMPLATE, "context": "success"}
    run = train(load(method, {"training.max_steps": 1})).run_dir
    assert all(not any(sample.loss_mask) for rows in seen[0] for sample in rows)
    assert metrics(run)[0]["teacher/told_share"] == 0


def test_a_prompt_that_leaves_no_room_is_left_out(load, seen):
    """The model has 96 positions."""
    method = {"name": "sdft", "context": "reference", "template": "{context}" + "1+" * 45 + "{prompt}"}
    train(load(method, {"training.max_steps": 1}))
    assert all(not any(sample.loss_mask) for rows in seen[0] for sample in rows)


def test_an_average_that_would_stand_still_is_refused(load):
    with pytest.raises(NeedsError, match="a moving average of bfloat16 weights stands still"):
        train(load({"name": "sdft", "template": TEMPLATE}, {"model.dtype": "bfloat16"}))


def test_a_head_of_its_own_beside_an_adapter_is_refused(load):
    method = {"name": "sdft", "template": TEMPLATE, "teacher": "live"}
    with pytest.raises(NeedsError, match="read from the base's head"):
        train(load(method, {"model.peft": {"type": "lora", "r": 2, "modules_to_save": ["lm_head"]}}))
