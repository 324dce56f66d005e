from __future__ import annotations

import gzip
import json

import pytest

from posttrain.data import files
from posttrain.data.files import extension, iter_rows, read_rows
from posttrain.errors import DataError

ROWS = [{"a": "x", "b": 1}, {"a": "é 漢", "b": None}]


def write(path, content: str | bytes):
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl(tmp_path, suffix, end, mark):
    text = end.join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1], ensure_ascii=False)])
    file = write(tmp_path / f"r.jsonl{suffix}", mark + text.encode())
    rows = read_rows(file)
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{file}:1", f"{file}:3"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json(tmp_path, suffix, indent):
    file = write(tmp_path / f"r.json{suffix}", " \n" + json.dumps(ROWS, indent=indent) + "\n")
    rows = read_rows(file)
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{file} row 0", f"{file} row 1"]


def test_csv_counts_real_lines_over_quoted_newlines(tmp_path):
    file = write(tmp_path / "r.csv", b'\xef\xbb\xbfq,a\n"one\ntwo\nthree","4"\n\n"say ""hi""",5\n"x,y",\n')
    rows = read_rows(file)
    assert [row.values for row in rows] == [
        {"q": "one\ntwo\nthree", "a": "4"},
        {"q": 'say "hi"', "a": "5"},
        {"q": "x,y", "a": ""},
    ]
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["2", "6", "7"]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "r.parquet"
    values = [{"a": f"row {i}", "messages": [{"role": "user", "content": str(i)}]} for i in range(2500)]
    parquet.write_table(pyarrow.Table.from_pylist(values), file)
    rows = read_rows(file)
    assert [row.values for row in rows] == values
    assert rows[2001].where == f"{file} row 2001"


BAD = [
    # name, content, place behind the file name, part of the message
    ("r.jsonl", '{"a": 1}\n{"a": }\n', ":2:7", "not JSON"),
    ("r.jsonl", '{"a": 1}\n\n[1]\n', ":3", "is a list, not an object"),
    ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2", "byte 8 is not UTF-8"),
    ("r.jsonl", "[" * 100_000, ":1:1", "not JSON"),
    ("r.jsonl", '{"a": ' + "9" * 5000 + "}", ":1:1", "not JSON"),
    ("r.jsonl", "", "", "no rows"),
    ("r.jsonl", "\n \n", "", "no rows"),
    ("r.jsonl.gz", "", "", "no rows"),
    ("r.json", "", "", "no rows"),
    ("r.json", "[]", "", "no rows"),
    ("r.json", '{"a": 1}\n{"a": 2}', ":1", ".jsonl"),
    ("r.json", "7", ":1", "not a list of objects"),
    ("r.json", '[{"a": 1},\n {"a": 2]', ":2:9", "row 1 is not JSON"),
    ("r.json", '[{"a": 1},\n 2]', " row 1", "is a int, not an object"),
    ("r.json", '[{"a": 1}\n {"a": 2}]', ":2:2", "no ',' or ']' after row 0"),
    ("r.json", '[{"a": 1},]', ":1:11", "row 1 is not JSON"),
    ("r.json", '[{"a": 1}', ":1:10", "no ',' or ']' after row 0"),
    ("r.json", '[{"a": 1}] x', ":1:12", "text after the end"),
    ("r.csv", "", "", "no rows"),
    ("r.csv", "a,b\n", "", "no rows"),
    ("r.csv", "a,b\n1,2\n1,2,3\n", ":3", "3 fields, but the header names 2 columns"),
    ("r.csv", "a,b\n1,2\n1\n", ":3", "1 fields, but the header names 2 columns"),
    ("r.csv", 'a,b\n1,2\n"1\n2,3\n', ":3", "not CSV"),
    ("r.csv", "a,a\n1,2\n", ":1", "the column 'a' twice"),
    ("r.csv", "a,\n1,2\n", ":1", "column 2 of the header has no name"),
    ("r.parquet", "no parquet", "", "not Parquet"),
    ("r.txt", "hello", "", "unknown extension '.txt'"),
    ("r.parquet.gz", "hello", "", "unknown extension '.parquet.gz'"),
]


@pytest.mark.parametrize(("name", "content", "place", "message"), BAD)
def test_bad_files(tmp_path, name, content, place, message):
    file = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read_rows(file)
    assert message in str(error.value)
    assert error.value.where == f"{file}{place}"


@pytest.mark.parametrize(
    "content", [b"plain text", gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-20]], ids=["not gzip", "cut short"]
)
def test_damaged_gzip(tmp_path, content):
    file = tmp_path / "r.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged gzip data"):
        read_rows(file)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_too_large_a_row(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    long = "x" * 1200
    content = {"r.jsonl": '{"a": "%s"}\n', "r.json": '[{"a": "%s"}]', "r.csv": "a\n%s\n"}[name] % long
    with pytest.raises(DataError, match="the row is larger than"):
        read_rows(write(tmp_path / name, content))


def test_a_csv_field_may_be_longer_than_the_default_of_the_csv_module(tmp_path):
    assert len(read_rows(write(tmp_path / "r.csv", "a\n" + "x" * 200_000))[0].values["a"]) == 200_000


def test_too_large_a_row_of_parquet(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    values = [{"a": "x" * 600, "b": [{"c": "y" * size}]} for size in (10, 10, 700)]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "r.parquet")
    with pytest.raises(DataError, match="the row is larger than") as caught:
        read_rows(tmp_path / "r.parquet")
    assert caught.value.where.endswith("r.parquet row 2")
    assert len(read_rows(tmp_path / "r.parquet", limit=2)) == 2


def test_parquet_that_is_damaged_in_the_middle(tmp_path):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "r.parquet"
    table = pyarrow.Table.from_pylist([{"a": f"row {i}"} for i in range(5000)])
    parquet.write_table(table, file, row_group_size=1000, compression="gzip")
    data = bytearray(file.read_bytes())
    start = parquet.ParquetFile(file).metadata.row_group(3).column(0).data_page_offset
    data[start : start + 40] = bytes(40)
    file.write_bytes(data)
    with pytest.raises(DataError, match="damaged Parquet") as caught:
        read_rows(file)
    assert "row 2" in caught.value.where or "row 3" in caught.value.where


@pytest.mark.parametrize("bad", [b"\x00\x00\x00", b'{"a": "x', b"\xff\xfe", b'{"a": 1} {"a": 2}', b"null", b"[1, 2]"])
def test_a_corrupt_row_in_the_middle_is_named_and_no_row_is_passed_over(tmp_path, bad):
    lines = [json.dumps({"a": i}).encode() for i in range(1000)]
    lines[499] = bad
    file = write(tmp_path / "r.jsonl", b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert caught.value.where.startswith(f"{file}:500")
    assert len(read_rows(file, limit=499)) == 499


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", "{}")
    with pytest.raises(DataError, match="did you mean 'gsm8k_train.jsonl'"):
        read_rows(tmp_path / "gsm8k_trian.jsonl")
    with pytest.raises(DataError, match="no folder"):
        read_rows(tmp_path / "nowhere" / "r.jsonl")


def test_limit_reads_no_further(tmp_path):
    file = write(tmp_path / "r.jsonl", '{"a": 1}\n{"a": 2}\nbroken\n')
    assert [row.values["a"] for row in read_rows(file, limit=2)] == [1, 2]
    assert next(iter_rows(file)).values == {"a": 1}


def test_folder_is_read_in_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", '{"a": 2}\n')
    write(tmp_path / "a.jsonl.gz", '{"a": 1}\n')
    write(tmp_path / ".hidden.jsonl", '{"a": 0}\n')
    write(tmp_path / "README.md", "# data")
    assert [row.values["a"] for row in read_rows(tmp_path, split="train")] == [1, 2]


def test_folder_with_splits_gives_only_the_asked_one(tmp_path):
    for name in ("train-00000", "train-00001", "test-00000", "trainer-notes"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"a": name}))
    assert [row.values["a"] for row in read_rows(tmp_path, split="train")] == ["train-00000", "train-00001"]
    assert [row.values["a"] for row in read_rows(tmp_path, split="test")] == ["test-00000"]
    assert len(read_rows(tmp_path)) == 4
    with pytest.raises(DataError, match="no file of split 'tset'.*\n.*did you mean 'test'"):
        read_rows(tmp_path, split="tset")


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        read_rows(tmp_path)
    write(tmp_path / "a.jsonl", "{}")
    write(tmp_path / "b.csv", "a\n1")
    with pytest.raises(DataError, match=r"mixes \.csv, \.jsonl files"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a.jsonl", ".jsonl"), ("A.JSON.GZ", ".json.gz"), ("x/y.csv", ".csv"), ("a.txt", None), ("owner/name", None)],
)
def test_extension(path, expected):
    assert extension(path) == expected
