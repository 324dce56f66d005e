"""Rows of `data.traces` that are trained on beside the rollouts of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from posttrain.data.known_traces import KnownTrace, prompt_key
from posttrain.data.order import order_of
from posttrain.data.sample import Origin, Sample
from posttrain.methods.base import OnlineMethod
from posttrain.models.collate import FURTHER, Tensors, collate, split
from posttrain.trainers.mixture import SOURCE
from posttrain.trainers.shell import RunParts

EXPERT_STREAM = 3
"""Tells the order of traces from that of prompts with the same seed."""


class ExpertRows:
    """Draws traces by an order of its own, a pure function of (seed, step), in micro-batches of their own.

    They stay apart from rollouts in micro-batches, so that what is computed for rollouts is the same bit for bit
    whatever the traces are; losses are sums over global counts, so the gradient is that of a mixed batch.

    Args:
        parts: of the run: traces, and the problems that they may answer.
        seed: of the run.
        rank, world: number of this rank, and of ranks.
        packs: see `collate.split`.
    """

    def __init__(self, parts: RunParts, seed: int, rank: int, world: int, *, packs: bool) -> None:
        assert isinstance(parts.method, OnlineMethod)
        self.method: OnlineMethod = parts.method
        self.rank, self.world, self.packs = rank, world, packs
        self.micro_batch, self.pad = parts.plan.micro_batch, parts.pad_id
        ids = {prompt_key(problem.prompt): problem.id for problem, _ in parts.items}
        per_step = parts.plan.expert_rows
        self.samples = [_sample(trace, ids) for trace in parts.traces] if per_step else []
        stream = int(np.random.SeedSequence([seed, EXPERT_STREAM]).generate_state(1, np.uint64)[0])
        self.order = order_of([sample.weight for sample in self.samples], per_step, stream) if per_step else None

    def of_step(self, step: int) -> list[list[Sample]]:
        """This rank's rows of a step, by micro-batch."""
        if self.order is None:
            return []
        rows = [self.samples[i] for i in self.order.share(step, self.rank, self.world)]
        return [[rows[i] for i in indices] for indices in split(rows, self.micro_batch, packs=self.packs)]

    def tensors(self, rows: Sequence[Sample], like: Tensors) -> Tensors:
        """A micro-batch with the keys that rollouts have: the method's values as advantages, 0 as other numbers."""
        tensors = collate(rows, self.pad)
        tensors.pop("behaviour_logps", None)
        tensors["advantages"] = torch.tensor(self.method.expert_values([row.problem_id for row in rows]))
        for name, value in like.items():
            further = name.startswith(FURTHER) and value.is_floating_point()
            if further or name in ("old_logps", "ref_logps", "old_values", "returns"):
                tensors[name] = torch.zeros(tensors["mask"].shape)
        if SOURCE in like:  # experts belong to no source of prompts
            tensors[SOURCE] = torch.full((len(rows),), -1)
        tensors["expert"] = torch.ones(len(rows), dtype=torch.bool)
        return tensors


def _sample(trace: KnownTrace, ids: Mapping[str, str]) -> Sample:
    return Sample(
        ids=trace.prompt_ids + trace.ids,
        loss_mask=[0] * len(trace.prompt_ids) + trace.mask,
        origin=Origin.EXPERT,
        problem_id=ids.get(prompt_key(trace.asked.prompt), f"trace of {trace.problem.id}"),
        group=-1,
        outcome=trace.outcome,
        finished=trace.finished,
        weight=trace.weight,
    )
