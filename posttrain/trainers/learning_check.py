"""After the first updates: did every trainable tensor move, and what share of low-precision weights did?

A run in which nothing learns should say so at once. One update is not enough to call a tensor dead: an adapter's A has
no gradient as long as its B is zero, nor has what is behind a head of zeros. Both move in the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import ModelError

UPDATES = 3
"""Updates after which a tensor that never moved is called dead."""

SAMPLED = 4096
"""Elements of a low-precision tensor that are compared one by one."""

FEW = 0.5
"""Share of moved weights below which the precision is worth a word."""

Fingerprint = tuple[float, float]


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Two sums in float64 that an update of any element changes, short of a cancellation."""
    values = tensor.detach().double()
    return float(values.sum()), float((values * values).sum())


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of evenly spaced elements; of a tensor that FSDP2 shards, of this rank's part."""
    flat = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)].clone()


class LearningCheck(TrainerCallback):
    """Compares trainable tensors around the first updates with a gradient and a learning rate.

    Args:
        say: shows a line to the user.
        after: updates at the start that leave a part of the model as it is on purpose, and are not looked at.

    Raises:
        ModelError: at the first such update, if not a single tensor moved.
    """

    def __init__(self, say: Callable[[str], None], *, after: int = 0) -> None:
        self.say, self.after = say, after
        self.before: dict[str, Fingerprint] | None = None
        self.low: dict[str, torch.Tensor] = {}
        self.still: set[str] | None = None
        self.gradients: set[str] = set()
        self.updates = 0
        # Kept in checkpoints: an update late in a decayed schedule may be too small to see, and that is no fault.
        self.done = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.done or state.global_step < self.after:
            return
        # Sharded tensors are empty here and cannot be judged.
        parameters = {n: p for n, p in kwargs["model"].named_parameters() if p.requires_grad and p.numel() > 0}
        rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        reached = {name for name, p in parameters.items() if p.grad is not None and bool(p.grad.any())}
        if max(rates) > 0 and reached:
            watched = parameters if self.still is None else {n: parameters[n] for n in self.still}
            self.gradients |= reached
            self.before = {name: fingerprint(parameter) for name, parameter in watched.items()}
            if self.still is None:
                low = {n: p for n, p in parameters.items() if torch.finfo(p.dtype).bits < 32 and n in reached}
                self.low = {name: sampled(parameter) for name, parameter in low.items()}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.done or self.before is None:
            return
        parameters = dict(kwargs["model"].named_parameters())
        still = {name for name, before in self.before.items() if fingerprint(parameters[name]) == before}
        if self.still is None and len(still) == len(self.before):
            raise ModelError(
                f"the first update with a gradient moved none of {len(still)} trainable tensors",
                hint="the learning rate is too small for the weights' precision: use model.dtype float32 with "
                "training.bf16, or raise the learning rate",
            )
        if self.low:
            self._tell_share({name: parameters[name] for name in self.low})
        self.still, self.before, self.low = still, None, {}
        self.updates += 1
        if not still or self.updates == UPDATES:
            self.done = True
            self._tell_dead(still, sum(p.requires_grad and p.numel() > 0 for p in parameters.values()))

    def _tell_share(self, parameters: dict[str, torch.Tensor]) -> None:
        """How many of the sampled low-precision weights the update changed; tensors count by their size."""
        moved = total = 0.0
        for name, parameter in parameters.items():
            changed = sampled(parameter) != self.low[name]
            if changed.numel():
                moved += float(changed.double().mean()) * parameter.numel()
                total += parameter.numel()
        if total and moved / total < FEW:
            dtype = str(next(iter(self.low.values())).dtype).removeprefix("torch.")
            self.say(
                f"learning check: the first update moved {moved / total:.1%} of the {dtype} weights; the others were "
                "rounded back. Set model.dtype: float32 and training.bf16: true, which keeps the weights in float32"
            )

    def _tell_dead(self, still: set[str], trained: int) -> None:
        for names, why in (
            (still - self.gradients, "no gradient reached them"),
            (still & self.gradients, "their updates are rounded away"),
        ):
            if names:
                self.say(
                    f"learning check: {len(names)} of {trained} trainable tensors did not move in the first "
                    f"{self.updates} updates ({why}), among them {', '.join(sorted(names)[:3])}"
                )
