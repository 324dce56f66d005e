"""The writer of a run (`companions.Writer`): a frozen model that begins or ends completions beside the policy.

It is held whole on every rank and samples by the transformers engine, whatever engine the policy has. Its draws and the
places where it takes over are functions of (seed, rollout, prompt, completion), as the policy's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from posttrain.data.known_traces import KnownTrace
from posttrain.data.sample import Problem
from posttrain.methods.base import Start
from posttrain.methods.companions import Writer
from posttrain.rollouts.engine import Completion, Engine, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine

ROLL_IN_STREAM, ROLL_OUT_STREAM, HANDOVER_STREAM = 4, 5, 6
"""Tell the writer's draws from others of the same seed and rollout."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A completion, how many of its last tokens the writer wrote, and numbers for `Scored.infos`."""

    completion: Completion
    guided: int = 0
    info: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens that the writer read and sampled."""

    read: int = 0
    sampled: int = 0


class WritingModel:
    """A frozen model that writes parts of completions.

    Args:
        engine: samples from the writer.
        wanted: how.
        seed: of the run.
    """

    def __init__(self, engine: TransformersEngine, wanted: Writer, seed: int) -> None:
        self.engine, self.top_p, self.begins, self.seed = engine, wanted.top_p, wanted.begins, seed
        self.share = wanted.share

    def write(
        self, window: int, items: Sequence[tuple[Problem, list[int]]], sampling: Sampling
    ) -> tuple[list[KnownTrace], Spent]:
        """One completion of each prompt, as a trace.

        Args:
            window: number of the rollout, for the draws.
            items: problems with the ids of their prompts.
            sampling: of the policy's completions of the same prompts.
        """
        prompts = [ids for _, ids in items]
        own = replace(self._own(sampling, window, ROLL_IN_STREAM), n=1)
        written = [group[0] for group in self.engine.generate(prompts, own)]
        traces = [
            KnownTrace(problem, list(ids), done.ids, [1] * len(done.ids), finished=done.finish == "stop")
            for (problem, ids), done in zip(items, written, strict=True)
        ]
        return traces, Spent(self.engine.read_tokens(prompts, own), sum(len(done.ids) for done in written))

    def shares(self, sampling: Sampling, limits: Sequence[int]) -> tuple[Sampling, Sequence[int]]:
        """How the policy samples its part of completions that are to be sampled so: here as if it wrote them whole."""
        return sampling, limits

    def end(
        self,
        window: int,
        problems: Sequence[Problem],
        starts: Sequence[Start],
        contexts: Sequence[list[int]],
        completions: Sequence[Sequence[Completion]],
        sampling: Sampling,
        limits: Sequence[int],
        policy: Engine | None = None,
    ) -> tuple[list[list[Ended]], Spent]:
        """The completions, those with a handover ended by the writer; none is longer than the policy's may be.

        Args:
            window: number of the rollout, for the draws.
            problems: of the contexts.
            starts, contexts, limits: where completions begin, the tokens up to there, and how many may follow.
            completions: of the policy, by context.
            sampling: that they were sampled with.
            policy: the policy's engine, which has the rest of the logits (`Writer.share`).
        """
        ended = [[Ended(completion) for completion in group] for group in completions]
        places, prompts, left, numbers = [], [], [], []
        for local, (start, group) in enumerate(zip(starts, completions, strict=True)):
            if start.handover is None:
                continue
            number = sampling.first_prompt + local
            draw = np.random.default_rng([self.seed, window, number, HANDOVER_STREAM])
            for i, completion in enumerate(group[start.own :], start.own):
                kept = handover(len(completion.ids), start.handover, draw)
                places.append((local, i, kept))
                prompts.append([*contexts[local], *completion.ids[:kept]])
                left.append(limits[local] - kept)
                numbers.append(number * sampling.n + i)
        if not places:
            return ended, Spent()
        own = replace(self._own(sampling, window, ROLL_OUT_STREAM), n=1, prompt_numbers=tuple(numbers))
        with self._mixed(policy):
            written = self.engine.generate(prompts, own, limits=left)
        for (local, i, kept), (rest,) in zip(places, written, strict=True):
            begun = completions[local][i]
            whole = replace(
                begun, ids=begun.ids[:kept] + rest.ids, logps=begun.logps[:kept] + rest.logps, finish=rest.finish
            )
            ended[local][i] = Ended(whole, len(rest.ids))
        return ended, Spent(self.engine.read_tokens(prompts, own), sum(e.guided for group in ended for e in group))

    @contextmanager
    def _mixed(self, policy: Engine | None) -> Iterator[None]:
        if self.share == 1:
            yield
            return
        assert isinstance(policy, TransformersEngine)  # `Writer.refuse`
        with policy.together(), self.engine.mixed(policy.model, 1 - self.share):
            yield

    def _own(self, sampling: Sampling, window: int, stream: int) -> Sampling:
        seed = int(np.random.SeedSequence([self.seed, window, stream]).generate_state(1, np.uint64)[0])
        return replace(sampling, top_p=self.top_p, top_k=None, seed=seed)


def handover(length: int, share: float, draw: np.random.Generator) -> int:
    """How many of a completion's tokens stay: with probability `share` k, uniform on 1 .. length - 1; else none.

    The length counts the end token, so at least that is left to the writer. Two draws whatever comes out.
    """
    rolls_in, place = draw.random(2)
    return 1 + int(place * (length - 1)) if rolls_in < share and length >= 2 else 0
