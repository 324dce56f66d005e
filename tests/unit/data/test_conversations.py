"""Conversations of all forms that data sets have, from a row of a file to the text that is trained on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset
from pyarrow import parquet

from posttrain.config.schema import FileSource
from posttrain.data.bad_rows import BadRows
from posttrain.data.conversion import write_rows
from posttrain.data.messages import written_as_text
from posttrain.data.rendering import Renderer
from posttrain.data.sources import READERS, ExampleTable, examples, stepwise, unpaired
from posttrain.errors import DataError
from posttrain.state.objects import written_down

TOOLS = (
    "{% for t in tools or [] %}{{ '<|im_start|>system\\ntool ' + t.function.name + '<|im_end|>\\n' }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ 'call ' + c.function.name }}{% for k, v in c.function.arguments.items() %}{{ ' ' + k + '=' + v }}{% endfor %}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def turn(role: str, content: object, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def said(role: str, value: str) -> dict:
    return {"from": role, "value": value}


CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Oslo"}}}
CALL_TEXT = {"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"city": "Oslo"}'}}
TALK = [turn("system", "be brief"), turn("user", "hi"), turn("assistant", "hello"), turn("user", "and?")]
TALK += [turn("assistant", "bye")]
ASKED = [turn("user", "weather?")]
ANSWER = [turn("tool", "3C", name="w"), turn("assistant", "3 degrees")]
CALLED = "call w city=Oslo"

PARTS = [turn("user", [{"type": "text", "text": "hi"}]), turn("assistant", [{"type": "text", "text": "hello"}])]
LOOK_UP = [*ASKED, turn("assistant", None, tool_calls=[CALL]), *ANSWER]


def text(*found: str, **more: object) -> list[dict]:
    """Content as a list of text parts."""
    return [{"type": "text", "text": each, **more} for each in found]


def weighed(first: object, second: object) -> list[dict]:
    return [turn("user", "hi"), turn("assistant", "no", weight=first), turn("user", "again")] + [
        turn("assistant", "hello", weight=second)
    ]


ROWS = {
    # kind of data set: rows, each with further keys of the source and what is trained on; the first as it is often seen
    "messages": [
        ({"messages": TALK}, {}, ["hello", "bye"]),
        ({"messages": TALK}, {"train_on": "last"}, ["bye"]),
        ({"dialogue": TALK}, {"messages": "dialogue"}, ["hello", "bye"]),
        ({"prompt": "hi", "prompt_id": "7", "messages": TALK}, {}, ["hello", "bye"]),  # as UltraChat has it
        ({"messages": [*TALK, turn("user", "what?")]}, {}, ["hello", "bye"]),
        ({"messages": [turn("developer", "be brief"), *TALK[1:]]}, {}, ["hello", "bye"]),
        ({"messages": [*TALK[:3], turn("assistant", "hm"), *TALK[3:]]}, {}, ["hello", "hm", "bye"]),
        (
            {"messages": [{**m, "turn_identifier": i, "toxic": False, "tool_calls": []} for i, m in enumerate(TALK)]},
            {},
            ["hello", "bye"],
        ),
        ({"messages": [{**m, "tool_calls": None, "name": None} for m in TALK]}, {}, ["hello", "bye"]),
        ({"messages": TALK[1:]}, {}, ["hello", "bye"]),
        ({"messages": json.dumps(TALK)}, {}, ["hello", "bye"]),
        ({"messages": str(TALK)}, {}, ["hello", "bye"]),  # what pandas writes
        ({"prompt": ASKED, "completion": [turn("assistant", "cold")]}, {}, ["cold"]),
        ({"prompt": TALK[:4], "completion": TALK[4:]}, {}, ["bye"]),  # earlier turns of the prompt are context
        ({"prompt": ASKED, "completion": "cold"}, {}, ["cold"]),
        ({"messages": TALK[1:3], "system": "be brief", "id": 7}, {}, ["hello"]),
        ({"messages": [turn("user", "hi", name="eve"), turn("assistant", " hello\n", name="ann")]}, {}, [" hello\n"]),
    ],
    "sharegpt": [
        ({"conversations": [said("human", "hi"), said("gpt", "hello")]}, {}, ["hello"]),
        ({"conversations": [said("system", "s"), said("human", "hi"), said("gpt", "hello")]}, {}, ["hello"]),
        ({"conversations": [said("human", "hi"), said("gpt", "hello")], "system": "be brief"}, {}, ["hello"]),
        ({"conversations": [said("user", "hi"), said("chatgpt", "hello"), said("human", "x")]}, {}, ["hello"]),
        ({"conversations": [turn("user", "hi"), turn("assistant", "hello")]}, {}, ["hello"]),
        ({"conversation": [said("human", "hi"), said("gpt", "a")]}, {"messages": "conversation"}, ["a"]),
        (
            {
                "conversations": [
                    said("human", "weather?"),
                    said("function_call", '{"name": "w", "arguments": {"city": "Oslo"}}'),
                    said("observation", "3C"),
                    said("gpt", "3 degrees"),
                ]
            },
            {},
            [CALLED, "3 degrees"],
        ),
        (
            {"conversations": [said("human", "hi"), said("gpt", "a"), said("human", "x"), said("gpt", "b")]},
            {},
            ["a", "b"],
        ),
        (
            {"conversations": [said("human", "hi"), said("gpt", "a"), said("human", "x"), said("gpt", "b")]},
            {"train_on": "last"},
            ["b"],
        ),
        ({"id": "x_0", "conversations": [said("human", "hi"), said("bing", "hello")]}, {}, ["hello"]),
        ({"conversations": [{**said("human", "hi"), "value": "hi", "markdown": None}, said("bard", "a")]}, {}, ["a"]),
        ({"conversations": [said("human", "hi"), {**said("gpt", "a"), "weight": 0}, *TALK[1:3]]}, {}, ["hello"]),
        ({"conversations": json.dumps([said("human", "hi"), said("gpt", "hello")])}, {}, ["hello"]),
        ({"conversations": [said("user", "hi"), said("model", "hello")]}, {}, ["hello"]),
    ],
    "alpaca": [
        ({"instruction": "add", "input": "1 and 2", "output": "3"}, {}, ["3"]),
        ({"instruction": "add 1 and 2", "input": "", "output": "3"}, {}, ["3"]),
        ({"instruction": "add 1 and 2", "output": "3", "text": "..."}, {}, ["3"]),
        ({"instruction": "and 2?", "output": "3", "history": [["1?", "2"]], "system": "add"}, {}, ["3"]),
        ({"instruction": "add 1 and 2", "input": None, "output": "3"}, {}, ["3"]),
        ({"instruction": "add 1 and 2", "input": "  ", "output": " 3"}, {}, [" 3"]),
        ({"instruction": "add", "input": "1 and 2", "output": "3", "system": "be brief"}, {}, ["3"]),
        ({"instruction": "add 1 and 2", "output": "3", "history": []}, {}, ["3"]),
        ({"instruction": "add 1 and 2", "output": "3", "history": None, "system": ""}, {}, ["3"]),
        (
            {"id": 7, "instruction": "add 1 and 2", "context": "x", "output": "it is 3\nso", "tags": ["a"]},
            {},
            ["it is 3\nso"],
        ),
        ({"instruction": "1?", "output": "3", "history": [["a", "b"], ["c", "d"]]}, {"train_on": "last"}, ["3"]),
        ({"instruction": "add 1 and 2", "output": "3"}, {"system": "be brief"}, ["3"]),
    ],
    "content as a list of text parts": [
        ({"prompt": [PARTS[0]], "completion": [PARTS[1]]}, {}, ["hello"]),
        ({"messages": PARTS}, {}, ["hello"]),
        ({"messages": [turn("user", text("h", "i")), turn("assistant", text("hel", "lo"))]}, {}, ["hello"]),
        ({"messages": [turn("user", "hi"), turn("assistant", ["hel", "lo"])]}, {}, ["hello"]),
        ({"messages": [turn("user", ["hi"]), turn("assistant", "hello")]}, {}, ["hello"]),
        ({"messages": [turn("system", text("be brief")), *PARTS]}, {}, ["hello"]),
        ({"messages": [PARTS[0], turn("assistant", text("hello", image_url=None, index=0))]}, {}, ["hello"]),
        (
            {
                "messages": [
                    turn("user", [{"type": "input_text", "text": "hi"}]),
                    turn("assistant", [{"type": "output_text", "text": "hello", "annotations": []}]),
                ]
            },
            {},
            ["hello"],
        ),
        ({"messages": [turn("user", [{"text": "hi"}]), turn("assistant", [{"text": "hello"}])]}, {}, ["hello"]),
        ({"messages": [*PARTS, turn("user", "and?"), turn("assistant", text("bye"))]}, {}, ["hello", "bye"]),
        ({"conversations": [said("human", text("hi")), said("gpt", text("hello"))]}, {}, ["hello"]),
        ({"messages": [*LOOK_UP[:2], turn("tool", text("3C"), name="w"), LOOK_UP[3]]}, {}, [CALLED, "3 degrees"]),
        ({"messages": json.dumps(PARTS)}, {}, ["hello"]),
    ],
    "weights": [
        ({"prompt": weighed(0, 1)[:1], "completion": weighed(0, 1)[1:]}, {}, ["hello"]),
        ({"messages": weighed(0, 1)}, {}, ["hello"]),
        ({"messages": weighed(1, 0)}, {}, ["no"]),
        ({"messages": weighed(1, 1)}, {}, ["no", "hello"]),
        ({"messages": weighed(None, None)}, {}, ["no", "hello"]),  # as typed files fill it in
        ({"messages": weighed(0.0, 1.0)}, {}, ["hello"]),
        ({"messages": weighed(None, 1)}, {}, ["no", "hello"]),
        ({"messages": weighed(0, 1)}, {"train_on": "last"}, ["hello"]),
        ({"messages": weighed(1, 1)}, {"train_on": "last"}, ["hello"]),
        ({"messages": [*TALK[1:2], turn("assistant", "no", train=False), *TALK[1:3]]}, {}, ["hello"]),
        ({"messages": [*TALK[1:2], turn("assistant", "a", training=True, loss=None), *TALK[1:3]]}, {}, ["a", "hello"]),
        ({"conversations": [said("human", "hi"), {**said("gpt", "a"), "loss": False}, *TALK[1:3]]}, {}, ["hello"]),
        ({"messages": [turn("user", "a", weight=0), turn("assistant", "b"), *TALK[1:3]]}, {}, ["b", "hello"]),
        ({"messages": [turn("system", "s", weight=0), *weighed(0, 1)]}, {}, ["hello"]),
        ({"messages": [*LOOK_UP[:1], {**LOOK_UP[1], "weight": 0}, *ANSWER]}, {}, ["3 degrees"]),
        ({"messages": [*LOOK_UP[:3], {**LOOK_UP[3], "weight": 0}]}, {}, [CALLED]),
    ],
    "calls of tools": [
        ({"prompt": ASKED, "completion": LOOK_UP[1:]}, {}, [CALLED, "3 degrees"]),
        ({"messages": LOOK_UP}, {}, [CALLED, "3 degrees"]),
        ({"messages": [*ASKED, turn("assistant", "", tool_calls=[CALL_TEXT]), *ANSWER]}, {}, [CALLED, "3 degrees"]),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [CALL]}, *ANSWER]}, {}, [CALLED, "3 degrees"]),
        (
            {"messages": [*ASKED, turn("assistant", "wait.", tool_calls=[CALL]), *ANSWER]},
            {},
            ["wait." + CALLED, "3 degrees"],
        ),
        ({"messages": [*ASKED, turn("assistant", None, tool_calls=[CALL])]}, {}, [CALLED]),
        ({"messages": LOOK_UP}, {"train_on": "last"}, ["3 degrees"]),
        (
            {"messages": [*ASKED, turn("assistant", None, tool_calls=[CALL, CALL_TEXT]), ANSWER[0], *ANSWER]},
            {},
            [CALLED + CALLED, "3 degrees"],
        ),
        (
            {"messages": [*LOOK_UP, turn("user", "and now?"), LOOK_UP[1], *ANSWER]},
            {},
            [CALLED, "3 degrees", CALLED, "3 degrees"],
        ),
        (
            {"messages": [*ASKED, turn("assistant", None, tool_calls=[CALL["function"]]), *ANSWER]},
            {},
            [CALLED, "3 degrees"],
        ),
        (
            {"messages": [*ASKED, turn("assistant", None, tool_calls=json.dumps([CALL])), *ANSWER]},
            {},
            [CALLED, "3 degrees"],
        ),
        # the form that OpenAI had before
        (
            {"messages": [*ASKED, turn("assistant", None, function_call=CALL_TEXT["function"]), *ANSWER]},
            {},
            [CALLED, "3 degrees"],
        ),
        (
            {"messages": [*ASKED, turn("assistant", "wait.", function_call=CALL["function"]), *ANSWER]},
            {},
            ["wait." + CALLED, "3 degrees"],
        ),
        (
            {"messages": [*LOOK_UP[:2], turn("function", "3C", name="w"), LOOK_UP[3]]},
            {},
            [CALLED, "3 degrees"],
        ),
        ({"messages": [*LOOK_UP[:2], turn("tool", {"degrees": 3}, name="w"), LOOK_UP[3]]}, {}, [CALLED, "3 degrees"]),
        ({"messages": [*LOOK_UP[:2], turn("tool", 3, name="w"), LOOK_UP[3]]}, {}, [CALLED, "3 degrees"]),
        ({"messages": [*LOOK_UP[:2], turn("tool", "", name="w"), LOOK_UP[3]]}, {}, [CALLED, "3 degrees"]),
    ],
}


def renderer(make_tokenizer) -> Renderer:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = TOOLS
    return Renderer(tokenizer)


def read(tmp_path: Path, *rows: dict, **keys: object) -> list:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return examples(FileSource(path=str(file), **keys), "c")


def spans(made: Renderer, sample) -> list[str]:
    """The texts of the runs of trained tokens."""
    found, before = [], 0
    for token, trained in zip(sample.ids, sample.loss_mask, strict=True):
        if trained:
            found = [*found, [token]] if not before else [*found[:-1], [*found[-1], token]]
        before = trained
    return [made.tokenizer.decode(ids) for ids in found]


def test_there_are_more_than_ten_rows_of_each_kind():
    assert {kind: len(rows) for kind, rows in ROWS.items() if len(rows) < 11} == {}


@pytest.mark.parametrize(("row", "keys", "expected"), [case for rows in ROWS.values() for case in rows])
def test_the_assistants_turns_are_trained_on(make_tokenizer, tmp_path, row, keys, expected):
    made = renderer(make_tokenizer)
    sample = made.sample(read(tmp_path, row, **keys)[0])
    assert spans(made, sample) == [text + "<|im_end|>" for text in expected]


def test_context_and_tools_reach_the_model_and_are_not_trained_on(make_tokenizer, tmp_path):
    made = renderer(make_tokenizer)
    tools = [{"type": "function", "function": {"name": "w", "description": None, "parameters": {"type": "object"}}}]
    dialogue = [turn("user", "hi"), turn("assistant", "no", weight=0), *TALK[1:3]]
    for column in (tools, json.dumps(tools)):
        example = read(tmp_path, {"messages": dialogue, "tools": column})[0]
        assert example.problem.tools == (
            {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}},
        )
        shown = made.tokenizer.decode(made.sample(example).ids)
        assert shown.startswith("<|im_start|>system\ntool w<|im_end|>") and "no<|im_end|>" in shown
    # A column of that name that describes no tools stays with the problem, and so does one where text is no chat.
    assert read(tmp_path, {"messages": dialogue, "tools": ["hammer"]})[0].problem.meta == {"tools": ["hammer"]}
    with pytest.raises(DataError, match="tools must be a list of objects"):
        read(tmp_path, {"messages": dialogue, "kit": ["hammer"]}, tools="kit")


@pytest.mark.parametrize("column", ["tools", "functions", "kit"])
@pytest.mark.parametrize("more", [{}, {"parameters": {"type": "object", "properties": {}}}])
def test_bare_descriptions_of_functions_are_tools(make_tokenizer, tmp_path, column, more):
    made = renderer(make_tokenizer)
    bare = {"name": "w", "description": "the weather", **more}
    talk = [*ASKED, turn("assistant", None, function_call={"name": "w", "arguments": '{"city": "Oslo"}'})]
    keys = {"tools": column} if column == "kit" else {}
    for described in ([bare], [{"type": "function", "function": bare}], json.dumps([bare])):
        [example] = read(tmp_path, {"messages": talk, column: described}, **keys)
        assert example.problem.tools == ({"type": "function", "function": bare},)
        assert column not in example.problem.meta
        sample = made.sample(example)
        assert made.tokenizer.decode(sample.ids).startswith("<|im_start|>system\ntool w<|im_end|>")
        assert spans(made, sample) == [CALLED + "<|im_end|>"]
    # Another form of descriptions stays as it is, and beside a text `functions` may be anything.
    other = {"name": "w", "inputSchema": {"type": "object"}}
    [example] = read(tmp_path, {"messages": talk, column: [other]}, **keys)
    assert example.problem.tools == (other,)
    [example] = read(tmp_path, {"prompt": "weather?", "completion": "3C", "functions": [bare]})
    assert example.problem.tools == () and example.problem.meta == {"functions": [bare]}


def test_an_alpaca_row_is_one_question(tmp_path):
    rows = [
        {"instruction": "add", "input": "1 and 2", "output": "3", "id": 7},
        {"instruction": "add 1 and 2", "input": None, "output": "3", "id": 8},
        {"instruction": "and 2?", "input": "", "output": "3", "history": [["1?", "2"]], "system": "add"},
    ]
    found = read(tmp_path, *rows)
    assert [example.problem.prompt for example in found[:2]] == ["add\n\n1 and 2", "add 1 and 2"]
    roles = [(message["role"], message["content"]) for message in found[2].problem.prompt]
    assert roles == [("system", "add"), ("user", "1?"), ("assistant", "2"), ("user", "and 2?")]
    assert found[0].problem.meta == {"id": 7}
    plain = read(tmp_path, rows[0], template="### {instruction}\n{input}\n### Answer:", chat=False)[0]
    assert (plain.problem.prompt, plain.completion) == ("### add\n1 and 2\n### Answer:", "3")


BAD = [
    ({"messages": TALK[:2]}, "there is no assistant message to train on"),
    ({"messages": [turn("assistant", "hi"), *TALK[1:3]]}, "begins with the assistant, so there is no prompt"),
    ({"messages": [TALK[0], turn("assistant", "hi")]}, "begins with the assistant, so there is no prompt"),
    ({"messages": [turn("user", "hi"), turn("assistant", " ")]}, "assistant message 0 is empty"),
    ({"messages": [turn("user", "hi"), turn("assistant", None)]}, "`content` must be text, not NoneType"),
    ({"messages": [turn("user", "hi"), turn("assistant", "a", weight=0.5)]}, "weight of a message is 0 or 1, not 0.5"),
    ({"messages": [turn("usr", "hi"), turn("assistant", "a")]}, "unknown role 'usr'"),
    ({"messages": "hi"}, "must be a list of messages, not str"),
    (
        {"messages": "[{'role': 'user', 'content': 'x'"},
        "looks like chat messages and is neither JSON nor a Python list",
    ),
    ({"messages": [*ASKED, turn("assistant", None, tool_calls=[{"function": {}}])]}, "needs a function with a name"),
    ({"messages": [*ASKED, turn("assistant", "", tool_calls=[{"function": {"name": "w", "arguments": "{"}}])]}, "JSON"),
    ({"messages": [*ASKED, turn("assistant", None, tool_calls="w(1)")]}, "tool_calls: not JSON"),
    ({"conversations": [said("human", "hi"), said("function_call", "w(1)")]}, "the function call: not JSON"),
    ({"instruction": "a", "output": ""}, "the text is empty"),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "pairs of question and answer"),
    ({"messages": TALK, "conversations": TALK}, "hold completions in several forms: messages, sharegpt"),
    (
        {"messages": TALK, "prompt": "p", "completion": "c"},
        "say which: `messages: messages`, or `completion: completion`",
    ),
    ({"prompt": "p", "completion": "c", "label": False}, "found bad would be trained on like the others"),
    ({"prompt": "p", "completion": "c", "label": "true"}, "found bad would be trained on like the others"),
    ({"messages": TALK, "label": False}, "`messages: messages` takes all of them as they are"),
    ({"messages": TALK, "label": -1}, "found bad would be trained on like the others"),
    ({"conversations": [said("human", "hi"), said("gpt", "a")], "label": 1}, "`messages: conversations` takes all"),
    ({"instruction": "a", "output": "b", "label": "0"}, "`completion: output` with a `template` takes all"),
    ({"text": "hi"}, "nothing says which column holds the completions; columns: text"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_conversations(tmp_path, row, message):
    with pytest.raises(DataError) as error:
        read(tmp_path, row)
    assert message in str(error.value) and "rows.jsonl:1" in error.value.where


def test_labelled_completions_that_the_recipe_asks_for_as_they_are(tmp_path):
    [example] = read(tmp_path, {"prompt": "p", "completion": "c", "label": False}, completion="completion")
    assert example.completion == "c" and example.problem.meta == {"label": False}
    [example] = read(tmp_path, {"prompt": "p", "completion": "c", "label": "sport"})
    assert example.problem.meta == {"label": "sport"}


def test_the_first_row_may_have_no_label(tmp_path):
    rows = [{"messages": TALK, "label": label} for label in (None, True, False)]
    with pytest.raises(DataError, match="the completions have labels") as error:
        read(tmp_path, *rows)
    assert "rows.jsonl:2" in error.value.where
    with pytest.raises(DataError, match="the completions have labels"):
        ExampleTable(FileSource(path=str(tmp_path / "rows.jsonl")), "c")


LABELLED = [
    # row, keys, prompt, completion
    ({"messages": [turn("user", "q"), turn("assistant", "a")]}, {}, (turn("user", "q"),), (turn("assistant", "a"),)),
    (
        {"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]},
        {"messages": "messages"},
        (turn("user", "q"), turn("assistant", "a"), turn("user", "r")),
        (turn("assistant", "b"),),
    ),
    (
        {"conversations": [said("human", "q"), said("gpt", "a")], "system": "S"},
        {},
        (turn("system", "S"), turn("user", "q")),
        (turn("assistant", "a"),),
    ),
    ({"instruction": "q", "input": "x", "output": "a"}, {}, "q\n\nx", "a"),
]


@pytest.mark.parametrize(("row", "keys", "prompt", "completion"), LABELLED)
def test_labelled_conversations(tmp_path, row, keys, prompt, completion):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "label": label, "id": 7}) + "\n" for label in (True, 0)))
    good, bad = unpaired(FileSource(path=str(file), **keys), "u")
    assert (good.problem.prompt, good.completion, good.label, bad.label) == (prompt, completion, True, False)
    assert good.problem.meta == {"id": 7} and bad.completion == completion


SCALES = [
    ([1, -1, 1, -1], "not -1 (so in 2 of 4 rows)", 2),
    ([1, 5, 2, None], "not 5 (so in 2 of 4 rows)", 2),
    (["true", "no", "true", "true"], "not 'no' (so in 1 of 4 rows)", 2),
    ([True, False, 0.5, 1.0], "not 0.5 (so in 1 of 4 rows)", 3),
]


@pytest.mark.parametrize(("labels", "message", "line"), SCALES)
def test_labels_of_another_scale(tmp_path, labels, message, line):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "q", "completion": "a", "label": each}) + "\n" for each in labels))
    with pytest.raises(DataError) as error:
        unpaired(FileSource(path=str(file)), "u", bad=BadRows())
    assert message in error.value.what and f"rows.jsonl:{line}, column 'label'" in error.value.where
    rows = [{"prompt": "q", "completions": ["a", "b"], "labels": [True, each]} for each in labels]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        stepwise(FileSource(path=str(file)), "s", bad=BadRows())
    assert message in error.value.what and f"rows.jsonl:{line}, column 'labels'" in error.value.where


@pytest.mark.parametrize(
    ("section", "row", "belongs"),
    [
        ("preferences", {"messages": TALK}, "completions"),
        ("preferences", {"prompt": "p", "completion": "c", "label": True}, "unpaired"),
        ("completions", {"prompt": "p", "chosen": "a", "rejected": "b"}, "preferences"),
        ("completions", {"prompt": "p"}, "prompts"),
        ("prompts", {"instruction": "p", "output": "a"}, "completions"),
        ("unpaired", {"prompt": "p", "completions": ["a"], "labels": [True]}, "stepwise"),
        ("stepwise", {"chosen": "p a", "rejected": "p b"}, "preferences"),
    ],
)
def test_rows_of_another_section_are_told(tmp_path, section, row, belongs):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(DataError) as error:
        READERS[section](FileSource(path=str(file)), section)
    assert error.value.hint == f"rows like these belong to data.{belongs}"


def test_cells_of_a_csv_file_that_hold_messages_are_read_as_messages(tmp_path):
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["prompt", "completion"])
        writer.writerow([json.dumps(ASKED), json.dumps([turn("assistant", "cold")])])
        writer.writerow(['[1, "a"]', '[{"key": 1}]'])  # other lists are text
        writer.writerow([repr(ASKED), "[{'role': 'assistant', 'content': 'cold'}]"])
    first, second, third = examples(FileSource(path=str(file)), "c")
    assert first.problem.prompt == third.problem.prompt == tuple(ASKED)
    assert first.completion == third.completion == (turn("assistant", "cold"),)
    assert (second.problem.prompt, second.completion) == ('[1, "a"]', '[{"key": 1}]')


def test_labels_and_steps_in_cells_of_a_csv_file(tmp_path):
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as handle:
        rows = [["prompt", "completion", "label"], *[["q", "a", label] for label in ("1", "0", "True", "false")]]
        csv.writer(handle).writerows(rows)
    assert [row.label for row in unpaired(FileSource(path=str(file)), "u")] == [True, False, True, False]
    with file.open("w", newline="") as handle:
        rows = [["prompt", "completions", "labels"], ["q", '["a", "b"]', "[true, 0]"], ["q", "a", "[1]"]]
        csv.writer(handle).writerows(rows)
    bad = BadRows()
    [found] = stepwise(FileSource(path=str(file)), "s", bad=bad)
    assert (found.steps, found.labels) == (("a", "b"), (True, False))
    assert list(bad.ledger("s").bad) == ["must be a list that is not empty"]


def test_arguments_keep_a_null_that_somebody_wrote_and_not_one_that_a_typed_file_filled_in(tmp_path):
    written, other = {"city": "Oslo", "unit": None}, {"place": {"x": 1}}
    text = {"function": {"name": "w", "arguments": json.dumps(written)}}
    rows = [
        {"messages": [*ASKED, turn("assistant", None, tool_calls=[{"function": {"name": "w", "arguments": each}}])]}
        for each in (written, other)
    ]
    rows[0]["messages"] += [*ANSWER[:1], turn("assistant", None, tool_calls=[text])]
    file, typed, back = (tmp_path / name for name in ("rows.jsonl", "rows.parquet", "back.jsonl"))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = {"city": "Oslo"}
    # A file of JSON, and what `prepare rows` makes of it in either kind.
    found = examples(FileSource(path=str(file)), "c")
    write_rows(found, back)
    write_rows(found, typed)
    for path in (file, back, typed):
        assert arguments(path) == [written, written, other]
    # Filled in by Arrow, in a file, in one read row by row, and in an object of `datasets`.
    filled = [{"messages": row["messages"][:2]} for row in rows]
    whole = Dataset.from_list(filled)
    parquet.write_table(pyarrow.Table.from_pylist(filled), tmp_path / "filled.parquet")
    whole.to_parquet(tmp_path / "other.parquet")
    held = written_down({"data": {"completions": whole}, "output": str(tmp_path / "run")})["data"]["completions"]
    for path in (tmp_path / "filled.parquet", tmp_path / "other.parquet", Path(held["path"])):
        assert arguments(path) == [call, other]
    table = ExampleTable(FileSource(path=str(tmp_path / "filled.parquet")), "c")
    assert [table.example(n).completion[0]["tool_calls"][0]["function"]["arguments"] for n in (0, 1)] == [call, other]


def arguments(path: Path) -> list[dict]:
    """Those of all tool calls of a file."""
    turns = [turn for example in examples(FileSource(path=str(path)), "c") for turn in example.completion]
    return [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", ())]


def test_text_that_only_begins_like_messages_stays_text():
    for raw in ('{"role": "user"}', "[{x}]", '[{"role": "user", "name": "x"}]', "", 7, None):
        assert written_as_text(raw, "here") == raw
