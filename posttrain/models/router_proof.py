"""Which load-balancing loss a mixture of experts is trained with, and the proof that ours is the model's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.proof import rounding, trial_rows, undisturbed
from posttrain.models.router import Routing, collecting
from posttrain.models.token_logps import token_logps
from posttrain.objectives.load_balancing import expert_counts, load_balancing_loss, probability_sums

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k")
"""What types call the number of experts that a token goes to."""

ROUNDED = 64
"""How many times the rounding of a number the loss of a few tokens may differ from the model's own: a token whose next
expert is as likely may go to either."""

NO_LOSS = "give no load-balancing loss of their routers"


def experts_per_token(config: PretrainedConfig) -> int | None:
    """How many experts a token goes to; None if the config does not say."""
    return next((int(k) for name in TOP_K if (k := getattr(config, name, None))), None)


def prove_router_loss(model: PreTrainedModel, rows: Sequence[Sequence[int]] | None = None) -> None:
    """Compare the load-balancing loss from our passes with the model's own, on a few rows.

    Args:
        model: the causal LM itself, ready for `token_logps`, in one piece.
        rows: token ids of rows of the run; None for made-up ones.

    Raises:
        ModelError: the model gives no such loss, or another one.
    """
    name, top_k = model.config.model_type, experts_per_token(model.config.get_text_config())
    if top_k is None:
        raise _without(name, NO_LOSS)
    taken = trial_rows(model, rows)
    lengths, width = torch.tensor([len(row) for row in taken])[:, None], max(map(len, taken))
    ids = torch.tensor([row + row[:1] * (width - len(row)) for row in taken], device=model.device)
    columns = torch.arange(width)
    real, mask = (columns < lengths).to(ids), (columns == lengths - 1).to(ids.device)
    with undisturbed(model), torch.no_grad():
        before = ids[:, :-1], (columns[:-1] < lengths - 1).to(ids)  # nothing is predicted from the last token
        try:
            own = model(input_ids=before[0], attention_mask=before[1], output_router_logits=True, use_cache=False)
        except TypeError:
            own = None
        if not isinstance(getattr(own, "aux_loss", None), torch.Tensor):
            raise _without(name, NO_LOSS)
        with collecting(gradient=False) as passes:
            token_logps(model, ids, real, mask)
        found = loss_of(passes, top_k)
    limit = ROUNDED * max(rounding(model.dtype), torch.finfo(torch.float32).eps) * abs(float(own.aux_loss))
    if not abs(float(found) - float(own.aux_loss)) <= limit:
        raise _without(name, f"have another load-balancing loss: {float(own.aux_loss):.6g}, by ours {float(found):.6g}")


def loss_of(passes: Sequence[Routing], top_k: int) -> torch.Tensor:
    """The loss of all tokens of some passes together."""
    counts = sum(expert_counts(each.logits, each.weights, top_k) for each in passes)
    return load_balancing_loss(
        counts, sum(probability_sums(each.logits, each.weights) for each in passes), counts.sum() / top_k
    )


def _without(name: str, what: str) -> ModelError:
    return ModelError(f"models of type {name!r} {what}", where="model.router_loss", hint="set it to 0, or leave it out")
