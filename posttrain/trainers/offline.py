"""The `offline` shell: rewarded traces, without sampling, on TRL's SFTTrainer. Knows no method.

The reference scores every row once, before the first step; for a KL over the whole vocabulary it is run in every step
too. A critic, where the method has one, is a part of the policy module and trained in the same pass (`models.value`).
Methods that draw get a few actions of the policy beside each row, at states of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import SFTConfig, SFTTrainer

from posttrain.data.offline_rows import OfflineRow
from posttrain.data.order import StepOrder
from posttrain.data.sample import Origin, Sample
from posttrain.methods.base import OfflineMethod, Regression
from posttrain.methods.companions import TargetCritic
from posttrain.models.collate import FURTHER, Tensors, collate, split_pairs
from posttrain.models.modes import without_dropout
from posttrain.models.token_logps import token_values
from posttrain.objectives.batch import TARGET, TokenBatch
from posttrain.rollouts.engine import Sampling
from posttrain.trainers.critic import fitted
from posttrain.trainers.online_state import Kept, load_shared, save_shared
from posttrain.trainers.reference_scores import ReferenceScores
from posttrain.trainers.rollout_step import rollout_seed
from posttrain.trainers.shell import RunParts, Shell
from posttrain.trainers.stale import LaggingPolicy, lagging
from posttrain.trl_compat import OfflineHost

STATE_STREAM = 4
"""Tells the draws of states from others of the same seed and step."""


class OfflineShell(Shell, OfflineHost, SFTTrainer):
    """Trains on fixed traces with rewards."""

    Arguments = SFTConfig

    method: OfflineMethod

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        self.rows: Sequence[OfflineRow] = parts.items
        self.order = StepOrder(len(self.rows), parts.plan.units_per_step, self.args.seed)
        self.scored = ReferenceScores(self, self.rows)
        wanted = self.method.needs.companion(TargetCritic)
        self.rate = 1.0 if wanted is None else wanted.rate
        self.target: LaggingPolicy | None = None if wanted is None else lagging(self, 1, "method", critic=True)

    def step_batches(self, step: int) -> list[Tensors]:
        self.method.begin_step(step)
        if self.target is not None:
            self.target.follow(self.rate)
        self.regressions: list[Regression] = []
        reference = self.parts.reference
        if reference is not None and not self.scored.logps:
            self.scored.score(range(len(self.rows)), cached=reference.cache is not None, paid=step > 0)
        rows = self.order.share(step, self.rank, self.world)
        drawn: list[list[Sample]] = [[] for _ in rows]
        if self.method.needs.samples:
            drawn = self._draw(step, rows, first=self.rank * len(rows))
        beside = [[self.rows[row].sample, *own] for row, own in zip(rows, drawn, strict=True)]
        micro_batches = split_pairs(beside, self.args.per_device_train_batch_size, packs=self.packs)
        self.step_samples = [[sample for i in indices for sample in beside[i]] for indices in micro_batches]
        made = []
        for indices in micro_batches:
            tensors = self._collate([rows[i] for i in indices], [sample for i in indices for sample in drawn[i]])
            made.append(tensors if self.target is None else tensors | self._target_values(self.target, tensors))
        return made

    def _collate(self, numbers: list[int], drawn: Sequence[Sample]) -> Tensors:
        """Rows, and behind them the actions that were drawn in this step, if any."""
        rows = [self.rows[number] for number in numbers]
        tensors = collate([*(row.sample for row in rows), *drawn], self.parts.pad_id)
        ended = (float(sample.finished) for sample in drawn)
        tensors["rewards"] = torch.tensor([*(row.reward for row in rows), *ended])
        if self.method.steps is not None:
            steps = [*(row.steps for row in rows), *([0] * len(sample.ids) for sample in drawn)]
            tensors["steps"] = pad_sequence([torch.tensor(each) for each in steps], batch_first=True)
        if self.parts.reference is not None:
            tensors["ref_logps"] = self.scored.padded(numbers, tensors["ids"].size(1))
        if self.method.needs.samples:
            tensors["expert"] = torch.tensor([True] * len(rows) + [False] * len(drawn))
        return tensors

    def _draw(self, step: int, rows: Sequence[int], *, first: int) -> list[list[Sample]]:
        """For each row actions of the policy, each in the place of one of the row's turns, as rows of their own."""
        started, n = time.perf_counter(), self.method.needs.samples
        contexts = []
        for place, row in enumerate(rows):
            ids, begins = self.rows[row].sample.ids, self.rows[row].turn_starts
            draw = np.random.default_rng([self.args.seed, step, first + place, STATE_STREAM])
            chosen = draw.choice(len(begins), n, replace=n > len(begins))
            contexts += [ids[: begins[turn]] for turn in chosen]
        rollouts, positions = self.parts.recipe.rollouts, self.parts.engine.positions
        assert rollouts is not None  # a method that draws needs them
        most = rollouts.max_new_tokens
        limits = [most if positions is None else min(most, positions - len(context)) for context in contexts]
        sampling = Sampling(n=1, max_new_tokens=most, seed=rollout_seed(self.args.seed, step), first_prompt=first * n)
        self.sync_engine(step)
        made = [completion for (completion,) in self.parts.engine.generate(contexts, sampling, limits)]
        new = sum(len(completion.ids) for completion in made)
        self.ledger.sampled(self.parts.engine.read_tokens(contexts, sampling), new)
        self.means.add("completion_length", new, len(made))
        self.means.add("truncated_share", sum(one.finish != "stop" for one in made), len(made))
        self.means.add("rollout_seconds", time.perf_counter() - started, 1)
        samples = [
            Sample(
                context + one.ids,
                [0] * len(context) + [1] * len(one.ids),
                Origin.POLICY,
                finished=one.finish == "stop",
            )
            for context, one in zip(contexts, made, strict=True)
        ]
        return [samples[place * n : (place + 1) * n] for place in range(len(rows))]

    @torch.no_grad()
    def _target_values(self, target: LaggingPolicy, tensors: Tensors) -> Tensors:
        """Values of all states by all heads of the critic that follows."""
        inputs = (tensors[name].to(self.accelerator.device) for name in ("ids", "attention_mask", "mask"))
        self.ledger.scored(int(tensors["attention_mask"].sum()), "critic")
        with self.accelerator.autocast(), without_dropout(self.model), target.in_place():
            values = token_values(self.model, *inputs).cpu()
        return {f"{FURTHER}{TARGET}{head}": own for head, own in enumerate(values)}

    def method_batch(self, inputs: Tensors, model: torch.nn.Module | None) -> TokenBatch:
        """As in `Shell`; keeps what the critic is fitted to."""
        batch = super().method_batch(inputs, model)
        if model is not None:
            with torch.no_grad():
                fitted_to = self.method.regression(batch)
            self.regressions += [] if fitted_to is None else [fitted_to]
        return batch

    def compute_loss(self, *arguments: Any, **named: Any) -> Tensor:
        loss = super().compute_loss(*arguments, **named)
        if self.regressions and len(self.step_losses) == len(self.step_inputs):
            fitted(self.regressions, self.means.add, main=self.accelerator.is_main_process)
        return loss

    @property
    def kept(self) -> dict[str, Kept]:
        """What is the same on all ranks and longer in memory than a step."""
        return {} if self.target is None else {"target": self.target}

    def save_files(self, folder: Path) -> None:
        super().save_files(folder)
        if self.accelerator.is_main_process:
            save_shared(self.kept, folder)

    def load_files(self, checkpoint: Path) -> None:
        super().load_files(checkpoint)
        load_shared(self.kept, checkpoint)
