"""After the first update: did every trainable tensor move? A run in which nothing learns should say so at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import ModelError
from posttrain.models.value import NAME as CRITIC


def fingerprint(tensor: torch.Tensor) -> tuple[float, float]:
    """Two sums in float64 that an update of any element changes, short of a cancellation."""
    values = tensor.detach().double()
    return float(values.sum()), float((values * values).sum())


class LearningCheck(TrainerCallback):
    """Compares fingerprints of all trainable tensors around the first update with a gradient and a learning rate.

    Args:
        say: shows a line to the user.
        after: updates at the start that leave a part of the model as it is on purpose, and are not looked at.

    Raises:
        ModelError: at that update, if not a single tensor moved.
    """

    def __init__(self, say: Callable[[str], None], *, after: int = 0) -> None:
        self.say, self.after = say, after
        self.before: dict[str, tuple[float, float]] | None = None
        # Kept in checkpoints: an update late in a decayed schedule may be too small to see, and that is no fault.
        self.done = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.done or state.global_step < self.after:
            return
        parameters = dict(kwargs["model"].named_parameters())
        rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        gradients = [p.grad for p in parameters.values() if p.requires_grad and p.grad is not None]
        if max(rates) > 0 and any(bool(g.any()) for g in gradients):
            # Sharded tensors are empty here and cannot be judged; a critic's backbone has no gradient as long as its
            # head is zero.
            waiting = f".{CRITIC}.backbone."
            trained = {n: p for n, p in parameters.items() if p.requires_grad and p.numel() > 0}
            trained = {n: p for n, p in trained.items() if waiting not in f".{n}"}
            self.before = {name: fingerprint(parameter) for name, parameter in trained.items()}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.done or self.before is None:
            return
        self.done = True
        parameters = dict(kwargs["model"].named_parameters())
        still = [name for name, before in self.before.items() if fingerprint(parameters[name]) == before]
        if len(still) == len(self.before):
            raise ModelError(
                f"the first update with a gradient moved none of {len(still)} trainable tensors",
                hint="the learning rate is too small for the weights' precision: use model.dtype float32 with "
                "training.bf16, or raise the learning rate",
            )
        if still:
            self.say(
                f"learning check: {len(still)} of {len(self.before)} trainable tensors did not move in the first "
                f"update, among them {', '.join(still[:3])}"
            )
