"""Model cards, publishing to a Hub, and export."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.cli.export import export_command
from posttrain.errors import ModelError, NeedsError, RecipeError
from posttrain.trainers.publish import check_hub
from posttrain.trainers.run import train


class Hub(ThreadingHTTPServer):
    """As much of the Hub's API as an upload asks for; keeps what it was sent."""

    def __init__(self, *, broken=False):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.broken, self.created, self.files = broken, [], {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self._reply({"sha": "0" * 40, "siblings": [], "id": "me/tiny", "modelId": "me/tiny"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("transfer-encoding") == "chunked":
            body = self._chunks()
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self._reply({"url": f"{self.server.url}/me/tiny", "name": "me/tiny"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path and not self.server.broken:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._reply({"commitUrl": f"{self.server.url}/me/tiny/commit/0", "commitOid": "0" * 40, "success": True})
        elif self.path.endswith("/validate-yaml"):
            self._reply({"errors": [], "warnings": []})
        else:
            self._reply({"error": "the disk of this Hub is full"}, status=507)

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch):
    servers = []

    def make(**how):
        server = Hub(**how)
        servers.append(server)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
        return server

    yield make
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory, make_recipe_data):
    """A run with an adapter, evaluated while training."""
    from posttrain.config.loading import load_recipe
    from posttrain.methods import METHODS

    folder = tmp_path_factory.mktemp("published")
    changes = {
        "model.peft": {"type": "lora", "r": 4},
        "training.max_steps": 1,
        "evaluation": {
            "every": 1,
            "max_new_tokens": 8,
            "benchmarks": [
                {
                    "name": "sums",
                    "data": {"task": "chain_sum", "levels": [2], "size": 4, "split": "test"},
                    "verifier": [{"type": "procedural"}],
                }
            ],
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(make_recipe_data(tiny_model, folder, {"name": "grpo"}, changes)))
    return train(load_recipe(folder / "recipe.yaml", [], {n: m.Config for n, m in METHODS.items()})).run_dir


def test_a_card_stands_beside_every_model_and_is_valid(run):
    for kind, library in {"model": "transformers", "adapter": "peft"}.items():
        card = ModelCard.load(run / kind / "README.md")
        assert re.search(r"\| compute \| \S+ FLOPs; tokens: [\d,]+ trained.*; [\d,]+ CPU seconds \|", card.text)
        assert (card.data.library_name, card.data.pipeline_tag) == (library, "text-generation")
        assert {"posttrain", "grpo", "lora"} <= set(card.data.tags)
        assert "| method | grpo |" in card.text and "prompts: chain_sum" in card.text and "max_steps: 1" in card.text
        assert "| sums | greedy |" in card.text
        assert str(run.parent) not in card.content  # no folder of this machine
    assert [r.dataset_name for r in ModelCard.load(run / "model" / "README.md").data.eval_results or []][:1] == ["sums"]


def test_the_start_names_licence_and_base(tiny_model, tmp_path):
    import shutil

    from posttrain.config.schema import ModelConfig
    from posttrain.trainers.model_card import start_of

    shutil.copytree(tiny_model, tmp_path / "start")
    (tmp_path / "start" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/first\n---\n# Start\n")
    found = start_of(ModelConfig(path=str(tmp_path / "start")))
    assert found == {"words": "start", "license": "apache-2.0", "base_model": "owner/first"}
    assert start_of(ModelConfig(path="owner/on-the-hub"))["base_model"] == "owner/on-the-hub"


def test_the_proven_model_is_published_at_the_end(load, hub):
    server = hub()
    changes = {"training.push_to_hub": True, "training.hub_model_id": "me/tiny", "training.hub_private_repo": True}
    changes |= {"training.max_steps": 1, "model.peft": {"type": "lora", "r": 2}}
    result = train(load({"name": "sft"}, changes))
    assert server.created[0]["visibility"] == "private" and server.created[0]["name"] == "tiny"
    assert {"README.md", "config.json", "model.safetensors", "adapter/adapter_model.safetensors"} <= set(server.files)
    for name in ("README.md", "model.safetensors"):
        assert server.files[name] == (result.model_dir / name).read_bytes()
    assert "resolved.yaml" not in server.files


def test_a_hub_that_fails_loses_nothing(load, hub, tmp_path):
    hub(broken=True)
    recipe = load({"name": "sft"}, {"training.push_to_hub": True, "training.max_steps": 1})
    with pytest.raises(ModelError, match="is saved and could not be published"):
        train(recipe)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_publishing_that_cannot_work_is_refused_before(load, hub, monkeypatch):
    hub()
    check_hub(load({"name": "sft"}, {"training.push_to_hub": True, "training.hub_model_id": "me/tiny"}).training)
    with pytest.raises(NeedsError, match="hub_model_id"):
        check_hub(load({"name": "sft"}, {"training.push_to_hub": True, "training.hub_model_id": "a/b/c"}).training)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(NeedsError, match="no token"):
        check_hub(load({"name": "sft"}, {"training.push_to_hub": True}).training)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NeedsError, match="HF_HUB_OFFLINE"):
        check_hub(load({"name": "sft"}, {"training.push_to_hub": True}).training)


def logps(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[4, 5, 6, 7, 8, 2]])).logits.log_softmax(-1)


def test_export_of_a_run_and_of_its_adapter(run, tmp_path, capsys):
    export_command(str(run), tmp_path / "whole", None, False, "50GB")
    assert torch.equal(logps(tmp_path / "whole"), logps(run / "model"))
    assert (tmp_path / "whole" / "README.md").read_text() == (run / "model" / "README.md").read_text()
    export_command(str(run / "adapter"), tmp_path / "merged", None, True, "50GB")
    torch.testing.assert_close(logps(tmp_path / "merged"), logps(run / "model"), atol=1e-5, rtol=0)
    export_command(str(run), tmp_path / "small", "bfloat16", False, "8KB")
    shards = sorted((tmp_path / "small").glob("model-*.safetensors"))
    assert len(shards) >= 2 and (tmp_path / "small" / "model.safetensors.index.json").is_file()
    assert {t.dtype for file in shards for t in load_file(file).values()} == {torch.bfloat16}
    assert (logps(tmp_path / "small") - logps(run / "model")).abs().max() < 0.05
    assert "bfloat16, " in capsys.readouterr().out


def test_export_refuses(run, tmp_path):
    with pytest.raises(ModelError, match="is an adapter"):
        export_command(str(run / "adapter"), tmp_path / "out", None, False, "50GB")
    with pytest.raises(ModelError, match="something already"):
        export_command(str(run), tmp_path, None, False, "50GB")
    with pytest.raises(RecipeError, match="float8"):
        export_command(str(run), tmp_path / "out", "float8", False, "50GB")
    with pytest.raises(ModelError, match="no folder"):
        export_command("./absent", tmp_path / "out", None, False, "50GB")
    assert not (tmp_path / "out").exists()
