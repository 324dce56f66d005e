"""Preference methods of several responses per row: curricula, revisions, posteriors, single completions; in float64."""

import dataclasses
import random

import pytest
import torch

from posttrain.config.schema import ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Preference, Problem
from posttrain.errors import DataError
from posttrain.methods import METHODS
from posttrain.methods.scored import ranked_pairs
from posttrain.models.tokenizer import load_tokenizer
from posttrain.objectives.batch import PreferenceBatch, TokenBatch


def build(name, **parameters):
    return METHODS[name](METHODS[name].Config(**parameters))


def completion(total, reference, length=2):
    """One completion of `length` tokens whose log-probs sum to `total`, after one token of prompt."""
    mask = torch.tensor([[False] + [True] * length])
    return TokenBatch(mask=mask, logps=mask.double() * total / length, ref_logps=mask.double() * reference / length)


def total(method, batch):
    """What the shell minimises on one micro-batch."""
    return sum(float(part.value.detach() / part.count.clamp(min=1)) for part in method.loss(batch).values())


def means(part):
    return {name: float(value / n) for name, (value, n) in part.diagnostics.items()}


def row(*scores, number=0, roles=("chosen", "rejected", "gold", "fourth"), **meta):
    """A row with as many responses as scores."""
    texts = {role: str(index) * 2 for index, role in enumerate(roles[: len(scores)])}
    problem = Problem(f"pairs/{number}", "1+1=", meta=meta, where=f"pairs.jsonl:{number + 1}")
    others = {role: text for role, text in texts.items() if role not in ("chosen", "rejected")}
    return Preference(problem, texts["chosen"], texts["rejected"], others, dict(zip(texts, scores, strict=True)))


# ---------------------------------------------------------------------------------------------------------- Curry-DPO


@pytest.mark.parametrize(
    ("scores", "pairs", "expected"),
    [
        ([5, 4, 3, 2], "best", [(0, 3), (0, 2), (0, 1)]),
        ([5, 4, 3, 2], "all", [(0, 3), (0, 2), (1, 3), (0, 1), (1, 2), (2, 3)]),
        ([5, 5, 3, 3], "best", [(0, 2), (0, 3)]),
        ([2, 3, 5, 4], "best", [(2, 0), (2, 1), (2, 3)]),
        ([1, 1], "all", []),
        ([1], "all", []),
    ],
)
def test_ranked_pairs(scores, pairs, expected):
    assert ranked_pairs(scores, pairs) == expected


def test_ranked_pairs_of_any_scores():
    generator = random.Random(0)
    for _ in range(100):
        scores = [generator.randint(0, 3) for _ in range(generator.randint(1, 6))]
        found = ranked_pairs(scores, "all")
        gaps = [scores[i] - scores[j] for i, j in found]
        assert all(gap > 0 for gap in gaps) and gaps == sorted(gaps, reverse=True)
        assert len(set(found)) == len(found)
        assert len(found) == sum(a != b for i, a in enumerate(scores) for b in scores[:i])


def test_curry_stages_go_from_the_easiest_pair_of_each_prompt_to_the_hardest():
    method = build("curry_dpo")
    prepared = method.prepare([row(5.0, 4.0, 3.0, 2.0, number=0), row(1.0, 9.0, 8.0, 1.0, number=1)])
    pairs = [
        (one.problem.id, one.chosen, one.rejected, one.scores["chosen"] - one.scores["rejected"]) for one in prepared
    ]
    assert pairs[:3] == [
        ("pairs/0#chosen>fourth", "00", "33", 3.0),
        ("pairs/0#chosen>gold", "00", "22", 2.0),
        ("pairs/0#chosen>rejected", "00", "11", 1.0),
    ]
    assert [pair[1:] for pair in pairs[3:]] == [("11", "00", 8.0), ("11", "33", 8.0), ("11", "22", 1.0)]
    stages = method.order(prepared)
    assert [sorted(stage) for stage in stages] == [[0, 3], [1, 4], [2, 5]]
    # A pair that did not fit leaves no hole: the next one of its prompt moves up.
    assert [sorted(stage) for stage in method.order(prepared[1:])] == [[0, 2], [1, 3], [4]]


def test_curry_by_gap_cuts_all_pairs_into_stages():
    method = build("curry_dpo", curriculum="gap", stages=2)
    prepared = method.prepare([row(float(gap), 0.0, number=gap) for gap in (1, 5, 3, 2, 4)])
    gaps = [[prepared[index].scores["chosen"] for index in stage] for stage in method.order(prepared)]
    assert gaps == [[5.0, 4.0], [3.0, 2.0, 1.0]]
    with pytest.raises(DataError, match="1 pairs do not make 2 stages"):
        method.order(prepared[:1])


def test_curry_refuses_data_without_a_curriculum():
    method = build("curry_dpo")
    with pytest.raises(DataError, match="one stage and no curriculum"):
        method.order(method.prepare([row(2.0, 1.0, number=n) for n in range(3)]))
    with pytest.raises(DataError, match="no two responses"):
        method.prepare([row(2.0, 2.0)])
    with pytest.raises(DataError, match="no score of rejected"):
        method.prepare([dataclasses.replace(row(2.0, 1.0), scores={"chosen": 1.0})])


def test_curry_remembers_its_stage():
    method = build("curry_dpo")
    assert method.refresh_reference and not build("curry_dpo", refresh_reference=False).refresh_reference
    method.begin_stage(2)
    batch = PreferenceBatch({"chosen": completion(-10.0, -11.0), "rejected": completion(-12.0, -11.5)})
    assert means(method.loss(batch)["preference"])["stage"] == 2.0
    other = build("curry_dpo")
    other.load_state_dict(method.state_dict())
    assert other.stage == 2
    assert total(other, batch) == total(build("dpo"), batch)


# --------------------------------------------------------------------------------------------------------------- SRPO


def test_srpo_renders_six_sequences():
    renderer = Renderer(load_tokenizer(ModelConfig(init={"tokenizer": {"type": "characters"}})))
    method = build("srpo", revision_template="Q:{prompt} A:{answer} better:")
    problem = Problem("p/0", "{answer}=?", where="p.jsonl:1")  # a placeholder in the data is data
    found = method.responses(Preference(problem, "good", "bad"), renderer)
    split = {
        role: (renderer.text(sample.ids[:at]), renderer.text(sample.ids[at:]))
        for role, sample in found.items()
        for at in [sample.loss_mask.index(1)]
    }
    assert split == {
        "chosen": ("{answer}=?", "good"),
        "rejected": ("{answer}=?", "bad"),
        "chosen|rejected": ("Q:{answer}=? A:bad better:", "good"),
        "rejected|rejected": ("Q:{answer}=? A:bad better:", "bad"),
        "chosen|chosen": ("Q:{answer}=? A:good better:", "good"),
        "rejected|chosen": ("Q:{answer}=? A:good better:", "bad"),
    }


def test_srpo_in_a_chat_rewrites_the_last_user_message():
    from posttrain.methods.srpo import revision

    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    problem = Problem("p/0", (system, user), where="p.jsonl:1")
    answer = ({"role": "assistant", "content": "a"},)
    found = revision(problem, answer, "{prompt}|{answer}")
    assert found.prompt == (system, {"role": "user", "content": "q|a"}) and found.id == problem.id
    with pytest.raises(DataError, match="2 messages"):
        revision(problem, answer * 2, "{prompt}{answer}")
    prefilled = Problem("p/0", (user, answer[0]), where="p.jsonl:1")
    with pytest.raises(DataError, match="assistant"):
        revision(prefilled, "a", "{prompt}{answer}")


def test_srpo():
    method = build("srpo", beta=0.1, alpha=0.8)
    ratios = {
        "chosen": 1.0,
        "rejected": -0.5,
        "chosen|rejected": 2.0,
        "rejected|rejected": 0.5,
        "chosen|chosen": 0.2,
        "rejected|chosen": -0.8,
    }
    batch = PreferenceBatch({role: completion(ratio - 5.0, -5.0) for role, ratio in ratios.items()})
    assert total(method, batch) == pytest.approx(0.29098, abs=1e-11)
    found = means(method.loss(batch)["preference"])
    assert found["srpo/generator_loss"] == pytest.approx(0.3249) and found["srpo/reviser_loss"] == pytest.approx(0.2825)
    at_start = PreferenceBatch({role: completion(-5.0, -5.0) for role in ratios})
    assert total(method, at_start) == pytest.approx(0.6, abs=1e-11)


# -------------------------------------------------------------------------------------------------------------- BRAIn


def brain_batch(proposal=None):
    logps, prior = (-2.5, -2.5, -4.5), (-2.0, -3.0, -4.0)
    responses = {f"response_{i}": completion(logps[i], prior[i]) for i in reversed(range(3))}  # the order is no matter
    values = {"rewards": [1.0, 0.0, -1.0]} | ({} if proposal is None else {"proposal_logps": proposal})
    return PreferenceBatch(
        responses, {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
    )


def test_brain():
    part = build("brain", n=3).loss(brain_batch())["posterior"]
    assert (part.unit, float(part.count)) == ("groups", 1.0)
    assert float(part.value) == pytest.approx(0.474320661037, abs=1e-11)
    found = means(part)
    target = (0.665240955775, 0.244728471055, 0.090030573170)
    assert found["brain/target_ess"] == pytest.approx(1 / sum(x * x for x in target))
    assert found["brain/best_weight"] == pytest.approx(0.211941557617)
    assert found["pairs/chosen_shift"] == pytest.approx(-0.25)


def test_brain_with_a_recorded_proposal():
    method = build("brain", n=3, proposal_logps="logq")
    assert total(method, brain_batch([-3.0, -2.0, -4.0])) == pytest.approx(0.275407754537, abs=1e-11)
    values = method.values(row(1.0, 0.0, -1.0, logq=[-3, -2.0, -4.0]))
    assert values == {"rewards": [1.0, 0.0, -1.0], "proposal_logps": [-3.0, -2.0, -4.0]}


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (row(1.0, 0.0), "2 responses .* compares 3"),
        (row(1.0, 0.0, 2.0), "no column 'logq'"),
        (row(1.0, 0.0, 2.0, logq=[-1.0, -2.0]), "list of 3 log-probs"),
        (row(1.0, 0.0, 2.0, logq=[-1.0, 2.0, -1.0]), "list of 3 log-probs"),
        (row(1.0, 0.0, 2.0, logq=[-1.0, float("-inf"), -1.0]), "list of 3 log-probs"),
        (row(1.0, 0.0, 2.0, logq="-1"), "list of 3 log-probs"),
    ],
)
def test_brain_refuses_rows(found, word):
    with pytest.raises(DataError, match=word):
        build("brain", n=3, proposal_logps="logq").prepare([found])


# -------------------------------------------------------------------------------------------------------------- A-LoL


def a_lol_batch(variant="a_lol", grad=False):
    tokens = [completion(-10.0, -10.5, 1), completion(-8.0, -8.0, 1), completion(-5.0, -2.0, 1)]
    both = {name: torch.cat([getattr(one, name) for one in tokens]) for name in ("mask", "logps", "ref_logps")}
    both["logps"] = both["logps"].requires_grad_(grad)
    value = 0.0 if variant in ("r_lol", "w_bc", "r_gold") else 0.5
    values = {"reward": [0.9, 0.2, 0.8], "value": [value] * 3}
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return PreferenceBatch({"completion": TokenBatch(**both)}, values)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 2.248295027600),
        ({"variant": "ref_free"}, 1.833333333333),
        ({"variant": "r_lol"}, 5.612830478767),
        ({"variant": "kl", "beta": 0.1}, 1.75),
        ({"variant": "w_bc"}, (9 + 1.6 + 4) / 3),
        ({"variant": "r_gold"}, (9 + 1.6 + 4) / 30),
        ({"variant": "seq"}, 2.248295027600),  # one token: the token's ratio is the sequence's
    ],
)
def test_a_lol(parameters, expected):
    method = build("a_lol", **parameters)
    assert total(method, a_lol_batch(method.config.variant)) == pytest.approx(expected, abs=1e-11)


def test_a_lol_gradient_and_metrics():
    batch = a_lol_batch(grad=True)
    part = build("a_lol").loss(batch)["policy"]
    (part.value / part.count).backward()
    grad = batch.responses["completion"].logps.grad[:, 1]
    assert grad.tolist() == pytest.approx([-0.219829502760, 0.0, -0.01], abs=1e-11)
    assert means(part) == {
        "pairs/logps_chosen": pytest.approx(-23 / 3),
        "pairs/chosen_shift": pytest.approx(-2.5 / 3),
        "a_lol/advantage": pytest.approx(0.7 / 3),
        "a_lol/weight": pytest.approx((1.648721270700 + 1 + 0.1) / 3),
        "a_lol/clipped": pytest.approx(1 / 3),
    }


def test_a_lol_trains_on_single_completions_that_beat_the_value():
    method = build("a_lol", value_column="v")
    rows = [row(0.9, 0.2, 0.8, number=0, v=0.5), row(0.1, 0.4, number=1, v="0.5")]
    prepared = method.prepare(rows)
    assert [(one.problem.id, one.chosen) for one in prepared] == [("pairs/0#chosen", "00"), ("pairs/0#gold", "22")]
    assert [method.values(one) for one in prepared] == [{"reward": 0.9, "value": 0.5}, {"reward": 0.8, "value": 0.5}]
    whole = build("a_lol", variant="w_bc").prepare(rows)
    assert len(whole) == 5 and build("a_lol", variant="w_bc").values(whole[0]) == {"reward": 0.9, "value": 0.0}


@pytest.mark.parametrize(
    ("parameters", "found", "word"),
    [
        ({}, row(0.9, 0.2), "no column 'value'"),
        ({}, row(0.9, 0.2, value="high"), "finite number"),
        ({}, row(0.9, 0.2, value=True), "finite number"),
        ({}, row(0.9, 0.2, value=1.0), "none of 2 completions scores above its value"),
        ({"variant": "w_bc"}, row(0.9, -0.2), "negative"),
        ({}, dataclasses.replace(row(0.9, 0.2, value=0.5), scores={}), "no score of chosen, rejected"),
    ],
)
def test_a_lol_refuses_rows(parameters, found, word):
    with pytest.raises(DataError, match=word):
        build("a_lol", **parameters).prepare([found])
