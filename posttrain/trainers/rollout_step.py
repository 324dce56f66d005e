"""One rank's part of a batch of rollouts: where completions begin, sampling, and the verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from posttrain.data.known_traces import TraceBook
from posttrain.data.sample import Problem, Sample
from posttrain.methods.base import OnlineMethod, Start
from posttrain.rollouts.engine import Sampling
from posttrain.trainers.shell import RunParts

START_STREAM, STATISTICS_STREAM = 0, 1
"""Tell draws of the same seed and rollout from each other."""

Item = tuple[Problem, list[int]]
"""A problem and the ids of its rendered prompt."""


class RolloutStep:
    """Samples and scores.

    Args:
        parts: of the run.
        seed: of the run.
        record: adds (name, sum, count) to the means of the current log entry.
    """

    def __init__(self, parts: RunParts, seed: int, record: Callable[[str, float, float], None]) -> None:
        self.parts, self.seed, self.record = parts, seed, record
        self.method: OnlineMethod = parts.method
        self.traces = TraceBook(parts.traces)

    def sample(self, window: int, items: Sequence[Item], first: int) -> list[Sample]:
        """Scored completions of some prompts, a group for each.

        Args:
            window: number of the rollout, for the draws.
            items: the prompts of this rank.
            first: number of the first of them within the rollout.
        """
        started = time.perf_counter()
        starts = [self._start(window, item, first + local) for local, item in enumerate(items)]
        contexts = [[*ids, *start.prefix] for (_, ids), start in zip(items, starts, strict=True)]
        completions = self.parts.engine.generate(contexts, self._sampling(window, first))
        samples, problems = [], []
        for local, (context, group) in enumerate(zip(contexts, completions, strict=True)):
            for completion in group:
                sample = Sample(
                    ids=context + completion.ids,
                    loss_mask=[0] * len(context) + [1] * len(completion.ids),
                    origin=starts[local].origin,
                    problem_id=items[local][0].id,
                    group=first + local,
                    behaviour_logps=[0.0] * len(context) + completion.logps,
                    policy_version=completion.policy_version,
                    finished=completion.finish == "stop",
                    prefix=len(starts[local].prefix),
                    info=starts[local].info,
                )
                samples.append(sample)
                problems.append(items[local][0])
        self.parts.ledger.sampled(sum(map(len, contexts)), sum(sum(sample.loss_mask) for sample in samples))
        sampled = time.perf_counter()
        self.record("rollout_seconds", sampled - started, 1)
        self._score(samples, problems)
        self.record("verify_seconds", time.perf_counter() - sampled, 1)
        return samples

    def _start(self, window: int, item: Item, number: int) -> Start:
        problem, ids = item
        draw = np.random.default_rng([self.seed, window, number, START_STREAM])
        return self.method.start(problem, ids, self.traces.of(problem, ids), draw)

    def _sampling(self, window: int, first_prompt: int) -> Sampling:
        rollouts = self.parts.recipe.rollouts
        return Sampling(
            n=rollouts.samples_per_prompt,
            max_new_tokens=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            top_p=rollouts.top_p,
            top_k=rollouts.top_k,
            seed=rollout_seed(self.seed, window),
            first_prompt=first_prompt,
        )

    def _score(self, samples: Sequence[Sample], problems: Sequence[Problem]) -> None:
        """Verdicts on whole answers: prefix and completion."""
        answers = [answer_ids(sample) for sample in samples]
        texts = [self.parts.renderer.text(answer) for answer in answers]
        judgements = self.parts.judge.judge(problems, texts, [len(answer) for answer in answers])
        for sample, judgement in zip(samples, judgements, strict=True):
            sample.outcome, sample.reward = judgement.outcome, judgement.reward
            sample.verdict = judgement.status.value


def prompt_length(sample: Sample) -> int:
    """Tokens of the prompt of a rollout, the prefix not counted."""
    trained = sample.loss_mask.index(1) if 1 in sample.loss_mask else len(sample.ids)
    return trained - sample.prefix


def answer_ids(sample: Sample) -> list[int]:
    """Prefix and completion of a rollout."""
    return sample.ids[prompt_length(sample) :]


def rollout_seed(seed: int, window: int) -> int:
    """One seed per (run, rollout); 64 bits, mixed so that neighbours share nothing."""
    return int(np.random.SeedSequence([seed, window]).generate_state(1, np.uint64)[0])


def statistics_seed(seed: int, window: int) -> int:
    """`Scored.seed`: as `rollout_seed`, for draws of another kind."""
    return int(np.random.SeedSequence([seed, window, STATISTICS_STREAM]).generate_state(1, np.uint64)[0])
