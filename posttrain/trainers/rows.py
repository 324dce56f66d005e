"""What each shell trains on, and what it cannot do, known before a model is loaded. Imports without torch.

`posttrain check` and `posttrain train` both go through `refuse` and `prepare`, so that one refuses what the other does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.batch import BatchPlan, plan_batch
from posttrain.config.locations import Locations
from posttrain.config.mixtures import source_of
from posttrain.config.mixtures import stages as stages_of
from posttrain.config.preflight import check_needs
from posttrain.config.schema import Recipe
from posttrain.data.bad_rows import BadRows
from posttrain.data.episodes import read_episodes
from posttrain.data.fitted import PreferenceRow, PromptRow
from posttrain.data.known_traces import KnownTrace, WrittenTrace
from posttrain.data.offline_rows import offline_rows
from posttrain.data.order import StagedOrder
from posttrain.data.preparation import Rows, fit_known, fit_preferences, fit_rows, section_of
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem, Sample
from posttrain.data.sources import problems
from posttrain.data.streaming import StreamedSamples, at_hand
from posttrain.data.truncation import Ledger
from posttrain.data.turns import Turns
from posttrain.environments.recorded import Recorded, by_problem, problem_key
from posttrain.errors import BatchError, DataError, NeedsError
from posttrain.evaluation.best import check_best
from posttrain.methods.base import ContrastMethod, Method, OnlineMethod
from posttrain.methods.companions import MaskModel, Writer
from posttrain.trainers.mixture import Mixture


class ShellRows:
    """The rows of a shell; this one's are samples (sft).

    Attributes:
        whole: the shell takes all rows together before its first step, so that they cannot be streamed.
    """

    whole = False

    def refuse(self, recipe: Recipe, method: Method) -> None:
        """Refuse a recipe that the shell cannot follow.

        Raises:
            NeedsError: the shell cannot do what the recipe asks for, whatever its rows.
        """
        section = section_of(recipe, method.needs)
        if recipe.data.streaming and (self.whole or section != "completions"):
            raise NeedsError(
                f"method {recipe.method.name} takes all rows of data.{section} together before its first step",
                where="data.streaming",
                hint="leave it out; `limit` of a source takes its first rows",
            )

    def fit(
        self, recipe: Recipe, method: Method, rows: Rows, renderer: Renderer, bad: BadRows
    ) -> tuple[Sequence[Any], Ledger]:
        """Rows as token ids within the limits, in the form that the shell trains on.

        Raises:
            DataError: as the functions of `data.preparation`.
        """
        return fit_rows(recipe, method.needs, rows, renderer, bad)

    def refuse_plan(self, recipe: Recipe, method: Any, items: Sequence[Any], plan: BatchPlan, vocabulary: int) -> None:
        """Refuse rows that do not serve the method.

        Raises:
            PosttrainError: these rows, this batch or this vocabulary do not serve the method.
        """

    def samples(self, item: Any) -> dict[str, Sample]:
        """Role -> the token sequences of an item; none where they are sampled."""
        return {"sample": item}

    def problem_id(self, item: Any) -> str:
        """The id of the problem that an item is for."""
        return next(iter(self.samples(item).values())).problem_id

    def sources(self, items: Sequence[Any]) -> Mapping[str, Sequence[int]]:
        """The numbers of the items of each source that there are any of, by its name."""
        if isinstance(items, StreamedSamples):
            return items.ranges
        found: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            found.setdefault(source_of(self.problem_id(item)), []).append(number)
        return found

    def tokens(self, recipe: Recipe, item: Any) -> int:
        """Tokens of an item's longest sequence at most, completions included."""
        return max(len(sample.ids) for sample in self.samples(item).values())


class PromptRows(ShellRows):
    """Prompts that completions are sampled for (online)."""

    whole = True

    def refuse(self, recipe: Recipe, method: Any) -> None:
        super().refuse(recipe, method)
        if recipe.rollouts.weighs is not None and not method.linear_in_advantages:
            raise NeedsError(
                f"method {recipe.method.name} has a loss that is not linear in the advantages, so they cannot "
                "carry the correction for the engine's rounding",
                where="rollouts.importance_cap" if recipe.rollouts.importance is None else "rollouts.importance",
                hint="leave it out, or change the method's weight",
            )
        refill = recipe.rollouts.refill
        if refill is not None and isinstance(method, ContrastMethod):
            raise NeedsError(
                f"method {recipe.method.name} compares completions with each other, and takes ties for what they are",
                where="rollouts.refill",
                hint="remove it: groups without a difference give no pair",
            )
        if refill is not None and refill.unbiased and not method.linear_in_advantages:
            raise NeedsError(
                f"method {recipe.method.name} has a loss that is not linear in the advantages, so they cannot carry "
                "the share of groups with a signal",
                where="rollouts.refill.unbiased",
                hint="leave it out",
            )
        if recipe.environment is not None:
            _refuse_environment(recipe, method)
        elif method.replays:
            raise NeedsError(
                f"method {recipe.method.name} plays recorded turns again, and there is no environment to do so in",
                where="method.boundary",
                hint="add `environment` (docs/agents.md), or begin within completions: boundary: token",
            )
        elif method.needs.turns:
            raise NeedsError(
                f"method {recipe.method.name} credits single turns, and without an environment a rollout has one",
                where="method",
                hint="add `environment` (docs/agents.md), or credit whole completions",
            )

    def fit(
        self, recipe: Recipe, method: Any, rows: Rows, renderer: Renderer, bad: BadRows
    ) -> tuple[list[PromptRow], Ledger]:
        fitted: Any  # problems with their prompts' ids
        if recipe.environment is not None:
            Turns(renderer, recipe.environment)
        fitted, ledger = fit_rows(recipe, method.needs, rows, renderer, bad)
        if isinstance(recipe.environment, Recorded.Config):
            _refuse_unrecorded(recipe.environment, [problem for problem, _ in fitted])
        return [PromptRow(problem, ids) for problem, ids in fitted], ledger

    def refuse_plan(self, recipe: Recipe, method: Any, items: Sequence[Any], plan: BatchPlan, vocabulary: int) -> None:
        masks = method.needs.companion(MaskModel)
        if masks is not None and masks.rule.min_tokens >= vocabulary:
            raise NeedsError(
                f"{masks.rule.min_tokens} tokens are always allowed, and the vocabulary has {vocabulary}: nothing is "
                "masked",
                where="method.min_tokens_to_keep",
                hint="lower it, or set top_p: 1",
            )

    def samples(self, item: PromptRow) -> dict[str, Sample]:
        return {}

    def problem_id(self, item: PromptRow) -> str:
        return item.problem.id

    def tokens(self, recipe: Recipe, item: PromptRow) -> int:
        if recipe.environment is not None:
            return recipe.environment.episode_tokens
        return len(item.prompt_ids) + recipe.rollouts.max_new_tokens


def _refuse_environment(recipe: Recipe, method: OnlineMethod) -> None:
    """Raises:
    NeedsError: rollouts cannot be episodes with this method or these settings.
    """
    if method.chooses_starts and not method.replays:
        by_turns = "boundary" in type(recipe.method).model_fields
        raise NeedsError(
            f"method {recipe.method.name} begins or ends completions with what others wrote, which episodes cannot do",
            where="method.boundary" if by_turns else "environment",
            hint="set boundary: turn" if by_turns else "take another method, or leave `environment` out",
        )
    if recipe.environment.forks and not method.needs.forks:
        raise NeedsError(
            f"method {recipe.method.name} takes an episode for one row, and patches make several of one",
            where="environment.patches",
            hint="set patches: 0, or take method ui_s1",
        )
    for reason in [each.episodes for each in method.needs.companions if each.episodes is not None]:
        raise NeedsError(
            f"method {recipe.method.name} {reason}, which episodes cannot do",
            where="environment",
            hint="take another method, or leave `environment` out",
        )
    if recipe.rollouts.pipeline:
        raise NeedsError(
            "episodes are played between updates, not beside them",
            where="rollouts.pipeline",
            hint="take delay: 1 for rollouts as old",
        )


def _refuse_unrecorded(config: Recorded.Config, problems: Sequence[Problem]) -> None:
    """Raises:
    DataError: there is no recorded episode of a problem, or a file that holds none.
    """
    known = by_problem(episode for path in config.paths for episode in read_episodes(Path(path)))
    missing = [problem for problem in problems if problem_key(problem) not in known]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(problems)} problems have no recorded episode",
            where=missing[0].where or missing[0].id,
            hint="record them with `posttrain play --out`, from the same data.prompts, or take fewer (`size`, `limit`)",
        )


class ResponseRows(ShellRows):
    """Rows of responses that are compared, or of one that is judged (preference, reward)."""

    whole = True

    def refuse(self, recipe: Recipe, method: Any) -> None:
        super().refuse(recipe, method)
        if method.refresh_reference and recipe.model.adapted:
            raise NeedsError(
                "a reference that is refreshed from the policy is a copy of its own, and with an adapter there is none",
                where="method.refresh_reference",
                hint="set it to false, or leave out model.peft",
            )

    def fit(
        self, recipe: Recipe, method: Any, rows: Rows, renderer: Renderer, bad: BadRows
    ) -> tuple[list[PreferenceRow], Ledger]:
        prepared = {row.problem.id: row for row in method.prepare(rows)}
        fitted, ledger = fit_preferences(
            recipe,
            list(prepared.values()),
            lambda row: method.responses(row, renderer),
            head_ids=renderer.head_ids,
            bad=bad,
            section=section_of(recipe, method.needs),
        )
        ledger.of_rows = None if len(prepared) == len(rows) else len(rows)
        rows_of = ((prepared[next(iter(responses.values())).problem_id], responses) for responses in fitted)
        return [PreferenceRow(row, responses, method.values(row)) for row, responses in rows_of], ledger

    def refuse_plan(self, recipe: Recipe, method: Any, items: Sequence[Any], plan: BatchPlan, vocabulary: int) -> None:
        section, stages = section_of(recipe, method.needs), method.order([item.row for item in items])
        if plan.max_steps < len(stages):
            raise BatchError(
                f"{plan.max_steps} steps cannot hold the {len(stages)} stages that method {recipe.method.name} makes "
                "of these rows",
                where="training.max_steps",
                hint=f"raise it to at least {len(stages)}, or let the method make fewer stages",
            )
        if len(stages) > 1 and stages_of(getattr(recipe.data, section), section) is not None:
            raise NeedsError(
                f"method {recipe.method.name} trains in stages, each over its own rows, so sources cannot be drawn by "
                "weight",
                where=f"data.{section}",
                hint="leave `weight` out of the sources",
            )
        StagedOrder(stages, plan.units_per_step, plan.max_steps, recipe.seed)

    def samples(self, item: PreferenceRow) -> dict[str, Sample]:
        return item.responses


class TraceRows(ShellRows):
    """Rewarded traces (offline)."""

    whole = True

    def fit(self, recipe: Recipe, method: Any, rows: Any, renderer: Renderer, bad: BadRows) -> tuple[list[Any], Ledger]:
        known, ledger = fit_known(recipe, rows, renderer, bad)
        return offline_rows(method.prepare(known), method.reward, method.steps, renderer), ledger

    def samples(self, item: Any) -> dict[str, Sample]:
        return {"sample": item.sample}


SHELL_ROWS: dict[str, ShellRows] = {
    "sft": ShellRows(),
    "online": PromptRows(),
    "preference": ResponseRows(),
    "reward": ResponseRows(),
    "offline": TraceRows(),
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows of a run, fitted and counted.

    Attributes:
        items: the rows in the form of the method's shell.
        ledger: what became of them; of rows that are read as they are needed, of those that were probed.
        traces: those that the method reads beside its rows.
        traces_ledger: what became of these; None if it reads none.
        plan: of a step.
        longest: tokens of the longest sequence that the run may train on.
        mixture: the sources of the rows.
    """

    items: Sequence[Any]
    ledger: Ledger
    traces: list[KnownTrace]
    traces_ledger: Ledger | None
    plan: BatchPlan
    longest: int
    mixture: Mixture

    def lines(self) -> list[str]:
        """What became of the rows, for people."""
        lines = self.ledger.lines()
        if not isinstance(self.items, StreamedSamples):
            return lines
        return [f"{len(self.items):,} rows, read when a step needs them; of a part of them: {lines[0]}", *lines[1:]]


def refuse(recipe: Recipe, method: Method, locations: Locations | None = None) -> None:
    """Refuse what the recipe alone shows to be wrong: keys, needs, and what the method's shell cannot do.

    Args:
        recipe, method: of the run.
        locations: places of the keys, for messages.

    Raises:
        PosttrainError: names the key.
    """
    check_needs(recipe, method.needs, recipe.method.name, locations)
    SHELL_ROWS[method.shell].refuse(recipe, method)
    if recipe.evaluation is not None:
        check_best(recipe.evaluation)


def prepare(
    recipe: Recipe,
    method: Method,
    rows: Rows,
    written: list[WrittenTrace],
    renderer: Renderer,
    *,
    vocabulary: int,
    world_size: int,
    bad: BadRows,
    locations: Locations | None = None,
) -> Prepared:
    """Everything that a run makes of its rows before a model is trained on them.

    Args:
        recipe, method: of the run.
        rows, written: as `load_rows` and `load_known` give them.
        renderer: with the policy's tokenizer.
        vocabulary: rows of the policy's embedding matrix.
        world_size: ranks.
        bad: holds the rows that could not be read, and takes those that cannot be rendered.
        locations: places of the keys, for messages.

    Raises:
        PosttrainError: rows that do not fit, too few of them, or a batch that does not divide.
    """
    shell = SHELL_ROWS[method.shell]
    items, ledger = shell.fit(recipe, method, rows, renderer, bad)
    plan = plan_batch(recipe, method.needs, world_size=world_size, rows=len(items), locations=locations)
    traces, traces_ledger = fit_known(recipe, written, renderer, bad) if written else ([], None)
    _enough_traces(plan, traces)
    _refuse_traces(method, traces)
    if recipe.evaluation is not None and recipe.evaluation.episodes is not None:
        evaluated = problems(recipe.evaluation.episodes.prompts, "evaluation.episodes")
        if isinstance(recipe.environment, Recorded.Config):
            _refuse_unrecorded(recipe.environment, evaluated)
    shell.refuse_plan(recipe, method, items, plan, vocabulary)
    mixture = Mixture.of(recipe, method.needs, plan, shell.sources(items))
    lengths = [shell.tokens(recipe, item) for item in at_hand(items)]
    longest = _longest(recipe, method, lengths, plan, traces)
    return Prepared(items, ledger, traces, traces_ledger, plan, longest, mixture)


def _enough_traces(plan: BatchPlan, traces: Sequence[KnownTrace]) -> None:
    if plan.expert_rows > len(traces):
        raise BatchError(
            f"a step takes {plan.expert_rows} expert rows, and there are {len(traces)} traces",
            where="data.traces",
            hint="give more traces, or let the method take fewer per step",
        )


def _refuse_traces(method: Method, traces: Sequence[KnownTrace]) -> None:
    """Refuse traces that the method's starts cannot be in: tokens of episodes, and turns of anything else."""
    if not isinstance(method, OnlineMethod) or not method.chooses_starts:
        return
    other = next((trace for trace in traces if (trace.episode is None) == method.replays), None)
    if other is not None:
        raise DataError(
            "a trace that is no episode cannot be played again"
            if method.replays
            else "an episode is played again turn by turn, and not gone on from in the middle of one",
            where=other.asked.where or other.asked.id,
            hint="give files of `posttrain play --out`" if method.replays else "set method.boundary: turn",
        )


def _longest(recipe: Recipe, method: Method, lengths: list[int], plan: BatchPlan, traces: Sequence[KnownTrace]) -> int:
    new = 0 if recipe.rollouts is None else recipe.rollouts.max_new_tokens
    # A prefix is a part of a trace, and completions follow it; an expert row is a whole one.
    beside = [trace.length + (0 if plan.expert_rows else new) for trace in traces]
    if method.needs.companion(Writer) is not None:  # likewise behind a part of what it has written
        beside.append(max(lengths) + new)
    return max([*lengths, *beside])
