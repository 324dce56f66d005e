"""Files of a model that a run starts from, but its weights: its config as transformers has it, and any other by name.

Imports without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.adapters import resolved
from posttrain.config.relative_paths import nearest_local
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_config(config: ModelConfig) -> PretrainedConfig:
    """What a model's config.json says, as transformers has it; never asked at the terminal whether to run code.

    Raises:
        ModelError: there is none that can be read, or it needs code of the repository that the recipe does not trust.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, RecursionError) as error:
        raise unloadable(config, error) from error


def start_file(model: ModelConfig, name: str, *, fetch: bool = False) -> Path | None:
    """A file of the start: in its folder, or in the Hub's cache here; None if it has none.

    Args:
        fetch: take it from the Hub where it is not here.

    Raises:
        OSError: it is to be fetched, and the Hub cannot be reached.
    """
    from transformers.utils import cached_file

    base = resolved(model)
    found = cached_file(
        base.path,
        name,
        revision=base.revision,
        local_files_only=not fetch,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=fetch,
        _raise_exceptions_for_gated_repo=fetch,
    )
    return None if found is None else Path(found)


def unloadable(config: ModelConfig, error: Exception) -> ModelError:
    """The error to raise where transformers could not load the model or its tokenizer."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"cannot load {config.path!r}: {first_line}",
        where="model.path",
        hint=("" if Path(str(config.path)).exists() else nearest_local(str(config.path)))
        or "check the id and your access to the Hub, or give a local folder, or `model: {init: ...}`",
    )


def other_shape(path: str, name: str, found: Sequence[int], needed: Sequence[int]) -> ModelError:
    """The error to raise where a weight has another shape than the model that config.json describes."""
    return ModelError(
        f"{path!r}: {name} has the shape {list(found)}, and by config.json {list(needed)}",
        where="model.path",
        hint="take config.json and weights from one save of a model",
    )
