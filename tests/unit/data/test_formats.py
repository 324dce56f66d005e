from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from posttrain.data.files import read_rows
from posttrain.data.formats import Format, adapt, detect_format, split_implicit_prompt
from posttrain.data.sample import Example, Preference, Problem, Row, Stepwise, Unpaired
from posttrain.errors import DataError


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def one(values: dict, format: Format | None = None):
    return adapt([Row(values, "file:1")], "d", format)[0]


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["prompt"], Format.PROMPT_ONLY),
        (["prompt", "id", "source"], Format.PROMPT_ONLY),
        (["completion", "prompt"], Format.PROMPT_COMPLETION),
        (["messages", "id"], Format.MESSAGES),
        (["prompt", "chosen", "rejected", "score"], Format.PREFERENCE),
        (["chosen", "rejected"], Format.PREFERENCE_IMPLICIT),
        (["prompt", "completion", "label"], Format.UNPAIRED),
        (["prompt", "completions", "labels"], Format.STEPWISE),
    ],
)
def test_detect_format(present, expected):
    assert detect_format(present) is expected


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (
            ["prompt", "chosen", "rejected", "messages"],
            "preference, preference-implicit, prompt-only, messages",
        ),
        (["prompt", "completion", "chosen", "rejected"], "name the format that is meant"),
        (["prompt", "label"], "only part of one: prompt-only"),
        (["chosen"], "fit no data format"),
        (["text"], "fit no data format\n  known: prompt-only (prompt)"),
        ([], "the columns (none) fit no data format"),
    ],
)
def test_unclear_formats(present, message):
    with pytest.raises(DataError) as error:
        detect_format(present)
    assert message in str(error.value)


def test_every_format_becomes_its_type():
    assert one({"prompt": "p", "n": 1}) == Problem("d/0", "p", meta={"n": 1}, where="file:1")
    talk = [user("p")]
    assert one({"prompt": talk}).prompt == (user("p"),)
    item = one({"prompt": talk, "completion": [assistant("c")]})
    assert isinstance(item, Example) and item.completion == (assistant("c"),)
    item = one({"prompt": "p", "chosen": "a", "rejected": "b"})
    assert isinstance(item, Preference) and (item.problem.prompt, item.chosen, item.rejected) == ("p", "a", "b")
    item = one({"prompt": "p", "completion": "c", "label": 0})
    assert item == Unpaired(Problem("d/0", "p", where="file:1"), "c", False)
    item = one({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]})
    assert item == Stepwise(Problem("d/0", "p", where="file:1"), ("a", "b"), (True, False))


def test_messages_are_split_before_the_first_reply():
    turns = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]
    item = one({"messages": turns})
    assert item.problem.prompt == tuple(turns[:2]) and item.completion == tuple(turns[2:])


def test_a_named_format_keeps_the_other_columns_as_meta():
    values = {
        "prompt": "p",
        "chosen": [user("p"), assistant("a")],
        "rejected": [user("p"), assistant("b")],
        "messages": [],
    }
    item = one(values, Format.PREFERENCE)
    # The text prompt beside conversations repeats the first turn.
    assert (item.problem.prompt, item.chosen, item.rejected) == ((user("p"),), (assistant("a"),), (assistant("b"),))
    assert item.problem.meta == {"messages": []}


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
    item, theirs = one(values), extract_prompt(values)
    ours = {"prompt": list(item.problem.prompt), "chosen": list(item.chosen), "rejected": list(item.rejected)}
    assert ours == theirs


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
    ({"prompt": "p", "completion": [assistant("c")]}, "must both be text, or both messages"),
    ({"prompt": "p", "completion": ""}, "empty"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"chosen": "a b", "rejected": "a b"}, "chosen and rejected are the same"),
    ({"chosen": "left", "rejected": "right"}, "no common beginning"),
    ({"chosen": "a", "rejected": [user("a")]}, "one of chosen and rejected is text"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no common beginning"),
    ({"chosen": [user("p"), assistant("a")], "rejected": [user("p"), user("b")]}, "must be the assistant's"),
    (
        {"prompt": [user("p")], "chosen": [user("p"), assistant("a")], "rejected": [assistant("b")]},
        "belong into the prompt",
    ),
    ({"prompt": "p", "completion": "c", "label": "yes"}, "a label must be true or false, not 'yes'"),
    ({"prompt": "p", "completion": "c", "label": 2}, "a label must be true or false, not 2"),
    ({"prompt": "p", "completions": ["a"], "labels": [True, True]}, "1 completions, but 2 labels"),
    ({"prompt": "p", "completions": [], "labels": []}, "a list that is not empty"),
    ({"prompt": "p", "completions": ["a", ""], "labels": [True, True]}, "the text is empty"),
    ({"messages": [user("p")]}, "no assistant message"),
    ({"messages": [assistant("p")]}, "begins with the assistant"),
    ({"messages": "p"}, "must be a list of messages"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_rows(values, message):
    with pytest.raises(DataError) as error:
        one(values)
    assert message in str(error.value) and error.value.where.startswith("file:1")


def test_no_rows():
    with pytest.raises(DataError, match="no rows"):
        adapt([], "d")


def test_real_preferences(test_data):
    rows = read_rows(test_data / "hh_harmless_test.jsonl.gz")
    items = adapt(rows, "hh")
    assert len(items) == 2312
    as_in_trl = 0
    for row, item in zip(rows, items, strict=True):
        assert item.problem.prompt + item.chosen == row.values["chosen"]
        assert item.problem.prompt + item.rejected == row.values["rejected"]
        assert item.problem.prompt.startswith("\n\nHuman: ")
        theirs = extract_prompt(row.values)["prompt"]
        assert theirs.startswith(item.problem.prompt)
        as_in_trl += theirs == item.problem.prompt
    # The others begin with the same letters, where TRL tears the first word.
    assert as_in_trl > 1900
