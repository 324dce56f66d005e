"""Rollouts sampled beside the training: one batch at a time, in a thread that waits for a server.

The order at a window w is: wait for its batch, send the weights, ask for the batch of w + 1, train on w. So weights
never change while completions are sampled, and what is trained on was sampled before the latest update.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from accelerate.utils import gather_object

from posttrain.errors import PosttrainError
from posttrain.trainers.rollout_step import Batch, Request

Answer = Callable[[Request], Batch]


class Pipeline:
    """At most one batch that is sampled in the background.

    Args:
        answer: samples and scores; called in a thread of its own.
        clock: seconds of a clock that does not go back.
    """

    def __init__(self, answer: Answer, clock: Callable[[], float] = time.perf_counter) -> None:
        self._answer, self._clock = answer, clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._under_way: tuple[int, Future[tuple[Batch, float, float]]] | None = None

    def start(self, window: int, request: Request) -> None:
        """Begin to sample for a window. The batch before it must have been taken with `finish`."""
        if self._under_way is not None:
            raise RuntimeError("a batch is being sampled already")
        self._under_way = window, self._thread.submit(self._timed, request)

    def _timed(self, request: Request) -> tuple[Batch, float, float]:
        started = self._clock()
        return self._answer(request), started, self._clock()

    def finish(self) -> tuple[int, Batch] | None:
        """Wait for the batch that is under way, if there is one: its window, and the batch with two metrics more. All
        ranks call it, and none returns before the batches of all are there.

        Raises:
            PosttrainError: sampling or scoring failed on some rank; on all ranks.
        """
        if self._under_way is None:
            return None
        window, future = self._under_way
        self._under_way = None
        asked, error = self._clock(), None
        try:
            batch, started, ended = future.result()
        except PosttrainError as raised:
            error = raised
        failed = [each for each in gather_object([error]) if each is not None]
        if failed:
            raise error or failed[0]
        batch.seconds["pipeline_overlap_seconds"] = min(ended, asked) - started
        batch.seconds["pipeline_wait_seconds"] = max(ended - asked, 0.0)
        return window, batch
