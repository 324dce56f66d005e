"""Pictures through a real vLLM in this process: it samples and scores as the trainer's own forward does."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from posttrain.config.loading import load_recipe
from posttrain.config.pictured import WITH_TORCHVISION
from posttrain.config.pictures import PictureConfig, TowerInit
from posttrain.config.schema import FileSource, ModelConfig, ModelInit
from posttrain.data.rendering import Renderer
from posttrain.data.sources import problems
from posttrain.methods import CONFIGS
from posttrain.models.loading import load_policy
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.vllm_engine import ColocatedVllm
from posttrain.rollouts.weight_sync import Canary, PolicyWeights, canary_limit
from posttrain.trainers.run import train

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (docs/vllm.md)"),
]

VLMS = runpy.run_path(str(Path(__file__).resolve().parents[1] / "fixtures" / "tiny_vlms.py"))
EVERYTHING = ["language", "projector", "tower"]
INIT = {"hidden_size": 64, "layers": 2, "heads": 2, "max_length": 128}
SHOWN = [["0.png"], ["1.png", "0.png"], [], ["1.png"]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("rows"), np.random.RandomState(0)
    for number in range(2):
        Image.fromarray(random.randint(0, 255, (24, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    lines = [{"prompt": f"which {len(shown)}? ", "answer": "a", "images": shown} for shown in SHOWN]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def started(family: str, folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, with weights that are far from nothing."""
    if family == "made":
        given = PictureConfig(train=EVERYTHING, init=TowerInit(hidden_size=64))
        model, tokenizer = load_policy(ModelConfig(init=ModelInit(**INIT), pictures=given), seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
        return model, tokenizer
    if family in WITH_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        pytest.skip("vLLM looks at pictures of this family by torchvision")
    size = VLMS["Size"](hidden=64, vision=64, side=16)
    VLMS["saved"](family, folder, size=size)
    return load_policy(ModelConfig(path=str(folder), pictures=PictureConfig(train=EVERYTHING)), seed=0)


@pytest.mark.parametrize("family", ["made", "gemma3", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_it_samples_and_scores_as_the_trainer_does(family: str, rows: Path, tmp_path: Path) -> None:
    """Also after an update of the tower, of which nothing older may be left."""
    model, tokenizer = started(family, tmp_path)
    renderer = Renderer(tokenizer)
    found = problems(FileSource(path=str(rows), images="images", reference="answer"), "rows")
    prompts = [renderer.prompt_ids(problem) for problem in found]
    weights = PolicyWeights(model.eval(), Accelerator(cpu=True))
    limit = canary_limit(None, trainer_float32=True, engine_dtype="float32")
    canary = Canary(prompts, renderer.stop_ids[0], limit, whole=True)
    settings = {"stop_ids": renderer.stop_ids, "max_batch": 16}
    engine = ColocatedVllm(weights, canary, dtype="float32", max_length=128, **settings)
    own = TransformersEngine(model, pad_id=tokenizer.pad_token_id, **settings)
    try:
        for version in range(2):
            said = engine.sync(version)
            assert said["canary_logp_diff_max"] < 1e-4
            sampled = engine.generate(prompts, Sampling(n=3, max_new_tokens=12, temperature=1.0, seed=version))
            for prompt, completions in zip(prompts, sampled, strict=True):
                for completion in completions:
                    ids = torch.tensor([[*prompt, *completion.ids]])
                    with torch.no_grad():
                        logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                    wanted = logps.gather(-1, torch.tensor(completion.ids)[:, None]).squeeze(-1)
                    torch.testing.assert_close(torch.tensor(completion.logps), wanted, rtol=1e-4, atol=1e-4)
            greedy = Sampling(n=1, max_new_tokens=12, greedy=True)
            both = [[group[0].ids for group in each.generate(prompts, greedy)] for each in (engine, own)]
            assert both[0] == both[1]
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "vision" in name or "connector" in name or "projector" in name or "visual" in name:
                        parameter.add_(0.3 * torch.randn_like(parameter))
    finally:
        engine.close()


def test_a_run_with_it(rows: Path, tmp_path: Path) -> None:
    recipe = {
        "model": {"init": INIT, "pictures": {"train": EVERYTHING, "init": {"hidden_size": 64}}},
        "data": {"prompts": {"path": str(rows), "images": "images", "reference": "answer"}},
        "verifier": [{"type": "exact"}, {"type": "length", "max": 6, "buffer": 6, "unit": "characters"}],
        "method": {"name": "grpo"},
        "rollouts": {"engine": "vllm", "samples_per_prompt": 4, "max_new_tokens": 6},
        "batch": {"micro_batch": 4, "prompts_per_step": 2},
        "training": {"learning_rate": 0.01, "max_steps": 3},
        "output": str(tmp_path / "run"),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    folder = train(load_recipe(file, [], CONFIGS)).run_dir
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    differences = [row["engine_logp_diff_max"] for row in metrics if "engine_logp_diff_max" in row]
    assert differences and max(differences) < 1e-3
