"""Full disks, exhausted memory and lost ranks, told to the user in terms of the recipe instead of a traceback."""

from __future__ import annotations

import errno
import pickle  # nosec B403 # for the name of its error
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from posttrain.config.memory import MemoryEstimate, gibibytes
from posttrain.errors import LostRankError, ResourceError, StateError
from posttrain.state.checkpoint import STAGING, complete_checkpoints
from posttrain.terminal import say

FULL = (errno.ENOSPC, errno.EDQUOT)

CUTS = {
    "weights": "a smaller type (model.dtype: bfloat16) or a smaller model",
    "adapter": "a smaller model.peft.r",
    "autocast copies": "model.dtype: bfloat16 instead of training.bf16 over float32 weights",
    "gradients": "model.peft: {type: lora}, which trains few parameters",
    "optimizer": "model.peft: {type: lora}, or training.optim: adafactor or adamw_bnb_8bit",
    "engine": "rollouts.vllm.dtype: bfloat16, or rollouts.mode: server, which keeps it elsewhere",
    "reference": "model.peft: {type: lora}, whose reference needs no second copy",
    "activations": "batch.micro_batch, training.gradient_checkpointing: true, or shorter sequences",
    "backward workspace": "batch.micro_batch",
    "head": "batch.micro_batch",
    "KV cache": "rollouts.max_batch, or rollouts.max_new_tokens",
    "sampling logits": "rollouts.max_batch",
}
"""Term of `config.memory` -> what makes it smaller."""

PHASES = {
    "on_main_rank": "starting",
    "build": "loading data and models",
    "_save_checkpoint": "saving a checkpoint",
    "on_save": "saving a checkpoint",
    "evaluate_between_steps": "evaluating",
    "save_model": "saving the trained model",
}
"""Function of a traceback -> what the run was doing; names of `run`, `trl_compat`, `callbacks` and `saving`."""


@contextmanager
def explained(run_dir: Path, estimate: Callable[[], MemoryEstimate]) -> Iterator[None]:
    """Turn a full disk, exhausted memory and the end of another rank inside the block into a ResourceError.

    Args:
        run_dir: folder of the run; what was half-written there is removed.
        estimate: of the memory of one rank, asked for only when it ran out.

    Raises:
        ResourceError: instead of the error of a library; any other error passes.
        StateError: a checkpoint holds a pickle where numbers are read.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise StateError(
            "the state of the trainer in a checkpoint is damaged, or holds objects that are not loaded",
            where=str(run_dir),
            hint="resume from another checkpoint; one of your own runs holds numbers alone",
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if _disk_is_full(error):
            raise _full(run_dir) from error
        if _memory_is_exhausted(error):
            raise _exhausted(error, estimate()) from error
        if _a_rank_has_gone(error):
            lost = LostRankError(
                f"another rank has ended while this one was {_phase(error)}, so it cannot go on",
                where=str(run_dir),
                hint="its own output, or the system's log if it was killed, says why; go on with --resume auto",
            )
            # At once: the launcher ends this process within moments, maybe before anyone else can say it.
            say(lost, err=True)
            raise lost from error
        raise


def _disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that there is no space. Libraries drop the number."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    if isinstance(error, RuntimeError | SafetensorError):
        text = str(error)
        full = any(f"os error {number}" in text for number in FULL) or "No space left on device" in text
        # torch's zip writer says no more than this, for whatever reason a write failed
        if full or "PytorchStreamWriter failed writing" in text or "unexpected pos" in text:
            return True
    cause = error.__cause__ or error.__context__
    return cause is not None and _disk_is_full(cause)


def _full(run_dir: Path) -> ResourceError:
    shutil.rmtree(run_dir / "checkpoints" / STAGING, ignore_errors=True)
    free = shutil.disk_usage(run_dir).free
    complete = complete_checkpoints(run_dir / "checkpoints")
    kept = f"{complete[-1].name} and older ones are intact" if complete else "there is no checkpoint yet"
    return ResourceError(
        f"the disk is full or cannot be written to ({gibibytes(free)} free now); {kept}",
        where=str(run_dir),
        hint="make room, or set training.save_total_limit, and go on with --resume auto",
    )


def _memory_is_exhausted(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _a_rank_has_gone(error: BaseException) -> bool:
    """Whether a collective operation failed because a peer closed its connection, or did not answer in time."""
    text = str(error)
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process")
    names = ("gloo", "NCCL", "ProcessGroup", "TCPStore", "RendezvousConnection")
    return isinstance(error, RuntimeError) and any(name in text for name in names) and any(how in text for how in gone)


def _phase(error: BaseException) -> str:
    """What the run was doing, by the functions that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in frames:  # outermost first: an evaluation samples, and a checkpoint gathers weights
        if frame.name in PHASES:
            return PHASES[frame.name]
    if _sampled(frames):
        return "sampling"
    waited = any(frame.name == "get_batch_samples" for frame in frames)  # for what the others sample and score
    return "preparing a step (rollouts, scores)" if waited else "training"


def _sampled(frames: Sequence[traceback.FrameSummary]) -> bool:
    return any("posttrain/rollouts/" in Path(frame.filename).as_posix() for frame in frames)


def _exhausted(error: BaseException, estimate: MemoryEstimate) -> ResourceError:
    sampling = _sampled(traceback.extract_tb(error.__traceback__))
    doing = "sampling" if sampling else "training"
    terms = sorted([*estimate.fixed, *(estimate.sampling if sampling else estimate.training)], key=lambda t: -t[1])
    if not terms:
        return ResourceError(
            f"out of memory while {doing}", where="", hint="lower batch.micro_batch or rollouts.max_batch"
        )
    lines = "".join(f"\n    {name:20} {gibibytes(size):>12}  {how}" for name, size, how in terms)
    # What is fixed cannot be cut in this phase without changing the run, so the phase's own terms come first.
    own = {name for name, _, _ in (estimate.sampling if sampling else estimate.training)}
    first = next((name for name, _, _ in terms if name in own), terms[0][0])
    others = [name for name, _, _ in terms[:2] if name != first]
    hint = f"cut {first} by: {CUTS[first]}" + "".join(f"\n  or {name} by: {CUTS[name]}" for name in others)
    return ResourceError(f"out of memory while {doing}; estimated terms on each rank:{lines}", hint=hint)
