"""How verdicts become outcome and reward."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from posttrain.config.schema import VerifierPoolConfig
from posttrain.config.verifier import AnyVerifier
from posttrain.data.sample import Problem
from posttrain.errors import RecipeError
from posttrain.verifiers.judge import build_judge

HERE = VerifierPoolConfig(workers=0)
EXACT = {"type": "exact"}
SHORT = {"type": "format", "pattern": ".{1,3}", "weight": 0.25}
LOWER = {"type": "format", "pattern": "[a-z]*", "weight": -0.5}


def judge(sections: list[dict], completions: list[str], pool: VerifierPoolConfig = HERE, reference="yes"):
    judge = build_judge([TypeAdapter(AnyVerifier).validate_python(section) for section in sections], pool)
    try:
        return judge.judge([Problem("p", "", reference)] * len(completions), completions)
    finally:
        judge.close()
        judge.close()


@pytest.mark.parametrize("pool", [HERE, VerifierPoolConfig(workers=1)])
def test_reward_is_the_weighted_sum_of_scores(pool: VerifierPoolConfig) -> None:
    sections = [dict(EXACT, weight=2.0), SHORT, LOWER]
    judgements = judge(sections, ["yes", "no", "maybe", "YES", ""], pool)
    assert [j.outcome for j in judgements] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [j.reward for j in judgements] == [2.0 + 0.25 - 0.5, 0.25 - 0.5, -0.5, 0.25, -0.5]
    assert [j.status for j in judgements] == ["correct", "wrong", "wrong", "wrong", "no_answer"]
    assert list(judgements[0].verdicts) == ["exact", "format", "format_2"]


def test_the_outcome_verifier_comes_first_wherever_it_is_written() -> None:
    judgement = judge([SHORT, EXACT, LOWER], ["maybe"])[0]
    assert list(judgement.verdicts) == ["exact", "format", "format_2"]
    assert judgement.status == "wrong" and judgement.outcome == 0.0 and judgement.reward == -0.5


def test_an_unknown_outcome_has_no_reward() -> None:
    judgement = judge([EXACT, SHORT], ["yes"], reference=None)[0]
    assert (judgement.status, judgement.outcome, judgement.reward) == ("bad_reference", None, None)


def test_shaping_that_cannot_judge_leaves_the_outcome_and_takes_the_reward() -> None:
    catastrophic = {"type": "format", "pattern": "(y+)+e?s"}
    judgements = judge([EXACT, catastrophic], ["yes", "y" * 40, "yes"], VerifierPoolConfig(workers=1, timeout=0.5))
    assert [j.outcome for j in judgements] == [1.0, 0.0, 1.0]
    assert [j.reward for j in judgements] == [2.0, None, 2.0]
    assert judgements[1].verdicts["format"].status == "timeout"


@pytest.mark.parametrize(
    ("sections", "found"), [([SHORT], "not 0 (none)"), ([EXACT, {"type": "numeric"}], "not 2 (exact, numeric)")]
)
def test_exactly_one_verifier_judges_the_outcome(sections: list[dict], found: str) -> None:
    with pytest.raises(RecipeError) as caught:
        judge(sections, [])
    assert found in caught.value.what and caught.value.where == "verifier"
    assert "math" in caught.value.hint and "format" not in caught.value.hint
