"""LDC: the reward of levels by hand, controllers that are written and read again, sentences each under their own, and a
policy that learns to meet what it is asked for."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from posttrain.config.collection import SampleSettings
from posttrain.config.schema import ModelConfig
from posttrain.config.sentences import SentenceControl
from posttrain.data.controllers import controllers, read_controllers
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem
from posttrain.data.traces import read_traces
from posttrain.methods.ldc import LDC, LDCConfig
from posttrain.models.loading import load_policy
from posttrain.objectives.control import level_reward
from posttrain.rollouts.collect import collect
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.sentence_control import controlled, sentence_seed, up_to_the_end
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


SCHEDULE = [{"1": 0.0}, {"1": 0.5}, {"1": 1.0}]


def test_each_sentence_is_written_under_its_own_levels(tiny_model):
    """By the engine itself, sentence by sentence; one that its limit cuts goes on under the next levels too."""
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    renderer, config = Renderer(tokenizer), SentenceControl(levels=SCHEDULE, end="3")
    engine = TransformersEngine(model, stop_ids=renderer.stop_ids, pad_id=tokenizer.pad_token_id, max_batch=8)

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts, sampling = [ids_of(str(number)) for number in range(8)], Sampling(n=2, max_new_tokens=16, seed=3)
    found = controlled(engine, renderer, prompts, sampling, config)
    shorter = 0
    for number, (prompt, answers) in enumerate(zip(prompts, found, strict=True)):
        for sample, answer in enumerate(answers):
            written, drawn, read = [], 0, 0
            for place in range(len(answer.ends)):
                written += ids_of(controllers(SCHEDULE[place], "{name}={level};"))
                seed = sentence_seed(3, place)
                how = Sampling(max_new_tokens=16, seed=seed, first_prompt=number, first_sample=sample)
                ((completion,),) = engine.generate([prompt + written], how)
                kept = completion.ids if place == 2 else up_to_the_end(completion.ids, renderer, "3")
                read += (len(prompt) + len(written)) * (place > 0 or sample == 0)
                drawn += len(completion.ids)
                shorter += len(kept) < len(completion.ids)
                written += kept
                assert answer.ends[place] == len(written) and (place == 2 or renderer.text(kept).count("3") <= 1)
            assert (answer.ids, answer.drawn, answer.read) == (written, drawn, read)
            assert answer.finished == (completion.finish == "stop" and kept == completion.ids)
            assert len(answer.ends) == 3 or answer.finished
    assert shorter > 2 and {len(answer.ends) for answers in found for answer in answers} > {3}


def test_an_answer_without_room_for_a_sentence_ends_before_it(tiny_model):
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    renderer, config = Renderer(tokenizer), SentenceControl(levels=SCHEDULE * 8, end="3")
    engine = TransformersEngine(model, stop_ids=renderer.stop_ids, pad_id=tokenizer.pad_token_id, max_batch=8)
    prompts = [tokenizer("1", add_special_tokens=False)["input_ids"]] * 6
    found = controlled(engine, renderer, prompts, Sampling(max_new_tokens=16, seed=1), config)
    longest = max(len(answer.ids) for (answer,) in found)
    assert engine.positions - 16 - 8 < longest < engine.positions
    assert all(len(answer.ends) < 24 for (answer,) in found)


def test_parts_of_an_answer_are_judged_by_the_controllers_before_each():
    text = "a=0.5;short=0.5;aabba=1;short=1;aaaa"
    problem, answers = [Problem("p", "q")], [Answer(text)]
    whole, parts = (judge(by_sentence=each).verify(problem, answers)[0] for each in (False, True))
    assert whole.score == pytest.approx(1 - (0.25**2 + 0.5**2) / 2)  # 6 of 8 are a; 8 characters are as long as may be
    assert parts.score == pytest.approx((1 + 1 - 0.5**2 / 2) / 2)
    assert parts.detail == "a 0.5 of 0.5, short 0.5 of 0.5; a 1 of 1, short 0.5 of 1"
    assert judge(by_sentence=True).verify(problem, [Answer("aabb")])[0].status is Status.SKIPPED


def test_sampling_by_sentences_writes_traces_that_other_commands_read(tiny_model, tmp_path):
    """Controllers are in the text and no samples, so there are no log-probs; the same call goes on where it was."""
    settings = {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": {"task": "chain_sum", "levels": [2], "size": 6}},
        "verifier": [{"type": "levels", "qualities": {"1": {"pattern": "1"}}, "by_sentence": True}],
        "verifier_pool": {"workers": 0},
        "rollouts": {"samples_per_prompt": 2, "max_new_tokens": 8},
        "sentences": {"levels": SCHEDULE, "end": "3"},
    }
    path = tmp_path / "traces.jsonl"
    collect(SampleSettings(**settings), path, say=lambda _: None)
    traces = read_traces([path]).traces
    assert len(traces) == 12 and all(trace.logps is None for trace in traces)
    for trace in traces:
        assert trace.text.startswith("1=0;") and trace.step_ends[-1] == len(trace.text)
        assert trace.outcome is not None and trace.flops > 0
    first = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(first[:4]), encoding="utf-8")
    collect(SampleSettings(**settings), path, say=lambda _: None)
    assert path.read_text(encoding="utf-8").splitlines(keepends=True) == first
    with pytest.raises(ValidationError, match="leave out `beams`"):
        SampleSettings(**settings | {"beams": 2})


def test_a_policy_learns_to_write_as_much_as_it_is_asked_for(load):
    """Of the letter 1: none of it, or nothing else; without the controllers one policy could not do both."""
    method = {"name": "ldc", "controllers": {"#": [0.0, 1.0]}, "template": "{name}{level}+"}
    changes = {
        "verifier": [{"type": "levels", "qualities": {"#": {"pattern": "1"}}, "template": "{name}{level}+"}],
        "training.max_steps": 80,
        "training.learning_rate": 0.01,
        "rollouts.samples_per_prompt": 8,
        "rollouts.max_new_tokens": 6,
        "batch.prompts_per_step": 8,
        "batch.micro_batch": 64,
    }
    run = train(load(method, changes)).run_dir
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    blind = 0.75  # of the best policy that does not read what it is asked for
    assert np.mean(rewards[:5]) < blind < 0.8 < np.mean(rewards[-10:])
