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
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from posttrain.config.addresses import is_called
from posttrain.errors import DataError, RecipeError
from posttrain.report.collect import collect
from posttrain.report.page import data_of, page

LOOPBACK = "127.0.0.1"
WATCHED = ("*", "evaluation/*", "held_out/*", "*/*", "*/evaluation/*", "*/held_out/*")
"""Where in a folder of a run or pipeline the files stand that a report is made of."""

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

    def __init__(self, paths: Sequence[Path], host: str = LOOPBACK, port: int = 0) -> None:
        self.paths, self.host, self.key = [path.resolve() for path in paths], host, secrets.token_urlsafe(24)
        self.names = {"localhost", host.lower(), *(() if host == LOOPBACK else (socket.gethostname().lower(),))}
        self._lock, self._tag, self._body = threading.Lock(), "", b""
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


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = 20
    """Seconds for a request, so that silent connections do not pile up."""

    def do_GET(self) -> None:
        refused = self._refused()
        if refused is not None:
            self._answer(*refused)
            return
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
        if len(hosts) != 1 or not is_called(hosts[0], self.server.names):
            return HTTPStatus.FORBIDDEN, "this server is not called so"
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return HTTPStatus.FORBIDDEN, "requests of other pages are not taken"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
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
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the page was closed
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what others ask for is no text for this terminal."""
