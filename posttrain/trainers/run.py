"""From a recipe to a trained model: build the parts that the method needs, train, save, draw.

Reading order: `train` is the whole story; each helper below builds one part of it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from posttrain.config.batch import BatchPlan, plan_batch, sequence_tokens
from posttrain.config.memory import MemoryEstimate, estimate_memory
from posttrain.config.preflight import check_needs
from posttrain.config.schema import Recipe
from posttrain.data.preparation import Rows, corpus, fit_preferences, fit_rows, load_rows
from posttrain.data.rendering import Renderer
from posttrain.data.truncation import Ledger
from posttrain.errors import NeedsError, RecipeError
from posttrain.evaluation.best import best_step, check_best
from posttrain.evaluation.runner import Report, evaluate
from posttrain.methods import METHODS
from posttrain.methods.base import Method, PreferenceMethod
from posttrain.models.loading import load_policy, lora_config
from posttrain.models.reference import Reference, frozen_copy
from posttrain.models.size import non_embedding_parameters
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.state.files import write_json_atomic
from posttrain.state.identity import contents, settings
from posttrain.state.lock import locked, say_on_stderr
from posttrain.tracking.ledger import ComputeLedger
from posttrain.tracking.tracker import Tracker
from posttrain.trainers.callbacks import AtStart, CompleteCheckpoints, OnSchedule, StopOnSignal
from posttrain.trainers.faults import explained
from posttrain.trainers.guards import NonfiniteGuard
from posttrain.trainers.learning_check import LearningCheck
from posttrain.trainers.online import OnlineShell
from posttrain.trainers.preference import PreferenceRow, PreferenceShell
from posttrain.trainers.resume import Start, begin, on_main_rank, restore, restore_loop, same_contents, state_of
from posttrain.trainers.run_folder import LOCK, LOGS, describe, save_model
from posttrain.trainers.shell import RunParts, Shell
from posttrain.trainers.supervised import SupervisedShell
from posttrain.trl_compat import quiet_arguments
from posttrain.verifiers.judge import build_judge

SHELLS: dict[str, type[Shell]] = {"sft": SupervisedShell, "online": OnlineShell, "preference": PreferenceShell}


@dataclass(frozen=True, slots=True)
class RunResult:
    """Attributes:
    run_dir: the run's folder.
    model_dir: the trained model as a Hugging Face folder; absent if the run was stopped.
    steps: optimizer steps done.
    stopped: a signal ended the run before its last step.
    checkpoint: the checkpoint to resume from, if the run was stopped.
    signal: number of that signal.
    """

    run_dir: Path
    model_dir: Path
    steps: int
    stopped: bool
    checkpoint: Path | None = None
    signal: int | None = None


def train(recipe: Recipe, *, resume: str | None = None, allow_changed: Sequence[str] = ()) -> RunResult:
    """Run a recipe.

    Args:
        recipe: as `config.loading.load_recipe` gives it.
        resume: `auto` for the newest undamaged checkpoint of the run folder, or a checkpoint folder. With `auto` and no
            checkpoint at all the run starts from the beginning.
        allow_changed: keys that may differ from the run that made the checkpoint (`state.identity`).

    Raises:
        PosttrainError: anything a user can mend; raised before the first step where it can be known.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    method = METHODS[recipe.method.name](recipe.method)
    check_needs(recipe, method.needs, recipe.method.name)
    if recipe.evaluation is not None:
        check_best(recipe.evaluation)
    _check_save_steps(recipe, method)
    run_dir = Path(recipe.output)
    ranks = PartialState(cpu=not torch.cuda.is_available())
    with ExitStack() as held:
        held.enter_context(explained(run_dir, lambda: _memory(recipe, method, ranks.num_processes, None)))

        def begin_locked() -> Start:
            held.enter_context(locked(run_dir / LOCK, say_on_stderr, what="a run"))
            return begin(recipe, run_dir, resume, allow_changed, ranks.num_processes)

        start = on_main_rank(ranks, begin_locked)
        return _run(build(recipe, method, ranks), start)


@dataclass(frozen=True, slots=True)
class Built:
    """Attributes:
    shell: ready to train.
    rows: what became of the rows.
    made_by: what the run is made of, see `state.identity`.
    """

    shell: Shell
    rows: Ledger
    made_by: dict[str, Any]


def build(recipe: Recipe, method: Method, ranks: PartialState) -> Built:
    """Load data and model, and put together the parts that the method needs. Close the parts when done."""
    run_dir = Path(recipe.output)
    rows = load_rows(recipe, method.needs)
    model, tokenizer = load_policy(recipe.model, seed=recipe.seed, corpus=corpus(rows))
    renderer = Renderer(tokenizer, generation_eos=model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = renderer.stop_ids
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    items, rows_ledger = _items(recipe, method, rows, renderer)
    plan = plan_batch(recipe, method.needs, world_size=ranks.num_processes, rows=len(items))
    loaded = contents(rows, items, renderer.template_hash, model)
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
    return Built(shell, rows_ledger, settings(recipe, ranks.num_processes) | loaded)


def _run(built: Built, start: Start) -> RunResult:
    """From bound shell to trained model."""
    shell, parts, recipe = built.shell, built.shell.parts, built.shell.parts.recipe
    guard = NonfiniteGuard(shell, recipe.guards.skipped_updates, agree=_any_rank(shell))
    check = LearningCheck(parts.tracker.message)
    stop = StopOnSignal(together=parts.method.updates_per_rollout, agree=_any_rank(shell))
    save = CompleteCheckpoints(
        lambda: state_of(shell, guard, check, built.made_by),
        wait=shell.accelerator.wait_for_everyone,
        keep=recipe.training.save_total_limit,
        logs=tuple(parts.run_dir / name for name in LOGS),
    )
    try:
        start = same_contents(start, {"content": built.made_by["content"]})
        if start.checkpoint is not None:
            restore(shell, start, guard, check)
        if shell.accelerator.is_main_process:
            describe(parts, built.rows, step=start.state.get("step"), changed=[str(change) for change in start.changed])
            for note in start.notes:
                parts.tracker.message(note)
        for callback in (guard, check, stop, save):  # the guard first: the check looks at gradients it has let through
            shell.add_callback(callback)
        if start.checkpoint is not None:
            shell.add_callback(AtStart(lambda: restore_loop(shell, start)))
        if recipe.evaluation is not None and recipe.evaluation.every is not None:
            shell.add_callback(OnSchedule(recipe.evaluation.every, _evaluation(shell)))
        longest = _longest_sequence(parts)
        with stop, explained(parts.run_dir, lambda: _memory(recipe, parts.method, parts.plan.world_size, longest)):
            shell.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
            return _finish(shell, stop)
    finally:
        parts.tracker.close(plots=recipe.tracking.plots)
        parts.engine.close()
        if parts.judge is not None:
            parts.judge.close()


def _finish(shell: Shell, stop: StopOnSignal) -> RunResult:
    parts, step = shell.parts, shell.state.global_step
    model_dir = parts.run_dir / "model"
    if stop.stopped and step < parts.plan.max_steps:
        checkpoint = parts.run_dir / "checkpoints" / f"checkpoint-{step}"
        # a rank that the signal did not reach stops with the others
        signal_number = int(stop.signal or signal.SIGTERM)
        return RunResult(parts.run_dir, model_dir, step, True, checkpoint, signal_number)
    save_model(shell, shell.processing_class)
    parts.tracker.message(f"trained model: {model_dir}")
    if shell.accelerator.is_main_process:
        _name_best(parts)
    return RunResult(parts.run_dir, model_dir, step, stopped=False)


def _name_best(parts: RunParts) -> None:
    """Say and write which evaluated step was the best by the recipe's rule, if it has one."""
    rule = None if parts.recipe.evaluation is None else parts.recipe.evaluation.best
    if rule is None:
        return
    paths = sorted((parts.run_dir / "evaluation").glob("step-*.json"))
    best = best_step({int(path.stem.removeprefix("step-")): Report.load(path) for path in paths}, rule)
    write_json_atomic(parts.run_dir / "best.json", {"rule": rule.model_dump(), **asdict(best)})
    parts.tracker.message(f"best by {rule.benchmark} {rule.measure}: step {best.step}, {best.measured.value:.3f}")


# ------------------------------------------------------------------------------------------------------------ parts


def _items(recipe: Recipe, method: Method, rows: Rows, renderer: Renderer) -> tuple[list, Ledger]:
    """The fitted rows in the form of the method's shell."""
    if not isinstance(method, PreferenceMethod):
        return fit_rows(recipe, method.needs, rows, renderer)
    if method.refresh_reference and recipe.model.peft is not None:
        raise NeedsError(
            "a reference that is refreshed from the policy is a copy of its own, and with an adapter there is none",
            where="method.refresh_reference",
            hint="set it to false, or leave out model.peft",
        )
    prepared = {row.problem.id: row for row in method.prepare(rows)}
    fitted, ledger = fit_preferences(
        recipe, list(prepared.values()), lambda row: method.responses(row, renderer), head_ids=renderer.head_ids
    )
    items = []
    for responses in fitted:
        row = prepared[next(iter(responses.values())).problem_id]
        items.append(PreferenceRow(row, responses, method.values(row)))
    return items, ledger


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


def _any_rank(shell: Shell) -> Callable[[bool], bool]:
    """Whether any rank says yes; with several ranks all must ask."""

    def ask(mine: bool) -> bool:
        if shell.accelerator.num_processes == 1:
            return mine
        votes = shell.accelerator.reduce(torch.tensor(float(mine), device=shell.accelerator.device), reduction="sum")
        return bool(votes > 0)

    return ask


def _longest_sequence(parts: RunParts) -> int:
    """Tokens of the longest sequence that the run may train on."""
    lengths = [
        len(item[1]) + parts.recipe.rollouts.max_new_tokens
        if isinstance(item, tuple)
        else item.length
        if isinstance(item, PreferenceRow)
        else len(item.ids)
        for item in parts.items
    ]
    return max(lengths)


def _memory(recipe: Recipe, method: Method, world_size: int, longest: int | None) -> MemoryEstimate:
    plan = plan_batch(recipe, method.needs, world_size=world_size, rows=None)
    tokens = longest or sequence_tokens(recipe, method.needs)
    return estimate_memory(recipe, method.needs, sequence_tokens=tokens, sequences_per_rank=plan.sequences_per_rank)


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
        save_total_limit=None,  # `state.checkpoint.retain` counts complete ones only
        report_to=training.report_to or "none",
        **training.model_dump(exclude={"max_steps", "num_train_epochs", "save_steps", "save_total_limit", "report_to"}),
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
