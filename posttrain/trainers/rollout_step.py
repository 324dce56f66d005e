"""One rank's part of a batch of rollouts: where completions begin, sampling, and the verdicts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from torch import Tensor

from posttrain.config.schema import RolloutConfig
from posttrain.data.known_traces import KnownTrace, TraceBook
from posttrain.data.sample import Origin, Problem, Sample
from posttrain.methods.base import OnlineMethod, Start
from posttrain.methods.companions import MaskModel
from posttrain.rollouts.engine import Sampling
from posttrain.tracking.metrics import Add
from posttrain.trainers.shell import RunParts
from posttrain.trainers.writer import Ended, Spent

START_STREAM, STATISTICS_STREAM = 0, 1
"""Tell draws of the same seed and rollout from each other."""

Item = tuple[Problem, list[int]]
"""A problem and the ids of its rendered prompt."""


@dataclass(frozen=True, slots=True)
class Request:
    """Completions that are wanted: where those of each problem begin, and how to sample them.

    Attributes:
        limits: most tokens that may follow each context.
        guide: what the method's writer spent on the starts.
        left_out: starts whose prefix left no room for a token, which begin at the prompt instead.
    """

    window: int
    problems: list[Problem]
    starts: list[Start]
    contexts: list[list[int]]
    limits: list[int]
    sampling: Sampling
    guide: Spent
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Scored completions, and what they took.

    Attributes:
        prompt_tokens, sampled_tokens: that the policy's engine read and sampled.
        guide_read, guide_sampled: that the method's writer did.
        seconds: metric -> seconds.
        prompts: whose completions these are.
        left_out: as in `Request`.
        pixels: of the pictures that the engine looked at.
    """

    samples: list[Sample]
    prompt_tokens: int
    sampled_tokens: int
    seconds: dict[str, float]
    prompts: int = 0
    left_out: int = 0
    guide_read: int = 0
    guide_sampled: int = 0
    pixels: int = 0


class SampleStep(ABC):
    """Samples and scores.

    Args:
        parts: of the run.
        seed: of the run.
        record: adds (name, sum, count) to the means of the current log entry.
    """

    def __init__(self, parts: RunParts, seed: int, record: Add) -> None:
        self.parts, self.seed, self.record = parts, seed, record
        self.method = cast(OnlineMethod, parts.method)
        self.traces = TraceBook(parts.traces)

    @abstractmethod
    def sample(self, window: int, items: Sequence[Item], first: int) -> list[Sample]:
        """Scored completions of some prompts, a group for each.

        Args:
            window: number of the rollout, for the draws.
            items: the prompts of this rank.
            first: number of the first of them within the rollout.
        """

    def start(self, window: int, item: Item, number: int, traces: Sequence[KnownTrace]) -> Start:
        """Where completions of a prompt begin, by the method; `number` is the prompt's within the rollout."""
        problem, ids = item
        draw = np.random.default_rng([self.seed, window, number, START_STREAM])
        return self.method.start(problem, ids, traces, draw)


class RolloutStep(SampleStep):
    """Completions of the engine, each a text for the judge."""

    def sample(self, window: int, items: Sequence[Item], first: int) -> list[Sample]:
        batch = self.answer(self.ask(window, items, first))
        self.count(batch)
        return batch.samples

    def ask(self, window: int, items: Sequence[Item], first: int) -> Request:
        """What `answer` needs to know; the arguments are those of `sample`. The method says where completions begin."""
        sampling = sampling_of(self.parts.recipe.rollouts, self.seed, window, first)
        traces, spent = [self.traces.of(problem, ids) for problem, ids in items], Spent()
        if self.parts.writer is not None and self.parts.writer.begins:
            written, spent = self.parts.writer.write(window, items, sampling)
            traces = [[trace] for trace in written]
        starts = [
            self.start(window, item, first + local, known)
            for local, (item, known) in enumerate(zip(items, traces, strict=True))
        ]
        limits = [self._limit(len(ids), start) for (_, ids), start in zip(items, starts, strict=True)]
        left_out = sum(limit < 1 for limit in limits)
        starts = [start if limit >= 1 else Start() for start, limit in zip(starts, limits, strict=True)]
        limits = [limit if limit >= 1 else sampling.max_new_tokens for limit in limits]
        contexts = [[*ids, *start.prefix] for (_, ids), start in zip(items, starts, strict=True)]
        problems = [problem for problem, _ in items]
        return Request(window, problems, starts, contexts, limits, sampling, spent, left_out)

    def answer(self, request: Request) -> Batch:
        """Sample and score. May run beside the trainer: it reads and changes nothing that training does."""
        started = time.perf_counter()
        contexts, starts, sampling, limits = request.contexts, request.starts, request.sampling, request.limits
        writer = self.parts.writer
        asked, most = (sampling, limits) if writer is None else writer.shares(sampling, limits)
        completions = self.parts.engine.generate(contexts, asked, most)
        read = self.parts.engine.read_tokens(contexts, asked)
        new = sum(len(completion.ids) for group in completions for completion in group)
        guide_read, guide_sampled = request.guide.read, request.guide.sampled
        ended = [[Ended(completion) for completion in group] for group in completions]
        if writer is not None:
            begun = (request.window, request.problems, starts, contexts, completions, sampling, limits)
            ended, spent = writer.end(*begun, policy=self.parts.engine)
            guide_read, guide_sampled = guide_read + spent.read, guide_sampled + spent.sampled
        samples, problems = [], []
        for local, (context, group) in enumerate(zip(contexts, ended, strict=True)):
            start = starts[local]
            for one in group:
                completion = one.completion
                sample = Sample(
                    ids=context + completion.ids,
                    loss_mask=[0] * len(context) + [1] * len(completion.ids),
                    origin=Origin.GUIDED if one.guided else start.origin,
                    problem_id=request.problems[local].id,
                    group=sampling.first_prompt + local,
                    behaviour_logps=[0.0] * len(context) + completion.logps,
                    policy_version=completion.policy_version,
                    finished=completion.finish == "stop",
                    prefix=len(start.prefix),
                    info=start.info | one.info,
                    guided=one.guided,
                    limit=limits[local],
                )
                samples.append(sample)
                problems.append(request.problems[local])
        sampled = time.perf_counter()
        if self.parts.judge is not None:
            self._score(samples, problems)
        seconds = {"rollout_seconds": sampled - started, "verify_seconds": time.perf_counter() - sampled}
        guided = {"guide_read": guide_read, "guide_sampled": guide_sampled}
        guided["pixels"] = self.parts.renderer.pixels(contexts)
        return Batch(samples, read, new, seconds, len(contexts), request.left_out, **guided)

    def count(self, batch: Batch) -> None:
        """Put tokens and seconds of a batch into the ledger and the log entry."""
        self.parts.ledger.sampled(batch.prompt_tokens, batch.sampled_tokens, pixels=batch.pixels)
        if self.parts.writer is not None:
            self.parts.ledger.sampled(batch.guide_read, batch.guide_sampled, by="writer")
            if self.parts.writer.share < 1:  # the policy follows it
                self.parts.ledger.scored(batch.guide_read + batch.guide_sampled, "policy")
        if self.method.needs.companion(MaskModel) is not None:  # the mask model reads and follows all of it
            self.parts.ledger.scored(batch.prompt_tokens + batch.sampled_tokens, "policy")
        for name, value in batch.seconds.items():
            self.record(name, value, 1)
        if self.method.chooses_starts:
            self.record("prefix_left_out_share", batch.left_out, batch.prompts)

    def _limit(self, prompt: int, start: Start) -> int:
        """Most tokens that may follow a prompt of so many tokens and the prefix; below 1 where the prefix has no room.

        Only a prefix shortens it: a prompt that has no room itself is left to the engine to refuse.
        """
        most, positions = self.parts.recipe.rollouts.max_new_tokens, self.parts.engine.positions
        prefix = len(start.prefix)
        limit = most - prefix if start.counted else most
        if prefix and positions is not None and prompt + most <= positions:
            limit = min(limit, positions - prompt - prefix)
        return limit

    def _score(self, samples: Sequence[Sample], problems: Sequence[Problem]) -> None:
        """Verdicts on whole answers: prefix and completion."""
        answers = [answer_ids(sample) for sample in samples]
        texts = [self.parts.renderer.text(answer) for answer in answers]
        judgements = self.parts.judge.judge(problems, texts, [len(answer) for answer in answers], answers)
        for sample, judgement in zip(samples, judgements, strict=True):
            sample.outcome, sample.reward = judgement.outcome, judgement.reward
            sample.verdict = judgement.status.value


def answer_ids(sample: Sample) -> list[int]:
    """Prefix and completion of a rollout."""
    return sample.ids[sample.prompt_length :]


def kept_rows(samples: Sequence[Sample], keep: Tensor) -> list[Sample]:
    """The same rows, without a token to train on where they are not kept; of no rows none."""
    return [
        sample if kept else replace(sample, loss_mask=[0] * len(sample.ids))
        for sample, kept in zip(samples, keep.tolist(), strict=bool(samples))
    ]


def sampling_of(rollouts: RolloutConfig, seed: int, window: int, first: int) -> Sampling:
    """How the completions of a rollout are sampled, from the prompt with the number `first` on."""
    return Sampling(
        n=rollouts.samples_per_prompt,
        max_new_tokens=rollouts.max_new_tokens,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        top_k=rollouts.top_k,
        seed=rollout_seed(seed, window),
        first_prompt=first,
    )


def rollout_seed(seed: int, window: int) -> int:
    """One seed per (run, rollout); 64 bits, mixed so that neighbours share nothing."""
    return int(np.random.SeedSequence([seed, window]).generate_state(1, np.uint64)[0])


def statistics_seed(seed: int, window: int) -> int:
    """`Scored.seed`: as `rollout_seed`, for draws of another kind."""
    return int(np.random.SeedSequence([seed, window, STATISTICS_STREAM]).generate_state(1, np.uint64)[0])
