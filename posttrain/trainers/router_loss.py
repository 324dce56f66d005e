"""The load-balancing loss of a policy's routers, added to each step of a shell; what `model.router_loss` asks for.

It is the loss of the whole step: how often tokens go to an expert is counted over all its micro-batches and ranks, and
so is the mean probability. The first has no gradient and the second is a sum over tokens, so the gradient is the same
for every split of a step. The price: where a step has several micro-batches, experts are counted beforehand, in a
forward pass of each without gradient and without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.config.model_types import router_coefficient
from posttrain.config.schema import ModelConfig
from posttrain.models.modes import without_dropout
from posttrain.models.router import Routing, collecting
from posttrain.models.router_proof import experts_per_token, prove_router_loss
from posttrain.models.token_logps import token_logps
from posttrain.objectives.load_balancing import expert_counts, load_balancing_loss, probability_sums
from posttrain.trainers.sharded_start import of_the_weights

if TYPE_CHECKING:
    from posttrain.models.collate import Tensors
    from posttrain.trainers.shell import Shell


class RouterLoss:
    """The loss of one shell's policy."""

    def __init__(self, shell: Shell, coefficient: float, top_k: int) -> None:
        """
        Args:
            shell: whose policy it is.
            coefficient: what the loss is multiplied with.
            top_k: experts that a token goes to.
        """
        self.shell, self.coefficient, self.top_k = shell, coefficient, top_k
        self._counts: Tensor | None = None

    def begin_step(self, batches: Sequence[Tensors]) -> None:
        """Count experts over the micro-batches of a step if there are several. Called on all ranks."""
        self._counts = None
        if len(batches) == 1:
            return
        shell = self.shell
        with torch.no_grad(), without_dropout(shell.model), collecting(gradient=False) as passes:
            for inputs in batches:
                for rows in shell.policy_rows(inputs):
                    names = ("ids", "attention_mask", "mask")
                    ids, attending, mask = (rows[name].to(shell.accelerator.device) for name in names)
                    with shell.accelerator.autocast():
                        token_logps(shell.model, ids, attending, mask)
                    shell.ledger.scored(int(attending.sum()), "policy", pixels=shell.pixels(rows))
        self._counts = self._over_ranks(passes)

    def term(self, passes: Sequence[Routing]) -> Tensor:
        """What a micro-batch on this rank adds to the loss of the step. Called on all ranks.

        Args:
            passes: of this micro-batch, collected with gradient.
        """
        counts = self._over_ranks(passes) if self._counts is None else self._counts
        routed = counts.sum() / self.top_k
        probabilities = sum(probability_sums(each.logits, each.weights) for each in passes)
        loss = load_balancing_loss(counts, probabilities, routed.clamp(min=1))
        share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).max()
        mine = probabilities.detach().sum()
        self.shell.record({"router_loss": (loss.detach() * routed, mine), "busiest_expert_share": (share, 1)})
        return self.coefficient * loss

    def _over_ranks(self, passes: Sequence[Routing]) -> Tensor:
        counts = sum(expert_counts(each.logits, each.weights, self.top_k) for each in passes)
        return self.shell.accelerator.reduce(counts, reduction="sum")


def router_loss(shell: Shell, section: ModelConfig, config: dict[str, Any], rows: Sequence[Any]) -> RouterLoss | None:
    """The loss that a recipe and the model's config ask for, proven to be the model's own; None without one.

    Args:
        shell: whose policy is ready to be scored, and in one piece.
        section: of the recipe.
        config: of the text model, as it was loaded.
        rows: token ids of rows of the run.

    Raises:
        ModelError: the model gives no such loss, or another one.
    """
    coefficient = router_coefficient(section.router_loss, config)
    if not coefficient:
        return None
    policy = shell.model.get_base_model() if isinstance(shell.model, PeftModel) else shell.model
    of_the_weights(PartialState(), lambda: prove_router_loss(policy, rows))
    shell.tracker.message(_said(policy, section, coefficient))
    top_k = experts_per_token(policy.config.get_text_config())
    assert top_k is not None  # as proven
    return RouterLoss(shell, coefficient, top_k)


def _said(policy: PreTrainedModel, section: ModelConfig, coefficient: float) -> str:
    told = f"the routers' load-balancing loss is trained with coefficient {coefficient:g}"
    if not section.adapted:
        return told
    return f"{told}; routers without an adapter are frozen, and it moves only what they read"
