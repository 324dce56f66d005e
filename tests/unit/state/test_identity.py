import importlib.metadata
from dataclasses import dataclass, replace

import pytest
import torch

from posttrain.data.sample import Origin, Problem, Sample
from posttrain.errors import StateError
from posttrain.state.identity import check_names, compare, contents, flatten, refuse_changes, settings

BASE = {
    "model": {"path": "m", "init": None, "peft": None},
    "training": {"learning_rate": 0.1, "max_steps": 10, "lr_scheduler_type": "constant", "save_steps": None},
    "tracking": {"plots": True},
    "packages": {"torch": "2.13.0", "numpy": "2.1"},
    "world_size": 1,
    "output": "runs/a",
}


def changed(**values):
    run = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            run[section][name] = value
        else:
            run[section] = value
    return run


def test_flatten():
    assert flatten({"a": {"b": [1, "x", {}], "c": None}, "d": True}) == {
        "a.b.0": "1",
        "a.b.1": "x",
        "a.b.2": "{}",
        "a.c": "null",
        "d": "true",
    }


REFUSED = [
    (changed(training__learning_rate=0.2), "training.learning_rate: 0.1 -> 0.2"),
    (changed(packages__torch="2.14.0"), "packages.torch: 2.13.0 -> 2.14.0"),
    (changed(packages={"numpy": "2.1"}), "packages.torch: 2.13.0 -> (none)"),
    (changed(packages__vllm="1"), "packages.vllm: (none) -> 1"),
    (changed(world_size=2), "world_size: 1 -> 2"),
]


@pytest.mark.parametrize(("new", "line"), REFUSED)
def test_a_difference_is_shown_and_refused_unless_named(new, line):
    key = line.split(":")[0]
    with pytest.raises(StateError) as caught:
        refuse_changes(BASE, new, [], where="run/checkpoint-4")
    text = str(caught.value)
    assert text.startswith("run/checkpoint-4: ") and line in text and f"--allow-changed {key}" in text
    for allowed in (key, key.split(".")[0]):
        assert [str(d) for d in refuse_changes(BASE, new, [allowed], where="")][0] == line


@pytest.mark.parametrize(
    "new",
    [
        changed(output="elsewhere"),
        changed(tracking={"plots": False}),
        changed(training__save_steps=5),
        changed(training__max_steps=20),
        changed(model__path="moved"),
    ],
)
def test_what_changes_no_update_may_differ(new):
    assert len(refuse_changes(BASE, new, [], where="")) == 1


def test_a_longer_run_is_another_run_where_the_schedule_looks_at_its_length():
    old = changed(training__lr_scheduler_type="cosine")
    new = changed(training__lr_scheduler_type="cosine", training__max_steps=20)
    with pytest.raises(StateError, match="training.max_steps: 10 -> 20"):
        refuse_changes(old, new, [], where="")


def test_some_keys_cannot_be_allowed():
    new = changed(model__peft={"type": "lora", "r": 8})
    with pytest.raises(StateError, match="no checkpoint can be carried over"):
        refuse_changes(BASE, new, ["model"], where="")


def test_several_differences_come_together():
    new = changed(training__learning_rate=0.2, world_size=4)
    assert [d.key for d in compare(BASE, new)] == ["training.learning_rate", "world_size"]
    with pytest.raises(StateError) as caught:
        refuse_changes(BASE, new, ["world_size"], where="")
    assert "training.learning_rate" in str(caught.value) and "world_size" not in str(caught.value)


def test_only_what_is_at_hand_is_compared():
    assert compare({"content": {"rows": "1"}, **BASE}, BASE) == []


def test_allowed_names_are_checked():
    check_names(["training", "training.learning_rate", "content", "content.rows"], BASE)
    with pytest.raises(StateError, match="no such key") as caught:
        check_names(["training.learning_rat"], BASE)
    assert "training.learning_rate" in caught.value.hint


# ------------------------------------------------------------------------------------------------------------ contents


@dataclass(frozen=True)
class Row:
    text: str
    where: str


def hashes(rows=(Row("a", "x:1"),), items=(([1, 2], [0, 1]),), template="t", model=None):
    torch.manual_seed(0)
    return contents(rows, items, template, model or torch.nn.Linear(4, 4))["content"]


def test_contents_do_not_depend_on_where_rows_stand():
    assert hashes([Row("a", "x:1")]) == hashes([Row("a", "moved/y:9")])
    problem = Problem("file:1", "2+2", "4", {"level": 2}, "file:1")
    assert hashes([problem]) == hashes([replace(problem, id="moved:1", where="moved:1")])


def test_each_part_has_its_own_hash():
    base, model = hashes(), torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    for name, other in {
        "rows": hashes([Row("b", "x:1")]),
        "tokens": hashes(items=[([1, 3], [0, 1])]),
        "template": hashes(template="u"),
        "weights": hashes(model=model),
    }.items():
        assert other[name] != base[name]
        if name != "weights":
            assert {k for k in base if base[k] != other[k]} == {name}


def test_order_and_samples_and_types_of_files_are_hashed():
    import datetime

    sample = Sample(ids=[1, 2], loss_mask=[0, 1], origin=Origin.EXPERT, behaviour_logps=[0.0, -1.5])
    assert hashes([Row("a", ""), Row("b", "")])["rows"] != hashes([Row("b", ""), Row("a", "")])["rows"]
    other = replace(sample, behaviour_logps=[0.0, -1.25])
    assert hashes(items=[sample])["tokens"] != hashes(items=[other])["tokens"]
    dates = [hashes([Problem("", "", meta={"day": datetime.date(2026, 1, day)})])["rows"] for day in (1, 2)]
    assert dates[0] != dates[1]


def test_weights_of_any_type_are_hashed():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        one, other = (torch.nn.Linear(4, 4, dtype=dtype) for _ in range(2))
        assert hashes(model=one)["weights"] != hashes(model=other)["weights"]


def test_settings_hold_recipe_packages_and_ranks(load):
    now = settings(load({"name": "sft"}), 2)
    assert now["world_size"] == 2 and now["method"]["name"] == "sft"
    assert now["packages"]["torch"] == importlib.metadata.version("torch")
    assert compare(now, settings(load({"name": "sft"}), 2)) == []
    flat = flatten(now)
    assert {"training.learning_rate", "data.completions.task", "packages.python", "seed"} <= set(flat)


def test_files_of_several_sources_may_move_and_their_weights_may_not():
    old = {"data": {"completions": [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 2.0}]}}
    moved = {"data": {"completions": [{"path": "x/a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 2.0}]}}
    other = {"data": {"completions": [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 3.0}]}}
    assert [d.key for d in refuse_changes(old, moved, [], where="c")] == ["data.completions.0.path"]
    with pytest.raises(StateError, match=r"data\.completions\.1\.weight: 2\.0 -> 3\.0"):
        refuse_changes(old, other, [], where="c")
