"""torch, imported when it is first used.

What a method is (its parameters, its needs, the rows that it makes) is asked by commands that compute nothing, and
importing torch would take most of their time. Modules that only compute inside of functions take it from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch.nn import functional as functional
else:

    class _Later:
        """Stands for a module: its attributes are the module's."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._name), name)

    torch = _Later("torch")
    functional = _Later("torch.nn.functional")
