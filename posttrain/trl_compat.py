"""The one module that touches TRL's (and the Trainer's) private names; tested against the pinned range.

It turns TRL's trainers into hosts for the shells: model preparation, PEFT, distributed wrapping, the fused LM head and
checkpoints are TRL's; batches, losses and logging are the shells'.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# TRL reports each trainer start to its makers; a user of posttrain did not ask for that.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel, Trainer, TrainingArguments  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.models.utils import prepare_deepspeed, prepare_fsdp  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402


class _HostMixin:
    """Hooks that both hosts share. A shell comes before it in the method resolution order."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the global count itself

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return Trainer._prepare_inputs(self, inputs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # without TRL's model card

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        Trainer.log(self, logs, start_time)  # TRL would mix in metrics of the parts that are not used

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the compute ledger counts

    def prepare_frozen(self, model: PreTrainedModel) -> torch.nn.Module:
        """A frozen model placed and sharded like the policy, with a fused LM head."""
        add_fused_lm_head(model, temperature=getattr(self, "temperature", 1.0))
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)


class SFTHost(_HostMixin, SFTTrainer):
    """TRL's SFTTrainer as a host."""

    Arguments = SFTConfig

    @staticmethod
    def extra_arguments(**_: Any) -> dict[str, Any]:
        return {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}


def _unused_reward(**_: Any) -> list[float]:
    raise RuntimeError("TRL's reward path was entered; the shell scores rollouts itself")


class OnlineHost(_HostMixin, GRPOTrainer):
    """TRL's GRPOTrainer as a host: its generation, reward and loss paths are never entered."""

    Arguments = GRPOConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(reward_funcs=[_unused_reward], **arguments)  # TRL refuses to start without one

    @staticmethod
    def extra_arguments(*, temperature: float, max_new_tokens: int, samples_per_prompt: int) -> dict[str, Any]:
        return {
            "temperature": temperature,
            "max_completion_length": max_new_tokens,
            # TRL refuses 1; its own grouping is not used.
            "num_generations": max(samples_per_prompt, 2),
            "beta": 0.0,  # the shell holds the reference
        }


def fused_token_logps(
    model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs of the tokens under `mask`, aligned to tokens, without materialising (B, T, V) logits.

    Args:
        model: a model with a fused LM head, possibly wrapped.
        ids, attention_mask, mask: (B, T); mask[:, 0] must be 0, as nothing predicts the first token.

    Returns:
        log-probs (B, T) with gradient, entropies (B, T) or None, 1 where the token was the likeliest (B, T) or None;
        all 0 outside of `mask`.
    """
    labels = ids.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)

    def aligned(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.nn.functional.pad(values, (1, 0))

    top1 = None if output.is_top1 is None else output.is_top1.to(output.log_probs.dtype)
    return aligned(output.log_probs), aligned(output.entropy), aligned(top1)


def quiet_arguments(host: type[SFTHost] | type[OnlineHost], output_dir: Path, **arguments: Any) -> TrainingArguments:
    """Training arguments for a host with the settings that every shell shares."""
    return host.Arguments(
        output_dir=str(output_dir),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        ignore_data_skip=True,  # the batch of a step is a function of the step
        logging_nan_inf_filter=False,
        eval_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        **arguments,
    )
