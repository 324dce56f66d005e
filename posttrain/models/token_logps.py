"""Log-probs of tokens from a causal LM: only the positions that are asked for, shared prompts once, no padding.

`prepare` gives a model the way to do it; `token_logps` asks for it through whatever wraps the model (DDP, DeepSpeed,
PEFT), so that their hooks run. Exact up to rounding; see docs/design/0003-shared-prefix.md.
"""

from __future__ import annotations

import functools
import logging
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.models.full_divergence import ReferenceStates
from posttrain.models.proof import prove_scoring
from posttrain.models.scored_head import Scores
from posttrain.models.scoring_pass import Scoring, Wanted
from posttrain.models.sharing import follow_layouts
from posttrain.objectives.action_mask import ActionMask
from posttrain.objectives.next_token import NextTokenDivergence

_log = logging.getLogger(__name__)


def prepare(model: PreTrainedModel, *, temperature: float = 1.0) -> bool:
    """Let `token_logps` use a model; calls without it are untouched.

    The way it scores is the one that `proof.prove_scoring` has found; where nobody has asked it, it is asked now.

    Args:
        model: the causal LM itself, not what wraps it; with PEFT the base model.
        temperature: what logits are divided by, as in the engine that samples.

    Returns:
        Whether its passes are packed: without padding, and with shared prompts once.

    Raises:
        ModelError: its log-probs cannot be computed, see `prove_scoring`.
    """
    proof = prove_scoring(model)
    if proof.way == "packed":
        follow_layouts(model)
    elif proof.way == "rows":
        _say_once(f"no shared prompts in training: {proof.why}; every row is computed whole")
    else:
        _say_once(f"whole logits in training, vocabulary times tokens of a micro-batch: {proof.why}")
    plain = model.forward.__func__
    scoring = Scoring(proof.way, plain, temperature)

    @functools.wraps(type(model).forward)  # generation checks its arguments against the signature
    def forward(self: PreTrainedModel, *args: Any, wanted: Wanted | None = None, **kwargs: Any) -> Any:
        if wanted is None:
            return plain(self, *args, **kwargs)
        # A wrapper (PEFT) adds arguments that nobody gave, all None.
        return scoring(self, kwargs["input_ids"], wanted)

    model.forward = MethodType(forward, model)
    return proof.way == "packed"


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def token_logps(
    model: torch.nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    *,
    entropy: bool = False,
    top1: bool = False,
    action_mask: ActionMask | None = None,
) -> Scores:
    """Log-probs of the tokens under `mask`, aligned to tokens: [i, t] is that of token t of row i.

    Args:
        model: a model that went through `prepare`, possibly wrapped.
        ids, attention_mask, mask: (B, T) right-padded; mask[:, 0] must be 0, as nothing predicts the first token.
        entropy: also entropies of the next-token distributions in nats, without gradient.
        top1: also 1 where the token was the likeliest.
        action_mask: all of that for the policy renormalised over the tokens that this mask allows. Costs one more
            forward pass.

    Returns:
        (B, T) each, 0 outside of `mask`; float32, or float64 for such a model.

    Raises:
        ValueError: the rows are padded on the left.
    """
    wanted = Wanted(mask, attention_mask, entropy, top1, action_mask=action_mask)
    return Scores(*_ask(model, ids, attention_mask, wanted)[:3])


def token_logps_and_values(
    model: torch.nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    *,
    entropy: bool = False,
    top1: bool = False,
    action_mask: ActionMask | None = None,
) -> tuple[Scores, Tensor]:
    """As `token_logps`, and the values of the critic in the model (`models.value.attach`), from the same pass.

    Returns:
        The scores, and values (B, T) with gradient: [i, t] is that of the state before token t of row i; 0 outside of
        `mask`. Those of a critic with several heads are (heads, B, T).
    """
    wanted = Wanted(mask, attention_mask, entropy, top1, values=True, action_mask=action_mask)
    found = _ask(model, ids, attention_mask, wanted)
    return Scores(*found[:3]), found[3]


def token_logps_and_divergence(
    model: torch.nn.Module,
    ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    reference: ReferenceStates,
    divergence: NextTokenDivergence,
    *,
    entropy: bool = False,
    top1: bool = False,
    values: bool = False,
) -> tuple[Scores, Tensor | None, Tensor]:
    """As `token_logps`, with the divergence from a frozen model over the whole vocabulary, from the same pass.

    Args:
        reference: from `token_states`, of the same rows and mask.
        divergence: of the policy's next-token distribution from the reference's.
        values: also those of the critic.

    Returns:
        The scores; values (B, T) or None; and the divergence in nats (B, T) with gradient: [i, t] is that of
        the distributions that token t of row i was drawn from; 0 outside of `mask`.
    """
    wanted = Wanted(mask, attention_mask, entropy, top1, values=values, reference=reference, divergence=divergence)
    found = _ask(model, ids, attention_mask, wanted)
    return Scores(*found[:3]), found[3], found[4]


@torch.no_grad()
def token_states(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> ReferenceStates:
    """What `token_logps_and_divergence` reads of a reference. Arguments as in `token_logps`."""
    return _ask(model, ids, attention_mask, Wanted(mask, attention_mask, logps=False, states=True))[5]


def token_values(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """The values alone, as in `token_logps_and_values`."""
    return _ask(model, ids, attention_mask, Wanted(mask, attention_mask, logps=False, values=True))[3]


def _ask(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, wanted: Wanted) -> tuple[Any, ...]:
    if not bool(attention_mask[:, 0].all()):
        raise ValueError("rows must be padded on the right")
    return model(input_ids=ids, wanted=wanted)
