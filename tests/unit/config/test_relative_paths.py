from __future__ import annotations

import json

from posttrain.config.relative_paths import from_folder, nearest_local, started_in
from posttrain.config.schema import DataConfig, FileSource, ModelConfig, TraceSource


def test_paths_are_seen_from_the_folder_of_the_run(tmp_path, monkeypatch):
    start, here = tmp_path / "start", tmp_path / "here"
    for folder in (start / "runs" / "base", here):
        folder.mkdir(parents=True)
    for file in (start / "a.jsonl", start / "b.jsonl", here / "b.jsonl"):
        file.write_text("{}")
    monkeypatch.chdir(here)
    data = DataConfig(
        completions=[FileSource(path="a.jsonl"), FileSource(path="b.jsonl"), FileSource(path="owner/name")],
        traces=TraceSource(path=["a.jsonl", "gone.jsonl"]),
    )
    moved = from_folder(data, start)
    assert [source.path for source in moved.completions] == [
        str(start / "a.jsonl"),
        str(start / "b.jsonl"),  # the one here is another
        "owner/name",
    ]
    assert moved.traces.path == [str(start / "a.jsonl"), "gone.jsonl"]
    assert from_folder(ModelConfig(path="runs/base"), start).path == str(start / "runs" / "base")
    assert from_folder(moved, here) is moved and from_folder(data, tmp_path / "gone") is data
    (start / "environment.json").write_text(json.dumps({"folder": str(start)}))
    assert (started_in(start), str(started_in(here))) == (start, ".")


def test_a_name_near_a_local_one_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mymodel").mkdir()
    (tmp_path / "pairs.jsonl").write_text("{}")
    assert nearest_local("mymodle") == "did you mean 'mymodel', which is here?"
    assert nearest_local("pairs") == "did you mean 'pairs.jsonl', which is here?"
    assert nearest_local("./paris.jsonl") == "did you mean 'pairs.jsonl', which is here?"
    assert nearest_local("gpt2") == nearest_local("owner/mymodel") == nearest_local("nofile.jsonl") == ""
