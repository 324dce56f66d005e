"""What reaches a vLLM server through its guard: the requests of a sync and of sampling, from who has the key.

Before there was one, whoever reached the port reached all of these: tests/e2e/test_vllm_server.py asks a real server.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import EngineError
from posttrain.rollouts.vllm_guard import FOLDER_VARIABLE, KEY_VARIABLE, MAX_BODY, NAMES_VARIABLE, Guard
from posttrain.rollouts.vllm_key import key_file, make_key, read_key

KEY = "s3cret-key"
GOOD = {"host": "127.0.0.1:8000", "authorization": f"Bearer {KEY}", "content-type": "application/json"}
STATUS = {"method": "posttrain_status"}


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder through which weights come."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def ask(
    path: str = "/collective_rpc",
    body: Any = STATUS,
    *,
    method: str = "POST",
    headers: dict[str, str] | list[tuple[str, str]] = GOOD,
    kind: str = "http",
    **scope: Any,
) -> tuple[int, Any]:
    """Status of the guard's answer and its reason, or 0 and the JSON that the server behind it got."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]
    sent: list[dict[str, Any]] = []
    passed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got = b""
        while scope["type"] == "http":
            message = await receive()
            got += message["body"]
            if not message["more_body"]:
                break
        lengths = [value for name, value in scope.get("headers", ()) if name == b"content-length"]
        assert not lengths or lengths == [str(len(got)).encode()]
        passed.append(json.loads(got) if got else None)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    pairs = headers.items() if isinstance(headers, dict) else headers
    scope |= {"type": kind, "path": path, "method": method}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in pairs]
    asyncio.run(Guard(app)(scope, receive, send))
    assert bool(passed) != bool(sent)
    if passed:
        return 0, passed[0]
    return sent[0].get("status", sent[0].get("code")), sent[-1].get("body", b"").decode()


def test_what_posttrain_sends_passes(server: Path) -> None:
    folder = server / "posttrain-weights-abc"
    folder.mkdir(mode=0o700)
    owner = {"version": 3, "owner": "0123456789abcdef"}
    for body in (
        STATUS | {"kwargs": {}},
        {"method": "posttrain_hold", "kwargs": owner},
        {"method": "posttrain_load", "kwargs": owner | {"folder": str(folder)}},
    ):
        assert ask(body=body) == (0, body)
    adapter = {"lora_name": "0123456789abcdef-1", "lora_path": str(folder)}
    assert ask("/v1/load_lora_adapter", adapter) == (0, adapter)
    assert ask("/v1/unload_lora_adapter", {"lora_name": "0123456789abcdef-1"})[0] == 0
    assert ask("/v1/completions", {"prompt": [1], "max_tokens": 1})[0] == 0
    assert ask("/reset_prefix_cache", None)[0] == 0
    assert ask("/health", b"", method="GET", headers={"host": "localhost"})[0] == 0
    assert ask("/metrics", b"", method="GET")[0] == 0
    assert ask("", b"", kind="lifespan")[0] == 0


@pytest.mark.parametrize("path", ["/collective_rpc", "/v1/completions", "/reset_prefix_cache", "/", "/health/../x"])
@pytest.mark.parametrize("key", [None, "", "Bearer wrong", KEY, f"Bearer  {KEY}", f"bearer {KEY}", f"Bearer {KEY} "])
def test_without_the_key_nothing_is_reached(path: str, key: str | None) -> None:
    headers = dict(GOOD)
    headers.pop("authorization")
    assert ask(path, headers=headers | ({} if key is None else {"authorization": key}))[0] == 401
    if key is not None:  # nor where it stands beside the right one
        assert ask(path, headers=[*GOOD.items(), ("Authorization", key)])[0] == 401


@pytest.mark.parametrize("key", ["", " ", "two words", "new\nline", "k\u00e9y"])
def test_a_server_without_a_proper_key_does_not_start(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(RuntimeError, match="holds no key") as raised:
        Guard(lambda *_: None)
    assert not key.strip() or key not in str(raised.value)


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/wake_up",
        "/v1/chat/completions",
        "/tokenize",
        "/invocations",
        "/docs",
        "/openapi.json",
        "/is_sleeping",
    ]
    + ["/collective_rpc/", "//collective_rpc", "/COLLECTIVE_RPC", "/collective_rpc\x00", "/v1/../collective_rpc"]
    + [
        "/start_profile",
        "/server_info",
        "/scale_elastic_ep",
        "/reset_mm_cache",
        "/v1/files",
        "/pause",
        "/init_weights",
    ],
)
def test_no_other_path(path: str) -> None:
    for method in ("POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert ask(path, method=method)[0] == 404


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "post", ""])
def test_no_other_verb(method: str) -> None:
    assert ask(method=method)[0] == 404
    assert ask("/health", method=method if method != "GET" else "POST", headers={"host": "localhost"})[0] == 401


def test_no_path_in_front() -> None:
    assert ask("/collective_rpc", root_path="/collective_rpc")[0] == 404
    assert ask(kind="websocket") == (4403, "")


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain; application/json"]
    + ["application/json; charset=utf-7", "application/jsonp", "application/json, text/plain"],
)
@pytest.mark.parametrize("path", ["/collective_rpc", "/v1/completions", "/reset_prefix_cache"])
def test_json_only(kind: str, path: str) -> None:
    assert ask(path, headers=GOOD | {"content-type": kind})[0] == 415
    assert ask(path, headers=[*GOOD.items(), ("content-type", kind)])[0] == 415
    assert ask(path, headers=GOOD | {"content-encoding": "gzip"})[0] == 415


@pytest.mark.parametrize("header", ["origin", "Origin", "sec-fetch-site", "Sec-Fetch-Mode"])
def test_nothing_from_a_web_page(header: str) -> None:
    for value in ("null", "http://localhost:8000", "https://evil.example", ""):
        assert ask(headers=GOOD | {header: value})[0] == 403
        assert ask("/health", method="GET", headers=GOOD | {header: value})[0] == 403


def test_names_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAMES_VARIABLE, "gpu-7.cluster, other")
    good = ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "10.0.0.3:80", os.uname().nodename]
    for host in [*good, "gpu-7.cluster:8000", "other.", "localhost."]:
        assert ask(headers=GOOD | {"host": host})[0] == 0, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8000", "", "2130706433", "0x7f.1", "a@b"):
        assert ask(headers=GOOD | {"host": host})[0] == 403, host
    assert ask(headers=[*GOOD.items(), ("host", "evil.example")])[0] == 403


@pytest.mark.parametrize(
    "body",
    [{"method": "save_sharded_state", "kwargs": {"path": "/tmp/x"}}, {"method": "load_model"}, {"method": "__init__"}]
    + [{"method": "posttrain_"}, {"method": "posttrain_status.__class__"}, {"method": ["posttrain_status"]}, {}]
    + [STATUS | {"args": ["x"]}, STATUS | {"timeout": 1}, STATUS | {"kwargs": {"x": 1}}, STATUS | {"kwargs": []}]
    + [
        {"method": "posttrain_hold", "kwargs": {"version": 1}},
        [STATUS],
        "posttrain_status",
        None,
        7,
        b"",
        b"{",
        b"\xff",
    ]
    + [b'{"method": "posttrain_status", "method": "save_sharded_state"}', b"[" * 20_000, b'{"method": NaN}'],
)
def test_no_other_method_of_the_workers(body: Any) -> None:
    assert ask(body=body)[0] in (400, 403)


def test_a_body_is_handed_on_as_it_was_understood() -> None:
    twice = b'{"method": "save_sharded_state", "method": "posttrain_status", "kwargs": {"path": 1}, "kwargs": {}}'
    assert ask(body=twice) == (0, {"method": "posttrain_status", "kwargs": {}})
    assert ask(body=json.dumps(STATUS).encode("utf-16"))[1] == STATUS | {"kwargs": {}}
    chunked = [*GOOD.items(), ("transfer-encoding", "chunked"), ("content-length", "3")]
    assert ask(headers=chunked)[1] == STATUS | {"kwargs": {}}
    assert ask(body=b" " * (MAX_BODY + 1))[0] == 413


def test_weights_come_from_the_transfer_folder_alone(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, elsewhere = server / "posttrain-weights-a", server / "inner" / "posttrain-weights-a"
    for folder in (good, elsewhere, server / "other", server / "posttrain-weights-open"):
        folder.mkdir(parents=True, mode=0o700)
    (server / "posttrain-weights-open").chmod(0o777)
    (server / "posttrain-weights-file").write_text("x")
    (server / "posttrain-weights-link").symlink_to(elsewhere)
    (server / "linked").symlink_to(server / "inner")

    def load(folder: Any) -> int:
        kwargs = {"version": 1, "owner": "o", "folder": folder}
        adapter = {"lora_name": "0123456789abcdef-1", "lora_path": folder}
        found = ask(body={"method": "posttrain_load", "kwargs": kwargs})[0], ask("/v1/load_lora_adapter", adapter)[0]
        assert bool(found[0]) == bool(found[1])
        return found[0]

    assert load(str(good)) == 0 and load(str(server / "inner" / ".." / "posttrain-weights-a")) == 0
    refused = [elsewhere, server / "other", server / "posttrain-weights-open", server / "posttrain-weights-file"]
    refused += [server / "posttrain-weights-link", server / "posttrain-weights-none", "/etc", f"{good}/", f"{good}/."]
    refused += [server / "linked" / "posttrain-weights-a", "posttrain-weights-a", f"{good}\x00", "", "hf-user/model"]
    for folder in refused:
        assert load(str(folder)) == 403, folder
    for folder in (7, None, ["x"], {"a": 1}):
        assert load(folder) in (400, 403)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert load(str(good)) == 403, "another user's"


@pytest.mark.parametrize(
    "name", ["x", "../x", "0123456789abcdef-", "0123456789ABCDEF-1", "a/b", "0123456789abcdef-1\n"]
)
def test_adapters_have_the_names_of_a_run(name: str) -> None:
    assert ask("/v1/unload_lora_adapter", {"lora_name": name})[0] == 400


def test_the_key_of_a_port_is_made_once_and_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert read_key("http://127.0.0.1:8123") is None
    key = make_key(8123)
    assert len(key) >= 43 and make_key(8123) == key != make_key(8124)
    assert key_file(8123).stat().st_mode & 0o777 == 0o600
    assert key_file(8123).parent.stat().st_mode & 0o777 == 0o700
    assert read_key("http://localhost:8123") == read_key("http://127.0.0.1:8123/") == key
    assert read_key("http://other.example:8123") is None, "it goes to no other machine"
    key_file(8123).chmod(0o640)
    for ask_for in (lambda: read_key("http://127.0.0.1:8123"), lambda: make_key(8123)):
        with pytest.raises(EngineError, match="others can read the server's key") as raised:
            ask_for()
        assert key not in str(raised.value)
    key_file(8123).unlink()
    key_file(8123).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError):
        make_key(8123)
    assert not (tmp_path / "elsewhere").exists()
