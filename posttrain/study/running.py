"""Cells in processes of their own, several at once, here or on a Ray cluster. What is done is not done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from posttrain.bounded_files import read_json
from posttrain.errors import DataError
from posttrain.rollouts.workers import run_on_workers
from posttrain.safe_files import open_plain, refuse_others, write_json_atomic
from posttrain.study.cell import LOG, REQUEST, RESULT, run_process
from posttrain.study.lifeline import lifeline
from posttrain.study.plan import Cell

LOADED = ("posttrain.study.cell", "posttrain.trainers.run", "posttrain.evaluation.runner", "datasets")
"""What the server imports from which cells are forked: seconds that each of them would take again."""
_TAIL = 100_000
"""Characters at the end of a log that are searched for its error."""


class _Point(BaseModel):
    model_config = ConfigDict(strict=True)

    step: int
    score: FiniteFloat
    flops: FiniteFloat
    tokens: FiniteFloat
    seconds: FiniteFloat


class _Measured(BaseModel):
    """What `cell.run_cell` writes of a measured cell."""

    model_config = ConfigDict(strict=True)

    key: str
    run: str
    report: str
    steps: int
    scores: Annotated[dict[str, FiniteFloat], Field(min_length=1)]
    beside: dict[str, FiniteFloat]
    answer_tokens: FiniteFloat | None = None
    spent: dict[str, FiniteFloat]
    bought: dict[str, FiniteFloat]
    curve: list[_Point]


@dataclass(frozen=True, slots=True)
class CellOutcome:
    """What became of a cell.

    Attributes:
        cell: which one.
        result: of `cell.run_cell`; None if it failed.
        error: what it said; empty if it did not fail.
    """

    cell: Cell
    result: dict[str, Any] | None
    error: str = ""


class CellRunner:
    """Runs cells, and the shared stages that they need first.

    Args:
        jobs: processes at once.
        address: of a Ray cluster that shares the working folder; `local` starts one here; None uses no Ray.
        say: gets a line for each cell that is done.
    """

    def __init__(self, jobs: int, address: str | None, say: Callable[[str], None]) -> None:
        self.jobs, self.address, self.say = jobs, address, say

    def run(self, cells: Sequence[Cell]) -> list[CellOutcome]:
        """The outcomes in the order of the cells; failures are outcomes too.

        Raises:
            KeyboardInterrupt: of the user; the processes have been asked to save and have ended.
        """
        shared = {cell.needs.folder: cell.needs for cell in cells if cell.needs is not None}
        made = {outcome.cell.folder: outcome for outcome in self._all(list(shared.values()))}
        broken = {folder: outcome.error for folder, outcome in made.items() if outcome.error}
        wanted = [cell for cell in cells if cell.needs is None or cell.needs.folder not in broken]
        found = {outcome.cell.folder: outcome for outcome in self._all(wanted)}
        for cell in cells:
            if cell.needs is not None and cell.needs.folder in broken:
                error = f"the shared stages of its seed failed: {broken[cell.needs.folder]}"
                found[cell.folder] = CellOutcome(cell, None, error)
        return [found[cell.folder] for cell in cells]

    def _all(self, cells: Sequence[Cell]) -> Iterator[CellOutcome]:
        left = []
        for cell in cells:
            try:
                result = done(cell)
            except DataError as error:
                self.say(f"{cell.name}: {error}; it is measured again")
                (cell.folder / RESULT).unlink()
                result = None
            if result is None:
                write_json_atomic(cell.folder / REQUEST, cell.request.to_dict())
                left.append(cell)
            else:
                yield CellOutcome(cell, result)
        run = self._here if self.address is None else self._on_ray
        for number, (cell, code) in enumerate(run(left), start=1):
            outcome = _outcome(cell, code)
            score = "" if outcome.result is None or "scores" not in outcome.result else f", {_score(outcome.result)}"
            state = f"failed: {outcome.error}" if outcome.error else f"done{score}"
            self.say(f"[{number}/{len(left)}] {cell.name}: {state}")
            yield outcome

    def _here(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, int]]:
        if self.jobs > 1:  # read where torch is imported, which is once for all
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        left, running, slots = deque(cells), list[tuple[Cell, BaseProcess, int]](), deque(range(self.jobs))
        try:
            while left or running:
                while left and slots:
                    cell, slot = left.popleft(), slots.popleft()
                    running.append((cell, start(cell.folder, _device(slot)), slot))
                ended = wait([process.sentinel for _, process, _ in running])
                for each in [each for each in running if each[1].sentinel in ended]:
                    cell, process, slot = each
                    process.join()
                    running.remove(each)
                    slots.append(slot)
                    assert process.exitcode is not None  # it has ended
                    yield cell, process.exitcode
        finally:
            for _, process, _ in running:
                process.terminate()  # which a training run answers with a checkpoint
            for _, process, _ in running:
                process.join()

    def _on_ray(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, int]]:
        folders = [os.path.abspath(cell.folder) for cell in cells]
        address = None if self.address == "local" else self.address
        with closing(run_on_workers(RayJob(), folders, workers=self.jobs, address=address)) as results:
            for number, code in results:
                yield cells[number], code


class RayJob:
    """What a Ray worker does with a cell: the same process as here."""

    def open(self) -> RayJob:
        """Nothing has to be loaded."""
        return self

    def run(self, item: str) -> Iterator[int | None]:
        """The exit code."""
        process = start(Path(item))
        process.join()
        yield process.exitcode


def context() -> ForkServerContext:
    """Cells are forked from a server that has imported everything and runs nothing itself."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(LOADED))
    return server


def start(folder: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """The process of a cell, which ends when this one does, however that was."""
    process = context().Process(target=run_process, args=(str(folder), dict(environment or {}), lifeline()))
    process.start()
    return process


def _device(slot: int) -> dict[str, str]:
    """One of the GPUs that this process is shown."""
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": shown[slot % len(shown)]} if len(shown) > 1 else {}


def done(cell: Cell) -> dict[str, Any] | None:
    """The result of a cell if it is of the same key.

    Raises:
        DataError: it is damaged.
        StateError: somebody else may have written it.
    """
    path = cell.folder / RESULT
    if not path.is_file():
        return None
    refuse_others(path)
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("key"), str):
        raise DataError("not the result of a cell: no `key`", where=str(path))
    if result["key"] != cell.request.key:
        return None
    if cell.request.measured is not None:
        try:
            _Measured.model_validate(result)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"]))
            raise DataError(f"not the result of a cell: {at}: {first['msg']}", where=str(path)) from error
    return result


def _outcome(cell: Cell, code: int) -> CellOutcome:
    result = done(cell)
    if code == 0 and result is not None:
        return CellOutcome(cell, result)
    return CellOutcome(cell, None, error_of(cell.folder / LOG, code))


def error_of(log: Path, code: int) -> str:
    """What the log ends with: the error of a user, or the last line of a traceback."""
    if code < 0:
        return f"ended by signal {-code} ({signal.Signals(-code).name}); log: {log}"
    with open(log, encoding="utf-8", errors="replace", opener=open_plain) as file:  # a link planted since is no log
        text = file.read()[-_TAIL:]
    marked = text.rpartition("\nerror: ")[2] if "\nerror: " in text else text.strip().rpartition("\n")[2]
    first = next((line for line in marked.splitlines() if line.strip()), f"exit code {code}")
    return f"{first.strip()}; log: {log}"


def _score(result: dict[str, Any]) -> str:
    return f"{100 * sum(result['scores'].values()) / len(result['scores']):.1f}%"
