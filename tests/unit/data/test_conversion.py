"""`posttrain prepare rows`: every form in the plain one, which reads back as the same; and from one kind to another."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.schema import FileSource
from posttrain.data.conversion import CONVERSIONS, convert
from posttrain.data.sources import READERS, first_row, read_kind
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
    "name", ["conversations", "tools", "sharegpt", "instructions", "pairs", "unpaired", "stepwise"]
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


def test_the_sets_are_what_their_script_makes():
    space = runpy.run_path(str(SETS / "make.py"))
    card = (SETS / "README.md").read_text()
    for make in space["SETS"]:
        rows = list(make())
        file = SETS / f"{make.__name__}.jsonl"
        assert [json.loads(line) for line in file.read_text().splitlines()] == rows
        assert f"| `{make.__name__}.jsonl` | {len(rows)} |" in card
