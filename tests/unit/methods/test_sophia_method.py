"""SOPHIA: which rollouts are learnt, what goes between the two models, and a run whose policy looks at pictures."""

import random
from pathlib import Path

import pytest
import torch
import yaml

from posttrain.config.loading import load_recipe
from posttrain.config.preflight import check_needs
from posttrain.config.schema import ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem
from posttrain.data.tasks.dot_sum import TASK
from posttrain.errors import DataError, PosttrainError
from posttrain.methods import CONFIGS, METHODS
from posttrain.methods.base import Scored
from posttrain.methods.companions import DESCRIPTION
from posttrain.methods.sophia import SOPHIA, SOPHIAConfig
from posttrain.models.reasoned import asks, question
from posttrain.models.tokenizer import load_tokenizer
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.trainers.reasoner import ReasoningModel
from posttrain.trainers.writer import Ended

RECIPES = Path(__file__).parents[3] / "recipes" / "pictures"


def method(**keys):
    return SOPHIA(SOPHIAConfig(reasoner="r", **keys))


def scored(rewards, lengths, groups, descriptions, known=None):
    n = len(rewards)
    return Scored(
        rewards=torch.tensor(rewards),
        outcomes=torch.tensor(rewards).clamp(0, 1).round(),
        known=torch.ones(n).bool() if known is None else torch.tensor(known).bool(),
        groups=torch.tensor(groups),
        lengths=torch.tensor(lengths),
        finished=torch.ones(n).bool(),
        max_new_tokens=99,
        kinds=(Origin.GUIDED,) * n,
        infos=tuple({DESCRIPTION: float(number)} for number in descriptions),
    )


def test_rows_of_one_description_of_a_group_are_told_by_its_number():
    rewards = [1.1, 0.2, 1.0, 1.0] + [1.0, 1.0, 0.0, 1.0]
    lengths, groups, numbers = [9, 5, 8, 7, 4, 5, 3, 6], [3, 3, 3, 3, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]
    rows = scored(rewards, lengths, groups, numbers)
    assert method().advantages(rows).tolist() == [0, 0, 0, 1, 1, 0, 0, 0]  # a half is not above 0.5
    assert method().keep(rows).tolist() == [False, False, False, True, True, False, False, False]
    assert method().advantages(scored(rewards, lengths, groups, [0] * 8)).tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    lenient = method(alpha_c=0.0, right=0.2)
    assert lenient.advantages(rows).tolist() == [0, 1, 0, 1, 1, 0, 0, 1]


@pytest.fixture(scope="module")
def policy():
    init = {"tokenizer": {"type": "characters", "alphabet": "0123456789+=;#"}}
    return Renderer(load_tokenizer(ModelConfig(init=init)))


@pytest.fixture(scope="module")
def own():
    """The reasoner's: its ids are others."""
    init = {"tokenizer": {"type": "characters", "alphabet": "#;=+9876543210"}}
    return Renderer(load_tokenizer(ModelConfig(init=init)))


class Writes:
    """An engine that writes given texts, one after another, and remembers what it was asked."""

    def __init__(self, renderer, *texts, positions=None):
        self.renderer, self.texts, self.positions = renderer, texts, positions

    def generate(self, prompts, sampling, limits):
        self.asked, self.sampling, self.limits = [self.renderer.text(ids) for ids in prompts], sampling, list(limits)
        texts, end = iter(self.texts), self.renderer.stop_ids[0]
        found = []
        for limit in limits:
            rows = [[*self.renderer.encoder.encode(next(texts)), end] for _ in range(sampling.n)]
            found.append(
                [
                    Completion(ids[:limit], [-9.0] * len(ids[:limit]), "stop" if len(ids) <= limit else "length", 0)
                    for ids in rows
                ]
            )
        return found

    def read_tokens(self, prompts, sampling):
        return sum(map(len, prompts))


def reasoning(policy, own, *texts, number=2, tokens=4, end=";", positions=None):
    keys = {"reasonings": number, "description_end": end, "description_tokens": tokens, "template": "{prompt}{answer}"}
    (wanted,) = method(**keys).needs.companions
    return ReasoningModel(Writes(own, *texts, positions=positions), wanted, policy, own, seed=3)


def completion(policy, text, finish="length"):
    ids = policy.encoder.encode(text) + ([policy.stop_ids[0]] if finish == "stop" else [])
    return Completion(ids, [-1.0] * len(ids), finish, 5)


PROBLEMS = [Problem(str(i), "", "", {}) for i in range(2)]


def ended(model, completions, limits, n=2):
    sampling = Sampling(n=n, max_new_tokens=max(limits), seed=1, first_prompt=10, top_k=7)
    return model.end(6, PROBLEMS[: len(limits)], [], [[1]] * len(limits), completions, sampling, limits)


def test_descriptions_get_reasonings_in_the_policys_tokens(policy, own):
    model = reasoning(policy, own, "#5", "2+3=5;#5", "#9", "4+5=9;#9")
    begun = [[completion(policy, "2+3=;#7")], [completion(policy, "4+5=", "stop")]]
    found, spent = ended(model, begun, [16, 16])
    assert model.engine.asked == ["2+3=", "4+5="]
    assert [[policy.text(one.completion.ids) for one in group] for group in found] == [
        ["2+3=;#5", "2+3=;2+3=5;#5"],
        ["4+5=#9", "4+5=4+5=9;#9"],  # what ends a description is the policy's to write
    ]
    for group, kept in zip(found, (5, 4), strict=True):
        for one in group:
            assert one.guided == len(one.completion.ids) - kept
            assert one.completion.logps == [-1.0] * kept + [0.0] * one.guided
            assert one.completion.ids[-1] == policy.stop_ids[0] and one.completion.finish == "stop"
            assert one.completion.policy_version == 5
    asked = model.engine.sampling
    assert (asked.n, asked.top_k, asked.prompt_numbers) == (2, None, (10, 11)) and asked.seed != 1
    assert spent.read == 8 and spent.sampled == sum(len(t) + 1 for t in model.engine.texts)


def test_what_ends_a_description_ends_it_where_it_first_stands(policy, own):
    model = reasoning(policy, own, "#5", "#5", end="=;")
    found, _ = ended(model, [[completion(policy, "2+3=;4=;")]], [16])
    assert model.engine.asked == ["2+3"] and policy.text(found[0][0].completion.ids) == "2+3=;#5"


def test_the_whole_is_no_longer_than_a_completion_may_be(policy, own):
    model = reasoning(policy, own, "2+3=5;#5", "#5")
    found, _ = ended(model, [[completion(policy, "2+3=;")]], [8])
    assert model.engine.limits == [3]
    assert [policy.text(one.completion.ids) for one in found[0]] == ["2+3=;2+3", "2+3=;#5"]
    assert [one.completion.finish for one in found[0]] == ["length", "stop"]
    long = completion(policy, "1+1+1+1+1=;")
    found, _ = ended(reasoning(policy, own, "#5", "#5", positions=12), [[long]], [30])
    assert found[0][0].guided == 2  # 10 tokens asked of 12 positions leave two for the reasoner


@pytest.mark.parametrize("text", ["", ";", "1+1+1+1+1+1+1=;"])
def test_a_description_that_cannot_be_read_stays_without_reasoning(policy, own, text):
    model = reasoning(policy, own, positions=12)
    begun = completion(policy, text, "stop")
    found, spent = ended(model, [[begun]], [30])
    assert found == [[Ended(begun, 0, {DESCRIPTION: 0.0})] * 2] and spent.read == spent.sampled == 0


def test_the_policy_samples_a_description_for_every_so_many_completions(policy, own):
    sampling, limits = reasoning(policy, own).shares(Sampling(n=6, max_new_tokens=9), [9, 3])
    assert (sampling.n, limits) == (3, [4, 3])
    sampling, limits = reasoning(policy, own, tokens=None).shares(Sampling(n=6, max_new_tokens=9), [9, 3])
    assert (sampling.n, limits) == (3, [9, 3])


def test_the_reasoner_reads_the_question_without_its_pictures():
    problem = TASK.problem(random.Random(0), 2)
    assert problem.prompt and question(problem, "3+8=", "{prompt}{answer}").prompt == "3+8="
    picture = problem.prompt
    chat = Problem("c", ({"role": "user", "content": f"{picture}How many?"},), "", {})
    assert question(chat, "Two.", "{prompt}\n{answer}").prompt == ({"role": "user", "content": "How many?\nTwo."},)


def test_a_chat_is_for_a_reasoner_with_a_template(own):
    (wanted,) = method(template="{prompt}{answer}").needs.companions
    chat = Problem("c", ({"role": "user", "content": "3+8="},), "", {})
    with pytest.raises(DataError, match="no chat template"):
        asks(wanted, own.tokenizer, chat)
    assert asks(wanted, own.tokenizer, PROBLEMS[0]).template is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, None),
        ({"rollouts.samples_per_prompt": 6}, "6 completions of a prompt are no whole number of descriptions with 4"),
        ({"method.description_tokens": 48}, "a description of 48 tokens leaves no room for reasoning in 48"),
        ({"rollouts.engine": "vllm", "rollouts.mode": "server"}, "a server of vLLM is not built for pictures"),
        ({"method": {"name": "opd", "teacher": "t"}, "verifier": None}, r"further model beside the policy \(scorer\)"),
    ],
)
def test_a_model_of_text_may_stand_beside_a_policy_that_looks_at_pictures(tmp_path, changes, what):
    recipe = yaml.safe_load((RECIPES / "sophia-tiny-dot_sum.yaml").read_text())
    recipe["method"]["reasonings"] = 4
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (recipe[section] if section else recipe)[last] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    loaded = load_recipe(path, [], CONFIGS)
    needs = METHODS[loaded.method.name](loaded.method).needs
    if what is None:
        check_needs(loaded, needs, loaded.method.name)
    else:
        with pytest.raises(PosttrainError, match=what):
            check_needs(loaded, needs, loaded.method.name)
