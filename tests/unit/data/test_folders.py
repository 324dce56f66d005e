"""Which files of a folder are read for a split: never the test file for training, never two kinds of rows at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from posttrain.config.schema import FileSource
from posttrain.data.files import read_rows
from posttrain.data.folders import split_of
from posttrain.data.sources import problems
from posttrain.errors import DataError


def folder(tmp_path: Path, *names: str) -> Path:
    """Files with one row each that holds the name of the file."""
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            Dataset.from_list([{"prompt": name}]).to_parquet(file)
        elif name.endswith(".md"):
            file.write_text("")
        else:
            file.write_text(json.dumps({"prompt": name}))
    return tmp_path


def names(path: Path, **keys: str | None) -> list[str]:
    return [row.values["prompt"] for row in read_rows(path, **keys)]


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.jsonl", "train"),
        ("Train-00000-of-00002.parquet", "train"),
        ("train-00000-of-00001-b42a775f407cee45.parquet", "train"),
        ("gsm8k_train.jsonl", "train"),
        ("gsm8k.train.jsonl.gz", "train"),
        ("train_sft-00000-of-00003.parquet", "train_sft"),
        ("test_prefs-0.parquet", "test_prefs"),
        ("math-val.csv", "validation"),
        ("dev_2.jsonl", "validation"),
        ("eval.jsonl", "test"),
        ("trainset.jsonl", "train"),
        ("test2.jsonl", "test"),
        ("my_train_data.jsonl", "train_data"),
        ("rows.jsonl", None),
        ("latest.jsonl", None),
        ("contest_problems.jsonl", None),
        ("strain-0.jsonl", None),
    ],
)
def test_the_split_in_a_files_name(file, split):
    assert split_of(file) == split


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "train", ["gsm8k_train.jsonl"]),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "test", ["gsm8k_test.jsonl"]),
        (["a-train.jsonl", "a-valid.jsonl"], "validation", ["a-valid.jsonl"]),
        (["train_sft-0.parquet", "train_prefs-0.parquet", "test_sft-0.parquet"], "train_sft", ["train_sft-0.parquet"]),
        (["train_sft-0.parquet", "train_prefs-0.parquet"], "train_prefs", ["train_prefs-0.parquet"]),
        (["train_v2.jsonl", "test_v2.jsonl"], "train", ["train_v2.jsonl"]),
        (["train.jsonl", "train_extra.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train-0.jsonl", "train-1.jsonl", "dev.jsonl"], "train", ["train-0.jsonl", "train-1.jsonl"]),
        (["train.jsonl", "notes.csv", "dataset_infos.json"], "train", ["train.jsonl"]),
        (["b.jsonl", "a.jsonl", "README.md"], "train", ["a.jsonl", "b.jsonl"]),
        (["data/train-0-of-1.parquet", "data/test-0-of-1.parquet"], "train", ["data/train-0-of-1.parquet"]),
        (["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"], "train", ["train/0.jsonl", "train/1.jsonl"]),
        (["train/0.jsonl", "test/0.jsonl"], "test", ["test/0.jsonl"]),
        (["train1.jsonl", "train2.jsonl", "test1.jsonl"], "train", ["train1.jsonl", "train2.jsonl"]),
        (["testset.jsonl", "trainset.jsonl"], "train", ["trainset.jsonl"]),
        (["gsm8ktest.jsonl", "gsm8ktrain.jsonl"], "train", ["gsm8ktrain.jsonl"]),
        (["latest.jsonl", "contest.jsonl"], "train", ["contest.jsonl", "latest.jsonl"]),
    ],
)
def test_files_of_a_split(tmp_path, files, split, expected):
    assert names(folder(tmp_path, *files), split=split) == expected


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train_sft-0.parquet", "train_prefs-0.parquet"], "train", "could be train_prefs or train_sft"),
        (["test.jsonl"], "train", "no file of split 'train'; splits: test"),
        (["gsm8k_test.jsonl"], "train", "no file of split 'train'; splits: test"),
        (["train.jsonl"], "test", "no file of split 'test'; splits: train"),
        (["rows.jsonl"], "validation", "no file of split 'validation'; splits: none; files: rows.jsonl"),
        (["train.jsonl", "train-1.csv"], "train", "mixes .csv, .jsonl files"),
        (["main/train.jsonl", "socratic/train.jsonl"], "train", "several configurations\n  set `name`: main, socratic"),
        (["README.md"], "train", "the folder has no data files"),
    ],
)
def test_unclear_folders(tmp_path, files, split, message):
    with pytest.raises(DataError) as error:
        names(folder(tmp_path, *files), split=split)
    assert message in str(error.value)


def test_configurations_of_a_copy_from_the_hub(tmp_path):
    path = folder(tmp_path, "main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet")
    assert names(path, split="train", name="main") == ["main/train-0.parquet"]
    source = FileSource(path=str(path), name="socratic")
    assert [problem.prompt for problem in problems(source, "p")] == ["socratic/train-0.parquet"]
    with pytest.raises(DataError, match="no configuration 'mian'.*\n.*did you mean 'main'"):
        names(path, split="train", name="mian")


def test_a_readme_says_which_files_are_which_split(tmp_path):
    path = folder(tmp_path, "data/a.jsonl", "data/b.jsonl", "extra/c.jsonl")
    (path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path: data/a*\n"
        "  - {split: test, path: [data/b.jsonl]}\n- config_name: more\n  data_files: extra/*.jsonl\n---\n# Rows\n"
    )
    assert names(path, split="train_sft") == ["data/a.jsonl"]
    assert names(path, split="train") == ["data/a.jsonl"]
    assert names(path, split="test") == ["data/b.jsonl"]
    assert names(path, split="train", name="more") == ["extra/c.jsonl"]
    with pytest.raises(DataError, match="no configuration 'mor'"):
        names(path, split="train", name="mor")
    with pytest.raises(DataError, match="no file of split 'validation'; splits: test, train_sft"):
        names(path, split="validation")


def test_what_save_to_disk_wrote(tmp_path):
    train, test = (
        Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]),
        Dataset.from_list([{"prompt": "c"}], split="test"),
    )
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one", num_shards=2)
    train.select([1]).save_to_disk(tmp_path / "selected")
    assert names(tmp_path / "both", split="train") == ["a", "b"]
    assert names(tmp_path / "both", split="test") == ["c"]
    assert names(tmp_path / "one", split="train") == ["a", "b"]
    assert names(tmp_path / "selected", split="train") == ["b"]
    assert read_rows(tmp_path / "both" / "test")[0].where.endswith(".arrow row 0")
    with pytest.raises(DataError, match="no file of split 'validation'; splits: test, train"):
        names(tmp_path / "both", split="validation")
    with pytest.raises(DataError, match="the folder holds split 'test', not 'train'"):
        names(tmp_path / "both" / "test", split="train")
    for split in ("test", "nonsense"):
        with pytest.raises(DataError, match=f"one data set without splits, of which `split: {split}` has no effect"):
            names(tmp_path / "selected", split=split)
    halves = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}], split="train").train_test_split(0.5, shuffle=False)
    halves.save_to_disk(tmp_path / "halves")
    assert (names(tmp_path / "halves", split="train"), names(tmp_path / "halves", split="test")) == (["a"], ["b"])
    with pytest.raises(DataError, match="set `split`: train, test"):
        read_rows(tmp_path / "both")
    next((tmp_path / "one").glob("*-00000-*.arrow")).unlink()
    assert names(tmp_path / "both" / "test", split="eval") == ["c"]
    with pytest.raises(DataError, match="a file of the data set is missing"):
        names(tmp_path / "one", split="train")


def test_arrow_files_of_both_forms(tmp_path):
    import pyarrow

    table = pyarrow.table({"prompt": ["a", "b"]})
    for name, make in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with pyarrow.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table)
        assert names(tmp_path / f"{name}.arrow") == ["a", "b"]
    (tmp_path / "bad.arrow").write_text("no arrow")
    with pytest.raises(DataError, match="not Arrow"):
        names(tmp_path / "bad.arrow")
