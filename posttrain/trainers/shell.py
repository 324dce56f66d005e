"""What all shells share: the step as the unit of work, one division by global counts, one place that logs.

A shell builds all micro-batches of an optimizer step at its start, counts the units of each loss term over them and
over the ranks, and only then runs forward and backward. So the gradient is the same for every split of a step.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from posttrain.methods.base import Method
from posttrain.objectives.batch import LossSum
from posttrain.tracking.ledger import ComputeLedger
from posttrain.tracking.metrics import Means
from posttrain.tracking.tracker import Tracker
from posttrain.trainers.collate import Tensors, token_batch
from posttrain.trl_compat import fused_token_logps


class Shell:
    """Mixin over a TRL host (see `trl_compat`). Call `bind` after construction, before `train`.

    Hook: `step_batches(step)` returns the micro-batches of this rank for an optimizer step.
    """

    method: Method
    ledger: ComputeLedger
    tracker: Tracker
    max_length: int | None = None

    def bind(self, method: Method, ledger: ComputeLedger, tracker: Tracker) -> None:
        """Give the shell what the host's constructor does not take."""
        self.method, self.ledger, self.tracker = method, ledger, tracker
        self.means = Means()

    @abstractmethod
    def step_batches(self, step: int) -> list[Tensors]:
        """Micro-batches of this rank for optimizer step `step` (from 0), on the CPU."""

    def forward_diagnostics(
        self, tensors: Tensors, logps: Tensor, entropies: Tensor | None, top1: Tensor | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Further diagnostics of one forward pass: name -> (sum, count)."""
        return {}

    # ------------------------------------------------------------------------------- the host's public hooks

    def get_train_dataloader(self) -> DataLoader:
        """Placeholders: the loop counts micro-steps with them, `get_batch_samples` brings the batches."""
        return DataLoader(range(self.args.max_steps * self.args.gradient_accumulation_steps), batch_size=None)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, dict]:
        """All micro-batches of the coming optimizer step, and the number of units of each loss term over all ranks."""
        for _ in range(num_batches):
            next(epoch_iterator)
        batches = self.step_batches(self.state.global_step)
        if len(batches) != num_batches:
            raise RuntimeError(f"{len(batches)} micro-batches for {num_batches} micro-steps")
        return batches, self._global_counts(batches, device)

    def _global_counts(self, batches: list[Tensors], device: torch.device) -> dict[str, Tensor]:
        counts: dict[str, Tensor] = {}
        for tensors in batches:
            for term, n in self.method.counts(token_batch(tensors, max_length=self.max_length)).items():
                counts[term] = counts.get(term, torch.zeros(())) + n
        return {term: self.accelerator.reduce(n.to(device), reduction="sum") for term, n in sorted(counts.items())}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Tensors,
        return_outputs: bool = False,
        num_items_in_batch: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """This rank's part of the loss, times the number of ranks because gradients are averaged over them."""
        with self.accelerator.autocast():
            logps, entropies, top1 = fused_token_logps(model, inputs["ids"], inputs["attention_mask"], inputs["mask"])
        entropies = None if entropies is None else entropies.detach()
        batch = token_batch(inputs, logps, entropies, self.max_length)
        sums = self.method.loss(batch)
        loss = sum(part.value / num_items_in_batch[term].clamp(min=1) for term, part in sums.items())
        self._record(inputs, sums, num_items_in_batch, logps.detach(), entropies, top1)
        return loss * self.accelerator.num_processes

    def _record(
        self,
        inputs: Tensors,
        sums: dict[str, LossSum],
        counts: dict[str, Tensor],
        logps: Tensor,
        entropies: Tensor | None,
        top1: Tensor | None,
    ) -> None:
        tokens = inputs["mask"].sum()
        found = {name: pair for part in sums.values() for name, pair in part.diagnostics.items()}
        if entropies is not None:
            found["entropy"] = (entropies.sum(), tokens)
        found |= self.forward_diagnostics(inputs, logps, entropies, top1)
        for name, (total, n) in found.items():
            self.means.add(name, float(total), float(n))
        self.ledger.trained(int(inputs["attention_mask"].sum()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Join the loop's values with the means over all ranks since the last call; write and show them."""
        if "loss" not in logs:  # the loop's closing summary of speed, which the ledger has better
            return
        parts = gather_object([self.means.state_dict()])
        merged = Means()
        for part in parts:
            merged.merge(part)
        self.means = Means()
        metrics = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
        metrics |= merged.result() | self.ledger.step()
        self.tracker.log(self.state.global_step, metrics)
        super().log(logs | metrics, start_time)
