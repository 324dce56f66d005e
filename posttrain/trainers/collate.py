"""From samples to padded tensors, and back to the objective's view of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.data.sample import Sample
from posttrain.objectives.batch import TokenBatch

Tensors = dict[str, Tensor]
"""One micro-batch: `ids`, `attention_mask` (B, T) int64, `mask` (B, T) float32, and what the shell adds: `advantages`
(B,) or (B, T), `behaviour_logps`, `old_logps`, `ref_logps`, `old_values`, `returns` (B, T) float32, `rewards` (B,),
`steps` (B, T) int64, `expert` (B,) bool."""


def collate(samples: Sequence[Sample], pad_id: int) -> Tensors:
    """Right-padded tensors. Attention and loss masks come from positions; the first token is never trained on."""
    width = max(len(sample.ids) for sample in samples)
    shape = (len(samples), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    attention = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.tensor(sample.ids)
        attention[row, :length] = 1
        mask[row, :length] = torch.tensor(sample.loss_mask, dtype=torch.float32)
    mask[:, 0] = 0
    tensors = {"ids": ids, "attention_mask": attention, "mask": mask}
    if all(sample.behaviour_logps is not None for sample in samples):
        behaviour = torch.zeros(shape)
        for row, sample in enumerate(samples):
            behaviour[row, : len(sample.ids)] = torch.tensor(sample.behaviour_logps)
        tensors["behaviour_logps"] = behaviour
    return tensors


def split(samples: Sequence[Sample], micro_batch: int) -> list[list[int]]:
    """Row indices of each micro-batch: rows of one prompt together, prompts by their longest row.

    A prompt is computed once per micro-batch (see `models.shared_prefix`), and rows of similar length leave little
    padding where it is not. Losses are sums divided by global counts, so the grouping changes no gradient.
    """
    prompts = [_prompt(sample) for sample in samples]
    longest: dict[tuple[int, ...], int] = {}
    for sample, prompt in zip(samples, prompts, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), len(sample.ids))
    first = {prompt: index for index, prompt in reversed(list(enumerate(prompts)))}
    order = sorted(range(len(samples)), key=lambda i: (longest[prompts[i]], first[prompts[i]], len(samples[i].ids), i))
    return [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]


def _prompt(sample: Sample) -> tuple[int, ...]:
    """The tokens before the first trained one."""
    end = sample.loss_mask.index(1) if 1 in sample.loss_mask else len(sample.ids)
    return tuple(sample.ids[:end])


def token_batch(
    tensors: Tensors,
    logps: Tensor | None = None,
    entropies: Tensor | None = None,
    max_length: int | None = None,
    values: Tensor | None = None,
) -> TokenBatch:
    """The objective's view of a micro-batch."""
    return TokenBatch(
        mask=tensors["mask"],
        logps=logps,
        entropies=entropies,
        old_logps=tensors.get("old_logps"),
        ref_logps=tensors.get("ref_logps"),
        advantages=tensors.get("advantages"),
        max_length=max_length,
        expert=tensors.get("expert"),
        values=values,
        old_values=tensors.get("old_values"),
        returns=tensors.get("returns"),
        rewards=tensors.get("rewards"),
        steps=tensors.get("steps"),
        guide_logps=tensors.get("guide_logps"),
    )
