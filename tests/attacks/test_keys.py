"""Keys of servers go to the server that a recipe names, and to nobody else; not into messages either."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain.config.addresses import Address
from posttrain.config.schema import RolloutConfig
from posttrain.data.sample import Problem
from posttrain.errors import EngineError, VerifierError
from posttrain.trainers.engines import _api_key
from posttrain.verifiers.llm_judge import JudgeVerifier
from posttrain.verifiers.verdict import Answer


class Host(ThreadingHTTPServer):
    """Answers every request alike, and remembers what came."""

    daemon_threads = True

    def __init__(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.seen = (status, headers, body), list[tuple[str, dict[str, str], bytes]]()

    def __enter__(self) -> Host:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Host

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, dict(self.headers), body))
        status, headers, answer = self.server.answer
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(answer))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Quiet."""


def judge(host: Host, **changes: Any) -> JudgeVerifier:
    data = {"endpoint": f"http://127.0.0.1:{host.server_port}/v1", "model": "m", "principles": ["Right."], "retries": 0}
    return JudgeVerifier(JudgeVerifier.Config(type="judge", **data | {"api_key_env": "JUDGE_KEY"} | changes))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    return "s3cret"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int) -> None:
    with Host(200, {}) as thief, Host(status, {"Location": f"http://localhost:{thief.server_port}/take"}) as host:
        with pytest.raises(VerifierError, match="a redirect, and none is followed"):
            judge(host).verify([Problem("p", "Q?", "gold")], [Answer("a")])
        assert len(host.seen) == 1 and host.seen[0][1]["Authorization"] == "Bearer s3cret"
        assert thief.seen == []


@pytest.mark.parametrize("key", ["s3cret\n\n", "  s3cret\t", "\r\ns3cret"])
def test_white_space_around_a_key_is_left_out(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with Host(401, {}) as host:
        with pytest.raises(VerifierError):
            judge(host).verify([Problem("p", "Q?", "gold")], [Answer("a")])
        assert host.seen[0][1]["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("key", ["s3cret\nX-Other: 1", "s3cret\r\n\r\nGET /", "s3\x1bcret", "s3cret\u00e9", "s3 cret"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    rollouts = RolloutConfig(engine="vllm", mode="server", vllm={"api_key_env": "JUDGE_KEY"}, max_new_tokens=8)
    for build, kind in ((lambda: judge(Host(200, {})), VerifierError), (lambda: _api_key(rollouts), EngineError)):
        with pytest.raises(kind, match="JUDGE_KEY holds white space, control or other characters") as raised:
            build()
        assert raised.value.__cause__ is None and "s3" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "GITHUB_TOKEN", "GOOGLE_OAUTH_TOKEN", "WANDB_API_KEY"]
    + ["aws_secret_access_key", "AZURE_STORAGE_KEY", "NPM_TOKEN", "PATH", "HOME", "DATABASE_URL", "PGPASSWORD", "_KEY"]
    + ["JUDGE_KEY\n", "X;JUDGE_KEY", "JUDGE_KEY=1", "CI_JOB_TOKEN", "VAULT_TOKEN", "JUDGE_K\u0415Y"],
)
def test_no_other_variable_can_be_sent(name: str) -> None:
    with pytest.raises(ValidationError):
        judged_with(name)


def test_names_of_keys_of_endpoints() -> None:
    for name in ("OPENAI_API_KEY", "JUDGE_KEY", "POSTTRAIN_VLLM_API_KEY", "AZURE_OPENAI_API_KEY", "GOOGLE_API_KEY"):
        assert judged_with(name).api_key_env == name


def judged_with(name: str) -> JudgeVerifier.Config:
    """A recipe's judge that is sent this variable."""
    return JudgeVerifier.Config(
        type="judge", endpoint="http://judge.example/v1", model="m", principles=["Right."], api_key_env=name
    )


@pytest.mark.parametrize(
    "address",
    ["http://169.254.169.254/latest", "http://2852039166/", "http://0xa9fea9fe/", "http://0251.0376.0251.0376/"]
    + ["http://[fe80::1]/", "http://[::ffff:169.254.169.254]/", "http://metadata.google.internal/", "http://METADATA./"]
    + ["file:///etc/passwd", "ftp://host/", "http://host/\x1b]0;x", "http://host/\u202e"],
)
def test_addresses_that_no_model_answers_at(address: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Address).validate_python(address)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Type": "text/html"}, b"<html><script>alert(1)</script>\x1b]52;c;eA==\x07</html>"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b"0" * (32 << 20))),
        ({}, b"[" * 100_000),
        ({}, json.dumps({"choices": [{"message": {"content": {"verdicts": ["yes"]}}}]}).encode()),
        (
            {},
            json.dumps({"choices": [{"message": {"content": "{}" * 50_000}}], "usage": {"total_tokens": "1"}}).encode(),
        ),
        ({}, b'{"choices": [{"message": {"content": "x"}}], "usage": {"total_tokens": 1e400}}'),
        ({}, b"\xff\xfe\x00"),
        ({}, b" " * (5 << 20)),
    ],
)
def test_a_reply_of_another_form_is_a_crash_of_the_judge(headers: dict[str, str], body: bytes) -> None:
    with Host(200, headers, body) as host:
        (verdict,) = judge(host).verify([Problem("p", "Q?", "gold")], [Answer("a")])
    assert verdict.status == "crash" and verdict.score is None and len(verdict.detail) <= 300
