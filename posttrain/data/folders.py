"""Which files of a folder hold the rows of a split.

A folder may be
- what `save_to_disk` wrote: a data set, or a dictionary of them by split;
- a copy of a data set from the Hub: a `README.md` that says which files are which split of which configuration; or
  files under `data/`, under a folder per split, or under a folder per configuration;
- any folder of data files.

The split of a file is a word of its name: `train.jsonl`, `gsm8k_train.jsonl`, `train-00000-of-00002.parquet`. What
follows the word belongs to it: `train_sft-0.parquet` and `train_prefs-0.parquet` are two splits, which are not mixed
because somebody asks for `train`. `val`, `valid`, `dev` and `validation` are one split, and so are `eval` and `test`.
Where no file name says a split, all files are read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain.bounded_files import read_bytes, read_json
from posttrain.config.yaml_file import read_text
from posttrain.errors import DataError, RecipeError, nearest
from posttrain.safe_files import leads_out

SAME = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}
"""Words for the same split."""

METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")
METADATA_ENDINGS = (".manifest.json", ".report.json")

_SPLIT = "training|train|test|validation|valid|val|dev|eval"
_WORD = re.compile(rf"(?:.*[-_. ])?({_SPLIT})(?:set|data|split)?\d*((?:[-_. ].*)?)", re.IGNORECASE | re.DOTALL)
_END = re.compile(rf".*({_SPLIT})()", re.DOTALL)
"""A name that ends in such a word, which says something beside another that ends in another one only."""
_SHARD = re.compile(r"([-_.]\d+)?([-_]of[-_]\d+)?(-[0-9a-f]{8,})?$")


def folder_files(folder: Path, split: str | None, name: str | None, extensions: tuple[str, ...]) -> list[Path]:
    """The data files of a split, in the order of their names.

    Args:
        folder: exists.
        split: None reads all files.
        name: of a configuration, for folders with several.
        extensions: of data files.

    Raises:
        DataError: no data files, no such split or configuration, several splits that could be meant, or files of two
            kinds; names the choices. Or a link that leads out of the folder.
    """
    files = _files(folder, split, name, extensions)
    for file in files:
        target = leads_out(file, folder)
        if target is not None:
            raise DataError(
                f"{file.name} is a link to {target}, which is not within the folder",
                where=str(folder),
                hint="if the link is yours, give that file itself as `path`",
            )
    return files


def _files(folder: Path, split: str | None, name: str | None, extensions: tuple[str, ...]) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        # Its name in the dictionary is what counts: both halves of a `train_test_split` call themselves `train`.
        folder, split = _saved_split(folder, split), None
    if (folder / "state.json").is_file():
        return _saved_files(folder, split)
    if (configs := _readme_configs(folder)) and (declared := _declared(folder, configs, split, name)):
        return declared
    if name is not None:
        folder = _configuration(folder, name)
    files = _data_files(folder, extensions)
    if not files:
        return _below(folder, split, name, extensions)
    return _one_kind(folder, _of_split(folder, files, split), extensions)


def split_of(file: str) -> str | None:
    """The split that the name of a file says, in small letters; None if it says none."""
    return _split_by(_WORD, file)


def _split_by(pattern: re.Pattern[str], file: str) -> str | None:
    stem = re.sub(r"(\.(jsonl|json|csv|parquet|arrow|gz))+$", "", file.lower())
    stem = _SHARD.sub("", stem)
    found = pattern.fullmatch(stem)
    return None if found is None else SAME.get(found[1], found[1]) + found[2]


# --------------------------------------------------------------------------------------------------- ordinary folders


def _data_files(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    found = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    return sorted(
        file
        for file in found
        if file.name.lower().endswith(extensions)
        and file.name not in METADATA
        and not file.name.endswith(METADATA_ENDINGS)
    )


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    by_split = _by(_WORD, files)
    if not by_split and len(ends := _by(_END, files)) > 1:
        by_split = ends
    if split is None or (not by_split and split == "train"):
        return files
    return by_split[_chosen(folder, split, by_split, files)]


def _by(pattern: re.Pattern[str], files: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        if (split := _split_by(pattern, file.name)) is not None:
            found.setdefault(split, []).append(file)
    return found


def _chosen(folder: Path, split: str, by_split: dict[str, Any], files: list[Path] | None = None) -> str:
    """The name of the split that is meant."""
    asked = SAME.get(split.lower(), split.lower())
    if asked in by_split:
        return asked
    longer = [found for found in by_split if re.match(re.escape(asked) + r"[-_. ]", found)]
    if len(longer) == 1:
        return longer[0]
    if longer:
        raise DataError(
            f"split {split!r} could be {' or '.join(sorted(longer))}, and their rows differ in kind",
            where=str(folder),
            hint="set `split` to one of them: " + ", ".join(sorted(by_split)),
        )
    held = ", ".join(sorted(by_split)) if by_split else f"none; files: {', '.join(f.name for f in (files or [])[:6])}"
    raise DataError(
        f"no file of split {split!r}; splits: {held}", where=str(folder), hint=nearest(split, set(by_split))
    )


def _one_kind(folder: Path, files: list[Path], extensions: tuple[str, ...]) -> list[Path]:
    kinds = {
        max((ext for ext in extensions if file.name.lower().endswith(ext)), key=len).removesuffix(".gz")
        for file in files
    }
    if len(kinds) > 1:
        names = ", ".join(file.name for file in files[:6])
        raise DataError(
            f"the folder mixes {', '.join(sorted(kinds))} files: {names}", where=str(folder), hint="name one file"
        )
    return files


def _below(folder: Path, split: str | None, name: str | None, extensions: tuple[str, ...]) -> list[Path]:
    """Files in folders within a folder that has none of its own."""
    inner = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".") and any(path.iterdir())
    )
    if len(inner) == 1 and split_of(inner[0].name) is None:
        return _files(inner[0], split, None, extensions)
    by_split = {found: path for path in inner if (found := split_of(path.name)) is not None}
    if by_split and len(by_split) == len(inner):
        if split is None:
            raise DataError("the folder has a folder per split", where=str(folder), hint="name one of them")
        return _files(by_split[_chosen(folder, split, by_split)], None, None, extensions)
    if inner and name is None:
        names = ", ".join(path.name for path in inner)
        raise DataError("the folder has several configurations", where=str(folder), hint=f"set `name`: {names}")
    raise DataError("the folder has no data files", where=str(folder), hint="known: " + ", ".join(extensions))


def _configuration(folder: Path, name: str) -> Path:
    inner = folder / name
    if not inner.is_dir():
        names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        raise DataError(
            f"no configuration {name!r}",
            where=str(folder),
            hint=nearest(name, names) if names else "the folder has none: leave `name` out",
        )
    return inner


# ------------------------------------------------------------------------------------------------- copies from the Hub


def _readme_configs(folder: Path) -> list[dict[str, Any]]:
    """The `configs` that the head of a README declares with their files."""
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    head = re.match(r"---\s*\n(.*?)\n---", read_bytes(readme).decode("utf-8", errors="replace"), re.DOTALL)
    if head is None:
        return []
    try:
        found, _ = read_text(head[1], str(readme))
    except RecipeError:
        return []  # a README for people; the names of the files say the rest
    configs = found.get("configs") if isinstance(found, dict) else None
    return [each for each in _listed(configs) if isinstance(each, dict) and "data_files" in each]


def _declared(folder: Path, configs: list[dict[str, Any]], split: str | None, name: str | None) -> list[Path]:
    named = {str(each.get("config_name", "default")): each for each in configs}
    standard = next((key for key, each in named.items() if each.get("default") or key == "default"), None)
    key = name or standard or (next(iter(named)) if len(named) == 1 else None)
    if key is None:
        raise DataError(
            "the folder has several configurations", where=str(folder), hint="set `name`: " + ", ".join(named)
        )
    if key not in named:
        raise DataError(f"no configuration {key!r}", where=str(folder), hint=nearest(key, named))
    by_split: dict[str, list[Path]] = {}
    for split_name, patterns in _patterns(named[key]["data_files"]):
        for pattern in patterns:
            by_split.setdefault(split_name, []).extend(_matching(folder, pattern))
    by_split = {found: files for found, files in by_split.items() if files}
    if not by_split:
        return []
    if split is None:
        return [file for files in by_split.values() for file in files]
    return by_split[split if split in by_split else _chosen(folder, split, by_split)]


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that a pattern of its card means."""
    try:
        return sorted(file for file in folder.glob(_inside(folder, pattern)) if not file.is_dir())
    except (ValueError, OSError) as error:  # no pattern, or longer than a path can be
        raise DataError(f"the card names files as {pattern[:80]!r}: {_said(error)}", where=str(folder)) from error


def _said(error: ValueError | OSError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _inside(folder: Path, name: str) -> str:
    """A name or pattern that a folder's own files give for others of it.

    Raises:
        DataError: it leads out of the folder, to files that whoever made the folder has not sent.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise DataError(f"the folder names {name!r}, which is not within it", where=str(folder))
    return name


def _patterns(declared: Any) -> list[tuple[str, list[str]]]:
    entries = declared if isinstance(declared, list) else [declared]
    found = []
    for entry in entries:
        paths = entry.get("path") if isinstance(entry, dict) else entry
        split = str(entry.get("split", "train")) if isinstance(entry, dict) else "train"
        found.append((split, [str(path) for path in (paths if isinstance(paths, list) else [paths])]))
    return found


# ------------------------------------------------------------------------------------------------------- save_to_disk


def _saved_split(folder: Path, split: str | None) -> Path:
    names = _listed(_json(folder / "dataset_dict.json").get("splits"))
    splits = {str(each): folder / _inside(folder, str(each)) for each in names}
    if split is None and len(splits) > 1:
        raise DataError("the folder holds several splits", where=str(folder), hint="set `split`: " + ", ".join(splits))
    chosen = splits[_chosen(folder, split or next(iter(splits), "train"), splits)]
    if not os.path.isdir(chosen):  # which takes any name, other than pathlib
        raise DataError(f"the split {chosen.name[:80]!r} of the data set is missing", where=str(folder))
    return chosen


def _saved_files(folder: Path, split: str | None) -> list[Path]:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(
            "the folder holds a selection of rows apart from the rows",
            where=str(folder),
            hint="save it again with a current version of `datasets`, or as Parquet",
        )
    own = state.get("_split")
    if split is not None and isinstance(own, str) and SAME.get(own, own) != SAME.get(split, split):
        raise DataError(f"the folder holds split {own!r}, not {split!r}", where=str(folder), hint=f"set `split: {own}`")
    if split not in (None, "train") and not isinstance(own, str):
        what = f"the folder holds one data set without splits, of which `split: {split}` has no effect"
        raise DataError(what, where=str(folder), hint="leave `split` out")
    named = [each.get("filename") for each in _listed(state.get("_data_files")) if isinstance(each, dict)]
    files = [folder / _inside(folder, str(each)) for each in named]
    missing = next((file for file in files if not os.path.isfile(file)), None)
    if not files or missing is not None:
        raise DataError("a file of the data set is missing", where=str(missing or folder))
    return files


def _json(file: Path) -> dict[str, Any]:
    found = read_json(file)
    return found if isinstance(found, dict) else {}


def _listed(value: Any) -> list[Any]:
    """A list of a foreign file; empty where it has something else."""
    return value if isinstance(value, list) else []
