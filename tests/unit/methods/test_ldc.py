"""LDC: the reward of levels by hand, controllers that are written and read again, sentences each under their own, and a
policy that learns to meet what it is asked for."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.config.schema import ModelConfig
from posttrain.data.controllers import controllers, read_controllers
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem
from posttrain.methods.ldc import LDC, LDCConfig
from posttrain.models.loading import load_policy
from posttrain.objectives.control import level_reward
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.sentence_control import controlled, up_to_the_end
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.run import train
from posttrain.verifiers.levels import LevelsVerifier
from posttrain.verifiers.verdict import Answer, Status

LEVELS = {"new": 0.25, "sure": 1.0}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 1, 1], 1 - 0.016666666667),  # (.01 + 0 + .04) / 3
        ([5, 3, 2], 1 - (0.5 * 0.01 + 0.2 * 0.04)),
        ([0, 1, 0], 1.0),
    ],
)
def test_the_reward_is_one_less_the_weighted_squared_gap(weights, expected):
    assert level_reward([0.6, 0.5, 0.7], [0.7, 0.5, 0.9], weights) == pytest.approx(expected, abs=1e-11)
    with pytest.raises(ValueError, match="2 scores, 1 levels"):
        level_reward([0.1, 0.2], [0.3], [1])


@pytest.mark.parametrize("template", ["{name}={level};", "<{level}>", "({level}|{name}.*)"])
def test_controllers_are_read_as_they_were_written(template):
    text = controllers(LEVELS, template)
    assert read_controllers(text + "An idea.", list(LEVELS), template) == (LEVELS, "An idea.")
    later = text + "One." + controllers({"new": 0, "sure": 0.000001}, template) + "Two."
    assert read_controllers(later, list(LEVELS), template) == (LEVELS, "One.Two.")
    assert read_controllers("An idea.", list(LEVELS), template) is None


def test_a_group_is_asked_for_levels_that_are_drawn(tiny_model):
    tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)[1]
    method = LDC(LDCConfig(controllers={"1": [0, 1], "2": [0, 1]}, template="{name}={level};"))
    method.bind(Renderer(tokenizer), 0)
    starts = [method.start(Problem("p", "1"), [1], (), np.random.default_rng(seed)) for seed in range(40)]
    texts = [tokenizer.decode(list(start.prefix)) for start in starts]
    assert set(texts) == {f"1={one};2={other};" for one in "01" for other in "01"}
    assert all(start.origin is Origin.PREFIX and not start.counted for start in starts)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"controllers": {}}, "at least 1"),
        ({"controllers": {"new": [1.5]}}, "less than or equal to 1"),
        ({"controllers": {"new": [1.0]}, "template": "{name}"}, "one {level}"),
        ({"controllers": {"new": [1.0]}, "template": "{name}{level}"}, "something must stand behind"),
    ],
)
def test_controllers_that_could_not_be_read_are_refused(config, says):
    with pytest.raises(ValidationError, match=says):
        LDCConfig(**config)


def judge(**changes):
    qualities = {
        "a": {"pattern": "a"},
        "short": {"reward": {"type": "length", "max": 8, "buffer": 8, "unit": "characters"}},
    }
    return LevelsVerifier(LevelsVerifier.Config(qualities=qualities, **changes))


def test_an_answer_is_scored_without_its_controllers():
    texts = ["a=0.5;short=0.5;aabb", "a=1;short=0;aabb", "aabb", "a=0.5;short=0.5;"]
    found = judge().verify([Problem("p", "q")] * 4, [Answer(text) for text in texts])
    assert [one.score for one in found] == [1.0, pytest.approx(1 - 0.25), None, pytest.approx(1 - 0.25)]
    assert [one.status for one in found] == [Status.CORRECT, Status.WRONG, Status.SKIPPED, Status.WRONG]
    assert found[1].detail == "a 0.5 of 1, short 0.5 of 0"


@pytest.mark.parametrize(
    ("quality", "says"),
    [
        ({}, "either reward or pattern"),
        ({"pattern": "a", "reward": {"type": "length", "max": 8, "buffer": 8}}, "either reward or pattern"),
        ({"reward": {"type": "exact"}}, "exact runs in workers"),
    ],
)
def test_a_quality_that_nothing_scores_is_refused(quality, says):
    with pytest.raises(ValidationError, match=says):
        LevelsVerifier.Config(qualities={"a": quality})


def test_each_sentence_is_written_under_its_own_levels(tiny_model):
    """By the engine itself, sentence by sentence; one that its limit cuts goes on under the next levels too."""
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    renderer, end, schedule = Renderer(tokenizer), "3", [{"1": 0.0}, {"1": 0.5}, {"1": 1.0}]
    engine = TransformersEngine(model, stop_ids=renderer.stop_ids, pad_id=tokenizer.pad_token_id, max_batch=8)

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts, sampling = [ids_of(str(number)) for number in range(8)], Sampling(max_new_tokens=16, seed=3)
    found = controlled(engine, renderer, prompts, schedule, sampling, sentence_end=end)
    shorter = 0
    for number, (prompt, sentences) in enumerate(zip(prompts, found, strict=True)):
        read = prompt
        for place, (levels, sentence) in enumerate(zip(schedule, sentences, strict=False)):
            read = read + ids_of(controllers(levels, "{name}={level};"))
            how = Sampling(max_new_tokens=16, seed=3, first_prompt=number, first_sample=place)
            ((completion,),) = engine.generate([read], how)
            written = completion.ids if place == 2 else up_to_the_end(completion.ids, renderer, end)
            assert sentence == renderer.text(written) and (place == 2 or sentence.count(end) <= 1)
            shorter += len(written) < len(completion.ids)
            read = read + written
        assert len(sentences) == 3 or completion.finish == "stop"
    assert shorter > 2 and {len(sentences) for sentences in found} > {3}


def test_a_policy_learns_to_write_as_much_as_it_is_asked_for(load):
    """Of the letter 1: none of it, or nothing else; without the controllers one policy could not do both."""
    method = {"name": "ldc", "controllers": {"#": [0.0, 1.0]}, "template": "{name}{level}+"}
    changes = {
        "verifier": [{"type": "levels", "qualities": {"#": {"pattern": "1"}}, "template": "{name}{level}+"}],
        "training.max_steps": 45,
        "training.learning_rate": 0.02,
        "rollouts.samples_per_prompt": 8,
        "rollouts.max_new_tokens": 6,
        "batch.prompts_per_step": 8,
        "batch.micro_batch": 64,
    }
    run = train(load(method, changes)).run_dir
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    blind = 0.75  # of the best policy that does not read what it is asked for
    assert np.mean(rewards[:5]) < blind < 0.95 < np.mean(rewards[-5:])
