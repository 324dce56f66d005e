from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from posttrain.config.schema import FileSource
from posttrain.data.files import read_rows
from posttrain.data.formats import kind_of, split_implicit_prompt
from posttrain.data.sample import Example, Preference, Problem, Stepwise, Unpaired
from posttrain.data.sources import READERS
from posttrain.errors import DataError


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def one(tmp_path):
    """`one(values)` -> the row, read as what its columns say."""

    def make(values: dict):
        file = tmp_path / "d.jsonl"
        file.write_text(json.dumps(values))
        return READERS[kind_of(values)](FileSource(path=str(file)), "d")[0]

    return make


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["prompt"], "prompts"),
        (["prompt", "id", "source"], "prompts"),
        (["completion", "prompt"], "completions"),
        (["messages", "id"], "completions"),
        (["prompt", "chosen", "rejected", "messages"], "preferences"),
        (["chosen", "rejected"], "preferences"),
        (["prompt", "completion", "label"], "unpaired"),
        (["prompt", "completions", "labels"], "stepwise"),
    ],
)
def test_the_kind_of_rows(present, expected):
    assert kind_of(present) == expected


@pytest.mark.parametrize("present", [["chosen"], ["text"], []])
def test_rows_of_no_kind(present):
    with pytest.raises(DataError, match=r"fit no data format\n.*known: prompt-only .prompt."):
        kind_of(present)


def test_every_kind_becomes_its_type(one):
    item = one({"prompt": "p", "n": 1})
    assert item == Problem("d/0", "p", meta={"n": 1}, where=item.where)
    talk = [user("p")]
    assert one({"prompt": talk}).prompt == (user("p"),)
    item = one({"prompt": talk, "completion": [assistant("c")]})
    assert isinstance(item, Example) and item.completion == (assistant("c"),)
    item = one({"prompt": "p", "chosen": "a", "rejected": "b"})
    assert isinstance(item, Preference) and (item.problem.prompt, item.chosen, item.rejected) == ("p", "a", "b")
    item = one({"prompt": "p", "completion": "c", "label": 0})
    assert item == Unpaired(Problem("d/0", "p", where=item.problem.where), "c", False)
    item = one({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]})
    assert item == Stepwise(Problem("d/0", "p", where=item.problem.where), ("a", "b"), (True, False))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # as in TRL: the space goes to the completions
        ("Q: x\nA: I'm", "Q: x\nA: It is", "Q: x\nA:"),  # no torn word
        ("Q: x\nyes", "Q: x\nno", "Q: x\n"),
        ("Q: x\nyes", "Q: x\nyesterday", "Q: x\n"),
        ("Q: x is", "Q: x is y", "Q: x"),  # one continues the other: both keep a last word
        ("Q: x is ", "Q: x is y", "Q: x"),
        ("a  b", "a  c", "a "),
    ],
)
def test_implicit_prompt_of_text(chosen, rejected, prompt):
    found, good, bad = split_implicit_prompt(chosen, rejected, "")
    assert (found, found + good, found + bad) == (prompt, chosen, rejected)


def test_implicit_prompt_of_messages_agrees_with_trl():
    values = {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
    }
    found = split_implicit_prompt(tuple(values["chosen"]), tuple(values["rejected"]), "")
    assert dict(zip(("prompt", "chosen", "rejected"), map(list, found), strict=True)) == extract_prompt(values)


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=12), st.text("ab \n", max_size=12))
def test_nothing_is_lost_when_a_text_is_split(beginning, one_end, other_end):
    chosen, rejected = beginning + one_end, beginning + other_end
    try:
        prompt, good, bad = split_implicit_prompt(chosen, rejected, "")
    except DataError:
        return
    assert prompt + good == chosen and prompt + bad == rejected
    assert prompt.strip() and good and bad
    assert prompt[-1].isspace() or good[0] == bad[0] == " " or (good[0].isspace() and bad[0].isspace())


BAD = [
    ({"prompt": "p", "completion": ""}, "empty"),
    ({"chosen": "left", "rejected": "right"}, "no common beginning"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no common beginning"),
    ({"chosen": [user("p"), assistant("a")], "rejected": [user("p"), user("b")]}, "must be the assistant's"),
    (
        {"prompt": [user("q")], "chosen": [user("p"), assistant("a")], "rejected": [assistant("b")]},
        "belong into the prompt",
    ),
    ({"prompt": "p", "completion": "c", "label": "yes"}, "a label must be true or false, not 'yes'"),
    ({"prompt": "p", "completion": "c", "label": 2}, "a label must be true or false, not 2"),
    ({"prompt": "p", "completions": ["a"], "labels": [True, True]}, "1 completions, but 2 labels"),
    ({"prompt": "p", "completions": [], "labels": []}, "a list that is not empty"),
    ({"prompt": "p", "completions": ["a", ""], "labels": [True, True]}, "the text is empty"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_rows(one, values, message):
    with pytest.raises(DataError) as error:
        one(values)
    assert message in str(error.value) and "d.jsonl:1" in error.value.where


def test_real_preferences(test_data):
    rows = read_rows(test_data / "hh_harmless_test.jsonl.gz")
    assert len(rows) == 2312
    as_in_trl = 0
    for row in rows:
        prompt, chosen, rejected = split_implicit_prompt(row.values["chosen"], row.values["rejected"], row.where)
        assert prompt + chosen == row.values["chosen"] and prompt + rejected == row.values["rejected"]
        assert prompt.startswith("\n\nHuman: ")
        theirs = extract_prompt(row.values)["prompt"]
        assert theirs.startswith(prompt)
        as_in_trl += theirs == prompt
    # The others begin with the same letters, where TRL tears the first word.
    assert as_in_trl > 1900
