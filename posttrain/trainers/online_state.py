"""What the online shell remembers between steps, as files of a checkpoint.

The rest of the micro-batches of a window, and what was sampled for windows to come, are a rank's own; the lagging
weights, the mask model, the teacher's average, the replay buffer and the place among the prompts are the same on all
of them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from posttrain.errors import StateError
from posttrain.trainers.rollout_state import pack, read, under, unpack, write
from posttrain.trainers.rollout_step import Batch

if TYPE_CHECKING:
    from posttrain.trainers.online import OnlineShell

SHARED = "rollouts-shared.safetensors"
OF_RANK = "rollouts-rank-{}-of-{}.safetensors"


def save_rollouts(shell: OnlineShell, folder: Path) -> None:
    """Write the files that there is a reason for. Called on all ranks.

    A batch that is being sampled is waited for: its weights are gone after the next update.
    """
    shell.settle()
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
        values["uncounted"] = {target: asdict(batch) for target, batch in shell.uncounted.items()}
        write(folder / OF_RANK.format(shell.rank, shell.world), tensors, values)
    shared = (shell.lagging, shell.masking, shell.average, shell.replay_buffer, shell.refill)
    if shell.accelerator.is_main_process and any(each is not None for each in shared):
        _save_shared(shell, folder / SHARED)


def _save_shared(shell: OnlineShell, path: Path) -> None:
    lagging, groups = shell.lagging, [] if shell.replay_buffer is None else shell.replay_buffer.groups
    flat, rest = pack([sample for group in groups for sample in group])
    tensors = {f"replay.{name}": value for name, value in flat.items()}
    if lagging is not None:
        tensors |= {f"lagging.{name}": weights for name, weights in lagging.weights.items()}
    if shell.masking is not None:
        tensors |= {f"masking.{name}": weights for name, weights in shell.masking.weights.items()}
    if shell.average is not None:
        tensors |= {f"average.{name}": weights for name, weights in shell.average.weights.items()}
    sizes, version = [len(group) for group in groups], None if lagging is None else lagging.version
    mask_version = None if shell.masking is None else shell.masking.version
    values = {"replay": rest, "groups": sizes, "version": version, "mask_version": mask_version}
    write(path, tensors, values | ({} if shell.refill is None else {"drawn": shell.refill.drawn}))


def load_rollouts(shell: OnlineShell, checkpoint: Path) -> None:
    """Read them again. Called on all ranks.

    Raises:
        StateError: they are of another number of ranks, or were sampled without the mask that this run has.
    """
    _load_of_rank(shell, checkpoint)
    if (checkpoint / SHARED).exists():
        _load_shared(shell, checkpoint / SHARED)
    if shell.masking is not None and shell.buffer_window is not None and not shell.masking.weights:
        raise StateError(
            "the checkpoint lies within a batch of rollouts that were sampled without a mask model",
            where=str(checkpoint),
            hint="resume from a checkpoint between two rollouts, or with the method as it was",
        )


def _load_shared(shell: OnlineShell, path: Path) -> None:
    tensors, values = read(path)
    weights = under(tensors, "lagging.")
    if shell.lagging is not None and weights:
        shell.lagging.load(weights, values["version"])
    weights = under(tensors, "masking.")
    if shell.masking is not None and weights:
        shell.masking.load(weights, values["mask_version"])
    weights = under(tensors, "average.")
    if shell.average is not None and weights:
        shell.average.load(weights, 0)
    if shell.refill is not None:
        shell.refill.drawn = values["drawn"]
    if shell.replay_buffer is not None:
        samples = iter(unpack(under(tensors, "replay."), values["replay"]))
        shell.replay_buffer.groups = [[next(samples) for _ in range(n)] for n in values["groups"]][
            -shell.replay_buffer.size :
        ]


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
        shell.buffer = [_micro_batch(under(tensors, f"buffer.{number}.")) for number in range(values["batches"])]
    shell.queue = {
        int(target): unpack(under(tensors, f"queue.{target}."), rest) for target, rest in values["queue"].items()
    }
    uncounted = values.get("uncounted", {})  # checkpoints of versions without pipelines lack it
    shell.uncounted = {int(target): Batch(**batch) for target, batch in uncounted.items()}


def _micro_batch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks were float32 in checkpoints of older versions."""
    return tensors | {name: tensors[name].bool() for name in ("mask", "guided") if name in tensors}
