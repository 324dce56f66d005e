"""The mode of a model, training or not, while numbers of it are wanted and no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module


@contextmanager
def without_dropout(model: Module) -> Iterator[None]:
    """The model inside the block as it is used; then in the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
