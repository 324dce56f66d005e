from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from math import comb

import pytest

from posttrain.data.traces import Manifest, Trace, TraceSet
from posttrain.errors import DataError
from posttrain.evaluation.advice import advise
from posttrain.evaluation.inspect import inspect_traces, stopped_pass_at_k


def manifest(id="m", kind="sampled", **sampling) -> Manifest:
    return Manifest(id, kind, {"label": id}, {}, "", sampling=sampling or None)


def traces(outcomes, problem="p", policy="base", manifest="m", texts=None, **keys) -> list[Trace]:
    """Traces of one problem; 1 right, 0 wrong, None not judged."""
    verdicts = {1: "correct", 0: "wrong", None: "timeout"}
    keys = {"ids": [1, 2], "logps": [-0.5, -1.5], "finished": True} | keys
    return [
        Trace(
            problem,
            number,
            f"{problem}?",
            str(number) if texts is None else texts[number],
            policy,
            manifest,
            verdict=verdicts[outcome],
            outcome=None if outcome is None else float(outcome),
            reward=None if outcome is None else float(outcome),
            **keys,
        )
        for number, outcome in enumerate(outcomes)
    ]


def found(*groups, manifests=None) -> TraceSet:
    return TraceSet([trace for group in groups for trace in group], manifests or {"m": manifest()})


# ------------------------------------------------------------------------------------------------- rates under stopping


@pytest.mark.parametrize(("size", "most", "enough"), [(1, 6, 1), (2, 3, 1), (3, 3, 2), (4, 2, 3), (3, 2, 7)])
@pytest.mark.parametrize("rate", [0.07, 0.4, 0.9])
def test_the_estimates_have_the_right_mean(size, most, enough, rate):
    """Every way a run can go, with its probability: the mean of the estimate is what it estimates."""
    for k in range(1, size + 1):
        solved = 0.0
        for draws in product((0, 1), repeat=size * most):
            rounds, correct = 0, 0
            while rounds < most and correct < enough:
                correct += sum(draws[rounds * size : (rounds + 1) * size])
                rounds += 1
            probability = rate ** sum(draws) * (1 - rate) ** (len(draws) - sum(draws))
            solved += probability * stopped_pass_at_k((size,) * rounds, correct, k, enough)
        assert solved == pytest.approx(1 - (1 - rate) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(8, 0, 1), (8, 3, 1), (8, 3, 4), (8, 8, 8), (5, 1, 5)])
def test_one_round_is_plain_pass_at_k(n, correct, k):
    expected = 1 - comb(n - correct, k) / comb(n, k)
    assert stopped_pass_at_k((n,), correct, k, 10**6) == pytest.approx(expected)


def test_more_than_a_round_cannot_be_estimated():
    with pytest.raises(ValueError, match="pass@3"):
        stopped_pass_at_k((2, 2), 1, 3, 1)


def test_a_stopped_run_is_not_overrated():
    # Stopped at the first correct one, of problems with a rate of 1/4: the plain share is far too high.
    design = manifest(round_size=1, stop_at_correct=1)
    groups = []
    for index in range(64):  # lengths as they are expected: 16 stop at once, 12 after two, ...
        length = next(n for n in range(1, 20) if index < 64 * (1 - 0.75**n) or n == 19)
        groups.append(traces([0] * (length - 1) + [1], f"p{index}"))
    looked = inspect_traces(found(*groups, manifests={"m": design}), ks=[1, 2])
    assert looked.stopped_early and looked.pass_at[1].value == pytest.approx(0.25, abs=0.01)
    assert 2 not in looked.pass_at
    plain = inspect_traces(found(*groups), ks=[1])
    assert plain.pass_at[1].value > 0.4 and not plain.stopped_early


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_of_a_policy():
    teacher = traces([1], "never", "teacher", "t", ids=None, logps=None, finished=None)
    looked = inspect_traces(
        found(
            traces([1, 1, 1, 1], "always"),
            traces([1, 0, 0, None], "sometimes", texts=["a", "b", "b", "c"]),
            traces([0, 0, 0, 0], "never", finished=False),
            teacher,
            manifests={"m": manifest(round_size=4), "t": manifest("t", "taken in")},
        ),
        ks=[1, 2, 4, 8],
    )
    assert looked.policy == "base" and looked.prompts == 3 and looked.traces == 12
    assert (looked.always, looked.sometimes, looked.never, looked.never_by_anyone) == (1, 1, 1, 0)
    assert looked.unknown == pytest.approx(1 / 12)
    assert looked.pass_at[1].value == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert looked.pass_at[2].value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert looked.pass_at_prompts == {1: 3, 2: 3, 4: 2} and looked.pass_at[4].value == 0.5
    assert looked.returns == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert looked.returns_within == pytest.approx((2 / 9) ** 0.5 / 3)
    assert looked.distinct == pytest.approx(11 / 12) and looked.distinct_correct == 2.5
    assert (looked.logp_per_token, looked.logp_per_trace, looked.length) == (-1.0, -2.0, 2.0)
    assert looked.truncated == pytest.approx(1 / 3)
    assert list(looked.informative) == [2, 4, 8, 16, 32, 64]
    assert looked.informative[2].low < 2 / 9 < looked.informative[2].high  # of three judged ones, one right
    assert looked.pairs == pytest.approx(2 / 3)
    assert [(each.policy, each.kind, each.traces) for each in looked.policies] == [
        ("base", "sampled", 12),
        ("teacher", "taken in", 1),
    ]
    assert looked.figures[2].correct_by_others == 1
    json.dumps(looked.to_dict(), allow_nan=False)


def test_the_policy_is_the_one_that_sampled_most_or_the_one_asked_for():
    both = found(
        traces([1] * 3, policy="teacher", manifest="t", ids=None),
        traces([0] * 2),
        manifests={"m": manifest(), "t": manifest("t", "taken in")},
    )
    assert inspect_traces(both).policy == "base"
    looked = inspect_traces(both, policy="teacher")
    assert looked.always == 1 and looked.truncated == 0.0
    with pytest.raises(DataError, match="did you mean 'teacher'"):
        inspect_traces(both, policy="teachr")
    with pytest.raises(DataError, match="no traces"):
        inspect_traces(found())


def test_texts_without_verdicts():
    looked = inspect_traces(found(traces([None, None], ids=None, logps=None, finished=None)))
    assert looked.pass_at == {} and looked.informative == {} and looked.unknown == 1.0
    assert looked.truncated is None and looked.logp_per_token is None and looked.returns is None
    advice = advise(looked)
    assert [each.word for each in advice] == ["first"] and "no trace has a verdict" in advice[0].reason


# -------------------------------------------------------------------------------------------------------------- advice


def words(*groups, manifests=None) -> dict[str, str]:
    advice = advise(inspect_traces(found(*groups, manifests=manifests)))
    assert all(each.reason for each in advice)
    return {each.family: each.word for each in advice}


def test_advice_where_there_is_signal():
    said = words(*(traces([1, 0] * 8, f"p{i}") for i in range(10)))
    assert said == {
        "online RL": "yes",
        "preferences": "yes",
        "SFT on correct traces": "yes",
        "prefixes of traces": "no",
        "expert traces inside RL": "no",
    }


def test_graded_rewards_have_signal_where_nothing_is_correct():
    graded = [
        [replace(trace, reward=trace.sample / 10) for trace in traces([0] * 5, f"problem {number}")]
        for number in range(100)
    ]
    looked = inspect_traces(found(*graded))
    assert looked.informative[2].value == pytest.approx(0.8, abs=0.02)
    assert {each.family: each.word for each in advise(looked)}["online RL"] == "yes"


def test_the_word_on_online_learning_follows_the_interval():
    one_each = inspect_traces(found(*(traces([n % 2], f"p{n}", ids=None) for n in range(10))))
    few, many = advise(one_each)[0], advise(inspect_traces(found(*(traces([1, 0] * 8, f"p{n}") for n in range(10)))))[0]
    share = one_each.informative[8]
    assert share.value > 0.3 and share.low < 0.1
    assert few.word == "perhaps" and f"({share.low:.0%} to {share.high:.0%})" in few.reason
    assert "sample more" in few.reason and many.word == "yes"


def test_advice_where_problems_are_hard():
    hard = [traces([1] + [0] * 31, f"p{i}") for i in range(10)]
    said = words(*hard)
    assert (said["online RL"], said["prefixes of traces"]) == ("perhaps", "yes")


def test_advice_where_only_others_succeed():
    groups = [traces([0] * 8, f"p{i}") for i in range(4)]
    groups += [traces([1], f"p{i}", "teacher", "t", ids=None) for i in range(4)]
    said = words(*groups, manifests={"m": manifest(), "t": manifest("t", "taken in")})
    assert (said["online RL"], said["expert traces inside RL"], said["prefixes of traces"]) == ("no", "yes", "yes")
    assert "problems" not in said


MEND = [
    ([1, None], {}, "verifier", "no verdict"),
    ([1, 0], {"finished": False}, "length", "raise rollouts.max_new_tokens"),
    ([0, 0], {}, "problems", "solved by nobody"),
    ([1, 1], {}, "problems", "harder problems"),
    ([1, 0, 0, 0], {"texts": ["a", "b", "b", "b"]}, "variety", None),
    ([1, 0, 0, 0, 0], {"texts": ["a", "b", "b", "b", "b"]}, "variety", "repeats"),
]


@pytest.mark.parametrize(("outcomes", "keys", "family", "reason"), MEND)
def test_what_to_mend_comes_first(outcomes, keys, family, reason):
    advice = advise(inspect_traces(found(traces(outcomes, **keys))))
    reasons = [each.reason for each in advice if each.word == "first" and each.family == family]
    assert reasons == [] if reason is None else reason in reasons[0]
