"""The arithmetic of docs/scale.md, by hand for a small shape, and the page as it is made."""

from pathlib import Path

import pytest
import yaml

from posttrain.config.scale import SHAPES, STRATEGIES, smallest, states, tables
from posttrain.config.shapes import ModelShape

ROOT = Path(__file__).resolve().parents[3]
SHAPE = ModelShape("llama", 10, 4, 8, 1, 2, 1, 2, False)
"""4x4 + 4x2 + 4x2 + 4x4 + 3 x 4x8 = 144 in the linears, 8 in norms; 2 x 40 embeddings, 4 in the last norm: 236."""
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


@pytest.mark.parametrize(
    ("name", "reference", "gpu", "host"),
    [
        ("DDP", False, 236 * (2 + 2 + 4), 0),
        ("DDP", True, 236 * (2 + 2 + 2 + 4), 0),
        ("ZeRO-2", True, 236 * 4 + 236 * (2 + 12) / 4, 0),
        ("FSDP2", True, 236 * (2 + 4 + 4 + 8) / 4, 0),
        ("ZeRO-3", False, 236 * (2 + 2 + 12) / 4, 0),
        ("ZeRO-3, offloaded", True, 236 * 2 / 4, 236 * (2 + 2 + 12) / 4),
    ],
)
def test_bytes_of_full_fine_tuning(name, reference, gpu, host):
    assert SHAPE.parameters == 236
    found = states(SHAPE, BY_NAME[name], 4, lora=False, reference=reference)
    assert (found.gpu, found.host) == (gpu, host)


def test_bytes_of_an_adapter():
    adapter = 16 * (8 + 6 + 6 + 8 + 12 + 12 + 12)
    found = states(SHAPE, BY_NAME["DDP"], 4, lora=True, reference=True)
    assert found.gpu == 236 * 2 + adapter * (4 + 4 + 8)


def test_the_fewest_ranks():
    strategy = BY_NAME["FSDP2"]
    need = states(SHAPE, strategy, 4, lora=False, reference=False).gpu
    assert smallest(SHAPE, strategy, need, lora=False, reference=False) == 4
    assert smallest(SHAPE, strategy, need - 1, lora=False, reference=False) == 8
    assert smallest(SHAPE, BY_NAME["DDP"], need, lora=False, reference=False) is None


def test_published_sizes():
    assert SHAPES["32B (Qwen2.5)"].parameters == 32_763_876_352
    assert SHAPES["70B (Llama 3.1)"].parameters == 70_553_706_496


def test_the_page_has_the_tables_as_they_are_made():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    made = page.split("<!-- begin: made by `python -m posttrain.config.scale` -->\n")[1].split("<!-- end -->")[0]
    assert made.strip() == tables().strip()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.config)
def test_every_strategy_has_its_file(strategy):
    config = yaml.safe_load((ROOT / "launch" / "accelerate" / strategy.config).read_text(encoding="utf-8"))
    stage = config.get("deepspeed_config", {}).get("zero_stage", 0)
    assert stage == {"DDP": 0, "ZeRO-2": 2, "FSDP2": 0}.get(strategy.name, 3)
    assert (config.get("fsdp_config", {}).get("fsdp_version") == 2) == (strategy.name == "FSDP2")
    offload = config.get("deepspeed_config", {}).get("offload_optimizer_device") == "cpu"
    assert offload == strategy.offloaded
