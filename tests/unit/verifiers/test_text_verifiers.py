"""Exact, format, procedural and reasoning-gym verifiers, and the registry."""

from __future__ import annotations

import pickle
import typing

import pytest
from pydantic import TypeAdapter

from posttrain.config.schema import TaskSource
from posttrain.config.verifier import AnyVerifier
from posttrain.data.sample import Problem
from posttrain.data.tasks import generate_problems
from posttrain.errors import RecipeError, StackError
from posttrain.verifiers import VERIFIERS


def build(**section):
    config = TypeAdapter(AnyVerifier).validate_python(section)
    return VERIFIERS[config.type](config)


MINIMAL = {
    "format": {"pattern": ".*"},
    "code": {"isolation": "rlimit"},
    "length": {"max": 10, "buffer": 5},
    "reward_model": {"path": "none"},
    "process_reward": {"path": "none"},
    "python": {"function": "json:dumps"},
    "principled": {"path": "none", "principles": {"kind": {"text": "It is kind.", "negative": "It is not."}}},
    "levels": {"qualities": {"short": {"pattern": "a"}}},
    "judge": {"endpoint": "http://localhost:1/v1", "model": "none", "principles": ["It is right."]},
}
SHAPING = ("format", "length", "repetition")


def test_every_type_of_the_schema_has_a_verifier_of_that_name() -> None:
    for name, known in VERIFIERS.items():
        assert typing.get_args(known.Config.model_fields["type"].annotation) == (name,)
        verifier = build(type=name, **MINIMAL.get(name, {}))
        said = "dumps" if name == "python" else name  # that of the user's function
        assert verifier.name == said and verifier.outcome is (name not in SHAPING)
        if not hasattr(verifier, "verify"):  # those that do stay in this process
            assert pickle.loads(pickle.dumps(verifier)).name == said


@pytest.mark.parametrize(
    ("gold", "completion", "options", "status"),
    [
        ("Paris", " Paris\n", {}, "correct"),
        (" Paris ", "Paris", {}, "correct"),
        ("Paris", "paris", {}, "wrong"),
        ("Paris", "PARIS", {"ignore_case": True}, "correct"),
        ("stra\u00dfe", "STRASSE", {"ignore_case": True}, "correct"),
        ("a  b", "a b", {}, "wrong"),
        ("Paris", "It is Paris", {}, "wrong"),
        ("Paris", "A: Rome\nA: Paris \nbye", {"pattern": "A: (.*)"}, "correct"),  # the last match
        ("Paris", "Paris", {"pattern": "A: (.*)"}, "no_answer"),
        ("Paris", "A: ", {"pattern": "A: (.*)"}, "no_answer"),
        ("x", "b", {"pattern": "a(x)|b"}, "no_answer"),  # the group took no part
        ("Paris", " \n", {}, "no_answer"),
        (None, "Paris", {}, "bad_reference"),
    ],
)
def test_exact(gold: str | None, completion: str, options: dict, status: str) -> None:
    assert build(type="exact", **options)(Problem("p", "", gold), completion).status == status


@pytest.mark.parametrize(
    ("pattern", "completion", "score"),
    [
        ("<think>.*</think>.*", "<think>a\nb</think>\nc", 1.0),  # dot matches newlines
        ("<think>.*</think>.*", "x<think>a</think>c", 0.0),  # the whole completion
        ("<think>.*</think>", "<think>a</think>\n", 0.0),
        ("a|b", "ab", 0.0),
        (".*", "", 1.0),
    ],
)
def test_format(pattern: str, completion: str, score: float) -> None:
    assert build(type="format", pattern=pattern)(Problem("p", ""), completion).score == score


@pytest.mark.parametrize("kind", ["exact", "format", "reasoning_gym"])
def test_bad_patterns_name_their_key(kind: str) -> None:
    with pytest.raises(RecipeError, match="not a regular expression") as caught:
        build(type=kind, pattern="[")
    assert caught.value.where == f"verifier.{kind}.pattern"


def test_procedural_profiles() -> None:
    problem = generate_problems(TaskSource(task="chain_sum", levels=[4], size=1), "x")[0]
    guess = f"#{problem.reference}"
    assert build(type="procedural")(problem, guess).status == "wrong"
    assert build(type="procedural", profile="lenient")(problem, guess).status == "correct"
    for other in (Problem("p", "", "5"), Problem("p", "", "5", {"task": "sudoku"})):
        assert build(type="procedural")(other, guess).status == "bad_reference"


def gym_problem(generator: str, answer: str) -> Problem:
    entry = {"question": "", "answer": answer, "metadata": {}}
    return Problem("p", "", answer, {"reasoning_gym": generator, "config": {}, "seed": 0, "index": 0, "entry": entry})


@pytest.mark.parametrize(
    ("completion", "options", "status"),
    [
        ("I add.\n<answer> 12\n</answer> done", {}, "correct"),
        ("<answer>11</answer> no: <answer>12</answer>", {}, "correct"),
        ("I add.\n12\n\n", {}, "correct"),  # the last line
        ("<answer>11</answer>\n12", {}, "wrong"),  # a tag goes first
        ("I get = 12.", {"pattern": r"= (\d+)"}, "correct"),
        ("12", {"pattern": r"= (\d+)"}, "no_answer"),
        ("<answer></answer>", {}, "no_answer"),
        ("", {}, "no_answer"),
    ],
)
def test_where_gym_answers_stand(completion: str, options: dict, status: str) -> None:
    assert build(type="reasoning_gym", **options)(gym_problem("chain_sum", "12"), completion).status == status


def test_gym_scores_between_are_kept_but_wrong() -> None:
    verdict = build(type="reasoning_gym")(gym_problem("letter_counting", "12"), "it is 12")
    assert verdict.status == "wrong" and 0.0 < verdict.score < 1.0


def test_gym_needs_problems_of_a_generator() -> None:
    assert build(type="reasoning_gym")(Problem("p", "", "5"), "5").status == "bad_reference"


@pytest.mark.parametrize(("kind", "package"), [("math", "math_verify"), ("reasoning_gym", "reasoning_gym")])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(StackError, match=f"{package} is not installed"):
        build(type=kind)
