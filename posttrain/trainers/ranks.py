"""What one rank finds, on all ranks. Every function here is called on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from posttrain.errors import PosttrainError

T = TypeVar("T")


def on_main_rank(ranks: PartialState, make: Callable[[], T]) -> T:
    """What the main rank finds, on all ranks; its errors too, so that no rank waits for one that has ended."""
    outcome: list[Any] = [None]
    if ranks.is_main_process:
        try:
            outcome = [make()]
        except PosttrainError as error:
            outcome = [error]
    if ranks.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], PosttrainError):
        raise outcome[0]
    return outcome[0]


def with_main_rank(ranks: PartialState, make: Callable[[], T]) -> T:
    """What each rank makes for itself; an error of the main rank, which alone may have weights, is that of all."""
    made: list[T] = []
    mine: PosttrainError | None = None
    if not ranks.is_main_process:
        try:
            made.append(make())
        except PosttrainError as error:
            mine = error
    on_main_rank(ranks, lambda: made.append(make()))
    if mine is not None:
        raise mine
    return made[0]


def any_rank(accelerator: Accelerator) -> Callable[[bool], bool]:
    """Whether any rank says yes; with several ranks all must ask."""

    def ask(mine: bool) -> bool:
        if accelerator.num_processes == 1:
            return mine
        votes = accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), reduction="sum")
        return bool(votes > 0)

    return ask


def summed(accelerator: Accelerator) -> Callable[[list[float]], list[float]]:
    """Numbers summed over the ranks, each by itself."""

    def add(amounts: list[float]) -> list[float]:
        mine = torch.tensor(amounts, device=accelerator.device, dtype=torch.float64)
        return accelerator.reduce(mine, reduction="sum").tolist()

    return add
