"""Conversations of other people's agents, with tools and rewards, become episodes that methods learn from."""

import json
from copy import deepcopy

import pytest

from posttrain.config.collection import TakeInEpisodesConfig
from posttrain.data.episodes import read_episodes
from posttrain.environments.tools import FORMS
from posttrain.errors import DataError, StateError
from posttrain.rollouts.take_in_episodes import take_in_episodes


def call(number, name, **arguments):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


ROW = {
    "messages": [
        {"role": "system", "content": "You may look things up."},
        {"role": "user", "content": "How old are both together?"},
        {
            "role": "assistant",
            "content": "First both ages.",
            "tool_calls": [call("a", "age", of="Ann"), call("b", "sum", of=["Ben"])],
        },
        {"role": "tool", "tool_call_id": "b", "content": "9"},
        {"role": "tool", "tool_call_id": "a", "content": "7"},
        {"role": "assistant", "content": "16"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes, 16."},
    ],
    "tools": [{"type": "function", "function": {"name": "age", "parameters": {"type": "object", "properties": {}}}}],
    "reward": 1.0,
    "level": 2,
}


def taken(folder, rows, **keys):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "rows.jsonl"), "messages": "messages"}
    output = folder / "episodes.jsonl"
    written = take_in_episodes(TakeInEpisodesConfig(data={"completions": source}, output=str(output), **keys))
    read = list(read_episodes(output))
    assert [episode.row() for episode in read] == [episode.row() for episode in written]
    return read


def changed(**values):
    return deepcopy(ROW) | values


def test_calls_and_their_answers_are_turns(tmp_path):
    (episode,) = taken(tmp_path, [ROW])
    first, second, third = episode.turns
    assert first.action.startswith("First both ages.\n<tool_call>")
    assert [(each.name, each.arguments) for each in FORMS["hermes"](first.action)] == [
        ("age", {"of": "Ann"}),
        ("sum", {"of": ["Ben"]}),
    ]
    assert first.step.results == (("sum", "9"), ("age", "7"))  # as they were answered, by the numbers of the calls
    assert (second.action, second.step.observation, second.step.results) == ("16", "Sure?", ())
    assert [step.done for step in episode.steps] == [False, False, True]
    assert episode.turn_rewards == [0.0, 0.0, 1.0] and episode.outcome == 1.0
    assert [message["role"] for message in episode.prompt] == ["system", "user"]
    assert episode.problem.meta == {"level": 2} and episode.problem.tools
    told = [message["role"] for message in episode.messages()]
    assert told == ["system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
    assert third.action == "Yes, 16."


def test_rewards_of_turns_and_success_have_their_columns(tmp_path):
    rows = [changed(credit=[0.25, 0, -1], won=False), changed(credit=[0, 0, 2], won=True)]
    first, second = taken(tmp_path, rows, reward="credit", success="won")
    assert first.turn_rewards == [0.25, 0.0, -1.0] and (first.outcome, second.outcome) == (0.0, 1.0)
    assert first.problem.id == second.problem.id and (first.sample, second.sample) == (0, 1)  # of one problem


def test_a_tool_is_known_by_its_name_or_by_the_order_of_calls(tmp_path):
    row = changed()
    row["messages"][3] = {"role": "tool", "content": "9"}
    row["messages"][4] = {"role": "tool", "name": "other", "content": "7"}
    (episode,) = taken(tmp_path, [row])
    assert episode.turns[0].step.results == (("age", "9"), ("other", "7"))


def without(key):
    return {name: value for name, value in ROW.items() if name != key}


def said(at, **message):
    row = changed()
    row["messages"][at : at + 1] = [row["messages"][at] | message] if message else []
    return row


BAD = {
    "no column 'reward'": without("reward"),
    "2 rewards of 3 assistant turns": changed(reward=[1, 2]),
    "a finite number, not 'good'": changed(reward="good"),
    "a finite number, not nan": changed(reward=float("nan")),
    "two assistant turns with nothing between them": said(6),
    "has `reasoning_content`": said(5, reasoning_content="7 and 9"),
    "has `weight`": said(5, weight=0),
    "a turn of user behind one of another role": said(4, role="user"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_episode_is_refused_by_file_and_line(tmp_path, message):
    with pytest.raises(DataError, match=message) as caught:
        taken(tmp_path, [ROW, BAD[message]])
    assert "rows.jsonl:2" in str(caught.value)
    assert not (tmp_path / "episodes.jsonl").exists()


def test_success_must_be_said_of_each(tmp_path):
    with pytest.raises(DataError, match="won: whether it was solved must be true or false, not 1"):
        taken(tmp_path, [changed(won=1)], success="won")


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "episodes.jsonl").write_text("kept")
    with pytest.raises(StateError, match="there already"):
        taken(tmp_path, [ROW])
    assert (tmp_path / "episodes.jsonl").read_text() == "kept"
