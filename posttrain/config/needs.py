"""What a method needs, stated as data, so that preflight can refuse a recipe without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DataSection = Literal["prompts", "completions", "preferences", "unpaired", "stepwise", "traces"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method needs of a recipe and of the shell.

    Attributes:
        data: the sections of `data` that hold the rows it reads.
        rollouts: it samples from the policy, so `rollouts` and `batch.prompts_per_step` are read (else
            `rows_per_step`).
        samples: it draws completions of its rows' prompts too, from the policy as it is (temperature 1, all tokens); of
            `rollouts` only the length limit and the engine's settings are read, the number per prompt is the method's.
        verifier: it is rewarded, so `verifier` is read.
        reference: a frozen copy of the starting policy is held (or the adapter switched off).
        min_samples_per_prompt: smallest group that gives a signal.
        expert_rows: rows of `data.traces` that are trained on beside the rollouts, per optimizer step over all ranks.
            They come in micro-batches of their own, with `batch.expert` True, and enter no advantage and no metric of
            these.
        minibatches: optimizer steps in a pass over a batch of rollouts, which are of so many times
            `batch.prompts_per_step` prompts.
        old_logps: `loss` reads the log-probs of the sampling policy also where that policy is the current one.
        traces_instead: `data.traces` may stand in for `data.completions`.
        critic: there is a value model, so `critic` is read.
        value_heads: outputs of the value model, one per kind of rollouts; the method says which one values a row.
        trains: which of policy and critic; the other one stays as it is.
        critic_first: optimizer steps at the start in which the policy stays as it is and the critic alone is trained.
        classifier: it trains a sequence classifier, which writes no text, so `evaluation` is not read.
        guide: one more frozen model is held, which the method names: it scores rollouts, or writes parts of them; or
            the policy itself scores them with more in its prompt, as it is or was, or by an average of its weights.
        turns: it gives each turn of an episode an advantage of its own, so `environment` is read.
        masks_actions: a lagging copy of the policy says which tokens may be drawn; the transformers engine can do that.
    """

    data: tuple[DataSection, ...]
    rollouts: bool = False
    samples: bool = False
    verifier: bool = False
    reference: bool = False
    min_samples_per_prompt: int = 1
    expert_rows: int = 0
    minibatches: int = 1
    old_logps: bool = False
    traces_instead: bool = False
    critic: bool = False
    value_heads: int = 1
    trains: Literal["both", "policy", "critic"] = "both"
    critic_first: int = 0
    classifier: bool = False
    guide: Literal["scores", "writes", "self", "average"] | None = None
    masks_actions: bool = False
    turns: bool = False

    @property
    def batch_key(self) -> Literal["prompts_per_step", "rows_per_step"]:
        """The key of the `batch` section that sets the size of a step."""
        return "prompts_per_step" if self.rollouts else "rows_per_step"
