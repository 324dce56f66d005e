"""Models without weights, on the ranks that will be given their part of them by the rank that reads them.

An outline is made by the same code as the model itself, so it has the same modules, names, shapes and types, in the
same order. Its tensors are on PyTorch's meta device: they take no memory, and what is computed of them has no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_outlined: ContextVar[bool] = ContextVar("outlined", default=False)


@contextmanager
def outlined(wanted: bool = True) -> Iterator[None]:
    """Within the block `models.loading` gives outlines, if they are wanted."""
    before = _outlined.set(wanted)
    try:
        yield
    finally:
        _outlined.reset(before)


def outlining() -> bool:
    """Whether models that are loaded now are outlines."""
    return _outlined.get()


def without_memory() -> AbstractContextManager:
    """Tensors made within the block are an outline's, where models that are loaded now are outlines."""
    return torch.device("meta") if outlining() else nullcontext()


def is_outline(model: torch.nn.Module) -> bool:
    """Whether weights of a model are not here."""
    return any(parameter.is_meta for parameter in model.parameters())
