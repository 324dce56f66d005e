"""The compute ledger: tokens, FLOPs, steps of environments and seconds, per step and since the start of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from posttrain.config.metric import Metric
from posttrain.errors import StateError

TIME = (
    Metric(
        "step_seconds",
        "Wall-clock time since the previous entry, checkpoints included and evaluations between steps not.",
        "s",
        "last",
    ),
    Metric("rollout_seconds", "Time spent sampling, per rollout.", "s"),
    Metric("verify_seconds", "Time spent verifying, per rollout.", "s"),
    Metric(
        "pipeline_overlap_seconds",
        "With `rollouts.pipeline`: time for which a rollout was sampled and verified beside the training.",
        "s",
    ),
    Metric(
        "pipeline_wait_seconds",
        "With `rollouts.pipeline`: time for which the training then still waited for the rollout.",
        "s",
    ),
    Metric("sync_seconds", "Time for one copy of the weights to the vLLM engine.", "s"),
    Metric("update_seconds", "Time spent in forward, backward and optimizer.", "s"),
    Metric("tokens_per_second", "Tokens trained per second of `step_seconds`.", "tokens/s", "last"),
    Metric("tokens_prompt", "Prompt tokens the engine read since the previous entry.", "tokens", "sum"),
    Metric("tokens_sampled", "Tokens sampled since the previous entry.", "tokens", "sum"),
    Metric("tokens_trained", "Tokens passed forward and backward, prompts included.", "tokens", "sum"),
    Metric(
        "tokens_scored",
        "Tokens passed forward only, once for each pass (reference, scorer, old log-probs, a frozen model).",
        "tokens",
        "sum",
    ),
    Metric(
        "flops",
        "Floating-point operations of all models' passes: 2 N per token forward, and backward 2 N and 2 per "
        "trained parameter more, N being those that multiply (6 N where all are trained); likewise of what looks at "
        "pictures, once for each in a pass. Without attention over the context, verifiers and evaluations.",
        "FLOP",
        "sum",
    ),
    Metric("environment_steps", "Actions that environments answered; only in runs that act in some.", "1", "sum"),
    Metric("cpu_seconds", "Processor seconds of the processes of all ranks.", "s", "sum"),
    Metric("gpu_seconds", "Seconds times GPUs of all ranks; only on GPUs.", "s", "sum"),
    Metric("tokens_prompt_total", "`tokens_prompt` since the start of the run.", "tokens", "last"),
    Metric("tokens_sampled_total", "`tokens_sampled` since the start of the run.", "tokens", "last"),
    Metric("tokens_trained_total", "`tokens_trained` since the start of the run.", "tokens", "last"),
    Metric("tokens_scored_total", "`tokens_scored` since the start of the run.", "tokens", "last"),
    Metric("flops_total", "`flops` since the start of the run.", "FLOP", "last"),
    Metric("environment_steps_total", "`environment_steps` since the start of the run.", "1", "last"),
    Metric("cpu_seconds_total", "`cpu_seconds` since the start of the run, without evaluations.", "s", "last"),
    Metric("gpu_seconds_total", "`gpu_seconds` since the start of the run, without evaluations.", "s", "last"),
    Metric("wall_seconds", "Wall-clock time of the run so far, without pauses between resumes.", "s", "last"),
)

TOKENS = ("prompt", "sampled", "trained", "scored")
"""Kinds of tokens: read by an engine, sampled by it, passed forward and backward, passed forward only."""

AMOUNTS = (*(f"tokens_{kind}" for kind in TOKENS), "flops", "environment_steps", "cpu_seconds", "gpu_seconds")
"""What is summed over steps and ranks, by the names of the metrics."""

UNITS = ("flops", "tokens", "environment_steps", "seconds")
"""In which a budget may be, and curves are drawn over what was spent."""

Role = Literal["policy", "critic", "reference", "scorer", "writer"]


@dataclass(frozen=True, slots=True)
class Looks:
    """What of a model looks at pictures, as it is charged. Parameters are those that multiply, as in `Size`.

    Attributes:
        patch: side of a patch in pixels. The tower reads patches.
        merge: patches that become one of the vectors that the projector reads.
        tower, projector: parameters.
        tower_trained, projector_trained: of these, those that get a gradient.
    """

    patch: int
    merge: int
    tower: int
    tower_trained: int
    projector: int
    projector_trained: int

    @property
    def trained(self) -> int:
        """Parameters that get a gradient."""
        return self.tower_trained + self.projector_trained

    def forward(self, pixels: int) -> int:
        """FLOPs of looking at pictures of so many pixels."""
        patches, vectors = self._read(pixels)
        return 2 * (self.tower * patches + self.projector * vectors)

    def backward(self, pixels: int) -> int:
        """Of the gradients: of each part for what it has of trained parameters, and through it for what it is made of,
        down to the first part that is trained."""
        patches, vectors = self._read(pixels)
        flops = 2 * (self.projector + self.projector_trained) * vectors if self.trained else 0
        return flops + (2 * (self.tower + self.tower_trained) * patches if self.tower_trained else 0)

    def _read(self, pixels: int) -> tuple[int, int]:
        patches = pixels // self.patch**2
        return patches, patches // self.merge


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is, as its passes are charged: FLOPs per token by Kaplan et al., arXiv 2001.08361, section 2.1.

    Attributes:
        parameters: N, those that multiply a token. Without embeddings that are only looked up; with the output
            projection, and so a tied embedding once.
        trained: of these, those that get a gradient: all of them, the low-rank matrices of an adapter, or none.
        head_only: it sits on the policy's trunk, and reads no tokens itself.
        looks: what of it looks at pictures, which no token goes through; None if nothing does.
    """

    parameters: int
    trained: int = 0
    head_only: bool = False
    looks: Looks | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.trained <= self.parameters or self.parameters < 1:
            raise ValueError(f"{self.trained} trained of {self.parameters} parameters")

    @property
    def forward(self) -> int:
        """A product and a sum for each parameter."""
        return 2 * self.parameters

    @property
    def backward(self) -> int:
        """As much for the gradient that goes on through it, and for that of what is trained; 0 if that is nothing."""
        return 2 * self.parameters + 2 * self.trained if self.learns else 0

    @property
    def learns(self) -> bool:
        """Whether a gradient goes through it: to its own parameters, or on to what looks at pictures."""
        return bool(self.trained or (self.looks is not None and self.looks.trained))

    def looking(self, pixels: int, *, training: bool = False) -> int:
        """FLOPs of looking at pictures of so many pixels, with the gradients if it is for training."""
        if self.looks is None:
            return 0
        return self.looks.forward(pixels) + (self.looks.backward(pixels) if training else 0)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Size:
        """The size that `asdict` has made JSON values of."""
        looks = state.get("looks")
        return cls(**{**state, "looks": None if looks is None else Looks(**looks)})


class ComputeLedger:
    """Counts what a run spends, so that methods can be compared at equal compute.

    A pass is charged by the rows it is for: each whole, prompts included and padding not, however a run splits, packs
    or shares them. Their different pictures are charged once in a pass, also where what a frozen tower has made of one
    is still there: costs do not follow from luck. Left out are attention over the context, the second forward pass of
    gradient checkpointing, what verifiers compute, and evaluations between steps.

    Args:
        sizes: of the models of the run; the policy's at least. The critic passes where the policy is trained.
        reduce: sums numbers over all ranks; called by `step` on every rank. None where one rank counts for all.
        gpu: whether this rank holds a GPU, whose seconds are then counted.
        acts: whether the run acts in environments, whose steps are then counted.
        clock: seconds of a clock that does not go back.
        cpu_clock: processor seconds of this process.
        sources: names of the sources of a mixture, whose tokens are counted too.
    """

    def __init__(
        self,
        sizes: Mapping[Role, Size],
        *,
        reduce: Callable[[list[float]], list[float]] | None = None,
        gpu: bool = False,
        acts: bool = False,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
        sources: Sequence[str] = (),
    ) -> None:
        self.sizes = dict(sizes)
        self._reduce, self._gpu, self._clock, self._cpu_clock = reduce, gpu, clock, cpu_clock
        self._amounts = (*AMOUNTS, *(_tokens_of(name) for name in sources))
        self._unlogged = (*(() if gpu else ("gpu_seconds",)), *(() if acts else ("environment_steps",)))
        self._pending: dict[str, float] = dict.fromkeys(self._amounts, 0)
        self.totals: dict[str, float] = dict.fromkeys(self._amounts, 0)
        self._earlier_seconds = 0.0
        self._started = self._last = self._ticked = clock()
        self._ticked_cpu = cpu_clock()

    def sampled(self, prompt_tokens: int, new_tokens: int, by: Role = "policy", *, pixels: int = 0) -> None:
        """Count a rollout: prompt tokens as often as the engine computes them, and tokens sampled.

        Args:
            prompt_tokens, new_tokens, by: what was read and sampled, by which model.
            pixels: of the different pictures of the prompts, as the model sees them.
        """
        self._count("prompt", prompt_tokens)
        self._count("sampled", new_tokens)
        size = self.sizes[by]
        self._pending["flops"] += size.forward * (prompt_tokens + new_tokens) + size.looking(pixels)

    def trained(self, tokens: int, *, pixels: int = 0) -> None:
        """Count a training pass: forward through policy and critic, and backward through what of them is trained;
        `pixels` as in `sampled`, of its rows."""
        self._count("trained", tokens)
        for role in ("policy", "critic"):
            if (size := self.sizes.get(role)) is not None:
                self._pending["flops"] += (size.forward + size.backward) * tokens + size.looking(pixels, training=True)
                self._count("scored", 0 if size.learns or size.head_only else tokens)

    def scored(self, tokens: int, *roles: Role, pixels: int = 0) -> None:
        """Count a forward pass without gradient through each of these models; `pixels` as in `sampled`."""
        for role in roles:
            size = self.sizes[role]
            self._count("scored", 0 if size.head_only else tokens)
            self._pending["flops"] += size.forward * tokens + size.looking(pixels)

    def acted(self, steps: int) -> None:
        """Count actions that environments answered."""
        self._pending["environment_steps"] += steps

    def of_source(self, name: str, tokens: int) -> None:
        """Say of which source these tokens are that were passed forward and backward; `trained` counts them."""
        self._pending[_tokens_of(name)] += tokens

    def step(self) -> dict[str, float]:
        """Close the entry: registered metrics since the last call, and totals."""
        self._tick()
        now = self._clock()
        seconds, self._last = now - self._last, now
        amounts = [self._pending[name] for name in self._amounts]
        summed = zip(self._amounts, self._reduce(amounts) if self._reduce else amounts, strict=True)
        spent = {name: amount if name.endswith("seconds") else round(amount) for name, amount in summed}
        self._pending = dict.fromkeys(self._amounts, 0)
        for name, amount in spent.items():
            self.totals[name] += amount
        metrics = spent | {f"{name}_total": amount for name, amount in self.totals.items()}
        metrics |= {"step_seconds": seconds, "wall_seconds": self.wall_seconds}
        metrics = {name: value for name, value in metrics.items() if name.removesuffix("_total") not in self._unlogged}
        if seconds > 0:
            metrics["tokens_per_second"] = spent["tokens_trained"] / seconds
        return metrics

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the block's time (an evaluation between steps) out of all seconds but `wall_seconds`."""
        self._tick()
        started = self._clock()
        try:
            yield
        finally:
            self._ticked, self._ticked_cpu = self._clock(), self._cpu_clock()
            self._last += self._ticked - started

    def summary(self) -> str:
        """What the run has spent up to the last entry, in words."""
        return spent_in_words(self.totals)

    @property
    def wall_seconds(self) -> float:
        """Seconds since the start of the run, without the pauses between resumes."""
        return self._earlier_seconds + self._clock() - self._started

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        self._tick()
        return {
            "sizes": {role: asdict(size) for role, size in self.sizes.items()},
            "totals": dict(self.totals),
            "pending": dict(self._pending),
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved ledger; the clock starts anew.

        Raises:
            StateError: it was kept for models of other sizes, or by a version that counted otherwise.
        """
        if "sizes" not in state or not {*AMOUNTS} <= state["totals"].keys():
            raise StateError(
                "the compute ledger of this checkpoint counts by an earlier version's rules",
                hint="finish the run with the version that began it, or start anew",
            )
        for role, size in self.sizes.items():
            kept = Size.of_state(state["sizes"][role]) if role in state["sizes"] else None
            if kept != size:
                raise StateError(
                    f"the compute ledger counts for {_in_words(kept)} as {role}, the run has {_in_words(size)}",
                    hint="resume with the models that the run was started with",
                )
        self.totals = {name: state["totals"][name] for name in self._amounts}
        self._pending = {name: state["pending"][name] for name in self._amounts}
        self._earlier_seconds = float(state["wall_seconds"])
        self._started = self._last = self._ticked = self._clock()
        self._ticked_cpu = self._cpu_clock()

    def _tick(self) -> None:
        """Enter the seconds since the last call."""
        now, cpu = self._clock(), self._cpu_clock()
        self._pending["cpu_seconds"] += cpu - self._ticked_cpu
        self._pending["gpu_seconds"] += now - self._ticked if self._gpu else 0.0
        self._ticked, self._ticked_cpu = now, cpu

    def _count(self, kind: str, tokens: int) -> None:
        if tokens < 0:
            raise ValueError(f"{tokens} {kind} tokens")
        self._pending[f"tokens_{kind}"] += tokens


def _tokens_of(source: str) -> str:
    return f"source/{source}/tokens"


def spent_in_words(totals: Mapping[str, float]) -> str:
    """FLOPs, tokens and seconds in a line; of a GPU where there are such. `totals` by the names of `AMOUNTS`."""
    kinds = [kind for kind in ("trained", "sampled", "scored") if totals[f"tokens_{kind}"] or kind == "trained"]
    tokens = ", ".join(f"{totals[f'tokens_{kind}']:,.0f} {kind}" for kind in kinds)
    device = "gpu" if totals.get("gpu_seconds") else "cpu"
    return f"{totals['flops']:.3g} FLOPs; tokens: {tokens}; {totals[f'{device}_seconds']:,.0f} {device.upper()} seconds"


def _in_words(size: Size | None) -> str:
    if size is None:
        return "no model"
    looks, said = size.looks, f"{size.parameters:,} parameters ({size.trained:,} trained)"
    return said if looks is None else f"{said} and {looks.tower + looks.projector:,} ({looks.trained:,}) for pictures"
