"""The served engine against real servers started by launch/vllm_server.sh, and what happens when they fail.

Every failure ends within its deadline with one message that names the phase.
"""

import dataclasses
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.errors import EngineError
from posttrain.rollouts import vllm_server
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.vllm_client import Unreachable, VllmClient
from posttrain.rollouts.vllm_server import ServedVllm
from posttrain.rollouts.weight_sync import PolicyWeights
from posttrain.trainers.run import train

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (docs/vllm.md)")

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "vllm_server.sh"
PROMPTS = [[1, *(4 + (7 * i + 3 * j) % 14 for j in range(3 + i % 5))] for i in range(8)]
STOP, KEY = 2, "a-key"
UP = 180.0
"""Seconds that a server may take to start on a busy machine."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """The script and what it started, in a session of their own."""

    def __init__(self, model, folder, port=None, options=()):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "POSTTRAIN_VLLM_API_KEY": KEY}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(SCRIPT), str(model), "--port", str(self.port), "--dtype", "float32", "--max-model-len", "96"]
                + ["--kv-cache-memory-bytes", str(64 << 20), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def wait(self):
        try:
            VllmClient(self.url).wait_until_up(UP)
        except EngineError as error:
            raise AssertionError(self.log.read_text()[-3000:]) from error
        return self

    def members(self):
        """Processes of its session that still run, and their parents."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == self.process.pid and state != "Z":
                found[int(stat.parent.name)] = int(parent)
        return found

    def signal(self, number):
        for pid in self.members():
            os.kill(pid, number)

    def kill_the_api(self):
        """SIGKILL to the process that answers requests: the script's only child."""
        (pid,) = [pid for pid, parent in self.members().items() if parent == self.process.pid]
        os.kill(pid, signal.SIGKILL)

    def end(self):
        self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(vllm_model, tmp_path_factory):
    made = Server(vllm_model, tmp_path_factory.mktemp("server")).wait()
    yield made
    made.end()


def policy(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def connect(server, model, *, key=KEY, **settings):
    settings = {"timeout": 60.0, "start_timeout": 5.0, **settings}
    client = VllmClient(server.url, api_key=key, reconnect=settings.pop("reconnect", 1.0))
    weights = PolicyWeights(model, Accelerator(cpu=True))
    return ServedVllm(weights, PROMPTS, client=client, stop_ids=[STOP], max_batch=32, **settings)


@pytest.fixture
def engine(server, vllm_model):
    torch.manual_seed(0)
    return connect(server, policy(vllm_model))


def disturb(model, size=0.05):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)


def largest_difference(model, found):
    worst = 0.0
    for prompt, group in zip(PROMPTS, found, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion.ids])).logits[0].log_softmax(-1)
            expected = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            worst = max(worst, (expected - torch.tensor(completion.logps)).abs().max().item())
    return worst


@pytest.mark.serve
def test_samples_are_those_of_the_weights_that_were_sent(engine):
    model = engine.weights.model
    for version in (0, 1):
        disturb(model)
        assert engine.sync(version)["canary_logp_diff_max"] < 1e-5
        found = engine.generate(PROMPTS, Sampling(n=3, max_new_tokens=12, seed=4))
        assert largest_difference(model, found) < 1e-5
        assert {c.policy_version for group in found for c in group} == {version}
    whole = [[c.ids for c in group] for group in found]
    later = engine.generate(PROMPTS[2:], Sampling(n=2, max_new_tokens=12, seed=4, first_prompt=2, first_sample=1))
    assert [[c.ids for c in group] for group in later] == [group[1:] for group in whole[2:]]
    assert not list(Path("/dev/shm").glob("posttrain-weights-*"))


@pytest.mark.serve
def test_more_tokens_than_the_server_reads_at_once_change_no_draw(engine):
    """On a CPU a server reads 2,048 tokens in one pass unless told otherwise."""
    engine.sync(0)
    prompts = [(prompt * 30)[:85] for prompt in PROMPTS]
    sampling = Sampling(n=4, max_new_tokens=8, seed=4)
    assert sampling.n * sum(map(len, prompts)) > 2048
    found = engine.generate(prompts, sampling)
    alone = engine.generate(prompts[5:6], dataclasses.replace(sampling, first_prompt=5))
    assert [c.ids for c in alone[0]] == [c.ids for c in found[5]]


def test_greedy_and_limits(engine):
    engine.sync(0)
    found = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=6, greedy=True))
    assert all(group[0] == group[1] for group in found)
    with pytest.raises(EngineError, match="exceeds the engine's 96 positions"):
        engine.generate([[1] * 95], Sampling(max_new_tokens=5))


def test_a_run_samples_from_the_server(server, load_vllm_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    served = {
        "rollouts.mode": "server",
        "rollouts.vllm": {"url": server.url, "api_key_env": "SERVER_KEY"},
        "output": str(tmp_path / "served"),
    }
    rows = {}
    for name, changes in (("served", served), ("colocated", {"output": str(tmp_path / "colocated")})):
        run = train(load_vllm_recipe({"name": "grpo"}, changes)).run_dir
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows[name] = [line for line in lines if "loss" in line]
    assert len(rows["served"]) == 3
    for one, other in zip(rows["served"], rows["colocated"], strict=True):
        assert one["engine_logp_diff_max"] < 1e-5
        assert one["reward"] == other["reward"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_without_the_key_the_server_is_closed(server, vllm_model):
    with pytest.raises(EngineError, match="status 401") as raised:
        connect(server, policy(vllm_model), key=None)
    assert "api_key_env" in raised.value.hint


def raw(server, path, body, **headers):
    """Status of a request with just these headers, as any program or web page might send it."""
    asked = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    asked.request("POST", path, json.dumps(body), names)
    status = asked.getresponse().status
    asked.close()
    return status


@pytest.mark.serve
def test_who_reaches_the_port_reaches_nothing_else(server, tmp_path):
    """Before there was a guard one reached all: without a key (vLLM checks its own under /v1 alone), and as text/plain,
    as a web page can post without asking, the workers ran any method: `save_sharded_state` wrote where it was told."""
    saved = {"method": "save_sharded_state", "kwargs": {"path": str(tmp_path / "anywhere")}}
    loaded = {"method": "posttrain_load", "kwargs": {"folder": str(tmp_path), "version": 1, "owner": "x"}}
    key, kind = {"Authorization": f"Bearer {KEY}"}, {"Content_Type": "application/json"}
    page = {"Content_Type": "text/plain", "Origin": "http://evil.example"}
    for body in (saved, loaded, {"method": "posttrain_status"}):
        assert raw(server, "/collective_rpc", body, **kind) == 401
        assert raw(server, "/collective_rpc", body, **page) == 403
    assert raw(server, "/collective_rpc", saved, **key, **kind) == 403
    assert raw(server, "/collective_rpc", loaded, **key, **kind) == 403
    assert raw(server, "/collective_rpc", {"method": "posttrain_status"}, **key, Content_Type="text/plain") == 415
    assert raw(server, "/collective_rpc", {"method": "posttrain_status"}, **key, **kind, Host="rebound.example") == 403
    assert raw(server, "/v1/chat/completions", {"messages": []}, **key, **kind) == 404
    assert raw(server, "/collective_rpc", {"method": "posttrain_status"}, **key, **kind) == 200
    assert not list(tmp_path.iterdir())


@pytest.mark.serve
def test_weights_that_a_killed_trainer_left_are_removed_at_the_next_start(server, vllm_model):
    code = "import os, sys\nfrom posttrain.rollouts.transfer_folder import transfer_folder\n"
    code += "with transfer_folder('/dev/shm') as folder:\n    print(folder, flush=True)\n    os.kill(os.getpid(), 9)\n"
    left = Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
    assert left.is_dir() and left.parent == Path("/dev/shm")
    os.utime(left, (0, 0))  # as if it had been some time ago
    connect(server, policy(vllm_model))
    assert not left.exists()


def test_another_model_is_refused_at_the_start(server, vllm_model):
    model = policy(vllm_model, num_hidden_layers=1)
    with pytest.raises(EngineError, match=r"start: .* serves another model: layers 2 there, 1 here"):
        connect(server, model)


def test_other_log_probs_than_the_recipe_needs_are_refused_at_the_start(server, vllm_model):
    with pytest.raises(EngineError, match="gives processed_logprobs.* need raw_logprobs") as raised:
        connect(server, policy(vllm_model), restricted=True)
    assert "--logprobs-mode raw_logprobs" in raised.value.hint


def test_wrong_weights_stop_the_run(engine, monkeypatch):
    right = engine.weights.named_tensors

    def wrong(**how):
        for name, tensor in right(**how):
            yield name, tensor + 0.01 if name.endswith("mlp.down_proj.weight") else tensor

    monkeypatch.setattr(engine.weights, "named_tensors", wrong)
    with pytest.raises(EngineError, match="weight sync 3: engine and trainer differ by up to"):
        engine.sync(3)


def test_a_folder_that_the_server_does_not_see_is_named(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(engine.client, "post", hide_folder(engine.client.post, tmp_path / "elsewhere"))
    with pytest.raises(EngineError, match=r"weight sync 1: .*the folder of a sync must be made by this user") as raised:
        engine.sync(1)
    assert raised.value.where == "rollouts.vllm.transfer_dir"


def hide_folder(post, folder):
    def send(path, body, **how):
        if path == "/collective_rpc" and "kwargs" in body:
            body = {**body, "kwargs": {**body["kwargs"], "folder": str(folder)}}
        return post(path, body, **how)

    return send


def test_a_missing_folder_for_the_weights_is_said_at_the_start(server, vllm_model, tmp_path):
    with pytest.raises(EngineError, match="start: no folder .*nowhere"):
        connect(server, policy(vllm_model), transfer_dir=str(tmp_path / "nowhere"))


def test_a_folder_without_room_is_said_at_the_start(server, vllm_model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000))
    with pytest.raises(EngineError, match="start: /dev/shm has 0 MB free, and a weight sync takes") as raised:
        connect(server, policy(vllm_model))
    assert "--shm-size" in raised.value.hint


def test_a_folder_that_is_full_ends_the_sync_and_leaves_nothing(engine, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"a part")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(vllm_server, "save_file", full)
    with pytest.raises(EngineError, match="weight sync 1: cannot write the weights into /dev/shm .*No space") as raised:
        engine.sync(1)
    assert raised.value.where == "rollouts.vllm.transfer_dir" and "--resume auto" in raised.value.hint
    assert not list(Path("/dev/shm").glob("posttrain-weights-*"))
    monkeypatch.undo()
    engine.sync(2)
    assert largest_difference(engine.weights.model, engine.generate(PROMPTS, Sampling(max_new_tokens=4))) < 1e-5


def lose_answers(client, monkeypatch):
    """From now on the first answer to each request is lost on its way. Returns the requests."""
    once, lost = client._once, []

    def losing(method, path, body, timeout):
        answer = once(method, path, body, timeout)
        request = f"{path} {json.dumps(body)}"
        if request not in lost:
            lost.append(request)
            raise Unreachable("lost")
        return answer

    monkeypatch.setattr(client, "_once", losing)
    return lost


def test_lost_answers_neither_lose_nor_repeat_a_sample(engine, monkeypatch):
    sampling = Sampling(n=3, max_new_tokens=12, seed=4)
    engine.sync(0)
    expected = engine.generate(PROMPTS, sampling)
    lost = lose_answers(engine.client, monkeypatch)
    assert engine.generate(PROMPTS, sampling) == expected
    assert sum(request.startswith("/v1/completions") for request in lost) == len(PROMPTS)
    disturb(engine.weights.model)
    engine.sync(1)
    found = engine.generate(PROMPTS, sampling)
    assert {len(group) for group in found} == {3} and largest_difference(engine.weights.model, found) < 1e-5


def test_an_adapter_is_sent_merged(server, vllm_model):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    engine = connect(server, get_peft_model(policy(vllm_model), lora))
    for version in (0, 1):
        disturb(engine.weights.model)
        assert engine.sync(version)["canary_logp_diff_max"] < 1e-5
        found = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=12, seed=4))
        assert largest_difference(engine.weights.model, found) < 1e-5


def test_weights_of_another_run_are_noticed(server, vllm_model, engine):
    engine.sync(0)
    connect(server, policy(vllm_model)).sync(0)
    with pytest.raises(EngineError, match="sampling with weights 0: .* holds weights of another run"):
        engine.generate(PROMPTS, Sampling(max_new_tokens=4))


@pytest.mark.serve
def test_a_teacher_here_gives_the_gradients_that_it_gives_from_its_folder(
    server, vllm_model, load, tmp_path, monkeypatch
):
    """By all that a server is asked for; with plain SGD, whose steps are the gradients."""
    connect(server, policy(vllm_model)).sync(0)
    monkeypatch.setenv("TEACHER_KEY", KEY)

    def trained(name, protocol=None, **method):
        where = {"url": f"{server.url}/v1", "api_key_env": "TEACHER_KEY", "protocol": protocol}
        changes = {"method.teacher": str(vllm_model), "output": str(tmp_path / name), "training.max_steps": 2}
        changes |= {"training.optim": "sgd", "training.learning_rate": 1.0}
        section = {"name": "opd", **method, **({} if protocol is None else {"server": where})}
        return load_file(train(load(section, changes)).run_dir / "model" / "model.safetensors")

    for number, (protocols, method) in enumerate(
        [(("vllm", "openai"), {}), (("vllm",), {"objective": "top_k", "top_k": 4, "beta": 0.5})]
    ):
        expected = trained(f"{number}-folder", **method)
        for protocol in protocols:
            found = trained(f"{number}-{protocol}", protocol, **method)
            for name, weights in expected.items():
                torch.testing.assert_close(found[name], weights, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ the script


def run_script(*arguments, **environment):
    return subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def test_a_taken_port_is_said_at_once(server, vllm_model):
    done = run_script(str(vllm_model), "--port", str(server.port))
    assert done.returncode == 3
    assert f"port {server.port} on 127.0.0.1 is taken" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_addresses_need_a_key(vllm_model):
    done = run_script(str(vllm_model), POSTTRAIN_VLLM_HOST="0.0.0.0", POSTTRAIN_VLLM_API_KEY="")
    assert done.returncode == 2
    assert "set POSTTRAIN_VLLM_API_KEY" in done.stderr


def test_without_a_model_it_says_how_it_is_used():
    done = run_script()
    assert done.returncode == 2
    assert "launch/vllm_server.sh MODEL" in done.stderr


def test_a_server_that_never_comes_up_ends_the_run(load_vllm_recipe, tmp_path):
    settings = {"url": f"http://127.0.0.1:{free_port()}", "start_timeout": 1.0}
    changes = {"rollouts.mode": "server", "rollouts.vllm": settings, "output": str(tmp_path / "run")}
    with pytest.raises(EngineError, match="start: no healthy vLLM server at .* within 1 s"):
        train(load_vllm_recipe({"name": "grpo"}, changes))


# -------------------------------------------------------------------------------------------------- servers that die


def gone(server, seconds=30.0):
    deadline = time.monotonic() + seconds
    while server.members() and time.monotonic() < deadline:
        time.sleep(0.2)
    return server.members() == {}


def in_seconds(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


@pytest.mark.slow
@pytest.mark.serve
def test_a_server_that_hangs_in_a_sync_and_dies_in_a_batch(vllm_model, tmp_path):
    server = Server(vllm_model, tmp_path).wait()
    try:
        engine = connect(server, policy(vllm_model), timeout=30.0, reconnect=1.0)
        engine.sync(0)

        server.signal(signal.SIGSTOP)
        engine.timeout, started = 3.0, time.monotonic()
        with pytest.raises(EngineError, match="weight sync 1: the server went away .*nothing within 3 s"):
            engine.sync(1)
        assert time.monotonic() - started < 10
        assert not list(Path("/dev/shm").glob("posttrain-weights-*"))
        server.signal(signal.SIGCONT)

        engine.timeout = 120.0
        engine.sync(2)
        timer = in_seconds(1.0, server.kill_the_api)
        started = time.monotonic()
        with pytest.raises(EngineError, match="sampling with weights 2: the server went away") as raised:
            engine.generate(PROMPTS * 40, Sampling(n=32, max_new_tokens=80, seed=1))
        timer.join()
        assert time.monotonic() - started < 15
        assert "--resume auto" in raised.value.hint
        assert gone(server)  # its workers went with it
    finally:
        server.end()


@pytest.mark.slow
def test_untied_weights_in_bfloat16_are_sent_too(vllm_model, tmp_path):
    torch.manual_seed(0)
    model = policy(vllm_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    shutil.copytree(vllm_model, tmp_path / "untied")  # with its tokenizer
    model.to(torch.bfloat16).save_pretrained(tmp_path / "untied")
    server = Server(tmp_path / "untied", tmp_path, options=["--dtype", "bfloat16"]).wait()
    try:
        engine = connect(server, model)
        for version in (0, 1):
            disturb(model, 0.02)
            assert engine.sync(version)["canary_logp_diff_max"] <= 3e-2
            found = engine.generate(PROMPTS, Sampling(n=2, max_new_tokens=12, seed=4))
            assert largest_difference(model, found) <= 3e-2
    finally:
        server.end()


@pytest.mark.slow
def test_a_server_whose_engine_dies_and_one_that_is_told_to_end(vllm_model, tmp_path):
    server = Server(vllm_model, tmp_path).wait()
    try:
        engine = connect(server, policy(vllm_model), reconnect=1.0)
        engine.sync(0)
        (api,) = [pid for pid, parent in server.members().items() if parent == server.process.pid]
        children = [pid for pid, parent in server.members().items() if parent == api]
        (core,) = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        timer = in_seconds(1.0, lambda: os.kill(core, signal.SIGKILL))
        with pytest.raises(EngineError, match="sampling with weights 0: ") as raised:
            engine.generate(PROMPTS * 40, Sampling(n=32, max_new_tokens=80, seed=1))
        timer.join()
        assert "--resume auto" in raised.value.hint
        assert gone(server)
    finally:
        server.end()
    server = Server(vllm_model, tmp_path).wait()
    try:
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.wait(60)
        assert gone(server)
    finally:
        server.end()


@pytest.mark.slow
def test_a_run_goes_on_with_a_new_server(vllm_model, load_vllm_recipe, tmp_path):
    """Killed in the middle of a sync, restarted with the first weights: the run stops, and resumes to the same end."""
    server = Server(vllm_model, tmp_path).wait()
    settings = {"url": server.url, "api_key_env": "SERVER_KEY", "reconnect": 0.5, "start_timeout": 5.0}
    changes = {
        "rollouts.mode": "server",
        "rollouts.vllm": settings,
        "training.max_steps": 4,
        "training.save_steps": 2,
        "output": str(tmp_path / "run"),
    }
    os.environ["SERVER_KEY"] = KEY
    sent, send = [], ServedVllm._send
    try:
        expected = train(load_vllm_recipe({"name": "grpo"}, {**changes, "output": str(tmp_path / "whole")})).run_dir

        def die_at_the_fourth(engine, folder, *arguments):
            sent.append(folder)
            if len(sent) == 4:
                server.end()
            return send(engine, folder, *arguments)

        ServedVllm._send = die_at_the_fourth
        with pytest.raises(EngineError, match="weight sync 3: the server went away"):
            train(load_vllm_recipe({"name": "grpo"}, changes))
        ServedVllm._send = send
        server = Server(vllm_model, tmp_path, port=server.port).wait()
        run = train(load_vllm_recipe({"name": "grpo"}, changes), resume="auto").run_dir
        model = Path("model") / "model.safetensors"
        assert (run / model).read_bytes() == (expected / model).read_bytes()
    finally:
        ServedVllm._send = send
        del os.environ["SERVER_KEY"]
        server.end()


def test_health_needs_no_key(server):
    with urllib.request.urlopen(f"{server.url}/health", timeout=10) as response:
        assert response.status == 200
