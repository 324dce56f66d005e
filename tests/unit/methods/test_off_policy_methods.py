"""REC and its relatives, PrefixRL and RLSP: advantages, losses, starts and state by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Origin, Problem
from posttrain.errors import DataError
from posttrain.methods import METHODS
from posttrain.methods.base import Scored, Start
from posttrain.objectives.batch import TokenBatch


def build(name, **parameters):
    return METHODS[name](METHODS[name].Config(**parameters))


def scored(rewards, *, outcomes=None, **further):
    rows = torch.tensor(rewards, dtype=torch.float64)
    n = rows.numel()
    return Scored(
        rewards=rows.flatten(),
        outcomes=rows.flatten() if outcomes is None else torch.tensor(outcomes, dtype=torch.float64).flatten(),
        known=torch.ones(n, dtype=torch.bool),
        groups=torch.arange(rows.size(0)).repeat_interleave(rows.size(1)),
        lengths=further.pop("lengths", torch.full((n,), 5)),
        finished=torch.ones(n, dtype=torch.bool),
        max_new_tokens=20,
        verdicts=further.pop("verdicts", ("wrong",) * n),
        **further,
    )


def batch(log_ratios, advantages, *, logps=-1.0):
    """Rows of equal length with these log-ratios."""
    shifts = torch.tensor(log_ratios, dtype=torch.float64)
    current = torch.full_like(shifts, logps).requires_grad_()
    return TokenBatch(
        mask=torch.ones_like(shifts, dtype=torch.bool),
        logps=current,
        old_logps=current.detach() - shifts,
        advantages=torch.tensor(advantages, dtype=torch.float64),
    )


def divided(terms):
    return {name: float((part.value / part.count).detach()) for name, part in terms.items()}


# --------------------------------------------------------------------------------------------------------- REC, OPMD


def test_rec_averages_over_all_tokens_the_clipped_ones_too():
    method = build("rec")
    rows = batch([[0.0, 0.5], [0.0, 0.0]], [1.0, -1.0])  # exp(0.5) is above 1.2: clipped
    assert divided(method.loss(rows)) == pytest.approx({"policy": (1.0 - 1.0 - 1.0) / 4})
    assert method.epsilons == (0.2, 0.2)


def test_rec_on_sequences_masks_and_weighs_whole_rows_and_averages_over_rows():
    method = build("rec", clip="sequence_one_side", weight="sequence_importance")
    assert method.epsilons == (3e-4, 4e-4)
    rows = batch([[0.01, -0.01], [0.02, 0.0]], [1.0, 1.0])  # the first has ratio 1, the second exp(0.01)
    terms = method.loss(rows)
    assert terms["policy"].unit == "sequences"
    assert divided(terms) == pytest.approx({"policy": 0.5})


def test_rec_regularisers_act_on_clipped_tokens_too():
    rows = batch([[0.5]], [1.0])
    assert divided(build("rec", regularizer="forward_kl").loss(rows)) == pytest.approx({"policy": 0.1})
    assert divided(build("rec", regularizer="k2").loss(rows)) == pytest.approx({"policy": 0.1 * 0.25})


def test_red_drop_takes_rows_out_of_the_mean_and_depends_on_the_batch_of_rollouts_only():
    method = build("rec", clip="none", drop="balanced")
    rows = scored([[1, 0, 0, 0]], seed=3)
    advantages = method.advantages(rows)
    assert sorted(advantages.tolist()) == [-0.5, 0.0, 0.0, 0.5] and method.keep(rows).all()
    assert torch.equal(method.advantages(rows), advantages)
    drawn = {tuple(method.advantages(dataclasses.replace(rows, seed=seed)).tolist()) for seed in range(20)}
    assert len(drawn) == 3


def test_asymre_is_reinforce_with_a_lower_baseline():
    rows = batch([[0.4], [-2.0]], [0.5, -0.5], logps=-2.0)
    found = build("asymre").loss(rows)
    assert divided(found) == pytest.approx({"policy": (2 * 0.6 - 2 * 0.4) / 2})
    (gradient,) = torch.autograd.grad(found["policy"].value, rows.logps)
    assert gradient.flatten().tolist() == pytest.approx([-0.6, 0.4])


def test_opmd_in_its_three_forms():
    rows = batch([[0.1, 0.2, 0.3]], [0.0])
    assert divided(build("opmd").loss(rows)) == pytest.approx({"policy": 0.1 * 0.14 / 3})
    sequence = build("opmd", divergence="sequence").loss(rows)
    assert divided(sequence) == pytest.approx({"policy": 0.1 / 2 * 0.6**2})
    assert sequence["policy"].unit == "sequences"
    older = build("opmd", divergence="none", tau=0.5)
    assert divided(older.loss(batch([[0.1]], [3.0]))) == pytest.approx({"policy": 2.0})
    assert build("opmd", divergence="none").tau == 1.0


def test_kimis_mirror_descent_has_its_optimum_at_a_over_tau_at_any_length():
    method = build("opmd", divergence="sequence", tau=0.5)
    for length in (1, 400):
        rows = batch([[2.0 / length] * length], [1.0])  # the log-ratio of the row is 2 = A / tau
        found = method.loss(rows)
        assert divided(found) == pytest.approx({"policy": length + 0.5 / 2 * 4})
        (gradient,) = torch.autograd.grad(found["policy"].value, rows.logps)
        assert gradient.abs().max() < 1e-12
    # Half of the way there, each token is drawn by what is left: -(A - tau 1).
    rows = batch([[0.25] * 4, [0.0] * 4], [1.0, -1.0])
    (gradient,) = torch.autograd.grad(method.loss(rows)["policy"].value, rows.logps)
    assert gradient.tolist() == [[-0.5] * 4, [1.0] * 4]


def test_opmd_baselines():
    rows = scored([[1, 0, 0, 1, 0]])
    assert build("opmd").advantages(rows).tolist() == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4])
    soft = build("opmd", baseline="log_mean_exp", temperature=0.5).advantages(rows)
    assert soft.tolist() == pytest.approx([r - 0.6342650682 for r in (1, 0, 0, 1, 0)])


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("rec", {"weight": "sequence_importance"}, "goes with clip sequence_one_side"),
        ("rec", {"clip": "sequence_one_side", "weight": "importance"}, "weight sequence_importance"),
        ("rec", {"clip": "none", "epsilon_low": 0.1}, "no effect with clip none"),
        ("rec", {"epsilon_low_prime": 0.5}, "without clip ring"),
        ("rec", {"temperature": 2.0}, "without weight advantage"),
        ("rec", {"coefficient": 2.0}, "without a regularizer"),
        ("rec", {"drop_seed": 2}, "without drop"),
        ("opmd", {"temperature": 2.0}, "baseline mean"),
        ("prefixrl", {"fraction_low": 0.9}, "above fraction_high"),
        ("prefixrl", {"separator": ";"}, "boundary: line"),
        ("prefixrl", {"answer_pattern": "(boxed"}, "not a regular expression: missing \\)"),
        ("prefixrl", {"adapt_step": 0.1}, "adapt: success"),
        ("prefixrl", {"adapt": "success", "cuts_per_problem": 2}, "whose cuts move"),
        ("prefixrl", {"cuts_per_problem": None, "cut_seed": 2}, "fresh cuts"),
    ],
)
def test_wrong_parameters_and_those_without_effect_are_refused(name, parameters, message):
    with pytest.raises(ValidationError, match=message):
        METHODS[name].Config(**parameters)


# ---------------------------------------------------------------------------------------------------------- PrefixRL


class Characters:
    """Stands in for a renderer: a token is a character, 0 the end."""

    def text(self, ids):
        return "".join(chr(i) for i in ids if i)


TEXT = "1+2=3;3+3=6;6+4=10;10+5=15;#15"
PROBLEM = Problem("p/0", "1+2+3+4+5=", "15")


def trace(text=TEXT, outcome=1.0):
    ids = [*map(ord, text), 0]
    return KnownTrace(PROBLEM, [1], ids, [1] * len(ids), outcome=outcome)


def prefixrl(**parameters):
    method = build("prefixrl", **parameters)
    method.bind(Characters(), 0)
    return method


def starts(method, traces, n=200):
    return [method.start(PROBLEM, [1], traces, np.random.default_rng([7, i])) for i in range(n)]


def test_starts_mix_prefixes_of_a_few_cuts_with_none():
    found = starts(prefixrl(), [trace()])
    prefixed = [start for start in found if start.prefix]
    assert 0.65 < len(prefixed) / len(found) < 0.85
    assert {start.origin for start in prefixed} == {Origin.PREFIX}
    assert {start.origin for start in found if not start.prefix} == {Origin.POLICY}
    assert len({start.prefix for start in prefixed}) == 3
    for start in prefixed:
        n = len(start.prefix)
        assert list(start.prefix) == trace().ids[:n] and n <= TEXT.index("15")
        assert start.info == {"prefix_tokens": n, "prefix_fraction": n / len(TEXT)}
    assert found == starts(prefixrl(), [trace()])  # a function of the draws alone


def test_fresh_cuts_are_many():
    found = starts(prefixrl(cuts_per_problem=None, prefixed_share=1.0), [trace()])
    assert len({start.prefix for start in found}) > 5 and all(start.prefix for start in found)


def test_line_cuts():
    found = starts(prefixrl(boundary="line", separator=";", cuts_per_problem=None), [trace()])
    assert {Characters().text(start.prefix) for start in found} == {"", "1+2=3;3+3=6;", "1+2=3;3+3=6;6+4=10;"}


def test_without_a_correct_trace_it_starts_at_the_prompt():
    for traces in ([], [trace(outcome=0.0)], [trace("15")]):
        assert set(map(repr, starts(prefixrl(), traces, 20))) == {repr(Start())}
    assert any(start.prefix for start in starts(prefixrl(), [trace(outcome=None)], 20))


def test_a_problem_without_reference_needs_a_pattern():
    bare = dataclasses.replace(trace(), problem=dataclasses.replace(PROBLEM, reference=None))
    with pytest.raises(DataError, match="no reference"):
        starts(prefixrl(), [bare], 5)
    found = starts(prefixrl(answer_pattern="#"), [bare])
    assert all(len(start.prefix) <= TEXT.index("#") for start in found)


def observed(method, successes, kind=Origin.PREFIX):
    rows = scored([successes], kinds=(kind,) * len(successes), problem_ids=("p/0",) * len(successes))
    method.observe(rows)


def test_adapted_prefixes_grow_with_failure_and_shrink_with_success():
    method = prefixrl(adapt="success", prefixed_share=1.0, fraction_low=0.1, adapt_step=0.2)
    first = starts(method, [trace()], 1)[0]
    assert len(first.prefix) == TEXT.index("15")  # 0.8 of it would show the answer
    observed(method, [1, 1, 1, 0])
    assert method.fractions == {"p/0": pytest.approx(0.6)}
    assert len(starts(method, [trace()], 1)[0].prefix) == 18
    observed(method, [1, 0])  # on target
    observed(method, [1, 1], kind=Origin.POLICY)  # says nothing about prefixes
    assert method.fractions == {"p/0": pytest.approx(0.6)}
    for _ in range(5):
        observed(method, [1, 1])
    assert method.fractions == {"p/0": 0.1}
    for _ in range(5):
        observed(method, [0, 0])
    assert method.fractions == {"p/0": 0.8}


def test_adapted_fractions_are_saved():
    method = prefixrl(adapt="success")
    observed(method, [1, 1])
    other = prefixrl(adapt="success")
    other.load_state_dict(method.state_dict())
    assert other.fractions == method.fractions == {"p/0": pytest.approx(0.75)}
    assert prefixrl().state_dict() == {}


def test_the_loss_is_the_policy_gradient_on_the_continuation():
    probabilities = torch.tensor([[0.01, 0.02, 0.5, 0.25, 0.8, 0.9]], dtype=torch.float64)
    logps = probabilities.log().requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    method = build("prefixrl", surrogate="cispo", aggregation="tokens")  # on-policy: the loss is -A l
    rows = TokenBatch(mask=mask, logps=logps, advantages=torch.tensor([0.375], dtype=torch.float64))
    terms = method.loss(rows)
    assert divided(terms) == pytest.approx({"policy": 0.2257449008}, abs=1e-9)
    (gradient,) = torch.autograd.grad(terms["policy"].value, logps)
    assert gradient[0, :2].tolist() == [0.0, 0.0]
    assert gradient[0, 2:].tolist() == pytest.approx([-0.375] * 4)


def test_advantages_of_mean_and_of_deviation():
    rewards = [[1, 0, 1, 1, 0, 0, 1, 1]]
    assert set(build("prefixrl").advantages(scored(rewards)).tolist()) == {0.375, -0.625}
    scaled = build("prefixrl", scale_rewards="group").advantages(scored(rewards)).tolist()
    assert scaled[:2] == pytest.approx([0.7244288644, -1.2073814406], abs=1e-9)
    assert build("prefixrl").advantages(scored([[0] * 8])).abs().max() == 0


# -------------------------------------------------------------------------------------------------------------- RLSP


def test_rlsp_rewards_search_beside_the_outcome():
    method = build("rlsp", length_cost=1000.0, alpha=0.8, scale_rewards="none")
    rows = scored(
        [[1.9, 0.0]],
        outcomes=[[1.0, 0.0]],
        lengths=torch.tensor([2000, 1000]),
        verdicts=("correct", "no_answer"),
    )
    rewards = 0.8 * 0.5 + 0.2 * 0.9, 0.8 * -1.5
    assert method.advantages(rows).tolist() == pytest.approx(
        [(rewards[0] - rewards[1]) / 2, (rewards[1] - rewards[0]) / 2]
    )


def test_rlsp_filters_groups_by_the_outcome_and_not_by_the_shaped_reward():
    rows = scored([[0.0, 0.0], [1.0, 0.0]], lengths=torch.tensor([2, 9, 5, 5]))
    plain = build("rlsp", length_cost=1.0, scale_rewards="none")
    assert plain.advantages(rows)[0] < 0 < plain.advantages(rows)[1]  # nobody is right, and longer is better
    filtered = build("rlsp", length_cost=1.0, scale_rewards="none", filter="outcome")
    assert filtered.advantages(rows).tolist() == pytest.approx([0.0, 0.0, 0.5, -0.5])
    assert filtered.keep(rows).tolist() == [False, False, True, True]
