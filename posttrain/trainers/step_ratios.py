"""Log-ratios of policy to reference over the rows of a step, made before its first pass with a gradient, for methods
that hold each row against a number of the whole step (`PointwiseMethod`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from posttrain.config.positions import model_positions
from posttrain.data.sample import Sample
from posttrain.methods.base import PointwiseMethod

if TYPE_CHECKING:
    from posttrain.trainers.preference import PreferenceShell


class StepRatios:
    """Tells a method the log-ratios of a step.

    Args:
        shell: whose rows have the one role `completion`.
        method: of the shell.
    """

    def __init__(self, shell: PreferenceShell, method: PointwiseMethod) -> None:
        self.shell, self.method = shell, method
        recipe = shell.parts.recipe
        self.limit = recipe.data.max_length or model_positions(recipe.model)

    def observe(self, step: int) -> None:
        """Called on all ranks, which score their own rows."""
        shell = self.shell
        mine = shell.order.share(step, shell.rank, shell.world)
        own = [shell.rows[row].responses["completion"] for row in mine]
        if self.method.scores == "own":
            reference = [float(shell.scored.logps[row][0].sum()) for row in mine]
            policy = shell.logps_of(own, by="policy")
            known: list[float | None] = [float(p.sum()) - r for p, r in zip(policy, reference, strict=True)]
        else:
            known = self._mismatched(step, first=shell.rank * len(mine), own=own)
        ratios = [ratio for ratio in gather_object(known) if ratio is not None]
        self.method.observe(sum(ratios), len(ratios))

    def _mismatched(self, step: int, first: int, own: Sequence[Sample]) -> list[float | None]:
        shell = self.shell
        everyone = [shell.rows[row].responses["completion"] for row in shell.order.items(step)]
        made = mismatched(everyone, self.limit)[first : first + len(own)]
        # A row without a partner is scored too, and left out then: all ranks make as many passes.
        samples = [row if other is None else other for row, other in zip(own, made, strict=True)]
        scored = zip(made, *(shell.logps_of(samples, by=by) for by in ("policy", "reference")), strict=True)
        found = [None if other is None else float(p.sum() - r.sum()) for other, p, r in scored]
        shell.means.add("unpaired/unmatched", found.count(None), len(found))
        return found


def mismatched(rows: Sequence[Sample], limit: int | None) -> list[Sample | None]:
    """Each row's prompt with the completion of another row: of the next one, in a circle, in which both differ.

    The rows of a step come in a shuffled order, so the next row is one at random. A completion that does not fit behind
    its new prompt is cut.

    Args:
        rows: each with a trained token.
        limit: most tokens of the whole; None is no limit.

    Returns:
        None where no row has another prompt and another completion.
    """
    starts = [row.loss_mask.index(1) for row in rows]
    parts = [(row.ids[:start], row.ids[start:]) for row, start in zip(rows, starts, strict=True)]
    found: list[Sample | None] = []
    for i, (prompt, completion) in enumerate(parts):
        others = ((i + step) % len(rows) for step in range(1, len(rows)))
        partner = next((j for j in others if parts[j][0] != prompt and parts[j][1] != completion), None)
        if partner is None:
            found.append(None)
            continue
        ids = [*prompt, *parts[partner][1]][:limit]
        mask = [*[0] * starts[i], *rows[partner].loss_mask[starts[partner] :]][:limit]
        found.append(replace(rows[i], ids=ids, loss_mask=mask))
    return found
