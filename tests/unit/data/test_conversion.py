"""`posttrain prepare rows`: every form in the plain one, which reads back as the same; and from one kind to another."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.schema import FileSource
from posttrain.data.conversion import CONVERSIONS, convert, write_rows
from posttrain.data.episodes import read_episodes
from posttrain.data.formats import detect_completions
from posttrain.data.sample import Example, Preference, Problem
from posttrain.data.sources import READERS, first_row, read_kind
from posttrain.data.traces import manifest_path
from posttrain.data.written_forms import written
from posttrain.errors import DataError, RecipeError

SETS = Path(__file__).resolve().parents[3] / "data"


def call(*words: object) -> str:
    return CliRunner().invoke(app, ["prepare", "rows", *map(str, words)], catch_exceptions=False).output


def read(path: Path, kind: str | None = None, **keys: object) -> list:
    source = FileSource(path=str(path), **keys)
    return READERS[kind or read_kind(source, first_row(source, "d"))](source, "d")


def content(items: list) -> list:
    """All but where it stood."""
    return [
        json.loads(json.dumps(item, default=lambda x: {k: getattr(x, k) for k in x.__slots__ if k != "where"}))
        for item in items
    ]


@pytest.mark.parametrize("end", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "name", ["conversations", "tools", "sharegpt", "instructions", "pairs", "unpaired", "stepwise", "episodes"]
)
def test_what_is_written_reads_back_the_same(tmp_path, name, end):
    file, out = SETS / f"{name}.jsonl", tmp_path / f"rows{end}"
    printed = call(file, "--out", out)
    before, after = read(file), read(out)
    kind = read_kind(FileSource(path=str(file)), first_row(FileSource(path=str(file)), "d"))
    assert f"{len(before)} rows of {kind}" in printed and f"data: {{{kind}: {{path: {out}}}}}" in printed
    for one in (*before, *after):
        one.problem.meta.pop("system", None)  # ShareGPT's has become a message
    assert content(after) == content(before)


def test_columns_of_other_names(tmp_path):
    out = tmp_path / "rows.jsonl"
    call(SETS / "prompts.jsonl", "--set", "prompt=question", "--set", "reference=answer", "--out", out)
    row = json.loads(out.read_text().splitlines()[0])
    assert set(row) == {"prompt", "reference"} and "####" in row["reference"]


def test_from_one_kind_to_another(tmp_path):
    rows = [("q", "a", True), ("q", "b", False), ("q", "c", False), ("r", "d", True)]
    votes = tmp_path / "votes.jsonl"
    votes.write_text("".join(json.dumps({"prompt": p, "completion": c, "label": v}) + "\n" for p, c, v in rows))
    call(votes, "--to", "preferences", "--out", tmp_path / "pairs.jsonl")
    pairs = read(tmp_path / "pairs.jsonl")
    assert [(p.problem.prompt, p.chosen, p.rejected) for p in pairs] == [("q", "a", "b"), ("q", "a", "c")]
    call(tmp_path / "pairs.jsonl", "--to", "unpaired", "--out", tmp_path / "back.jsonl")
    assert [(x.completion, x.label) for x in read(tmp_path / "back.jsonl")] == [
        ("a", True),
        ("b", False),
        ("a", True),
        ("c", False),
    ]
    call(votes, "--to", "completions", "--out", tmp_path / "good.jsonl")
    assert [(x.problem.prompt, x.completion) for x in read(tmp_path / "good.jsonl")] == [("q", "a"), ("r", "d")]
    call(votes, "--to", "prompts", "--out", tmp_path / "prompts.jsonl")
    assert [x.prompt for x in read(tmp_path / "prompts.jsonl")] == ["q", "r"]
    call(SETS / "stepwise.jsonl", "--to", "completions", "--out", tmp_path / "right.jsonl")
    steps = [item for item in read(SETS / "stepwise.jsonl") if all(item.labels)]
    assert [x.completion for x in read(tmp_path / "right.jsonl")] == ["\n".join(item.steps) for item in steps]
    assert all(source in READERS and target in READERS for source, target in CONVERSIONS)


def test_labelled_conversations_give_the_good_ones_and_say_how_many_were_bad(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}], "label": label}
        for text, label in (("a", True), ("b", False), ("c", False))
    ]
    votes = tmp_path / "votes.jsonl"
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "left out: 2 rows labelled bad" in call(votes, "--to", "completions", "--out", tmp_path / "good.jsonl")
    [good] = read(tmp_path / "good.jsonl")
    assert good.completion[0]["content"] == "a" and "label" not in good.problem.meta
    call(votes, "--to", "unpaired", "--out", tmp_path / "both.jsonl")
    assert [item.label for item in read(tmp_path / "both.jsonl")] == [True, False, False]


def test_what_cannot_be(tmp_path):
    file = SETS / "pairs.jsonl"
    with pytest.raises(DataError, match="rows of preferences cannot become stepwise\n.*unpaired, completions, prompts"):
        call(file, "--to", "stepwise", "--out", tmp_path / "x.jsonl")
    with pytest.raises(RecipeError, match="no kind 'pair'"):
        call(file, "--to", "pair", "--out", tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="written as .jsonl or .parquet"):
        call(file, "--out", tmp_path / "x.csv")
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(DataError, match="the file exists"):
        call(file, "--out", tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="none of the 0 rows of unpaired"):
        convert([], "unpaired", "preferences")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": {"city": "Oslo"}}}
COLD = [{"role": "tool", "content": "3C", "name": "w", "tool_call_id": "c1"}, said("cold")]
ALL = ("prompt-completion", "messages", "sharegpt", "alpaca")
EXAMPLES = [
    # an example, and the forms that have no place for it
    (("q", "a"), {}),
    (((user("q"),), (said("a"),)), {}),
    (((user("q"),), "a"), {}),
    (((SYSTEM, user("q")), (said("a"),)), {}),
    (((SYSTEM, user("q"), said("b"), user("r")), (said("a"),)), {}),
    (((user("q"),), (said("a"), user("r"), said("b"))), {"alpaca": "several trained turns"}),
    (((user("q"),), (said("a", weight=0), user("r"), said("b"))), {}),
    (((user("q"),), (said("a", reasoning_content="hm"),)), {"alpaca": "reasoning in a key of its own"}),
    (((user("q"),), (said("", tool_calls=[CALL]), *COLD)), {"alpaca": "calls of tools"}),
    (
        ((user("q"),), (said("wait", tool_calls=[CALL]), *COLD)),
        {"alpaca": "calls of tools", "sharegpt": "or one beside other things"},
    ),
    (
        ((user("q"),), (said("", tool_calls=[CALL, CALL]), *COLD, *COLD)),
        {"alpaca": "calls of tools", "sharegpt": "several calls of tools"},
    ),
    (((user("q"), user("r")), (said("a"),)), {"alpaca": "question and answer by turns"}),
]


def meaning(example: Example) -> list[dict]:
    """The turns, and which of them are trained on."""
    return written(example, "messages")["messages"]


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize(("example", "refused"), EXAMPLES)
def test_examples_in_every_form(tmp_path, example, refused, form):
    item = Example(Problem("e/0", example[0], reference="a", meta={"level": 3}, where="f:1"), example[1])
    out = tmp_path / "rows.jsonl"
    if form in refused:
        with pytest.raises(DataError, match=f"has no place for .*{refused[form]}") as error:
            write_rows([item], out, form)
        assert error.value.where == "f:1" and not out.exists()
        return
    write_rows([item], out, form)
    assert detect_completions(json.loads(out.read_text())) == form
    [found] = read(out, "completions", reference="reference")
    assert meaning(found) == meaning(item)
    assert (found.problem.reference, found.problem.meta.get("level")) == ("a", 3)


PAIRS = [
    (("q: what", " a", " b"), None),
    (("q", "a", "b"), "no common beginning"),  # it is read as one word each
    (("q: what", " a b", " a c"), "responses that begin alike"),
    (((user("q"),), (said("a"),), (said("b"),)), None),
    (
        ((user("q"),), (said("a"), user("r"), said("b")), (said("a"), user("r"), said("c"))),
        "responses that begin alike",
    ),
    (((user("q"),), "a", "b"), "a text beside messages"),
]


@pytest.mark.parametrize(("pair", "refused"), PAIRS)
def test_pairs_in_both_forms(tmp_path, pair, refused):
    item = Preference(Problem("p/0", pair[0], where="f:1"), *pair[1:], scores={"chosen": 2.0, "rejected": 1.0})
    write_rows([item], tmp_path / "explicit.jsonl", "preference")
    found = read(tmp_path / "explicit.jsonl")
    if refused is None:
        write_rows([item], tmp_path / "implicit.jsonl", "preference-implicit")
        assert set(json.loads((tmp_path / "implicit.jsonl").read_text())) & {"prompt"} == set()
        found += read(tmp_path / "implicit.jsonl")
    else:
        with pytest.raises(DataError, match=refused):
            write_rows([item], tmp_path / "implicit.jsonl", "preference-implicit")
    for one in found:
        assert (one.problem.prompt, one.chosen, one.rejected, one.scores) == (*pair, item.scores)


KIND_OF_SET = {
    "prompts": "prompts",
    "instructions": "completions",
    "pairs": "preferences",
    "unpaired": "unpaired",
    "stepwise": "stepwise",
}
POSSIBLE = {
    # what rows of a kind can become beside themselves: nothing that would have to be made up
    "prompts": set(),
    "completions": {"prompts"},
    "preferences": {"prompts", "completions", "unpaired"},
    "unpaired": {"prompts", "completions", "preferences"},
    "stepwise": {"prompts", "completions", "preferences", "unpaired"},
}


@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize("name", KIND_OF_SET)
def test_from_every_kind_to_every_kind(tmp_path, name, to):
    keys = ["--set", "prompt=question", "--kind", "prompts"] if name == "prompts" else []
    words = (SETS / f"{name}.jsonl", *keys, "--to", to, "--out", tmp_path / "rows.jsonl")
    kind = KIND_OF_SET[name]
    if to != kind and to not in POSSIBLE[kind]:
        with pytest.raises(DataError, match=f"rows of {kind} cannot become {to}\n.*they can become: ") as error:
            call(*words)
        assert all(other in str(error.value) for other in POSSIBLE[kind] or ("nothing else",))
        return
    printed = call(*words)
    found = read(tmp_path / "rows.jsonl", to)
    assert found and f"rows.jsonl: {len(found):,} rows" in printed.replace("\n", "")


def test_forms_by_the_command(tmp_path):
    printed = call(SETS / "conversations.jsonl", "--form", "sharegpt", "--out", tmp_path / "rows.jsonl")
    assert "160 rows of completions" in printed
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert [turn["from"] for turn in first["conversations"]] == ["system", "human", "gpt", "human", "gpt"]
    assert list(map(meaning, read(tmp_path / "rows.jsonl"))) == list(map(meaning, read(SETS / "conversations.jsonl")))
    for words, message in (
        (("instructions", "sharegp"), "no form 'sharegp'"),
        (("pairs", "alpaca"), "rows of this kind have no form 'alpaca'.*\n.*theirs: preference, preference-implicit"),
        (("stepwise", "messages"), "rows of this kind have no form 'messages'.*\n.*theirs: none"),
    ):
        with pytest.raises(RecipeError, match=message):
            call(SETS / f"{words[0]}.jsonl", "--form", words[1], "--out", tmp_path / "no.jsonl")


def test_traces_are_sent_to_the_commands_that_read_them(tmp_path):
    (tmp_path / "traces.jsonl").write_text(json.dumps({"prompt": "q", "text": "a"}))
    manifest_path(tmp_path / "traces.jsonl").write_text("{}")
    with pytest.raises(DataError, match="these are traces.*\n.*prepare completions"):
        call(tmp_path / "traces.jsonl", "--out", tmp_path / "rows.jsonl")
    assert "1 rows of prompts" in call(tmp_path / "traces.jsonl", "--kind", "prompts", "--out", tmp_path / "rows.jsonl")


def test_responses_that_have_no_label_are_named(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "best": "c"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    words = ("--set", "others={gold: best}", "--to", "unpaired", "--out", tmp_path / "rows.jsonl")
    assert "left aside: the responses gold" in call(tmp_path / "pairs.jsonl", *words)


def test_the_sets_are_what_their_script_makes():
    space = runpy.run_path(str(SETS / "make.py"))
    card = (SETS / "README.md").read_text()
    for make in space["SETS"]:
        rows = list(make())
        file = SETS / f"{make.__name__}.jsonl"
        assert [json.loads(line) for line in file.read_text().splitlines()] == rows
        assert f"| `{make.__name__}.jsonl` | {len(rows)} |" in card


def test_the_trajectories_are_episodes_and_conversations_whose_actions_are_trained_on():
    rows = [json.loads(line) for line in (SETS / "episodes.jsonl").read_text().splitlines()]
    for episode, row, example in zip(
        read_episodes(SETS / "episodes.jsonl"), rows, read(SETS / "episodes.jsonl"), strict=True
    ):
        assert (episode.outcome, episode.total, episode.stop) == (row["outcome"], row["return"], row["stop"])
        assert [turn.action for turn in episode.turns] == [
            turn["content"] for turn in example.completion if turn["role"] == "assistant"
        ]
        assert len(episode.turns) <= 5 and all("weight" not in turn for turn in example.completion)
