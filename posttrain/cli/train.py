"""`posttrain train`: load the recipe, then train or stop before training."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.tables import print_memory, print_table
from posttrain.config.batch import sequence_tokens
from posttrain.config.loading import dump_recipe, load_recipe_with_locations
from posttrain.config.preflight import estimate_memory, plan_batch
from posttrain.errors import StateError
from posttrain.imports import importing
from posttrain.methods import CONFIGS, METHODS
from posttrain.models.device import device_type
from posttrain.phases import phase, silence
from posttrain.safe_files import refuse_linked_folders, write_text_atomic
from posttrain.terminal import say
from posttrain.trainers.rows import refuse


def run(
    path: Path,
    overrides: list[str],
    resume: str | None,
    allow_changed: Sequence[str] = (),
    trust_checkpoint: bool = False,
) -> int:
    """Train; returns the exit code: 0, or 128 + N if signal N stopped the run at a checkpoint.

    Raises:
        StateError: changes are allowed, but nothing is resumed.
    """
    if allow_changed and resume is None:
        raise StateError("--allow-changed has no effect without --resume", hint="add --resume auto")
    if trust_checkpoint and resume is None:
        raise StateError("--trust-checkpoint has no effect without --resume", hint="add --resume auto")
    recipe, locations = load_recipe_with_locations(path, overrides, CONFIGS)
    # Also checked inside `train`; here the messages can name lines, and nothing heavy is imported yet.
    refuse(recipe, METHODS[recipe.method.name](recipe.method), locations)

    silence(recipe.tracking.console == "off")
    phase("importing PyTorch, transformers and TRL")
    with importing():
        from posttrain.trainers.run import train

    result = train(recipe, resume=resume, allow_changed=allow_changed, trust_checkpoint=trust_checkpoint)
    if not result.stopped:
        return 0
    if os.environ.get("RANK", "0") == "0":
        again = shlex.join(["posttrain", "train", str(path), *overrides, "--resume", "auto"])
        say(f"stopped after step {result.steps}; go on with: {again}", err=True)
    return 128 + result.signal


def dry_run(path: Path, overrides: list[str], *, world_size: int) -> None:
    """Check the recipe without loading data or model, print the plan, and write `<output>/resolved.yaml`.

    Raises:
        RecipeError: as `trainers.rows.refuse` and `plan_batch`.
        StateError: the output folder holds a run, whose resolved recipe would be overwritten.
    """
    recipe, locations = load_recipe_with_locations(path, overrides, CONFIGS)
    method = METHODS[recipe.method.name](recipe.method)
    needs = method.needs
    refuse(recipe, method, locations)
    plan = plan_batch(recipe, needs, world_size=world_size, rows=None, locations=locations)
    folder = Path(recipe.output)
    refuse_linked_folders(folder)
    if any((folder / name).exists() for name in ("model", "checkpoints", "metrics.jsonl")):
        raise StateError("this folder holds a run", where=str(folder), hint="choose another `output`")
    print_table(plan.table(), "batch")
    limit = sequence_tokens(recipe, needs)
    sizes = {"sequence_tokens": limit, "sequences_per_rank": plan.sequences_per_rank}
    print_memory(estimate_memory(recipe, needs, **sizes, device=device_type()))
    resolved = folder / "resolved.yaml"
    write_text_atomic(resolved, dump_recipe(recipe))
    say(f"\nresolved recipe: {resolved}")
