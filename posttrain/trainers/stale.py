"""Rollouts that are older than the policy that is trained: a lagging copy of its weights, and a replay buffer.

Delayed rollouts need no code here: the shell samples ahead and keeps what it sampled (`trainers.online`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor

from posttrain.data.sample import Origin, Sample
from posttrain.errors import NeedsError
from posttrain.models.value import split_state
from posttrain.state.rollouts import pack, unpack
from posttrain.trainers.shell import Shell

REPLAY_STREAM = 2
"""Tells the draws from the replay buffer from others of the same seed and rollout."""


class LaggingPolicy:
    """A copy of the trained weights, refreshed every `every` rollouts or following them: it samples, masks or teaches.

    Args:
        parameters: the trained parameters of the policy by name; asked for anew each time.
        every: rollouts between refreshes.

    Attributes:
        weights: the copy, by name; empty before the first refresh.
        version: rollout at whose beginning it was made.
    """

    def __init__(self, parameters: Callable[[], Iterable[tuple[str, torch.nn.Parameter]]], every: int) -> None:
        self._parameters, self.every = parameters, every
        self.weights: dict[str, Tensor] = {}
        self.version = 0

    @torch.no_grad()
    def refresh(self, window: int) -> None:
        """Copy the weights if it is time to. Call once per rollout, before its first update."""
        if window % self.every == 0 or not self.weights:
            self.weights = {name: p.detach().clone() for name, p in self._parameters()}
            self.version = window

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the copy by `rate` of what lies between it and the weights; the first call copies them.

        Call once per optimizer step, before its update: then it has followed all updates but the coming one.
        """
        if not self.weights:
            self.refresh(0)
        for name, parameter in self._parameters():
            self.weights[name].lerp_(parameter.detach(), rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The copy stands in the policy inside the block; the trained weights come back after it, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def kept(self) -> tuple[Mapping[str, Tensor], int]:
        return self.weights, self.version

    def take(self, tensors: Mapping[str, Tensor], values: int) -> None:
        if tensors:
            self.version = values
            # Copies: where a tensor lies in a file decides how its products are rounded.
            self.weights = {name: tensors[name].to(p.device, p.dtype, copy=True) for name, p in self._parameters()}

    def _exchange(self) -> None:
        for name, parameter in self._parameters():
            parameter.data, self.weights[name] = self.weights[name], parameter.data
        torch.clear_autocast_cache()  # which knows parameters by identity, and would keep casts of the other weights


def lagging(shell: Shell, every: int, where: str, *, critic: bool = False) -> LaggingPolicy:
    """A lagging copy of what a shell trains of its policy, or of its critic.

    Args:
        where: the key that asks for it.

    Raises:
        NeedsError: no rank has whole weights to copy.
    """
    zero3 = shell.is_deepspeed_enabled and shell.accelerator.state.deepspeed_plugin.zero_stage == 3
    if zero3 or shell.accelerator.distributed_type == DistributedType.FSDP:
        what = "critic" if critic else "policy"
        raise NeedsError(
            f"a {what} that lags is a copy of whole weights, and here they are sharded over the ranks",
            where=where,
            hint="use ZeRO stage 1 or 2; for stale rollouts rollouts.delay does as well",
        )

    def trained() -> list[tuple[str, torch.nn.Parameter]]:
        parts = split_state(dict(shell.accelerator.unwrap_model(shell.model).named_parameters()))
        return [(name, p) for name, p in parts[critic].items() if p.requires_grad]

    return LaggingPolicy(trained, every)


class ReplayBuffer:
    """The latest groups of all ranks, the same on every rank. What is drawn is a function of seed and rollout.

    Args:
        size: groups that are kept.
        per_window: groups that are drawn for each rollout; none as long as fewer are there.
    """

    def __init__(self, size: int, per_window: int, seed: int) -> None:
        self.size, self.per_window, self.seed = size, per_window, seed
        self.groups: list[list[Sample]] = []

    def draw(self, window: int, first_group: int) -> list[list[Sample]]:
        """Different groups, as new samples numbered from `first_group` on, with origin REPLAY."""
        if len(self.groups) < self.per_window:
            return []
        generator = np.random.default_rng([self.seed, window, REPLAY_STREAM])
        chosen = generator.choice(len(self.groups), self.per_window, replace=False)
        return [
            [replace(sample, origin=Origin.REPLAY, group=first_group + number) for sample in self.groups[index]]
            for number, index in enumerate(chosen)
        ]

    def add(self, samples: Iterable[Sample]) -> None:
        """Keep these fresh samples by their groups; the oldest groups make room."""
        groups: dict[int, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.group, []).append(sample)
        self.groups = [*self.groups, *(groups[number] for number in sorted(groups))][-self.size :]

    def kept(self) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        flat, rest = pack([sample for group in self.groups for sample in group])
        return flat, {"samples": rest, "sizes": [len(group) for group in self.groups]}

    def take(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        samples = iter(unpack(tensors, values["samples"]))
        self.groups = [[next(samples) for _ in range(n)] for n in values["sizes"]][-self.size :]


def fresh_positions(window: int, per_window: int, replayed: int) -> range:
    """Positions in the order of prompts that a rollout samples for. The first one has nothing to replay."""
    if window == 0:
        return range(per_window)
    start = per_window + (window - 1) * (per_window - replayed)
    return range(start, start + per_window - replayed)
