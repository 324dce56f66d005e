"""What a run is made of, as a checkpoint remembers it, and what may differ when it is resumed.

Keys are those of the recipe (`training.learning_rate`), `packages.<name>`, `world_size`, and `content.<what>`: hashes
of what the recipe's paths led to. docs/resume.md has the table of what may change.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import posttrain
from posttrain.config.schema import Recipe
from posttrain.errors import StateError, nearest

if TYPE_CHECKING:
    import torch

ABSENT = "(none)"

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "tokenizers",
    "datasets",
    "numpy",
    "math-verify",
    "reasoning-gym",
    "deepspeed",
    "vllm",
)
"""Those that decide numbers; a new version of the others changes no result."""

FREE = (
    "output",
    "reference",
    "tracking",
    "evaluation",
    "verifier_pool.workers",
    "training.save_steps",
    "training.save_total_limit",
    "training.logging_steps",
    "training.report_to",
    "training.run_name",
    "training.push_to_hub",
    "training.hub_model_id",
    "training.hub_private_repo",
    "training.hub_strategy",
    "model.save_dtype",
    "guards",
)
"""Keys that change no update of the weights."""

CHECKED_BY_CONTENT = (
    "plugins",
    "verifier.*.function",
    "data.prompts.*.verifier.*.function",
    "model.path",
    "model.chat_template",
    "model.adapter.path",
    "data.*.path",
    "data.traces.path",
    "reference.path",
)
"""Paths, which may move: `content.*` says whether the same is found there."""

LENGTH = ("training.max_steps", "training.num_train_epochs")
CONSTANT = ("constant", "constant_with_warmup")
"""Schedules that do not look at the length of the run, so that a longer one takes the same steps first."""

FIXED = (
    "method.name",
    "model.init",
    "model.peft",
    "model.quantization",
    "model.dtype",
    "training.optim",
    "content.value_heads",
)
"""A checkpoint cannot be loaded into a run with another of these."""

CONTENTS = (
    "adapter",
    "code",
    "reference",
    "rows",
    "stages",
    "template",
    "template_clock",
    "tokens",
    "traces",
    "weights",
)
"""What may be hashed of a run."""

_SAMPLED = 1024
_IDENTITY_ONLY = ("id", "where", "source", "repeated")
"""Fields that say where a row stood, which changes when a file is moved or renamed, or how it is rendered, which its
tokens show."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One key whose value changed: `str()` gives `key: old -> new`."""

    key: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"


# ------------------------------------------------------------------------------------------------ what a run is made of


def settings(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What is known before anything is loaded: recipe with defaults, package versions, ranks. JSON values."""
    return {
        **recipe.model_dump(mode="json", exclude={"method"}),
        "method": recipe.method.model_dump(mode="json"),
        "packages": dict(_versions()),
        "world_size": world_size,
    }


def contents(
    rows: Iterable[Any],
    items: Iterable[Any],
    template_hash: str,
    model: torch.nn.Module,
    traces: Sequence[Any] = (),
    code: Mapping[str, str] = MappingProxyType({}),
    clock: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, dict[str, str]]:
    """Hashes of what was loaded.

    Args:
        rows: as read (`data.preparation.load_rows`).
        items: as token ids within the limits; they also depend on the tokenizer.
        template_hash: of the chat template.
        model: with its starting weights.
        traces: as token ids, where the method reads them beside the rows.
        code: hashes of code of the user's own.
        clock: what the chat template has read from the clock, by the form that it asked for.
    """
    return {
        "content": {
            **({"template_clock": ", ".join(clock.values())} if clock else {}),
            **({"traces": _content_hash(traces)} if traces else {}),
            **({"code": _content_hash(code.values())} if code else {}),
            "rows": _content_hash(rows),
            "template": template_hash,
            "tokens": _content_hash(items),
            "weights": _weights_hash(model),
        }
    }


@functools.cache  # their files are read, which takes as long as a step of a small model
def _versions() -> dict[str, str]:
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "posttrain": posttrain.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _content_hash(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=_fields).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _fields(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.name not in _IDENTITY_ONLY]
        return {name: getattr(value, name) for name in names}
    return repr(value)  # dates and the like, from typed files


def _weights_hash(model: torch.nn.Module) -> str:
    """Names, shapes and a thousand evenly spread elements of every tensor: training changes nearly all of them."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------- differences


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as dotted keys with JSON texts; strings stay as they are."""
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) and value:
        items = enumerate(value)
    else:
        return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    flat: dict[str, str] = {}
    for name, item in items:
        flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """All differences between two descriptions, over the top-level keys that `new` has."""
    before, after = flatten({name: old[name] for name in old if name in new}), flatten(new)
    return [
        Difference(key, before.get(key, ABSENT), after.get(key, ABSENT))
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    ]


def refuse_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str], *, where: str
) -> list[Difference]:
    """Compare what a checkpoint was made by with what is about to resume from it.

    Args:
        old: from the checkpoint.
        new: `settings`, or `contents`; only its top-level keys are compared.
        allowed: keys that the user lets change; each stands for all below it.
        where: the checkpoint.

    Returns:
        The differences that are let through.

    Raises:
        StateError: others; shows each as `key: old -> new`.
    """
    found = compare(old, new)
    fixed = [d for d in found if _under(d.key, FIXED)]
    if fixed:
        raise _refusal("no checkpoint can be carried over to", fixed, where, "start a new run in another `output`")
    free = (*FREE, *CHECKED_BY_CONTENT, *(LENGTH if _length_is_free(old, new) else ()), *allowed)
    refused = [d for d in found if not _under(d.key, free)]
    if refused:
        flags = " ".join(f"--allow-changed {d.key}" for d in refused)
        raise _refusal("the checkpoint was made by another run than", refused, where, f"undo it, or allow it: {flags}")
    return found


def check_names(allowed: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse names of changes that there are none of.

    Raises:
        StateError: a key that nothing has.
    """
    flat = flatten(known)
    names = {".".join(key.split(".")[:n]) for key in flat for n in range(1, key.count(".") + 2)} | {"content"}
    names |= {f"content.{name}" for name in CONTENTS}
    for key in allowed:
        if key not in names:
            raise StateError(f"--allow-changed {key}: there is no such key", hint=nearest(key, names))


def _length_is_free(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    sections = [run.get("training", {}) for run in (old, new)]
    return all(section.get("lr_scheduler_type") in CONSTANT for section in sections)


def _under(key: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(key, name) or key.startswith(f"{name}.") for name in names)


def _refusal(what: str, differences: Sequence[Difference], where: str, hint: str) -> StateError:
    lines = "".join(f"\n    {difference}" for difference in differences)
    return StateError(f"{what} this one:{lines}", where=where, hint=hint)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
