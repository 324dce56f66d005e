"""maj@k against enumeration, and which verdicts vote."""

import itertools
import random

import pytest

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.evaluation.majority import answer_of, majority_at_k, wrong_votes
from posttrain.evaluation.report import ProblemRecord, SamplingReport, measures
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.verdict import Status, Verdict


def _enumerated(answers: list[str | None], k: int) -> float:
    """Share of the k-subsets that `right` wins, ties by lot."""
    won, subsets = 0.0, list(itertools.combinations(answers, k))
    for subset in subsets:
        given = [answer for answer in subset if answer is not None]
        most = max((given.count(answer) for answer in given), default=0)
        top = {answer for answer in given if given.count(answer) == most}
        won += ("right" in top) / len(top) if top else 0.0
    return won / len(subsets)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_share_of_subsets_that_the_right_answer_wins(seed: int):
    rng = random.Random(seed)
    answers = [rng.choice(["right", "right", "a", "b", "c", None]) for _ in range(rng.randint(1, 9))]
    wrong = wrong_votes([None if answer == "right" else answer for answer in answers])
    for k in range(1, len(answers) + 1):
        expected = _enumerated(answers, k)
        assert majority_at_k(len(answers), answers.count("right"), wrong, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("judged", "correct", "wrong", "k", "expected"),
    [
        (3, 2, (1,), 3, 1.0),
        (4, 2, (2,), 4, 0.5),  # a tie
        (3, 1, (1, 1), 3, 1 / 3),
        (5, 2, (1, 1, 1), 5, 1.0),  # a plurality is enough
        (4, 0, (4,), 4, 0.0),
        (4, 1, (), 4, 1.0),  # the others abstain
        (4, 0, (), 4, 0.0),  # all abstain
        (8, 3, (5,), 1, 3 / 8),  # maj@1 is accuracy
    ],
)
def test_by_hand(judged: int, correct: int, wrong: tuple[int, ...], k: int, expected: float):
    assert majority_at_k(judged, correct, wrong, k) == pytest.approx(expected)


def test_many_samples_stay_exact():
    assert majority_at_k(256, 128, (127, 1), 256) == 1.0
    assert 0.5 < majority_at_k(256, 132, (124,), 64) < 1.0


@pytest.mark.parametrize(("judged", "correct", "wrong", "k"), [(3, 2, (2,), 1), (3, 1, (), 4), (3, 1, (), 0)])
def test_impossible_counts_are_refused(judged: int, correct: int, wrong: tuple[int, ...], k: int):
    with pytest.raises(ValueError):
        majority_at_k(judged, correct, wrong, k)


@pytest.mark.parametrize(
    ("verifier", "completion", "answer"),
    [
        ({"type": "math", "profile": "lenient"}, "so \\boxed{7}", "7"),
        ({"type": "numeric"}, "so 7", "7"),
        ({"type": "exact"}, " seven ", "seven"),
        ({"type": "choice", "profile": "lenient"}, "the answer is (B)", "B"),
    ],
)
def test_a_wrong_verdict_names_the_answer(verifier: dict, completion: str, answer: str):
    from posttrain.config.schema import BenchmarkConfig

    config = BenchmarkConfig.model_validate({"name": "x", "data": {"path": "x.jsonl"}, "verifier": [verifier]})
    assert config.verifier[0].names_answers
    reference = "A" if verifier["type"] == "choice" else "8"
    judge = build_judge(config.verifier, VerifierPoolConfig(workers=0))
    (judgement,) = judge.judge([Problem("p", "?", reference)], [completion])
    judge.close()
    assert judgement.status is Status.WRONG
    assert answer_of(next(iter(judgement.verdicts.values()))) == answer


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.WRONG])
def test_other_verdicts_do_not_vote_for_a_wrong_answer(status: Status):
    assert answer_of(Verdict(status, (0.0 if status.known else None), "7")) is None


def test_problems_with_too_few_judged_completions_or_without_answers_are_left_out():
    sampling = SamplingReport(True, 4, (1,), 1.0, 1.0, 64, 0, maj=(3, 4))
    records = [
        ProblemRecord("a", None, 4, 4, 2, (2,)),
        ProblemRecord("b", None, 4, 3, 2, (1,)),
        ProblemRecord("c", None, 4, 4, 2, None),
    ]
    found = {name: measure(records).tolist() for name, measure in measures(sampling).items() if "maj" in name}
    assert found["maj@4"][0] == 0.5
    assert found["maj@3"][1] == 1.0
    assert [value == value for value in found["maj@4"]] == [True, False, False]
