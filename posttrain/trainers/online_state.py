"""What the online shell remembers between steps, as files of a checkpoint.

The rest of the micro-batches of a window, and what was sampled for windows to come, are a rank's own; weights that lag,
the replay buffer and the place among the prompts are the same on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from posttrain.data.sample import Sample
from posttrain.errors import StateError
from posttrain.models.collate import Tensors
from posttrain.state.rollouts import pack, read, under, unpack, write
from posttrain.trainers.rollout_step import Batch

SHARED = "rollouts-shared.safetensors"
OF_RANK = "rollouts-rank-{}-of-{}.safetensors"


class Kept(Protocol):
    """Something with memory that is the same on all ranks."""

    def kept(self) -> tuple[Mapping[str, Tensor], Any]:
        """What it remembers: tensors by name, and JSON values."""

    def take(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """What `kept` gave."""


@dataclass(frozen=True, slots=True)
class OfRank:
    """What a rank has of batches of rollouts.

    Attributes:
        window: that the next step trains on.
        buffer: its micro-batches; empty if none has been made yet.
        queue: samples of windows to come, by window.
        uncounted: what samples of `queue` took, where that is not in the ledger yet.
    """

    window: int
    buffer: Sequence[Tensors] = ()
    queue: Mapping[int, list[Sample]] = field(default_factory=dict)
    uncounted: Mapping[int, Batch] = field(default_factory=dict)


def save_of_rank(found: OfRank, folder: Path, rank: int, world: int) -> None:
    """Write it, if there is anything. Called on all ranks."""
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(found.buffer):
        tensors |= {f"buffer.{number}.{name}": value for name, value in batch.items()}
    packed = {target: pack(samples) for target, samples in found.queue.items()}
    for target, (flat, _) in packed.items():
        tensors |= {f"queue.{target}.{name}": value for name, value in flat.items()}
    if tensors:
        queue = {target: rest for target, (_, rest) in packed.items()}
        uncounted = {target: asdict(batch) for target, batch in found.uncounted.items()}
        values = {"window": found.window, "batches": len(found.buffer), "queue": queue, "uncounted": uncounted}
        write(folder / OF_RANK.format(rank, world), tensors, values)


def load_of_rank(checkpoint: Path, rank: int, world: int) -> OfRank | None:
    """Read it again; None if there was nothing. Called on all ranks.

    Raises:
        StateError: it is of another number of ranks.
    """
    of_ranks = sorted(checkpoint.glob(OF_RANK.format("*", "*")))
    if not of_ranks:
        return None
    path = checkpoint / OF_RANK.format(rank, world)
    if path not in of_ranks:
        raise StateError(
            f"the checkpoint holds rollouts of {len(of_ranks)} ranks that are not trained on yet, "
            f"and this run has {world}",
            where=str(checkpoint),
            hint="resume with as many ranks as before",
        )
    tensors, values = read(path)
    return OfRank(
        values["window"],
        [under(tensors, f"buffer.{number}.") for number in range(values["batches"])],
        {int(target): unpack(under(tensors, f"queue.{target}."), rest) for target, rest in values["queue"].items()},
        {int(target): Batch(**batch) for target, batch in values["uncounted"].items()},
    )


def save_shared(kept: Mapping[str, Kept], folder: Path) -> None:
    """Write what is the same on all ranks, if there is anything. Called on the main rank."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, one in kept.items():
        found, values[name] = one.kept()
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    if kept:
        write(folder / SHARED, tensors, values)


def load_shared(kept: Mapping[str, Kept], checkpoint: Path) -> None:
    """Read it again; what the checkpoint does not hold stays as it is. Called on all ranks."""
    if not (checkpoint / SHARED).exists():
        return
    tensors, values = read(checkpoint / SHARED)
    for name, one in kept.items():
        if name in values:
            one.take(under(tensors, f"{name}."), values[name])
