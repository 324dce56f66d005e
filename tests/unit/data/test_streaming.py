"""Rows that are read when they are needed: the same tokens, all counted, others in place of bad ones, little memory."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from posttrain.config.loading import load_recipe
from posttrain.config.schema import FileSource, Recipe
from posttrain.data import streaming
from posttrain.data.bad_rows import BadRows
from posttrain.data.preparation import corpus, fit_rows, load_rows
from posttrain.data.rendering import Renderer
from posttrain.data.sources import ExampleTable
from posttrain.data.streaming import StreamedRows, StreamedSamples, added, wants_streaming
from posttrain.data.tables import Lines, open_files
from posttrain.errors import DataError, NeedsError
from posttrain.methods import METHODS
from posttrain.trainers.rows import refuse

RECIPE = """
model: {init: {hidden_size: 16, layers: 1, heads: 2, max_length: 512}}
method: {name: METHOD}
batch: {rows_per_step: 4, micro_batch: 4}
training: {max_steps: 3, learning_rate: 1.0e-3, logging_steps: 1}
threads: 1
output: OUTPUT
"""


def recipe(tmp_path: Path, data: dict, method: str = "sft") -> Recipe:
    file = tmp_path / "recipe.yaml"
    text = RECIPE.replace("OUTPUT", str(tmp_path / "run")).replace("METHOD", method)
    file.write_text(text + f"data: {json.dumps(data)}\n")
    return load_recipe(file, [], {name: found.Config for name, found in METHODS.items()})


def write(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def row(number: int) -> dict:
    return {"prompt": f"question {number}?", "completion": f"it is {number}"}


def fitted(asked: Recipe, renderer: Renderer):
    needs, bad = METHODS["sft"](asked.method).needs, BadRows(asked.data.bad_rows)
    return fit_rows(asked, needs, load_rows(asked, needs, bad=bad), renderer, bad)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_the_same_samples_as_rendered_beforehand(make_tokenizer, tmp_path, kind):
    import datasets

    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a" * (n % 7 + 1)}]}
            for n in range(40)]  # fmt: skip
    file = write(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        file = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(file)
    if kind == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        file = tmp_path / "saved"
    renderer = Renderer(make_tokenizer("chatml"))
    whole, _ = fitted(recipe(tmp_path, {"completions": {"path": str(file)}}), renderer)
    streamed, probed = fitted(recipe(tmp_path, {"completions": {"path": str(file)}, "streaming": True}), renderer)
    assert isinstance(streamed, StreamedSamples) and len(streamed) == 40
    assert [streamed[i] for i in range(40)] == whole
    assert probed.kept == 40 and added([streamed.ledgers]).kept == 40


@pytest.mark.parametrize("place", [0, 700, 1500])
def test_completions_that_repeat_their_prompt_in_all_rows_but_one_are_the_same_run(make_tokenizer, tmp_path, place):
    rows = [{"prompt": f"add 0 to {n}:", "completion": f"add 0 to {n}: {n}"} for n in range(1500)]
    rows.insert(place, {"prompt": "add 1 to 1:", "completion": " two"})
    data = {"completions": {"path": str(write(tmp_path / "rows.jsonl", rows))}}
    renderer = Renderer(make_tokenizer())
    whole, ledger = fitted(recipe(tmp_path, data), renderer)
    streamed, probed = fitted(recipe(tmp_path, data | {"streaming": True}), renderer)
    assert [streamed[i] for i in range(0, 1501, 25)] == whole[::25] and streamed[place] == whole[place]
    trained = [token for token, on in zip(whole[3].ids, whole[3].loss_mask, strict=True) if on]
    assert renderer.text(trained) == " 2" if place == 0 else " 3"
    said = "  note: 1,500 of 1,501 rows repeat the prompt in completion: cut off there, and the others stay as they are"
    assert ledger.lines()[1:] == [said]
    assert len(probed.lines()) == (1 if place == 700 else 2)  # there it is no row of those that are looked at


def test_a_bad_row_has_another_one_of_its_source_in_its_place_and_is_counted(make_tokenizer, tmp_path):
    mixed = [row(n) for n in range(30)] + [
        {"prompt": "empty", "completion": ""},
        {"prompt": "long", "completion": "x" * 99},
    ]
    one, two = write(tmp_path / "one.jsonl", mixed), write(tmp_path / "two.jsonl", [row(n) for n in range(100, 110)])
    data = {"completions": [{"path": str(one)}, {"path": str(two)}], "streaming": True, "max_length": 80}
    renderer = Renderer(make_tokenizer("chatml"))
    streamed, _ = fitted(recipe(tmp_path, data), renderer)
    found = [streamed[i].problem_id for i in range(42)]
    assert found[:30] == [f"one/{n}" for n in range(30)] and found[32:] == [f"two/{n}" for n in range(10)]
    assert all(re.fullmatch(r"one/[12]?\d", found[i]) for i in (30, 31))
    ledgers = streamed.ledgers
    assert ledgers["two"].to_dict() == {**ledgers["two"].to_dict(), "kept": 10, "total": 10}
    assert ledgers["one"].kept == 32 and ledgers["one"].dropped == ledgers["one"].total - 32 >= 2
    assert sum(ledgers["one"].bad.values()) >= 1 and "one.jsonl:31" in next(iter(ledgers["one"].first.values()))
    again, _ = fitted(recipe(tmp_path, data), renderer)
    assert [again[i].problem_id for i in reversed(range(42))] == found[::-1]


def test_a_set_of_which_too_much_is_lost_ends_the_run(make_tokenizer, tmp_path, monkeypatch):
    renderer = Renderer(make_tokenizer("chatml"))
    bad = {"prompt": "empty", "completion": ""}
    file = write(tmp_path / "rows.jsonl", [row(1), bad] * 20)
    with pytest.raises(DataError, match=r"50.0% of the rows would be lost"):
        fitted(recipe(tmp_path, {"completions": {"path": str(file)}, "streaming": True}), renderer)
    # The bad rows come where no probed row is: the run ends once enough of them were read.
    monkeypatch.setattr(streaming, "PROBED", 2)
    monkeypatch.setattr(streaming, "JUDGED_FROM", 10)
    file = write(tmp_path / "later.jsonl", [row(1), *[bad] * 8, *[row(2)] * 8])
    streamed, _ = fitted(recipe(tmp_path, {"completions": {"path": str(file)}, "streaming": True}), renderer)
    with pytest.raises(
        DataError, match=r"of the rows would be lost.*bad, first at .*later.jsonl:2.*: the text is empty"
    ):
        _ = [streamed[i] for i in range(17)]
    asked = recipe(tmp_path, {"completions": {"path": str(file)}, "streaming": True, "bad_rows": "error"})
    with pytest.raises(DataError, match="the text is empty"):
        _ = fitted(asked, renderer)[0][1]


def test_lines_of_a_file_by_their_number(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\r\n\r\n{"a": "\xc3\xbc"}\n{"a": 4}')
    rows = Lines(file)
    assert [rows.row(i).values["a"] for i in range(len(rows))] == [1, 2, "ü", 4]
    assert [rows.row(i).where.rpartition(":")[2] for i in range(4)] == ["1", "3", "5", "6"]
    file.write_bytes(b'{"a": 1}\n{"a": \n{"b"\n')
    with pytest.raises(DataError, match="not JSON") as error:
        Lines(file).row(1)
    assert f"{file}:2:" in error.value.where


def test_files_one_after_another_and_what_cannot_be_read_by_number(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", [row(n) for n in numbers]) for name, numbers in
             {"a": range(3), "b": range(3, 4), "c": range(4, 9)}.items()]  # fmt: skip
    table = open_files(files)
    assert [table.row(i).values for i in range(len(table))] == [row(n) for n in range(9)]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(files[0].read_bytes()))
    with pytest.raises(DataError, match=r"rows of a .jsonl.gz file cannot be read one at a time"):
        open_files([packed])
    with pytest.raises(DataError, match="no such file"):
        open_files([tmp_path / "d.jsonl"])
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="the file has no rows"):
        open_files([tmp_path / "none.jsonl"])


def test_limit_and_the_text_a_tokenizer_is_learnt_from(tmp_path):
    file = write(tmp_path / "rows.jsonl", [row(n) for n in range(9)])
    assert len(ExampleTable(FileSource(path=str(file), limit=4), "rows")) == 4
    rows = StreamedRows([("rows", FileSource(path=str(file), limit=4))])
    assert list(corpus(rows)) == [text for n in range(4) for text in (f"question {n}?", f"it is {n}")]


def test_large_files_are_streamed_unless_the_recipe_says_otherwise(tmp_path, monkeypatch):
    small = write(tmp_path / "small.jsonl", [row(1)])
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(streaming.LARGE + 1)
    packed = tmp_path / "large.csv"
    packed.hardlink_to(large)

    def decided(completions, **more):
        return wants_streaming(recipe(tmp_path, {"completions": completions, **more}), "completions")

    path = {"path": str(large)}
    assert not decided({"path": str(small)}) and decided(path) and decided([path, {"path": str(small)}])
    assert not decided(path | {"limit": 100}) and not decided(path, streaming=False)
    assert not decided({"path": str(packed)}) and decided({"path": str(small)}, streaming=True)
    task = {"task": "chain_sum", "levels": [2], "size": 4}
    assert not decided([path, task])
    with pytest.raises(NeedsError, match="made here are not read from files"):
        decided([path, task], streaming=True)


def test_methods_that_take_all_rows_together_refuse_it(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "c"}])
    asked = recipe(tmp_path, {"preferences": {"path": str(file)}, "streaming": True}, "dpo")
    with pytest.raises(NeedsError, match="dpo takes all rows of data.preferences together") as error:
        refuse(asked, METHODS["dpo"](asked.method))
    assert error.value.where == "data.streaming"


def test_memory_does_not_grow_with_the_file(make_tokenizer, tmp_path):
    text = {"prompt": "question " * 20, "completion": "answer " * 100}
    file = write(tmp_path / "rows.jsonl", [text] * 12_000)
    renderer = Renderer(make_tokenizer("chatml"))
    asked = recipe(tmp_path, {"completions": {"path": str(file)}, "streaming": True, "max_length": 4096})
    fitted(asked, renderer)  # what is imported and cached once
    tracemalloc.start()
    try:
        streamed, _ = fitted(asked, renderer)
        streamed.probe.clear()
        for number in range(0, 12_000, 200):
            assert streamed[number].ids
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < file.stat().st_size / 10, f"{held:,} bytes for a file of {file.stat().st_size:,}"


@pytest.mark.slow
def test_a_million_rows_of_300_tokens_begin_within_a_minute_in_two_gigabytes(tmp_path):
    words = " ".join((Path(__file__).parents[3] / "docs" / "data.md").read_text().split())
    file = tmp_path / "million.jsonl"
    with file.open("w") as out:
        for n in range(1_000_000):
            start = n * 7 % (len(words) - 320)
            out.write(json.dumps({"prompt": f"{n}: {words[start : start + 100]}",
                                  "completion": words[start + 100 : start + 300]}) + "\n")  # fmt: skip
    recipe(tmp_path, {"completions": {"path": str(file)}})
    command = [sys.executable, "-m", "posttrain", "train", str(tmp_path / "recipe.yaml")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = run.stdout.read()
    _, status, used = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    assert run.returncode == 0, output
    assert "1,000,000 rows, read when a step needs them" in output and "rows read: 12 rows: 12 kept" in output
    tokens = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in tokens if "loss" in line]) == 3
    began = re.search(r"\[ *([\d.]+) s\] preparing the first of 3 steps", output)[1]
    seconds = used.ru_utime + used.ru_stime  # of the whole run: wall time says what else the machine does
    assert seconds < 60, f"{seconds} CPU seconds; {began} s until the first step"
    assert used.ru_maxrss < 2 * 1024**2, f"{used.ru_maxrss} KiB"
