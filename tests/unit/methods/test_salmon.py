"""SALMON: the sheet's numbers for the surest principle, which rows come of a row, and a judge that obeys negation."""

import json
from collections import Counter
from itertools import combinations

import pytest
import torch
from pydantic import ValidationError

from posttrain.data.principles import draw_principles, surest, variances_of, with_principles
from posttrain.data.sample import Preference, Problem
from posttrain.errors import DataError
from posttrain.methods.salmon import Salmon, SalmonConfig
from posttrain.objectives.reward import bradley_terry_loss
from posttrain.trainers.run import train
from posttrain.verifiers.principled import PrincipledVerifier
from posttrain.verifiers.verdict import Answer

PRINCIPLES = {name: {"text": f"be {name}", "negative": f"be not {name}"} for name in ("kind", "brief", "right")}
SCORES = {"kind": (2.0, 1.0), "brief": (0.5, -0.5), "right": (-3.0, -1.0)}
VARIANCES = {"kind": 2.0, "brief": 1.0, "right": 4.0}


@pytest.mark.parametrize(
    ("negated", "expected"),
    [("right", 0.75), ("kind right", -0.75), ("", 0.75), ("brief", 0.75)],
)
def test_the_surest_principle_decides(negated, expected):
    """Means over variances .75, 0 and -.5: the two orders of the second differ in sign."""
    assert surest(SCORES, VARIANCES, {name: name in negated for name in SCORES}) == expected


def test_without_the_surest_the_next_decides_and_none_may():
    assert surest(SCORES, VARIANCES, {"brief": False, "right": False}) == -0.5
    assert surest(SCORES, VARIANCES, {"brief": True}) == 0


def test_the_loss_is_that_of_a_reward_model():
    """The sheet's: r_1 = .4, r_0 = 1, the second output preferred."""
    scores = torch.tensor([[0.4], [1.0]], dtype=torch.float64)
    assert bradley_terry_loss(*scores).item() == pytest.approx(1.037487950486, abs=1e-12)


def test_the_number_of_principles_is_geometric_up_to_all_of_them():
    drawn = [draw_principles("abc", 0.2, 0.5, str(n)) for n in range(4000)]
    lengths, of_three = Counter(map(len, drawn)), 1 + 0.8 + 0.64
    for number in (1, 2, 3):
        assert lengths[number] / 4000 == pytest.approx(0.8 ** (number - 1) / of_three, abs=0.03)
    assert sum(map(sum, (one.values() for one in drawn))) / sum(map(len, drawn)) == pytest.approx(0.5, abs=0.03)
    assert {next(iter(one)) for one in drawn} == set("abc")


def row(number, scores, prompt="q"):
    return Preference(Problem(f"p/{number}", prompt, meta={"principles": scores}, where=f"line {number}"), "a", "b")


def made(rows, **parameters):
    given = {"principles": PRINCIPLES, "label_noise": 0.0, **parameters}
    return Salmon(SalmonConfig(**given)).prepare(rows)


def test_a_row_becomes_one_for_each_draw_and_negation_turns_it():
    rows = [row(n, {name: [1.0 + n % 2, 1.0] for name in PRINCIPLES}) for n in range(50)]
    found = made(rows, number=1.0)
    assert len(found) == 200 and len({one.problem.id for one in found}) == 200
    for one in found:
        assert one.problem.prompt.startswith("q\n\nJudge the response by these principles:\nbe ")
        assert (one.chosen == "b") == ("be not" in one.problem.prompt)
    assert found == made(rows, number=1.0) != made(rows, number=1.0, draw_seed=1)
    assert all(one.chosen == "a" for one in made(rows, negated=0.0))
    turned = [one.chosen == "b" for one in made(rows, negated=0.0, label_noise=0.25, passes=20)]
    assert sum(turned) / len(turned) == pytest.approx(0.25, abs=0.05)


def test_rows_by_which_nothing_is_better_are_left_out():
    kept = made([row(0, {name: [1.0, -1.0] for name in PRINCIPLES}), row(1, {name: [1, 2] for name in PRINCIPLES})])
    assert {one.problem.id.partition("#")[0] for one in kept} == {"p/1"}
    with pytest.raises(DataError, match="by no principle"):
        made([row(0, {name: [1.0, -1.0] for name in PRINCIPLES})])


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (None, "no scores by principle in column 'principles'"),
        ({"kind": [1, 2]}, "principle 'brief' needs two finite numbers, got None"),
        ({name: [1.0] for name in PRINCIPLES}, "two finite numbers, got"),
        ({name: [1.0, float("nan")] for name in PRINCIPLES}, "two finite numbers, got"),
        ({name: ["1", True] for name in PRINCIPLES}, "two finite numbers, got"),
    ],
)
def test_scores_that_are_none_are_named_with_their_line(scores, says):
    with pytest.raises(DataError, match=says) as raised:
        made([row(7, scores)])
    assert raised.value.where.startswith("line 7")


def test_variances_are_of_both_orders_and_one_where_there_is_none():
    rows = [{"a": (1.0, 2.0), "b": (3.0, 3.0)}, {"a": (3.0, 6.0), "b": (3.0, 3.0)}]
    assert variances_of(rows, "ab") == {"a": 3.5, "b": 1.0}


def test_in_a_chat_the_last_user_message_holds_them():
    chat = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    config = SalmonConfig(principles=PRINCIPLES, template="{principles} | {prompt} {x}")
    found = with_principles(Problem("p", chat), config.principles, {"kind": True, "right": False}, config.template)
    assert found.prompt == (chat[0], {"role": "user", "content": "be not kind\nbe right | q {x}"})
    with pytest.raises(DataError, match="must end with the user's message"):
        with_principles(Problem("p", chat[:1]), config.principles, {"kind": True}, config.template)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"negated": ["kid"]}, "no principle 'kid' to negate"),
        ({"sampled": 4}, "sampled is 4, and there are 3 principles"),
        ({"template": "{prompt}"}, "no {principles}"),
    ],
)
def test_a_verifier_by_other_principles_is_refused(parameters, says):
    with pytest.raises(ValidationError, match=says):
        PrincipledVerifier.Config(path="m", principles=PRINCIPLES, **parameters)


def test_what_a_prompt_is_judged_by_is_chosen_and_drawn():
    def asked(number, **parameters):
        config = PrincipledVerifier.Config(path="m", principles=PRINCIPLES, **parameters)
        return PrincipledVerifier(config).asked(Problem(str(number), "q"))

    assert asked(0, negated=["brief"]) == {"kind": False, "brief": True, "right": False}
    draws = [asked(n, sampled=2, negate=0.5) for n in range(200)]
    assert {len(one) for one in draws} == {2} and draws[3] == asked(3, sampled=2, negate=0.5)
    assert len({frozenset(one.items()) for one in draws}) == 12


def test_a_judge_that_has_learnt_prefers_the_contrary_where_it_is_asked_for(load, tmp_path):
    """Of one digit answers: the larger one, or the smaller. Without the principle in its prompt it could not know."""
    lines = []
    for one in range(10):
        for other in range(10):
            if one != other:
                scores = {"large": [one - other + 0.3, one - other - 0.3]}
                lines.append({"prompt": "1", "chosen": str(one), "rejected": str(other), "principles": scores})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {"principles": {"large": {"text": "+", "negative": "#"}}, "template": "{principles}={prompt}"}
    method = {"name": "salmon", **shared, "label_noise": 0.0, "passes": 2}
    changes = {"data.preferences": {"path": str(tmp_path / "pairs.jsonl"), "chat": False}, "training.max_steps": 120}
    run = train(load(method, {**changes, "batch.rows_per_step": 32, "batch.micro_batch": 32}))
    problems = [Problem(str(n), "1", chat=False) for n in range(10)]
    answers = [Answer(str(n)) for n in range(10)]
    scores = {}
    for negated in ([], ["large"]):
        config = PrincipledVerifier.Config(path=str(run.model_dir), **shared, negated=negated)
        scores[bool(negated)] = [one.score for one in PrincipledVerifier(config).verify(problems, answers)]
    rising = {side: sum(x < y for x, y in combinations(found, 2)) for side, found in scores.items()}
    assert rising[False] >= 40 and rising[True] <= 5  # of 45 pairs
