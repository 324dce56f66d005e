"""What the online shell remembers between steps, as files of a checkpoint.

The rest of the micro-batches of a window, and what was sampled for windows to come, are a rank's own; the lagging
weights and the replay buffer are the same on all ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from posttrain.errors import StateError
from posttrain.trainers.rollout_state import pack, read, under, unpack, write

if TYPE_CHECKING:
    from posttrain.trainers.online import OnlineShell

SHARED = "rollouts-shared.safetensors"
OF_RANK = "rollouts-rank-{}-of-{}.safetensors"


def save_rollouts(shell: OnlineShell, folder: Path) -> None:
    """Write the files that there is a reason for. Called on all ranks."""
    tensors: dict[str, Tensor] = {}
    window = shell.state.global_step // shell.method.updates_per_rollout
    unfinished = shell.buffer if shell.buffer_window == window else []
    for number, batch in enumerate(unfinished):
        tensors |= {f"buffer.{number}.{name}": value for name, value in batch.items()}
    packed = {target: pack(samples) for target, samples in shell.queue.items()}
    for target, (flat, _) in packed.items():
        tensors |= {f"queue.{target}.{name}": value for name, value in flat.items()}
    if tensors:
        queue = {target: rest for target, (_, rest) in packed.items()}
        values = {"window": window, "batches": len(unfinished), "queue": queue}
        write(folder / OF_RANK.format(shell.rank, shell.world), tensors, values)
    if shell.accelerator.is_main_process and (shell.lagging is not None or shell.replay is not None):
        _save_shared(shell, folder / SHARED)


def _save_shared(shell: OnlineShell, path: Path) -> None:
    lagging, groups = shell.lagging, [] if shell.replay is None else shell.replay.groups
    flat, rest = pack([sample for group in groups for sample in group])
    tensors = {f"replay.{name}": value for name, value in flat.items()}
    if lagging is not None:
        tensors |= {f"lagging.{name}": weights for name, weights in lagging.weights.items()}
    sizes, version = [len(group) for group in groups], None if lagging is None else lagging.version
    write(path, tensors, {"replay": rest, "groups": sizes, "version": version})


def load_rollouts(shell: OnlineShell, checkpoint: Path) -> None:
    """Read them again. Called on all ranks.

    Raises:
        StateError: they are of another number of ranks.
    """
    _load_of_rank(shell, checkpoint)
    if not (checkpoint / SHARED).exists():
        return
    tensors, values = read(checkpoint / SHARED)
    weights = under(tensors, "lagging.")
    if shell.lagging is not None and weights:
        shell.lagging.load(weights, values["version"])
    if shell.replay is not None:
        samples = iter(unpack(under(tensors, "replay."), values["replay"]))
        shell.replay.groups = [[next(samples) for _ in range(n)] for n in values["groups"]][-shell.replay.size :]


def _load_of_rank(shell: OnlineShell, checkpoint: Path) -> None:
    of_ranks = sorted(checkpoint.glob(OF_RANK.format("*", "*")))
    if not of_ranks:
        return
    path = checkpoint / OF_RANK.format(shell.rank, shell.world)
    if path not in of_ranks:
        raise StateError(
            f"the checkpoint holds rollouts of {len(of_ranks)} ranks that are not trained on yet, "
            f"and this run has {shell.world}",
            where=str(checkpoint),
            hint="resume with as many ranks as before",
        )
    tensors, values = read(path)
    if values["batches"]:
        shell.buffer_window = values["window"]
        shell.buffer = [under(tensors, f"buffer.{number}.") for number in range(values["batches"])]
    shell.queue = {
        int(target): unpack(under(tensors, f"queue.{target}."), rest) for target, rest in values["queue"].items()
    }
