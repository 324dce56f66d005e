"""Conversations of all forms that data sets have, from a row of a file to the text that is trained on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from posttrain.config.schema import FileSource
from posttrain.data.messages import messages, written_as_text
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example
from posttrain.data.sources import examples, preferences
from posttrain.errors import DataError

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

ROWS = [
    # row, further keys of the source, what is trained on
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
        None,
    ),
    ({"messages": [{**m, "tool_calls": None, "name": None} for m in TALK]}, {}, None),
    ({"conversations": [said("human", "hi"), said("gpt", "hello")]}, {}, ["hello"]),
    ({"conversations": [said("system", "s"), said("human", "hi"), said("gpt", "hello")]}, {}, ["hello"]),
    ({"conversations": [said("human", "hi"), said("gpt", "hello")], "system": "be brief"}, {}, ["hello"]),
    ({"conversations": [said("user", "hi"), said("chatgpt", "hello"), said("human", "x")]}, {}, ["hello"]),
    ({"conversations": [turn("user", "hi"), turn("assistant", "hello")]}, {}, ["hello"]),
    ({"conversation": [said("human", "hi"), said("gpt", "a")]}, {"messages": "conversation"}, ["a"]),
    ({"instruction": "add", "input": "1 and 2", "output": "3"}, {}, ["3"]),
    ({"instruction": "add 1 and 2", "input": "", "output": "3"}, {}, ["3"]),
    ({"instruction": "add 1 and 2", "output": "3", "text": "..."}, {}, ["3"]),
    ({"instruction": "and 2?", "output": "3", "history": [["1?", "2"]], "system": "add"}, {}, ["3"]),
    ({"prompt": ASKED, "completion": [turn("assistant", "cold")]}, {}, ["cold"]),
    ({"messages": [turn("user", [{"type": "text", "text": "hi"}]), turn("assistant", ["hel", "lo"])]}, {}, ["hello"]),
    ({"messages": [turn("user", "hi"), turn("assistant", "no", weight=0), *TALK[1:3]]}, {}, ["hello"]),
    ({"messages": [turn("user", "hi"), turn("assistant", "no", weight=1), *TALK[1:3]]}, {}, ["no", "hello"]),
    ({"messages": [turn("user", "a", weight=0), turn("assistant", "b"), *TALK[1:3]]}, {}, ["b", "hello"]),
    ({"messages": [*TALK[1:3], turn("user", "x"), turn("assistant", "y", weight=0)]}, {}, ["hello"]),
    ({"messages": [*ASKED, turn("assistant", None, tool_calls=[CALL]), *ANSWER]}, {}, [CALLED, "3 degrees"]),
    ({"messages": [*ASKED, turn("assistant", "", tool_calls=[CALL_TEXT]), *ANSWER]}, {}, [CALLED, "3 degrees"]),
    ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [CALL]}, *ANSWER]}, {}, [CALLED, "3 degrees"]),
    (
        {"messages": [*ASKED, turn("assistant", "wait.", tool_calls=[CALL]), *ANSWER]},
        {},
        ["wait." + CALLED, "3 degrees"],
    ),
    ({"messages": [*ASKED, turn("assistant", None, tool_calls=[CALL])]}, {}, [CALLED]),
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
    ({"messages": json.dumps(TALK)}, {}, ["hello", "bye"]),
    ({"messages": str(TALK)}, {}, ["hello", "bye"]),  # what pandas writes
]


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


@pytest.mark.parametrize(("row", "keys", "expected"), ROWS)
def test_the_assistants_turns_are_trained_on(make_tokenizer, tmp_path, row, keys, expected):
    made = renderer(make_tokenizer)
    sample = made.sample(read(tmp_path, row, **keys)[0])
    expected = ["hello", "bye"] if expected is None else expected
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
    ({"messages": [turn("user", "hi"), turn("assistant", None)]}, "'content' must be text, not NoneType"),
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
    ({"text": "hi"}, "nothing says which column holds the completions; columns: text"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_conversations(tmp_path, row, message):
    with pytest.raises(DataError) as error:
        read(tmp_path, row)
    assert message in str(error.value) and "rows.jsonl:1" in error.value.where


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


def test_arguments_keep_what_a_typed_file_cannot_have_filled_in():
    call = {"function": {"name": "w", "arguments": {"city": "Oslo", "unit": None}}}
    text = {"function": {"name": "w", "arguments": '{"city": "Oslo", "unit": null}'}}
    found = messages([turn("assistant", None, tool_calls=[call, text])], "here")[0]["tool_calls"]
    assert [each["function"]["arguments"] for each in found] == [{"city": "Oslo"}, {"city": "Oslo", "unit": None}]


def test_text_that_only_begins_like_messages_stays_text():
    for raw in ('{"role": "user"}', "[{x}]", '[{"role": "user", "name": "x"}]', "", 7, None):
        assert written_as_text(raw, "here") == raw


CASES = Path(__file__).resolve().parents[3].parent / "shared" / "cases" / "data"
RIGHT = {
    "messages": ["hello", "bye"],
    "sharegpt": ["hello"],
    "parts": ["hello"],
    "tool": [CALLED, "3 degrees"],
    "weight": ["hello"],
}


@pytest.mark.skipif(not CASES.is_dir(), reason="the collected cases are not beside the repository")
@pytest.mark.parametrize("name", RIGHT)
def test_collected_cases(make_tokenizer, name):
    made = renderer(make_tokenizer)
    [example] = examples(FileSource(path=str(CASES / f"{name}.jsonl")), "c")
    assert spans(made, made.sample(example)) == [text + "<|im_end|>" for text in RIGHT[name]]


@pytest.mark.skipif(not CASES.is_dir(), reason="the collected cases are not beside the repository")
def test_collected_reasoning_is_trained_on_or_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'].split('</think>')[-1]")
    made = Renderer(tokenizer)
    for number, example in enumerate(examples(FileSource(path=str(CASES / "reasoning.jsonl")), "c")):
        whole = f"<think>\nfirst I add {number}\n</think>\n\nit is {number + 1}<|im_end|>"
        assert spans(made, made.sample(example)) == [whole]
    for number, example in enumerate(examples(FileSource(path=str(CASES / "reasonkey.jsonl")), "c")):
        with pytest.raises(DataError, match="drops `reasoning_content` of message 1") as error:
            made.sample(example)
        assert error.value.where.endswith(f"reasonkey.jsonl:{number + 1}") and "chat_template" in error.value.hint


@pytest.mark.skipif(not CASES.is_dir(), reason="the collected cases are not beside the repository")
def test_collected_end_tokens_in_a_completion_are_text_or_refused(make_tokenizer):
    [example] = examples(FileSource(path=str(CASES / "inject.jsonl")), "c")
    tokenizer = make_tokenizer("chatml")
    sample = Renderer(tokenizer).sample(example)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [place for place, token in enumerate(sample.ids) if token == end][1:] == [len(sample.ids) - 1]
    plain = Renderer(make_tokenizer(), generation_eos=end)
    with pytest.raises(DataError, match=r"holds '<\|im_end\|>', which ends a completion") as error:
        plain.sample(example)
    assert error.value.where.endswith("inject.jsonl:1")


@pytest.mark.skipif(not CASES.is_dir(), reason="the collected cases are not beside the repository")
def test_collected_responses_that_repeat_the_prompt(make_tokenizer):
    made = Renderer(make_tokenizer())
    for number, row in enumerate(preferences(FileSource(path=str(CASES / "repeat.jsonl")), "c")):
        assert (row.chosen, row.rejected) == (f" {number + 1}", f" {number + 2}")
        assert spans(made, made.sample(Example(row.problem, row.chosen))) == [f" {number + 1}<eos>"]


@pytest.mark.skipif(not CASES.is_dir(), reason="the collected cases are not beside the repository")
def test_a_collected_folder_of_splits():
    found = examples(FileSource(path=str(CASES / "split_in_suffix")), "c")
    assert [example.problem.prompt for example in found] == [f"train {i}" for i in range(8)]
