"""Length and repetition, and how gates and batch verifiers come into the reward."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain.config.schema import VerifierPoolConfig
from posttrain.config.verifier import AnyVerifier
from posttrain.data.sample import Problem
from posttrain.errors import RecipeError
from posttrain.verifiers.judge import build_judge

HERE = VerifierPoolConfig(workers=0)
EXACT = {"type": "exact"}
OVERLONG = {"type": "length", "max": 100, "buffer": 40}
COSINE = {"type": "length", "shape": "cosine", "max": 100, "correct": [1.0, 0.6], "wrong": [0.0, 0.2]}


def judge(sections: list[dict], completions: list[str], tokens=None, pool=HERE, reference="yes"):
    configs = [TypeAdapter(AnyVerifier).validate_python(section) for section in sections]
    judge = build_judge(configs, pool)
    try:
        return judge.judge([Problem("p", "", reference)] * len(completions), completions, tokens)
    finally:
        judge.close()


@pytest.mark.parametrize(
    ("tokens", "score"), [(0, 1.0), (60, 1.0), (61, 0.975), (80, 0.5), (100, 0.0), (101, 0.0), (10**9, 0.0)]
)
def test_soft_overlong_is_the_penalty_of_dapo_plus_one(tokens: int, score: float) -> None:
    """DAPO, eq. 13: 0 up to L_max - L_cache, ((L_max - L_cache) - |y|) / L_cache up to L_max, -1 beyond."""
    verdict = judge([EXACT, OVERLONG], ["yes"], [tokens])[0].verdicts["length"]
    assert verdict.score == pytest.approx(score, abs=1e-12)
    assert verdict.status == ("correct" if score == 1.0 else "wrong")


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("tokens", [0, 25, 50, 100, 101])
def test_cosine_depends_on_the_outcome(right: bool, tokens: int) -> None:
    """Demystifying Long CoT, eq. of the cosine reward: r_L + (r_0 - r_L) (1 + cos(pi t / L)) / 2."""
    start, end = (1.0, 0.6) if right else (0.0, 0.2)
    want = end + 0.5 * (start - end) * (1 + math.cos(math.pi * tokens / 100)) if tokens <= 100 else 0.0
    judgement = judge([EXACT, COSINE], ["yes" if right else "no"], [tokens])[0]
    assert judgement.verdicts["length"].score == pytest.approx(want)
    assert judgement.outcome == float(right) and judgement.reward == pytest.approx(right + want)


def test_cosine_of_an_unknown_outcome_is_unknown() -> None:
    judgement = judge([EXACT, COSINE], ["yes"], [10], reference=None)[0]
    assert judgement.verdicts["length"].status == "bad_reference" and judgement.reward is None


def test_lengths_in_words_and_characters() -> None:
    for unit, length in (("words", 3), ("characters", 11)):
        section = {"type": "length", "max": 20, "buffer": 20, "unit": unit}
        assert judge([EXACT, section], ["one two six"])[0].verdicts["length"].score == pytest.approx(1 - length / 20)


def test_tokens_must_be_given_where_they_are_counted() -> None:
    with pytest.raises(ValueError, match="token counts"):
        judge([EXACT, OVERLONG], ["yes"])
    with pytest.raises(ValueError, match="1 completions but 2 token counts"):
        judge([EXACT, OVERLONG], ["yes"], [1, 2])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "length", "max": 10}, "needs `buffer`"),
        ({"type": "length", "max": 10, "buffer": 11}, "larger than max"),
        ({"type": "length", "shape": "cosine", "max": 10, "wrong": [-1.0, 0.0]}, "from 0 to 1"),
        ({"type": "choice", "letters": "ABA"}, "twice"),
        ({"type": "judge", "endpoint": "localhost", "model": "m", "principles": ["p"]}, "endpoint"),
    ],
)
def test_sections_that_make_no_sense(section: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(AnyVerifier).validate_python(section)


@pytest.mark.parametrize(
    ("text", "n", "score"),
    [
        ("a b c d", 2, 1.0),
        ("a b a b a b", 2, 2 / 5),
        ("A a", 1, 0.5),
        ("a " * 1000, 4, 1 / 997),
        ("", 2, 1.0),
        ("a", 2, 1.0),
        ("a b a b", 1, 0.5),
    ],
)
def test_repetition_is_the_share_of_new_ngrams(text: str, n: int, score: float) -> None:
    verdict = judge([EXACT, {"type": "repetition", "n": n}], [text])[0].verdicts["repetition"]
    assert verdict.score == pytest.approx(score)


def test_a_gate_that_is_closed_makes_the_reward_zero_and_leaves_the_outcome() -> None:
    lower = {"type": "format", "pattern": "[a-z]*", "weight": 0.5}
    short = {"type": "format", "pattern": ".{0,3}", "weight": 0.25}
    gated = [dict(EXACT, ignore_case=True), dict(lower, gate=True), short]
    judgements = judge(gated, ["yes", "YES", "no", "NO"])
    assert [j.reward for j in judgements] == [1.75, 0.0, 0.75, 0.0]
    assert [j.outcome for j in judgements] == [1.0, 1.0, 0.0, 0.0]


def test_a_gate_on_the_outcome_lets_shaping_count_for_right_answers_only() -> None:
    judgements = judge([dict(EXACT, gate=True), {"type": "repetition", "weight": 0.5}], ["yes", "no"])
    assert [j.reward for j in judgements] == [1.5, 0.0]


def test_a_gate_that_cannot_judge_takes_the_reward() -> None:
    judgement = judge([dict(EXACT, gate=True), OVERLONG], ["yes"], [5], reference=None)[0]
    assert (judgement.outcome, judgement.reward) == (None, None)


def test_batch_verifiers_beside_workers() -> None:
    judgements = judge([OVERLONG, EXACT], ["yes", "no", "yes"], [100, 0, 80], VerifierPoolConfig(workers=1))
    assert [list(j.verdicts) for j in judgements] == [["exact", "length"]] * 3
    assert [j.reward for j in judgements] == [1.0, 1.0, 1.5]


def test_nothing_to_judge() -> None:
    assert judge([OVERLONG, EXACT], [], []) == []


def test_the_pool_must_give_code_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.verifiers.code.Sandbox.check", lambda self: None)
    with pytest.raises(RecipeError) as caught:
        judge([{"type": "code", "timeout": 8.0}], [], pool=VerifierPoolConfig(timeout=10.0))
    assert caught.value.where == "verifier_pool.timeout" and "at least 11" in caught.value.hint
