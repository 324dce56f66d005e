"""The client against a small HTTP server that fails in the ways a real one does."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from posttrain.errors import EngineError
from posttrain.rollouts.vllm_client import VllmClient, in_parallel


class Server:
    """Answers with what `script` says, one entry per request: a status, or `drop` to close without an answer."""

    def __init__(self):
        self.script, self.seen, self.delay = [], [], 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, body, self.headers.get("Authorization")))
                time.sleep(outer.delay)
                what = outer.script.pop(0) if outer.script else 200
                if what == "drop":
                    self.close_connection = True
                    return
                self.send_response(what)
                self.end_headers()
                self.wfile.write(json.dumps({"echo": body}).encode())

            def do_GET(self):
                self.send_response(outer.script.pop(0) if outer.script else 200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def post(client, seconds=5.0, body=None):
    return client.post("/v1/completions", body or {"a": 1}, deadline=time.monotonic() + seconds, phase="sampling")


def test_an_answer(server):
    assert post(VllmClient(server.url, api_key="k")) == {"echo": {"a": 1}}
    assert server.seen == [("/v1/completions", {"a": 1}, "Bearer k")]


def test_a_lost_connection_is_tried_again(server):
    server.script = ["drop", "drop", 200]
    assert post(VllmClient(server.url, reconnect=5)) == {"echo": {"a": 1}}
    assert len(server.seen) == 3


def test_a_busy_server_is_tried_again(server):
    server.script = [503, 200]
    assert post(VllmClient(server.url, reconnect=5)) == {"echo": {"a": 1}}


def test_a_server_that_stays_away_ends_the_phase_in_time(server):
    client = VllmClient(server.url, reconnect=0.6)
    server.script = ["drop"] * 100
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"sampling: the server went away .* at http://127") as raised:
        post(client, seconds=60)
    assert time.monotonic() - started < 5
    assert "--resume auto" in raised.value.hint


def test_a_server_that_hangs_ends_the_phase_at_the_deadline(server):
    server.delay = 3.0
    started = time.monotonic()
    with pytest.raises(EngineError, match="sampling: the server went away .*nothing within"):
        post(VllmClient(server.url, reconnect=0), seconds=0.5)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(("status", "hint"), [(401, "api_key_env"), (404, "launch/vllm_server.sh"), (400, "log")])
def test_a_refusal_is_not_tried_again(server, status, hint):
    server.script = [status]
    with pytest.raises(EngineError, match=rf"sampling: .* answers /v1/completions with status {status}") as raised:
        post(VllmClient(server.url))
    assert hint in raised.value.hint
    assert len(server.seen) == 1


def test_waiting_for_a_server_to_come_up(server):
    server.script = [503, 503]
    VllmClient(server.url).wait_until_up(10)


def test_a_server_that_never_comes_up():
    started = time.monotonic()
    with pytest.raises(
        EngineError, match=r"start: no healthy vLLM server at http://127\.0\.0\.1:9 within 0\.6 s"
    ) as raised:
        VllmClient("http://127.0.0.1:9").wait_until_up(0.6)
    assert time.monotonic() - started < 3
    assert "launch/vllm_server.sh" in raised.value.hint


def test_results_keep_their_places_whatever_order_they_come_in():
    def job(number):
        time.sleep(0.002 * (9 - number))
        return number

    assert in_parallel([lambda n=n: job(n) for n in range(10)], workers=5) == list(range(10))


def test_the_first_failure_ends_the_rest():
    begun = []

    def job(number):
        begun.append(number)
        if number == 2:
            raise EngineError("two")
        time.sleep(0.01)

    with pytest.raises(EngineError, match="two"):
        in_parallel([lambda n=n: job(n) for n in range(200)], workers=2)
    assert len(begun) < 20


def test_what_is_under_way_is_given_up(server):
    client, server.delay = VllmClient(server.url, reconnect=30), 20.0
    found = []

    def ask():
        with pytest.raises(EngineError, match="sampling: given up, because the run ends"):
            post(client, seconds=60)
        found.append(time.monotonic())

    asking = threading.Thread(target=ask)
    asking.start()
    while not server.seen:
        time.sleep(0.01)
    started = time.monotonic()
    client.give_up()
    asking.join(10)
    assert found and found[0] - started < 5
    with pytest.raises(EngineError, match="given up"):
        post(client)
    assert len(server.seen) == 1
