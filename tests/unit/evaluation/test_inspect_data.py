"""`posttrain inspect` of data sets: figures by hand for rows of every kind, and the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.errors import DataError, RecipeError
from posttrain.evaluation.inspect_data import histogram, runs, words_of

LONG = "a farmer has nineteen sheep and sells all but seven of them to a neighbour who has none so how many are left"


def turn(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def call(*words: str):
    return CliRunner().invoke(app, ["inspect", *words], catch_exceptions=False)


def figures(*words: str) -> list[dict]:
    return json.loads(call(*words, "--json").output)


def test_conversations(tmp_path):
    talk = [turn("system", "be brief"), turn("user", "hi you"), turn("assistant", "hello")]
    longer = [
        *talk,
        turn("user", "and now?"),
        turn("assistant", "no", weight=0),
        turn("user", "x"),
        turn("assistant", "bye"),
    ]
    file = write(tmp_path / "rows.jsonl", *[{"messages": talk}] * 2, {"messages": longer}, {"messages": talk[:2]})
    [found] = figures(file)
    assert (found["kind"], found["rows"], found["exact"], found["same_prompt"], found["near"]) == (
        "completions",
        3,
        1,
        2,
        0,
    )
    assert found["roles"] == {"user": 5, "assistant": 5, "system": 3} and found["context"] == 1
    assert found["turns"] == {"3": 2, "7": 1} and found["unit"] == "words"
    assert found["lengths"]["prompt"] == [4] * 7 and found["lengths"]["whole"][-1] == 4 + 6
    assert found["read"]["bad"] == {"there is no assistant message to train on": 1}
    assert found["scripts"] == {"Latin": 1.0}


def test_a_mistyped_test_set_is_told_by_its_option(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"prompt": "q", "completion": "a"})
    for name, near in ((str(tmp_path / "rows.jsnl"), str(tmp_path / "rows.jsonl")), ("gsm9k", "gsm8k")):
        with pytest.raises(RecipeError) as error:
            call(file, "--no-near", "--against", name)
        assert str(error.value).startswith(f"--against: no such file, and no benchmark {name!r}")
        assert repr(near) in error.value.hint


def test_labels_of_conversations_are_told(tmp_path):
    rows = [{"messages": [turn("user", "q"), turn("assistant", "a")], "label": label} for label in (1, 0)]
    [found] = figures(write(tmp_path / "rows.jsonl", *rows), "--no-near")
    assert (found["kind"], found["good"]) == ("unpaired", 0.5)


def test_pairs_and_labels(tmp_path):
    pairs = [
        {"prompt": "q", "chosen": "one two", "rejected": "one"},
        {"prompt": "q", "chosen": "x", "rejected": "a b c"},
    ]
    votes = [{"prompt": "q", "completion": "a", "label": value} for value in (True, False, 1, True)]
    steps = [{"prompt": "q", "completions": ["a", "b b"], "labels": [True, False]}]
    files = [write(tmp_path / f"{n}.jsonl", *rows) for n, rows in (("p", pairs), ("v", votes), ("s", steps))]
    found = figures(*files)
    assert [each["kind"] for each in found] == ["preferences", "unpaired", "stepwise"]
    assert found[0]["longer_chosen"] == 0.5 and found[0]["lengths"]["rejected"][-1] == 3
    assert (found[1]["good"], found[1]["exact"], found[2]["good"]) == (0.75, 3, 0.5)
    assert found[2]["lengths"]["steps"] == [3] * 7


def test_near_duplicates_and_overlap_with_a_test_set(tmp_path):
    near = LONG.replace("nineteen", "ninety")
    other = "the train leaves at noon and needs three hours so at what time does it arrive in the other city"
    rows = [{"prompt": LONG}, {"prompt": LONG + " !"}, {"prompt": near}, {"prompt": other}]
    test = write(tmp_path / "test.jsonl", {"prompt": "Q: " + LONG.upper() + "?"}, {"prompt": "how many are left"})
    [found] = figures(write(tmp_path / "rows.jsonl", *rows), "--against", test)
    assert (
        found["exact"] == 0 and found["near"] == 1
    )  # by its words; one that differs in a fifth of its runs is not near
    assert found["overlap"] == {test: 3}
    [found] = figures(write(tmp_path / "rows.jsonl", *rows), "--against", test, "--words", "40", "--no-near")
    assert found["overlap"] == {test: 0} and found["near"] is None


def test_tokens_limits_and_pictures(tmp_path, tiny_model):
    rows = [{"prompt": "a" * n, "completion": "b" * 3} for n in (1, 5, 30)]
    file, plot = write(tmp_path / "rows.jsonl", *rows), tmp_path / "lengths.png"
    words = (file, "--model", str(tiny_model), "--max-length", "20", "--max-prompt-length", "4")
    [found] = figures(*words, "--output", str(tmp_path / "figures.json"))
    assert found["unit"] == "tokens" and found["lengths"]["prompt"][-1] == 30
    assert found["lengths"]["completion"] == [4] * 7 and found["lost"] == {"max_prompt_length": 2, "max_length": 1}
    assert json.loads((tmp_path / "figures.json").read_text()) == [found]
    text = call(*words, "--plot", str(plot)).output
    assert (
        "rows by length in tokens" in text and "█" in text and "33.3%" in text and plot.read_bytes()[:4] == b"\x89PNG"
    )


def test_sources_of_a_recipe(tmp_path):
    one = write(tmp_path / "one.jsonl", {"prompt": "q", "completion": "a"})
    two = write(tmp_path / "two.jsonl", {"messages": [turn("user", "hi"), turn("assistant", "a")]})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{init: {{}}}}\nmethod: {{name: sft}}\nbatch: {{rows_per_step: 1}}\n"
        "training: {max_steps: 1}\noutput: x\n"
        f"data: {{completions: [{{path: {one}}}, {{path: {two}, source: chat}}]}}\n"
    )
    assert [(each["name"], each["rows"]) for each in figures(str(recipe))] == [("one", 1), ("chat", 1)]


def test_a_split_of_a_folder(tmp_path):
    write(tmp_path / "train_sft-00000-of-00001.jsonl", {"prompt": "a", "completion": "b"})
    write(tmp_path / "train_prefs-00000-of-00001.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError, match="train_prefs or train_sft"):
        call(str(tmp_path))
    assert [each["kind"] for each in figures(str(tmp_path), "--split", "train_prefs")] == ["preferences"]
    assert [each["kind"] for each in figures(str(tmp_path), "--split", "train_sft")] == ["completions"]
    with pytest.raises(RecipeError, match="--split has no effect on a recipe"):
        call(str(Path(__file__).parents[3] / "recipes/data/pairs.yaml"), "--split", "train")


def test_wrong_options(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"text": "x"})
    with pytest.raises(DataError, match="the columns text fit no data format"):
        call(file)
    with pytest.raises(RecipeError, match="no kind 'pairs'"):
        call(file, "--kind", "pairs")
    with pytest.raises(RecipeError, match="--model has no effect on traces"):
        call(file, "--k", "1", "--model", "m")


def test_helpers():
    assert words_of("It's 3-4, Grüße!") == ["it", "s", "3", "4", "grüße"]
    assert runs(["a", "b", "c"], 2) == {"a b", "b c"} and runs(["a"], 2) == {"a"} and runs([], 2) == set()
    bars = histogram([1, 1, 1, 9], bins=2, width=6)
    assert [(count, bar) for _, count, bar in bars] == [(3, "█" * 6), (1, "█" * 2)]
    assert histogram([5, 5])[0][1] == 2
