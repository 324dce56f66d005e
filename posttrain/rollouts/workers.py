"""Work that several processes do, on Ray Data: one on each GPU of a cluster, or a few on this machine.

Ray Data holds the pool of workers, hands items out as workers become free, starts a worker that died again with the
item it had, and gives back what is done. What an item is, and that its result depends on nothing else, is up to the
`Job`. Ray starts here without a dashboard or usage statistics, and ends with this process, however that ends.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import posttrain
from posttrain.config.stack import require
from posttrain.errors import EngineError, PosttrainError, RecipeError

CONNECT_LIMIT = 10.0
"""Seconds within which a cluster must take a connection."""

STARTS = 3
"""Attempts to start Ray on this machine."""

RESTARTS = 2
"""Times that a worker which died is started again."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker without a GPU of its own keeps what its machine shows
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
"""Environment of Ray where the user's does not say otherwise."""


class Work(Protocol):
    """What one worker has opened."""

    def run(self, item: Any) -> Iterator[Any]:
        """Results of one item, part by part; the same for the same item, whoever works."""
        ...


class Job(Protocol):
    """What all workers do; picklable."""

    def open(self) -> Work:
        """In the worker, once, before its first item."""
        ...


def require_ray(address: str | None) -> ModuleType:
    """Import Ray, without telemetry unless the environment says otherwise.

    Ray listens on all interfaces and runs what it is sent. One that this process will start gets a key, which only the
    processes that it starts know. Ray reads that once, when it is imported.

    Args:
        address: of a running cluster, which has its own way of keeping others out; None: as `run_on_workers`.

    Raises:
        StackError: Ray Data is not installed.
    """
    wanted = dict(QUIET)
    if _cluster(address) is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    require("ray", "pyarrow")
    require("ray", "ray.data")
    return require("ray", "ray")


def run_on_workers(job: Job, items: Sequence[Any], *, workers: int, address: str | None) -> Generator[tuple[int, Any]]:
    """(number of the item, part of its result), as they are done. Parts of an item come in order, each once.

    Args:
        job: what is done; sent to every worker.
        items: picklable.
        workers: processes; each has a GPU to itself where the cluster has any.
        address: of a running cluster; None: RAY_ADDRESS, or else a Ray of this machine alone for this call.

    Raises:
        StackError: Ray Data is not installed.
        EngineError: no cluster at that address, or a worker that died too often.
        RecipeError: more workers than the cluster has room for.
        PosttrainError: what a worker ran into.
    """
    ray = require_ray(address)
    workers = min(workers, len(items))
    if not workers:
        return
    with _connected(ray, address, workers):
        gpus = _check_room(ray.cluster_resources(), workers)
        seen: dict[int, int] = {}
        done: set[int] = set()
        try:
            for number, part, result in _stream(ray, job, items, workers, gpus):
                if part < seen.get(number, 0):  # a worker that died had got this far
                    continue
                seen[number] = part + 1
                if isinstance(result, _End):
                    done.add(number)
                elif isinstance(result, PosttrainError):
                    raise result
                else:
                    yield number, result
        except ray.exceptions.RayActorError as error:
            raise EngineError(
                f"a worker died {RESTARTS + 1} times: {_reason(error)}",
                where="workers",
                hint="what is done is kept, and the same command goes on. Workers die where memory runs out: lower "
                "`workers` or `max_batch`",
            ) from error
        if len(done) < len(items):
            raise EngineError(f"workers gave back {len(done)} of {len(items)} items", where="workers")


def _stream(ray: ModuleType, job: Job, items: Sequence[Any], workers: int, gpus: int) -> Iterator[tuple[int, int, Any]]:
    """(number of the item, number of the part, part)."""
    data, context = ray.data, ray.data.DataContext.get_current()
    # One row per block, so that a part is here when it is done, not when its item is.
    changed = {"target_max_block_size": 1, "enable_progress_bars": False}
    before = {name: getattr(context, name) for name in changed}
    for name, value in changed.items():
        setattr(context, name, value)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
        with warnings.catch_warnings():
            # Ray 2.60 has no other way yet to limit restarts than one that it says will go.
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            found = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Worker,
                fn_constructor_args=(pickle.dumps(job), posttrain.__version__, os.getcwd()),
                compute=data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
                batch_size=1,
                batch_format="pyarrow",
                zero_copy_batch=True,
                num_cpus=1,
                num_gpus=gpus,
                ray_remote_args_fn=lambda: {"max_restarts": RESTARTS},
            )
        for batch in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield row["number"], row["part"], pickle.loads(row["result"])  # nosec B301 # of our own workers
    finally:
        for name, value in before.items():
            setattr(context, name, value)


class _End:
    """After the last part of an item."""


class _Worker:
    """The class of Ray Data's actors."""

    def __init__(self, job: bytes, version: str, folder: str) -> None:
        self.work: Work | None = None
        self.error: PosttrainError | None = None
        try:
            _check_place(version, folder)
            self.work = pickle.loads(job).open()  # nosec B301 # of our own driver
        except PosttrainError as error:  # an error here would be tried again, and hidden among Ray's own
            self.error = error

    def __call__(self, batch: Any) -> Iterator[Any]:
        (row,) = batch.to_pylist()
        for part, result in enumerate(self._results(row["item"])):
            yield _table(row["number"], part, result)

    def _results(self, item: bytes) -> Iterator[Any]:
        try:
            if self.work is None:
                assert self.error is not None
                raise self.error
            yield from self.work.run(pickle.loads(item))  # nosec B301 # as the job
            yield _End()
        except PosttrainError as error:
            yield error


def _table(number: int, part: int, result: Any) -> Any:
    import pyarrow

    # Large, because a block of completions with their log-probs can pass 2 GiB.
    column = pyarrow.array([pickle.dumps(result)], type=pyarrow.large_binary())
    return pyarrow.table({"number": [number], "part": [part], "result": column})


def _check_place(version: str, folder: str) -> None:
    """Raises:
    EngineError: a worker's machine is not set up like this one.
    """
    if posttrain.__version__ != version:
        raise EngineError(
            f"a worker has posttrain {posttrain.__version__} and the command has {version}",
            where="workers",
            hint="install the same version on all machines of the cluster",
        )
    if not Path(folder).is_dir():
        raise EngineError(
            f"a worker does not see the folder {folder}, where the command was started",
            where="workers",
            hint="start it in a folder that all machines of the cluster share",
        )
    os.chdir(folder)


# --------------------------------------------------------------------------------------------------------------- Ray


@contextmanager
def _connected(ray: ModuleType, address: str | None, workers: int) -> Iterator[None]:
    if ray.is_initialized():  # a program that uses Ray itself
        yield
        return
    address = _cluster(address)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        try:
            _check_listens(address)
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(
                f"no Ray cluster answers at {address}: {_reason(error)}",
                where="address",
                hint="start one with `ray start --head`, or leave `address` and RAY_ADDRESS out to use this machine",
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    # A folder of its own, which can be removed. Ray opens what it is given to everyone, so that is a folder inside; and
    # sockets are in it, whose paths must be short, as those of TMPDIR need not be.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # nosec B108 # a private folder
    try:
        _start(ray, folder, num_cpus=workers + 1, **quiet)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _start(ray: ModuleType, folder: str, **settings: Any) -> None:
    """Ray of this process. It gives its parts 30 seconds to come up, which a busy machine may not have.

    Raises:
        EngineError: it did not come up.
    """
    for attempt in range(STARTS):
        try:
            ray.init(address="local", include_dashboard=False, _temp_dir=f"{folder}/{attempt}", **settings)
            return
        except Exception as error:  # what Ray raises then is no narrower
            ray.shutdown()
            if attempt == STARTS - 1:
                raise EngineError(
                    f"Ray did not start in {STARTS} attempts: {_reason(error)}",
                    where="workers",
                    hint="try again when the machine is less busy, or set workers: 1",
                ) from error


def _cluster(address: str | None) -> str | None:
    """The cluster that is meant; None for one of this process's own."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    return None if address == "local" else address


def _check_listens(address: str) -> None:
    """Ray itself asks for minutes before it says that nobody answers.

    Raises:
        OSError: nobody does.
        ValueError: this is no address.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    socket.create_connection((host, int(port)), timeout=CONNECT_LIMIT).close()


def _check_room(resources: Mapping[str, float], workers: int) -> int:
    """GPUs per worker.

    Raises:
        RecipeError: the cluster has room for fewer workers.
    """
    kind = "GPU" if resources.get("GPU") else "CPU"
    most = int(resources.get(kind, 0))
    if workers > most:
        raise RecipeError(
            f"{workers} workers need a {kind} each, and Ray has {most}",
            where="workers",
            hint=f"set workers: {most}" if most else "start nodes of the cluster first",
        )
    return 1 if kind == "GPU" else 0


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
