"""`posttrain export`: a run's model, a checkpoint or an adapter as one folder that others load."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from posttrain.config.adapters import CONFIG, resolved
from posttrain.config.foreign_files import check_size
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError, RecipeError
from posttrain.models.loading import load_classifier, load_policy
from posttrain.models.saving import SavePlan, start_dtype
from posttrain.models.start_files import load_config
from posttrain.models.tokenizer import looks_local
from posttrain.safe_files import folder_atomic, refuse_links_out
from posttrain.terminal import say
from posttrain.trainers.saving import other_tensors

DTYPES = ("float32", "bfloat16", "float16")


def export_command(source: str, out: Path, dtype: str | None, merge: bool, max_shard_size: str) -> None:
    """Write a model as a Hugging Face folder of safetensors, and load it again to compare.

    Args:
        source: run folder, model folder, checkpoint, adapter folder, or Hub id.
        out: folder to write; must not be there.
        dtype: type of the weights; default: as they are.
        merge: an adapter is merged into its base model.
        max_shard_size: largest file of weights, e.g. `5GB`.

    Raises:
        ModelError: the source cannot be loaded, is an adapter and `merge` is not set, or `out` is there.
        RecipeError: an unknown type.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: there is no such type", hint=f"one of {', '.join(DTYPES)}")
    if out.exists():
        raise ModelError("there is something already", where=str(out), hint="choose another folder")
    path = _model_of(source)
    adapter = (Path(path).expanduser() / CONFIG).is_file()
    if adapter and not merge:
        raise ModelError(
            f"{path!r} is an adapter", where=source, hint="add --merge to write it as a whole model with its base"
        )
    model = resolved(ModelConfig(path=path))
    stored = start_dtype(model) or "float32"
    # What is merged is computed in float32 and rounded once; else the weights are read as they are.
    how = model.model_copy(update={"dtype": "float32" if adapter else stored, "save_dtype": dtype or stored})
    classifies = any("SequenceClassification" in name for name in load_config(model).architectures or ())
    load = load_classifier if classifies else load_policy
    policy, tokenizer = load(how, seed=0)
    plan = SavePlan.of(how, policy, tokenizer)
    state = {name: t.detach().to(plan.saved_type(name, t, policy)) for name, t in _tensors(policy)}
    with folder_atomic(out) as folder:
        plan.write(folder, policy, state, max_shard_size=max_shard_size)
        card = Path(path).expanduser() / "README.md"
        if card.is_file():
            check_size(card)
            shutil.copyfile(card, folder / "README.md")
        read, _ = load(how.of_folder(str(folder), plan.dtype), seed=0)
        problem = other_tensors(read, state)
        if problem is not None:
            raise ModelError(f"the exported model is not the one that was loaded: {problem}", where=str(out))
    for note in plan.notes:
        say(note)
    files = sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    say(f"{out}: {plan.dtype}, {len(files)} file(s) of weights, {size / 2**20:,.1f} MiB")


def _model_of(source: str) -> str:
    """The model folder of a run folder; anything else is one itself."""
    folder = Path(source).expanduser()
    if (folder / "resolved.yaml").is_file():
        refuse_links_out(folder)
        if not (folder / "model").is_dir():
            raise ModelError(
                "this run has not saved its model yet",
                where=source,
                hint="go on with --resume auto, or export one of its checkpoints",
            )
        return str(folder / "model")
    if looks_local(source) and not folder.is_dir():
        raise ModelError(f"no folder {source!r}", where=source, hint="give a run, a model folder or a Hub id")
    return source


def _tensors(policy: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, each once, and what else a checkpoint holds."""
    saved = set(policy.state_dict())
    return [*policy.named_parameters(), *((name, b) for name, b in policy.named_buffers() if name in saved)]
