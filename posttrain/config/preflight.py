"""Checks of a whole recipe before anything heavy is loaded: what the method needs, and what nobody would read.

The batch arithmetic is in `config.batch`, the memory estimate in `config.memory`; both are offered here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from posttrain.config.adapters import wrong_adapters
from posttrain.config.batch import BatchPlan, plan_batch
from posttrain.config.effects import idle_keys, idle_keys_of_method, sources, written
from posttrain.config.locations import Locations, Path, dotted, raise_all
from posttrain.config.memory import MemoryEstimate, estimate_memory
from posttrain.config.mixtures import stages, verifiers
from posttrain.config.model_types import wrong_adapter_for_type, wrong_router_loss
from posttrain.config.needs import Needs
from posttrain.config.pictured import refuse_pictures
from posttrain.config.positions import beyond_positions
from posttrain.config.schema import BenchmarkConfig, FileSource, Recipe, RolloutConfig, Source
from posttrain.config.trainer_names import check_training
from posttrain.config.verifier import VerifierConfig
from posttrain.errors import NeedsError, PosttrainError, RecipeError
from posttrain.verifiers import VERIFIERS

__all__ = ["BatchPlan", "MemoryEstimate", "check_needs", "estimate_memory", "plan_batch"]

EXAMPLES: dict[Path, str] = {
    ("data", "prompts"): "data:\n  prompts: {path: problems.jsonl, prompt: question, reference: answer}",
    ("data", "completions"): "data:\n  completions: {path: traces.jsonl, prompt: question, completion: solution}",
    ("data", "preferences"): "data:\n  preferences: {path: pairs.jsonl, chosen: chosen, rejected: rejected}",
    ("data", "unpaired"): "data:\n  unpaired: {path: votes.jsonl, prompt: question, completion: answer, label: good}",
    ("data", "stepwise"): "data:\n  stepwise: {path: steps.jsonl, prompt: question}",
    ("data", "traces"): "data:\n  traces: {path: traces.jsonl}",
    ("rollouts",): "rollouts:\n  samples_per_prompt: 8",
    ("verifier",): "verifier:\n  - type: math",
    ("batch", "prompts_per_step"): "batch:\n  prompts_per_step: 64",
    ("batch", "rows_per_step"): "batch:\n  rows_per_step: 64",
}


def check_needs(recipe: Recipe, needs: Needs, method_name: str, locations: Locations | None = None) -> None:
    """Check that the recipe has what the method needs and nothing that would be ignored.

    Args:
        recipe: as loaded; keys count as written if the user gave them, defaults do not.
        needs: of the method as configured.
        method_name: for messages.
        locations: places of the keys; without them messages name keys only.

    Raises:
        NeedsError: a section is missing, a group is too small, or a key has no effect.
        RecipeError: keys contradict each other. Several errors come together as RecipeErrors.
    """
    locations = locations or Locations("recipe")
    errors: list[PosttrainError] = [
        *_missing(recipe, needs, method_name, locations),
        *(error for each in needs.companions for error in each.refuse(recipe, method_name, locations)),
        *_without_effect(recipe, needs, method_name, locations),
        *_verifiers(recipe, needs, locations),
        *_references(recipe, needs, locations),
        *_evaluation(recipe, needs, method_name, locations),
        *_vllm(recipe, needs, locations),
        *_refill(recipe, needs, method_name, locations),
        *beyond_positions(recipe, needs, locations),
        *check_training(recipe, locations),
        *wrong_adapters(recipe, needs, locations),
        *wrong_adapter_for_type(recipe, locations),
        *wrong_router_loss(recipe, locations),
        *refuse_pictures(recipe, needs, locations),
    ]
    raise_all(errors)


def _missing(recipe: Recipe, needs: Needs, method: str, locations: Locations) -> Iterator[NeedsError]:
    wanted: list[Path] = [("data", name) for name in needs.data]
    wanted += [("rollouts",)] * needs.generates + [("verifier",)] * needs.verifier
    wanted += [("batch", needs.batch_key)]
    for path in wanted:
        section = recipe if len(path) == 1 else getattr(recipe, str(path[0]))
        if path == ("data", "completions") and needs.traces_instead and recipe.data.traces is not None:
            continue
        if path == ("verifier",) and recipe.environment is not None and recipe.environment.rewards:
            continue
        if path == ("verifier",) and (own := verifiers(recipe)) and all(own.values()):
            continue
        if getattr(section, str(path[-1])) is None:
            hint = "add, for example:\n    " + EXAMPLES[path].replace("\n", "\n    ")
            yield NeedsError(f"method {method} needs `{dotted(path)}`", where=locations.place(path), hint=hint)
    if recipe.rollouts is not None and needs.rollouts:
        samples = recipe.rollouts.samples_per_prompt
        if samples < needs.min_samples_per_prompt:
            yield NeedsError(
                f"method {method} needs at least {needs.min_samples_per_prompt} samples per prompt, got {samples}",
                where=locations.where(("rollouts", "samples_per_prompt")),
                hint="it compares the completions of one prompt with each other",
            )


def _without_effect(recipe: Recipe, needs: Needs, method: str, locations: Locations) -> Iterator[NeedsError]:
    by_method = idle_keys_of_method(recipe, needs, method)
    for path, reason in (idle_keys(recipe) | by_method).items():
        inside_unread = any(path[:end] in by_method for end in range(1, len(path)))
        if written(recipe, path) and not inside_unread:
            yield NeedsError(f"the key has no effect: {reason}", where=locations.where(path), hint="remove it")


def _verifiers(recipe: Recipe, needs: Needs, locations: Locations) -> Iterator[RecipeError]:
    if needs.verifier and recipe.verifier is not None:
        yield from _one_outcome(recipe.verifier, ("verifier",), locations)
    for path, source in sources(recipe) if needs.verifier else ():
        if path[:2] == ("data", "prompts") and source.verifier is not None:
            yield from _one_outcome(source.verifier, (*path, "verifier"), locations)
    for index, benchmark in _benchmarks(recipe):
        yield from _one_outcome(benchmark.verifier, ("evaluation", "benchmarks", index, "verifier"), locations)


def _one_outcome(verifiers: Sequence[VerifierConfig], path: Path, locations: Locations) -> Iterator[RecipeError]:
    judging = [index for index, verifier in enumerate(verifiers) if verifier.judges_outcome]
    if not judging:
        yield NeedsError(
            "no verifier here judges the answer: " + ", ".join(f"`{v.type}` only shapes the reward" for v in verifiers),
            where=locations.where(path),
            hint="add one of " + ", ".join(name for name, verifier in VERIFIERS.items() if verifier.outcome),
        )
    for index in judging[1:]:
        shaping = ", ".join(name for name, verifier in VERIFIERS.items() if not verifier.outcome)
        yield RecipeError(
            f"a second verifier judges the answer: {verifiers[judging[0]].type} and {verifiers[index].type}",
            where=locations.where((*path, index)),
            hint=f"keep one of them; only {shaping}, and others with `outcome: false` may stand beside it",
        )


def _references(recipe: Recipe, needs: Needs, locations: Locations) -> Iterator[NeedsError]:
    judged: list[tuple[Path, Source, Sequence[VerifierConfig]]]
    judged = [(("evaluation", "benchmarks", i, "data"), b.data, b.verifier) for i, b in _benchmarks(recipe)]
    if needs.verifier:
        judged += [
            (path, source, source.verifier or recipe.verifier or ())
            for path, source in sources(recipe)
            if path[:2] == ("data", "prompts")
        ]
    for path, source, judging in judged:
        comparing = [verifier.type for verifier in judging if verifier.needs_reference]
        if comparing and isinstance(source, FileSource) and source.reference is None:
            yield NeedsError(
                f"verifier {comparing[0]} compares with a gold answer, and no `reference` column is named",
                where=locations.where(path),
                hint="add `reference: <column>`",
            )


def _vllm(recipe: Recipe, needs: Needs, locations: Locations) -> Iterator[RecipeError]:
    """What the vLLM engine cannot do; `rollouts.weight_sync` refuses what shows with the loaded model only."""
    rollouts = recipe.rollouts
    if rollouts is not None and needs.rollouts and rollouts.pipeline:
        yield from _pipeline(rollouts, locations)
    if rollouts is None or rollouts.engine != "vllm" or not needs.generates:
        return
    if rollouts.temperature != 1.0 and (rollouts.top_p < 1.0 or rollouts.top_k is not None):
        yield RecipeError(
            "vLLM gives log-probs at a temperature other than 1 only where neither top_p nor top_k cut tokens off",
            where=locations.where(("rollouts", "temperature")),
            hint="set temperature: 1.0, or leave out top_p and top_k, or take engine: transformers",
        )
    if rollouts.sync_every > 1:
        yield RecipeError(
            "a sampling policy that lags needs engine transformers, whose copy is part of the checkpoint",
            where=locations.where(("rollouts", "sync_every")),
            hint="set sync_every: 1 (rollouts.delay gives stale rollouts too), or take engine: transformers",
        )
    if rollouts.vllm.sync == "adapter" and not recipe.model.adapted:
        yield RecipeError(
            "there is no adapter to send: all weights are trained",
            where=locations.where(("rollouts", "vllm", "sync")),
            hint="set sync: merged, or train an adapter with model.peft: {type: lora}",
        )
    if rollouts.mode == "server" and recipe.model.path is None:
        yield RecipeError(
            "a server needs a model folder to start from, and model.init has none",
            where=locations.where(("rollouts", "mode")),
            hint="set mode: colocate, or save the model and give it as model.path",
        )


def _pipeline(rollouts: RolloutConfig, locations: Locations) -> Iterator[RecipeError]:
    if rollouts.engine == "vllm" and rollouts.mode == "server":
        return
    engine = "transformers" if rollouts.engine == "transformers" else f"vllm with mode: {rollouts.mode}"
    yield RecipeError(
        f"engine {engine} samples where the policy is trained, so it cannot sample while that is going on",
        where=locations.where(("rollouts", "pipeline")),
        hint="set engine: vllm and mode: server (docs/vllm.md), or take delay: 1 in place of pipeline: rollouts as "
        "old, sampled and trained on in turn",
    )


def _refill(recipe: Recipe, needs: Needs, method: str, locations: Locations) -> Iterator[RecipeError]:
    rollouts = recipe.rollouts
    if rollouts is None or not needs.rollouts or rollouts.refill is None:
        return
    where = locations.where(("rollouts", "refill"))
    if not needs.verifier:
        yield NeedsError(
            f"method {method} takes no reward, so no group is without a signal", where=where, hint="remove it"
        )
    elif rollouts.samples_per_prompt < 2:
        yield NeedsError(
            "rewards of a group of one completion cannot differ",
            where=locations.where(("rollouts", "samples_per_prompt")),
            hint="raise it, or remove rollouts.refill",
        )
    ahead = [key for key in ("delay", "pipeline", "replay") if getattr(rollouts, key)]
    if ahead:
        yield RecipeError(
            "which prompts a rollout takes is known once the one before is judged, and stale rollouts ask before",
            where=locations.where(("rollouts", ahead[0])),
            hint=f"remove {ahead[0]}, or rollouts.refill; sync_every goes together with it",
        )
    if recipe.data.prompts is not None and stages(recipe.data.prompts, "prompts") is not None:
        yield RecipeError(
            "sources of prompts are drawn by weight, step by step, and refilled rollouts take as many as they need",
            where=locations.where(("data", "prompts")),
            hint="leave `weight` out of the sources, or remove rollouts.refill",
        )


def _evaluation(recipe: Recipe, needs: Needs, method: str, locations: Locations) -> Iterator[RecipeError]:
    if recipe.evaluation is None:
        return
    if recipe.evaluation.preferences is not None and ("preferences" not in needs.data or needs.classifier):
        yield NeedsError(
            f"method {method} does not train a policy on pairs, so held-out pairs say nothing about it",
            where=locations.where(("evaluation", "preferences")),
            hint="remove it",
        )
    if recipe.evaluation.episodes is not None and recipe.environment is None:
        yield NeedsError(
            "there is no environment to play episodes in",
            where=locations.where(("evaluation", "episodes")),
            hint="add `environment`, or take `benchmarks`",
        )
    for key, measure in (("k", "pass"), ("maj", "maj")):
        wanted = getattr(recipe.evaluation, key)
        for k in wanted:
            if not 1 <= k <= recipe.evaluation.samples:
                yield RecipeError(
                    f"{measure}@{k} needs 1 <= k <= samples, and samples is {recipe.evaluation.samples}",
                    where=locations.where(("evaluation", key)),
                    hint=f"set evaluation.samples to at least {max(wanted)}, or lower {key}",
                )


def _benchmarks(recipe: Recipe) -> list[tuple[int, BenchmarkConfig]]:
    found = enumerate(recipe.evaluation.benchmarks if recipe.evaluation else ())
    return [(index, benchmark) for index, benchmark in found if isinstance(benchmark, BenchmarkConfig)]
