"""Rows that cannot be used are left out, counted by reason and source, and named; or they end the run if asked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config.loading import load_recipe
from posttrain.config.schema import FileSource, Recipe
from posttrain.data.bad_rows import BadRows, reason_of
from posttrain.data.preparation import fit_preferences, fit_rows, load_rows
from posttrain.data.rendering import Renderer
from posttrain.data.sources import stepwise
from posttrain.data.truncation import Ledger
from posttrain.errors import DataError
from posttrain.methods import METHODS

RECIPE = """
model: {init: {max_length: 256}}
method: {name: METHOD}
batch: {rows_per_step: 4}
training: {max_steps: 1}
output: runs/x
data:
"""


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def pair(chosen: str, rejected: str, question: str = "add 1") -> dict:
    return {
        "prompt": question,
        "chosen": [turn("user", question), turn("assistant", chosen)],
        "rejected": [turn("user", question), turn("assistant", rejected)],
    }


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(tmp_path: Path, method: str, data: dict) -> Recipe:
    text = RECIPE.replace("METHOD", method) + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in data.items())
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return load_recipe(file, [], {name: found.Config for name, found in METHODS.items()})


def fitted_pairs(asked: Recipe, renderer: Renderer) -> tuple[list, Ledger]:
    method = METHODS[asked.method.name](asked.method)
    bad = BadRows(asked.data.bad_rows)
    rows = load_rows(asked, method.needs, bad=bad)
    return fit_preferences(asked, rows, lambda row: method.responses(row, renderer), bad=bad)


def fitted_rows(asked: Recipe, renderer: Renderer) -> tuple[list, Ledger]:
    method = METHODS[asked.method.name](asked.method)
    bad = BadRows(asked.data.bad_rows)
    return fit_rows(asked, method.needs, load_rows(asked, method.needs, bad=bad), renderer, bad)


def test_an_empty_reply_is_left_out_and_counted(make_tokenizer, tmp_path):
    file = write(tmp_path / "pairs.jsonl", [pair("1", "2"), pair("1", ""), pair(" ", "2"), *[pair("3", "4")] * 17])
    asked = recipe(tmp_path, "dpo", {"preferences": {"path": str(file)}})
    rows, ledger = fitted_pairs(asked, Renderer(make_tokenizer("chatml")))
    assert (len(rows), ledger.kept, ledger.dropped, ledger.total) == (18, 18, 2, 20)
    assert ledger.bad == {"assistant message N is empty": 2}
    assert ledger.first["assistant message N is empty"].startswith(f"{file}:2")
    where = ledger.first["assistant message N is empty"]
    assert f"(2 bad, first at {where}: assistant message 0 is empty)" in ledger.summary()
    stopping = recipe(tmp_path, "dpo", {"preferences": {"path": str(file)}, "bad_rows": "error"})
    with pytest.raises(DataError, match="assistant message 0 is empty"):
        fitted_pairs(stopping, Renderer(make_tokenizer("chatml")))


def test_pairs_that_are_the_same_once_rendered_are_identical(make_tokenizer, tmp_path):
    rows = [pair("1 ", "1"), pair("1", "2")]  # this template trims what is said
    asked = recipe(
        tmp_path,
        "dpo",
        {"preferences": {"path": str(write(tmp_path / "pairs.jsonl", rows))}, "max_lost_share": 0.5},
    )
    kept, ledger = fitted_pairs(asked, Renderer(make_tokenizer("llama3")))
    assert (len(kept), ledger.identical, ledger.dropped) == (1, 1, 1)


def test_pairs_that_differ_behind_the_limit_only_are_identical(make_tokenizer, tmp_path):
    long = "we begin with both numbers and add them, so that it is "
    rows = [
        {"prompt": "a", "chosen": long + "1", "rejected": long + "2"},
        {"prompt": "a", "chosen": "1", "rejected": "2"},
    ]
    file = str(write(tmp_path / "pairs.jsonl", rows))
    data = {"preferences": {"path": file}, "max_length": 40, "too_long": "cut", "max_lost_share": 0.6}
    kept, ledger = fitted_pairs(recipe(tmp_path, "dpo", data), Renderer(make_tokenizer()))
    assert (len(kept), ledger.kept, ledger.cut, ledger.identical, ledger.dropped) == (1, 1, 0, 1, 1)
    with pytest.raises(DataError, match="1 dropped .1 identical"):
        fitted_pairs(recipe(tmp_path, "dpo", data | {"max_lost_share": 0.1}), Renderer(make_tokenizer()))


def test_rows_that_the_template_refuses_are_left_out(make_tokenizer, tmp_path):
    good, bad = (
        [turn("user", "hi"), turn("assistant", "a")],
        [turn("system", "s"), turn("user", "x"), turn("assistant", "b")],
    )
    rows = [{"messages": good}] * 19 + [{"messages": bad}]
    file = write(tmp_path / "rows.jsonl", rows)
    asked = recipe(tmp_path, "sft", {"completions": {"path": str(file)}})
    samples, ledger = fitted_rows(asked, Renderer(make_tokenizer("refuses_system")))
    assert (len(samples), ledger.kept, ledger.dropped, ledger.total) == (19, 19, 1, 20)
    [(reason, place)] = ledger.first.items()
    assert "the chat template refuses these messages: no system here" in reason and place == f"{file}:20"


def test_where_every_row_is_bad_the_first_one_says_why(make_tokenizer, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"messages": [turn("user", "hi")]}] * 3)
    with pytest.raises(DataError, match="there is no assistant message to train on") as error:
        fitted_rows(recipe(tmp_path, "sft", {"completions": {"path": str(file)}}), Renderer(make_tokenizer("chatml")))
    assert error.value.where.startswith(f"{file}:1")


def test_too_many_bad_rows_end_the_run_and_are_named(make_tokenizer, tmp_path):
    good = {"prompt": "a", "completion": "b"}
    file = write(
        tmp_path / "rows.jsonl", [good, {"prompt": "a", "completion": ""}, good, {"prompt": 7, "completion": "b"}]
    )
    with pytest.raises(DataError) as error:
        fitted_rows(recipe(tmp_path, "sft", {"completions": {"path": str(file)}}), Renderer(make_tokenizer()))
    assert "50.0% of the rows would be lost" in str(error.value)
    assert "mend the rows that cannot be used (1 times: the text is empty; " + str(file) + ":2" in str(error.value)


def test_sources_are_counted_each_by_itself(make_tokenizer, tmp_path):
    good = {"prompt": "a", "completion": "b"}
    one = write(tmp_path / "one.jsonl", [good] * 9 + [{"prompt": "a", "completion": " "}])
    two = write(tmp_path / "two.jsonl", [good, {"prompt": "a", "completion": "b" * 90}])
    data = {
        "completions": [{"path": str(one)}, {"path": str(two), "source": "long"}, {"path": str(one), "limit": 2}],
        "max_length": 50,
        "max_lost_share": 0.5,
    }
    samples, ledger = fitted_rows(recipe(tmp_path, "sft", data), Renderer(make_tokenizer()))
    assert list(ledger.sources) == ["one", "long", "one-2"]
    assert [(each.kept, each.dropped) for each in ledger.sources.values()] == [(9, 1), (1, 1), (2, 0)]
    assert (ledger.kept, ledger.dropped, ledger.total, len(samples)) == (12, 2, 14, 12)
    assert [sample.problem_id for sample in samples[8:]] == ["one/8", "long/0", "one-2/0", "one-2/1"]
    assert "  long: 2 rows: 1 kept" in "\n".join(ledger.lines())
    with pytest.raises(DataError, match="50.0% of the rows would be lost"):  # of the second one
        fitted_rows(recipe(tmp_path, "sft", data | {"max_lost_share": 0.2}), Renderer(make_tokenizer()))


def test_reasons_leave_out_what_differs_from_row_to_row():
    errors = [DataError("byte 7 is 'x' here"), DataError("byte 12 is 'yy' here\nand more")]
    assert {reason_of(error) for error in errors} == {"byte N is ... here"}


def test_a_reason_is_shown_as_it_was_said_of_the_first_row(tmp_path):
    rows = [{"prompt": "q", "completions": ["a"] * n, "labels": [True] * 2} for n in (2, 3, 4)] + [{"text": "x"}]
    source, bad = FileSource(path=str(write(tmp_path / "rows.jsonl", rows))), BadRows()
    assert len(stepwise(source, "s", bad=bad)) == 1
    ledger = Ledger()
    for part in (bad.ledger("s"), bad.ledger("s")):  # of two ranks, say
        ledger.count(part)
    assert ledger.bad == {"N completions, but N labels": 4, "no column ...; columns: text": 2}
    for found in (ledger, Ledger.of_dict(json.loads(json.dumps(ledger.to_dict())))):
        assert f"4 bad, first at {tmp_path}/rows.jsonl:2: 3 completions, but 2 labels" in found.summary()
        assert f"2 bad, first at {tmp_path}/rows.jsonl:4: no column 'prompt'; columns: text" in found.summary()


LONG = "we add them, and so it is "  # 26 characters, one token each, behind a prompt of one
TALKS = {
    "chosen": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d" + LONG)],
    "rejected": [turn("user", "a"), turn("assistant", "b"), turn("user", "e"), turn("assistant", "f" + LONG)],
}
SAME_WHEN_CUT = [
    # pair, limits, template, and of this pair: kept, cut, identical, dropped
    ({"prompt": "a", "chosen": LONG + "1", "rejected": LONG + "3"}, {"max_length": 20}, None, (0, 0, 1, 1)),
    ({"prompt": "a", "chosen": LONG + "1", "rejected": LONG + "3"}, {"max_length": 27}, None, (0, 0, 1, 1)),
    ({"prompt": "a", "chosen": LONG + "1", "rejected": LONG + "3"}, {"max_length": 28}, None, (0, 1, 0, 0)),
    ({"prompt": "a", "chosen": LONG + "1", "rejected": LONG + "3"}, {"max_length": 29}, None, (1, 0, 0, 0)),
    ({"prompt": "a", "chosen": "1" + LONG, "rejected": "3" + LONG}, {"max_length": 20}, None, (0, 1, 0, 0)),
    ({"prompt": "a", "chosen": "abc", "rejected": "abcd"}, {"max_length": 4}, None, (0, 0, 1, 1)),
    ({"prompt": "a", "chosen": "abc", "rejected": "abcd"}, {"max_length": 5}, None, (0, 1, 0, 0)),
    ({"prompt": "a", "chosen": LONG + "1", "rejected": LONG + "3"}, {"max_length": 47}, "chatml", (0, 1, 0, 0)),
    ({"prompt": "a", "chosen": LONG + "1", "rejected": LONG + "3"}, {"max_length": 46}, "chatml", (0, 0, 1, 1)),
    (pair(LONG + "1", LONG + "3", "a"), {"max_length": 46}, "chatml", (0, 0, 1, 1)),
    (TALKS, {"max_length": 29}, "chatml", (0, 0, 1, 1)),  # up to where the user says other things
    (TALKS, {"max_length": 39}, "chatml", (0, 0, 1, 1)),  # nothing that differs is trained on
    (TALKS, {"max_length": 44}, "chatml", (0, 1, 0, 0)),
    ({"prompt": "a", "chosen": "1 ", "rejected": "1"}, {}, "llama3", (0, 0, 1, 1)),
    ({"prompt": "a", "chosen": "1\n", "rejected": " 1"}, {}, "llama3", (0, 0, 1, 1)),
    ({"prompt": "a", "chosen": "1 ", "rejected": "1"}, {}, "chatml", (1, 0, 0, 0)),
    ({"prompt": "a", "chosen": "1", "rejected": "1"}, {}, None, (0, 0, 1, 1)),
    ({"prompt": "a" * 30, "chosen": LONG + "1", "rejected": LONG + "3"}, {"max_length": 20}, None, (0, 0, 0, 1)),
    ({"prompt": "a" * 30, "chosen": "1", "rejected": "3"}, {"max_prompt_length": 9}, None, (0, 1, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "limits", "template", "expected"), SAME_WHEN_CUT)
def test_pairs_that_differ_behind_a_limit_only(make_tokenizer, tmp_path, row, limits, template, expected):
    kept = {**row, "chosen": "x", "rejected": "y"} if isinstance(row["chosen"], str) else pair("x", "y", "a")
    file = write(tmp_path / "pairs.jsonl", [row, kept | ({"prompt": "a"} if "prompt" in row else {})])
    data = {"preferences": {"path": str(file)}, "too_long": "cut", "max_lost_share": 0.5, **limits}
    rows, ledger = fitted_pairs(recipe(tmp_path, "dpo", data), Renderer(make_tokenizer(template)))
    found = (ledger.kept - 1, ledger.cut, ledger.identical, ledger.dropped)
    assert found == expected and ledger.total == 2 and len(rows) == 2 - ledger.dropped


EMPTY_REPLIES = [
    # what takes the place of a pair's responses
    pair("it is 1", ""),
    pair("", "it is 2"),
    pair("", ""),
    pair(" ", "it is 2"),
    pair("it is 1", "\n\n"),
    pair("it is 1", None),
    pair("it is 1", []),
    pair("it is 1", [{"type": "text", "text": " "}]),
    {**pair("a", "b"), "rejected": [turn("user", "add 1"), {"role": "assistant"}]},
    {**pair("a", "b"), "rejected": [turn("user", "add 1")]},
    {**pair("a", "b"), "rejected": []},
    {**pair("a", "b"), "rejected": None},
    {"chosen": pair("a", "b")["chosen"], "rejected": pair("a", "")["rejected"]},
    {"prompt": [turn("user", "add 1")], "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "")]},
    {"prompt": [turn("user", "add 1")], "chosen": "", "rejected": "b"},
    {"chosen": [turn("user", "q"), turn("assistant", ""), turn("user", "r"), turn("assistant", "a")],
     "rejected": [turn("user", "q"), turn("assistant", "b"), turn("user", "r"), turn("assistant", "a")]},
    {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant:"},
]  # fmt: skip


@pytest.mark.parametrize("row", EMPTY_REPLIES)
def test_a_pair_with_an_empty_reply_is_left_out_and_the_run_goes_on(make_tokenizer, tmp_path, row):
    good = {key: value for key, value in pair("it is 1", "it is 2").items() if key in row}
    file = write(tmp_path / "pairs.jsonl", [good, row, good])
    data = {"preferences": {"path": str(file)}, "max_lost_share": 0.5}
    rows, ledger = fitted_pairs(recipe(tmp_path, "dpo", data), Renderer(make_tokenizer("chatml")))
    assert (len(rows), ledger.kept, ledger.cut, ledger.dropped) == (2, 2, 0, 1)
    assert (ledger.identical == 1) == (row.get("chosen") == row.get("rejected"))
    if not ledger.empty and not ledger.identical:  # it is named
        [place] = ledger.first.values()
        assert place.startswith(f"{file}:2")


def test_there_are_more_than_ten_inputs_of_each_kind():
    assert min(len(SAME_WHEN_CUT), len(EMPTY_REPLIES)) > 10
