"""Runs with a cache of the reference's log-probs: the same numbers, and no reference in memory where it hits."""

import json
import shutil

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file

from posttrain.config.loading import build_recipe
from posttrain.config.locations import Locations
from posttrain.config.preflight import check_needs
from posttrain.errors import NeedsError
from posttrain.methods import CONFIGS, METHODS
from posttrain.models import reference as reference_module
from posttrain.trainers import run as run_module
from posttrain.trainers.run import train

CLOCK = (
    "time",
    "step_seconds",
    "rollout_seconds",
    "tokens_per_second",
    "wall_seconds",
    "cpu_seconds",
    "cpu_seconds_total",
)


@pytest.fixture
def run(load, tmp_path, monkeypatch):
    """`run(name, method, changes)` -> weights, log lines, and how many forward passes the reference took."""
    passes = []
    score = reference_module.Reference.token_logps

    def counted(self, *inputs):
        passes.append(len(inputs[0]))
        return score(self, *inputs)

    monkeypatch.setattr(reference_module.Reference, "token_logps", counted)

    def run(name, method=None, changes=None):
        passes.clear()
        recipe = load(method or {"name": "dpo"}, {"output": str(tmp_path / name), **(changes or {})})
        result = train(recipe)
        lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines if "loss" in line]
        return load_file(result.model_dir / "model.safetensors"), lines, len(passes)

    return run


@pytest.fixture(scope="module")
def once(make_recipe_data, tiny_model, tmp_path_factory):
    """A cache that a run of DPO has filled."""
    folder = tmp_path_factory.mktemp("filled")
    data = make_recipe_data(tiny_model, folder, {"name": "dpo"}, {"reference.cache": str(folder / "cache")})
    train(build_recipe(data, Locations("test"), CONFIGS))
    return folder / "cache"


@pytest.fixture
def filled(once, tmp_path):
    """A copy of it, and the key that names it."""
    return {"reference.cache": str(shutil.copytree(once, tmp_path / "cache"))}


def assert_same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]


def test_a_hit_trains_the_same_model_without_a_pass(run, tmp_path):
    cached = {"reference": {"cache": str(tmp_path / "cache")}}
    without = run("without")
    first, second = run("first", changes=cached), run("second", changes=cached)
    assert first[2] > 0 and second[2] == 0
    assert_same(first, second)
    assert first[1][0]["loss"] == pytest.approx(without[1][0]["loss"], abs=1e-6)
    assert second[1][0]["tokens_trained"] == without[1][0]["tokens_trained"]
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".safetensors"


def test_other_steps_and_seeds_hit_too(run, filled):
    assert run("longer", changes=filled | {"training.max_steps": 4, "seed": 5})[2] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"data.max_length": 16, "data.max_lost_share": 1.0},
        {"training.bf16": True},
        {"model.dtype": "bfloat16"},
        {"data.preferences.limit": 20},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_rows_or_precision_miss(change, run, filled, tmp_path):
    assert run("second", changes=filled | change)[2] > 0
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_model_or_template_misses(run, filled, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(tmp_path / "other")
    assert run("model", changes=filled | {"model.path": str(tmp_path / "other")})[2] > 0
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    assert run("same", changes=filled | {"model.path": str(tmp_path / "other")})[2] == 0  # wherever it lies
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "other")
    assert run("template", changes=filled | {"model.path": str(tmp_path / "other")})[2] > 0


@pytest.mark.parametrize(
    ("method", "changes", "copies"),
    [
        ({"name": "dpo"}, {}, [1, 0]),
        ({"name": "hypo", "lam": 0.05}, {}, [1, 1]),  # its samples are scored in every step
        ({"name": "curry_dpo"}, {}, [1, 1]),  # refreshed at every stage
        ({"name": "dpo"}, {"model.peft": {"type": "lora", "r": 2}}, [0, 0]),
    ],
    ids=["dpo", "hypo", "curry_dpo", "lora"],
)
def test_the_reference_is_held_only_where_it_is_asked_again(method, changes, copies, load, tmp_path, monkeypatch):
    made, references = [], []
    copy, built = reference_module.frozen_copy, run_module.ReferencePlan.build

    def build(self, shell):
        references.append(built(self, shell))
        return references[-1]

    monkeypatch.setattr("posttrain.trainers.reference.frozen_copy", lambda model: made.append(1) or copy(model))
    monkeypatch.setattr(run_module.ReferencePlan, "build", build)
    counts = []
    for name in ("first", "second"):
        made.clear()
        train(load(method, {**changes, "reference.cache": str(tmp_path / "cache"), "output": str(tmp_path / name)}))
        counts.append(len(made))
    assert counts == copies
    kept = copies[1] > 0 or "model.peft" in changes
    assert all((reference.model is not None) == kept for reference in references)


def test_methods_that_score_again_train_the_same_with_a_cache(run, tmp_path):
    cached = {"reference.cache": str(tmp_path / "cache")}
    for method in ({"name": "hypo", "lam": 0.05}, {"name": "curry_dpo"}):
        runs = [run(f"{method['name']}-{number}", method, cached) for number in range(2)]
        assert_same(*runs)
        assert 0 < runs[1][2] < runs[0][2]


def test_a_damaged_file_is_named_and_scored_anew(run, tmp_path, capsys):
    cached = {"reference.cache": str(tmp_path / "cache")}
    first = run("first", changes=cached)
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    second = run("second", changes=cached)
    before, after = load_tensors(whole), load_tensors(file.read_bytes())
    assert second[2] > 0 and all(torch.equal(before[name], after[name]) for name in before)
    assert str(file) in capsys.readouterr().out.replace("\n", "")
    assert_same(first, second)


def test_ranks_must_agree_so_only_one_reads(tmp_path):
    from posttrain.models.reference_cache import ReferenceCache
    from posttrain.trainers.reference import _read_once

    cache = ReferenceCache(tmp_path, {"rows": "a"})
    assert _read_once(cache, PartialState(cpu=True)) is None and cache.damaged is None


@pytest.mark.parametrize(
    ("method", "said"), [({"name": "simpo"}, "has no reference"), ({"name": "grpo", "beta": 0.1}, "does not score")]
)
def test_a_cache_that_nothing_would_read_is_refused(method, said, load):
    recipe = load(method, {"reference": {"cache": "somewhere"}})
    needs = METHODS[method["name"]](recipe.method).needs
    with pytest.raises(NeedsError, match=said) as caught:
        check_needs(recipe, needs, method["name"])
    assert "reference" in caught.value.where
