"""The trained model on disk: gathered, written, loaded again and compared with the policy that was trained.

A difference keeps everything: the folder is set aside under another name, and a checkpoint of the last step is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.data.fitted import token_ids
from posttrain.data.streaming import at_hand
from posttrain.errors import ModelError, PosttrainError
from posttrain.models.loading import load_classifier, load_policy
from posttrain.models.modes import without_dropout
from posttrain.models.saving import SavePlan
from posttrain.models.value import attach
from posttrain.rollouts.weight_sync import PolicyWeights, whole_tensors
from posttrain.safe_files import folder_atomic
from posttrain.trainers.critic import base_of, leave_critic, take_critic
from posttrain.trainers.model_card import write_card
from posttrain.trainers.ranks import on_main_rank
from posttrain.trainers.sharded_start import never_taken_apart
from posttrain.trainers.shell import RunParts, Shell

ROWS, TOKENS = 4, 64
"""Rows of the run on which the saved model is compared with the trained one, and the most tokens of one of them."""

EXACT, ROUNDED, ROUNDED_MEAN = 1e-3, 0.5, 0.1
"""Limits for a difference of log-probs (or scores), in nats: the largest where all is float32 (a log-prob of 30 after
a hundred layers of rounding at 1.2e-7); the largest and the mean where weights or passes have fewer digits."""

REJECTED = "model-rejected"
"""Folder of a saved model that is not the trained one."""


def save_model(shell: Shell) -> None:
    """The trained weights in `model`; with an adapter, the merged model there and the adapter in `adapter`. A value
    model stands in `critic`. Called on all ranks.

    Raises:
        ModelError: what was written does not load as the policy that was trained; a checkpoint of the last step is
            kept.
    """
    parts = shell.parts
    critic = take_critic(shell) if shell.method.needs.critic else None
    try:
        _save(shell, critic)
    except PosttrainError as error:
        if critic is not None:
            attach(base_of(shell.accelerator.unwrap_model(shell.model)), critic)
        kept = parts.run_dir / "checkpoints" / f"checkpoint-{shell.state.global_step}"
        if not kept.exists():
            shell.keep_checkpoint()
        error.hint = f"{error.hint}; all that was trained is in {kept}" if error.hint else f"it is kept in {kept}"
        raise
    shell.accelerator.wait_for_everyone()


def _save(shell: Shell, critic: torch.nn.Module | None) -> None:
    parts, main = shell.parts, shell.accelerator.is_main_process
    model = shell.accelerator.unwrap_model(shell.model)
    weights, rows = PolicyWeights(model, shell.accelerator), few_rows(parts)
    # Gathered by all ranks: what DeepSpeed saves of a run with an adapter lacks the frozen tensors. And before a pass
    # of the policy alone, in which ZeRO-3 fetches ahead what followed in training: a critic that nobody waits for.
    critic_state = {} if critic is None else {name: tensor.cpu() for name, tensor in whole_tensors(critic)}
    with shell.accelerator.autocast():
        trained = outputs(model, rows, shell.accelerator.device)
    state = whole_state(weights, parts.saving, keep=main)
    if parts.recipe.model.adapted:
        target = parts.run_dir / "adapter"
        with folder_atomic(target) if main else nullcontext(target) as folder:
            shell.save_model(str(folder))
            if main:  # a pickle of the Trainer's arguments; resolved.yaml says the same
                (folder / "training_args.bin").unlink(missing_ok=True)

    def write() -> None:
        folder = parts.run_dir / "model"
        with never_taken_apart(shell.args):
            _write(parts.saving, folder, weights.policy, state)
            problem = _difference(shell, folder, state, rows, trained)
        if problem is not None:
            raise _reject(folder, problem)
        if critic is not None:
            leave_critic(critic, critic_state, state, parts.run_dir / "critic", parts.saving)
        for kind in ("model", "adapter", "critic"):
            if (parts.run_dir / kind).is_dir():
                write_card(
                    parts.run_dir / kind,
                    parts.recipe,
                    run_dir=parts.run_dir,
                    steps=shell.state.global_step,
                    spent=shell.ledger.summary(),
                    classifier=shell.method.needs.classifier,
                    kind=kind,
                )

    on_main_rank(PartialState(), write)


def whole_state(weights: PolicyWeights, plan: SavePlan, *, keep: bool) -> dict[str, Tensor]:
    """The plain model's tensors in the type to save, on the CPU, adapters merged; collective where they are sharded.

    Args:
        keep: whether this rank wants them; the others only take part.
    """
    policy, found = weights.policy, {}
    for name, tensor in weights.named_tensors():
        if keep:
            found[name] = tensor.to(plan.saved_type(name, tensor, policy)).cpu()
    return found | {name: tensor.cpu() for name, tensor in weights.named_buffers() if keep}


def few_rows(parts: RunParts) -> list[list[int]]:
    """Token ids of the first rows of the run, each with an end token."""
    stop, pictures = parts.renderer.stop_ids[0], parts.renderer.pictures
    rows = [token_ids(item) for item in at_hand(parts.items)[:ROWS]]
    if pictures is not None:
        return [[*pictures.shortened(row, TOKENS - 1), stop] for row in rows]
    return [[*row[: TOKENS - 1], stop] for row in rows]


@torch.no_grad()
def outputs(model: torch.nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> list[float]:
    """Log-probs of all tokens but the first of each row, or a classifier's scores of the rows. In eval mode.

    Places of pictures stand for no token of the vocabulary and are left out."""
    found: list[float] = []
    with without_dropout(model):
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
            if logits.dim() == 2:
                found += logits[0].tolist()
            else:
                written = ids[0, 1:] < logits.size(-1)
                logps = logits[0, :-1].log_softmax(-1)[written]
                found += logps.gather(1, ids[0, 1:][written].unsqueeze(1)).squeeze(1).tolist()
    return found


def _write(plan: SavePlan, folder: Path, policy: PreTrainedModel, state: dict[str, Tensor]) -> None:
    try:
        with folder_atomic(folder) as beside:
            plan.write(beside, policy, state)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ModelError(
            f"the trained model could not be written: {str(error).strip() or type(error).__name__}",
            where=str(folder),
        ) from error


def _difference(
    shell: Shell, folder: Path, state: dict[str, Tensor], rows: Sequence[Sequence[int]], trained: Sequence[float]
) -> str | None:
    """In what the folder, as anybody loads it, is not the trained policy; None if it is."""
    plan, accelerator = shell.parts.saving, shell.accelerator
    load = load_classifier if shell.method.needs.classifier else load_policy
    try:
        loaded, _ = load(plan.model.of_folder(str(folder), plan.dtype), seed=0)
    except ModelError as error:
        return f"it cannot be loaded: {error.what}"
    problem = other_tensors(loaded, state)
    if problem is not None:
        return problem
    exact = plan.dtype == "float32" and accelerator.mixed_precision == "no" and not _rounds(shell)
    device = accelerator.device if _fits(loaded, accelerator.device) else torch.device("cpu")
    with accelerator.autocast():
        found = outputs(loaded.to(device, base_of(shell.model).dtype), rows, device)
    differences = [abs(a - b) for a, b in zip(trained, found, strict=True)]
    worst, mean = max(differences), sum(differences) / len(differences)
    limit = EXACT if exact else ROUNDED
    if worst <= limit and (exact or mean <= ROUNDED_MEAN):
        return None
    return (
        f"on {len(rows)} rows of the run its log-probs differ from those of the trained policy by up to {worst:.3g} "
        f"nats, {mean:.3g} on average (limit {limit:g}, {len(differences)} numbers)"
    )


def _rounds(shell: Shell) -> bool:
    """Whether a weight of the trained policy has fewer digits than float32."""
    return any(p.is_floating_point() and p.dtype != torch.float32 for p in base_of(shell.model).parameters())


def other_tensors(loaded: PreTrainedModel, state: dict[str, Tensor]) -> str | None:
    """A tensor that is not bit for bit the one that was to be saved; a tied one is another name of one that is."""
    read = loaded.state_dict()
    known = {tensor.data_ptr() for name, tensor in read.items() if name in state}
    for name, tensor in read.items():
        if name not in state and tensor.data_ptr() not in known:
            return f"{name} is not in it"
    for name, tensor in state.items():
        if name not in read:
            return f"{name} was trained and is not loaded"
        if not torch.equal(read[name].cpu(), tensor.to(read[name].dtype)):
            return f"{name} is loaded with other values"
    return None


def _fits(model: PreTrainedModel, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.cuda.mem_get_info(device)[0] > 1.2 * model.get_memory_footprint()


def _reject(folder: Path, problem: str) -> ModelError:
    aside = folder.with_name(REJECTED)
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{REJECTED}-{number}")
    folder.rename(aside)
    return ModelError(
        f"the saved model is not the one that was trained: {problem}",
        where=str(aside),
        hint="this is a defect of saving, please report it with config.json",
    )
