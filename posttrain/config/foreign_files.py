"""Small files of a model folder, which may be anybody's: read within bounds, with errors that name the file."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.safe_files import leading_out

MAX_JSON = 256 * 2**20
"""Bytes of a JSON file of a model. The largest tokenizers have a tenth of that."""

MAX_DEPTH = 64
"""Lists and objects within one another in such a file; transformers and tokenizers go into them by recursion."""

PROCESSORS = ("preprocessor_config", "processor_config")

READ = (
    "config",
    "generation_config",
    "tokenizer",
    "tokenizer_config",
    "special_tokens_map",
    "added_tokens",
    *PROCESSORS,
)
"""JSON files of a model folder that are read where it is loaded."""

TEMPLATES = "additional_chat_templates"
"""Folder of a model that transformers reads too."""

TEXTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", f"{TEMPLATES}/*")
"""Files of a model folder that are read as a whole, or copied with the model."""

LAYERS, MAX_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")

_PIXELS = ("shortest_edge", "longest_edge", "min_pixels", "max_pixels")
"""Sides of pictures; in Qwen's processors counts of pixels."""

_SEEN = dict.fromkeys((*_PIXELS, "height", "width", "image_grid_pinpoints", "image_seq_len", "num_image_tokens"), 4096)
_SEEN |= {"patch_size": 256, "merge_size": 64, "temporal_patch_size": 64}
"""What a processor makes of a picture, at most."""

MAX_GROWTH = 256
"""Characters that a tokenizer's replacements may make of one; those of real ones make one to three."""

MAX_SIZE = 2**31 - 1
"""Largest size of a tensor's side that is taken for a model's."""

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as the library itself bounds it."""


def read_json(file: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        ModelError: it is too large, or no JSON object.
    """
    check_size(file)
    return _object(file.read_bytes(), file)


def check_files(folder: Path) -> None:
    """Refuse a model folder with settings that cannot be read, or that are more than settings.

    Raises:
        ModelError: as `refuse_links`, `check_size`, `read_json`, `refuse_settings`, `check_index` or `check_names`;
            names the file.
    """
    refuse_links(folder)
    for pattern in TEXTS:
        for file in folder.glob(pattern):
            check_size(file)
    for name in READ:
        file = folder / f"{name}.json"
        if file.exists():
            found = read_json(file)
            if name == "config":
                refuse_settings(found, file)
            if name == "tokenizer":
                refuse_growth(found, file)
            if name in PROCESSORS:
                refuse_sizes(found, file)
    for file in folder.glob("*.safetensors.index.json"):
        check_index(file)
    for file in folder.glob("*.safetensors"):
        check_names(read_header(file)[1], file)


def refuse_links(folder: Path) -> None:
    """Refuse a model folder with a link to what is not in it: it would be read, and saved or published with the model.

    Raises:
        ModelError: names the first one.
    """
    for path, target in leading_out(folder, TEMPLATES):
        raise ModelError(
            f"{path.name} is a link to {target}, which is not within the model's folder",
            where=str(folder),
            hint="look at it; if it is yours, put a copy of the file in its place",
        )


def refuse_growth(tokenizer: dict[str, Any], file: Path) -> None:
    """Refuse a tokenizer that makes so much of a text that it fills the memory.

    Raises:
        ModelError: replacements of its normalizer or decoder make a character more than `MAX_GROWTH`, one after
            another; or its template repeats a text as often.
    """
    for key in ("normalizer", "decoder"):
        growth = 1
        for part in _objects(tokenizer.get(key)):
            if isinstance(part.get("content"), str):  # behind each character where an expression matches nothing
                growth *= max(len(part["content"]) + ("Regex" in str(part.get("pattern"))), 1)
            if growth > MAX_GROWTH:
                raise ModelError(f"its {key} makes more than {MAX_GROWTH} characters of one", where=str(file))
    repeated = sum("Sequence" in part for part in _objects(tokenizer.get("post_processor")))
    if repeated > MAX_GROWTH:
        raise ModelError(f"its template repeats a text more than {MAX_GROWTH} times", where=str(file))


def refuse_sizes(processor: dict[str, Any], file: Path) -> None:
    """Refuse a processor that makes so much of a picture that it fills the memory.

    Raises:
        ModelError: a size is larger than any model looks at, or below 0.
    """
    counted = "Qwen" in str(processor.get("image_processor_type"))
    for part in _objects(processor):
        for key in _SEEN.keys() & part.keys():
            most = 2**25 if counted and key in _PIXELS else _SEEN[key]
            waiting = [part[key]]
            while waiting:
                value = waiting.pop()
                waiting += value if isinstance(value, list) else ()
                if isinstance(value, int | float) and not 0 <= value <= most:
                    raise _bad_field(key, value, f"from 0 to {most:,}", file)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if isinstance(part, dict):
            yield part


def refuse_settings(config: dict[str, Any], file: Path) -> None:
    """Refuse a config.json that would have code fetched and run, or take all memory before a weight is read.

    Raises:
        ModelError: an implementation of attention or experts is that of a repository of the Hub, which transformers
            loads as native code whatever `trust_remote_code` says; there are more layers than any model has; or a size
            or another field that is read here has no value that it can have.
    """
    waiting: list[Any] = [config]
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        for key, value in part.items() if isinstance(part, dict) else ():
            named = value.values() if isinstance(value, dict) else [value]
            if "_implementation" in key and any(isinstance(name, str) and "/" in name for name in named):
                raise ModelError(
                    f"{key} names code of the Hub: {value!r}",
                    where=str(file),
                    hint="take it out; model.attn_implementation of the recipe chooses one",
                )
            if key in LAYERS and isinstance(value, int) and value > MAX_LAYERS:
                raise ModelError(f"{key} is {value:,}, which no model has", where=str(file))
    text = config.get("text_config")
    for part in (config, text) if isinstance(text, dict) else (config,):
        _check_fields(part, file)


def _check_fields(config: dict[str, Any], file: Path) -> None:
    """Refuse values that cannot be those of the fields that are read before transformers reads them all."""
    for key in (*LAYERS, *_SIZES):
        value = config.get(key)
        if value is None:
            continue
        # A few types give some sizes for each layer.
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) for one in values):
            raise _bad_field(key, value, "a whole number", file)
        least = int(key in ("vocab_size", "hidden_size", "num_attention_heads"))  # others are 0 in some types
        if any(not least <= one <= MAX_SIZE for one in values):
            raise _bad_field(key, value, f"from {least} to {MAX_SIZE:,}", file)
    for key, kind, said in (("tie_word_embeddings", bool, "true or false"), ("model_type", str, "a text")):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise _bad_field(key, config[key], said, file)


def _bad_field(key: str, value: Any, said: str, file: Path) -> ModelError:
    shown = repr(value)
    return ModelError(
        f"{key} must be {said}, not {shown[:60]}", where=str(file), hint="take it from the original model"
    )


def check_index(file: Path) -> None:
    """Refuse a list of a model's files of weights that leads out of its folder.

    Raises:
        ModelError: it names a file outside of it.
    """
    named = read_json(file).get("weight_map")
    check_names(named if isinstance(named, dict) else (), file)
    for name in named.values() if isinstance(named, dict) else ():
        if not isinstance(name, str) or "/" in name or "\\" in name:
            raise ModelError(f"a file of weights outside of the folder: {name!r}", where=str(file))


def check_names(tensors: Iterable[str], file: Path) -> None:
    """Refuse names of tensors that are more than names: libraries print them, a line each.

    Raises:
        ModelError: one has control characters, line feeds among them, or what shows nothing.
    """
    for name in tensors:
        if not name.isprintable():
            raise ModelError(f"a tensor's name is not printable: {name[:80]!r}", where=str(file), hint="get it again")


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its header.

    Raises:
        ModelError: it is no safetensors file.
    """
    check_plain(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER, max(file.stat().st_size - 8, 0)):
            raise ModelError(
                "no safetensors file: its header is longer than it can be", where=str(file), hint="get it again"
            )
        return 8 + length, _object(stream.read(length), file)


def check_size(file: Path) -> None:
    """Refuse a file that is too large to be a configuration.

    Raises:
        ModelError: a JSON file is larger than any that a model needs, and would fill the memory; or is no plain file.
    """
    if check_plain(file) > MAX_JSON:
        raise ModelError(f"larger than {MAX_JSON // 2**20} MiB, as no such file of a model is", where=str(file))


def check_plain(file: Path) -> int:
    """Refuse what would be waited for or read without end; the size of a plain file in bytes.

    Raises:
        ModelError: it is a device, pipe or folder.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("no plain file but a device, pipe or folder", where=str(file), hint="get it again")
    return status.st_size


def _object(data: bytes, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"no JSON: {error.msg}", where=f"{file}:{error.lineno}", hint="take a folder made by save_pretrained"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of too many digits, or nested too deeply
        raise ModelError(f"no JSON: {error}", where=str(file), hint="take a folder made by save_pretrained") from error
    if not isinstance(found, dict):
        raise ModelError("no JSON object", where=str(file), hint="take a folder made by save_pretrained")
    waiting: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in waiting]
        waiting = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
    if waiting:
        raise ModelError(f"no JSON: nested more than {MAX_DEPTH} deep", where=str(file), hint="get it again")
    return found
