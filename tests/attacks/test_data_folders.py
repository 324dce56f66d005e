"""Folders of data whose own files say what cannot be: one message, whatever stands there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.data.folders import folder_files
from posttrain.errors import DataError

CARDS = {
    "configs": "configs: 5",
    "no pattern": "configs: [{data_files: '**x'}]",
    "a long name": f"configs: [{{data_files: {'a' * 5000}}}]",
    "a number": "configs: [{data_files: 5}]",
    "a folder": "configs: [{data_files: inner}]",
}
STATES = {
    "state.json": [{"_data_files": each} for each in (5, None, ["a.jsonl"], [{}], [{"filename": "a" * 5000}])],
    "dataset_dict.json": [{"splits": each} for each in (5, None, [{}], ["train"], ["a\0"], ["\ud800"])],
}


@pytest.mark.parametrize("name", [*CARDS, *STATES])
def test_a_data_folder_that_says_what_cannot_be(name: str, tmp_path: Path) -> None:
    """A card or state of another form was a traceback."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    if name in CARDS:
        (tmp_path / "README.md").write_text(f"---\n{CARDS[name]}\n---\n")
        try:
            found = folder_files(tmp_path, None, None, (".jsonl",))
        except DataError as error:
            assert error.where == str(tmp_path) and name in ("no pattern", "a long name")
        else:
            assert [file.name for file in found] == ["a.jsonl"]
        return
    for state in STATES[name]:
        (tmp_path / name).write_text(json.dumps(state))
        with pytest.raises(DataError, match=r"is missing|no file of split"):
            folder_files(tmp_path, None, None, (".jsonl",))
