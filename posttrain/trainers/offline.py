"""The `offline` shell: rewarded traces, without sampling, on TRL's SFTTrainer. Knows no method.

The reference scores every row once, before the first step; for a KL over the whole vocabulary it is run in every step
too. A critic, where the method has one, is a part of the policy module and trained in the same pass (`models.value`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import SFTConfig, SFTTrainer

from posttrain.data.offline_rows import OfflineRow
from posttrain.methods.base import OfflineMethod, Regression
from posttrain.models.collate import Tensors, collate, split
from posttrain.objectives.batch import TokenBatch
from posttrain.trainers.critic import fitted, load_critic, save_critic
from posttrain.trainers.order import StepOrder
from posttrain.trainers.shell import RunParts, Shell
from posttrain.trl_compat import OfflineHost


class OfflineShell(Shell, OfflineHost, SFTTrainer):
    """Trains on fixed traces with rewards."""

    Arguments = SFTConfig

    method: OfflineMethod

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        self.rows: Sequence[OfflineRow] = parts.items
        self.order = StepOrder(len(self.rows), parts.plan.units_per_step, self.args.seed)
        self.reference_logps: dict[int, Tensor] | None = None

    def step_batches(self, step: int) -> list[Tensors]:
        self.method.begin_step(step)
        self.regressions: list[Regression] = []
        if self.parts.reference is not None and self.reference_logps is None:
            totals = self.ledger.state_dict()
            self._score_by_reference()
            if step > 0:  # resumed: the run has paid for these scores already
                self.ledger.load_state_dict(totals)
        rows = self.order.share(step, self.accelerator.process_index, self.accelerator.num_processes)
        samples = [self.rows[row].sample for row in rows]
        micro_batches = split(samples, self.args.per_device_train_batch_size, packs=self.packs)
        self.step_samples = [[samples[i] for i in indices] for indices in micro_batches]
        return [self._collate([rows[i] for i in indices]) for indices in micro_batches]

    def _collate(self, numbers: list[int]) -> Tensors:
        rows = [self.rows[number] for number in numbers]
        tensors = collate([row.sample for row in rows], self.parts.pad_id)
        tensors["rewards"] = torch.tensor([row.reward for row in rows])
        if self.method.steps is not None:
            tensors["steps"] = pad_sequence([torch.tensor(row.steps) for row in rows], batch_first=True)
        if self.reference_logps is not None:
            tensors["ref_logps"] = pad_sequence([self.reference_logps[n] for n in numbers], batch_first=True)
        return tensors

    def method_batch(self, inputs: Tensors, model: torch.nn.Module | None) -> TokenBatch:
        """As in `Shell`; keeps what the critic is fitted to."""
        batch = super().method_batch(inputs, model)
        if model is not None and self.method.fits_values:
            with torch.no_grad():
                self.regressions.append(self.method.regression(batch))
        return batch

    def compute_loss(self, *arguments: Any, **named: Any) -> Tensor:
        loss = super().compute_loss(*arguments, **named)
        if self.method.fits_values and len(self.step_losses) == len(self.step_inputs):
            fitted(self.regressions, self.means.add, main=self.accelerator.is_main_process)
        return loss

    def _score_by_reference(self) -> None:
        """Log-probs under the reference of all rows, shared out over the ranks.

        The batches are fixed by length, not by steps: rounding depends on what a row is batched with, and a resumed
        run must find the same numbers.
        """
        reference = self.parts.reference
        if reference.known is not None:
            self.reference_logps = dict(enumerate(reference.known))
            # Charged as if scored here: costs do not follow from luck.
            self.ledger.scored(self._mine(sum(row.length for row in self.rows)), "reference")
            return
        order, size = sorted(range(len(self.rows)), key=self._by_length), self.args.per_device_train_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        self.tracker.message(f"reference: scoring {len(self.rows):,} rows")
        found = {row: logps for batch in mine for row, logps in self._scored(batch).items()}
        self.reference_logps = dict(gather_object(list(found.items())))
        if reference.cache is not None:
            if reference.cache.damaged is not None:
                self.tracker.message(f"reference: {reference.cache.damaged}; scored anew")
            logps = [self.reference_logps[row] for row in range(len(self.rows))]
            reference.keep(logps, write=self.accelerator.is_main_process)

    def _by_length(self, row: int) -> tuple[int, int]:
        return self.rows[row].length, row

    def _mine(self, total: int) -> int:
        """This rank's part of a number that the ranks share out."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return total // world + (rank < total % world)

    def _scored(self, rows: list[int]) -> dict[int, Tensor]:
        tensors = collate([self.rows[row].sample for row in rows], self.parts.pad_id)
        logps = self.logps_by(self.by_reference, tensors)
        return {row: logps[place, : self.rows[row].length].clone() for place, row in enumerate(rows)}

    def save_files(self, folder: Path) -> None:
        save_critic(self, folder)

    def load_files(self, checkpoint: Path) -> None:
        load_critic(self, checkpoint)
