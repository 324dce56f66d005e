"""The server's middleware asks for the key on every path but its health."""

import asyncio

import pytest

from posttrain.rollouts.vllm_worker import KEY_VARIABLE, RequireKey


def ask(monkeypatch, key, path, headers=(), kind="http"):
    """What was sent: `passed`, or the messages of the middleware itself."""
    monkeypatch.setenv(KEY_VARIABLE, key)
    sent = []

    async def app(scope, receive, send):
        sent.append("passed")

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": list(headers)}
    asyncio.run(RequireKey(app)(scope, None, send))
    return sent


@pytest.mark.parametrize("path", ["/collective_rpc", "/v1/completions", "/reset_prefix_cache", "/", "/health/../x"])
@pytest.mark.parametrize("header", [None, b"", b"Bearer wrong", b"key", b"Bearer  key"])
def test_without_the_key_nothing_is_reached(monkeypatch, path, header):
    headers = [] if header is None else [(b"authorization", header)]
    sent = ask(monkeypatch, "key", path, headers)
    assert sent[0]["status"] == 401
    assert b"key" in sent[1]["body"]


def test_the_key_opens(monkeypatch):
    assert ask(monkeypatch, "key", "/collective_rpc", [(b"authorization", b"Bearer key")]) == ["passed"]


def test_health_is_open(monkeypatch):
    assert ask(monkeypatch, "key", "/health") == ["passed"]


def test_websockets_are_closed(monkeypatch):
    assert ask(monkeypatch, "key", "/v1/realtime", kind="websocket") == [{"type": "websocket.close", "code": 4401}]


def test_start_and_end_of_the_server_pass(monkeypatch):
    assert ask(monkeypatch, "key", "", kind="lifespan") == ["passed"]


def test_a_server_without_a_key_asks_for_none(monkeypatch):
    assert ask(monkeypatch, "", "/collective_rpc") == ["passed"]
