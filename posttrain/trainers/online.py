"""The `online` shell: sample, verify, weigh, update, on TRL's GRPOTrainer. Knows no method.

One optimizer step: the engine completes the step's prompts, the judge gives verdicts, the method gives advantages over
all ranks' rollouts, then forward and backward in micro-batches. With `updates_per_rollout` > 1 the same rollouts serve
several steps, with the log-probs they were sampled at kept for the ratio: each step takes all of them, or one of the
minibatches that they are split into anew for every pass. A *window* is one batch of rollouts and the steps that train
on it.

`rollout_step` samples and scores, `pipelined` does so beside the training, `expert_rows` brings what others wrote,
`stale` has the lagging policy and the replay buffer, `rollout_report` the metrics, `online_state` the files of a
checkpoint. Somewhat over 500 lines: what is left is the order in which these are asked, which reads best in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from posttrain.config.schema import RolloutConfig
from posttrain.data.known_traces import TraceBook
from posttrain.data.order import StepOrder, minibatches_of
from posttrain.data.sample import Sample
from posttrain.errors import StateError
from posttrain.methods.base import ActorCriticMethod, ContrastMethod, OnlineMethod, Scored
from posttrain.methods.companions import (
    SCORER_LOGPS,
    STEP_PROGRESS,
    UNMASKED_LOGPS,
    CovariantTokens,
    Divergence,
    MaskModel,
    RowValues,
    SelfTeacher,
    StepScorer,
)
from posttrain.models.collate import FURTHER, Tensors, actions, collate, regrouped, split_episodes
from posttrain.models.modes import without_dropout
from posttrain.models.reference import Reference
from posttrain.models.token_logps import token_logps_and_values
from posttrain.objectives.action_mask import ActionMask, MaskRule
from posttrain.objectives.batch import TokenBatch
from posttrain.objectives.policy_gradient import bounded, engine_weights, per_token
from posttrain.rollouts.weight_sync import ScoringEngine, engine_differences
from posttrain.tracking.ledger import Role
from posttrain.tracking.transcript import Transcript
from posttrain.trainers.contrast import contrast
from posttrain.trainers.covariance import mark_covariant
from posttrain.trainers.critic import weigh
from posttrain.trainers.episode_step import EpisodeStep, spread, turn_rewards
from posttrain.trainers.expert_rows import ExpertRows
from posttrain.trainers.online_state import Kept, OfRank, load_of_rank, load_shared, save_of_rank, save_shared
from posttrain.trainers.pipelined import Pipeline
from posttrain.trainers.refill import Refill
from posttrain.trainers.rollout_report import record_rollouts, write_first_group
from posttrain.trainers.rollout_step import Batch, Item, RolloutStep, kept_rows, statistics_seed
from posttrain.trainers.self_teacher import OwnTeacher
from posttrain.trainers.served_teacher import ServedTeacher
from posttrain.trainers.shell import Forward, RunParts, Shell
from posttrain.trainers.stale import LaggingPolicy, ReplayBuffer, fresh_positions, lagging
from posttrain.trainers.step_scores import StepScores
from posttrain.trainers.token_values import PLACE
from posttrain.trl_compat import OnlineHost


class OnlineShell(Shell, OnlineHost, GRPOTrainer):
    """Trains on verified completions of the policy, and on expert rows where the method takes some.

    Attributes:
        buffer: micro-batches of the current window.
        samples: their rows; empty after resuming within a window.
        queue: this rank's samples of windows to come, by window.
        uncounted: what samples of `queue` took, where that is not in the ledger yet; their window counts it.
    """

    Arguments = GRPOConfig

    method: OnlineMethod

    def bind(self, parts: RunParts) -> None:
        super().bind(parts)
        seed = self.args.seed
        rollouts: RolloutConfig = parts.recipe.rollouts
        self.rollouts = rollouts
        self.order = parts.mixture.order or StepOrder(len(parts.items), parts.plan.units_per_step, seed)
        self.max_length = parts.recipe.new_tokens
        self.transcript = Transcript(parts.run_dir / "samples.jsonl")
        self.problems = {problem.id: problem for problem, _ in parts.items}
        self.method.bind(parts.renderer, seed)
        kind = RolloutStep if parts.environments is None else EpisodeStep
        self.source = kind(parts, seed, lambda name, total, n: self.means.add(name, total, n))
        self.experts = ExpertRows(parts, seed, self.rank, self.world, packs=self.packs)
        self.lagging = lagging(self, rollouts.sync_every, "rollouts.sync_every") if rollouts.sync_every > 1 else None
        masks, teacher = self.method.needs.companion(MaskModel), self.method.needs.companion(SelfTeacher)
        self.masking = None if masks is None else self._masking(masks.rule)
        self.average: LaggingPolicy | None = None
        self.own_teacher = None if teacher is None else self._own_teacher(teacher)
        self.scorer = self.own_teacher or self.scorer
        steps = self.method.needs.companion(StepScorer)
        self.step_scores = None if steps is None else StepScores(steps, parts.renderer, self.problems)
        replay = rollouts.replay
        plan = parts.plan
        self.replay_buffer = None if replay is None else ReplayBuffer(replay.size, plan.replayed_per_rollout, seed)
        wanted = rollouts.refill
        self.refill = None if wanted is None else Refill(wanted, plan.prompts_per_rollout)
        self.pipeline = Pipeline(self._asking().answer) if rollouts.pipeline else None
        self.queue: dict[int, list[Sample]] = {}
        self.uncounted: dict[int, Batch] = {}
        self.buffer: list[Tensors] = []
        self.buffer_window: int | None = None
        self.samples: list[list[Sample]] = []

    def _masking(self, rule: MaskRule) -> LaggingPolicy:
        """The mask model, and `action_mask`, which has its weights."""
        vocabulary = self.accelerator.unwrap_model(self.model).get_input_embeddings().num_embeddings
        masking = lagging(self, rule.update_interval, "method.mask_update_interval")
        always = {*self.parts.renderer.stop_ids, *self.parts.renderer.tokenizer.all_special_ids}
        self.action_mask = ActionMask(masking.in_place, rule, tuple(sorted(i for i in always if i < vocabulary)))
        return masking

    def _own_teacher(self, wanted: SelfTeacher) -> OwnTeacher:
        parts = self.parts
        within: Callable[[], AbstractContextManager[Any]] = nullcontext
        role: Role = "policy"
        if wanted.rate == 0:
            model, role = parts.reference, "reference"
        else:
            if wanted.averages:
                self.average = lagging(self, 1, "method.teacher")
                within = self.average.in_place
            model = Reference(self.model, within)
        traces = TraceBook(parts.traces)
        positions = parts.engine.positions
        return OwnTeacher(wanted, parts.renderer, positions, self.problems, traces, model, role, within)

    # -------------------------------------------------------------------------------------------- the batches

    def step_batches(self, step: int) -> list[Tensors]:
        self.method.begin_step(step)
        if self.average is not None:
            self.average.follow(self.own_teacher.wanted.rate)
        window, update = divmod(step, self.method.updates_per_rollout)
        if self.buffer_window != window:
            self.buffer, self.samples = self._rollout_batches(window)
            self.buffer_window = window
        batches, samples = self._minibatch(window, update)
        experts = self.experts.of_step(step)
        self.step_samples = [*samples, *experts]
        return [*batches, *(self.experts.tensors(rows, self.buffer[0]) for rows in experts)]

    def _minibatch(self, window: int, update: int) -> tuple[list[Tensors], list[list[Sample]]]:
        """What the step `update` of a window trains on: micro-batches, and their rows where these are known."""
        parts = self.parts.plan.minibatches
        if parts == 1:
            return self.buffer, self.samples
        epoch, number = divmod(update, parts)
        groups = [group for batch in self.buffer for group in batch["group"].tolist()]
        drawn = minibatches_of(groups, parts, self.args.seed, window, epoch)
        chosen = [row for row, part in enumerate(drawn) if part == number]
        size = self.args.per_device_train_batch_size
        made = regrouped(self.buffer, chosen, size, self.parts.pad_id, packs=self.packs)
        rows = [sample for batch in self.samples for sample in batch]
        return [tensors for tensors, _ in made], [[rows[i] for i in numbers] for _, numbers in made if rows]

    def _rollout_batches(self, window: int) -> tuple[list[Tensors], list[list[Sample]]]:
        stop, units = self._positions(window).stop, self.parts.plan.units_per_step
        for step in range((stop - 1) // units + 1 - self.parts.plan.minibatches, (stop - 1) // units + 1):
            self.parts.mixture.begin_step(self.means.add, self.tracker.message, step)
        fresh = self._fresh(window)
        samples = fresh + self._replayed(window)
        scored, places, advantages, keep = self._advantages(window, samples)
        if self.accelerator.is_main_process:
            write_first_group(
                self.transcript,
                self.state.global_step,
                samples,
                advantages.tolist(),
                self.problems,
                self.parts.renderer,
            )
        if self.replay_buffer is not None:
            self.replay_buffer.add(gather_object(fresh))
        told: list[Sample] = []
        if self.own_teacher is not None:
            samples, told = self.own_teacher.rows(samples)
            taught = sum(any(sample.loss_mask) for sample in samples)
            self.means.add("teacher/told_share", taught, len(samples))
        rows, told = kept_rows(samples, keep), kept_rows(told, keep)
        of_rows = self.method.needs.companion(RowValues)
        values = {} if of_rows is None else of_rows.of(scored)
        batches, of_batches, numbers = [], [], []
        watched = 0
        if self.accelerator.is_main_process:
            watched = self.token_values.watched(self.state.global_step, self.method.updates_per_rollout, rows)
        for indices in split_episodes(rows, self.args.per_device_train_batch_size, packs=self.packs):
            tensors = collate([rows[i] for i in indices], self.parts.pad_id)
            tensors["advantages"] = spread(advantages[indices], tensors["mask"])
            for name, each in values.items():
                tensors[FURTHER + name] = each[[places[i] for i in indices]].unsqueeze(1) * tensors["mask"]
            if self.step_scores is not None:
                found, lost = self.step_scores.progress([samples[i] for i in indices], tensors["mask"].size(1))
                tensors[FURTHER + STEP_PROGRESS] = found
                self.means.add("terms/process_unscored", lost, len(indices))
            if told:
                tensors |= self.own_teacher.tensors([told[i] for i in indices], self.parts.pad_id)
            tensors = self.parts.mixture.mark(tensors, [rows[i].problem_id for i in indices])
            if self.parts.plan.minibatches > 1:
                tensors["group"] = torch.tensor([rows[i].group for i in indices])
            if self.parts.plan.expert_rows:
                tensors["expert"] = torch.zeros(len(indices), dtype=torch.bool)
            batches.append(tensors)
            of_batches.append([rows[i] for i in indices])
            if watched:
                tensors[PLACE] = torch.tensor([i if i < watched else -1 for i in indices])
            numbers.append([places[i] for i in indices])
        self._frozen_logps(batches)
        covariant = self.method.needs.companion(CovariantTokens)
        if covariant is not None:
            mark_covariant(covariant, batches, numbers, scored.seed)
        if isinstance(self.method, ContrastMethod):
            metrics = contrast(self.method, scored, batches, numbers, self.logps_now)
            for name, (total, n) in metrics.items() if self.accelerator.is_main_process else ():
                self.means.add(name, total, n)
        if self.method.needs.critic:
            assert isinstance(self.method, ActorCriticMethod)
            weigh(self.method, batches, self.means.add, main=self.accelerator.is_main_process)
        return batches, of_batches

    def _fresh(self, window: int) -> list[Sample]:
        """This rank's completions for a window, sampled `delay` windows ago, or at the first one."""
        for policy in (self.lagging, self.masking):
            if policy is not None:
                policy.refresh(window)
        if self.pipeline is not None:
            return self._fresh_of_pipeline(window)
        if self.refill is not None:
            return self._refilled(window, self.refill)
        for target in range(window, window + self.rollouts.delay + 1):
            if target not in self.queue:
                self.queue[target] = self._sample(target, now=window)
        self._compare_engine(self.queue[window])
        return self.queue.pop(window)

    def _refilled(self, window: int, refill: Refill) -> list[Sample]:
        """This rank's part of a rollout whose groups without a signal are replaced."""
        share, start = refill.wanted // self.world, refill.drawn

        def sample(first: int) -> list[Sample]:
            first += self.rank * share
            indices = self.order.between(start + first, start + first + share)
            return self.source.sample(window, [self.parts.items[i] for i in indices], first)

        with self._sampler(window):
            filled = refill.fill(sample)
        if self.accelerator.is_main_process:
            refill.report(self.means.add, self.parts.tracker.message)
        mine = filled.groups[self.rank * share : (self.rank + 1) * share]
        return [sample for group in mine for sample in group]

    def _fresh_of_pipeline(self, window: int) -> list[Sample]:
        """As `_fresh` with a delay of 1, but the next window's completions are only asked for."""
        self.settle()
        if window in self.queue:
            self.sync_engine(window)
        else:
            self.queue[window] = self._sample(window, now=window)
        if window in self.uncounted:
            self._asking().count(self.uncounted.pop(window))
        self._compare_engine(self.queue[window])
        # After the last window too: the run may be made longer. Nobody waits for it where there is no checkpoint then.
        self.pipeline.start(window + 1, self._asking().ask(window + 1, *self._prompts(window + 1)))
        return self.queue.pop(window)

    def _asking(self) -> RolloutStep:
        """Who samples beside the training; episodes are refused there (`trainers.rows`)."""
        assert isinstance(self.source, RolloutStep)
        return self.source

    def _compare_engine(self, samples: Sequence[Sample]) -> None:
        """The difference between engine and trainer that is not staleness, on completions that may be stale."""
        if not self.rollouts.stale or self.rollouts.engine != "vllm":
            return
        differences = engine_differences(cast(ScoringEngine, self.parts.engine), samples)
        if differences:
            self.means.add("engine_logp_diff_mean", sum(differences), len(differences))
            self.means.add("engine_logp_diff_max", max(differences), 1)

    def settle(self) -> None:
        done = None if self.pipeline is None else self.pipeline.finish()
        if done is not None:
            window, batch = done
            self.queue[window], self.uncounted[window] = batch.samples, replace(batch, samples=[])

    def _prompts(self, window: int) -> tuple[list[Item], int]:
        """This rank's problems of a window, and the number of the first of them."""
        positions = self._positions(window)
        share = len(positions) // self.world
        first = self.rank * share
        indices = self.order.between(positions.start + first, positions.start + first + share)
        return [self.parts.items[i] for i in indices], first

    def _positions(self, window: int) -> range:
        """Those in the order of prompts that all ranks sample for."""
        plan = self.parts.plan
        return fresh_positions(window, plan.prompts_per_rollout, plan.replayed_per_rollout)

    def _sample(self, target: int, now: int) -> list[Sample]:
        """Completions for the window `target` by the policy that samples `now`."""
        with self._sampler(now):
            return self.source.sample(target, *self._prompts(target))

    @contextmanager
    def _sampler(self, now: int) -> Iterator[None]:
        """The engine samples inside the block from the policy that does so `now`."""
        lagging = self.lagging
        with nullcontext() if lagging is None else lagging.in_place():
            self.sync_engine(now if lagging is None else lagging.version)
            engine: Any = self.parts.engine  # the one that masks: `config.preflight`
            with nullcontext() if self.action_mask is None else engine.masked(self.action_mask):
                yield

    def _replayed(self, window: int) -> list[Sample]:
        """This rank's share of the groups that are trained on again."""
        if self.replay_buffer is None:
            return []
        fresh = len(self._positions(window))
        groups = self.replay_buffer.draw(window, first_group=fresh) if window else []
        share = len(groups) // self.world
        return [sample for group in groups[self.rank * share : (self.rank + 1) * share] for sample in group]

    def _advantages(self, window: int, samples: list[Sample]) -> tuple[Scored, list[int], Tensor, Tensor]:
        """What is known of all ranks' samples, and for this rank's: their places there, advantages, and which to train
        on."""
        local = [replace(s, ids=[], loss_mask=[], behaviour_logps=None) for s in samples]
        lengths = [sum(sample.loss_mask) for sample in samples]
        everyone = gather_object([(self.rank, i, s, n) for i, (s, n) in enumerate(zip(local, lengths, strict=True))])
        everyone.sort(key=lambda entry: entry[2].group)  # the same order on any number of ranks
        rows = [entry[2] for entry in everyone]
        scored = Scored(
            rewards=torch.tensor([0.0 if row.reward is None else row.reward for row in rows]),
            outcomes=torch.tensor([0.0 if row.outcome is None else row.outcome for row in rows]),
            known=torch.tensor([row.reward is not None and row.outcome is not None for row in rows]),
            groups=torch.tensor([row.group for row in rows]),
            lengths=torch.tensor([entry[3] for entry in everyone]),
            finished=torch.tensor([row.finished for row in rows]),
            max_new_tokens=self.max_length,
            seed=statistics_seed(self.args.seed, window),
            kinds=tuple(row.origin for row in rows),
            problem_ids=tuple(row.problem_id for row in rows),
            infos=tuple(row.info for row in rows),
            verdicts=tuple(row.verdict for row in rows),
            limits=torch.tensor([self.max_length if row.limit is None else row.limit for row in rows]),
            **({} if self.parts.environments is None else turn_rewards(rows)),
        )
        self.method.observe(scored)
        advantages, keep = self.method.advantages(scored), self.method.keep(scored)
        if self.refill is not None:
            advantages, keep = self.refill.taken(scored, advantages, keep)
        if self.accelerator.is_main_process:
            record_rollouts(
                self.means.add, scored, advantages, rows, judged=self.method.needs.verifier or bool(scored.known.any())
            )
            self.parts.mixture.judged(self.means.add, rows)
            if self.rollouts.stale:
                age = sum(window - row.policy_version for row in rows)
                self.means.add("rollout_age", age, len(rows))
        mine = {entry[1]: place for place, entry in enumerate(everyone) if entry[0] == self.rank}
        places = [mine[i] for i in range(len(samples))]
        return scored, places, advantages[places], keep[places]

    @torch.no_grad()
    def _frozen_logps(self, batches: list[Tensors]) -> None:
        """Log-probs under the reference, and under the sampling policy where the updates need them."""
        device = self.accelerator.device
        stale = self.rollouts.stale
        # A self-teacher that is the start reads other prompts; of the policy's own nobody asks it.
        refers = self.parts.reference is not None and self.own_teacher is None
        again = not stale and (self.method.updates_per_rollout > 1 or self.method.needs.old_logps)
        critic = self.method.needs.critic
        for tensors in batches:
            if stale:
                tensors["old_logps"] = tensors["behaviour_logps"].clone()
            if critic:
                inputs = [tensors[k].to(device) for k in ("ids", "attention_mask", "mask")]
                read = int(tensors["attention_mask"].sum())
                with self.accelerator.autocast(), without_dropout(self.model):
                    masked: dict[str, Any] = {"action_mask": self.action_mask}
                    scores, values = token_logps_and_values(self.model, *inputs, **masked)
                self.ledger.scored(read, "policy", "critic", pixels=self.pixels(tensors))
                of_rows, _ = self.of_heads(values, tensors)
                assert of_rows is not None
                tensors["old_values"] = of_rows.cpu()
                if again:
                    tensors["old_logps"] = scores.logps.cpu()
                if self.action_mask is not None:
                    self.ledger.scored(read, "policy")  # the mask model's pass; the policy's without the mask follows
                    tensors[FURTHER + UNMASKED_LOGPS] = self.logps_now(tensors)
            elif again:
                # By the trainer rather than the engine: the ratio then starts at exactly 1.
                tensors["old_logps"] = self.logps_now(tensors)
            if refers:
                tensors["ref_logps"] = self.logps_by(self.by_reference, tensors)
            if self.scorer is not None and self.method.needs.companion(Divergence) is None:
                tensors[FURTHER + SCORER_LOGPS] = self.logps_by(self.scorer, tensors)

    def forward_diagnostics(self, inputs: Tensors, forward: Forward) -> dict[str, tuple[Tensor, Tensor]]:
        if "expert" in inputs and bool(inputs["expert"].any()):
            return {}
        logps, sampled = forward.logps.detach(), actions(inputs)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if "old_logps" in inputs:
            ratios = bounded(logps - inputs["old_logps"]).exp() * sampled
            found["ratio_max"] = (ratios.max(), torch.ones(()))
        first = self.state.global_step % self.method.updates_per_rollout == 0
        if first and "behaviour_logps" in inputs:
            difference = ((logps - inputs["behaviour_logps"]) * sampled).abs()
            name = "stale_logp_diff" if self.rollouts.stale else "engine_logp_diff"
            found[f"{name}_mean"] = (difference.sum(), sampled.sum())
            found[f"{name}_max"] = (difference.max(), torch.ones(()))
        return found

    def keep_tokens(self, inputs: Tensors, logps: Tensor) -> None:
        """Those of samples that people read too, in the last update on them, where their ratios have gone furthest."""
        step, updates = self.state.global_step, self.method.updates_per_rollout
        if PLACE in inputs and step % updates >= updates - self.parts.plan.minibatches:
            self.token_values.write_rows(step, step - step % updates, inputs, logps)

    def method_batch(self, inputs: Tensors, model: torch.nn.Module | None) -> TokenBatch:
        """As in `Shell`; with `rollouts.importance`, the engine's rounding is weighed out of the advantages."""
        batch, how = super().method_batch(inputs, model), self.rollouts.weighs
        if model is None or how is None or (batch.expert is not None and bool(batch.expert.any())):
            return batch
        at_sampling = batch.logps.detach() if batch.old_logps is None else batch.old_logps
        sampled = actions(inputs)  # a guide's tokens came from no engine of the policy, and no policy loss reads them
        bounds: dict[str, Any] = {"low": how.low, "level": how.level, "keeps_extremes": how.mode == "truncate"}
        weights = engine_weights(at_sampling, inputs["behaviour_logps"], sampled, how.high, **bounds)
        tokens = sampled.sum()
        sums = {
            "mean": (weights * sampled).sum(),
            "square": (weights.square() * sampled).sum(),
            "capped_share": (((weights >= how.high) | (weights <= how.low)) * sampled).sum(),
        }
        self.record({f"engine_weight_{name}": (total, tokens) for name, total in sums.items()})
        return replace(batch, advantages=per_token(batch.advantages, weights) * weights)

    # ------------------------------------------------------------------------------------------------ checkpoints

    @property
    def kept(self) -> dict[str, Kept]:
        """What is the same on all ranks and longer in memory than a step."""
        named: dict[str, Kept | None] = {
            "lagging": self.lagging,
            "masking": self.masking,
            "average": self.average,
            "replay": self.replay_buffer,
            "refill": self.refill,
            "teacher": self.scorer if isinstance(self.scorer, ServedTeacher) else None,
        }
        return {name: one for name, one in named.items() if one is not None}

    def save_files(self, folder: Path) -> None:
        """Batches that are being sampled are waited for: their weights are gone after the next update."""
        super().save_files(folder)
        self.settle()
        window = self.state.global_step // self.method.updates_per_rollout
        unfinished = self.buffer if self.buffer_window == window else []
        save_of_rank(OfRank(window, unfinished, self.queue, self.uncounted), folder, self.rank, self.world)
        if self.accelerator.is_main_process:
            save_shared(self.kept, folder)

    def load_files(self, checkpoint: Path) -> None:
        super().load_files(checkpoint)
        found = load_of_rank(checkpoint, self.rank, self.world)
        if found is not None:
            self.queue, self.uncounted = dict(found.queue), dict(found.uncounted)
            if found.buffer:
                self.buffer, self.buffer_window = list(found.buffer), found.window
        load_shared(self.kept, checkpoint)
        if self.masking is not None and self.buffer_window is not None and not self.masking.weights:
            raise StateError(
                "the checkpoint lies within a batch of rollouts that were sampled without a mask model",
                where=str(checkpoint),
                hint="resume from a checkpoint between two rollouts, or with the method as it was",
            )
