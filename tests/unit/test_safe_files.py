import json

import pytest

from posttrain.safe_files import file_atomic, folder_atomic, write_json_atomic


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json_atomic(path, {"a": 1})
    write_json_atomic(path, {"b": [1, 2]})
    assert json.loads(path.read_text()) == {"b": [1, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_folder_appears_only_if_the_block_succeeds(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), folder_atomic(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with folder_atomic(target) as folder:
            (folder / "file").write_text(content)
    assert (target / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_appears_only_if_the_block_succeeds(tmp_path):
    target = tmp_path / "deep" / "file.bin"
    with pytest.raises(RuntimeError), file_atomic(target) as beside:
        beside.write_bytes(b"half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    for content in (b"one", b"two"):
        with file_atomic(target) as beside:
            beside.write_bytes(content)
    assert target.read_bytes() == b"two" and len(list(target.parent.iterdir())) == 1
