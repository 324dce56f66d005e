"""Verifier sections within a recipe: what they demand, what has no effect, and that they survive a dump."""

from __future__ import annotations

import pytest

from posttrain.config.loading import dump_recipe
from posttrain.config.needs import Needs
from posttrain.config.preflight import check_needs
from posttrain.errors import NeedsError, RecipeError

SAMPLES = Needs(data=("prompts",), rollouts=True, verifier=True)
FILE = "data.prompts={path: x.jsonl, reference: answer}"
LENGTH = "{type: length, max: 90, buffer: 20}"
JUDGE = "{type: judge, endpoint: 'http://localhost/v1', model: m, principles: [It is right.]}"


def check(load, online: str, verifiers: str, *overrides: str) -> None:
    recipe, locations = load(online, f"verifier=[{verifiers}]", FILE, *overrides)
    check_needs(recipe, SAMPLES, "reward", locations)


@pytest.mark.parametrize(
    "verifiers",
    [
        "{type: choice}",
        "{type: code, processes: 8}",
        "{type: code, tests: stdio, output_kb: 8}",
        "{type: reward_model, path: x}",
        JUDGE,
        f"{LENGTH}, {{type: repetition}}, {{type: math, gate: true}}",
        "{type: length, shape: cosine, max: 9, wrong: [0.0, 0.1]}, {type: math}",
        "{type: math}, {type: reward_model, path: x, outcome: false}",
        JUDGE.replace("m,", "m, outcome: false,") + ", {type: exact}",
    ],
)
def test_they_load_pass_and_survive_a_dump(load, online: str, verifiers: str) -> None:
    check(load, online, verifiers)
    recipe, _ = load(online, f"verifier=[{verifiers}]", FILE)
    again, locations = load(dump_recipe(recipe))
    check_needs(again, SAMPLES, "reward", locations)  # a dump adds no key without effect
    assert again == recipe


@pytest.mark.parametrize(
    ("verifiers", "message"),
    [
        (f"{LENGTH}, {{type: repetition}}", "`length` only shapes the reward, `repetition` only shapes the reward"),
        ("{type: math}, {type: reward_model, path: x}", "a second verifier judges the answer: math and reward_model"),
        ("{type: reward_model, path: x, outcome: false}", "no verifier here judges the answer"),
    ],
)
def test_one_verifier_judges(load, online: str, verifiers: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(load, online, verifiers)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("verifiers", "key"),
    [
        ("{type: math}, {type: length, max: 9, buffer: 2, correct: [1.0, 0.0]}", "verifier.1.correct"),
        ("{type: math}, {type: length, shape: cosine, max: 9, buffer: 2}", "verifier.1.buffer"),
        ("{type: code, cases: x}", "verifier.0.cases"),
        ("{type: code, tests: stdio, entry_point: x}", "verifier.0.entry_point"),
        ("{type: code, isolation: rlimit, processes: 9}", "verifier.0.processes"),
    ],
)
def test_keys_without_effect(load, online: str, verifiers: str, key: str) -> None:
    with pytest.raises(NeedsError, match="has no effect") as caught:
        check(load, online, verifiers)
    assert key in str(caught.value)


def test_choice_needs_a_reference(load, online: str) -> None:
    with pytest.raises(NeedsError, match="no `reference` column"):
        check(load, online, "{type: choice}", "data.prompts={path: x.jsonl}")
