"""The batch table: everything that follows from the recipe's batch numbers and the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain.config.locations import Locations
from posttrain.config.needs import Needs
from posttrain.config.positions import model_positions
from posttrain.config.schema import Recipe
from posttrain.errors import BatchError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The batch arithmetic of a run.

    Attributes:
        unit: what the recipe counts, prompts or rows.
        units_per_step: prompts or rows per optimizer step over all ranks.
        sequences_per_unit: completions per prompt; 1 for rows.
        micro_batch: sequences per forward and backward pass on one rank.
        world_size: number of ranks.
        rows: prompts or rows in the data; None if not counted.
        epochs: passes over the data that the recipe asks for; None if it gives max_steps.
        max_steps: optimizer steps; None where it follows from rows that are not counted.
        sequence_tokens: most tokens one sequence can have; None without a limit in the recipe.
        expert_rows: traces beside the rollouts per optimizer step over all ranks.
        replayed: prompts among `units_per_step` whose groups come from the replay buffer, once it has some.
        minibatches: optimizer steps that a batch of rollouts is split over.
    """

    unit: str
    units_per_step: int
    sequences_per_unit: int
    micro_batch: int
    world_size: int
    rows: int | None
    epochs: float | None
    max_steps: int | None
    sequence_tokens: int | None
    expert_rows: int = 0
    replayed: int = 0
    minibatches: int = 1

    @property
    def prompts_per_rollout(self) -> int:
        """Over all ranks, those of replayed groups included."""
        return self.units_per_step * self.minibatches

    @property
    def replayed_per_rollout(self) -> int:
        """Of them those whose groups come from the replay buffer."""
        return self.replayed * self.minibatches

    @property
    def sequences_per_step(self) -> int:
        """Over all ranks, without expert rows."""
        return self.units_per_step * self.sequences_per_unit

    @property
    def sequences_per_rank(self) -> int:
        """Per optimizer step, without expert rows."""
        return self.sequences_per_step // self.world_size

    @property
    def expert_rows_per_rank(self) -> int:
        """Per optimizer step."""
        return self.expert_rows // self.world_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward and backward passes per optimizer step on one rank; expert rows have passes of their own."""
        return self.sequences_per_rank // self.micro_batch + math.ceil(self.expert_rows_per_rank / self.micro_batch)

    @property
    def total_sequences(self) -> int | None:
        """Sequences trained on in the whole run; None if max_steps is unknown."""
        return None if self.max_steps is None else self.max_steps * (self.sequences_per_step + self.expert_rows)

    @property
    def max_tokens(self) -> int | None:
        """Upper bound on the tokens trained on, prompts included; None if it is unknown."""
        if self.total_sequences is None or self.sequence_tokens is None:
            return None
        return self.total_sequences * self.sequence_tokens

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (label, value, how it is derived)."""
        grouped = self.sequences_per_unit > 1 or self.unit == "prompts"
        rows = [(f"{self.unit} per step", str(self.units_per_step), f"batch.{self.unit}_per_step")]
        if self.minibatches > 1:
            derived = "prompts per step x method.minibatches"
            rows.append(("prompts per rollout", str(self.prompts_per_rollout), derived))
        if grouped:
            rows.append(("samples per prompt", str(self.sequences_per_unit), "rollouts.samples_per_prompt"))
        if self.replayed:
            rows.append(("of them replayed", str(self.replayed), "prompts per step x rollouts.replay.share, rounded"))
        derived = "prompts per step x samples per prompt" if grouped else "rows per step"
        rows.append(("sequences per step", str(self.sequences_per_step), derived))
        accumulated, in_all = "sequences per rank / micro batch", "sequences per step x steps"
        if self.expert_rows:
            rows.append(("expert rows per step", str(self.expert_rows), "method; drawn from data.traces"))
            accumulated += " + expert rows per rank / micro batch, rounded up"
            in_all = "(sequences + expert rows per step) x steps"
        rows += [
            ("ranks", str(self.world_size), "world size"),
            ("sequences per rank", str(self.sequences_per_rank), "sequences per step / ranks"),
            ("micro batch", str(self.micro_batch), "batch.micro_batch"),
            ("accumulation steps", str(self.gradient_accumulation_steps), accumulated),
            (f"{self.unit} in the data", _number(self.rows, "not counted"), "data"),
            ("optimizer steps", _number(self.max_steps, "not known"), self._steps_from()),
            ("sequences in the run", _number(self.total_sequences, "not known"), in_all),
            ("tokens at most", _number(self.max_tokens, "no limit given"), self._tokens_from()),
        ]
        return rows

    def _steps_from(self) -> str:
        if self.epochs is None:
            return "training.max_steps"
        return f"{self.epochs:g} epochs x {self.unit} in the data / {self.unit} per step, rounded up"

    def _tokens_from(self) -> str:
        if self.sequence_tokens is None:
            return "set data.max_length for a bound"
        return f"{self.sequence_tokens} tokens per sequence, prompt included"


def _number(value: int | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:,}"


def plan_batch(
    recipe: Recipe, needs: Needs, *, world_size: int, rows: int | None, locations: Locations | None = None
) -> BatchPlan:
    """Derive the batch table.

    A step must split evenly over ranks and micro-batches, and the completions of a prompt stay on one rank.

    Args:
        recipe: has what the method needs (`check_needs` passed).
        needs: of the method.
        world_size: number of ranks.
        rows: prompts or rows in the data, after filtering; None if not counted.
        locations: places of the keys, for messages.

    Raises:
        BatchError: the numbers do not divide, or a step takes more rows than there are.
        ValueError: the recipe lacks the batch key or the rollouts section that the method needs.
    """
    units = getattr(recipe.batch, needs.batch_key)
    if units is None or (needs.rollouts and recipe.rollouts is None):
        raise ValueError("plan_batch needs a recipe that has passed check_needs")
    samples = recipe.rollouts.samples_per_prompt if needs.rollouts and recipe.rollouts else 1
    locations = locations or Locations("recipe")
    _check_division(recipe, needs, units, samples, world_size, locations)
    _check_expert_rows(needs, world_size, locations)
    replayed = _replayed(recipe, needs, units, world_size, locations)
    where = locations.where(("batch", needs.batch_key))
    unit = "prompts" if needs.rollouts else "rows"
    if rows is not None and units > rows:
        raise BatchError(
            f"a step takes {units} {unit}, and the data has {rows}",
            where=where,
            hint=_advice(needs, units, samples, recipe.batch.micro_batch, world_size, largest=rows),
        )
    if rows is not None and units * needs.minibatches > rows:
        raise BatchError(
            f"a batch of rollouts takes {units * needs.minibatches} prompts, {units} for each of {needs.minibatches} "
            f"minibatches, and the data has {rows}",
            where=locations.where(("method", "minibatches")),
            hint=f"lower it to {max(1, rows // units)}, or give more data or a smaller batch",
        )
    return BatchPlan(
        unit=unit,
        units_per_step=units,
        sequences_per_unit=samples,
        micro_batch=recipe.batch.micro_batch,
        world_size=world_size,
        rows=rows,
        epochs=recipe.training.num_train_epochs,
        max_steps=_steps(recipe, units, rows, replayed),
        sequence_tokens=sequence_tokens(recipe, needs),
        expert_rows=needs.expert_rows,
        replayed=replayed,
        minibatches=needs.minibatches,
    )


def sequence_tokens(recipe: Recipe, needs: Needs) -> int | None:
    """Most tokens that a sequence can have by the recipe's limits; None if it sets none.

    The smallest of data.max_length, the model's positions, and with rollouts data.max_prompt_length +
    rollouts.max_new_tokens, or of episodes environment.episode_tokens. Beside rollouts, traces have no limit of their
    own: they are expert rows, or prefixes.
    """
    limits = [recipe.data.max_length, model_positions(recipe.model)]
    if recipe.environment is not None and needs.rollouts:
        limits.append(recipe.environment.episode_tokens)
    only_prompts = needs.rollouts and "traces" not in needs.data and recipe.environment is None
    if only_prompts and recipe.rollouts is not None and recipe.data.max_prompt_length is not None:
        limits.append(recipe.data.max_prompt_length + recipe.rollouts.max_new_tokens)
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None


def _steps(recipe: Recipe, units: int, rows: int | None, replayed: int) -> int | None:
    epochs = recipe.training.num_train_epochs
    if epochs is None:
        return recipe.training.max_steps
    if rows is None:
        return None
    # The first step has nothing to replay. A tiny slack: 0.1 epochs of 10 rows is one row, not two, whatever the
    # rounding of the product.
    return max(1, math.ceil((epochs * rows - replayed) / (units - replayed) - 1e-9))


def _check_expert_rows(needs: Needs, world_size: int, locations: Locations) -> None:
    rows = needs.expert_rows
    if rows % world_size:
        around = sorted({rows // world_size * world_size, -(-rows // world_size) * world_size} - {0})
        raise BatchError(
            f"{rows} expert rows per step do not divide by {world_size} ranks",
            where=locations.where(("method",)),
            hint=f"nearest: {_either(around)} expert rows",
        )


def _replayed(recipe: Recipe, needs: Needs, units: int, world_size: int, locations: Locations) -> int:
    """Prompts of a step whose groups come from the replay buffer."""
    replay = recipe.rollouts.replay if needs.rollouts and recipe.rollouts is not None else None
    if replay is None:
        return 0
    replayed = round(replay.share * units)
    valid = [n for n in range(world_size, units, world_size) if (units - n) % world_size == 0]
    if replayed not in valid:
        nearest = sorted(valid, key=lambda n: (abs(n - replay.share * units), n))[:2]
        ranks = f" on {world_size} ranks" if world_size > 1 else ""
        raise BatchError(
            f"replay.share {replay.share:g} of {units} prompts is {replayed}{ranks}: fresh and replayed prompts of a "
            "step must both be there on every rank, and equally many on each",
            where=locations.where(("rollouts", "replay", "share")),
            hint="nearest: share " + " or ".join(f"{n / units:g}" for n in sorted(nearest))
            if nearest
            else f"raise batch.prompts_per_step to at least {2 * world_size}",
        )
    taken = replayed * needs.minibatches
    if replay.size < taken:
        raise BatchError(
            f"a batch of rollouts takes {taken} groups from a replay buffer of {replay.size}",
            where=locations.where(("rollouts", "replay", "size")),
            hint=f"raise size to at least {taken}",
        )
    return replayed


def _check_division(
    recipe: Recipe, needs: Needs, units: int, samples: int, world_size: int, locations: Locations
) -> None:
    micro_batch, total = recipe.batch.micro_batch, units * samples
    if units % world_size == 0 and total % (world_size * micro_batch) == 0:
        return
    counted = f"{units} prompts x {samples} samples = {total} sequences" if needs.rollouts else f"{total} rows"
    if units % world_size:
        kept = "; the samples of a prompt stay on one rank" if needs.rollouts else ""
        what = f"{units} {needs.batch_key.removesuffix('_per_step')} per step do not divide by {world_size} ranks{kept}"
    else:
        per_rank = f" on each of {world_size} ranks" if world_size > 1 else ""
        what = f"{counted} per step do not divide into micro-batches of {micro_batch}{per_rank}"
    raise BatchError(
        what,
        where=locations.where(("batch", needs.batch_key if units % world_size else "micro_batch")),
        hint=_advice(needs, units, samples, micro_batch, world_size),
    )


def _advice(
    needs: Needs, units: int, samples: int, micro_batch: int, world_size: int, largest: int | None = None
) -> str:
    """The nearest valid numbers below and above, for either key."""
    quantum = world_size * micro_batch // math.gcd(samples, micro_batch)
    top = units if largest is None else min(units, largest)
    around = sorted({top // quantum * quantum, -(-top // quantum) * quantum} - {0})
    around = [value for value in around if largest is None or value <= largest]
    parts = []
    if around:
        parts.append(f"{needs.batch_key} {_either(around)} with micro_batch {micro_batch}")
    if largest is None and units % world_size == 0:
        per_rank = units // world_size * samples
        small = [d for d in range(1, math.isqrt(per_rank) + 1) if per_rank % d == 0]
        divisors = sorted({*small, *(per_rank // d for d in small)})
        below = [d for d in divisors if d < micro_batch][-1:]
        above = [d for d in divisors if d > micro_batch][:1]
        parts.append(f"micro_batch {_either(below + above)} with {needs.batch_key} {units}")
    return "nearest: " + ", or ".join(parts) if parts else "give more data or a smaller batch"


def _either(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
