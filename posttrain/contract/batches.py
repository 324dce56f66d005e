"""Small random batches as the shells build them, for any method: by its shell and its needs alone, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Origin, Preference, Problem, Sample, Stepwise, Unpaired
from posttrain.errors import DataError
from posttrain.methods.base import (
    ActorCriticMethod,
    Method,
    OfflineMethod,
    OnlineMethod,
    PointwiseMethod,
    PreferenceMethod,
    Scored,
    StepwiseMethod,
)
from posttrain.methods.companions import DIVERGENCE, Divergence, TargetCritic, ValueHeads
from posttrain.objectives.batch import HEAD, TARGET, PreferenceBatch, TokenBatch
from posttrain.objectives.turns import over_tokens

ROWS, WIDTH, VOCABULARY = 8, 6, 5
LENGTHS = (4, 1, 0, 5, 3, 5, 2, 1)
"""Trained tokens per row; one row has none."""
EXPERTS = [1, 5, 6]
"""Rows that an expert wrote, for methods that take some."""
LONGEST = 5
ROLES = ("chosen", "rejected", "gold", "fourth", *(f"further_{n}" for n in range(12)))
"""Responses that a row of preferences may have. `gold` is the name that one beside the two has by convention."""

Batch = TokenBatch | PreferenceBatch


def scored() -> Scored:
    """Verdicts on ROWS rollouts in two groups, one that nobody could judge and one that was cut."""
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return Scored(
        rewards=rewards,
        outcomes=torch.randint(0, 2, (ROWS,), generator=generator).double(),
        known=torch.tensor([True, True, True, False, True, True, True, True]),
        groups=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        lengths=torch.tensor(LENGTHS),
        finished=torch.tensor([True, True, True, True, True, False, True, True]),
        max_new_tokens=LONGEST,
        kinds=(Origin.POLICY, Origin.GUIDED) * (ROWS // 2),
        problem_ids=("prompts/0",) * 4 + ("prompts/1",) * 4,
        infos=({"optimal_value": 0.25},) * ROWS,
        verdicts=("correct", "no_answer", "wrong", "timeout", "wrong", "no_answer", "correct", "wrong"),
        turn_rewards=rewards.unsqueeze(1),  # each an episode of one turn
        turns=torch.ones(ROWS, dtype=torch.long),
        episodes=torch.arange(ROWS),
    )


def preference_rows(method: PreferenceMethod[Any]) -> list[Any]:
    """ROWS rows as the method prepares them, of scored responses with a few ties, or of one completion with a label.

    With as many responses as the method takes: four, or else the first number from two on that it does not refuse.

    Raises:
        DataError: it refuses every number, with what it says of four.
    """
    refused: DataError | None = None
    for count in (4, *(n for n in range(2, len(ROLES) + 1) if n != 4)):
        try:
            rows = method.prepare(_given_rows(method, ROLES[:count]))[:ROWS]
            for row in rows:
                method.responses(row, cast(Renderer, _OneToken()))
                method.values(row)
            return rows
        except DataError as error:
            refused = refused or error
    raise refused or DataError("it takes no rows")


def _given_rows(method: PreferenceMethod[Any], roles: Sequence[str]) -> list[Any]:
    """ROWS rows of the section that the method reads."""
    if method.needs.data == ("stepwise",):
        steps = tuple(f"step {number}" for number in range(LONGEST))
        labels = [tuple((row + number) % 4 > 0 for number in range(LONGEST)) for row in range(ROWS)]
        return [Stepwise(row.problem, steps, own) for row, own in zip(_preferences(method, roles), labels, strict=True)]
    if method.needs.data != ("unpaired",):
        return _preferences(method, roles)
    return [Unpaired(row.problem, row.chosen, number % 3 > 0) for number, row in enumerate(_preferences(method, roles))]


def responses_taken(method: PreferenceMethod[Any], wanted: int) -> int:
    """How many responses a row must have for the method: `wanted` if it takes that many, else what it does take."""
    for count in (wanted, *range(2, len(ROLES) + 1)):
        try:
            for row in method.prepare(_given_rows(method, ROLES[:count])):
                method.responses(row, cast(Renderer, _OneToken()))
                method.values(row)
            return count
        except DataError:
            continue
    return wanted


def roles_of(method: PreferenceMethod[Any]) -> list[str]:
    """The roles of its responses, from the method itself."""
    return list(method.responses(preference_rows(method)[0], cast(Renderer, _OneToken())))


def logits_of(method: Method[Any]) -> Tensor:
    """What stands for the model: logits per row and position, and per role where rows have several responses.

    The last block of a preference method is for the samples it may draw.
    """
    blocks = (len(roles_of(method)) + 1,) if isinstance(method, PreferenceMethod) else ()
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*blocks, ROWS, WIDTH, VOCABULARY, generator=generator, dtype=torch.float64)


def batch_of(method: Method[Any], logits: Tensor) -> Batch:
    """A batch as the method's shell would build it, from logits of `logits_of`."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(method, PreferenceMethod):
        return _preference_batch(method, logits, generator)
    batch = _tokens(method, logits, generator)
    if isinstance(method, OfflineMethod) and method.needs.samples:
        return replace(batch, expert=torch.arange(ROWS) % 2 == 1)
    if not isinstance(method, OnlineMethod):
        return batch
    rows = scored()
    expert = torch.zeros(ROWS, dtype=torch.bool)
    expert[EXPERTS if method.needs.expert_rows else []] = True
    mask = batch.mask & (method.keep(rows) | expert).unsqueeze(1)
    found = method.advantages(rows)
    if found.dim() == 2:
        return replace(batch, mask=mask, advantages=over_tokens(found, mask))
    advantages = torch.where(expert, 0.3, found)
    if method.needs.critic:
        spread = torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64) + 0.5
        advantages = advantages.unsqueeze(1) * spread
    return replace(batch, mask=mask, advantages=advantages, expert=expert if method.needs.expert_rows else None)


def before_estimates(method: ActorCriticMethod[Any], logits: Tensor) -> TokenBatch:
    """What the shell hands to `estimate`: `advantages` are the rewards of whole rows."""
    batch = _tokens(method, logits, torch.Generator().manual_seed(3))
    return replace(batch.mapped(Tensor.detach), advantages=method.advantages(scored()), returns=None)


def each(batch: Batch, change: Callable[[TokenBatch], TokenBatch]) -> Batch:
    """The batch with `change` applied to all its tokens."""
    if isinstance(batch, TokenBatch):
        return change(batch)
    responses = {role: change(tokens) for role, tokens in batch.responses.items()}
    return PreferenceBatch(responses, batch.values, None if batch.samples is None else change(batch.samples))


def split(batch: Batch, rows: int) -> Sequence[Batch]:
    """Micro-batches of that many rows. Samples come with the pairs, or with an odd number of rows on their own."""
    slices = [slice(start, start + rows) for start in range(0, ROWS, rows)]
    if isinstance(batch, TokenBatch) or batch.samples is None:
        return [batch.rows(part) for part in slices]
    samples = [batch.samples.rows(part) for part in slices]
    if rows % 2:
        alone = [PreferenceBatch({}, {}, part) for part in samples]
        return [replace(batch.rows(part), samples=None) for part in slices] + alone
    return [replace(batch.rows(part), samples=own) for part, own in zip(slices, samples, strict=True)]


def before_the_forward(batch: Batch) -> Batch:
    """What `counts` gets: nothing that a forward pass gives."""
    return each(batch, lambda tokens: replace(tokens, logps=None, scores=None, values=None, entropies=None))


def padded(tokens: TokenBatch, side: str) -> TokenBatch:
    """With three more positions on one side."""
    widths = (3, 0) if side == "left" else (0, 3)
    return tokens.mapped(lambda value: torch.nn.functional.pad(value, widths) if value.dim() == 2 else value)


def spoilt(tokens: TokenBatch) -> TokenBatch:
    """With other values at positions that are not trained on."""
    mask = tokens.mask

    def spoil(value: Tensor) -> Tensor:
        aligned = value.shape == mask.shape and value.dtype != torch.bool
        return torch.where(mask, value, torch.full_like(value, 7)) if aligned else value

    return tokens.mapped(spoil)


def shifted(tokens: TokenBatch, shifts: Tensor) -> TokenBatch:
    """With log-probs of sampling policy and reference moved by `shifts` (T,), the latter the other way."""
    old, reference = tokens.old_logps, tokens.ref_logps
    return replace(
        tokens,
        old_logps=None if old is None else old - shifts,
        ref_logps=None if reference is None else reference + shifts,
    )


def single(tokens: TokenBatch) -> TokenBatch:
    """In float32, as runs have it."""
    return tokens.mapped(lambda value: value.float() if value.dtype == torch.float64 else value)


def unmasked(tokens: TokenBatch) -> TokenBatch:
    """With nothing to train on."""
    return replace(tokens, mask=torch.zeros_like(tokens.mask))


def _tokens(
    method: Method[Any], logits: Tensor, generator: torch.Generator, lengths: Sequence[int] = LENGTHS
) -> TokenBatch:
    """Random completions of these lengths under these logits, off-policy, with what the method's needs name."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=generator)
    mask = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, WIDTH - LONGEST : WIDTH - LONGEST + length] = True

    def near(values: Tensor, scale: float) -> Tensor:
        return values.detach() + scale * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)

    def kept(values: Tensor) -> Tensor:
        return torch.where(mask, values, torch.zeros_like(values))

    distribution = logits.log_softmax(-1)
    logps = kept(distribution.gather(2, tokens.unsqueeze(2)).squeeze(2))
    # A critic, a classifier: any numbers that depend on the row's own logits.
    values = kept(logits[..., 1])
    made = {
        "logps": logps,
        "entropies": -(distribution.exp() * distribution).sum(-1).detach(),
        "old_logps": near(logps, 0.3),
        "ref_logps": near(logps, 0.3),
        "values": values,
        "old_values": near(values, 0.15),
        "returns": near(values, 0.5),
        "scores": kept(logits[..., 0]) if isinstance(method, StepwiseMethod) else (logits[..., 0] * mask).sum(1),
        "rewards": torch.arange(ROWS).double() % 3,
        "steps": (mask.cumsum(1) - 1).clamp(min=0).long() // 2,
    }
    given, divergence = _given(method), method.needs.companion(Divergence)
    if divergence is None:
        further = {name: near(logps, 0.3) for each in method.needs.companions for name in each.adds}
    else:  # from a model that gives every token the same probability
        uniform = torch.full_like(distribution, -math.log(VOCABULARY)).detach().flatten(0, 1)
        further = {DIVERGENCE: kept(divergence.between(distribution.flatten(0, 1), uniform).view(ROWS, WIDTH))}
    further |= _by_heads(method, [kept(logits[..., head % VOCABULARY]) for head in range(_all_heads(method))], near)
    kept_fields: dict[str, Any] = {name: made[name] for name in made if given[name]}
    return TokenBatch(mask=mask, max_length=LONGEST, further=further, **kept_fields)


def _all_heads(method: Method[Any]) -> int:
    """Heads of the critic that are all read for every row; 0 where a row has values of one."""
    heads = method.needs.companion(ValueHeads)
    return 0 if heads is None or heads.of_rows is not None else heads.number


def _by_heads(
    method: Method[Any], values: Sequence[Tensor], near: Callable[[Tensor, float], Tensor]
) -> dict[str, Tensor]:
    """Values by each of several heads, and those of the critic that follows."""
    found = {f"{HEAD}{head}": own for head, own in enumerate(values)}
    if method.needs.companion(TargetCritic) is not None:
        found |= {f"{TARGET}{head}": near(own, 0.15) for head, own in enumerate(values)}
    return found


def _given(method: Method[Any]) -> dict[str, bool]:
    """What the method's shell puts into a batch."""
    needs, offline = method.needs, isinstance(method, OfflineMethod)
    return {
        "logps": not needs.classifier,
        "entropies": not needs.classifier,
        "old_logps": isinstance(method, OnlineMethod),
        "ref_logps": needs.reference,
        "values": needs.critic and not _all_heads(method),
        "old_values": needs.critic and not offline,
        "returns": needs.critic and not offline,
        "scores": needs.classifier,
        "rewards": offline,
        "steps": isinstance(method, OfflineMethod) and method.steps is not None,
    }


def _preference_batch(method: PreferenceMethod[Any], logits: Tensor, generator: torch.Generator) -> PreferenceBatch:
    """Rows by role, the first two roles each with an empty completion, and samples where the method draws them."""
    rows = preference_rows(method)
    responses = {}
    for number, role in enumerate(roles_of(method)):
        lengths = [LENGTHS[(row - number) % ROWS] for row in range(ROWS)]
        lengths = lengths if number < 2 else [max(length, 1) for length in lengths]
        responses[role] = _tokens(method, logits[number], generator, lengths)
    each_row = [method.values(row) for row in rows]
    values = {name: torch.tensor([row[name] for row in each_row], dtype=torch.float64) for name in each_row[0]}
    if isinstance(method, PointwiseMethod):  # of the whole step, whatever it is split into
        method.observe(1.2, ROWS)
    if not method.needs.samples:
        return PreferenceBatch(responses, values)
    samples = _tokens(method, logits[-1], generator)
    assert samples.logps is not None and samples.ref_logps is not None  # a method that draws holds a reference
    sums = [torch.where(samples.mask, x.detach(), 0.0).sum(1) for x in (samples.logps, samples.ref_logps)]
    groups = torch.arange(ROWS) // method.needs.samples
    weights = method.online_weights(sums[0], sums[1], groups)
    return PreferenceBatch(responses, values, replace(samples, advantages=weights))


class _OneToken:
    """Stands in for a renderer where only the roles matter: the checks make their own tokens, one per character."""

    stop_ids = (0,)

    def sample(self, example: Example) -> Sample:
        written = [1] * len(example.completion)
        return Sample([0, *written], [0, *written], Origin.EXPERT, example.problem.id)

    conversation = sample

    def text(self, ids: Sequence[int]) -> str:
        return "." * len(ids)


def _preferences(method: PreferenceMethod[Any], roles: Sequence[str]) -> list[Preference]:
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number in range(ROWS):
        scores = torch.randint(1, 5, (len(roles),), generator=generator).double().tolist()
        scores[0] = scores[1] + number % 3 if len(roles) > 3 else scores[0]
        problem = Problem(f"pairs/{number}", "p", meta=dict(method.columns), where=f"pairs.jsonl:{number + 1}")
        texts = {role: f"{role} {number}" for role in roles}
        others: dict[str, Any] = {role: texts[role] for role in roles[2:]}
        rows.append(
            Preference(problem, texts["chosen"], texts["rejected"], others, dict(zip(roles, scores, strict=True)))
        )
    return rows
