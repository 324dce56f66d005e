"""Small files that would fill the memory, and patterns that would never end."""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import signal
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain.config import patterns
from posttrain.config.adapters import matches
from posttrain.config.schema import FileSource
from posttrain.data.files import iter_rows, read_rows
from posttrain.data.prefixes import answer_start
from posttrain.data.sources import problems
from posttrain.errors import DataError, RecipeError
from posttrain.verifiers.pattern import compile_pattern


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
    from posttrain.data import columnar

    monkeypatch.setattr(columnar, "MAX_UNPACKED", (1 << 30, 200))
    assert len(read_rows(path)) == 80


def written(folder: Path, table, packed: str | None = None, *, stream: bool = False) -> Path:
    """A table as an Arrow file of either form."""
    from pyarrow import OSFile, ipc

    path = folder / "rows.arrow"
    options = ipc.IpcWriteOptions(compression=packed)
    with (
        OSFile(str(path), "wb") as sink,
        (ipc.new_stream if stream else ipc.new_file)(sink, table.schema, options=options) as writer,
    ):
        writer.write_table(table)
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("packed", ["zstd", "lz4"])
def test_a_packed_arrow_file(packed: str, stream: bool, tmp_path: Path) -> None:
    """Its 192 MiB of text were unpacked before a row of them was looked at."""
    import pyarrow

    path = written(tmp_path, pyarrow.table({"prompt": ["a" * (1 << 20)] * 192}), packed, stream=stream)
    assert path.stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="packed beyond what rows of text are"):
        read_rows(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    path = written(tmp_path, pyarrow.table({"prompt": [f"{n} + {n}" for n in range(5000)]}), packed, stream=stream)
    assert [row.values["prompt"] for row in read_rows(path)][-1] == "4999 + 4999"


def test_rows_that_take_no_room_in_a_file(tmp_path: Path) -> None:
    """Each was as many Python objects at once as it says: a batch of nulls, a list of them, one text in all rows."""
    import pyarrow
    from pyarrow import parquet

    nulls, million = pyarrow.nulls(200_000_000), 1 << 20
    one_list = pyarrow.ListArray.from_arrays(pyarrow.array([0, 200_000_000], pyarrow.int32()), nulls)
    text = pyarrow.array(["a" * million])
    many = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4096, pyarrow.int32()), text)
    attacks = {
        "nulls": pyarrow.table({"prompt": nulls}),
        "a list": pyarrow.table({"prompt": one_list}),
        "a list within": pyarrow.table({"prompt": pyarrow.StructArray.from_arrays([one_list], ["inner"])}),
        "one text": pyarrow.table({"prompt": many}),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, table in attacks.items():
        path = written(tmp_path, table)
        assert path.stat().st_size < 3_000_000, name
        with pytest.raises(DataError, match=r"packed beyond|the row is larger than 64 MiB"):
            for _ in iter_rows(path):
                pass
    path = tmp_path / "rows.parquet"
    parquet.write_table(attacks["one text"], path, dictionary_pagesize_limit=2 * million)
    with pytest.raises(DataError, match="packed beyond"):
        for _ in iter_rows(path):
            pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1536 << 10


def test_arrow_files_with_other_lengths_than_they_have(tmp_path: Path) -> None:
    """Every word of a file made huge or negative: an error, or rows. Texts were read from anywhere in memory."""
    import pyarrow

    table = pyarrow.table({"prompt": ["abc", None], "tokens": [[1, 2], [3]], "of": [{"a": "x"}, {"a": "y"}]})
    for stream in (False, True):
        whole = written(tmp_path, table, stream=stream).read_bytes()
        for place in range(0, len(whole) - 8, 4):
            for value in (1 << 62, (1 << 31) - 1, -1, -(1 << 31)):
                other = value.to_bytes(8, "little", signed=True)
                (tmp_path / "rows.arrow").write_bytes(whole[:place] + other + whole[place + 8 :])
                with contextlib.suppress(DataError):
                    read_rows(tmp_path / "rows.arrow")


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no plain file"):
        read_rows(tmp_path / "rows.jsonl")


HANGS = "(a|aa)+$"
TEXT = "a" * 80 + "b"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns have 0.2 s here. Where they have no clock, as once, the test fails after 20 s: they would take years."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2, raising=False)

    def too_long(*_: object) -> None:
        raise AssertionError("the pattern has no clock")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_reference_pattern_that_does_not_end(clock, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": TEXT}) + "\n")
    source = FileSource(path=str(path), prompt="question", reference="answer", reference_pattern=HANGS)
    with pytest.raises(RecipeError, match="takes more than 0.2 s on a text of 81 characters") as raised:
        list(problems(source, "data.prompts"))
    assert raised.value.where == "data.prompts.reference_pattern"


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "(a{99999999999999})", "(?:(?:(a){200}){100}){100}"])
def test_a_pattern_that_fills_the_memory_or_the_stack(pattern: str, tmp_path: Path) -> None:
    """Two ended with a traceback; of repetitions within repetitions each takes memory, a thousandfold per level."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    source = FileSource(path=str(tmp_path / "rows.jsonl"), prompt="question", reference="answer")
    with pytest.raises(RecipeError, match="not a regular expression"):
        list(problems(source.model_copy(update={"reference_pattern": pattern}), "data.prompts"))
    with pytest.raises(RecipeError, match="not a regular expression"):
        compile_pattern(pattern, where="verifier.numeric.pattern")
    with pytest.raises(ValidationError, match="not a regular expression"):
        TypeAdapter(patterns.Pattern).validate_python(pattern)


def test_an_answer_pattern_that_does_not_end(clock) -> None:
    with pytest.raises(RecipeError, match="takes more than"):
        answer_start(TEXT, None, HANGS, "row 0")


def test_targets_of_an_adapter_that_do_not_end(clock) -> None:
    """A foreign adapter's own settings name its modules by a pattern."""
    with pytest.raises(RecipeError, match="takes more than"):
        matches("(a|aa)+", TEXT)
    assert matches(r".*\.q_proj", "model.layers.0.q_proj") and not matches(r"q_proj", "model.q_proj")


OF_MANY = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp|ffn|dense).*?(?:k_proj|v_proj|q_proj|out_proj|down_proj).*?)"
)


@pytest.mark.parametrize(
    ("key", "value"),
    [("target_modules", HANGS), ("exclude_modules", HANGS), ("layers_pattern", HANGS), ("layers_pattern", [HANGS])]
    + [
        ("rank_pattern", {HANGS: 8}),
        ("alpha_pattern", {HANGS: 8}),
        ("modules_to_save", [HANGS]),
        ("exclude_modules", 7),
    ]
    + [("target_modules", pattern) for pattern in ("(?:a*)*b", "(a){2,}", "a?" * 30 + "a" * 30, "(a|a)" * 30, ".*" * 9)]
    + [("megatron_config", {"x": 1}), ("r", 10**9), ("r", 0), ("r", "8")],
)
def test_settings_of_an_adapter_that_peft_would_follow(key: str, value: object, tmp_path: Path) -> None:
    """It imports the module that `megatron_core` names, and matches patterns without a clock."""
    from posttrain.config.adapters import resolved
    from posttrain.config.schema import ModelConfig
    from posttrain.errors import ModelError

    given = {"peft_type": "LORA", "r": 8, "target_modules": OF_MANY, "rank_pattern": {r"layers\.[0-9]+\.q_proj": 4}}
    file, model = tmp_path / "adapter_config.json", ModelConfig(path="base", adapter={"path": str(tmp_path)})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for target in (OF_MANY, "all-linear", ["q_proj"], r"^model\.layers\.(?!0\b)\d+\.(?:mlp|self_attn)\.(up|q)_proj$"):
        file.write_text(json.dumps(given | {"target_modules": target}))
        assert resolved(model) == model
    file.write_text(json.dumps(given | {"megatron_core": "evil"} | {key: value}))
    with pytest.raises(ModelError, match=key) as raised:
        resolved(model)
    assert raised.value.where == str(file)


def test_answers_are_found_as_before() -> None:
    assert answer_start("so\nAnswer: 7", None, "^Answer", "row 0") == 3
    assert answer_start("7 apples and 17, so 7", "7", None, "row 0") == 0


def test_columns_whose_values_are_one_that_the_file_has_once(tmp_path: Path) -> None:
    """Views, lists of views and runs were counted as what they take in the file, and were gigabytes as objects."""
    import numpy
    import pyarrow

    million, many = 1 << 20, 20_000
    views = numpy.zeros((many, 4), numpy.int32)  # length, the first four bytes, the buffer and the place in it
    views[:] = million, int.from_bytes(b"aaaa", "little"), 0, 0
    text = [None, pyarrow.py_buffer(views.tobytes()), pyarrow.py_buffer(b"a" * million)]
    nulls = pyarrow.nulls(million).cast(pyarrow.int8())
    places = [None, *(pyarrow.py_buffer(numpy.full(many, each, numpy.int32).tobytes()) for each in (0, million))]
    attacks = {
        "packed beyond": pyarrow.Array.from_buffers(pyarrow.string_view(), many, text),
        "list_view": pyarrow.Array.from_buffers(pyarrow.list_view(pyarrow.int8()), many, places, children=[nulls]),
        "run_end": pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([10**8], pyarrow.int32()), ["a" * 1000]),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for said, column in attacks.items():
        path = written(tmp_path, pyarrow.table({"prompt": column}))
        with pytest.raises(DataError, match=said):
            for _ in iter_rows(path):
                pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
    plain = pyarrow.table({"prompt": pyarrow.array(["a", None, "b" * 20], pyarrow.string_view())})
    assert [row.values["prompt"] for row in iter_rows(written(tmp_path, plain))] == ["a", None, "b" * 20]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_zone_of_time_that_is_none(kind: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"prompt": pyarrow.array([0], pyarrow.timestamp("s", "No/Where"))})
    path = written(tmp_path, table) if kind == "arrow" else tmp_path / "rows.parquet"
    if kind == "parquet":
        parquet.write_table(table, path)
    with pytest.raises(DataError, match="No/Where"):
        read_rows(path)
