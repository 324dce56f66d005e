"""The rule for the best checkpoint."""

import pytest

from posttrain.config.loading import parse_config
from posttrain.config.schema import BestConfig, EvaluationConfig
from posttrain.errors import DataError, RecipeError
from posttrain.evaluation.best import best_step, check_best
from posttrain.evaluation.report import SCHEMA, BenchmarkReport, Pass, Report, SamplingReport
from posttrain.evaluation.statistics import wilson_interval

SAMPLING = SamplingReport(greedy=True, samples=1, k=(1,), temperature=1.0, top_p=1.0, max_new_tokens=64, seed=0)


def _report(score: float | None, problems: int = 1000) -> Report:
    metrics = {"greedy": None if score is None else wilson_interval(score, problems)}
    counts = Pass(problems, 0, {}, 9, 9)
    benchmark = BenchmarkReport("sums", {}, [], "hash", 0, SAMPLING, metrics, None, counts, 1.0, ())
    return Report(SCHEMA, "step", "2030-01-01", "Engine", "template", {}, 1.0, (benchmark,))


RULE = BestConfig(benchmark="sums")


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ({0: 0.1, 10: 0.3, 20: 0.2}, 10),
        ({20: 0.3, 0: 0.1, 10: 0.3}, 10),  # of equal ones the earliest, whatever the order
        ({0: 0.0}, 0),
        ({0: None, 10: 0.1, 20: None}, 10),  # not judged
    ],
)
def test_the_highest_wins_and_of_equal_ones_the_earliest(scores: dict[int, float | None], step: int):
    best = best_step({at: _report(score) for at, score in scores.items()}, RULE)
    assert best.step == step
    assert best.measured.value == scores[step]


def test_it_says_which_others_the_data_do_not_tell_apart():
    scores = {0: 0.1, 10: 0.49, 20: 0.5, 30: 0.4}
    assert best_step({at: _report(score) for at, score in scores.items()}, RULE).not_worse == (10,)
    assert best_step({at: _report(score, 40) for at, score in scores.items()}, RULE).not_worse == (10, 30)


@pytest.mark.parametrize(
    ("reports", "rule", "message"),
    [
        ({0: _report(0.1)}, BestConfig(benchmark="summs"), "no evaluation has 'summs greedy'"),
        ({0: _report(0.1)}, BestConfig(benchmark="sums", measure="avg@4"), "no evaluation has 'sums avg@4'"),
        ({0: _report(None)}, RULE, "no evaluation has 'sums greedy'"),
        ({}, RULE, "no evaluation"),
    ],
)
def test_a_rule_that_fits_no_report_is_an_error(reports: dict, rule: BestConfig, message: str):
    with pytest.raises(DataError, match=message):
        best_step(reports, rule)


def _config(**best: str) -> EvaluationConfig:
    data = {"benchmarks": ["chain-sum-3", "gsm8k"], "every": 10, "samples": 4, "k": [1, 2], "maj": [4], "best": best}
    return parse_config(data, EvaluationConfig)


@pytest.mark.parametrize(
    "best",
    [
        {"benchmark": "chain-sum-3"},
        {"benchmark": "chain-sum-3", "measure": "avg@4"},
        {"benchmark": "gsm8k", "measure": "pass@2"},
        {"benchmark": "gsm8k", "measure": "maj@4"},
    ],
)
def test_rules_that_can_be_applied(best: dict[str, str]):
    check_best(_config(**best))


@pytest.mark.parametrize(
    ("best", "where"),
    [
        ({"benchmark": "chain-sum-4"}, "evaluation.best.benchmark"),
        ({"benchmark": "chain-sum-3", "measure": "avg@8"}, "evaluation.best.measure"),
        ({"benchmark": "chain-sum-3", "measure": "pass@4"}, "evaluation.best.measure"),
        ({"benchmark": "chain-sum-3", "measure": "maj@4"}, "evaluation.best.measure"),  # its verifier names no answers
    ],
)
def test_rules_that_cannot_be_applied_are_found_before_training(best: dict[str, str], where: str):
    with pytest.raises(RecipeError) as caught:
        check_best(_config(**best))
    assert caught.value.where == where
    assert caught.value.hint


def test_a_rule_needs_evaluations_while_training():
    with pytest.raises(RecipeError, match="set `every`"):
        parse_config({"benchmarks": ["gsm8k"], "best": {"benchmark": "gsm8k"}}, EvaluationConfig)
