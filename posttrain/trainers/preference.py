"""The `preference` shell: rows of responses that are compared, or of one that is judged, on TRL's DPOTrainer.

Knows no method.

All responses of a micro-batch's rows go through the policy in one forward pass. The reference's log-probs of a row do
not change within a stage, so the reference scores every row that the stage will use once, before its first step.
Methods that regularise online get completions of the rows' own prompts, drawn once per optimizer step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer

from posttrain.data.sample import Origin, Sample
from posttrain.methods.base import PointwiseMethod
from posttrain.models.collate import Tensors, collate, split_pairs
from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.rollouts.engine import Sampling
from posttrain.trainers.reference_scores import ReferenceScores
from posttrain.trainers.responses import ResponseShell
from posttrain.trainers.rollout_step import rollout_seed
from posttrain.trainers.shell import RunParts
from posttrain.trainers.step_ratios import StepRatios
from posttrain.trl_compat import PreferenceHost

REFERENCE = "reference.safetensors"
"""In a checkpoint: the reference of the stage, where it is not the starting policy."""

SAMPLES = "samples/"
"""Prefix of the tensors that carry completions drawn in the step."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A completion of the policy, the method's weight for it, and its (T,) log-probs under the reference."""

    sample: Sample
    weight: float
    ref_logps: Tensor


class PreferenceShell(ResponseShell, PreferenceHost, DPOTrainer):
    """Trains on fixed rows of responses."""

    Arguments = DPOConfig

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        self.stage: int | None = None
        self.scored = ReferenceScores(self, self.rows)
        self.ratios = StepRatios(self, self.method) if isinstance(self.method, PointwiseMethod) else None

    # --------------------------------------------------------------------------------------------- the batches

    def step_batches(self, step: int) -> list[Tensors]:
        if self.order.stage(step) != self.stage:
            self._enter_stage(step)
        self.parts.mixture.begin_step(self.means.add, self.tracker.message, step)
        if self.ratios is not None:
            self.ratios.observe(step)
        rows = self.order.share(step, self.rank, self.world)
        samples = self._draw(step, rows, first_prompt=self.rank * len(rows)) if self.method.needs.samples else {}
        pairs = [
            [*self.rows[row].responses.values(), *(one.sample for one in samples.get(place, []))]
            for place, row in enumerate(rows)
        ]
        return [
            self._collate([rows[p] for p in chunk], [sample for p in chunk for sample in samples.get(p, [])])
            for chunk in split_pairs(pairs, self.args.per_device_train_batch_size, packs=self.packs)
        ]

    def _collate(self, rows: list[int], samples: list[Drawn]) -> Tensors:
        """The rows, then the samples, if any."""
        tensors = self.row_tensors(rows)
        if self.parts.reference is not None:
            tensors["ref_logps"] = self.scored.padded(rows, tensors["ids"].size(1))
        if samples:
            drawn = collate([one.sample for one in samples], self.parts.pad_id)
            drawn["advantages"] = torch.tensor([one.weight for one in samples])
            drawn["ref_logps"] = pad_sequence([one.ref_logps for one in samples], batch_first=True)
            tensors |= {SAMPLES + name: value for name, value in drawn.items()}
        return tensors

    # ------------------------------------------------------------------------------------------- the reference

    def _enter_stage(self, step: int) -> None:
        """Begin a stage, or go on within one after resuming: reference of the stage, and its scores of the rows."""
        stage = self.order.stage(step)
        first = step == self.order.starts[stage]
        if first and stage > 0 and self.method.refresh_reference:
            self._refresh_reference(stage)
        if first:
            self.method.begin_stage(stage)
        if self.parts.reference is not None:
            self._score_by_reference(stage, paid=not first)
        self.stage = stage

    def _refresh_reference(self, stage: int) -> None:
        """The policy as it enters the stage becomes the reference."""
        policy = self.accelerator.unwrap_model(self.model)
        self.accelerator.unwrap_model(self.parts.reference.model).load_state_dict(policy.state_dict())
        self.tracker.message(f"stage {stage + 1} of {len(self.order.stages)}: the reference is the policy as it enters")

    def content(self) -> dict[str, str]:
        starts = self.order.starts
        stages = {"stages": "steps " + ", ".join(map(str, starts))} if len(starts) > 1 else {}
        return super().content() | stages

    def save_files(self, folder: Path) -> None:
        super().save_files(folder)
        if self.stage and self.method.refresh_reference and self.accelerator.is_main_process:
            reference = self.accelerator.unwrap_model(self.parts.reference.model)
            weights = {name: p.detach().cpu().contiguous() for name, p in reference.named_parameters()}
            save_file(weights, folder / REFERENCE)

    def load_files(self, checkpoint: Path) -> None:
        super().load_files(checkpoint)
        if (checkpoint / REFERENCE).is_file():
            reference = self.accelerator.unwrap_model(self.parts.reference.model)
            reference.load_state_dict(load_file(checkpoint / REFERENCE), strict=False)

    def _score_by_reference(self, stage: int, *, paid: bool) -> None:
        """All rows that the stage will use."""
        reference = self.parts.reference
        # What is kept is the start's; other runs on the same data take other rows of it, so that it holds all of them.
        cached = reference.cache is not None and (stage == 0 or not self.method.refresh_reference)
        if cached and stage > 0 and reference.known is not None:
            return
        steps = [step for step in range(self.parts.plan.max_steps) if self.order.stage(step) == stage]
        used = set(range(len(self.rows))) if cached else {row for step in steps for row in self.order.items(step)}
        self.scored.score(used, cached=cached, paid=paid)

    # ----------------------------------------------------------------------------------------- on-policy samples

    def _draw(self, step: int, rows: list[int], *, first_prompt: int) -> dict[int, list[Drawn]]:
        """Place in `rows` -> completions of its prompt with the weights that the method gives them.

        Temperature 1 and no restriction of the tokens: the policy itself, which estimates of its KL need. The trainer
        scores the samples, not the engine.
        """
        started = time.perf_counter()
        prompts = [self.rows[row].prompt_ids for row in rows]
        sampling = Sampling(
            n=self.method.needs.samples,
            max_new_tokens=self.parts.recipe.rollouts.max_new_tokens,
            seed=rollout_seed(self.args.seed, step),
            first_prompt=first_prompt,
        )
        self.sync_engine(step)
        drawn: list[tuple[int, Sample]] = []
        groups = zip(prompts, self.parts.engine.generate(prompts, sampling), strict=True)
        for place, (prompt, completions) in enumerate(groups):
            for completion in completions:
                mask = [0] * len(prompt) + [1] * len(completion.ids)
                sample = Sample(prompt + completion.ids, mask, Origin.POLICY, finished=completion.finish == "stop")
                drawn.append((place, sample))
        samples = [sample for _, sample in drawn]
        new, n = sum(sum(sample.loss_mask) for sample in samples), len(samples)
        read, pixels = self.parts.engine.read_tokens(prompts, sampling), self.parts.renderer.pixels(prompts)
        self.ledger.sampled(read, new, pixels=pixels)
        self.means.add("completion_length", new, n)
        self.means.add("truncated_share", sum(not sample.finished for sample in samples), n)
        logps, ref_logps = self.logps_of(samples, by="policy"), self.logps_of(samples, by="reference")
        sums = [torch.stack([values.sum() for values in scores]) for scores in (logps, ref_logps)]
        weights = self.method.online_weights(sums[0], sums[1], torch.tensor([place for place, _ in drawn]))
        self.means.add("rollout_seconds", time.perf_counter() - started, 1)
        found: dict[int, list[Drawn]] = {}
        for (place, sample), weight, reference in zip(drawn, weights.tolist(), ref_logps, strict=True):
            found.setdefault(place, []).append(Drawn(sample, weight, reference))
        return found

    @torch.no_grad()
    def logps_of(self, samples: list[Sample], by: Literal["policy", "reference"]) -> list[Tensor]:
        """Log-probs of each sample, without padding and without gradient; in batches of a micro-batch's size."""
        found: list[Tensor] = []
        size = self.args.per_device_train_batch_size
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            tensors = collate(chunk, self.parts.pad_id)
            logps = self.logps_now(tensors) if by == "policy" else self.logps_by(self.by_reference, tensors)
            found += [row[: len(sample.ids)].clone() for row, sample in zip(logps, chunk, strict=True)]
        return found

    # ------------------------------------------------------------------------------------------------- the loss

    def method_batch(self, inputs: Tensors, model: torch.nn.Module | None) -> PreferenceBatch:
        forward = None if model is None else self.forward(model, inputs)
        found = {} if forward is None else {"logps": forward.logps, "entropies": forward.entropies}
        responses = self.responses(inputs, ref_logps=inputs.get("ref_logps"), **found)
        if forward is not None:
            self.keep_tokens(inputs, forward.logps.detach())
            self.record_sources(inputs, responses, _log_ratio)
        return PreferenceBatch(responses, self.values(inputs), self._samples(inputs, model))

    def policy_rows(self, inputs: Tensors) -> list[Tensors]:
        drawn = _drawn(inputs)
        return [inputs, drawn] if drawn else [inputs]

    def _samples(self, inputs: Tensors, model: torch.nn.Module | None) -> TokenBatch | None:
        drawn = _drawn(inputs)
        if not drawn:
            return None
        logps = None if model is None else self.forward(model, drawn).logps
        return TokenBatch(mask=drawn["mask"], logps=logps, ref_logps=drawn["ref_logps"], advantages=drawn["advantages"])


def _log_ratio(response: TokenBatch) -> Tensor:
    """(B,): how much likelier a response has become, against the reference where there is one."""
    reference = 0.0 if response.ref_logps is None else response.ref_logps
    return ((response.logps.detach() - reference) * response.mask).sum(dim=1)


def _drawn(inputs: Tensors) -> Tensors:
    """The tensors of completions that were drawn in the step; none where a method draws none."""
    return {name.removeprefix(SAMPLES): value for name, value in inputs.items() if name.startswith(SAMPLES)}
