"""From a recipe to a trained model: build the parts that the method needs, train, save, draw.

Reading order: `train` is the whole story; each helper below builds one part of it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from posttrain.config.batch import BatchPlan, plan_batch
from posttrain.config.loading import dump_recipe
from posttrain.config.needs import Needs
from posttrain.config.preflight import check_needs
from posttrain.config.schema import Recipe
from posttrain.data.preparation import corpus, fit_rows, load_rows
from posttrain.data.rendering import Renderer
from posttrain.data.truncation import Ledger
from posttrain.errors import RecipeError, StateError
from posttrain.evaluation.runner import Report, evaluate
from posttrain.methods import METHODS
from posttrain.methods.base import Method, OnlineMethod
from posttrain.models.loading import load_policy, lora_config
from posttrain.models.reference import Reference, frozen_copy
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.state.checkpoint import find_checkpoint, read_state
from posttrain.state.environment import environment
from posttrain.state.files import folder_atomic, write_json_atomic, write_text_atomic
from posttrain.tracking.ledger import ComputeLedger
from posttrain.tracking.tracker import Tracker
from posttrain.tracking.transcript import Transcript
from posttrain.trainers.callbacks import CompleteCheckpoints, OnSchedule, StopOnSignal
from posttrain.trainers.online import OnlineParts, OnlineShell, Prompt
from posttrain.trainers.shell import Shell
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
        _refuse_used_folder(run_dir)
        ranks.wait_for_everyone()
        if ranks.is_main_process:
            _forget_unfinished_start(run_dir)

    rows = load_rows(recipe, method.needs)
    model, tokenizer = load_policy(recipe.model, seed=recipe.seed, corpus=corpus(rows))
    renderer = Renderer(tokenizer, generation_eos=model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = renderer.stop_ids
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    items, ledger_of_rows = fit_rows(recipe, method.needs, rows, renderer)
    plan = plan_batch(recipe, method.needs, world_size=ranks.num_processes, rows=len(items))
    reference = frozen_copy(model) if method.needs.reference and recipe.model.peft is None else None

    shell = _build_shell(recipe, method, plan, model, tokenizer, run_dir)
    main = shell.accelerator.is_main_process
    tracker = Tracker(
        run_dir,
        console=recipe.tracking.console,
        total_steps=plan.max_steps,
        headline=_headline(method),
        main_process=main,
    )
    compute = ComputeLedger(non_embedding_parameters(model), reduce=_summed_over_ranks(shell))
    shell.bind(method, compute, tracker)
    judge = build_judge(recipe.verifier, recipe.verifier_pool) if method.needs.verifier else None
    engine = TransformersEngine(
        shell.model,
        stop_ids=renderer.stop_ids,
        pad_id=tokenizer.pad_token_id,
        max_batch=recipe.rollouts.max_batch if recipe.rollouts else 256,
    )
    if isinstance(shell, SupervisedShell):
        shell.bind_samples(items, recipe.batch.rows_per_step, tokenizer.pad_token_id)
    else:
        transcript = Transcript(run_dir / "samples.jsonl")
        shell.bind_parts(
            OnlineParts(
                prompts=[Prompt(problem, ids) for problem, ids in items],
                prompts_per_step=recipe.batch.prompts_per_step,
                rollouts=recipe.rollouts,
                engine=engine,
                judge=judge,
                renderer=renderer,
                pad_id=tokenizer.pad_token_id,
                reference=_reference(shell, method.needs, reference),
                transcript=transcript,
            )
        )
    if main:
        _describe(recipe, plan, ledger_of_rows, run_dir, tracker, fresh=checkpoint is None)
    _restore(checkpoint, method, compute, tracker, shell)

    shell.add_callback(CompleteCheckpoints(lambda: _state_of(method, compute, ranks.num_processes)))
    if recipe.evaluation is not None and recipe.evaluation.every is not None:
        shell.add_callback(OnSchedule(recipe.evaluation.every, _evaluation(recipe, shell, renderer, engine, tracker)))
    stop = StopOnSignal(together=_updates_per_rollout(method))
    shell.add_callback(stop)
    try:
        with stop:
            shell.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return _finish(recipe, shell, tokenizer, tracker, run_dir, plan, stopped=stop.stopped_by is not None)
    finally:
        tracker.close(plots=recipe.tracking.plots)
        engine.close()
        if judge is not None:
            judge.close()


# ------------------------------------------------------------------------------------------------------------ parts


def _headline(method: Method) -> str:
    return "reward" if method.needs.verifier else "loss"


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in a matrix product: all but the embedding table, which is only looked up.

    A tied table counts once, as the LM head.
    """
    total = sum(p.numel() for p in model.parameters())
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    return total if tied else total - model.get_input_embeddings().weight.numel()


def _summed_over_ranks(shell: Shell):
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


def _reference(shell: Shell, needs: Needs, copy: PreTrainedModel | None) -> Reference | None:
    if not needs.reference:
        return None
    if copy is not None:
        return Reference(shell.prepare_frozen(copy))
    policy = shell.accelerator.unwrap_model(shell.model)
    return Reference(policy, without_adapter=policy.disable_adapter)


def _evaluation(recipe: Recipe, shell: Shell, renderer: Renderer, engine: TransformersEngine, tracker: Tracker):
    """Evaluation between steps, by the main rank while the others wait; it draws from no generator of the training."""

    def run(step: int) -> None:
        with shell.ledger.aside():
            if shell.accelerator.is_main_process:
                report = evaluate(engine, renderer, recipe.verifier_pool, recipe.evaluation, model_label=f"step {step}")
                report.save(Path(recipe.output) / "evaluation" / f"step-{step:06d}.json")
                tracker.log(step, evaluation_metrics(report))
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


# ------------------------------------------------------------------------------------------------- state and output


def _updates_per_rollout(method: Method) -> int:
    return method.updates_per_rollout if isinstance(method, OnlineMethod) else 1


def _check_save_steps(recipe: Recipe, method: Method) -> None:
    """Checkpoints fall on the last update of a rollout, since they do not hold rollouts."""
    together, every = _updates_per_rollout(method), recipe.training.save_steps
    if every is not None and every % together:
        below = max(every - every % together, together)
        raise RecipeError(
            f"save_steps {every} is not a multiple of updates_per_rollout {together}",
            where="training.save_steps",
            hint=f"use {below} or {every - every % together + together}",
        )


def _refuse_used_folder(run_dir: Path) -> None:
    if (run_dir / "model").exists() or any((run_dir / "checkpoints").glob("checkpoint-*")):
        raise StateError(
            "this folder holds a finished or interrupted run",
            where=str(run_dir),
            hint="go on with --resume auto, or choose another `output`, or remove the folder",
        )


def _forget_unfinished_start(run_dir: Path) -> None:
    """Remove the logs of a run that did not reach its first checkpoint."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run_dir / name).unlink(missing_ok=True)


def _state_of(method: Method, compute: ComputeLedger, world_size: int) -> dict[str, Any]:
    return {"method": method.state_dict(), "ledger": compute.state_dict(), "world_size": world_size}


def _restore(checkpoint: Path | None, method: Method, compute: ComputeLedger, tracker: Tracker, shell: Shell) -> None:
    if checkpoint is None:
        return
    state = read_state(checkpoint)
    method.load_state_dict(state["method"])
    compute.load_state_dict(state["ledger"])
    if shell.accelerator.is_main_process:
        tracker.rewind(state["step"])
        if isinstance(shell, OnlineShell):
            shell.parts.transcript.rewind(state["step"])
        tracker.message(f"resumed from {checkpoint}")


def _describe(recipe: Recipe, plan: BatchPlan, rows: Ledger, run_dir: Path, tracker: Tracker, *, fresh: bool) -> None:
    if fresh:
        write_text_atomic(run_dir / "resolved.yaml", dump_recipe(recipe))
        write_json_atomic(run_dir / "environment.json", environment())
    write_json_atomic(run_dir / "data.json", rows.to_dict())
    tracker.message(f"{recipe.method.name}: {plan.max_steps} steps into {run_dir}; data: {rows.summary()}")


def _finish(
    recipe: Recipe,
    shell: Shell,
    tokenizer: PreTrainedTokenizerBase,
    tracker: Tracker,
    run_dir: Path,
    plan: BatchPlan,
    *,
    stopped: bool,
) -> RunResult:
    step, model_dir = shell.state.global_step, run_dir / "model"
    if stopped and step < plan.max_steps:
        checkpoint = run_dir / "checkpoints" / f"checkpoint-{step}"
        return RunResult(run_dir, model_dir, step, stopped=True, checkpoint=checkpoint)
    _save_model(recipe, shell, tokenizer, run_dir, model_dir)
    tracker.message(f"trained model: {model_dir}")
    return RunResult(run_dir, model_dir, step, stopped=False)


def _save_model(
    recipe: Recipe, shell: Shell, tokenizer: PreTrainedTokenizerBase, run_dir: Path, model_dir: Path
) -> None:
    """The trained weights as a loadable folder; with an adapter, the merged model there and the adapter beside it."""
    target = model_dir if recipe.model.peft is None else run_dir / "adapter"
    main = shell.accelerator.is_main_process
    with folder_atomic(target) if main else nullcontext(target) as folder:
        shell.save_model(str(folder))
        if main:  # a pickle of the Trainer's arguments; resolved.yaml says the same
            (folder / "training_args.bin").unlink(missing_ok=True)
    if main and recipe.model.peft is not None:
        merged = shell.accelerator.unwrap_model(shell.model).merge_and_unload()
        with folder_atomic(model_dir) as folder:
            merged.save_pretrained(folder, safe_serialization=True)
            tokenizer.save_pretrained(folder)
    shell.accelerator.wait_for_everyone()
