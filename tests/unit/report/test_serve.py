"""A report that is served: to who has its address, and to nobody else; it follows a run that goes on."""

import gzip
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.errors import DataError, RecipeError
from posttrain.report import serve
from posttrain.report.serve import MAX_WAITING, ReportServer
from posttrain.tracking.tracker import Tracker


@pytest.fixture
def served(tmp_path, make_run):
    """A server of a run of three steps."""
    folder = make_run(tmp_path / "run", steps=3)
    (tmp_path / "run" / "secret.txt").write_text("a secret")
    with ReportServer([folder]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def go_on(server, steps):
    tracker = Tracker(server.paths[0], console="off", total_steps=steps[-1])
    tracker.rewind(steps[0] - 1)
    for step in steps:
        tracker.log(step, {"reward": 0.9})
    tracker.close(plots=False)


def ask(server, path, method="GET", headers=(), body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=any(name == "Host" for name, _ in headers))
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    reply = connection.getresponse()
    return reply.status, dict(reply.getheaders()), reply.read()


def test_the_page_and_its_data(served):
    base = f"/{served.key}/"
    status, headers, text = ask(served, base)
    assert status == 200 and headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
    assert b"connect-src 'self'" in text and f'data-follow="{served.tag()}"'.encode() in text
    status, headers, packed = ask(served, base + "data")
    assert status == 200 and json.loads(gzip.decompress(packed))["runs"][0]["curves"]["step"] == [1, 2, 3]
    known = [("If-None-Match", headers["ETag"])]
    assert ask(served, base + "data", headers=known)[0] == 304
    go_on(served, [4, 5])
    status, later, packed = ask(served, base + "data", headers=known)
    assert status == 200 and later["ETag"] != headers["ETag"]
    assert json.loads(gzip.decompress(packed))["runs"][0]["curves"]["step"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/data", "/x/", "/KEY", "/KEY/secret.txt", "/KEY/../run/secret.txt", "/KEY/%2e%2e/run/secret.txt"),
        *("/KEY/data/", "/KEY//data", "/KEY/?a=/data", "http://evil.example/KEY/", "/KEY/metrics.jsonl"),
    ],
)
def test_nothing_else_is_there(served, path):
    status, _, text = ask(served, path.replace("KEY", served.key))
    assert status in (403, 404) and b"secret" not in text and served.key.encode() not in text


@pytest.mark.parametrize(
    "headers",
    [
        [("Host", "evil.example")],
        [("Host", "127.0.0.1.evil.example")],
        [("Host", "127.0.0.1"), ("Host", "127.0.0.1")],
        [("Host", "")],
        [("Origin", "http://evil.example")],
        [("Origin", "null")],
        [("Sec-Fetch-Site", "cross-site")],
        [("Sec-Fetch-Site", "same-site")],
        [("Sec-Fetch-Site", "none"), ("Sec-Fetch-Site", "cross-site")],
        [("Host", "192.0.2.1")],
        [("Host", "[2001:db8::1]:80")],
    ],
)
def test_other_pages_and_their_names_are_refused(served, headers):
    assert ask(served, f"/{served.key}/data", headers=headers)[0] == 403


def test_it_is_called_by_addresses_and_its_name_at_any_port(served):
    for host in ("localhost:9000", "127.0.0.1", "[::1]:80"):  # behind a tunnel the port is another
        headers = [("Host", host), ("Origin", f"http://{host}"), ("Sec-Fetch-Site", "same-origin")]
        assert ask(served, f"/{served.key}/data", headers=headers)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT"])
def test_it_only_reads(served, method):
    assert ask(served, f"/{served.key}/", method=method)[0] == 501


def connected(server, sent=b""):
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
    connection.sendall(sent)
    return connection


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\n\r\n", b"GET /KEY/ HTTP/1.1\r\nHost: localhost\r\n\r\n"]
)
def test_a_connection_that_breaks_off_prints_nothing(served, sent, capfd):
    for _ in range(8):
        connection = connected(served, sent.replace(b"KEY", served.key.encode()))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
        connection.close()
    assert ask(served, f"/{served.key}/data")[0] == 200
    for thread in threading.enumerate():
        if "process_request_thread" in thread.name:
            thread.join(10)
    assert capfd.readouterr().err == ""


def test_slow_connections_keep_nobody_out(served):
    held = [connected(served, b"G") for _ in range(2 * MAX_WAITING)]
    assert ask(served, f"/{served.key}/data")[0] == 200
    assert held[0].recv(1) == b"", "the oldest makes room"
    held[-1].sendall(b"ET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert held[-1].recv(12) == b"HTTP/1.0 404"
    for connection in held:
        connection.close()


def test_a_request_has_a_deadline_as_a_whole(monkeypatch, served):
    monkeypatch.setattr(serve._Handler, "timeout", 0.5)
    connection = connected(served)
    with pytest.raises(OSError):  # each byte is in time
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.1)


def test_a_damaged_file_is_told_and_got_over(served):
    file = served.paths[0] / "data.json"
    whole = file.read_text()
    file.write_text(whole[:5])
    status, _, text = ask(served, f"/{served.key}/data")
    assert status == 503 and b"not JSON" in text
    file.write_text(whole)
    assert ask(served, f"/{served.key}/data")[0] == 200


def test_what_cannot_be_served_is_refused(tmp_path, served):
    with pytest.raises(DataError, match="no such folder"):
        ReportServer([tmp_path / "none"])
    with pytest.raises(RecipeError, match="cannot listen on 127.0.0.1, port"):
        ReportServer(served.paths, port=served.server_port)
    for options in (["--serve", "--output", "x.html"], ["--port", "80"], ["--host", "::1"]):
        found = CliRunner().invoke(app, ["report", str(served.paths[0]), *options])
        assert isinstance(found.exception, RecipeError)


def test_the_command_listens_on_this_machine_alone_and_ends_with_ctrl_c(served):
    command = [sys.executable, "-m", "posttrain", "report", str(served.paths[0]), "--serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        printed = process.stdout.readline()
        host, port = re.search(r"http://([\d.]+):(\d+)/\S+/$", printed).groups()
        assert host == "127.0.0.1"
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", re.search(r"(/[^/]+/)$", printed.strip())[1])
        assert connection.getresponse().status == 200
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


def test_the_page_follows(chromium, opened, served):
    page = opened(served.address)
    assert page.ask("document.getElementById('live').innerText") == "Live"
    page.click("#tab-compute")
    go_on(served, [4, 5])
    steps = "[...document.querySelectorAll('td')].map(each => each.innerText)[1]"
    page.wait(f"{steps} === '5'")
    assert page.ask("document.getElementById('panel').dataset.view") == "Compute"
    assert page.ask("document.getElementById('live').innerText").startswith("Live, ")
    page.click("#tab-recipe")
    page.press("/")
    page.write("max_steps")
    go_on(served, [6])
    page.wait("document.getElementById('renew') !== null")  # a field that somebody writes into is left alone
    assert page.ask("document.getElementById('search').value") == "max_steps"
    page.click("#renew")
    page.wait("!document.getElementById('renew')")
    assert page.ask("document.getElementById('search').value") == "max_steps"
    assert all(what.get("type") == "Fetch" for what in page.complaints)
    served.shutdown()
    served.server_close()
    page.wait("document.getElementById('live').innerText.startsWith('Not connected')")
