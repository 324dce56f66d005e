"""The cache of `datasets` is filled as it fills it itself, under the name of a data set of the Hub."""

from __future__ import annotations

import json

import datasets
import pyarrow
import pyarrow.parquet as pq
import pytest
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from posttrain.config.schema import FileSource
from posttrain.data import hub
from posttrain.data.pictures import known, marks_of, take_in
from posttrain.data.sources import problems
from posttrain.data.streaming import StreamedRows
from posttrain.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds owner/numbers in the configurations main and socratic, split train and test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sources = {}
    for split, numbers in (("train", range(5)), ("test", range(2))):
        sources[split] = str(tmp_path / f"{split}.jsonl")
        with open(sources[split], "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"question": f"{split} {i}", "answer": i}) + "\n" for i in numbers)
    for config in ("main", "socratic"):
        builder = Json(
            cache_dir=str(tmp_path / "build"), dataset_name="numbers", config_name=config, data_files=sources
        )
        builder.download_and_prepare(str(tmp_path / "cache" / "owner___numbers" / config / "0.0.0" / COMMIT))
    return tmp_path / "cache"


def test_reads_the_cache_offline(cache):
    rows = hub.read_rows("owner/numbers", "main", split="train", offline=True)
    assert [row.values for row in rows] == [{"question": f"train {i}", "answer": i} for i in range(5)]
    assert rows[3].where == "owner/numbers[train] row 3"
    assert len(hub.read_rows("owner/numbers", "main", split="train", offline=True, limit=2)) == 2
    assert len(hub.read_rows("owner/numbers", "socratic", split="train[:3]", offline=True)) == 3


def test_rows_are_streamed_from_the_cache(cache):
    keys = {"prompt": "question", "completion": "question"}
    source = FileSource(path="owner/numbers", name="main", **keys)
    rows = StreamedRows([("numbers", source), ("few", source.model_copy(update={"limit": 2}))], offline=True)
    assert [row.problem.prompt for row in rows] == [f"train {i}" for i in (*range(5), *range(2))]
    assert rows[3].problem.where == "owner/numbers[train] row 3" and rows[5].problem.id == "few/0"
    again = StreamedRows([("numbers", source)], offline=True)
    test = StreamedRows([("test", source.model_copy(update={"split": "test"}))], offline=True)
    assert again.digests["numbers"] == rows.digests["numbers"] != test.digests["test"] and len(test) == 2
    with pytest.raises(DataError, match="no split 'tain'"):
        StreamedRows([("numbers", source.model_copy(update={"split": "tain"}))], offline=True)


@pytest.fixture
def shown(cache, tmp_path):
    """A set owner/shown in that cache, with the features of pictures that `datasets` has: one a row and a list."""
    images = [Image.new("RGB", (6, 4), (40 * i, 0, 0)) for i in range(3)]
    features = {"q": datasets.Value("string"), "one": datasets.Image(), "all": datasets.List(datasets.Image())}
    columns = {"q": ["a", "b", "c"], "one": images, "all": [images[:1], [], images[1:]]}
    made, file = datasets.Dataset.from_dict(columns, features=datasets.Features(features)), tmp_path / "0.parquet"
    made.to_parquet(str(file))
    builder = Parquet(cache_dir=str(tmp_path / "build"), dataset_name="shown", data_files={"train": [str(file)]})
    builder.download_and_prepare(str(cache / "owner___shown" / "default" / "0.0.0" / COMMIT))
    return images


def test_columns_of_pictures_are_read(shown, monkeypatch):
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded before it was measured")
    )
    asked = {"path": "owner/shown", "prompt": "q"}
    found = problems(FileSource(**asked, images="one"), "shown", offline=True)
    for problem, image in zip(found, shown, strict=True):
        (digest,) = marks_of([problem.prompt])
        assert known(digest, "").load().tobytes() == image.tobytes()
        assert known(digest, "").where.startswith("owner/shown[train] row ")
    several = problems(FileSource(**asked, images="all"), "shown", offline=True)
    assert [len(list(marks_of([problem.prompt]))) for problem in several] == [1, 0, 2]
    assert [problem.prompt for problem in problems(FileSource(**asked), "shown", offline=True)] == ["a", "b", "c"]
    rows = StreamedRows([("shown", FileSource(**asked, completion="q", images="all"))], offline=True)
    assert marks_of([rows[0].problem.prompt])


def test_pictures_that_are_files_of_the_set_are_read_and_no_others(tmp_path, monkeypatch):
    folder, images = tmp_path / "set", [Image.new("RGB", (6, 4), (40 * i, 0, 0)) for i in range(2)]
    (folder / "train").mkdir(parents=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, image in enumerate(images):
        image.save(folder / "train" / f"{number}.png")
    rows = hub.read_rows(str(folder))  # by the builder of folders of pictures, as of a repository
    assert [take_in(row.values["image"], None, "").load().tobytes() for row in rows] == [i.tobytes() for i in images]
    images[0].save(tmp_path / "mine.png")
    column = pyarrow.array([{"bytes": None, "path": str(tmp_path / "mine.png")}], datasets.Image().pa_type)
    features = datasets.Features({"image": datasets.Image()})
    planted = datasets.Dataset(pyarrow.table({"image": column}), info=datasets.DatasetInfo(features=features))
    (tmp_path / "planted").mkdir()
    pq.write_table(planted.data.table, tmp_path / "planted" / "train.parquet")
    with pytest.raises(DataError, match="none of the set's files"):
        hub.read_rows(str(tmp_path / "planted"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "owner/absent"}, "not in the local cache"),
        ({"path": "owner/numbers", "name": "mian"}, "no configuration 'mian'\n  did you mean 'main'"),
        ({"path": "owner/numbers"}, "several configurations\n  set `name`: main, socratic"),
        ({"path": "owner/numbers", "name": "main", "split": "tain"}, "no split 'tain'\n  did you mean 'train'"),
        ({"path": "owner/numbers", "name": "main", "split": "train[:0]"}, "cannot be read"),
        ({"path": "owner/numbers", "name": "main", "revision": "f" * 40}, "not known to be revision"),
        ({"path": "owner/numbers", "name": "main", "revision": "v1.0"}, "not known to be revision"),
    ],
)
def test_errors(cache, arguments, message):
    with pytest.raises(DataError) as error:
        hub.read_rows(**arguments, offline=True)
    assert message in str(error.value)
    assert error.value.where == arguments["path"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mian", "no configuration 'mian'\n  did you mean 'main'"),
        (None, "several configurations\n  set `name`: main, other"),
    ],
)
def test_configurations_named_by_a_data_card(tmp_path, monkeypatch, name, message):
    """The builders that serve a data set of the Hub, here on its files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for config in ("main", "other"):
        (tmp_path / f"{config}.jsonl").write_text(json.dumps({"a": config}))
    configs = "".join(f"- config_name: {config}\n  data_files: {config}.jsonl\n" for config in ("main", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert hub.read_rows(str(tmp_path), "other")[0].values == {"a": "other"}
    with pytest.raises(DataError) as error:
        hub.read_rows(str(tmp_path), name)
    assert message in str(error.value)


def test_scripts_are_not_run(tmp_path):
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError, match="scripts are no longer supported.*\n.*is not run"):
        hub.read_rows(str(tmp_path))


def test_a_data_set_without_data(tmp_path):
    (tmp_path / "README.md").write_text("no data here")
    with pytest.raises(DataError, match="the data set cannot be read"):
        hub.read_rows(str(tmp_path))


@pytest.mark.parametrize("revision", [COMMIT, COMMIT[:10]])
def test_a_cached_commit_is_recognised(cache, revision):
    assert hub.read_rows("owner/numbers", "main", revision=revision, offline=True)


def test_the_commit_that_is_read_is_told(cache):
    assert hub.commit("owner/numbers", "main", offline=True) == COMMIT
    with pytest.raises(DataError, match="not in the local cache"):
        hub.commit("owner/absent", offline=True)


def test_a_cached_branch_is_recognised_by_the_hub_cache(cache, tmp_path):
    folder = tmp_path / "hub" / "datasets--owner--numbers"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "README.md").write_text("card")
    (folder / "refs").mkdir()
    (folder / "refs" / "v1.0").write_text(COMMIT)
    assert hub.read_rows("owner/numbers", "main", revision="v1.0", offline=True)


def test_the_offline_switch_is_put_back(cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError):
        hub.read_rows("owner/absent", offline=True)
    assert datasets.config.HF_HUB_OFFLINE is False
