"""HyPO: DPO on offline pairs, plus the reverse KL to the reference on unlabelled samples of the policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.needs import Needs
from posttrain.lazy import Tensor
from posttrain.methods.base import MethodConfig
from posttrain.methods.pairs import Compared, PairMethod
from posttrain.objectives.batch import LossSum, PreferenceBatch
from posttrain.objectives.preference import dpo_loss, online_kl_surrogate, online_kl_weights
from posttrain.objectives.sequences import lengths, log_ratios, sequence_logps


class HyPOConfig(MethodConfig):
    name: Literal["hypo"] = "hypo"
    beta: float = Field(0.1, gt=0, description="scale of the offline contrast (DPO's common value)")
    lam: float = Field(
        1e-3,
        ge=0,
        description="lambda, weight of the online KL, which is a sum over tokens; sweep 1e-5 to 1e-2; 0 is DPO (ours)",
    )
    k: int = Field(2, ge=1, description="completions sampled per prompt and step (ours: the least that has a baseline)")
    baseline: Literal["leave_one_out", "none"] = Field(
        "leave_one_out",
        description="what is subtracted from a log-ratio: the mean of the group's others, or nothing",
    )

    @model_validator(mode="after")
    def _effective(self) -> HyPOConfig:
        written = self.model_fields_set
        if self.lam == 0 and written & {"k", "baseline"}:
            raise ValueError("k and baseline have no effect with lam 0")
        if self.lam > 0 and self.k == 1 and self.baseline == "leave_one_out":
            raise ValueError("baseline leave_one_out needs k of at least 2: set k, or baseline: none")
        return self


class HyPO(PairMethod[HyPOConfig]):
    """Terms `offline` (pairs) and, with lam above 0, `online` (sequences). A micro-batch may hold either or both."""

    Config = HyPOConfig
    term = "offline"
    paper = "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage, arXiv 2406.01462"

    @property
    def online(self) -> bool:
        return self.config.lam > 0

    @property
    def needs(self) -> Needs:
        return Needs(data=("preferences",), samples=self.config.k if self.online else 0, reference=True)

    def online_weights(self, logps: Tensor, ref_logps: Tensor, groups: Tensor) -> Tensor:
        return online_kl_weights(logps, ref_logps, groups, leave_one_out=self.config.baseline == "leave_one_out")

    def compare(self, rows: PreferenceBatch) -> Compared:
        ratio_w, ratio_l = (log_ratios(rows.responses[role]) for role in ("chosen", "rejected"))
        losses = dpo_loss(ratio_w, ratio_l, self.config.beta)
        rewards = (self.config.beta * ratio_w, self.config.beta * ratio_l)
        return Compared(losses, rewards, rewards[0] - rewards[1])

    def counts(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        counts = super().counts(batch)
        if self.online:
            none = counts["offline"].new_zeros(())
            counts["online"] = none if batch.samples is None else (lengths(batch.samples) > 0).sum().float()
        return counts

    def loss(self, batch: PreferenceBatch) -> dict[str, LossSum]:
        counts = self.counts(batch)
        nothing = LossSum(counts["offline"].new_zeros(()), "pairs", counts["offline"])
        terms = super().loss(batch) if batch.responses else {"offline": nothing}
        if self.online:
            terms["online"] = self._online(batch, counts["online"])
        return terms

    def _online(self, batch: PreferenceBatch, n: Tensor) -> LossSum:
        samples = batch.samples
        if samples is None:
            return LossSum(n.new_zeros(()), "sequences", n)
        if samples.advantages is None:
            raise ValueError("samples without weights: the shell puts those of `online_weights` into their advantages")
        if samples.advantages.dim() != 1:
            raise ValueError(f"weights are one per sample, got shape {tuple(samples.advantages.shape)}")
        surrogate = online_kl_surrogate(sequence_logps(samples), samples.advantages)
        # The surrogate's value means nothing; the estimate of the KL is the mean log-ratio.
        k = log_ratios(samples).detach().sum()
        sums = {"kl": (k, lengths(samples).sum()), "kl_sequence": (k, n)}
        return LossSum(self.config.lam * surrogate.sum(), "sequences", n, sums)
