"""From a recipe to a trained model: build the parts that the method needs, train, save, draw.

Reading order: `train` is the whole story; each helper below builds one part of it.
"""

from __future__ import annotations

import copy
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from posttrain.config import mixtures, plugins
from posttrain.config.adapters import trained_lora
from posttrain.config.batch import BatchPlan, plan_batch, sequence_tokens
from posttrain.config.memory import MemoryEstimate, estimate_memory
from posttrain.config.model_types import router_note, unbalanced_notes, without_adapter_note
from posttrain.config.own_code import digests
from posttrain.config.precision import precision_warning
from posttrain.config.schema import Recipe
from posttrain.data.bad_rows import BadRows
from posttrain.data.fitted import token_ids
from posttrain.data.held_out import held_out_rows
from posttrain.data.preparation import corpus, first_texts, load_known, load_rows, section_of
from posttrain.data.rendering import Renderer
from posttrain.data.streaming import StreamedRows, at_hand, identity
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.recorded import Recorded
from posttrain.evaluation.best import write_best
from posttrain.methods import METHODS
from posttrain.methods.base import Method
from posttrain.models.adapters import adapter_hash, adapter_to_train, continued, for_model, load_adapter
from posttrain.models.device import check_gradients, device_type
from posttrain.models.loading import load_classifier, load_policy
from posttrain.models.proof import prove_scoring
from posttrain.models.saving import SavePlan
from posttrain.models.size import critic_size, size_of
from posttrain.models.value_proof import prove_classifier
from posttrain.phases import phase, silence
from posttrain.safe_files import refuse_linked_folders
from posttrain.state.build_lock import extensions_folder, free_build_locks
from posttrain.state.identity import contents, settings
from posttrain.state.lock import locked, say_on_stderr
from posttrain.tracking.ledger import ComputeLedger, Role, Size
from posttrain.tracking.tracker import Tracker
from posttrain.tracking.trackers import tell_trackers
from posttrain.trainers.between_steps import evaluation
from posttrain.trainers.callbacks import CALLBACKS, AtStart, CompleteCheckpoints, LogLastStep, OnSchedule, StopOnSignal
from posttrain.trainers.critic import add_critic, build_critic
from posttrain.trainers.engines import build_engine, build_writer, check_engine
from posttrain.trainers.faults import explained
from posttrain.trainers.guards import NonfiniteGuard
from posttrain.trainers.held_out import HeldOut, build_held_out, start_copy
from posttrain.trainers.learning_check import LearningCheck
from posttrain.trainers.publish import check_hub, publish
from posttrain.trainers.ranks import any_rank, on_main_rank, summed
from posttrain.trainers.reference import ReferencePlan, load_scorer
from posttrain.trainers.resume import ResumePoint, begin, restore, restore_loop, same_contents, state_of
from posttrain.trainers.router_loss import router_loss
from posttrain.trainers.rows import Prepared, prepare, refuse
from posttrain.trainers.run_folder import LOCK, LOGS, VERIFIER_LOG, WORLD_LOG, describe, gone_if_unused
from posttrain.trainers.saving import save_model
from posttrain.trainers.sharded_start import loaded, of_the_weights, read_by_one_rank, refuse_quantised
from posttrain.trainers.shell import RunParts, Shell
from posttrain.trl_compat import quiet_arguments
from posttrain.verifiers.audit import build_checked_judge

SHELLS: dict[str, tuple[str, str]] = {
    "sft": ("posttrain.trainers.supervised", "SupervisedShell"),
    "online": ("posttrain.trainers.online", "OnlineShell"),
    "preference": ("posttrain.trainers.preference", "PreferenceShell"),
    "reward": ("posttrain.trainers.reward", "RewardShell"),
    "offline": ("posttrain.trainers.offline", "OfflineShell"),
}
"""Name -> module and class. Each imports the TRL trainer that it stands on, which takes seconds."""


NOT_THE_TRAINERS = {
    *("max_steps", "num_train_epochs", "save_steps", "save_total_limit", "report_to"),  # set by themselves
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy"),  # `publish` uploads what is proven
}
"""Keys of `training` that do not go to the Trainer as they are."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run has left.

    Attributes:
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


def train(
    recipe: Recipe,
    *,
    resume: str | None = None,
    allow_changed: Sequence[str] = (),
    trust_checkpoint: bool = False,
) -> RunResult:
    """Run a recipe.

    Args:
        recipe: as `config.loading.load_recipe` gives it.
        resume: `auto` for the newest undamaged checkpoint of the run folder, or a checkpoint folder. With `auto` and no
            checkpoint at all the run starts from the beginning.
        allow_changed: keys that may differ from the run that made the checkpoint (`state.identity`).
        trust_checkpoint: also resume from one whose loading may run code and that somebody else wrote.

    Raises:
        PosttrainError: anything a user can mend; raised before the first step where it can be known.
    """
    silence(recipe.tracking.console == "off")
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    method = METHODS[recipe.method.name](recipe.method)
    refuse(recipe, method)
    check_engine(recipe, method.needs)
    check_gradients(recipe.model, device_type())
    check_hub(recipe.training)
    run_dir = Path(recipe.output)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and os.environ.get("LOCAL_RANK", "0") == "0":
        free_build_locks(extensions_folder(), say_on_stderr)  # before anything of DeepSpeed is compiled
    ranks = PartialState(cpu=not torch.cuda.is_available())
    refuse_quantised(recipe, ranks)
    with ExitStack() as held:
        if ranks.is_main_process:
            held.enter_context(gone_if_unused(run_dir))
        held.enter_context(explained(run_dir, lambda: _memory(recipe, method, ranks.num_processes, None)))

        def begin_locked() -> ResumePoint:
            refuse_linked_folders(run_dir)
            held.enter_context(locked(run_dir / LOCK, say_on_stderr, what="a run"))
            return begin(recipe, run_dir, resume, allow_changed, ranks.num_processes, trust=trust_checkpoint)

        start = on_main_rank(ranks, begin_locked)
        with read_by_one_rank(ranks):
            built = build(recipe, method, ranks)
        return _run(built, start)


@dataclass(frozen=True, slots=True)
class Built:
    """A run that is put together.

    Attributes:
        shell: ready to train.
        prepared: its rows.
        made_by: what the run is made of, see `state.identity`.
        held_out: pairs that it is measured on between steps; None without any.
    """

    shell: Shell
    prepared: Prepared
    made_by: dict[str, Any]
    held_out: HeldOut | None = None


def build(recipe: Recipe, method: Method, ranks: PartialState) -> Built:
    """Load data and model, and put together the parts that the method needs. Close the parts when done."""
    unset_hf_deepspeed_config()  # with that of an earlier run in this process, ZeRO-3 would take the model apart now
    run_dir = Path(recipe.output)
    phase("reading the data")
    bad = BadRows(recipe.data.bad_rows)
    rows = load_rows(recipe, method.needs, bad=bad)
    written = load_known(recipe, method.needs, bad=bad)
    held_out = held_out_rows(recipe, rows)
    rows = rows if held_out is None else held_out.training
    types = dict.fromkeys(each.type for each in mixtures.all_verifiers(recipe))
    if method.needs.verifier and types:
        phase(f"verifying the references of {len(rows):,} rows ({', '.join(types)})")
    judge = build_checked_judge(recipe, method.needs, rows, log=run_dir / VERIFIER_LOG)
    environments = None if recipe.environment is None else EnvironmentPool(recipe.environment, run_dir / WORLD_LOG)
    if environments is not None:
        phase("loading the environment")
        rows = environments.equipped(rows)
    phase(f"loading the model {recipe.model.path or 'from model.init'}")
    load = load_classifier if method.needs.classifier else load_policy
    model, tokenizer = loaded(ranks, lambda: load(recipe.model, seed=recipe.seed, corpus=corpus(rows, written)))
    section = section_of(recipe, method.needs)
    sources = mixtures.parts(getattr(recipe.data, section), section)
    if method.needs.classifier and all(source.chat is False for _, source in sources):
        tokenizer.chat_template = None  # whoever loads the classifier will not put text into it either
    renderer = _renderer(model, tokenizer)
    saving, text_config = SavePlan.of(recipe.model, model, tokenizer), model.config.get_text_config().to_dict()
    if saving.generation is not None:
        model.generation_config = copy.deepcopy(saving.generation)  # checkpoints could not be written with a wrong one
    some = "some of " if isinstance(rows, StreamedRows) else ""
    phase(f"rendering {some}{len(rows) + len(written):,} rows")
    vocabulary = model.get_input_embeddings().num_embeddings
    world = ranks.num_processes
    prepared = prepare(recipe, method, rows, written, renderer, vocabulary=vocabulary, world_size=world, bad=bad)
    items, plan, traces = prepared.items, prepared.plan, prepared.traces
    phase("comparing our scores of a few rows with the model's own, and trying to save it")
    prove = prove_classifier if method.needs.classifier else prove_scoring
    of_the_weights(ranks, lambda: prove(model, [token_ids(item) for item in at_hand(items)[:8]]))
    on_main_rank(ranks, lambda: saving.prove(first_texts(rows)))
    world = [] if recipe.environment is None else [recipe.environment]
    code = digests([*mixtures.all_verifiers(recipe), *world]) | {name: plugins.digest(name) for name in recipe.plugins}
    of_rows = (identity(rows), at_hand(items), renderer.template_hash)
    made_of = of_the_weights(ranks, lambda: contents(*of_rows, model, traces, code, renderer.clock))
    start_adapter = continued(recipe.model)
    if start_adapter is not None:
        made_of["content"]["adapter"] = adapter_hash(start_adapter)
    reference = None
    if method.needs.reference:
        reference = ReferencePlan(recipe, method, items, model, renderer, ranks)
        made_of["content"] |= reference.content()
    if method.needs.companions or method.needs.critic:
        phase("loading the models beside the policy")
    start = start_copy(recipe, method, model)
    writer = build_writer(recipe, method, model, renderer, items, tokenizer.pad_token_id, ranks.device)

    critic = None
    if method.needs.critic:
        critic = loaded(ranks, lambda: build_critic(recipe, method.needs, model, pad_id=tokenizer.pad_token_id))
    phase(f"importing and preparing the trainer ({method.shell})")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    unadapted = without_adapter_note(model.config.model_type, trained_lora(recipe.model), linears)
    shell = _build_shell(recipe, method, plan, model, tokenizer, run_dir)
    if critic is not None:
        add_critic(recipe, method.needs, shell, critic)
    sizes: dict[Role, Size] = {"policy": size_of(model, without=critic)}
    if critic is not None:
        sizes["critic"] = critic_size(critic)
    if reference is not None:
        read = sizes["policy"].parameters if reference.continued else reference.parameters
        looks = sizes["policy"].looks  # a reference of another model looks at no pictures
        looks = None if looks is None else replace(looks, tower_trained=0, projector_trained=0)
        sizes["reference"] = Size(read, looks=looks)
    if writer is not None:
        sizes["writer"] = size_of(writer.engine.model)
    main = shell.accelerator.is_main_process
    if recipe.rollouts is not None and recipe.rollouts.engine == "vllm":
        phase("starting vLLM, which may compile" if recipe.rollouts.mode == "colocate" else "reaching the vLLM server")
    engine = build_engine(recipe, method.needs, shell, renderer, tokenizer, items, traces)
    asked = None if reference is None else reference.build(shell)
    scores = load_scorer(recipe, method, shell, renderer)
    if scores is not None:
        sizes["scorer"] = scores[1]
    gpu = shell.accelerator.device.type == "cuda"
    parts = RunParts(
        recipe=recipe,
        method=method,
        plan=plan,
        items=items,
        renderer=renderer,
        pad_id=tokenizer.pad_token_id,
        engine=engine,
        ledger=ComputeLedger(
            sizes,
            reduce=summed(shell.accelerator),
            gpu=gpu,
            acts=recipe.environment is not None and not isinstance(recipe.environment, Recorded.Config),
            sources=prepared.mixture.names,
        ),
        tracker=Tracker(
            run_dir,
            console=recipe.tracking.console,
            total_steps=plan.max_steps,
            headline="reward" if method.needs.verifier else "loss",
            main_process=main,
        ),
        run_dir=run_dir,
        judge=judge,
        reference=asked,
        scorer=None if scores is None else scores[0],
        traces=traces,
        writer=writer,
        mixture=prepared.mixture,
        saving=saving,
        environments=environments,
    )
    shell.bind(parts)
    if not method.needs.classifier:
        shell.router_loss = router_loss(
            shell, recipe.model, text_config, [token_ids(item) for item in at_hand(items)[:8]]
        )
        if router := router_note(recipe.model.router_loss, text_config):
            parts.tracker.message(router)
    precision = precision_warning(recipe)
    alarm = ([] if unadapted is None else [unadapted]) + ([] if precision is None else [f"warning: {precision}"])
    for note in (*unbalanced_notes(recipe, method.needs), *saving.notes, *renderer.notices(), *alarm):
        parts.tracker.message(note)
    if prepared.traces_ledger is not None:
        parts.tracker.message(f"traces: {prepared.traces_ledger.summary()}")
    made_of["content"] |= shell.content()
    pairs = None
    if held_out is not None:
        parts.tracker.message(held_out.summary())
        pairs = build_held_out(shell, held_out.held_out, start)
    return Built(shell, prepared, settings(recipe, ranks.num_processes) | made_of, pairs)


@contextmanager
def built_aside(recipe: Recipe) -> Iterator[Built]:
    """The run of a recipe put together to be looked at, on one rank and in a folder that is thrown away: it shows and
    saves nothing."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with tempfile.TemporaryDirectory(prefix="posttrain-aside-") as scratch:
        training = recipe.training.model_copy(update={"save_steps": None, "report_to": []})
        tracking = recipe.tracking.model_copy(update={"console": "off", "plots": False})
        quiet = recipe.model_copy(update={"output": scratch, "training": training, "tracking": tracking})
        method = METHODS[recipe.method.name](recipe.method)
        built = build(quiet, method, PartialState(cpu=not torch.cuda.is_available()))
        try:
            yield built
        finally:
            built.shell.parts.close(plots=False)


def _run(built: Built, start: ResumePoint) -> RunResult:
    """From bound shell to trained model."""
    shell, parts, recipe = built.shell, built.shell.parts, built.shell.parts.recipe
    guard = NonfiniteGuard(shell, recipe.guards.skipped_updates, agree=any_rank(shell.accelerator))
    check = LearningCheck(parts.tracker.message, after=parts.method.needs.critic_first)
    stop = StopOnSignal(agree=any_rank(shell.accelerator))
    save = CompleteCheckpoints(
        lambda: state_of(shell, guard, check, built.made_by),
        save_files=shell.save_files,
        wait=shell.accelerator.wait_for_everyone,
        keep=recipe.training.save_total_limit,
        logs=tuple(parts.run_dir / name for name in LOGS),
    )
    try:
        start = same_contents(start, {"content": built.made_by["content"]})
        if start.checkpoint is not None:
            restore(shell, start, guard, check)
        if shell.accelerator.is_main_process:
            for line in parts.mixture.lines(parts.plan.max_steps):
                parts.tracker.message(line)
            changes = [str(change) for change in start.changed]
            describe(parts, built.prepared, step=start.state.get("step"), changed=changes)
            for note in start.notes:
                parts.tracker.message(note)
        # The guard first: the check looks at gradients that it has let through.
        for callback in (guard, check, stop, save, LogLastStep(), *(kind() for kind in CALLBACKS)):
            shell.add_callback(callback)
        tell_trackers(shell.callback_handler.callbacks, shell.args.report_to, parts.run_dir, recipe.tracking)
        if start.checkpoint is not None:
            shell.add_callback(AtStart(lambda: restore_loop(shell, start)))
        if recipe.evaluation is not None and recipe.evaluation.every is not None:
            shell.add_callback(OnSchedule(recipe.evaluation.every, evaluation(shell, built.held_out)))
        longest = built.prepared.longest
        phase(_first_step(shell))
        with stop, explained(parts.run_dir, lambda: _memory(recipe, parts.method, parts.plan.world_size, longest)):
            shell.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
            return _finish(shell, stop)
    finally:
        parts.close(plots=recipe.tracking.plots)


def _first_step(shell: Shell) -> str:
    """What happens before the first step is logged."""
    if shell.is_deepspeed_enabled:
        return "starting DeepSpeed, which compiles its optimizer when it runs for the first time; then the first step"
    return f"preparing the first of {shell.parts.plan.max_steps:,} steps"


def _finish(shell: Shell, stop: StopOnSignal) -> RunResult:
    parts, step = shell.parts, shell.state.global_step
    model_dir = parts.run_dir / "model"
    if stop.stopped and step < parts.plan.max_steps:
        checkpoint = parts.run_dir / "checkpoints" / f"checkpoint-{step}"
        # a rank that the signal did not reach stops with the others
        signal_number = int(stop.signal or signal.SIGTERM)
        return RunResult(parts.run_dir, model_dir, step, True, checkpoint, signal_number)
    parts.tracker.message("writing the trained model")
    save_model(shell)
    parts.tracker.message(f"trained model: {model_dir}")
    parts.tracker.message(f"spent: {parts.ledger.summary()}")
    if shell.accelerator.is_main_process:
        evaluated = parts.recipe.evaluation
        if evaluated is not None and evaluated.best is not None:
            parts.tracker.message(write_best(parts.run_dir, evaluated.best))
        if parts.recipe.training.push_to_hub:
            parts.tracker.message(f"published as {publish(parts.recipe.training, parts.run_dir)}")
    return RunResult(parts.run_dir, model_dir, step, stopped=False)


# ------------------------------------------------------------------------------------------------------------ parts


def _renderer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The renderer; the model that is saved ends its completions where the renderer does."""
    generation = model.generation_config if model.can_generate() else None
    renderer = Renderer(tokenizer, generation_eos=None if generation is None else generation.eos_token_id)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = renderer.stop_ids, tokenizer.pad_token_id
    return renderer


def _memory(recipe: Recipe, method: Method, world_size: int, longest: int | None) -> MemoryEstimate:
    plan = plan_batch(recipe, method.needs, world_size=world_size, rows=None)
    tokens = longest or sequence_tokens(recipe, method.needs)
    sizes = {"sequence_tokens": tokens, "sequences_per_rank": plan.sequences_per_rank}
    return estimate_memory(recipe, method.needs, **sizes, device=device_type())


def _build_shell(
    recipe: Recipe,
    method: Method,
    plan: BatchPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
) -> Shell:
    from datasets import Dataset

    module, name = SHELLS[method.shell]
    shell_class, training = getattr(import_module(module), name), recipe.training
    adapter = for_model(adapter_to_train(recipe.model, classifier=method.needs.classifier), model)
    if adapter is not None and recipe.model.pictures is not None:
        from posttrain.models.eyes import frozen_modules

        blind = frozen_modules(model, recipe.model.pictures.train)
        adapter.exclude_modules = [*(adapter.exclude_modules or ()), *blind]
    extra: dict[str, Any] = {}
    # The rows of a rank may show no pictures, and then its tower and projector have no part in the loss.
    looks = {} if recipe.model.pictures is None else {"ddp_find_unused_parameters": True}
    if method.needs.rollouts:
        extra = {
            "temperature": recipe.rollouts.temperature,
            "max_new_tokens": recipe.rollouts.max_new_tokens,
            "samples_per_prompt": recipe.rollouts.samples_per_prompt,
            "accumulation_steps": plan.gradient_accumulation_steps,
        }
    arguments = quiet_arguments(
        shell_class.Arguments,
        run_dir / "checkpoints",
        per_device_train_batch_size=recipe.batch.micro_batch,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        max_steps=plan.max_steps,
        seed=recipe.seed,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        save_total_limit=None,  # `state.checkpoint.retain` counts complete ones only
        report_to=training.report_to or "none",
        **training.model_dump(exclude=NOT_THE_TRAINERS),
        **shell_class.extra_arguments(**extra),
        **looks,
    )
    with warnings.catch_warnings():
        # PEFT's own patterns of fused experts, which it reads before the experts are there and heeds afterwards.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
        shell = shell_class(
            model=model,
            args=arguments,
            # The hosts ask for a data set; the shells bring the batches of a step themselves.
            train_dataset=Dataset.from_dict({"prompt": [""], "input_ids": [[0]], "labels": [[0]]}),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    shell.remove_callback(PrinterCallback)
    folder = continued(recipe.model)
    if folder is not None:
        load_adapter(shell.model, folder)
    return shell
