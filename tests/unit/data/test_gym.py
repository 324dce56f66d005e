"""Problems of reasoning-gym generators."""

from __future__ import annotations

import sys

import pytest

from posttrain.config.schema import GymSource
from posttrain.data.gym import generate_problems, generator_seed
from posttrain.errors import DataError, RecipeError, StackError
from posttrain.verifiers import VERIFIERS
from posttrain.verifiers.gym import GymVerifier


def make(generator: str = "chain_sum", **keys) -> GymSource:
    return GymSource(reasoning_gym=generator, **{"size": 4, **keys})


def test_problems_carry_what_the_scorer_needs() -> None:
    problems = generate_problems(make(config={"max_terms": 3}, seed=7), "data.prompts")
    assert [p.id for p in problems] == [f"data.prompts/{i}" for i in range(4)]
    assert problems == generate_problems(make(config={"max_terms": 3}, seed=7), "data.prompts")
    meta = problems[2].meta
    assert (meta["reasoning_gym"], meta["config"], meta["index"]) == ("chain_sum", {"max_terms": 3}, 2)
    assert problems[2].prompt == meta["entry"]["question"] and problems[2].reference == meta["entry"]["answer"]
    assert problems[2].where == "chain_sum[train] seed 7 problem 2"


def test_seeds_of_the_splits_never_meet() -> None:
    train = [generator_seed(seed, "train") for seed in range(2000)]
    test = [generator_seed(seed, "test") for seed in range(2000)]
    largest_size = 2**30
    assert min(train) >= 0 and max(train) + largest_size <= 2**31 <= min(test)
    assert max(test) + largest_size <= 2**32  # what numpy takes as a seed
    # chain_sum draws problem i from seed + i: neighbouring recipe seeds must not give shifted copies.
    assert len({seed // 10_000 for seed in train}) > 1900


def test_splits_and_seeds_give_other_problems() -> None:
    drawn = [
        {p.prompt for p in generate_problems(make(size=50, config={"min_terms": 4}, seed=seed, split=split), "x")}
        for seed in (0, 1)
        for split in ("train", "test")
    ]
    assert len(set.union(*drawn)) == sum(map(len, drawn))


def test_template_and_system() -> None:
    plain = generate_problems(make(size=1), "x")[0].prompt
    templated = generate_problems(make(size=1, template="Q: {question} \\boxed{{}}", chat=False), "x")[0]
    assert templated.prompt == f"Q: {plain} \\boxed{{}}" and templated.chat is False
    chat = generate_problems(make(size=1, system="Be short."), "x")[0].prompt
    assert chat == ({"role": "system", "content": "Be short."}, {"role": "user", "content": plain})


@pytest.mark.parametrize("generator", ["countdown", "gsm_symbolic", "codeio", "basic_arithmetic", "tower_of_hanoi"])
def test_gold_answers_are_right_by_the_package_s_own_scorer(generator: str) -> None:
    """codeio gives other entries in every process, so it fails where a scorer draws the entry again."""
    verifier = VERIFIERS["reasoning_gym"](GymVerifier.Config(type="reasoning_gym"))
    for problem in generate_problems(make(generator), "x"):
        assert verifier(problem, f"Let me see.\n<answer>{problem.reference}</answer>").status == "correct"
        assert verifier(problem, "no idea").status == "wrong"


@pytest.mark.parametrize(
    ("section", "error", "where", "message"),
    [
        ({"generator": "chain_sums"}, DataError, "d.reasoning_gym", "did you mean 'chain_sum'"),
        ({"config": {"min_term": 2}}, DataError, "d.config.min_term", "did you mean 'min_terms'"),
        ({"config": {"min_terms": 9, "max_terms": 2}}, DataError, "d.config", "max_terms must be >= min_terms"),
        ({"config": {"min_terms": "two"}}, DataError, "d.config", "TypeError"),
        ({"config": {"seed": 1}}, DataError, "d.config", "set it beside config"),
        ({"generator": "composite"}, DataError, "d.config", "Must specify at least one dataset"),
        ({"template": "no place"}, RecipeError, "d.template", "{question}"),
        ({"template": "{question} {"}, RecipeError, "d.template", "single '{'"),
        ({"system": "s", "chat": False}, RecipeError, "d.system", "forbids"),
    ],
)
def test_user_errors(section: dict, error: type[Exception], where: str, message: str) -> None:
    with pytest.raises(error) as caught:
        generate_problems(make(**section), "d")
    assert caught.value.where == where and message in str(caught.value)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(StackError, match="not installed"):
        generate_problems(make(), "d")
