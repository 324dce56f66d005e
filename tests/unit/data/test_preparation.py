from __future__ import annotations

import json

import pytest

from posttrain.config.loading import dump_recipe, load_recipe
from posttrain.config.needs import Needs
from posttrain.config.schema import Recipe, Section
from posttrain.data.preparation import corpus, fit_preferences, load_rows
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example
from posttrain.errors import DataError

NEEDS = Needs(data=("preferences",))


class Named(Section):
    name: str = "pair"


@pytest.fixture
def recipe(tmp_path):
    """`recipe(path, **limits)`: a recipe that reads pairs from the file."""

    def make(path, **limits) -> Recipe:
        data = {
            "model": {"init": {"max_length": 4096}},
            "data": {"preferences": {"path": str(path)}, **limits},
            "method": {"name": "pair"},
            "batch": {"rows_per_step": 1, "micro_batch": 1},
            "training": {"max_steps": 1},
            "output": "run",
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(data))
        return load_recipe(file, [], {"pair": Named})

    return make


def fit(recipe: Recipe, tokenizer):
    renderer = Renderer(tokenizer)

    def responses(row):
        texts = {"chosen": row.chosen, "rejected": row.rejected}
        return {role: renderer.sample(Example(row.problem, text)) for role, text in texts.items()}

    rows = load_rows(recipe, NEEDS)
    return rows, *fit_preferences(recipe, rows, responses, head_ids=renderer.head_ids)


def test_what_is_left_is_known_by_its_problem(recipe, tmp_path, make_tokenizer):
    path = tmp_path / "pairs.jsonl"
    pairs = [("a", "b"), ("a", "a"), ("a" * 50, "b"), ("c", "d")]
    path.write_text("".join(json.dumps({"prompt": "q", "chosen": c, "rejected": r}) + "\n" for c, r in pairs))
    rows, items, ledger = fit(recipe(path, max_length=10, max_lost_share=0.5), make_tokenizer())
    assert list(corpus(rows))[:3] == ["q", "a", "b"]
    assert [item["rejected"].problem_id for item in items] == ["preferences/0", "preferences/3"]
    assert (ledger.kept, ledger.dropped, ledger.identical, ledger.total) == (2, 2, 1, len(rows))
    with pytest.raises(DataError, match="50.0% of the rows would be lost"):
        fit(recipe(path, max_length=10), make_tokenizer())


def test_a_dumped_recipe_reads_the_same_pairs(recipe, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": "one two", "rejected": "one three"}) + "\n")
    before = recipe(path)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(before))
    again = load_recipe(tmp_path / "resolved.yaml", [], {"pair": Named})
    assert load_rows(again, NEEDS) == load_rows(before, NEEDS)


@pytest.mark.parametrize("policy", ["drop", "cut"])
def test_the_ledger_of_real_dialogues_adds_up(recipe, test_data, make_tokenizer, policy):
    path = test_data / "hh_harmless_test.jsonl.gz"
    limits = {"max_prompt_length": 600, "max_length": 900, "too_long": policy, "max_lost_share": 1.0}
    rows, items, ledger = fit(recipe(path, **limits), make_tokenizer("chatml", adds="bos"))
    assert ledger.total == len(rows) == 2312 and ledger.empty == 4
    assert len(items) == ledger.kept + ledger.cut and (ledger.cut > 0) == (policy == "cut")
    ids = [row.problem.id for row in rows]
    left = [item["chosen"].problem_id for item in items]
    assert len(set(left)) == len(left) and set(left) <= set(ids) and len(ids) - len(left) == ledger.dropped
    for item in items:
        chosen, rejected = item["chosen"], item["rejected"]
        assert max(len(chosen.ids), len(rejected.ids)) <= 900
        assert chosen.ids[: chosen.loss_mask.index(1)] == rejected.ids[: rejected.loss_mask.index(1)]
