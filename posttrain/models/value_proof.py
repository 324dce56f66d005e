"""Proof before step 1 for sequence classifiers: reward models that are trained, and value models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.proof import MARGIN, rms, rounded_layers, rounding, trial_rows, undisturbed, whole


def prove_classifier(model: PreTrainedModel, rows: Sequence[Sequence[int]] | None = None) -> None:
    """That rows padded on the right score as each does alone, which the `reward` shell rests on.

    Args:
        model: a sequence classifier that knows its pad id, before anything wraps it.
        rows: token ids of rows of the run; None for made-up ones.

    Raises:
        ModelError: they do not.
    """
    if not whole(model):
        return
    pad = model.config.pad_token_id
    taken = [[token for token in row if token != pad] or [pad + 1] for row in trial_rows(model, rows)]
    width = max(map(len, taken))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in taken], device=model.device)
    lengths = torch.tensor([[len(row)] for row in taken], device=model.device)
    attending = (torch.arange(width, device=model.device) < lengths).long()

    def alone() -> Tensor:
        found = [model(input_ids=ids[i : i + 1, :n], attention_mask=attending[i : i + 1, :n]) for i, n in places]
        return torch.cat([each.logits for each in found])

    places = list(enumerate(map(len, taken)))
    with undisturbed(model), torch.no_grad():
        exact, together = alone(), model(input_ids=ids, attention_mask=attending, use_cache=False).logits
        with rounded_layers(model):
            rounded = alone()
    allowed = MARGIN * max(rms(rounded - exact), rounding(exact.dtype) * rms(exact))
    if not rms(together - exact) <= allowed:
        raise ModelError(
            f"classifiers of type {model.config.model_type!r} score a padded row otherwise than alone: by "
            f"{rms(together - exact):.2g}, where rounding makes {allowed:.2g}",
            where="model.path",
            hint="take a decoder family such as llama, qwen2, qwen3, mistral, gemma",
        )


def prove_values(classifier: PreTrainedModel, head: nn.Module, where: str = "critic.path") -> None:
    """That a classifier's head reads the last hidden states of its backbone and nothing else.

    Raises:
        ModelError: it reads something else, so that values from hidden states would be others than the classifier's.
    """
    if not whole(classifier):
        return
    ids = torch.tensor([trial_rows(classifier, None)[0]], device=classifier.device)
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    try:
        with undisturbed(classifier), torch.no_grad():
            classifier(input_ids=ids, use_cache=False)
            states = classifier.base_model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    if (
        len(read) == 1
        and read[0].shape == states.shape
        and rms(read[0] - states) <= MARGIN * rounding(states.dtype) * rms(states)
    ):
        return
    raise ModelError(
        f"the head of classifiers of type {classifier.config.model_type!r} reads something else than the last hidden "
        "states, so it gives no number for each token",
        where=where,
        hint="use a decoder family such as llama, qwen2, qwen3, mistral, gemma",
    )
