"""The two sides of `train_speed.py`: a step by stock TRL and by posttrain, on equal weights and rows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import mkdtemp
from typing import Any

import torch
from common import PAD, random_like, random_rows, tokenizer
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.data.sample import Sample
from posttrain.methods import METHODS
from posttrain.models.collate import collate
from posttrain.models.reference import Reference
from posttrain.models.token_logps import prepare, token_logps, token_logps_and_divergence
from posttrain.objectives.batch import PreferenceBatch, TokenBatch
from posttrain.objectives.next_token import generalised_jsd

BETA = 0.5
"""Of the divergence from a teacher."""

Losses = Sequence[Callable[[], Tensor]]
"""The losses of a step, one per micro-batch; each is followed by its backward pass."""


@dataclass(frozen=True)
class Workload:
    """A step: what is computed, on how many prompts (for pairs: rows), completions per prompt and tokens of each."""

    kind: str
    prompts: int
    group: int
    prompt: int
    completion: int

    def rows(self, vocab: int) -> list[Sample]:
        """The rollouts or responses, those of a prompt side by side."""
        return random_rows(vocab, self.prompts, self.group, self.prompt, self.completion)


@dataclass
class Sides:
    """A step of either side, and the models whose gradients they leave."""

    steps: dict[str, Callable[[], Tensor]]
    models: dict[str, PreTrainedModel]


def build(
    model: PreTrainedModel, workload: Workload, *, bf16: bool, checkpointing: bool, only: str | None = None
) -> Sides:
    """Both sides on equal weights and rows, or one of them alone."""
    rows = workload.rows(model.vocab_size)
    sides = Sides({}, {})
    for side in ("trl", "ours") if only is None else (only,):
        own = copy.deepcopy(model)
        if checkpointing:
            own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        own.train()
        losses = MAKERS[side][workload.kind](own, workload, rows, bf16)
        sides.steps[side] = losses[0] if workload.kind == "reference" else _with_backward(own, losses)
        sides.models[side] = own
    return sides


def _with_backward(model: PreTrainedModel, losses: Losses) -> Callable[[], Tensor]:
    def step() -> Tensor:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        total = torch.zeros(())
        for loss in losses:
            value = loss()
            value.backward()
            total += value.detach()
        return total

    return step


# ------------------------------------------------------------------------------------------------------------ stock TRL


def trl_arguments(bf16: bool, rows: int) -> dict[str, Any]:
    return {
        "output_dir": mkdtemp(),
        "use_cpu": True,
        "bf16": bf16,
        "report_to": [],
        "gradient_checkpointing": False,  # switched on by `build` for both
        "per_device_train_batch_size": rows,
        "disable_tqdm": True,
    }


def grpo_trainer(model: PreTrainedModel, group: int, rows: int, bf16: bool, processing: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    # TRL wants two completions per prompt; it groups rewards by it, not what is computed here.
    generations = max(group, 2)
    arguments = GRPOConfig(**trl_arguments(bf16, rows), loss_type="grpo", beta=0.0, num_generations=generations)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 16}),
        processing_class=processing,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _grpo_inputs(workload: Workload, rows: list[Sample], advantages: Tensor) -> dict[str, Tensor]:
    """Prompts and completions as TRL keeps them: apart, the completions padded."""
    completions = [torch.tensor(row.ids[workload.prompt :]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=PAD)
    masks = torch.nn.utils.rnn.pad_sequence([torch.ones_like(c) for c in completions], batch_first=True)
    prompts = torch.tensor([row.ids[: workload.prompt] for row in rows])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": padded,
        "completion_mask": masks,
        "advantages": advantages,
        "num_items_in_batch": masks.sum(),
    }


def trl_policy(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    trainer = grpo_trainer(model, workload.group, len(rows), bf16, tokenizer())
    inputs = _grpo_inputs(workload, rows, advantages_of(len(rows)))
    return [_loss_of(trainer, lambda: trainer._compute_loss(model, inputs))]


def _loss_of(trainer: Any, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The loss under the trainer's own autocast."""

    def loss() -> Tensor:
        with trainer.compute_loss_context_manager():
            return compute()

    return loss


def trl_reference(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    from trl.trainer.utils import add_fused_lm_head

    trainer = grpo_trainer(copy.deepcopy(model), workload.group, len(rows), bf16, tokenizer())
    inputs = _grpo_inputs(workload, rows, advantages_of(len(rows)))
    add_fused_lm_head(model.eval())  # as for its reference: log-probs only
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)

    @torch.no_grad()
    def step() -> Tensor:
        with trainer.compute_loss_context_manager():
            arguments = (model, ids, attention, inputs["completion_ids"].size(1))
            logps = trainer._get_per_token_logps_and_entropies(*arguments)[0]
        return (logps * inputs["completion_mask"]).sum()

    return [step]


def trl_dpo(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    trainer = DPOTrainer(
        model=model,
        ref_model=random_like(model.config, seed=7),
        args=DPOConfig(**trl_arguments(bf16, workload.prompts), max_length=None),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 8),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    examples = []
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        start = chosen.loss_mask.index(1)
        examples.append(
            {"prompt_ids": chosen.ids[:start], "chosen_ids": chosen.ids[start:], "rejected_ids": rejected.ids[start:]}
        )
    inputs = DataCollatorForPreference(pad_token_id=PAD)(examples)

    return [_loss_of(trainer, lambda: trainer._compute_loss(model, inputs, False))]


def trl_distill(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    """Logits of all tokens of student and teacher, then the divergence, as its GKDTrainer does."""
    from trl.experimental.gkd import GKDTrainer

    teacher, tensors = random_like(model.config, seed=7).eval(), collate(rows, PAD)
    inputs = {"input_ids": tensors["ids"], "attention_mask": tensors["attention_mask"]}
    labels = tensors["ids"].masked_fill(tensors["mask"] == 0, -100)[:, 1:]

    def loss() -> Tensor:
        with _autocast(bf16):
            own = model(**inputs).logits
            with torch.no_grad():
                other = teacher(**inputs).logits
        n = int((labels != -100).sum())
        shifted = own[:, :-1], other[:, :-1]
        return GKDTrainer.generalized_jsd_loss(*shifted, labels=labels, beta=BETA, num_items_in_batch=n)

    return [loss]


# ----------------------------------------------------------------------------------------------------------------- ours


def _autocast(bf16: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def advantages_of(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(2))


def our_policy(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    method, advantages, tensors = (
        METHODS["grpo"](METHODS["grpo"].Config()),
        advantages_of(len(rows)),
        collate(rows, PAD),
    )
    prepare(model)

    def loss() -> Tensor:
        with _autocast(bf16):
            found = token_logps(model, tensors["ids"], tensors["attention_mask"], tensors["mask"], entropy=True)
        batch = TokenBatch(tensors["mask"], found.logps, found.entropies, advantages=advantages)
        return sum(part.value / part.count for part in method.loss(batch).values())

    return [loss]


def our_reference(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    tensors = collate(rows, PAD)
    prepare(model.eval())

    @torch.no_grad()
    def step() -> Tensor:
        with _autocast(bf16):
            return token_logps(model, tensors["ids"], tensors["attention_mask"], tensors["mask"]).logps.sum()

    return [step]


def our_dpo(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    """With its reference pass, as TRL does it in every step."""
    method, reference = METHODS["dpo"](METHODS["dpo"].Config()), random_like(model.config, seed=7).eval()
    tensors = collate([*rows[::2], *rows[1::2]], PAD)
    inputs = tensors["ids"], tensors["attention_mask"], tensors["mask"]
    for each in (model, reference):
        prepare(each)

    def loss() -> Tensor:
        with _autocast(bf16):
            found = token_logps(model, *inputs, entropy=True)
            with torch.no_grad():
                ref = token_logps(reference, *inputs).logps
        responses = {}
        for role, part in (("chosen", slice(0, workload.prompts)), ("rejected", slice(workload.prompts, None))):
            logps, entropies = found.logps[part], found.entropies[part]
            responses[role] = TokenBatch(tensors["mask"][part], logps, entropies, ref_logps=ref[part])
        return sum(part.value / part.count for part in method.loss(PreferenceBatch(responses)).values())

    return [loss]


def our_distill(model: PreTrainedModel, workload: Workload, rows: list[Sample], bf16: bool) -> Losses:
    """The loss of opd with `objective: full`: the divergence goes through the tiled head."""
    teacher, tensors = random_like(model.config, seed=7).eval(), collate(rows, PAD)
    inputs = tensors["ids"], tensors["attention_mask"], tensors["mask"].bool()
    for each in (model, teacher):
        prepare(each)
    reference = Reference(teacher)

    def loss() -> Tensor:
        with _autocast(bf16):
            states = reference.token_states(*inputs)
            found = token_logps_and_divergence(
                model, *inputs, states, lambda own, other: generalised_jsd(own, other, BETA), entropy=True
            )
        return found[2].sum() / inputs[2].sum()

    return [loss]


KINDS = ("policy", "reference", "dpo", "distill")
MAKERS = {
    "trl": dict(zip(KINDS, (trl_policy, trl_reference, trl_dpo, trl_distill), strict=True)),
    "ours": dict(zip(KINDS, (our_policy, our_reference, our_dpo, our_distill), strict=True)),
}
