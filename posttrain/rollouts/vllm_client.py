"""Requests to a vLLM server: deadlines, retries while it can be, and one message that says which phase failed.

Standard library only. A request is retried where the server did not answer it, and every answer is placed by the number
of its request, so a retry replaces and never adds.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from posttrain.errors import EngineError

T = TypeVar("T")

PAUSE = 0.25
"""Seconds between two tries to reach the server."""

GO_ON = "then go on with --resume auto"
BROKEN = f"look into the server's log, start it again with launch/vllm_server.sh, {GO_ON}"
"""What to do about a server that has gone, or that fails."""

ERROR_TEXT = 300
"""Characters of a server's complaint that are shown."""


class Unreachable(Exception):
    """No whole answer came: refused, reset, or nothing within the time."""


class VllmClient:
    """Sends JSON requests; may be used from several threads.

    Args:
        url: the server's address.
        api_key: sent as bearer token, if any.
        reconnect: seconds for which a server that cannot be reached is tried again.
    """

    def __init__(self, url: str, *, api_key: str | None = None, reconnect: float = 30.0) -> None:
        parts = urlsplit(url)
        self.url, self.reconnect = url.rstrip("/"), reconnect
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        self._lock, self._open, self._given_up = threading.Lock(), set[http.client.HTTPConnection](), False
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def give_up(self) -> None:
        """End the requests that are under way in other threads, which then fail, and send no more.

        The server stops to work on what nobody waits for.
        """
        with self._lock:
            self._given_up = True
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):  # it may have ended by itself
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def wait_until_up(self, timeout: float) -> None:
        """Return once the server says that it is healthy.

        Raises:
            EngineError: it does not within `timeout` seconds.
        """
        deadline, last = time.monotonic() + timeout, "no answer"
        while (left := deadline - time.monotonic()) > 0:
            try:
                status, _ = self._once("GET", "/health", None, min(left, 10.0))
                if status == 200:
                    return
                last = f"status {status}"
            except Unreachable as error:
                last = str(error)
            time.sleep(min(PAUSE, max(deadline - time.monotonic(), 0)))
        raise EngineError(
            f"start: no healthy vLLM server at {self.url} within {timeout:g} s ({last})",
            where="rollouts.vllm.url",
            hint="start it with launch/vllm_server.sh MODEL, or look into its log; start_timeout is how long to wait",
        )

    def post(
        self,
        path: str,
        body: Any,
        *,
        deadline: float,
        phase: str,
        json_answer: bool = True,
        carried_out: str | None = None,
    ) -> Any:
        """The answer to a request that may be sent twice: what its JSON says, or its text.

        Args:
            deadline: by `time.monotonic()`.
            phase: what is going on, for the message.
            carried_out: words by which the server refuses the request if it has carried it out before; its answer to
                that one was lost.

        Raises:
            EngineError: refused, unreachable for `reconnect` seconds, or no answer by the deadline.
        """
        lost_since: float | None = None
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._failure(phase, "no answer within the time that rollouts.vllm.timeout gives")
            try:
                status, text = self._once("POST", path, body, left)
            except Unreachable as error:
                if self._given_up:
                    raise EngineError(f"{phase}: given up, because the run ends", where="rollouts.vllm") from error
                now = time.monotonic()
                lost_since = lost_since or now
                if now - lost_since >= self.reconnect or now >= deadline:
                    raise self._failure(phase, f"the server went away ({error})") from error
                time.sleep(min(PAUSE, max(deadline - now, 0)))
                continue
            if carried_out is not None and carried_out in text:
                return None
            if status == 200:
                return json.loads(text) if text and json_answer else text or None
            if status == 503:  # starting up or overloaded
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since < self.reconnect:
                    time.sleep(PAUSE)
                    continue
            raise self._refused(phase, path, status, text)

    def _once(self, method: str, path: str, body: Any, timeout: float) -> tuple[int, str]:
        connection = self._connection(self._host, self._port, timeout=timeout)
        with self._lock:
            if self._given_up:
                raise Unreachable("the run ends")
            self._open.add(connection)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, payload, self._headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except TimeoutError as error:
            raise Unreachable(f"nothing within {timeout:.3g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{type(error).__name__}: {error}".strip(": ")) from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _refused(self, phase: str, path: str, status: int, text: str) -> EngineError:
        hints = {
            401: "give the server's key: rollouts.vllm.api_key_env names the environment variable that holds it",
            403: "start the server with POSTTRAIN_VLLM_TRANSFER_DIR set to the recipe's transfer_dir, as the same user",
            404: "the server lacks this interface: start it with launch/vllm_server.sh",
        }
        short = " ".join(text.split())[:ERROR_TEXT]
        return EngineError(
            f"{phase}: the vLLM server at {self.url} answers {path} with status {status}: {short}",
            where="rollouts.vllm.transfer_dir" if status == 403 else "rollouts.vllm",
            hint=hints.get(status, BROKEN if status >= 500 else "its log says more"),
        )

    def _failure(self, phase: str, what: str) -> EngineError:
        return EngineError(
            f"{phase}: {what}, at {self.url}",
            where="rollouts.vllm",
            hint=BROKEN,
        )


def in_parallel(jobs: Sequence[Callable[[], T]], workers: int) -> list[T]:
    """Results of all jobs in their order. The first failure cancels what has not begun, and is raised.

    Jobs that run when another fails are waited for; each has a deadline of its own.
    """
    failed = threading.Event()

    def guarded(job: Callable[[], T]) -> T | None:
        if failed.is_set():
            return None
        try:
            return job()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max_workers=max(1, min(workers, len(jobs)))) as pool:
        futures = [pool.submit(guarded, job) for job in jobs]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            if (error := future.exception()) is not None:
                raise error
        return [future.result() for future in futures]
