"""torch, imported when it is first used, and its `Tensor` for annotations.

What a method is (its parameters, its needs, the rows that it makes) is asked by commands that compute nothing, and
importing torch would take most of their time. Modules that only compute inside of functions take it from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
    from torch.nn import functional as functional
else:

    class _Later:
        """Stands for a module: its attributes are the module's."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._name), name)

    class _LaterType(type):
        """Of a class that stands for a type: its instances are the type's."""

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, getattr(torch, cls.__name__))

    class Tensor(metaclass=_LaterType):
        """Stands for torch's."""

    torch = _Later("torch")
    functional = _Later("torch.nn.functional")
