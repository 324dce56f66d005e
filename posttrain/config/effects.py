"""Keys that a recipe gives and nothing would read. They are errors: a user who writes a key means something by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.config.locations import Path as KeyPath
from posttrain.config.needs import Needs
from posttrain.config.schema import (
    FileSource,
    ModelInit,
    Recipe,
    Section,
    Source,
    TaskSource,
    TraceSource,
)
from posttrain.config.verifier import VerifierConfig

SECTIONS = ("prompts", "completions", "preferences", "unpaired", "stepwise", "traces")
"""Keys of `data` that hold sources."""

_TOGETHER = "traces of several sources are put together; `weights` of trace files draws them by their reward"

LOCAL_SUFFIXES = [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz"]
"""Endings of a data path that make it a local file even if it does not exist; readers of plugins add theirs."""

HELD_OUT: KeyPath = ("evaluation", "preferences", "data")
PAIRS: tuple[KeyPath, ...] = (("data", "preferences"), HELD_OUT)
"""Sections whose rows are pairs of completions."""

WITHOUT_MOMENTS = ("sgd", "adafactor", "adagrad", "rmsprop")
"""Optimizers that Hugging Face builds without the Adam parameters."""

COLOCATE_KEYS = ("dtype", "kv_cache_mb", "gpu_memory_utilization", "enforce_eager", "sleep")
SERVER_KEYS = ("url", "api_key_env", "start_timeout", "timeout", "reconnect", "transfer_dir")
"""Keys of `rollouts.vllm` that only one mode reads: a server has its own command line."""


def idle_keys(recipe: Recipe) -> dict[KeyPath, str]:
    """Keys that nothing reads whatever the method, written or not, and why."""
    return dict([*_model(recipe), *_training(recipe), *_sources(recipe), *_verifiers(recipe), *_rollouts(recipe)])


def idle_keys_of_method(recipe: Recipe, needs: Needs, method: str) -> dict[KeyPath, str]:
    """Keys that this method does not read, written or not, and why."""
    idle: dict[KeyPath, str] = {}
    read = {*needs.data, *(("traces",) if needs.traces_instead and recipe.data.completions is None else ())}
    for name in SECTIONS:
        if name not in read:
            instead = " or data.traces, one of them" if needs.traces_instead else ""
            idle[("data", name)] = f"{method} reads data.{', data.'.join(needs.data)}{instead}"
    if not needs.expert_rows and not needs.traces_instead:
        for path, _ in trace_sources(recipe):
            idle[(*path, "weights")] = f"{method} does not draw traces by weight"
    if needs.samples:
        drawn = ("samples_per_prompt", "temperature", "top_p", "top_k")
        for key in (*drawn, "sync_every", "delay", "pipeline", "replay", "refill", "importance_cap", "importance"):
            idle[("rollouts", key)] = f"{method} samples from the policy as it is, as often as its own section says"
    elif not needs.rollouts:
        idle[("rollouts",)] = f"{method} samples no completions"
    if not needs.reference:
        idle[("reference",)] = f"{method} has no reference"
    elif needs.rollouts:
        idle[("reference", "cache")] = f"the reference of {method} does not score the same rows again"
    else:
        idle[("reference", "path")] = f"the reference of {method} is the start of the run"
    if needs.classifier:
        idle[("evaluation",)] = f"{method} trains a classifier, which writes no answers: posttrain eval --rewards"
        idle[("model", "router_loss")] = f"{method} trains a classifier, whose passes return no router logits"
        idle[("tracking", "token_values")] = f"{method} trains a classifier, which gives tokens no log-prob"
    if not needs.critic:
        idle[("critic",)] = f"{method} has no value model"
    if not needs.verifier:
        idle[("verifier",)] = f"{method} takes no reward"
        idle |= {(*path, "verifier"): f"{method} takes no reward" for path, _ in sources(recipe)}
    if not needs.rollouts:
        idle[("environment",)] = f"{method} plays no episodes"
    elif recipe.environment is not None:
        if not recipe.environment.judged:
            idle[("verifier",)] = "the environment rewards"
            idle |= {(*path, "verifier"): "the environment rewards" for path, _ in sources(recipe)}
        idle[("data", "max_length")] = "environment.episode_tokens bounds episodes"
    other = "rows_per_step" if needs.rollouts else "prompts_per_step"
    idle[("batch", other)] = f"{method} counts in batch.{needs.batch_key}"
    return idle


def written(recipe: Recipe, path: KeyPath) -> bool:
    """Whether the recipe gives the key a value. `null` unsets a key, so it does not count."""
    section: Any = recipe
    for step in path[:-1]:
        section = section[step] if isinstance(step, int) else getattr(section, step)
        if section is None:
            return False
    return path[-1] in section.model_fields_set and getattr(section, str(path[-1])) is not None


def _model(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    quantization, init = recipe.model.quantization, recipe.model.init
    if quantization is not None and quantization.bits == 8:
        for key in ("type", "double", "compute_dtype"):
            yield ("model", "quantization", key), "8 bits have no such choice; it is about bits: 4"
    if init is None:
        return
    for key in ("revision", "trust_remote_code", "attn_implementation"):
        yield ("model", key), "it is about a model that is loaded, and model.init makes one"
    yield ("model", "router_loss"), "model.init makes a model without experts"
    yield from _tokenizer(init)


def _tokenizer(init: ModelInit) -> Iterator[tuple[KeyPath, str]]:
    key = "vocab_size" if init.tokenizer.type == "characters" else "alphabet"
    yield ("model", "init", "tokenizer", key), f"a {init.tokenizer.type} tokenizer does not have it"


def _training(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    training = recipe.training
    if training.lr_scheduler_type == "constant":
        yield ("training", "warmup_steps"), "lr_scheduler_type constant has no warmup; constant_with_warmup has"
    if training.optim in WITHOUT_MOMENTS:
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            yield ("training", key), f"optim {training.optim} is not Adam"
    if not training.push_to_hub:
        for key in ("hub_model_id", "hub_private_repo", "hub_strategy"):
            yield ("training", key), "nothing is published without push_to_hub: true"
    if not training.report_to:
        yield ("tracking", "send_samples"), "training.report_to names no tracker"
    if training.save_steps is None:
        yield ("training", "save_total_limit"), "without save_steps one checkpoint is written, at the end"


def _rollouts(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    rollouts = recipe.rollouts
    if rollouts is None:
        return
    if rollouts.engine != "vllm":
        for key in ("mode", "vllm", "importance_cap", "importance"):
            yield ("rollouts", key), f"engine {rollouts.engine} does not have it; engine vllm has"
        return
    if rollouts.pipeline:
        yield ("rollouts", "delay"), "pipelined rollouts are trained on one rollout after they were sampled"
    if rollouts.stale:
        for key in ("importance_cap", "importance"):
            yield ("rollouts", key), "stale rollouts are weighed by the method, against the engine's log-probs"
    elif rollouts.importance is not None:
        yield ("rollouts", "importance_cap"), "rollouts.importance says it: its `high` is the cap"
    for key in COLOCATE_KEYS if rollouts.mode == "server" else SERVER_KEYS:
        other = "colocate" if rollouts.mode == "server" else "server"
        yield ("rollouts", "vllm", key), f"it is read with mode: {other}"


def _verifiers(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    own = any(source.verifier for _, source in sources(recipe))
    if recipe.verifier is None and recipe.evaluation is None and not own:
        yield ("verifier_pool",), "nothing is verified: there is neither `verifier` nor `evaluation`"
    groups: list[tuple[KeyPath, list[VerifierConfig]]] = [(("verifier",), recipe.verifier or [])]
    groups += [((*path, "verifier"), source.verifier) for path, source in sources(recipe) if source.verifier]
    for index, benchmark in enumerate(recipe.evaluation.benchmarks if recipe.evaluation else ()):
        if isinstance(benchmark, Section):
            groups.append((("evaluation", "benchmarks", index, "verifier"), benchmark.verifier))
    for path, verifiers in groups:
        for index, verifier in enumerate(verifiers):
            for key, reason in verifier.idle_keys():
                yield (*path, index, key), reason


def trace_sources(recipe: Recipe) -> Iterator[tuple[KeyPath, TraceSource]]:
    """The trace files of the recipe with their paths."""
    section = recipe.data.traces
    several = enumerate(section) if isinstance(section, list) else [(None, section)]
    for index, source in several:
        if isinstance(source, TraceSource):
            yield ("data", "traces", *(() if index is None else (index,))), source


def _sources(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    for path, _ in trace_sources(recipe):
        yield from (((*path, key), _TOGETHER) for key in ("weight", "max_epochs"))
        if not isinstance(path[-1], int):
            yield (*path, "source"), "it stands among several sources in a list"
    for path, source in sources(recipe):
        if not isinstance(path[-1], int):
            for key in ("source", "weight", "max_epochs", "verifier"):
                yield (*path, key), "it stands among several sources in a list"
        elif path[:2] == ("data", "traces"):
            yield from (((*path, key), _TOGETHER) for key in ("weight", "max_epochs", "verifier"))
        elif path[:2] != ("data", "prompts"):
            yield (*path, "verifier"), "completions are verified of data.prompts only"
        reads = str(path[1]) if path[0] == "data" else "preferences" if path == HELD_OUT else "prompts"
        reads = "completions" if reads == "traces" else reads
        if isinstance(source, FileSource):
            yield from _file(path, source, reads)
        if isinstance(source, TaskSource) and reads != "completions":
            for key in ("annotator", "weakness"):
                yield (*path, key), "problems have no written traces; it is read in data.completions"
        elif isinstance(source, TaskSource) and source.annotator == "expert":
            yield (*path, "weakness"), "annotator is expert; set annotator: weak"


def _file(path: KeyPath, source: FileSource, reads: str) -> Iterator[tuple[KeyPath, str]]:
    if source.images is None:
        yield (*path, "image_hosts"), "the rows have no pictures: `images` names their column"
    if reads not in ("completions", "unpaired"):
        yield (*path, "completion"), "written completions are read in data.completions and data.unpaired only"
    if reads not in ("unpaired", "stepwise"):
        yield (*path, "label"), "labels are read in data.unpaired and data.stepwise only"
    if reads != "stepwise":
        yield (*path, "steps"), "steps are read in data.stepwise only"
    if reads != "completions":
        yield (*path, "train_on"), "written completions are read in data.completions only"
    if reads not in ("completions", "unpaired"):
        yield (*path, "messages"), "written completions are read in data.completions and data.unpaired only"
    elif source.messages is not None:
        for key in ("prompt", "completion", "template"):
            yield (*path, key), "`messages` names a column with whole conversations"
    if reads != "preferences":
        for key in ("chosen", "rejected", "others", "scores"):
            yield (*path, key), "pairs of completions are read in data.preferences only"
    if source.reference is None:
        yield (*path, "reference_pattern"), "there is no `reference` column that it could be applied to"
    if is_local(source.path):
        folder = Path(source.path).expanduser().is_dir()
        for key in ("revision",) if folder else ("name", "revision", "split"):
            yield (*path, key), f"{source.path} is a local {'folder' if folder else 'file'}"


def is_local(path: str) -> bool:
    """Whether a data path means a file or folder here rather than a data set on the Hub."""
    written_so = path.startswith((".", "/", "~")) or path.lower().endswith(tuple(LOCAL_SUFFIXES))
    return written_so or Path(path).exists()


def keys_left_unsaid(recipe: Recipe) -> list[KeyPath]:
    """Keys that a dump must not add: written down they would be refused, or would change the meaning."""
    unsaid = list(idle_keys(recipe))
    for path, source in sources(recipe):
        # A template may do without the prompt column only as long as the recipe does not name one.
        # Written down, it would also say that pairs have an explicit prompt.
        if isinstance(source, FileSource) and (source.template is not None or path[:2] in PAIRS or path in PAIRS):
            unsaid.append((*path, "prompt"))
    return unsaid


def sources(recipe: Recipe) -> Iterator[tuple[KeyPath, Source]]:
    """All sources of the recipe with their paths; those of benchmarks written in place too."""
    for name in SECTIONS:
        section = getattr(recipe.data, name)
        if isinstance(section, list):
            every = ((("data", name, index), source) for index, source in enumerate(section))
            yield from ((path, source) for path, source in every if not isinstance(source, TraceSource))
        elif section is not None and not isinstance(section, TraceSource):
            yield ("data", name), section
    for index, benchmark in enumerate(recipe.evaluation.benchmarks if recipe.evaluation else ()):
        if isinstance(benchmark, Section):
            yield ("evaluation", "benchmarks", index, "data"), benchmark.data
    if recipe.evaluation is not None and recipe.evaluation.episodes is not None:
        yield ("evaluation", "episodes", "prompts"), recipe.evaluation.episodes.prompts
    held_out = recipe.evaluation.preferences if recipe.evaluation else None
    if held_out is not None and held_out.data is not None:
        yield HELD_OUT, held_out.data
