"""The compute ledger: tokens, floating-point operations and seconds, per step and since the start of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from posttrain.errors import StateError

KINDS = ("prompt", "sampled", "trained", "forward")
"""Kinds of tokens: read by the engine, sampled by it, trained on, passed forward only."""

FLOPS_PER_PARAMETER = {"prompt": 2, "sampled": 2, "trained": 6, "forward": 2}


class ComputeLedger:
    """Counts what a run spends, so that methods can be compared at equal compute.

    FLOPs are the usual estimate for dense transformers (Kaplan et al., arXiv 2001.08361, section 2.1): 2 N per token
    for a forward pass and 4 N more for the backward pass, with N the parameters that multiply. It leaves out attention
    over the context, padding, and the second forward pass of gradient checkpointing.

    Args:
        parameters: N. Leave out embeddings that are only looked up; count the output projection, and so a tied
            embedding once. For adapters, count the whole model.
        reduce: sums the token counts (in the order of `KINDS`) over all ranks; called by `step` on every rank. None
            where one rank counts for all.
        clock: seconds of a clock that does not go back.
    """

    def __init__(
        self,
        parameters: int,
        *,
        reduce: Callable[[list[int]], list[int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if parameters < 1:
            raise ValueError(f"parameters must be positive, got {parameters}")
        self.parameters = parameters
        self._reduce, self._clock = reduce, clock
        self._pending = dict.fromkeys(KINDS, 0)
        self._totals = dict.fromkeys(KINDS, 0)
        self._earlier_seconds = 0.0
        self._started = self._last = clock()

    def sampled(self, prompt_tokens: int, new_tokens: int) -> None:
        """Count a rollout: prompt tokens as often as the engine computes them, and tokens sampled."""
        self._count("prompt", prompt_tokens)
        self._count("sampled", new_tokens)

    def trained(self, tokens: int, backward: bool = True) -> None:
        """Count tokens passed forward and backward, or forward only. Padding left out, prompts included."""
        self._count("trained" if backward else "forward", tokens)

    def step(self) -> dict[str, float]:
        """Close the entry: registered metrics since the last call, and totals."""
        counts = [self._pending[kind] for kind in KINDS]
        spent = dict(zip(KINDS, self._reduce(counts) if self._reduce else counts, strict=True))
        self._pending = dict.fromkeys(KINDS, 0)
        for kind, tokens in spent.items():
            self._totals[kind] += tokens
        now = self._clock()
        seconds, self._last = now - self._last, now
        metrics: dict[str, float] = {f"tokens_{kind}": tokens for kind, tokens in spent.items()}
        metrics |= {f"tokens_{kind}_total": tokens for kind, tokens in self._totals.items()}
        metrics |= {"flops": self.flops(spent), "flops_total": self.flops(self._totals)}
        metrics |= {"step_seconds": seconds, "wall_seconds": self.wall_seconds}
        if seconds > 0:
            metrics["tokens_per_second"] = spent["trained"] / seconds
        return metrics

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the block's time out of the entry's seconds (an evaluation between steps); totals keep it."""
        started = self._clock()
        try:
            yield
        finally:
            self._last += self._clock() - started

    def flops(self, tokens: Mapping[str, int]) -> int:
        """FLOPs of these numbers of tokens by kind."""
        return self.parameters * sum(FLOPS_PER_PARAMETER[kind] * n for kind, n in tokens.items())

    @property
    def wall_seconds(self) -> float:
        """Seconds since the start of the run, without the pauses between resumes."""
        return self._earlier_seconds + self._clock() - self._started

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "parameters": self.parameters,
            "totals": dict(self._totals),
            "pending": dict(self._pending),
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved ledger; the clock starts anew.

        Raises:
            StateError: it was kept for a model of another size.
        """
        if state["parameters"] != self.parameters:
            raise StateError(
                f"the compute ledger counts for {state['parameters']:,} parameters, the model has {self.parameters:,}",
                hint="resume with the model that the run was started with",
            )
        self._totals = {kind: int(state["totals"][kind]) for kind in KINDS}
        self._pending = {kind: int(state["pending"][kind]) for kind in KINDS}
        self._earlier_seconds = float(state["wall_seconds"])
        self._started = self._last = self._clock()

    def _count(self, kind: str, tokens: int) -> None:
        if tokens < 0:
            raise ValueError(f"{tokens} {kind} tokens")
        self._pending[kind] += tokens
