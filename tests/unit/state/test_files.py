import json

import pytest

from posttrain.errors import StateError
from posttrain.state.checkpoint import complete_checkpoints, find_checkpoint, read_state, write_state
from posttrain.state.files import folder_atomic, write_json_atomic


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


def test_only_complete_checkpoints_are_found_newest_last(tmp_path):
    for step in (2, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step != 10:
            write_state(folder, {"step": step})
    (tmp_path / "notes").mkdir()
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9"]
    assert find_checkpoint(tmp_path, "auto").name == "checkpoint-9"
    assert read_state(find_checkpoint(tmp_path, "auto"))["step"] == 9
    with pytest.raises(StateError, match="incomplete"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-10"))


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(StateError, match="no complete checkpoint"):
        find_checkpoint(tmp_path / "none", "auto")
