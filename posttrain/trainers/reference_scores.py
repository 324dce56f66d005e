"""The reference's log-probs of fixed rows, scored once before they are needed, or found as an earlier run left them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from posttrain.data.fitted import PreferenceRow
from posttrain.data.offline_rows import OfflineRow
from posttrain.models.collate import Tensors, collate
from posttrain.trainers.shell import Shell


class ReferenceScores:
    """Log-probs of rows by a shell's reference.

    Args:
        shell: bound, with a reference by the time that it scores.
        rows: of the shell, each with the same roles.

    Attributes:
        logps: row -> log-probs per role, (T,) without padding.
    """

    def __init__(self, shell: Shell, rows: Sequence[PreferenceRow | OfflineRow]) -> None:
        self.shell, self.rows, self.roles = shell, rows, tuple(rows[0].responses)
        self.logps: dict[int, list[Tensor]] = {}

    def score(self, used: Collection[int], *, cached: bool, paid: bool) -> None:
        """Log-probs of these rows, shared out over the ranks. Call on all of them.

        The batches are fixed by length, not by steps: rounding depends on what a row is batched with, and a resumed
        run must find the same numbers.

        Args:
            used: numbers of the rows; all of them where they are cached.
            cached: they may be found in the reference's cache, and go there.
            paid: the run has paid for these scores before it was interrupted.
        """
        shell, reference = self.shell, self.shell.parts.reference
        assert reference is not None
        totals, cache = shell.ledger.state_dict(), reference.cache if cached else None
        rows, size = sorted(used, key=lambda row: (self.rows[row].length, row)), shell.args.per_device_train_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        mine = batches[shell.rank :: shell.world]
        if cache is not None and reference.known is not None:
            n = len(self.roles)
            self.logps = {row: reference.known[row * n : (row + 1) * n] for row in range(len(self.rows))}
            for batch in mine:  # charged as if scored here: costs do not follow from luck
                tensors = self._tensors(batch)
                read = int(tensors["attention_mask"].sum())
                shell.ledger.scored(read, "reference", pixels=shell.pixels(tensors))
            shell.tracker.message(f"reference: log-probs of {len(self.rows)} rows from {cache.path}")
        else:
            shell.tracker.message(f"reference: scoring {len(rows):,} rows")
            found = {row: logps for batch in mine for row, logps in self._scored(batch).items()}
            self.logps = dict(gather_object(list(found.items())))
            if cache is not None:
                if cache.damaged is not None:
                    shell.tracker.message(f"reference: {cache.damaged}; scored anew")
                every = [logps for row in range(len(self.rows)) for logps in self.logps[row]]
                reference.keep(every, write=shell.accelerator.is_main_process)
        if paid:
            shell.ledger.load_state_dict(totals)

    def padded(self, rows: Sequence[int], width: int) -> Tensor:
        """(len(rows) * roles, width): of the first role row by row, then of the second, and so on."""
        padded = torch.zeros(len(rows) * len(self.roles), width)
        for i, row in enumerate(rows):
            for role, values in enumerate(self.logps[row]):
                padded[role * len(rows) + i, : len(values)] = values
        return padded

    def _tensors(self, rows: Sequence[int]) -> Tensors:
        samples = [self.rows[row].responses[role] for role in self.roles for row in rows]
        return collate(samples, self.shell.parts.pad_id)

    def _scored(self, rows: Sequence[int]) -> dict[int, list[Tensor]]:
        tensors = self._tensors(rows)
        logps = self.shell.logps_by(self.shell.by_reference, tensors)
        lengths = tensors["attention_mask"].sum(dim=1).tolist()
        return {
            row: [logps[place, : lengths[place]].clone() for place in range(i, len(logps), len(rows))]
            for i, row in enumerate(rows)
        }
