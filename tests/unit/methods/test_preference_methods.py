"""Preference methods: parameters, hooks and loss sums of pairs by hand, in float64."""

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from posttrain.config.schema import ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Preference, Problem
from posttrain.errors import DataError
from posttrain.methods import METHODS
from posttrain.methods.base import PointwiseMethod, PreferenceMethod, StepwiseMethod
from posttrain.models.tokenizer import load_tokenizer
from posttrain.objectives.batch import PreferenceBatch, TokenBatch

NAMES = [
    name
    for name, cls in METHODS.items()
    if issubclass(cls, PreferenceMethod) and not issubclass(cls, PointwiseMethod | StepwiseMethod)
]
"""Those of pairs."""


KIND = {"kind": {"text": "It is kind.", "negative": "It is not."}}


def build(name, **parameters):
    parameters = {"principles": KIND} | parameters if name == "salmon" else parameters
    return METHODS[name](METHODS[name].Config(**parameters))


def completion(total, reference=None, length=2, grad=False):
    """One completion of `length` tokens whose log-probs sum to `total`, after one token of prompt."""
    mask = torch.tensor([[False] + [True] * length])
    logps = mask.double() * total / length
    ref = None if reference is None else mask.double() * reference / length
    return TokenBatch(mask=mask, logps=logps.requires_grad_() if grad else logps, ref_logps=ref)


def pair(chosen, rejected, values=None, samples=None, **others):
    values = {name: torch.tensor([value], dtype=torch.float64) for name, value in (values or {}).items()}
    return PreferenceBatch({"chosen": chosen, "rejected": rejected, **others}, values, samples)


THE_PAIR = {"chosen": (-10.0, -11.0), "rejected": (-12.0, -11.5)}  # margin 1.5


def the_pair(**more):
    return pair(completion(*THE_PAIR["chosen"]), completion(*THE_PAIR["rejected"], length=3), **more)


def total(method, batch):
    """What the shell minimises on one micro-batch."""
    return sum(float(part.value.detach() / part.count.clamp(min=1)) for part in method.loss(batch).values())


def means(part):
    return {name: float(value / n) for name, (value, n) in part.diagnostics.items()}


def row(*scores, number=0, prompt="1+1=", roles=("chosen", "rejected", "gold", "fourth"), **meta):
    """A row with as many responses as scores."""
    texts = {role: str(index) * 2 for index, role in enumerate(roles[: len(scores)])}
    problem = Problem(f"pairs/{number}", prompt, meta=meta, where=f"pairs.jsonl:{number + 1}")
    others = {role: text for role, text in texts.items() if role not in ("chosen", "rejected")}
    return Preference(problem, texts["chosen"], texts["rejected"], others, dict(zip(texts, scores, strict=True)))


@pytest.fixture(scope="module")
def renderer():
    return Renderer(load_tokenizer(ModelConfig(init={"tokenizer": {"type": "characters"}})))


# ------------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize(
    ("name", "parameters", "reference", "samples"),
    [
        ("dpo", {}, True, False),
        ("simpo", {}, False, False),
        ("hypo", {}, True, True),
        ("hypo", {"lam": 0.0}, True, False),
        ("curry_dpo", {}, True, False),
        ("asft", {}, False, False),
        ("tpo", {}, False, False),
        ("cpl", {}, False, False),
        ("cpl", {"kl": True}, True, False),
        ("srpo", {}, True, False),
        ("brain", {}, True, False),
        *(("a_lol", {"variant": variant}, True, False) for variant in ("a_lol", "seq", "r_lol")),
        *(("a_lol", {"variant": variant}, False, False) for variant in ("ref_free", "w_bc", "r_gold")),
        ("a_lol", {"variant": "kl", "beta": 0.1}, True, False),
    ],
)
def test_needs(name, parameters, reference, samples):
    method = build(name, **parameters)
    assert method.needs.data == ("preferences",)
    assert (method.needs.reference, bool(method.needs.samples)) == (reference, samples)
    assert not method.needs.rollouts and not method.needs.verifier


@pytest.mark.parametrize(
    ("name", "parameters", "word"),
    [
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing has no effect"),
        ("dpo", {"loss": "robust"}, "needs label_smoothing"),
        ("dpo", {"loss": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ("dpo", {"loss": "ipo", "beta": 0.1}, "set tau"),
        ("dpo", {"tau": 0.1}, "set beta"),
        ("dpo", {"alpha": 0.3}, "alpha has no effect"),
        ("dpo", {"divergence": "alpha", "alpha": 1.0}, "less than 1"),
        ("dpo", {"beta": 0.0}, "greater than 0"),
        ("simpo", {"gamma": 1.0, "gamma_beta_ratio": 0.5}, "not both"),
        ("simpo", {"loss": "hinge", "label_smoothing": 0.1}, "no effect"),
        ("simpo", {"cpo_alpha": 1.0}, "cpo_alpha"),
        ("hypo", {"lam": 0.0, "k": 4}, "no effect with lam 0"),
        ("hypo", {"k": 1}, "k of at least 2"),
        ("curry_dpo", {"stages": 2}, "stages has no effect"),
        ("asft", {"lam": 0.0, "b": 0.5}, "b has no effect"),
        ("tpo", {"gamma": 0.3}, "set variant: tpo_l"),
        ("cpl", {"lam": 1.5}, "less than or equal to 1"),
        ("cpl", {"responses": 3, "bc_weight": 1.0}, "bc_weight has no effect"),
        ("srpo", {"revision_template": "{prompt} again"}, "has no {answer}"),
        ("srpo", {"revision_template": "again"}, "no {answer} and no {prompt}"),
        ("brain", {"n": 1}, "greater than or equal to 2"),
        ("a_lol", {"variant": "ref_free", "epsilon": 0.5}, "epsilon has no effect"),
        ("a_lol", {"variant": "w_bc", "value_column": "v"}, "value_column has no effect"),
        ("a_lol", {"beta": 0.1}, "beta has no effect"),
        ("a_lol", {"variant": "kl"}, "needs beta"),
    ],
)
def test_parameters_without_effect_or_out_of_range_are_refused(name, parameters, word):
    with pytest.raises(ValidationError, match=word):
        METHODS[name].Config(**parameters)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "salmon"])  # whose rows hold scores
def test_prepared_rows_can_be_told_apart_and_rendered(name, renderer):
    method = build(name, **({"n": 4} if name == "brain" else {}))
    prepared = method.prepare([row(3.0, 1.0, 4.0, 2.0, number=n, value=0.5) for n in range(3)])
    assert len({one.problem.id for one in prepared}) == len(prepared) >= 3
    assert all(one.chosen != one.rejected for one in prepared)
    stages = method.order(prepared)
    assert sorted(index for stage in stages for index in stage) == list(range(len(prepared)))
    roles = {tuple(method.responses(one, renderer)) for one in prepared}
    assert len(roles) == 1
    for one in prepared:
        assert all(sum(sample.loss_mask) > 0 for sample in method.responses(one, renderer).values())
        assert method.values(one).keys() == method.values(prepared[0]).keys()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "curry_dpo"])
def test_only_a_curriculum_has_state(name):
    assert build(name).state_dict() == {}


def test_a_method_without_an_online_term_makes_no_weights():
    with pytest.raises(RuntimeError, match="DPO draws no samples"):
        build("dpo").online_weights(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 0.620957047790),
        ({"loss": "conservative", "label_smoothing": 0.1}, 0.635957047790),
        ({"loss": "robust", "label_smoothing": 0.1}, 0.602207047790),
        ({"loss": "hinge"}, 0.85),
        ({"loss": "ipo", "tau": 0.1}, 12.25),
        # Per token: 1 / 2 - (-0.5 / 3) = 2 / 3
        ({"loss": "ipo", "tau": 0.1, "per_token": True}, (2 / 3 - 5) ** 2),
        ({"divergence": "forward_kl"}, 0.631154383572),
        ({"divergence": "js"}, 0.660652162510),
        ({"divergence": "alpha", "alpha": 0.3}, 0.625437693864),
    ],
)
def test_dpo(parameters, expected):
    assert total(build("dpo", **parameters), the_pair()) == pytest.approx(expected, abs=1e-11)


def test_dpo_metrics():
    part = build("dpo").loss(the_pair())["preference"]
    assert (part.unit, float(part.count)) == ("pairs", 1.0)
    assert means(part) == {
        "pairs/logps_chosen": -10.0,
        "pairs/logps_rejected": pytest.approx(-12.0),
        "pairs/reward_chosen": pytest.approx(0.1),
        "pairs/reward_rejected": pytest.approx(-0.05),
        "pairs/margin": pytest.approx(0.15),
        "pairs/accuracy": 1.0,
        "pairs/ties": 0.0,
        "pairs/length_difference": -1.0,
        "pairs/chosen_shift": pytest.approx(0.5),
        "pairs/saturated": 0.0,
    }


def test_dpo_at_the_reference_ties_are_neither_right_nor_wrong():
    found = build("dpo").loss(pair(completion(-10.0, -10.0), completion(-12.0, -12.0)))["preference"]
    assert float(found.value) == pytest.approx(0.693147180560)
    assert (means(found)["pairs/accuracy"], means(found)["pairs/ties"], means(found)["pairs/margin"]) == (0, 1, 0)
    for noise, accuracy, ties in ((5e-6, 0, 1), (-5e-6, 0, 1), (5e-5, 1, 0), (-5e-5, 0, 0)):  # beta is 0.1
        near = build("dpo").loss(pair(completion(-10.0 + noise, -10.0), completion(-12.0, -12.0)))["preference"]
        assert (means(near)["pairs/accuracy"], means(near)["pairs/ties"]) == (accuracy, ties)


def test_saturated_and_clamped_pairs_are_counted():
    far = pair(completion(-10.0, -100.0), completion(-200.0, -100.0))
    assert means(build("dpo").loss(far)["preference"])["pairs/saturated"] == 1.0
    assert "pairs/clamped" not in means(build("dpo").loss(far)["preference"])
    assert means(build("dpo", divergence="forward_kl").loss(far)["preference"])["pairs/clamped"] == 1.0
    assert means(build("dpo", divergence="forward_kl").loss(the_pair())["preference"])["pairs/clamped"] == 0.0


# ---------------------------------------------------------------------------------------------- SimPO, ASFT, TPO, CPL


def test_simpo_gamma_and_ratio_are_two_ways_to_say_the_same():
    batch = pair(completion(-8.0, length=4), completion(-6.0, length=2))
    assert total(build("simpo", beta=2.0, gamma=1.0), batch) == pytest.approx(0.313261687518, abs=1e-11)
    assert total(build("simpo", beta=2.0, gamma_beta_ratio=0.5), batch) == pytest.approx(0.313261687518, abs=1e-11)
    assert total(build("simpo"), batch) == total(build("simpo", gamma=0.5), batch)


def test_simpo_does_not_see_the_length():
    short = pair(completion(-8.0, length=4), completion(-6.0, length=2))
    doubled = pair(completion(-16.0, length=8), completion(-12.0, length=4))
    assert total(build("simpo"), short) == pytest.approx(total(build("simpo"), doubled), abs=1e-12)


def test_simpo_of_one_token_without_a_margin_is_dpo_without_a_reference():
    batch = pair(completion(-1.0, 0.0, length=1), completion(-2.5, 0.0, length=1))
    assert total(build("simpo", gamma=0.0), batch) == pytest.approx(total(build("dpo", beta=2.0), batch), abs=1e-12)


def test_likelihood_terms_are_token_means():
    batch = pair(completion(-8.0, length=4), completion(-6.0, length=2))
    terms = build("simpo", sft_weight=0.5).loss(batch)
    assert (terms["nll"].unit, float(terms["nll"].count)) == ("tokens", 4.0)
    assert float(terms["nll"].value) == 0.5 * 8.0
    assert set(build("simpo").loss(batch)) == {"preference"}


def test_asft():
    batch = pair(completion(-1.0), completion(-2.0))
    assert total(build("asft"), batch) == pytest.approx(1.458675145387, abs=1e-11)
    assert total(build("asft", lam=0.25), batch) == pytest.approx(0.739668786347, abs=1e-11)
    assert total(build("asft", b=0.5), batch) == pytest.approx(0.5 + 1.157745511786, abs=1e-11)
    found = means(build("asft").loss(batch)["preference"])
    assert found["pairs/reward_chosen"] == pytest.approx(0.432752129567, abs=1e-11)
    assert found["pairs/clamped"] == 0.0


def test_tpo():
    batch = pair(completion(-10.0, length=5), completion(-12.0, length=4), gold=completion(-6.0, length=4))
    assert total(build("tpo", alpha=0.9), batch) == pytest.approx(1.948138869382, abs=1e-11)
    assert total(build("tpo", variant="tpo_l", alpha=1.0), batch) == pytest.approx(1.701413277983, abs=1e-11)
    assert set(build("tpo", alpha=0.0).loss(batch)) == {"preference"}


def test_tpo_makes_triples_of_scored_responses():
    (made,) = build("tpo").prepare([row(2.0, 5.0, 1.0, 4.0, roles=("chosen", "rejected", "a", "b"))])
    assert (made.others, made.chosen, made.rejected) == ({"gold": "11"}, "33", "22")
    given = row(1.0, 0.0, 3.0)  # its third response is called gold
    assert build("tpo").prepare([given]) == [given]
    alone = row(1.0, 0.0)
    assert build("tpo", alpha=0.0).prepare([alone]) == [alone]


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (row(1.0, 0.0), "no gold response"),
        (dataclasses.replace(row(1.0, 2.0, 3.0, roles=("chosen", "rejected", "a")), scores={}), "no score of chosen"),
        (row(1.0, 3.0, 1.0, roles=("chosen", "rejected", "a")), "same score"),
    ],
)
def test_tpo_refuses_rows_without_a_triple(found, word):
    with pytest.raises(DataError, match=word) as error:
        build("tpo").prepare([found])
    assert error.value.where == "pairs.jsonl:1"


def test_cpl():
    batch = pair(completion(-20.0), completion(-30.0), {"preference": 1.0})
    assert total(build("cpl"), batch) == pytest.approx(0.974076984180, abs=1e-11)
    assert total(build("cpl", lam=1.0), batch) == pytest.approx(0.313261687518, abs=1e-11)
    tie = pair(completion(-20.0), completion(-30.0), {"preference": 0.5})
    assert total(build("cpl"), tie) == pytest.approx(1.550502497612, abs=1e-11)


def test_cpl_without_a_bias_is_a_contrast_that_others_know():
    batch = the_pair(values={"preference": 1.0})
    assert total(build("cpl", kl=True, lam=1.0), batch) == pytest.approx(total(build("dpo"), batch), abs=1e-12)
    assert total(build("cpl", lam=1.0), batch) == pytest.approx(total(build("tpo", alpha=0.0), batch), abs=1e-12)


def test_cpl_reads_ties_from_the_scores():
    assert build("cpl").values(row(2.0, 1.0)) == {"preference": 1.0}
    assert build("cpl").values(row(2.0, 2.0)) == {"preference": 0.5}
    assert build("cpl").values(dataclasses.replace(row(2.0, 2.0), scores={})) == {"preference": 1.0}


def test_cpl_ranks():
    method = build("cpl", responses=3)
    totals = {"response_0": -10.0, "response_1": -30.0, "response_2": -25.0}
    batch = PreferenceBatch(
        {role: completion(value) for role, value in totals.items()},
        {"scores": torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)},
    )
    part = method.loss(batch)["preference"]
    assert float(part.count) == float(method.counts(batch)["preference"]) == 3
    assert float(part.value / part.count) == pytest.approx(0.787759363859, abs=1e-11)
    assert means(part) == {"pairs/margin": pytest.approx(4 / 3), "pairs/accuracy": 1.0, "pairs/ties": 0.0}
    tied = PreferenceBatch(batch.responses, {"scores": torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)})
    assert float(method.counts(tied)["preference"]) == 2


# --------------------------------------------------------------------------------------------------------------- HyPO


def drawn(method, logps=(-5.0, -6.0), ref=(-5.5, -5.0)):
    tokens = [completion(value, reference) for value, reference in zip(logps, ref, strict=True)]
    both = {name: torch.cat([getattr(one, name) for one in tokens]) for name in ("mask", "logps", "ref_logps")}
    sums = torch.tensor(logps, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)
    return TokenBatch(**both, advantages=method.online_weights(*sums, torch.tensor([0, 0])))


@pytest.mark.parametrize(("lam", "expected"), [(0.1, 0.731350140827), (1e-4, 0.656425140827)])
def test_hypo(lam, expected):
    method = build("hypo", beta=0.05, lam=lam)
    samples = drawn(method)
    assert total(method, the_pair(samples=samples)) == pytest.approx(expected, abs=1e-11)
    online = method.loss(the_pair(samples=samples))["online"]
    assert (online.unit, float(online.count)) == ("sequences", 2.0)
    # Log-ratios .5 and -1 of two tokens each, and not the surrogate's value.
    assert means(online) == {"kl": pytest.approx(-0.5 / 4), "kl_sequence": pytest.approx(-0.25)}


def test_hypo_without_the_online_term_is_dpo_to_the_bit():
    hypo, dpo = build("hypo", lam=0.0), build("dpo")
    assert hypo.needs.samples == 0
    one = pair(completion(-10.0, -11.0, grad=True), completion(-12.0, -11.5, 3, grad=True))
    other = pair(completion(-10.0, -11.0, grad=True), completion(-12.0, -11.5, 3, grad=True))
    (left,), (right,) = hypo.loss(one).values(), dpo.loss(other).values()
    assert torch.equal(left.value, right.value) and torch.equal(left.count, right.count)
    assert {k: v[0].item() for k, v in left.diagnostics.items()} == {
        k: v[0].item() for k, v in right.diagnostics.items()
    }
    for part, batch in ((left, one), (right, other)):
        part.value.backward()
        assert batch.responses["chosen"].logps.grad is not None
    for role in ("chosen", "rejected"):
        assert torch.equal(one.responses[role].logps.grad, other.responses[role].logps.grad)


def test_hypo_takes_pairs_only_samples_only_and_both():
    method = build("hypo", lam=0.1)
    samples = drawn(method)
    both = method.loss(the_pair(samples=samples))
    pairs, alone = method.loss(the_pair()), method.loss(PreferenceBatch({}, {}, samples))
    no_rows = method.loss(the_pair(samples=samples).rows(slice(0, 0)))
    assert set(both) == set(pairs) == set(alone) == set(no_rows) == {"offline", "online"}
    assert torch.equal(pairs["offline"].value, both["offline"].value)
    assert (float(pairs["online"].value), float(pairs["online"].count)) == (0.0, 0.0)  # as in evaluation
    for found in (alone, no_rows):
        assert torch.equal(found["online"].value, both["online"].value)
        assert (float(found["offline"].value), float(found["offline"].count)) == (0.0, 0.0)


def test_hypo_at_the_reference_has_no_online_gradient():
    method = build("hypo", lam=0.1)
    samples = drawn(method, (-5.0, -6.0), (-5.0, -6.0))
    assert samples.advantages.tolist() == [0.0, 0.0]
    online = method.loss(the_pair(samples=samples))["online"]
    assert float(online.value) == 0.0 and means(online) == {"kl": 0.0, "kl_sequence": 0.0}


def test_hypo_refuses_samples_that_nobody_weighted():
    method = build("hypo")
    samples = dataclasses.replace(drawn(method), advantages=None)
    with pytest.raises(ValueError, match="online_weights"):
        method.loss(the_pair(samples=samples))
