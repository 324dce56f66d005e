"""Small files that would fill the memory, and patterns that would never end."""

from __future__ import annotations

import gzip
import json
import resource
import time
from pathlib import Path

import pytest

from posttrain.config import patterns
from posttrain.config.adapters import matches
from posttrain.config.schema import FileSource
from posttrain.data import files
from posttrain.data.files import iter_rows, read_rows
from posttrain.data.prefixes import answer_start
from posttrain.data.sources import problems
from posttrain.errors import DataError, RecipeError


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_gzip_bomb(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}.gz"
    row = json.dumps({"prompt": "a" * (8 << 20)}) + "\n"
    with gzip.open(path, "wb", compresslevel=9) as file:  # 140 KB that become 144 MiB
        file.write({"jsonl": b"", "json": b"[", "csv": b"prompt\n"}[kind])
        for number in range(18):
            text = (
                row if kind == "jsonl" else (",\n" * bool(number) + row if kind == "json" else "a" * (8 << 20) + "\n")
            )
            file.write(text.encode())
        file.write(b"]" if kind == "json" else b"")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="packed beyond what rows of text are"):
        for _ in iter_rows(path):
            pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 << 10


def test_an_archive_in_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.compress(b'{"prompt": "x"}\n')))
    with pytest.raises(DataError):
        read_rows(path)
    with pytest.raises(DataError, match="unknown extension"):
        read_rows(path.rename(tmp_path / "rows.jsonl.gz.gz"))


def test_well_packed_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"prompt": f"{number} + {number} = ?", "reference": str(2 * number)} for number in range(100_000)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert sum(1 for _ in iter_rows(path)) == len(rows)


def test_a_parquet_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": ["a" * (1 << 20)] * 80})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="packed beyond"):
        read_rows(path)
    monkeypatch.setattr(files, "MAX_UNPACKED", (1 << 30, 200))
    assert len(read_rows(path)) == 80


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no plain file"):
        read_rows(tmp_path / "rows.jsonl")


HANGS = "(a|aa)+$"
TEXT = "a" * 80 + "b"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < 20


def test_a_reference_pattern_that_does_not_end(clock, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": TEXT}) + "\n")
    source = FileSource(path=str(path), prompt="question", reference="answer", reference_pattern=HANGS)
    with pytest.raises(RecipeError, match="takes more than 0.2 s on a text of 81 characters") as raised:
        list(problems(source, "data.prompts"))
    assert raised.value.where == "data.prompts.reference_pattern"


def test_an_answer_pattern_that_does_not_end(clock) -> None:
    with pytest.raises(RecipeError, match="takes more than"):
        answer_start(TEXT, None, HANGS, "row 0")


def test_targets_of_an_adapter_that_do_not_end(clock) -> None:
    """A foreign adapter's own settings name its modules by a pattern."""
    with pytest.raises(RecipeError, match="takes more than"):
        matches("(a|aa)+", TEXT)
    assert matches(r".*\.q_proj", "model.layers.0.q_proj") and not matches(r"q_proj", "model.q_proj")


def test_answers_are_found_as_before() -> None:
    assert answer_start("so\nAnswer: 7", None, "^Answer", "row 0") == 3
    assert answer_start("7 apples and 17, so 7", "7", None, "row 0") == 0
