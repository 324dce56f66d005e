"""What a loss, its counts and its advantages must keep, in float64 on small random batches; no model and no trainer.

Each check takes a method, raises `Broken` with what differs, and returns why it does not apply to this method, if so.
The first sentence of its docstring is what a report says of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.overrides import TorchFunctionMode

from posttrain.contract.batches import (
    ROWS,
    batch_of,
    before_estimates,
    before_the_forward,
    each,
    logits_of,
    padded,
    roles_of,
    scored,
    shifted,
    single,
    split,
    spoilt,
    unmasked,
)
from posttrain.errors import PosttrainError
from posttrain.methods.base import ActorCriticMethod, Method, OnlineMethod, PreferenceMethod
from posttrain.objectives.batch import LossSum, PreferenceBatch, TokenBatch, Unit

Check = Callable[[Method[Any]], str | None]


class Broken(PosttrainError):
    """A method that does not keep the contract."""


def any_split_gives_the_same_gradient(method: Method[Any]) -> str | None:
    """Any split of a batch over micro-batches and ranks gives the same loss and gradient."""
    whole, value = gradient(method, ROWS)
    hold(bool(whole.abs().max() > 0), "the loss has no gradient at all on a random batch")
    for rows in (1, 2, 3, 4):
        parts, parts_value = gradient(method, rows)
        differs = f"with {rows} rows per micro-batch {{}} is another: does the loss divide by a count of its own?"
        same(parts_value, value, differs.format("the loss"))
        same(parts, whole, differs.format("the gradient"))
    return None


def counts_are_those_of_the_loss(method: Method[Any]) -> str | None:
    """Counts are known before the forward pass, and are those of the loss."""
    batch = batch_of(method, logits_of(method))
    counts = method.counts(before_the_forward(batch))
    sums = method.loss(batch)
    hold(set(sums) == set(counts), f"`counts` has the terms {sorted(counts)}, `loss` {sorted(sums)}")
    for term, part in sums.items():
        hold(isinstance(part, LossSum), f"term {term!r} is a {type(part).__name__}, no LossSum")
        hold(part.unit in get_args(Unit), f"term {term!r} counts {part.unit!r}; known: {', '.join(get_args(Unit))}")
        hold(
            float(part.count) == float(counts[term]) > 0,
            f"term {term!r}: `counts` says {float(counts[term]):g}, the loss {float(part.count):g}",
        )
        if isinstance(batch, TokenBatch):
            expected = units(batch.experts if term == "expert" else batch.rollouts, part.unit)
            hold(
                expected is None or float(part.count) == expected,
                f"term {term!r} counts {float(part.count):g} {part.unit}, and the mask has {expected}",
            )
    return None


def padding_changes_nothing(method: Method[Any]) -> str | None:
    """Padding on either side changes nothing."""
    plain, value = gradient(method, ROWS)
    for side in ("left", "right"):
        grown, grown_value = gradient(method, ROWS, partial(padded, side=side))
        same(grown_value, value, f"padding on the {side} changes the loss")
        same(grown, plain, f"padding on the {side} changes the gradient")
    return None


def values_outside_the_mask_change_nothing(method: Method[Any]) -> str | None:
    """Values at positions outside the mask change nothing."""
    plain, value = gradient(method, ROWS)
    other, other_value = gradient(method, ROWS, spoilt)
    same(other_value, value, "the loss reads values outside the mask")
    same(other, plain, "the gradient depends on values outside the mask")
    return None


def an_empty_batch_gives_a_zero(method: Method[Any]) -> str | None:
    """A batch with nothing to train on gives a zero that one can call backward on."""
    grad, value = gradient(method, ROWS, unmasked)
    hold(float(value) == 0, f"the loss of an empty batch is {float(value):g}")
    hold(not bool(grad.any()), "an empty batch has a gradient")
    return None


def the_gradient_is_that_of_the_value(method: Method[Any]) -> str | None:
    """The gradient is the derivative of the value, with what the loss detaches held fixed (gradcheck)."""
    fixed = _Fixed()

    def loss(logits: Tensor) -> Tensor:
        with fixed.again():
            return total([part.value for part in method.loss(batch_of(method, logits)).values()])

    logits = logits_of(method).requires_grad_()
    try:
        # In one direction with a part in every logit: to a millionth of the slope, so that one wrong entry shows among
        # all others. Entry by entry it takes ten times as long.
        torch.autograd.gradcheck(loss, (logits,), atol=1e-8, rtol=1e-6, fast_mode=True)
    except GradcheckError as error:
        raise Broken(str(error).strip().splitlines()[0]) from error
    return None


def diagnostics_are_detached_sums(method: Method[Any]) -> str | None:
    """Diagnostics are sums with counts above 0, without gradient."""
    for term, part in method.loss(batch_of(method, logits_of(method).requires_grad_())).items():
        for name, (value, n) in part.diagnostics.items():
            attached = getattr(value, "requires_grad", True) or getattr(n, "requires_grad", True)
            hold(not attached, f"{name!r} of term {term!r} is no tensor, or has a gradient: detach it")
            hold(float(n) > 0, f"{name!r} of term {term!r} has the count {float(n):g}")
    return None


def a_row_with_an_empty_response_says_nothing(method: Method[Any]) -> str | None:
    """A row with an empty response counts for nothing and gets no gradient."""
    if not isinstance(method, PreferenceMethod):
        return "no responses that are compared"
    logits = logits_of(method).requires_grad_()
    batch = batch_of(method, logits)
    assert isinstance(batch, PreferenceBatch)
    usable = batch.usable
    whole, kept = method.loss(batch), method.loss(batch.rows(usable))
    for term in whole:
        same(whole[term].count, kept[term].count, f"the count of {term!r} has rows with an empty response in it")
        same(whole[term].value, kept[term].value, f"the value of {term!r} has rows with an empty response in it")
        rows = {"groups": True, "pairs": len(roles_of(method)) == 2}.get(whole[term].unit, False)
        hold(
            not rows or float(whole[term].count) == float(usable.sum()),
            f"term {term!r} counts {float(whole[term].count):g} {whole[term].unit} in {int(usable.sum())} usable rows",
        )
    (grad,) = torch.autograd.grad(total([part.value for part in whole.values()]), logits)
    hold(not bool(grad[:-1, ~usable].any()), "a row with an empty response has a gradient")  # the last one is samples
    return None


def advantages_leave_unknown_rows_out(method: Method[Any]) -> str | None:
    """Rollouts that nobody could judge get advantage 0, are not kept, and change no other."""
    if not isinstance(method, OnlineMethod):
        return "no advantages"
    if not method.needs.verifier:
        return "nobody judges its rollouts"
    rows = scored()
    advantages = method.advantages(rows)
    of_rows = advantages if advantages.dim() == 1 else advantages[:, 0]
    hold(of_rows.shape == (ROWS,), f"advantages have the shape {tuple(advantages.shape)}, not ({ROWS},)")
    hold(not bool(advantages[~rows.known].any()), "a row that nobody could judge has an advantage")
    hold(not bool(method.keep(rows)[~rows.known].any()), "a row that nobody could judge is kept")
    other = replace(rows, rewards=torch.where(rows.known, rows.rewards, torch.full_like(rows.rewards, 99)))
    hold(torch.equal(method.advantages(other), advantages), "the reward of a row that nobody could judge is read")
    return None


def advantages_follow_their_rows(method: Method[Any]) -> str | None:
    """Advantages follow their rows, in whatever order these come."""
    if not isinstance(method, OnlineMethod):
        return "no advantages"
    rows = scored()
    advantages = method.advantages(rows)
    if any(not torch.equal(method.advantages(replace(rows, seed=seed)), advantages) for seed in range(1, 9)):
        return "they are drawn by a row's place"
    order = torch.tensor([5, 0, 7, 2, 4, 1, 3, 6])
    names = ("rewards", "outcomes", "known", "groups", "lengths", "finished", "turn_rewards", "turns", "episodes")
    tensors: dict[str, Any] = {name: getattr(rows, name)[order] for name in names}
    tuples: dict[str, Any] = {
        k: tuple(getattr(rows, k)[i] for i in order) for k in ("kinds", "problem_ids", "infos", "verdicts")
    }
    same(
        method.advantages(replace(rows, **tensors, **tuples)), advantages[order], "rows in another order get other ones"
    )
    return None


def fresh_rollouts_need_no_old_logps(method: Method[Any]) -> str | None:
    """Without old log-probs, as the shell gives none for fresh rollouts, the loss is that of the policy's own."""
    if not isinstance(method, OnlineMethod) or method.needs.old_logps or method.updates_per_rollout > 1:
        return "the shell gives them always"
    plain, value = gradient(method, ROWS, lambda tokens: replace(tokens, old_logps=None))
    own, own_value = gradient(method, ROWS, lambda tokens: replace(tokens, old_logps=_values(tokens.logps)))
    same(value, own_value, "the loss is another without `old_logps`")
    same(plain, own, "the gradient is another without `old_logps`")
    return None


def log_ratios_of_any_size_are_finite(method: Method[Any]) -> str | None:
    """Loss and gradient are finite however far the policy is from the one that sampled, and from the reference."""
    for size in (25.0, -25.0, 100.0, -100.0, 3000.0, -3000.0):
        shifts = torch.tensor([size, 0.0, size, -size, 0.0, size], dtype=torch.float64)
        grad, value = gradient(method, ROWS, partial(_shifted_alone, by=shifts))
        finite = bool(value.isfinite()) and bool(grad.isfinite().all())
        hold(finite, f"not finite {abs(size):g} nats away: bound the ratio (`objectives.policy_gradient`)")
    return None


def _shifted_alone(tokens: TokenBatch, by: Tensor) -> TokenBatch:
    return single(shifted(tokens, by))


def estimates_are_of_one_row_each(method: Method[Any]) -> str | None:
    """Advantages and returns that are made of values are those of each row alone."""
    if not isinstance(method, ActorCriticMethod) or not method.needs.critic:
        return "no critic that advantages are made of"
    batch = before_estimates(method, logits_of(method))
    whole = method.estimate(batch, method.token_rewards(batch))
    rows = [batch.rows(slice(row, row + 1)) for row in range(ROWS)]
    single = [method.estimate(row, method.token_rewards(row)) for row in rows]
    for name in ("advantages", "returns"):
        parts = torch.cat([getattr(one, name) for one in single])
        same(parts, getattr(whole, name), f"{name} of a row depend on the rows beside it")
    hold(not bool(whole.advantages[~batch.mask].any()), "there are advantages outside of the mask")
    return None


CHECKS: tuple[Check, ...] = (
    counts_are_those_of_the_loss,
    any_split_gives_the_same_gradient,
    padding_changes_nothing,
    values_outside_the_mask_change_nothing,
    an_empty_batch_gives_a_zero,
    the_gradient_is_that_of_the_value,
    diagnostics_are_detached_sums,
    a_row_with_an_empty_response_says_nothing,
    advantages_leave_unknown_rows_out,
    advantages_follow_their_rows,
    fresh_rollouts_need_no_old_logps,
    log_ratios_of_any_size_are_finite,
    estimates_are_of_one_row_each,
)


def gradient(
    method: Method[Any], rows: int, change: Callable[[TokenBatch], TokenBatch] = lambda tokens: tokens
) -> tuple[Tensor, Tensor]:
    """Gradient and value by the shell's arithmetic: sums over micro-batches, each term divided once by its count.

    Args:
        rows: of a micro-batch.
        change: what is done to the batch before it is split.
    """
    logits = logits_of(method).requires_grad_()
    parts = split(each(batch_of(method, logits), change), rows)
    counts: dict[str, Tensor] = {}
    for part in parts:
        for term, n in method.counts(before_the_forward(part)).items():
            counts[term] = counts.get(term, torch.zeros(())) + n
    terms = []
    for part in parts:
        sums = method.loss(part)
        hold(set(sums) == set(counts), f"a micro-batch has the terms {sorted(sums)}, the whole {sorted(counts)}")
        terms += [found.value / counts[term].clamp(min=1) for term, found in sums.items()]
    loss = total(terms)
    hold(loss.requires_grad, "the loss does not depend on the policy: no gradient can be taken")
    (grad,) = torch.autograd.grad(loss, logits)
    return grad, loss.detach()


def units(batch: TokenBatch, unit: str) -> int | None:
    """How many of them the mask has; None where it does not say."""
    if unit == "tokens":
        return int(batch.mask.sum())
    if unit == "sequences":
        return int(batch.mask.any(dim=1).sum())
    if unit == "steps" and batch.steps is not None:
        return sum(len(set(row[kept].tolist())) for row, kept in zip(batch.steps, batch.mask, strict=True))
    return None


def total(values: list[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack([value.double() for value in values]).sum()


def hold(true: bool, what: str) -> None:
    """Ends the check where something is not true.

    Raises:
        Broken: with `what`.
    """
    if not true:
        raise Broken(what)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Ends the check where two tensors are not equal but for the rounding of float64.

    Raises:
        Broken: with `what` and by how much.
    """
    try:
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-12, atol=1e-14)
    except AssertionError as error:
        by = [line for line in str(error).splitlines() if "bsolute difference" in line]
        raise Broken(f"{what} ({by[0].strip() if by else str(error).strip()})") from error


def _values(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


class _Fixed(TorchFunctionMode):
    """Holds fixed, from the first evaluation on, whatever a function makes of its input without a gradient.

    Detached factors, old log-probs, comparisons: then the numerical derivative is of what has a gradient alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Tensor] = []
        self.place: int | None = None

    def again(self) -> _Fixed:
        """Start another evaluation."""
        self.place = None if not self.held else 0
        return self

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        attached = any(isinstance(one, Tensor) and one.requires_grad for one in given)
        if not attached or not isinstance(result, Tensor) or result.requires_grad:
            return result
        if self.place is None:
            self.held.append(result.clone())
            return result
        held, self.place = self.held[self.place], self.place + 1
        return held.clone()
