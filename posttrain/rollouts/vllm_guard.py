"""The door of a vLLM server: who may ask for what (see launch/vllm_server.sh). Imported by the server; needs no torch.

vLLM's development interface, which the sync of weights needs, would take any method of its workers and any path from
whoever reaches the port: every user of the machine, and every web page that one of them has open. Behind this door are
only the requests that posttrain sends, from who has the server's key.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from posttrain.config.addresses import is_called

KEY_VARIABLE = "POSTTRAIN_VLLM_API_KEY"
"""Environment variable with the server's key."""

NAMES_VARIABLE = "POSTTRAIN_VLLM_NAMES"
"""Further names, separated by commas, by which clients may call the server."""

FOLDER_VARIABLE = "POSTTRAIN_VLLM_TRANSFER_DIR"
"""Folder in which the weights of a sync come; as the recipe's `rollouts.vllm.transfer_dir`."""

PREFIX = "posttrain-weights-"
"""How the folder of a sync begins."""

OPEN = {"/health": "GET"}
READ = {"/metrics": "GET", "/v1/models": "GET", "/version": "GET"}
SYNC = {"/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
WORK = dict.fromkeys(("/v1/completions", "/reset_prefix_cache", *SYNC), "POST")
"""Paths and their methods: without the key; to look at; to sync by; all that changes or computes something."""

RPC = {"posttrain_status": (), "posttrain_hold": ("version", "owner"), "posttrain_load": ("folder", "version", "owner")}
"""Methods of the workers, and their arguments."""

_ADAPTER = {"/v1/load_lora_adapter": {"lora_name", "lora_path"}, "/v1/unload_lora_adapter": {"lora_name"}}

MAX_BODY = 1 << 16
"""Bytes of a request of `SYNC`."""


class Refused(Exception):
    """A request that is not passed on, with its status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Guard:
    """ASGI middleware in front of vLLM.

    Raises:
        RuntimeError: there is no key in the environment, or one of white space.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise RuntimeError(f"{KEY_VARIABLE} holds no key; launch/vllm_server.sh makes one")
        self.app, self.expected = app, f"Bearer {key}".encode()
        names = {"localhost", socket.gethostname(), socket.getfqdn(), os.environ.get("POSTTRAIN_VLLM_HOST", "")}
        self.names = {name.strip().lower() for name in (*names, *os.environ.get(NAMES_VARIABLE, "").split(","))} - {""}
        self.folder = Path(os.environ.get(FOLDER_VARIABLE) or "/dev/shm")  # nosec B108 # see _confine

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 4403})
        else:
            try:
                receive = await self._admitted(scope, receive)
            except Refused as refused:
                await _answer(send, refused)
                return
            await self.app(scope, receive, send)

    async def _admitted(self, scope: dict[str, Any], receive: Any) -> Any:
        """Where the body of the request is to be had, once all of it is in order."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope.get("headers", ()):
            headers.setdefault(name.lower(), []).append(value)
        path, method = scope.get("path", ""), scope.get("method", "")
        if any(name == b"origin" or name.startswith(b"sec-fetch-") for name in headers):
            raise Refused(403, "requests of web pages are not taken")
        if not is_called(_only(headers, b"host").decode("latin-1"), self.names):
            raise Refused(403, f"this server is not called so; {NAMES_VARIABLE} takes further names")
        if OPEN.get(path) == method:
            return receive
        if not hmac.compare_digest(_only(headers, b"authorization"), self.expected):
            raise Refused(401, "the API key is missing or wrong")
        if (READ | WORK).get(path) != method or scope.get("root_path"):
            raise Refused(404, "no such path behind posttrain's guard")
        if method == "GET":
            return receive
        kind = _only(headers, b"content-type").decode("latin-1").lower().replace(" ", "")
        if kind not in ("application/json", "application/json;charset=utf-8") or b"content-encoding" in headers:
            raise Refused(415, "the body must be application/json")
        if path not in SYNC:
            return receive
        body = json.dumps(self._checked(path, await _body(receive))).encode()
        # As it was understood here, so that nothing is understood in another way behind the door.
        length = (b"content-length", str(len(body)).encode())
        dropped = (b"content-length", b"transfer-encoding")
        scope["headers"] = [*((n, v) for n, v in scope["headers"] if n.lower() not in dropped), length]
        return _replayed(body, receive)

    def _checked(self, path: str, raw: bytes) -> dict[str, Any]:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not JSON") from error
        if not isinstance(body, dict):
            raise Refused(400, "the body is no object")
        if path in _ADAPTER:
            if set(body) != _ADAPTER[path] or not all(isinstance(value, str) for value in body.values()):
                raise Refused(400, f"expected {', '.join(sorted(_ADAPTER[path]))}")
            if not re.fullmatch(r"[0-9a-f]{16}-\d{1,12}", body["lora_name"]):
                raise Refused(400, "not the name of an adapter of a run")
            if "lora_path" in body:
                self._confine(body["lora_path"])
            return body
        method, arguments = body.get("method"), body.get("kwargs", {})
        if not isinstance(method, str) or method not in RPC:
            raise Refused(403, "no such method behind posttrain's guard")
        if set(body) - {"method", "kwargs"} or not isinstance(arguments, dict) or set(arguments) != set(RPC[method]):
            raise Refused(400, f"{method} takes {', '.join(RPC[method]) or 'no arguments'}")
        if "folder" in arguments:
            self._confine(arguments["folder"])
        return {"method": method, "kwargs": arguments}

    def _confine(self, folder: object) -> None:
        """Raises:
        Refused: it is not the folder of a sync, which the user of this server made where they come.
        """
        why = f"the folder of a sync must be made by this user directly in {self.folder} ({FOLDER_VARIABLE})"
        if not isinstance(folder, str) or not re.fullmatch(PREFIX + r"\w{1,64}", folder.rpartition("/")[2]):
            raise Refused(403, why)
        try:
            there = os.lstat(folder)
            beside = os.path.realpath(os.path.dirname(folder)) == os.path.realpath(self.folder)
        except (OSError, ValueError) as error:
            raise Refused(403, f"the server does not see the folder of the sync; {why}") from error
        if not beside or not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid() or there.st_mode & 0o022:
            raise Refused(403, why)


def _only(headers: dict[bytes, list[bytes]], name: bytes) -> bytes:
    """The value of a header; nothing where it is missing or stands there twice."""
    values = headers.get(name, [])
    return values[0] if len(values) == 1 else b""


async def _body(receive: Any) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "the request ended early")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise Refused(413, f"the body is longer than {MAX_BODY} bytes")
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Any) -> Any:
    """Gives the body once, and then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again


async def _answer(send: Any, refused: Refused) -> None:
    headers = [(b"content-type", b"application/json"), (b"x-content-type-options", b"nosniff")]
    headers += [(b"www-authenticate", b"Bearer")] if refused.status == 401 else []
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": refused.why}).encode()})
