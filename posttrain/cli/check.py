"""`posttrain check`: what a recipe will do, before it does it. Loads no weights; downloads nothing unless asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.cli.tables import needs_in_words, print_memory, print_table
from posttrain.cli.trust import say_trusted
from posttrain.config.adapters import module_names, resolved, trained_lora
from posttrain.config.batch import sequence_tokens
from posttrain.config.effects import is_local
from posttrain.config.loading import load_recipe_with_locations
from posttrain.config.mixtures import parts, source_of, verifiers
from posttrain.config.model_types import forward_notes, unbalanced_notes, without_adapter_note
from posttrain.config.needs import Needs
from posttrain.config.positions import config_json
from posttrain.config.precision import precision_warning
from posttrain.config.preflight import estimate_memory, plan_batch
from posttrain.config.relative_paths import models_of
from posttrain.config.schema import FileSource, ModelConfig, Recipe
from posttrain.config.shapes import embedding_rows
from posttrain.config.trust import trusted
from posttrain.config.yaml_file import read_file
from posttrain.data.bad_rows import BadRows
from posttrain.data.encoding import Encoder
from posttrain.data.fitted import PreferenceRow, PromptRow
from posttrain.data.formats import COLUMNS, Format
from posttrain.data.held_out import held_out_rows
from posttrain.data.known_traces import KnownTrace, TraceBook, WrittenTrace
from posttrain.data.preparation import Rows, corpus, first_texts, load_known, load_rows, section_of
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Problem, Sample, Stepwise
from posttrain.data.sources import completion_format, first_row
from posttrain.data.streaming import at_hand
from posttrain.environments import confined
from posttrain.environments.base import Failure
from posttrain.environments.pool import EnvironmentPool
from posttrain.errors import DataError, ModelError, NeedsError, RecipeError, WorldError
from posttrain.evaluation.benchmarks import resolve
from posttrain.evaluation.passes import check_k
from posttrain.methods import CONFIGS, METHODS
from posttrain.methods.companions import Reasoner, StepScorer
from posttrain.models.device import check_gradients, device_type
from posttrain.models.reasoned import asks, of_text
from posttrain.models.tokenizer import check_embeddings, load_tokenizer, looks_local
from posttrain.models.vocabulary import blamed_on, check_same_vocabulary
from posttrain.models.weights_there import check_weights
from posttrain.safe_files import file_atomic, refuse_linked_folders
from posttrain.terminal import say
from posttrain.trainers.publish import check_hub
from posttrain.trainers.rows import SHELL_ROWS, Prepared, ShellRows, prepare, refuse
from posttrain.verifiers.audit import build_checked_judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.picture_text import PictureText

T = TypeVar("T")


def check_recipe(
    path: Path,
    overrides: list[str],
    *,
    online: bool,
    world_size: int,
    run_code: bool = False,
    batch: bool = False,
    picture: Path | None = None,
) -> None:
    """Check a recipe and print what follows from it.

    Args:
        path, overrides: of the recipe.
        online: fetch data and tokenizers. Without it they are taken from local files and the Hub cache; what is in
            neither is reported as not checked.
        world_size: ranks to plan for.
        run_code: run the code that the recipe brings. Without it that code is announced, and what needs it is not
            checked.
        batch: a first batch will be made afterwards, for which all of that code runs.
        picture: file for the first picture as the model sees it.

    Raises:
        PosttrainError: what a run would refuse; or a batch is asked for and the recipe's code may not run.
    """
    recipe, locations = load_recipe_with_locations(path, overrides, CONFIGS, run_plugins=run_code)
    code = say_trusted(trusted(recipe, path.parent), "recipe", run_code=run_code)
    if code and batch and not run_code:
        raise RecipeError("the first batch cannot be made without the recipe's code", hint="add --run-code")
    withheld = recipe.model.trust_remote_code and not run_code
    if withheld:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"trust_remote_code": False})})
    method = METHODS[recipe.method.name](recipe.method)
    name, needs = recipe.method.name, method.needs
    refuse(recipe, method, locations)
    if picture is not None and recipe.model.pictures is None:
        raise RecipeError("there are no pictures to be saved", where="--picture", hint="leave it out")
    refuse_linked_folders(Path(recipe.output))
    say(f"{path}: keys ok; {name} finds what it needs: {needs_in_words(needs)}")
    if recipe.evaluation is not None and recipe.evaluation.benchmarks:
        benchmarks = resolve(recipe.evaluation.benchmarks, recipe.evaluation.benchmark_paths)
        check_k(recipe.evaluation, benchmarks)
        say("benchmarks: " + ", ".join(benchmark.name for benchmark in benchmarks))
    # The arithmetic needs no data: report it before anything that may take long or be missing.
    plan_batch(recipe, needs, world_size=world_size, rows=None, locations=locations)

    bad = BadRows(recipe.data.bad_rows)
    rows = _rows(recipe, needs, online, bad)
    if rows is not None and section_of(recipe, needs) == "completions":
        _forms(recipe, online)
    held_out = None if rows is None else held_out_rows(recipe, rows, offline=not online)
    if held_out is not None:
        rows = held_out.training
        say(held_out.summary())
    if recipe.environment is not None:
        recipe.environment.check_installed()
        if recipe.environment.sandbox:
            confined.check()
    if recipe.environment is not None and (run_code or recipe.environment.type == "rooms"):
        rows = _environment(recipe, rows)
    written = _traces(recipe, needs, online, bad)
    try:
        tokenizer = _tokenizer(recipe, rows, written, online)
    except ModelError as error:
        if not withheld:
            raise
        tokenizer = None
        say(f"not checked: the tokenizer, for which code of the model's repository must run: {error.what}")
    if tokenizer is not None and recipe.model.path is not None and not withheld:
        _saving(recipe, needs, tokenizer, rows)
        undecided = check_weights(recipe.model, classifier=needs.classifier)
        if undecided is not None:
            say(undecided)
    _forward(recipe, needs)
    renderer = None if tokenizer is None else Renderer(tokenizer, count_few=True)
    if renderer is not None:
        _models_beside(recipe, needs, renderer, online, rows)
    shell, prepared = SHELL_ROWS[method.shell], None
    if rows is not None and renderer is not None and written is not None:
        vocabulary = embedding_rows(recipe.model) or len(renderer.tokenizer)
        check_embeddings(vocabulary, renderer.tokenizer)
        sizes = {"vocabulary": vocabulary, "world_size": world_size}
        prepared = prepare(recipe, method, rows, written, renderer, **sizes, locations=locations, bad=bad)
        say("data: " + "\n".join(prepared.lines()))
        for line in prepared.mixture.lines(prepared.plan.max_steps):
            say(line)
        if prepared.traces_ledger is not None:
            lines = prepared.traces_ledger.lines()
            say("traces: " + "\n".join([f"{lines[0]}{_found(prepared)}", *lines[1:]]))
        plan = prepared.plan
    else:
        count = None if rows is None else len(rows)
        plan = plan_batch(recipe, needs, world_size=world_size, rows=count, locations=locations)
    print_table(plan.table(), "batch")
    if rows is not None:
        _references(recipe, needs, rows)
    if prepared is not None:
        for item in _one_of_each_source(prepared, shell):
            _print_item(item, shell.samples(item), renderer)
        for trace in {trace.source: trace for trace in reversed(prepared.traces)}.values():
            _print_trace(trace, renderer, expert=plan.expert_rows > 0)
    if renderer is not None and renderer.pictures is not None:
        _pictures(renderer.pictures, picture)
    for notice in [] if renderer is None else renderer.notices():
        say(f"note: {notice}")
    limit = _longest(recipe, needs, prepared)
    precision = precision_warning(recipe)
    if precision is not None:
        say(f"warning: {precision}")
    try:
        check_gradients(recipe.model, device_type())
        check_hub(recipe.training)
    except (ModelError, NeedsError) as error:  # where it is checked need not be where it will run
        say(f"on this machine a run would end with: {error}")
    sizes = {"sequence_tokens": limit, "sequences_per_rank": plan.sequences_per_rank}
    print_memory(estimate_memory(recipe, needs, **sizes, device=device_type()))


def is_pipeline(path: Path) -> bool:
    """Whether a file has stages in place of a recipe's sections."""
    data = read_file(path)[0]
    return "stages" in data and "model" not in data


def check_pipeline(path: Path, overrides: list[str], *, online: bool, run_code: bool = False) -> None:
    """Say what a run of a pipeline trusts, and check its stages as it would before the first one.

    Args:
        path, overrides: of the pipeline.
        online: check stages too that read data or models which are not here.
        run_code: run plugins, and code of models.

    Raises:
        PosttrainError: what a run would refuse.
    """
    from posttrain.pipeline.inputs import input_paths
    from posttrain.pipeline.runner import check_stages, stages_of, trusted_by
    from posttrain.pipeline.schema import REFERENCE, load_pipeline
    from posttrain.pipeline.stages import STAGES, as_written

    config, locations = load_pipeline(path, overrides, STAGES)
    stages = stages_of(config, locations, path, run_code=run_code)
    say_trusted(trusted_by(stages), "pipeline", run_code=run_code)
    unread = []
    for stage in [] if online else stages:
        away = [each for each in input_paths(stage.resolved(as_written)) if _is_away(REFERENCE.sub("", each))]
        if away:
            unread.append(stage.name)
            say(f"not checked: stage {stage.name}, which reads {', '.join(away)} (pass --online to fetch)")
    check_stages(stages, unread=unread)
    say(f"{path}: stages {', '.join(stage.name for stage in stages)}")


# ------------------------------------------------------------------------------------------------------------- parts


def _is_away(path: str) -> bool:
    """Whether a path is an id of the Hub; an empty one was a reference to another stage."""
    return bool(path) and not is_local(path) and not looks_local(path)


def _rows(recipe: Recipe, needs: Needs, online: bool, bad: BadRows) -> Rows | None:
    section = section_of(recipe, needs)
    sources = [source for _, source in parts(getattr(recipe.data, section), section)]
    away = [source.path for source in sources if isinstance(source, FileSource) and not is_local(source.path)]
    what = f"data.{section}" + (f" ({', '.join(away)})" if away else "")
    return _obtain(what, lambda offline: load_rows(recipe, needs, offline=offline, bad=bad), not away, online)


def _forms(recipe: Recipe, online: bool) -> None:
    """Say how the rows of each source of completions are read, where their columns decide it."""
    for name, source in parts(recipe.data.completions, "completions"):
        if isinstance(source, FileSource) and source.completion is None and source.messages is None:
            here = is_local(source.path) or online
            form = completion_format(source, first_row(source, name, offline=not here))
            turns = "the last assistant turn" if source.train_on == "last" else "all assistant turns"
            trained = f", trained on {turns}" if form in (Format.MESSAGES, Format.SHAREGPT) else ""
            say(f"{name}: read as {form} (columns {', '.join(sorted(COLUMNS[form]))}){trained}")


def _references(recipe: Recipe, needs: Needs, rows: Rows) -> None:
    """Have the verifier read every gold answer, as a run does before its first step."""
    judge = build_checked_judge(recipe, needs, rows, run_own_code=False)
    if judge is None:
        return
    judge.close()
    judging = [verifier for each in verifiers(recipe).values() for verifier in each if verifier.judges_outcome]
    if chiefs := dict.fromkeys(verifier.type for verifier in judging if verifier.type != "python"):
        say(f"verifier: {', '.join(chiefs)} can read the reference of every problem, if it needs one")
    if any(getattr(verifier, "profile", None) == "strict" for verifier in judging):
        say("right answers in a form that strict does not take earn nothing: --batch samples some and counts them")


def _environment(recipe: Recipe, rows: Rows | None) -> Rows | None:
    """Load the environment, and show how the first episode begins; the rows as a run has them, with their tools."""
    with closing(EnvironmentPool(recipe.environment)) as pool:
        pool.start()
        for tool in pool.tools:
            say(f"tool: {tool['function']['name']}: {tool['function']['description']}")
        equipped = None if rows is None else pool.equipped(rows)
        for problem in (equipped or [])[:1]:
            opening = pool.reset({0: (problem, recipe.seed)})[0]
            if isinstance(opening, Failure):
                what = f"the first episode does not begin: {opening.fault}, {opening.detail}"
                raise WorldError(what, where=problem.id)
            say(f"environment: {problem.id} begins with {opening!r} behind its prompt")
    return equipped


def _traces(recipe: Recipe, needs: Needs, online: bool, bad: BadRows) -> list[WrittenTrace] | None:
    """The traces that the method reads beside its rows, perhaps none; None if they are not here."""
    sources = [] if recipe.data.traces is None else [source for _, source in parts(recipe.data.traces, "traces")]
    away = [source.path for source in sources if isinstance(source, FileSource) and not is_local(source.path)]
    here = not away
    what = "data.traces" + (f" ({', '.join(away)})" if away else "")
    return _obtain(what, lambda offline: load_known(recipe, needs, offline=offline, bad=bad), here, online)


def _found(prepared: Prepared) -> str:
    """For how many of the prompts there is a trace."""
    prompts = [item for item in prepared.items if isinstance(item, PromptRow)]
    if not prompts:
        return ""
    book = TraceBook(prepared.traces)
    return f"; for {sum(bool(book.of(problem, ids)) for problem, ids in prompts)} of {len(prompts)} prompts"


def _tokenizer(
    recipe: Recipe, rows: Rows | None, traces: list[WrittenTrace] | None, online: bool
) -> PreTrainedTokenizerBase | None:
    init = recipe.model.init
    if init is not None and init.tokenizer.type == "bpe" and rows is None:
        say("not checked: the tokenizer, which is learnt from the data (pass --online to fetch)")
        return None
    texts = None if rows is None else corpus(rows, traces or ())
    here = init is not None or looks_local(str(recipe.model.path))
    what = f"the tokenizer of {recipe.model.path}"
    return _obtain(what, lambda offline: load_tokenizer(recipe.model, corpus=texts, offline=offline), here, online)


def _models_beside(recipe: Recipe, needs: Needs, policy: Renderer, online: bool, rows: Rows | None) -> None:
    """The models that the recipe names beside the policy read the same token ids; one that scores steps reads text, and
    one that reasons can be asked about the rows."""
    reasoner = needs.companion(Reasoner)
    named = {f"method.{field}": path for field, path in models_of(recipe.method).items()}
    if recipe.reference is not None and recipe.reference.path is not None:
        named["reference.path"] = recipe.reference.path
    scores_steps, of_steps = needs.companion(StepScorer), "method.terms.process.path"
    if scores_steps is not None:
        named[of_steps] = scores_steps.config.path
    for where, path in named.items():
        other = recipe.model.of_folder(path) if reasoner is None else of_text(recipe, reasoner)

        def load(offline: bool, other: ModelConfig = other) -> PreTrainedTokenizerBase:
            return load_tokenizer(other, offline=offline)

        with blamed_on(where):
            tokenizer = _obtain(f"the tokenizer of {path}", load, looks_local(path), online)
        if tokenizer is None or where == of_steps:
            continue
        if reasoner is None:
            check_same_vocabulary(policy, tokenizer, where)
        elif rows is not None:
            asks(reasoner, tokenizer, next(row for row in rows if isinstance(row, Problem)))


def _saving(recipe: Recipe, needs: Needs, tokenizer: PreTrainedTokenizerBase, rows: Rows | None) -> None:
    """Try to save all but the weights, as a run does before its first step."""
    from posttrain.models.saving import SavePlan

    plan = SavePlan.of_path(recipe.model, tokenizer, classifier=needs.classifier)
    plan.prove(first_texts(rows or []))
    for note in plan.notes:
        say(note)


def _forward(recipe: Recipe, needs: Needs) -> None:
    """Say how a model of this type will be scored and sampled from."""
    config = config_json(recipe.model)
    if config is None:
        return
    own_engine = recipe.rollouts is None or recipe.rollouts.engine == "transformers"
    samples = own_engine and (needs.generates or recipe.evaluation is not None)
    asked: dict[str, Any] = {"samples": samples, "router_loss": recipe.model.router_loss}
    notes = forward_notes(config, classifier=needs.classifier, **asked) + unbalanced_notes(recipe, needs)
    unadapted = without_adapter_note(
        str(config.get("model_type")), trained_lora(recipe.model), module_names(resolved(recipe.model))
    )
    for note in notes if unadapted is None else [*notes, unadapted]:
        say(note)


def _obtain(what: str, load: Callable[[bool], T], here: bool, online: bool) -> T | None:
    """Load something; None if it would have to be downloaded and that was not asked for."""
    if here or online:
        return load(False)
    try:
        return load(True)
    except (DataError, ModelError) as error:
        say(f"not checked: {what} is not in the local cache (pass --online to fetch)")
        say(f"  read as a Hub id: {error.what}" + (f"\n  {error.hint}" if error.hint else ""))
        return None


def _pictures(pictures: PictureText, file: Path | None) -> None:
    """How many tokens pictures take, and the first one as the model sees it."""
    every = list(pictures.all_seen)
    if not every:
        say("pictures: no row has one")
        return
    places = sorted(each.places for each in every)
    middle = places[len(places) // 2]
    say(f"pictures: {len(every):,}, of {places[0]:,} to {places[-1]:,} tokens, {middle:,} in the middle")
    if file is not None:
        with file_atomic(file) as beside:
            pictures.as_seen(every[0]).save(beside, "PNG")
        say(f"{file}: the picture of {every[0].picture.where}, as the model sees it")


def _longest(recipe: Recipe, needs: Needs, prepared: Prepared | None) -> int | None:
    """Most tokens of a sequence: by the recipe's limits, and by the rows themselves where they are known."""
    limits = [sequence_tokens(recipe, needs), None if prepared is None else prepared.longest]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


# ------------------------------------------------------------------------------------------------------------ sample


def _one_of_each_source(prepared: Prepared, shell: ShellRows) -> list[Any]:
    """The first item of each source."""
    found: dict[str, Any] = {}
    for item in at_hand(prepared.items):
        source = source_of(shell.problem_id(item)) if prepared.mixture.names else ""
        found.setdefault(source, item)
    return list(found.values())


def _print_item(item: Any, samples: dict[str, Sample], renderer: Renderer) -> None:
    """One row as the model sees it: its token sequences, or a prompt where these are sampled."""
    tokenizer = renderer.tokenizer
    for role, sample in samples.items():
        say(f"\n{role} {sample.problem_id}", bold=True, nl=False)
        say(", trained tokens " + ("highlighted" if _on_terminal() else "in [[ ]]"))
        print_marked(sample, renderer.encoder, colour=_on_terminal())
        if isinstance(item, PreferenceRow) and isinstance(item.row, Stepwise):
            say(f"  {len(sample.ids)} tokens; the marked ones end the {sum(sample.loss_mask)} steps that are judged")
            continue
        _print_supervision(sample, renderer, tokenizer)
    if isinstance(item, PreferenceRow) and item.values:
        say("  numbers of the row: " + ", ".join(f"{name} {value}" for name, value in item.values.items()))
    if samples:
        return
    problem, ids = item
    say(f"\nprompt {problem.id}", bold=True)
    say(renderer.shown(ids))
    reference = "none" if problem.reference is None else repr(problem.reference)
    say(f"  {len(ids)} tokens; BOS tokens: {_bos_count(ids, tokenizer)}; reference: {reference}")
    say(f"  ids: {' '.join(map(str, ids[:16]))}{' ...' if len(ids) > 16 else ''}")
    _warn_about_bos(ids, tokenizer)


def _print_trace(trace: KnownTrace, renderer: Renderer, *, expert: bool) -> None:
    """A trace that is read beside the rows: an expert row with its trained tokens, or what prefixes are taken of."""
    name = f"{trace.source}, {trace.problem.id}"
    sample = Sample(
        ids=[*trace.prompt_ids, *trace.ids],
        loss_mask=[0] * len(trace.prompt_ids) + [int(expert) * trained for trained in trace.mask],
        origin=Origin.EXPERT,
        problem_id=name,
    )
    if expert:
        _print_item(None, {"expert": sample}, renderer)
        return
    say(f"\ntrace {name}, of which the method takes beginnings", bold=True)
    print_marked(sample, renderer.encoder, colour=_on_terminal())
    say(f"  {len(trace.prompt_ids)} tokens of the prompt, {len(trace.ids)} of the trace")


def print_marked(sample: Sample, encoder: Encoder, *, colour: bool) -> None:
    """The sample's text, special tokens shown, with the trained tokens coloured or in double brackets."""
    for text, trained in encoder.pieces(sample.ids, sample.loss_mask):
        if trained and colour:
            say(text, nl=False, fg="green", bold=True)
        else:
            say(f"[[{text}]]" if trained else text, nl=False)
    say()


def _print_supervision(sample: Sample, renderer: Renderer, tokenizer: PreTrainedTokenizerBase) -> None:
    trained = sum(sample.loss_mask)
    # Some templates put a newline after the end token, so it need not be the last one.
    ends = any(m and i in renderer.stop_ids for i, m in zip(sample.ids, sample.loss_mask, strict=True))
    bos = _bos_count(sample.ids, tokenizer)
    say(f"  {len(sample.ids)} tokens, {trained} trained; BOS tokens: {bos}")
    say(f"  end token trained: {'yes' if ends else 'NO'}")
    if not ends:
        say("  warning: no end token is trained here, so the model does not learn to stop")
    if not trained:
        say("  warning: no token of this row is trained")
    _warn_about_bos(sample.ids, tokenizer)


def _bos_count(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """BOS tokens in the row; 0 for tokenizers without one of their own."""
    bos = tokenizer.bos_token_id
    return 0 if bos is None or bos == tokenizer.eos_token_id else list(ids).count(bos)


def _warn_about_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Two in a row were added by two hands. Several by themselves are the template's way to begin its turns: Llama 2
    begins every question with BOS, SmolLM2 every message."""
    bos = tokenizer.bos_token_id
    if _bos_count(ids, tokenizer) and any(pair == (bos, bos) for pair in pairwise(ids)):
        say("  warning: two BOS tokens in a row: the chat template and the tokenizer both add one")


def _on_terminal() -> bool:
    return sys.stdout.isatty()
