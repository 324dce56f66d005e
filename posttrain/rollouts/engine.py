"""The engine protocol: token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `greedy` ignores temperature, top_p and top_k.

    Attributes:
        n: completions per prompt.
        max_new_tokens: tokens, the stop token included.
        temperature: divides the logits; > 0.
        top_p: nucleus mass in (0, 1].
        top_k: keep the k likeliest tokens; None is off.
        greedy: take the likeliest token.
        seed: the draws depend on (seed, number of the prompt, number of the completion) and on nothing else, so that
            they change neither with the batch size nor with the number of ranks.
        first_prompt: number of the call's first prompt; a rank gives the position of its share in the step.
        first_sample: number of the call's first completion of each prompt.
        prompt_numbers: the number of every prompt of the call, where they are not consecutive; `first_prompt` is then
            not read.
        beams: 1 draws (or takes the likeliest token, with `greedy`); above, a beam search of this width gives its `n`
            best completions, and nothing else here is read but max_new_tokens.
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    greedy: bool = False
    seed: int = 0
    first_prompt: int = 0
    first_sample: int = 0
    prompt_numbers: tuple[int, ...] | None = None
    beams: int = 1

    def draw(self, prompt: int, sample: int) -> tuple[int, int]:
        """Number of the prompt and of the completion for the draws, of positions within the call."""
        number = self.first_prompt + prompt if self.prompt_numbers is None else self.prompt_numbers[prompt]
        return number, self.first_sample + sample


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: sampled token ids, the stop token included when there is one.
        logps: log-prob of each sampled token under the policy at the sampling temperature, before top-p and top-k;
            empty where the engine cannot give that (vLLM with top-p or top-k at another temperature than 1).
        finish: "stop" if a stop token was sampled, "length" if it was cut.
        policy_version: weight syncs the engine had seen.
    """

    ids: list[int]
    logps: list[float]
    finish: Literal["stop", "length"]
    policy_version: int


def token_limits(prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Sequence[int] | None) -> Sequence[int]:
    """Most new tokens of each prompt's completions, of the arguments of `Engine.generate`.

    Raises:
        ValueError: limits for a beam search, not one for each prompt, or one that is not in 1 .. max_new_tokens.
    """
    if limits is None:
        return [sampling.max_new_tokens] * len(prompts)
    if sampling.beams > 1:
        raise ValueError("a beam search has one limit for all prompts")
    if len(limits) != len(prompts):
        raise ValueError(f"{len(limits)} limits for {len(prompts)} prompts")
    wrong = next((limit for limit in limits if not 1 <= limit <= sampling.max_new_tokens), None)
    if wrong is not None:
        raise ValueError(f"a limit of {wrong} tokens is not in 1 .. {sampling.max_new_tokens}")
    return limits


class Engine(Protocol):
    """Samples completions. Implementations: `rollouts.transformers_engine`; vLLM ones stand beside it."""

    policy_version: int

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence, prompt and completion; None without a limit."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt (token ids, no padding), in the order of the prompts.

        Args:
            limits: most new tokens of each prompt's completions, from 1 to `sampling.max_new_tokens`; a completion that
                its own limit ends has the finish "length". Draws do not depend on it. None: `sampling.max_new_tokens`
                for all. Not for beam searches.

        Raises:
            EngineError: a prompt is empty, or with its new tokens longer than `positions`.
            ValueError: limits that are not as said above.
        """
        ...

    def read_tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
        """Prompt tokens that `generate` computes for these arguments, without padding: what the compute ledger charges.

        A pure function of the arguments, so that a resumed run is charged what it would have been.
        """
        ...

    def sync(self, version: int) -> dict[str, float]:
        """Make the engine sample from the trainer's current weights and stamp them `version`. All ranks call it.

        Returns:
            Metrics of the sync, where there is one.

        Raises:
            EngineError: the engine cannot be reached, or does not hold these weights afterwards.
        """
        ...

    def together(self) -> AbstractContextManager:
        """What all ranks do together so that inside the block any of them may call `generate` alone."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Searching(Protocol):
    """An engine that samples more than it gives.

    Attributes:
        tokens_drawn: tokens sampled so far, those of dropped texts included.
    """

    tokens_drawn: int
