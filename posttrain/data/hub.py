"""Rows of data sets on the Hugging Face Hub, by way of the `datasets` package and its local cache.

No code from a data set repository is ever run. Offline, the copy in the local cache is used. That cache also answers
when the Hub cannot be reached; `datasets` then takes the copy that was written last. If a revision was asked for and
the copy cannot be shown to be of that revision, that is an error rather than other data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.bounded_files import read_bytes
from posttrain.data.messages import without_filled
from posttrain.data.sample import Row
from posttrain.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

_CACHE_BUILDER = "datasets.packaged_modules.cache"


def read_rows(
    path: str,
    name: str | None = None,
    *,
    split: str = "train",
    revision: str | None = None,
    offline: bool = False,
    limit: int | None = None,
) -> list[Row]:
    """The first `limit` rows of one split, or all. Other arguments and errors as in `open_split`."""
    rows = open_split(path, name, split=split, revision=revision, offline=offline)
    found = enumerate(islice(rows, limit))
    return [Row(without_filled(values), f"{path}[{split}] row {index}") for index, values in found]


def open_split(
    path: str,
    name: str | None = None,
    *,
    split: str = "train",
    revision: str | None = None,
    offline: bool = False,
) -> Dataset:
    """One split, whose rows stay on the disk until they are asked for.

    Args:
        path: `owner/name` or `name` of a data set on the Hub.
        name: its configuration; may be left out where there is only one.
        split: name of a split; slices (`train[:100]`) as in `datasets`.
        revision: commit, tag or branch.
        offline: use the local cache only.

    Raises:
        DataError: not on the Hub, no access, not reachable and not cached, no such configuration or split (names the
            nearest), a cached copy of another revision, or an empty split.
    """
    import datasets

    with _offline(offline):
        builder = _builder(path, name, revision, offline)
        _check_cached_revision(builder, path, revision)
        try:
            builder.download_and_prepare()
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"the data set cannot be fetched: {_first_line(error)}", where=path) from error
    try:
        rows = builder.as_dataset(split=split)
    except ValueError as error:
        splits = [str(known) for known in builder.info.splits or ()]
        if re.split(r"\W", split)[0] in splits:
            raise DataError(f"split {split!r} cannot be read: {_first_line(error)}", where=path) from error
        raise DataError(f"no split {split!r}", where=path, hint=nearest(split, splits)) from error
    if not len(rows):
        raise DataError(f"split {split!r} has no rows", where=path)
    return _with_pictures(rows, path)


def _with_pictures(rows: Dataset, path: str) -> Dataset:
    """The rows with their pictures as bytes: nothing is decoded before its size is known to be within bounds, and of a
    column that nobody asks for nothing at all."""
    import datasets

    raw = {name: _undecoded(feature) for name, feature in rows.features.items()}
    columns = [name for name, feature in raw.items() if feature != rows.features[name]]
    if not columns:
        return rows
    info = rows.info.copy()
    info.features = datasets.Features(raw)
    undecoded = datasets.Dataset(rows.data, info=info, split=rows.split, fingerprint=rows._fingerprint)

    def filled(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return batch | {name: [_filled(value, path) for value in batch[name]] for name in columns if name in batch}

    return undecoded.with_transform(filled)


def _undecoded(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature), length=feature.length)
    return {name: _undecoded(each) for name, each in feature.items()} if isinstance(feature, dict) else feature


def _filled(value: Any, path: str) -> Any:
    """A picture of the set, or a list of them, with its bytes where the set has a file of it."""
    if isinstance(value, list):
        return [_filled(each, path) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"bytes", "path"}:
        return {name: _filled(each, path) for name, each in value.items()}
    if value["bytes"] is not None or value["path"] is None:
        return value
    from posttrain.data.pictures import MAX_BYTES

    file = Path(value["path"])
    if not any(file.resolve().is_relative_to(root.resolve()) for root in _of_sets(path)):
        raise DataError(
            f"a picture is none of the set's files: {value['path'][:80]!r}",
            where=path,
            hint="take a set that holds its pictures, as `push_to_hub` writes it",
        )
    try:
        return {"bytes": read_bytes(file, DataError, MAX_BYTES), "path": value["path"]}
    except OSError as error:
        raise DataError(f"the picture {value['path']!r} cannot be read: {error.strerror}", where=path) from error


def _of_sets(path: str) -> list[Path]:
    """Folders that hold the files of data sets: two caches, and a set that is a folder here."""
    from datasets import config
    from huggingface_hub import constants

    own = [Path(path)] if Path(path).is_dir() else []
    return [Path(config.HF_DATASETS_CACHE), Path(config.DOWNLOADED_DATASETS_PATH), Path(constants.HF_HUB_CACHE), *own]


def commit(path: str, name: str | None = None, *, revision: str | None = None, offline: bool = False) -> str | None:
    """The commit of the data set that `read_rows` reads; None if the cached copy does not say.

    Raises:
        DataError: as `read_rows`.
    """
    with _offline(offline):
        found = _builder(path, name, revision, offline).hash
    return found if re.fullmatch(r"[0-9a-f]{40}", str(found)) else None


def _builder(path: str, name: str | None, revision: str | None, offline: bool) -> DatasetBuilder:
    import datasets
    from datasets.data_files import EmptyDatasetError

    try:
        return datasets.load_dataset_builder(path, name, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        hint = "check id and revision; a private or gated data set needs `hf auth login`; a local path must exist"
        raise DataError(_first_line(error), where=path, hint=hint) from error
    except (datasets.exceptions.DatasetsError, EmptyDatasetError) as error:
        raise DataError(f"the data set cannot be read: {_first_line(error)}", where=path) from error
    except (ConnectionError, FileNotFoundError) as error:
        # Both mean the same here: no answer from the Hub, and nothing in the cache either.
        reason = "is not in the local cache" if offline else "is not in the local cache and the Hub cannot be reached"
        hint = "load it once with network access, or give a local file: " + _first_line(error)
        raise DataError(f"the data set {reason}", where=path, hint=hint) from error
    except OSError as error:
        raise DataError(f"the Hub refuses: {_first_line(error)}", where=path) from error
    except RuntimeError as error:
        hint = "a data set that is a Python script is not run; ask for a Parquet version"
        raise DataError(_first_line(error), where=path, hint=hint) from error
    except ValueError as error:
        raise _no_configuration(path, name, error) from error


def _no_configuration(path: str, name: str | None, error: ValueError) -> DataError:
    """`datasets` names the configurations that exist only within its message: as a Python list, or behind a colon."""
    listed = re.search(r"\[(.+?)\]|configurations in the cache: (.+)", str(error))
    if listed is None:
        return DataError(f"the data set cannot be read: {_first_line(error)}", where=path)
    names = sorted(found.strip(" '\"") for found in (listed[1] or listed[2]).split(","))
    if name is None:
        return DataError("the data set has several configurations", where=path, hint="set `name`: " + ", ".join(names))
    return DataError(f"no configuration {name!r}", where=path, hint=nearest(name, names))


def _check_cached_revision(builder: DatasetBuilder, path: str, revision: str | None) -> None:
    from huggingface_hub import try_to_load_from_cache

    if revision is None or not type(builder).__module__.startswith(_CACHE_BUILDER):
        return
    readme = try_to_load_from_cache(path, "README.md", repo_type="dataset", revision=revision)
    asked = Path(readme).parent.name if isinstance(readme, str) else revision
    if not builder.hash.startswith(asked) or len(asked) < 7:
        raise DataError(
            f"the cached copy is of commit {builder.hash}, which is not known to be revision {revision!r}",
            where=path,
            hint="load it once with network access, or give that commit as the revision",
        )


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """`datasets` reads the switch at each call, but offers no argument for it."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
