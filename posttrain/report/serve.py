"""The report over HTTP, for a run that goes on: the page asks for what is new. Loopback unless told otherwise.

A page holds texts of data and models, so the server gives it to nobody but who has the address that it printed. The key
in that address keeps out other users of the machine and pages of the web that guess the port; requests that a page
of another site makes are refused too, and so are names that such a site may have led here. There are two paths, and
no file is ever looked up by what a request says.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import io
import ipaddress
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain.config.addresses import is_called
from posttrain.errors import DataError, RecipeError
from posttrain.report.collect import collect
from posttrain.report.page import data_of, page

LOOPBACK = "127.0.0.1"
WATCHED = ("*", "evaluation/*", "held_out/*", "*/*", "*/evaluation/*", "*/held_out/*")
"""Where in a folder of a run or pipeline the files stand that a report is made of."""

MAX_WAITING = 64
"""Connections that have not shown the key yet. With more of them the oldest is closed, so that no number of silent or
slow ones keeps out who has the address."""

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class ReportServer(ThreadingHTTPServer):
    """Serves the report of some paths under an address with a key.

    Args:
        paths: as for `collect`.
        host: address to listen on.
        port: 0 takes a free one.

    Raises:
        DataError: there is nothing to report, or it cannot be read.
        RecipeError: the address cannot be listened on.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, paths: Sequence[Path], host: str = LOOPBACK, port: int = 0) -> None:
        self.paths, self.host, self.key = [path.resolve() for path in paths], host, secrets.token_urlsafe(24)
        self.names = {"localhost", host.lower(), *(() if host == LOOPBACK else (socket.gethostname().lower(),))}
        self._lock, self._tag, self._body = threading.Lock(), "", b""
        self._waiting, self._waiting_lock = dict[Any, None](), threading.RLock()  # in the order of their coming
        self.data()  # refuses before it listens
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RecipeError(f"cannot listen on {host}, port {port}: {error}", hint="take another --port") from error

    @property
    def address(self) -> str:
        """Where to open the report; who has it can read it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/{self.key}/"

    def is_called(self, host: str) -> bool:
        """Whether a `Host` header names this server: one of its names, loopback (a tunnel ends there), its address."""
        if not is_called(host, self.names):
            return False
        try:
            address = ipaddress.ip_address(urlsplit(f"//{host}").hostname or "")
        except ValueError:
            return True  # a name
        own = ipaddress.ip_address(str(self.server_address[0]))
        return address.is_loopback or own.is_unspecified or address == own

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the request; the oldest that waits makes room for it."""
        with self._waiting_lock:
            while len(self._waiting) >= MAX_WAITING:
                self.has_key(oldest := next(iter(self._waiting)))
                with suppress(OSError):  # its client has gone
                    oldest.shutdown(socket.SHUT_RDWR)
            self._waiting[request] = None
        super().process_request(request, client_address)

    def has_key(self, request: Any) -> None:
        """It waits no more."""
        with self._waiting_lock:
            self._waiting.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.has_key(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing for a connection that broke off or took too long: who has no key prints nothing here."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def tag(self) -> str:
        """Changes whenever a file changes that the report is made of."""
        found = sorted((str(file), *_stamp(file)) for file in self._files())
        return hashlib.sha256(repr(found).encode()).hexdigest()[:32]

    def data(self) -> tuple[str, bytes]:
        """The tag, and what the page reads as gzipped JSON; made again if the tag is another."""
        with self._lock:
            tag = self.tag()
            if tag != self._tag:
                self._body = gzip.compress(data_of(collect(self.paths)).encode("utf-8", "replace"), 1, mtime=0)
                self._tag = tag
            return self._tag, self._body

    def page(self) -> bytes:
        """The page with what there is now, which asks for what is new."""
        with self._lock:
            tag = self.tag()
            return page(collect(self.paths), follow=tag).encode("utf-8", "replace")

    def _files(self) -> Iterator[Path]:
        for path in self.paths:
            if path.is_file():
                yield path
            for pattern in WATCHED if path.is_dir() else ():
                yield from (file for file in path.glob(pattern) if file.suffix in (".json", ".jsonl", ".yaml"))


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except FileNotFoundError:  # replaced in between
        return 0, 0
    return found.st_size, found.st_mtime_ns


class _WholeRequest(io.RawIOBase):
    """What a connection sends, until a deadline for all of it; a timeout of the socket is for each byte."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection, self.deadline = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = 20
    """Seconds for a whole request, and for the answer, so that silent and slow connections do not pile up."""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_WholeRequest(self.connection, self.timeout))

    def do_GET(self) -> None:
        self.connection.settimeout(self.timeout)
        refused = self._refused()
        if refused is not None:
            self._answer(*refused)
            return
        self.server.has_key(self.connection)
        try:
            self._give()
        except DataError as error:  # a file that is being written; the page asks again
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _give(self) -> None:
        if self.path.endswith("/data"):
            tag, body = self.server.data()
            headers = {"ETag": f'"{tag}"', "Content-Encoding": "gzip"}
            if self.headers.get("If-None-Match") == headers["ETag"]:
                self._send(HTTPStatus.NOT_MODIFIED, b"", headers)
            else:
                self._send(HTTPStatus.OK, body, headers | {"Content-Type": "application/json"})
        else:
            self._send(HTTPStatus.OK, self.server.page(), {"Content-Type": "text/html; charset=utf-8"})

    def _refused(self) -> tuple[HTTPStatus, str] | None:
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or not self.server.is_called(hosts[0]):
            return HTTPStatus.FORBIDDEN, "this server is not called so"
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return HTTPStatus.FORBIDDEN, "requests of other pages are not taken"
        if any(site not in ("none", "same-origin") for site in self.headers.get_all("Sec-Fetch-Site", [])):
            return HTTPStatus.FORBIDDEN, "requests of other pages are not taken"
        given = self.path.encode("utf-8", "surrogateescape")
        if not any(hmac.compare_digest(given, f"/{self.server.key}/{name}".encode()) for name in ("", "data")):
            return HTTPStatus.NOT_FOUND, "nothing is here; the address that posttrain printed has a key"
        return None

    def _answer(self, status: HTTPStatus, why: str) -> None:
        self._send(status, (why + "\n").encode("utf-8", "replace"), {"Content-Type": "text/plain; charset=utf-8"})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {**HEADERS, **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what others ask for is no text for this terminal."""
