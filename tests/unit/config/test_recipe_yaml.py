from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.config.yaml_file import read_file, read_text
from posttrain.errors import RecipeError, RecipeErrors


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # no dot, which YAML 1.1 reads as text
        ("1.0e-6", 1e-6),
        ("-2E3", -2000.0),
        (".5", 0.5),
        (".inf", float("inf")),
        ("010", 10),  # not octal in YAML 1.2
        ("0x1F", 31),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("'5'", "5"),
        ('"1e-6"', "1e-6"),
        ("1:30", "1:30"),  # not a sexagesimal number
        ("2001-01-01", "2001-01-01"),  # dates stay text
        ("!!str 5", "5"),
        ("{3: 0.5, 4: 0.5}", {3: 0.5, 4: 0.5}),
        ("[1, [2, {a: b}]]", [1, [2, {"a": "b"}]]),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_values(text: str, value: object) -> None:
    data, _ = read_text(f"key: {text}", "f")
    assert data == {"key": value} and type(data["key"]) is type(value)


def test_every_key_and_entry_has_its_line() -> None:
    _, locations = read_text("a: 1\nb:\n  c: {d: 2}\n  e:\n    - 1\n    - f: 3\n", "f")
    expected = {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", "d"): 3, ("b", "e"): 4}
    expected |= {("b", "e", 0): 5, ("b", "e", 1): 6, ("b", "e", 1, "f"): 6}
    assert locations.places == {path: f"f:{line}" for path, line in expected.items()}
    assert locations.where(("b", "e", 1, "not written")) == "f:6: b.e.1.not written"
    assert locations.where(("nowhere",)) == "f: nowhere"


def test_anchors_and_merge_keys() -> None:
    data, locations = read_text("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\nc: [*x, *x]\n", "f")
    assert data == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}, "c": [{"p": 1, "q": 2}] * 2}
    assert locations.places[("b", "p")] == "f:1" and locations.places[("b", "q")] == "f:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\nc: 2\n", "f:3, column 2: not valid YAML"),
        ("a: b: c\n", "f:1, column 5: not valid YAML: mapping values are not allowed here\n  put text that contains"),
        (
            "a:\n\tb: 1\n",
            "f:2, column 1: not valid YAML: found character '\\t' that cannot start any token\n  indent with",
        ),
        ("a: *nowhere\n", "f:1, column 4: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "f:2, column 1: not valid YAML: but found another document"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "f:5: b.c: the key is given twice, here and in line 3"),
        ("a: !!python/object:os.system ls\n", "f:1: a: the tag 'python/object:os.system' is not supported"),
        ("a: !env HOME\n", "f:1: a: the tag '!env' is not supported"),
        ("a: &x [1, *x]\n", "f:1: a.1: 'x' contains itself"),
        ("a:\n  ? [1, 2]\n  : 3\n", "f:2: a: a key must be text or a whole number"),
        ("a: {<<: 3}\n", "f:1: a: `<<` takes a mapping or a list of mappings"),
        ("a: !!int x\n", "f:1: a: 'x' is no int"),
    ],
)
def test_errors_name_the_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_text(text, "f")
    assert message in str(caught.value)


def test_all_duplicates_are_named_at_once() -> None:
    with pytest.raises(RecipeErrors) as caught:
        read_text("a: 1\na: 2\nb: {c: 1, c: 2}\n", "f")
    assert [error.where for error in caught.value.errors] == ["f:2: a", "f:3: b.c"]


def test_deeply_shared_aliases_are_no_cycle() -> None:
    data, _ = read_text("a: &x [1]\nb: &y [*x, *x]\nc: [*y, *y]\n", "f")
    assert data["c"] == [[[1], [1]], [[1], [1]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "expected a mapping, got a list"),
        (b"just text\n", "expected a mapping, got a single value"),
        (b"a: \xff\xfe\n", "is not UTF-8 text"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_file(path)
    assert str(path) in caught.value.where


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_file(path)[0] == {"a": 1}


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text("a: 1")
    with pytest.raises(RecipeError) as caught:
        read_file(tmp_path / "gpro.yaml")
    assert str(caught.value) == f"{tmp_path / 'gpro.yaml'}: no such file\n  did you mean 'grpo.yaml'?"
    with pytest.raises(RecipeError, match="no such folder"):
        read_file(tmp_path / "nowhere" / "grpo.yaml")
    with pytest.raises(RecipeError, match="is a folder, not a file"):
        read_file(tmp_path)
