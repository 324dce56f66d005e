"""From a recipe to a trained model: build the parts that the method needs, train, save, draw.

Reading order: `train` is the whole story; each helper below builds one part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from posttrain.config.batch import BatchPlan, plan_batch
from posttrain.config.preflight import check_needs
from posttrain.config.schema import Recipe
from posttrain.data.preparation import corpus, fit_rows, load_rows
from posttrain.data.rendering import Renderer
from posttrain.errors import RecipeError
from posttrain.evaluation.runner import Report, evaluate
from posttrain.methods import METHODS
from posttrain.methods.base import Method
from posttrain.models.loading import load_policy, lora_config
from posttrain.models.reference import Reference, frozen_copy
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.state.checkpoint import find_checkpoint
from posttrain.tracking.ledger import ComputeLedger
from posttrain.tracking.tracker import Tracker
from posttrain.trainers.callbacks import CompleteCheckpoints, OnSchedule, StopOnSignal
from posttrain.trainers.learning_check import LearningCheck
from posttrain.trainers.online import OnlineShell
from posttrain.trainers.run_folder import (
    describe,
    forget_unfinished_start,
    refuse_used_folder,
    restore,
    save_model,
    state_of,
)
from posttrain.trainers.shell import RunParts, Shell
from posttrain.trainers.supervised import SupervisedShell
from posttrain.trl_compat import quiet_arguments
from posttrain.verifiers.judge import build_judge

SHELLS: dict[str, type[Shell]] = {"sft": SupervisedShell, "online": OnlineShell}


@dataclass(frozen=True, slots=True)
class RunResult:
    """Attributes:
    run_dir: the run's folder.
    model_dir: the trained model as a Hugging Face folder; absent if the run was stopped.
    steps: optimizer steps done.
    stopped: a signal ended the run before its last step.
    checkpoint: the checkpoint to resume from, if the run was stopped.
    """

    run_dir: Path
    model_dir: Path
    steps: int
    stopped: bool
    checkpoint: Path | None = None


def train(recipe: Recipe, *, resume: str | None = None) -> RunResult:
    """Run a recipe.

    Args:
        recipe: as `config.loading.load_recipe` gives it.
        resume: `auto` for the newest complete checkpoint of the run folder, or a checkpoint folder.

    Raises:
        PosttrainError: anything a user can mend; raised before the first step where it can be known.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    method = METHODS[recipe.method.name](recipe.method)
    check_needs(recipe, method.needs, recipe.method.name)
    _check_save_steps(recipe, method)
    run_dir = Path(recipe.output)
    checkpoint = None if resume is None else find_checkpoint(run_dir / "checkpoints", resume)
    ranks = PartialState(cpu=not torch.cuda.is_available())
    if checkpoint is None:
        refuse_used_folder(run_dir)
        ranks.wait_for_everyone()
        if ranks.is_main_process:
            forget_unfinished_start(run_dir)

    rows = load_rows(recipe, method.needs)
    model, tokenizer = load_policy(recipe.model, seed=recipe.seed, corpus=corpus(rows))
    renderer = Renderer(tokenizer, generation_eos=model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = renderer.stop_ids
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    items, rows_ledger = fit_rows(recipe, method.needs, rows, renderer)
    plan = plan_batch(recipe, method.needs, world_size=ranks.num_processes, rows=len(items))
    copy = frozen_copy(model) if method.needs.reference and recipe.model.peft is None else None

    shell = _build_shell(recipe, method, plan, model, tokenizer, run_dir)
    main = shell.accelerator.is_main_process
    parts = RunParts(
        recipe=recipe,
        method=method,
        plan=plan,
        items=items,
        renderer=renderer,
        pad_id=tokenizer.pad_token_id,
        engine=_engine(recipe, shell.model, renderer, tokenizer),
        ledger=ComputeLedger(non_embedding_parameters(model), reduce=_summed_over_ranks(shell)),
        tracker=Tracker(
            run_dir,
            console=recipe.tracking.console,
            total_steps=plan.max_steps,
            headline="reward" if method.needs.verifier else "loss",
            main_process=main,
        ),
        run_dir=run_dir,
        judge=build_judge(recipe.verifier, recipe.verifier_pool) if method.needs.verifier else None,
        reference=_reference(shell, copy) if method.needs.reference else None,
    )
    shell.bind(parts)
    if main:
        describe(parts, rows_ledger, fresh=checkpoint is None)
    if checkpoint is not None:
        restore(checkpoint, parts, main=main)
    stop = StopOnSignal(together=method.updates_per_rollout)
    for callback in (stop, CompleteCheckpoints(lambda: state_of(parts)), LearningCheck(parts.tracker.message)):
        shell.add_callback(callback)
    if recipe.evaluation is not None and recipe.evaluation.every is not None:
        shell.add_callback(OnSchedule(recipe.evaluation.every, _evaluation(shell)))
    try:
        with stop:
            shell.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return _finish(shell, tokenizer, stopped=stop.stopped_by is not None)
    finally:
        parts.tracker.close(plots=recipe.tracking.plots)
        parts.engine.close()
        if parts.judge is not None:
            parts.judge.close()


def _finish(shell: Shell, tokenizer: PreTrainedTokenizerBase, *, stopped: bool) -> RunResult:
    parts, step = shell.parts, shell.state.global_step
    model_dir = parts.run_dir / "model"
    if stopped and step < parts.plan.max_steps:
        checkpoint = parts.run_dir / "checkpoints" / f"checkpoint-{step}"
        return RunResult(parts.run_dir, model_dir, step, stopped=True, checkpoint=checkpoint)
    save_model(shell, tokenizer)
    parts.tracker.message(f"trained model: {model_dir}")
    return RunResult(parts.run_dir, model_dir, step, stopped=False)


# ------------------------------------------------------------------------------------------------------------ parts


def _check_save_steps(recipe: Recipe, method: Method) -> None:
    """Checkpoints fall on the last update of a rollout, since they do not hold rollouts."""
    together, every = method.updates_per_rollout, recipe.training.save_steps
    if every is not None and every % together:
        below = max(every - every % together, together)
        raise RecipeError(
            f"save_steps {every} is not a multiple of updates_per_rollout {together}",
            where="training.save_steps",
            hint=f"use {below} or {every - every % together + together}",
        )


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in a matrix product: all but the embedding table, which is only looked up.

    A tied table counts once, as the LM head.
    """
    total = sum(p.numel() for p in model.parameters())
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    return total if tied else total - model.get_input_embeddings().weight.numel()


def _engine(
    recipe: Recipe, model: torch.nn.Module, renderer: Renderer, tokenizer: PreTrainedTokenizerBase
) -> TransformersEngine:
    settings = recipe.rollouts or recipe.evaluation
    return TransformersEngine(
        model,
        stop_ids=renderer.stop_ids,
        pad_id=tokenizer.pad_token_id,
        max_batch=256 if settings is None else settings.max_batch,
    )


def _reference(shell: Shell, copy: PreTrainedModel | None) -> Reference:
    """A prepared frozen copy of the start, or the policy without its adapter."""
    if copy is not None:
        return Reference(shell.prepare_frozen(copy))
    policy = shell.accelerator.unwrap_model(shell.model)
    return Reference(policy, without_adapter=policy.disable_adapter)


def _summed_over_ranks(shell: Shell) -> Callable[[list[int]], list[int]]:
    def reduce(counts: list[int]) -> list[int]:
        totals = shell.accelerator.reduce(torch.tensor(counts, device=shell.accelerator.device), reduction="sum")
        return [int(total) for total in totals]

    return reduce


def _build_shell(
    recipe: Recipe,
    method: Method,
    plan: BatchPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
) -> Shell:
    from datasets import Dataset

    shell_class, training = SHELLS[method.shell], recipe.training
    extra: dict[str, Any] = {}
    if method.needs.rollouts:
        extra = {
            "temperature": recipe.rollouts.temperature,
            "max_new_tokens": recipe.rollouts.max_new_tokens,
            "samples_per_prompt": recipe.rollouts.samples_per_prompt,
        }
    arguments = quiet_arguments(
        shell_class,
        run_dir / "checkpoints",
        per_device_train_batch_size=recipe.batch.micro_batch,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        max_steps=plan.max_steps,
        seed=recipe.seed,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        report_to=training.report_to or "none",
        **training.model_dump(exclude={"max_steps", "num_train_epochs", "save_steps", "report_to"}),
        **shell_class.extra_arguments(**extra),
    )
    shell = shell_class(
        model=model,
        args=arguments,
        # The hosts ask for a data set; the shells bring the batches of a step themselves.
        train_dataset=Dataset.from_dict({"prompt": [""], "input_ids": [[0]], "labels": [[0]]}),
        processing_class=tokenizer,
        peft_config=None if recipe.model.peft is None else lora_config(recipe.model.peft),
    )
    shell.remove_callback(PrinterCallback)
    return shell


def _evaluation(shell: Shell) -> Callable[[int], None]:
    """Evaluation between steps, by the main rank while the others wait; it draws from no generator of the training."""

    parts = shell.parts
    recipe = parts.recipe

    def run(step: int) -> None:
        with parts.ledger.aside():
            if shell.accelerator.is_main_process:
                report = evaluate(
                    parts.engine, parts.renderer, recipe.verifier_pool, recipe.evaluation, model_label=f"step {step}"
                )
                report.save(parts.run_dir / "evaluation" / f"step-{step:06d}.json")
                parts.tracker.log(step, evaluation_metrics(report))
            shell.accelerator.wait_for_everyone()

    return run


def evaluation_metrics(report: Report) -> dict[str, float]:
    """A report as metrics named `eval/<benchmark>/<measure>`, with the ends of the interval."""
    metrics: dict[str, float] = {}
    for benchmark in report.benchmarks:
        for name, estimate in benchmark.headline().items():
            stem = f"eval/{benchmark.name}/{name}"
            metrics |= {stem: estimate.value, f"{stem}_low": estimate.low, f"{stem}_high": estimate.high}
    return metrics
