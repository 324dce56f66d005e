"""The `online` shell: sample, verify, weigh, update, on TRL's GRPOTrainer. Knows no method.

One optimizer step: the engine completes the step's prompts, the judge gives verdicts, the method gives advantages over
all ranks' rollouts, then forward and backward in micro-batches. With `updates_per_rollout` > 1 the same rollouts serve
several steps, with the log-probs they were sampled at kept for the ratio.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from posttrain.config.schema import RolloutConfig
from posttrain.data.sample import Origin, Problem, Sample
from posttrain.methods.base import OnlineMethod, Scored
from posttrain.objectives.advantages import group_statistics, informative_groups
from posttrain.rollouts.engine import Sampling
from posttrain.tracking.transcript import Transcript
from posttrain.trainers.collate import Tensors, collate, split
from posttrain.trainers.order import StepOrder
from posttrain.trainers.shell import Forward, RunParts, Shell
from posttrain.trl_compat import OnlineHost, fused_token_logps


class OnlineShell(Shell, OnlineHost):
    """Trains on the policy's own verified completions."""

    method: OnlineMethod

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        self.rollouts: RolloutConfig = parts.recipe.rollouts
        self.order = StepOrder(len(parts.items), parts.plan.units_per_step, self.args.seed)
        self.max_length = self.rollouts.max_new_tokens
        self.transcript = Transcript(parts.run_dir / "samples.jsonl")
        self.buffer: list[Tensors] = []
        self.buffer_window: int | None = None

    # -------------------------------------------------------------------------------------------- the batches

    def step_batches(self, step: int) -> list[Tensors]:
        window = step // self.method.updates_per_rollout
        if self.buffer_window != window:
            self.buffer = self._rollout_batches(window)
            self.buffer_window = window
        return self.buffer

    def _rollout_batches(self, window: int) -> list[Tensors]:
        samples = self._sample(window)
        started = time.perf_counter()
        self._score(samples)
        self.means.add("verify_seconds", time.perf_counter() - started, 1)
        advantages, keep = self._advantages([sample for sample, _ in samples])
        rows = [sample for sample, _ in samples]
        if self.accelerator.is_main_process:
            self._write_transcript(samples, advantages)
        for sample, kept in zip(rows, keep.tolist(), strict=True):
            if not kept:
                sample.loss_mask = [0] * len(sample.loss_mask)
        batches = []
        for indices in split(rows, self.args.per_device_train_batch_size):
            tensors = collate([rows[i] for i in indices], self.parts.pad_id)
            tensors["advantages"] = advantages[indices]
            batches.append(tensors)
        self._frozen_logps(batches)
        return batches

    def _sample(self, window: int) -> list[tuple[Sample, Problem]]:
        parts, started = self.parts, time.perf_counter()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        prompts = [parts.items[i] for i in self.order.share(window, rank, world)]
        parts.engine.sync(window)
        completions = parts.engine.generate([ids for _, ids in prompts], self._sampling(window, rank * len(prompts)))
        samples = []
        for local, ((problem, ids), group) in enumerate(zip(prompts, completions, strict=True)):
            for completion in group:
                zeros = [0] * len(ids)
                sample = Sample(
                    ids=ids + completion.ids,
                    loss_mask=zeros + [1] * len(completion.ids),
                    origin=Origin.POLICY,
                    problem_id=problem.id,
                    group=rank * len(prompts) + local,
                    behaviour_logps=[0.0] * len(ids) + completion.logps,
                    policy_version=completion.policy_version,
                    finished=completion.finish == "stop",
                )
                samples.append((sample, problem))
        new = sum(sum(sample.loss_mask) for sample, _ in samples)
        self.ledger.sampled(sum(len(ids) for _, ids in prompts), new)
        self.means.add("rollout_seconds", time.perf_counter() - started, 1)
        return samples

    def _sampling(self, window: int, first_prompt: int) -> Sampling:
        rollouts = self.rollouts
        return Sampling(
            n=rollouts.samples_per_prompt,
            max_new_tokens=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            top_p=rollouts.top_p,
            top_k=rollouts.top_k,
            seed=rollout_seed(self.args.seed, window),
            first_prompt=first_prompt,
        )

    def _score(self, samples: list[tuple[Sample, Problem]]) -> None:
        texts = [
            self.parts.renderer.text([t for t, m in zip(sample.ids, sample.loss_mask, strict=True) if m])
            for sample, _ in samples
        ]
        lengths = [sum(sample.loss_mask) for sample, _ in samples]
        judgements = self.parts.judge.judge([problem for _, problem in samples], texts, lengths)
        for (sample, _), judgement in zip(samples, judgements, strict=True):
            sample.outcome, sample.reward = judgement.outcome, judgement.reward
            sample.verdict = judgement.status.value

    def _advantages(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Advantages and the rows to train on, for this rank's samples, from statistics over all ranks."""
        local = [(s.reward, s.outcome, s.group, sum(s.loss_mask), s.finished, s.verdict) for s in samples]
        everyone = gather_object(local)
        rewards, outcomes, groups, lengths, finished, verdicts = zip(*everyone, strict=True)
        known = torch.tensor([r is not None and o is not None for r, o in zip(rewards, outcomes, strict=True)])
        scored = Scored(
            rewards=torch.tensor([r if r is not None else 0.0 for r in rewards]),
            outcomes=torch.tensor([o if o is not None else 0.0 for o in outcomes]),
            known=known,
            groups=torch.tensor(groups),
            lengths=torch.tensor(lengths),
            finished=torch.tensor(finished),
            max_new_tokens=self.rollouts.max_new_tokens,
        )
        advantages, keep = self.method.advantages(scored), self.method.keep(scored)
        if self.accelerator.is_main_process:
            self._record_rollouts(scored, advantages, verdicts)
        start = self.accelerator.process_index * len(samples)
        return advantages[start : start + len(samples)], keep[start : start + len(samples)]

    def _write_transcript(self, samples: list[tuple[Sample, Problem]], advantages: Tensor) -> None:
        """The first group of the step, for people to read."""
        for (sample, problem), advantage in zip(samples, advantages.tolist(), strict=True):
            if sample.group != samples[0][0].group:
                break
            prompt = [t for t, m in zip(sample.ids, sample.loss_mask, strict=True) if not m]
            self.transcript.write(
                self.state.global_step,
                {
                    "problem": sample.problem_id,
                    "prompt": self.parts.renderer.text(prompt),
                    "completion": self.parts.renderer.text(sample.ids[len(prompt) :]),
                    "reference": problem.reference,
                    "verdict": sample.verdict,
                    "reward": sample.reward,
                    "advantage": round(advantage, 6),
                    "finished": sample.finished,
                },
            )

    def _record_rollouts(self, scored: Scored, advantages: Tensor, verdicts: Sequence[str]) -> None:
        n, known = len(scored.rewards), int(scored.known.sum())
        add = self.means.add
        add("reward", float(scored.rewards[scored.known].sum()), known)
        add("accuracy", float(scored.outcomes[scored.known].sum()), known)
        _, deviations, _ = group_statistics(scored.rewards, scored.groups, scored.known)
        add("reward_std", float(deviations.sum()), n)
        add("completion_length", float(scored.lengths.sum()), n)
        add("truncated_share", float((~scored.finished).sum()), n)
        add("unknown_share", n - known, n)
        add("zero_advantage_share", float((advantages == 0).sum()), n)
        differing, groups = informative_groups(scored.rewards, scored.groups, scored.known)
        add("informative_groups", differing, groups)
        for verdict in sorted(set(verdicts)):
            add(f"verdict/{verdict}", verdicts.count(verdict), n)

    @torch.no_grad()
    def _frozen_logps(self, batches: list[Tensors]) -> None:
        """Log-probs under the reference, and under the sampling policy where later updates need them."""
        device = self.accelerator.device
        reuse = self.method.updates_per_rollout > 1
        for tensors in batches:
            inputs = [tensors[k].to(device) for k in ("ids", "attention_mask", "mask")]
            if reuse:
                # By the trainer rather than the engine: the ratio then starts at exactly 1.
                with self.accelerator.autocast():
                    tensors["old_logps"] = fused_token_logps(self.model, *inputs)[0].cpu()
            if self.parts.reference is not None:
                with self.accelerator.autocast():
                    tensors["ref_logps"] = self.parts.reference.token_logps(*inputs).cpu()
            passes = int(reuse) + int(self.parts.reference is not None)
            self.ledger.trained(passes * int(tensors["attention_mask"].sum()), backward=False)

    def forward_diagnostics(self, inputs: Tensors, forward: Forward) -> dict[str, tuple[Tensor, Tensor]]:
        fresh = self.state.global_step % self.method.updates_per_rollout == 0
        if not fresh or "behaviour_logps" not in inputs:
            return {}
        difference = ((forward.logps.detach() - inputs["behaviour_logps"]) * inputs["mask"]).abs()
        return {"engine_logp_diff_mean": (difference.sum(), inputs["mask"].sum())}


def rollout_seed(seed: int, window: int) -> int:
    """One seed per (run, rollout); 64 bits, mixed so that neighbours share nothing."""
    return int(np.random.SeedSequence([seed, window]).generate_state(1, np.uint64)[0])
