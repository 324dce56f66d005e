"""Proof before step 1 that what we compute of a model is what the model itself computes.

A scoring pass that is faster than a model's own forward rests on what lies between hidden states and logits, and on an
attention that can be replaced. Neither can be read off a config for every model, and a wrong guess trains something
else in silence. So a few short rows go through the model's own forward, each alone, and through each way of
`models.scoring_pass`, the fastest first; the first that agrees in log-probs and gradients is used. What counts as
rounding is measured on the model itself: see `_Own.agrees`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ModelError
from posttrain.models.scoring_pass import Scoring, Wanted, Way
from posttrain.models.shared_prefix import Costs
from posttrain.models.sharing import EYES, flexes, follow_layouts, sharing_obstacle

ROW, SHARED = 16, 8
"""Tokens of a proof's rows, and of the beginning that two of them share."""

MARGIN = 16
"""How many times the rounding of a layer's output two ways of the same arithmetic may differ: a layer rounds some ten
times, which adds up to three times one rounding, and both ways do."""

GRADIENTS = 1 << 24
"""Elements of the parameters whose gradients are compared: the smallest first, which are the norms and biases of all
layers; of small models all."""

MARK = "scoring_proof"
"""Attribute of a model that holds its proof; a copy of the model has it too."""

FAILURES: tuple[type[Exception], ...] = (AttributeError, AssertionError, IndexError, KeyError, NotImplementedError)
FAILURES = (*FAILURES, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot be called in some way."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proven of a model before it is trained.

    Attributes:
        way: the fastest way that is right.
        why: why it is not the fastest of all; empty if it is.
    """

    way: Way
    why: str = ""


_known: dict[tuple[Any, ...], Proof] = {}


def prove_scoring(model: PreTrainedModel, rows: Sequence[Sequence[int]] | None = None) -> Proof:
    """The way in which a model's log-probs and gradients are its own.

    Asked once for a model and its copies, and in a process once for all models of one config, dtype and device. Draws
    nothing and leaves no gradient.

    Args:
        model: the causal LM itself, before anything wraps it.
        rows: token ids of rows of the run; None for made-up ones.

    Raises:
        ModelError: the model cannot be called with token ids alone, or reads tokens behind the one it predicts.
    """
    obstacle = sharing_obstacle(model)
    if model.get_output_embeddings() is None:  # a classifier, which is asked for values only
        return Proof("rows", obstacle) if obstacle else Proof("packed")
    marked = getattr(model, MARK, None)
    if marked is not None and (marked.way != "packed" or obstacle is None):
        return marked
    eyes = getattr(model, EYES, None)
    seen = eyes is not None and eyes.has_seen
    key = (type(model), model.config.to_json_string(use_diff=False), model.dtype, model.device.type, obstacle, seen)
    if key not in _known:
        first = _middle if eyes is None else eyes.first_scored
        taken = [_Row(ids, first(ids)) for ids in trial_rows(model, rows)]
        _known[key] = _prove(model, taken, obstacle) if whole(model) else _assumed(model, obstacle)
    setattr(model, MARK, _known[key])
    return _known[key]


def _middle(ids: Sequence[int]) -> int:
    return len(ids) // 2


def whole(model: PreTrainedModel) -> bool:
    """Whether the weights are here, and not taken apart over the ranks."""
    return not any(p.is_meta or isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def _assumed(model: PreTrainedModel, obstacle: str | None) -> Proof:
    """Of a model that is in parts, which cannot be tried: its own logits, unless its type is tested."""
    if obstacle is None:
        return Proof("packed")
    return Proof("logits", "its weights are not whole on any rank, so that nothing can be tried with it")


@dataclass(frozen=True, slots=True)
class _Row:
    """Token ids, and the place from which on they are scored."""

    ids: list[int]
    first: int


def trial_rows(model: PreTrainedModel, rows: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Token ids of two rows with a common beginning, and of a shorter one: those of the first rows of the run, as far
    as they reach, then any. A model that reads pictures gets some of those that it has seen."""
    config = model.config.get_text_config()
    vocabulary = min(model.get_input_embeddings().num_embeddings, config.vocab_size)
    tokens: list[int] = []
    eyes = getattr(model, EYES, None)
    for row in rows or () if eyes is None else eyes.texts(rows or ()):
        tokens += row
        if len(tokens) >= 3 * ROW:
            break
    tokens += [(7 * i * i + 3 * i + 1) % vocabulary for i in range(3 * ROW - len(tokens))]
    positions = getattr(config, "max_position_embeddings", None)
    if eyes is not None and (pictured := eyes.trial_rows(tokens, positions)):
        return pictured
    length = min(ROW, positions or ROW)
    shared = min(SHARED, length // 2)
    second, third = tokens[:shared] + tokens[ROW : ROW + length - shared], tokens[2 * ROW : 2 * ROW + shared + 1]
    return [tokens[:length], second, third]


# --------------------------------------------------------------------------------------------------------- the proof


@dataclass(frozen=True, slots=True)
class _Pass:
    """Log-probs (N,) of the scored tokens, row by row, and gradients of a weighted sum of them."""

    logps: Tensor
    grads: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Own:
    """The model's own forward, and the same with every layer's output rounded once more."""

    exact: _Pass
    rounded: _Pass

    def difference(self, other: _Pass) -> str | None:
        """What differs beyond rounding; None if nothing does.

        Root mean squares are compared: of log-probs over tokens, of gradients within a tensor.
        """
        eps = rounding(self.exact.logps.dtype)
        allowed = MARGIN * max(rms(self.rounded.logps - self.exact.logps), eps * rms(self.exact.logps))
        found = rms(other.logps - self.exact.logps)
        if not found <= allowed:
            return f"log-probs differ by {found:.2g} nats, where rounding makes {allowed:.2g}"
        total = math.sqrt(sum(float(grad.double().square().sum()) for grad in self.exact.grads))
        summed = eps * total * math.sqrt(len(self.exact.logps))  # over tokens, each sum rounded
        for exact, rounded, grad in zip(self.exact.grads, self.rounded.grads, other.grads, strict=True):
            allowed = MARGIN * (float((rounded - exact).double().norm()) + summed)
            found = float((grad - exact).double().norm())
            if not found <= allowed:
                return f"gradients differ by {found:.2g}, where rounding makes {allowed:.2g}"
        return None


def rounding(dtype: torch.dtype) -> float:
    """The relative error of a number; at least that of float32, in which models of any dtype compute some parts."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _prove(model: PreTrainedModel, rows: list[_Row], obstacle: str | None) -> Proof:
    name, why = model.config.model_type, obstacle or ""
    with undisturbed(model):
        # transformers' FlexAttention is compiled first, which takes a minute on a CPU if it works at all
        with _following_layouts(model) if obstacle is None and flexes(model) else nullcontext():
            own = _own(model, rows)
        if obstacle is None:
            with _following_layouts(model):
                unfit = _tried(model, "packed", rows, own)
            if unfit is None:
                return Proof("packed")
            why = f"with them, {unfit}"
        unfit = _tried(model, "rows", rows, own)
        if unfit is None:
            return Proof("rows", why)
        alone = _tried(model, "logits", rows, own)
    if alone is not None:
        raise ModelError(
            f"models of type {name!r} score a row otherwise beside longer ones: {alone}",
            where="model.path",
            hint="take a causal language model whose rows do not depend on each other",
        )
    return Proof("logits", f"from the hidden states of a model of type {name!r}, {unfit}")


@contextmanager
def _following_layouts(model: PreTrainedModel) -> Iterator[None]:
    implementation = model.config._attn_implementation
    follow_layouts(model)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _tried(model: PreTrainedModel, way: Way, rows: list[_Row], own: _Own) -> str | None:
    """How a way differs from the model's own forward."""
    try:
        return own.difference(_scored(model, way, rows))
    except FAILURES as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"it cannot be computed ({type(error).__name__})"


def _own(model: PreTrainedModel, rows: list[_Row]) -> _Own:
    try:
        exact = _alone(model, rows)
        with rounded_layers(model):
            rounded = _alone(model, rows)
        shorter = _alone(model, [replace(row, ids=row.ids[:-1]) for row in rows], gradients=False)
    except FAILURES as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"models of type {model.config.model_type!r} cannot be called with token ids alone: "
            f"{type(error).__name__}: {first_line}",
            where="model.path",
            hint="take a causal language model",
        ) from error
    own = _Own(exact, rounded)
    ends = torch.tensor([len(row.ids) - row.first for row in rows]).cumsum(0) - 1
    kept = torch.ones(len(exact.logps), dtype=torch.bool)
    kept[ends] = False
    cut = _Own(_Pass(exact.logps[kept], []), _Pass(rounded.logps[kept], [])).difference(shorter)
    if cut is not None:
        raise ModelError(
            f"this model of type {model.config.model_type!r} reads tokens behind the one that it predicts: without the "
            f"last token of a row, its {cut}",
            where="model.path",
            hint="take a causal language model; some types are one with `is_decoder: true` in their config.json only",
        )
    return own


def _alone(model: PreTrainedModel, rows: list[_Row], *, gradients: bool = True) -> _Pass:
    """By the model's own forward, every row in a pass of its own, without padding."""
    found = []
    for row in rows:
        ids = torch.tensor([row.ids], device=model.device)
        with torch.set_grad_enabled(gradients and bool(_compared(model))):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found.append(logps[row.first - 1 : -1].gather(-1, ids[0, row.first :, None]).squeeze(-1))
    return _pass(model, torch.cat(found))


def _scored(model: PreTrainedModel, way: Way, rows: list[_Row]) -> _Pass:
    """By one of our ways, all rows in a pass, what they share once if that way can."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + row.ids[:1] * (width - len(row.ids)) for row in rows], device=model.device)
    columns = torch.arange(width)
    lengths, firsts = torch.tensor([[len(row.ids), row.first] for row in rows]).unsqueeze(-1).unbind(1)
    attending, mask = columns < lengths, (columns >= firsts) & (columns < lengths)
    costs = Costs.of(model.config.get_text_config(), model.device, flex=flexes(model)) if way == "packed" else None
    if costs is not None:  # calls cost nothing, so what can be shared is
        costs = Costs(costs.token, costs.pair, 0.0, 0.0, costs.whole)
    scoring = Scoring(way, type(model).forward, costs=costs)
    wanted = Wanted(mask, attending.long().to(model.device))
    with torch.set_grad_enabled(bool(_compared(model))):
        logps = scoring(model, ids, wanted)[0]
    return _pass(model, logps[mask.to(logps.device)])


def _pass(model: PreTrainedModel, logps: Tensor) -> _Pass:
    if not logps.requires_grad:
        return _Pass(logps.detach(), [])
    compared = _compared(model)
    weights = torch.cos(torch.arange(len(logps), device=logps.device, dtype=logps.dtype))
    grads = torch.autograd.grad((logps * weights).sum(), compared, allow_unused=True)
    return _Pass(logps.detach(), [_or_zeros(grad, p) for grad, p in zip(grads, compared, strict=True)])


def _or_zeros(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad


def _compared(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters whose gradients are compared; none where none is trained, or none can be (FlexAttention)."""
    if flexes(model) and model.device.type == "cpu":
        return []
    chosen, elements = [], 0
    for parameter in sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel()):
        elements += parameter.numel()
        if elements > GRADIENTS:
            break
        chosen.append(parameter)
    return chosen


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and autocast, and with the state of the random generators as it was afterwards.

    Accelerate's autocast is within a `forward` that it gives the model, above the one that it keeps aside.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    casting = model.forward if "_original_forward" in vars(model) else None
    if casting is not None:
        model.forward = model._original_forward
    try:
        forked = torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])
        with forked, torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        if casting is not None:
            model.forward = casting
        for module, training in was_training.items():
            module.training = training
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value.grad_fn is not None:  # a recurrent state: no copy can be made
                    setattr(module, name, value.detach())


@contextmanager
def rounded_layers(model: PreTrainedModel) -> Iterator[None]:
    """Every layer's output is moved by one rounding up or down; the embeddings where no layers are found."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def moved(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            return None
        signs = torch.cos(torch.arange(hidden.numel(), device=hidden.device, dtype=torch.float32) ** 1.5).sign()
        found = hidden * (1 + rounding(hidden.dtype) * signs.to(hidden.dtype)).view_as(hidden)
        return (found, *output[1:]) if isinstance(output, tuple) else found

    with ExitStack() as hooks:
        for module in layers or [model.get_input_embeddings()]:
            hooks.callback(module.register_forward_hook(moved).remove)
        yield
