"""What all shells share: the step as the unit of work, one division by global counts, one place that logs.

A shell builds all micro-batches of an optimizer step at its start, counts the units of each loss term over them and
over the ranks, and only then runs forward and backward. So the gradient is the same for every split of a step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from posttrain.config.batch import BatchPlan
from posttrain.config.schema import Recipe
from posttrain.data.known_traces import KnownTrace
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Sample
from posttrain.environments.pool import EnvironmentPool
from posttrain.methods.base import Method
from posttrain.methods.companions import DIVERGENCE, Divergence, ValueHeads
from posttrain.models.adapters import frozen_start
from posttrain.models.collate import Tensors, token_batch
from posttrain.models.full_divergence import ReferenceStates
from posttrain.models.modes import without_dropout
from posttrain.models.reference import Reference
from posttrain.models.router import collecting
from posttrain.models.saving import SavePlan
from posttrain.models.scored_head import Scores
from posttrain.models.token_logps import token_logps, token_logps_and_divergence, token_logps_and_values
from posttrain.models.value import of_heads
from posttrain.objectives.action_mask import ActionMask
from posttrain.objectives.batch import HEAD, LossSum
from posttrain.rollouts.engine import Engine
from posttrain.tracking.ledger import ComputeLedger
from posttrain.tracking.metrics import Means, declare
from posttrain.tracking.tracker import Tracker
from posttrain.trainers.critic import load_critic, save_critic
from posttrain.trainers.critic_first import drop_policy_gradients, refuse_where_sharded
from posttrain.trainers.host import Host
from posttrain.trainers.mixture import SOURCE, Mixture
from posttrain.trainers.router_loss import RouterLoss
from posttrain.trainers.scoring import ScoringModel
from posttrain.trainers.token_values import TokenValues
from posttrain.trainers.writer import WritingModel
from posttrain.verifiers.verdict import Judge


@dataclass(frozen=True, slots=True)
class RunParts:
    """What a run is made of beside the host's own. The method's needs decide which optional parts are there.

    Attributes:
        items: the fitted rows, in the form of the method's data section (`data.preparation`).
        pad_id: id for padding; masks never look at it.
        scorer: a further frozen model whose log-probs of rollouts the method reads.
        traces: those that the method reads beside its rows.
        writer: a further frozen model that begins or ends completions.
        mixture: the sources of the rows.
        saving: how the trained model will be written.
        environments: that rollouts act in.
    """

    recipe: Recipe
    method: Method
    plan: BatchPlan
    items: Sequence[Any]
    renderer: Renderer
    pad_id: int
    engine: Engine
    ledger: ComputeLedger
    tracker: Tracker
    run_dir: Path
    judge: Judge | None = None
    reference: Reference | None = None
    scorer: ScoringModel | None = None
    traces: Sequence[KnownTrace] = ()
    writer: WritingModel | None = None
    mixture: Mixture = Mixture()
    saving: SavePlan | None = None
    environments: EnvironmentPool | None = None

    def close(self, *, plots: bool) -> None:
        """End what runs beside the process, and write the curves if wanted."""
        self.tracker.close(plots=plots)
        for part in (self.engine, self.environments, self.judge, self.scorer):
            if part is not None:
                part.close()


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass over a micro-batch; all (B, T), aligned to tokens, 0 outside of the mask.

    Attributes:
        logps: with gradient.
        entropies: nats, without gradient.
        top1: 1 where the token was the likeliest; None where the shell does not want it.
        values: of the states before the tokens, with gradient; None without a critic, or by its heads in `further`.
        further: what joins `TokenBatch.further`.
    """

    logps: Tensor
    entropies: Tensor
    top1: Tensor | None
    values: Tensor | None = None
    further: dict[str, Tensor] = field(default_factory=dict)


class Shell(Host):
    """Mixin over a TRL host (see `trl_compat`). Call `bind` after construction, before `train`.

    Hooks of a shell: `step_batches`, and where its method takes more than a `TokenBatch`, `method_batch`.

    Attributes:
        wants_top1: whether the shell reads which tokens were the likeliest.
        step_inputs: micro-batches of the current optimizer step.
        step_losses: their losses so far, without gradient; what each adds to the loss of the step.
        shards: whether several ranks share out weights or optimizer state (DeepSpeed, FSDP2).
        step_samples: the rows of `step_inputs`, where the shell knows them; for people to look at.
        action_mask: restricts the tokens that the policy's log-probs are over; None for the whole vocabulary.
        scorer: whose log-probs or distributions the method reads beside those of the reference; None without one.
        router_loss: of a mixture of experts, added to each step; None without one.
        roles: of the sequences of a row.
        token_values: where `keep_tokens` writes.
    """

    parts: RunParts
    max_length: int | None = None
    wants_top1: bool = False
    shards: bool = False
    step_inputs: list[Tensors]
    step_losses: list[Tensor]
    step_samples: Sequence[Sequence[Sample]] = ()
    action_mask: ActionMask | None = None
    scorer: ScoringModel | None = None
    router_loss: RouterLoss | None = None
    roles: tuple[str, ...] = ("completion",)

    def bind(self, parts: RunParts) -> None:
        """Give the shell what the host's constructor does not take."""
        self.parts = parts
        self.method, self.ledger, self.tracker = parts.method, parts.ledger, parts.tracker
        declare(self.method.metrics)
        self.scorer = parts.scorer
        self.means, self.step_means = Means(), Means()
        self.ends_steps = type(self.method).end_step is not Method.end_step
        budget = parts.recipe.tracking.token_values
        self.token_values = TokenValues(parts.run_dir, budget, parts.plan.max_steps, parts.renderer)
        self.shards = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.shards:
            refuse_where_sharded(parts.recipe, self.method.needs)
            self._train_in_one_type()

    def _train_in_one_type(self) -> None:
        """Give all trained tensors the type that most of their elements have, as where a head is in float32.

        FSDP2 and ZeRO-3 refuse several types; the other stages of ZeRO put all into one buffer of the largest.
        """
        elements: Counter[torch.dtype] = Counter()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            elements[parameter.dtype] += parameter.numel()
        for parameter in trained:
            parameter.data = parameter.data.to(elements.most_common(1)[0][0])

    @property
    def rank(self) -> int:
        """The number of this process among `world`."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    @abstractmethod
    def step_batches(self, step: int) -> list[Tensors]:
        """Micro-batches of this rank for optimizer step `step` (from 0), on the CPU."""

    def method_batch(self, inputs: Tensors, model: torch.nn.Module | None) -> Any:
        """The method's view of a micro-batch: with log-probs if a model is given, else for counting."""
        if model is None:
            return token_batch(inputs, max_length=self.max_length)
        forward = self.forward(model, inputs)
        self.record({**self.forward_diagnostics(inputs, forward)})
        self.keep_tokens(inputs, forward.logps.detach())
        return token_batch(inputs, forward.logps, forward.entropies, self.max_length, forward.values, forward.further)

    def keep_tokens(self, inputs: Tensors, logps: Tensor) -> None:
        """Write the values of some tokens of a micro-batch into `tokens.jsonl`: those of the first rows of the step."""
        step = self.state.global_step
        if self.accelerator.is_main_process and not self.step_losses and self.token_values.wanted(step):
            self.token_values.write_responses(step, inputs, self.roles, logps)

    def pixels(self, tensors: Tensors) -> int:
        """Pixels that a model looks at for the rows of a micro-batch: of each picture once."""
        renderer = self.parts.renderer
        return 0 if renderer.pictures is None else renderer.pixels(tensors["ids"].tolist())

    def policy_rows(self, inputs: Tensors) -> list[Tensors]:
        """The rows of a micro-batch that the policy's passes read, pass by pass."""
        return [inputs]

    def forward_diagnostics(self, inputs: Tensors, forward: Forward) -> dict[str, tuple[Tensor, Tensor]]:
        """Diagnostics of one forward pass beside the entropy: name -> (sum, count)."""
        return {}

    def forward(self, model: torch.nn.Module, inputs: Tensors) -> Forward:
        """Log-probs of a micro-batch under the policy; counts the tokens and records the entropy."""
        with self.accelerator.autocast():
            (logps, entropies, top1), values, further = self.scores(model, inputs)
        read = int(inputs["attention_mask"].sum())
        pixels = self.pixels(inputs)
        self.ledger.trained(read, pixels=pixels)
        if SOURCE in inputs:
            self.parts.mixture.count(self.ledger, inputs)
        if self.action_mask is not None:
            self.ledger.scored(read, "policy", pixels=pixels)
        mask = inputs["mask"]
        if "expert" in inputs:  # metrics of the policy do not depend on what somebody else wrote
            mask = mask & ~inputs["expert"].unsqueeze(1)
        self.record({"entropy": ((entropies * mask).sum(), mask.sum())})
        return Forward(logps, entropies, top1, values, further)

    def scores(self, model: torch.nn.Module, inputs: Tensors) -> tuple[Scores, Tensor | None, dict[str, Tensor]]:
        """The pass itself: scores, values with a critic, and the divergence over the whole vocabulary where it is read,
        which takes a pass of the frozen model: the scorer where there is one, else the reference."""
        rows, needs = (inputs["ids"], inputs["attention_mask"], inputs["mask"]), self.method.needs
        wanted: dict[str, Any] = {"entropy": True, "top1": self.wants_top1, "action_mask": self.action_mask}
        divergence, values = needs.companion(Divergence), None
        further: dict[str, Tensor] = {}
        if divergence is not None:
            states, asked = self.frozen_states(inputs), {"entropy": True, "values": needs.critic}
            scores, values, found = token_logps_and_divergence(model, *rows, states, divergence.between, **asked)
            further[DIVERGENCE] = found
        elif needs.critic:
            scores, values = token_logps_and_values(model, *rows, **wanted)
        else:
            scores = token_logps(model, *rows, **wanted)
        if values is None:
            return scores, None, further
        values, by_heads = self.of_heads(values, inputs)
        return scores, values, further | by_heads

    def of_heads(self, values: Tensor, inputs: Tensors) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(B, T) values of a critic with one head, or by the head that the method names for each row; or by all heads
        for every row, as what joins `TokenBatch.further`."""
        heads = self.method.needs.companion(ValueHeads)
        if heads is None:
            return values, {}
        if heads.of_rows is None:
            return None, {f"{HEAD}{head}": own for head, own in enumerate(values)}
        return of_heads(values, heads.of_rows(token_batch(inputs)).to(values.device)), {}

    def frozen_states(self, inputs: Tensors) -> ReferenceStates:
        """What a divergence reads of the model that the policy is compared with; counts the tokens."""
        frozen = self.scorer or self.by_reference
        self.ledger.scored(frozen.read(inputs), frozen.role, pixels=self.pixels(inputs))
        return frozen.token_states(inputs, self.accelerator.device)

    @property
    def by_reference(self) -> ScoringModel:
        """The reference as a model that scores."""
        return ScoringModel(self.parts.reference, "reference")

    def logps_by(self, model: ScoringModel, tensors: Tensors) -> Tensor:
        """(B, T) log-probs of a micro-batch under a model, on the CPU; counts the tokens."""
        self.ledger.scored(model.read(tensors), model.role, pixels=self.pixels(tensors))
        with self.accelerator.autocast():
            return model.token_logps(tensors, self.accelerator.device).cpu()

    @torch.no_grad()
    def logps_now(self, tensors: Tensors) -> Tensor:
        """The same under the policy as it is, without dropout and over the whole vocabulary."""
        inputs = (tensors[name].to(self.accelerator.device) for name in ("ids", "attention_mask", "mask"))
        self.ledger.scored(int(tensors["attention_mask"].sum()), "policy", pixels=self.pixels(tensors))
        with self.accelerator.autocast(), without_dropout(self.model):
            return token_logps(self.model, *inputs)[0].cpu()

    def content(self) -> dict[str, str]:
        """What shapes the steps beside rows and settings, by name; a checkpoint is only continued by a run with the
        same (`content.<name>` in `state.identity`)."""
        return {name: value for each in self.method.needs.companions for name, value in each.content.items()}

    def save_files(self, folder: Path) -> None:
        """Write what the shell remembers between steps, beside weights and optimizer, into a checkpoint that is being
        filled. Called on all ranks."""
        save_critic(self, folder)

    def load_files(self, checkpoint: Path) -> None:
        """Read it again. Called on all ranks before the first step of a resumed run."""
        load_critic(self, checkpoint)

    def settle(self) -> None:
        """Return once the engine does nothing for this shell in the background, so that others may use it. Called on
        all ranks."""

    def sync_engine(self, version: int) -> None:
        """Make the engine sample from the current weights. Called on all ranks."""
        for name, value in self.parts.engine.sync(version).items():
            self.means.add(name, value)

    def record(self, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add (sum, count) pairs to the means of the current log entry."""
        for name, (total, n) in sums.items():
            self.means.add(name, float(total), float(n))
            if self.ends_steps:
                self.step_means.add(name, float(total), float(n))

    def start_of_adapter(self) -> Reference:
        """The policy as it is now, with the adapter it goes on with, as a frozen reference; before the first step."""
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        return Reference(self.prepare_frozen(frozen_start(self.model, share=whole)))

    # ------------------------------------------------------------------------------- the host's public hooks

    def get_train_dataloader(self) -> DataLoader:
        """Placeholders: the loop counts micro-steps with them, `get_batch_samples` brings the batches."""
        micro_steps = range(self.args.max_steps * self.args.gradient_accumulation_steps)
        # With a generator of its own: a loader draws a seed when it starts, and a resumed run starts one more.
        return DataLoader(micro_steps, batch_size=None, generator=torch.Generator())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, dict]:
        """All micro-batches of the coming optimizer step, and the number of units of each loss term over all ranks."""
        for _ in range(num_batches):
            next(epoch_iterator)
        self.settle_shards()
        batches = self.step_batches(self.state.global_step)
        if len(batches) != num_batches:
            raise RuntimeError(f"{len(batches)} micro-batches for {num_batches} micro-steps")
        self.step_inputs, self.step_losses = batches, []
        if self.router_loss is not None:
            self.router_loss.begin_step(batches)
        return batches, self.global_counts(batches, device)

    def global_counts(self, batches: list[Tensors], device: torch.device) -> dict[str, Tensor]:
        """Units of each loss term over these micro-batches of all ranks."""
        counts: dict[str, Tensor] = {}
        for inputs in batches:
            for term, n in self.method.counts(self.method_batch(inputs, None)).items():
                counts[term] = counts.get(term, torch.zeros(())) + n
        return {term: self.accelerator.reduce(n.to(device), reduction="sum") for term, n in sorted(counts.items())}

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch; the policy's gradients go where the critic is trained alone."""
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step < self.method.needs.critic_first and not self.shards:
            drop_policy_gradients(model)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Tensors,
        return_outputs: bool = False,
        num_items_in_batch: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """This rank's part of the loss, times the number of ranks because gradients are averaged over them."""
        with nullcontext() if self.router_loss is None else collecting(gradient=True) as routing:
            sums: dict[str, LossSum] = self.method.loss(self.method_batch(inputs, model))
        for part in sums.values():
            self.record(part.diagnostics)
        loss = sum(part.value / num_items_in_batch[term].clamp(min=1) for term, part in sums.items())
        if self.router_loss is not None:
            loss = loss + self.router_loss.term(routing)
        self.step_losses.append(loss.detach())
        if self.ends_steps and len(self.step_losses) == len(self.step_inputs):
            self._end_step()
        return loss * self.world

    def _end_step(self) -> None:
        means, self.step_means = self.step_means, Means()
        whole = Means()
        for part in gather_object([means.state_dict()]):
            whole.merge(part)
        self.method.end_step(whole.result())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Join the loop's values with the means over all ranks since the last call; write and show them."""
        if "loss" not in logs:  # the loop's closing summary of speed, which the ledger has better
            return
        merged = Means()
        for part in gather_object([self.means.state_dict()]):
            merged.merge(part)
        self.means = Means()
        metrics: dict[str, float] = {
            name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs
        }
        metrics |= merged.result() | self.ledger.step()
        self.tracker.log(self.state.global_step, metrics)
        super().log(logs | metrics, start_time)
