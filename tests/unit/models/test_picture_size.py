"""What looking at pictures costs: as FLOPs against a count by hand and PyTorch's own count of products, as parameters
against models of five families."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from posttrain.config.memory import estimate_memory
from posttrain.config.needs import Needs
from posttrain.config.pictures import PictureConfig, TowerInit
from posttrain.config.schema import Lora, ModelConfig, ModelInit
from posttrain.config.shapes import model_shape
from posttrain.data.pictures import mark, take_in
from posttrain.data.rendering import Renderer
from posttrain.models.adapters import lora_config
from posttrain.models.eyes import frozen_modules, parts
from posttrain.models.loading import load_policy
from posttrain.models.processor import OLDEST
from posttrain.models.size import size_of
from posttrain.tracking.ledger import ComputeLedger, Looks, Size

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < OLDEST, reason="an older transformers, with which pictures are refused"
)

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "tiny_vlms.py"
SPEC = importlib.util.spec_from_file_location("tiny_vlms", FIXTURE)
tiny_vlms = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tiny_vlms)

EVERYTHING = ["language", "projector", "tower"]


def picture(side: int, shade: int = 0) -> str:
    return mark(take_in(Image.new("RGB", (side, side), (shade, 0, 0)), None, "here"))


def test_pictures_of_a_made_model_by_hand():
    """16 x 16 pixels in patches of 4: 16 of them, of which 4 become a token."""
    tower = TowerInit(image_size=16, patch_size=4, merge=2, hidden_size=8, layers=1)
    config = ModelConfig(
        init=ModelInit(hidden_size=32, layers=1), pictures=PictureConfig(train=["projector"], init=tower)
    )
    model, tokenizer = load_policy(config, seed=0)
    renderer = Renderer(tokenizer)
    rows = [renderer.encoder.encode(text) for text in (picture(16), picture(16) + "a", "b", picture(30, 1))]
    assert renderer.pixels(rows) == 2 * 16 * 16  # the first picture stands in two rows
    # Patches: 3 x 4 x 4 numbers to 8, with a bias. A layer: four matrices of 8 x 8, an MLP to 24 and back, all with
    # biases, and two norms; a norm behind. The projector reads 4 x 8 numbers, gives 32, and has no bias.
    layer = 4 * (8 * 8 + 8) + (8 * 24 + 24) + (24 * 8 + 8) + 2 * 16
    seeing, projector = 3 * 16 * 8 + 8 + layer + 16, 32 * 32
    size = size_of(model)
    assert size.looks == Looks(4, 4, seeing, 0, projector, projector)
    ledger = ComputeLedger({"policy": size})
    ledger.scored(0, "policy", pixels=512)
    seen = 2 * (seeing * 32 + projector * 8)
    assert ledger.step()["flops"] == seen
    ledger.trained(10, pixels=512)
    # The language model is frozen, and the gradient of the projector goes through it: 4 N a token.
    assert ledger.step()["flops"] == 4 * size.parameters * 10 + seen + 4 * projector * 8


def test_gradients_of_the_parts():
    def backward(tower: int, projector: int) -> int:
        return Looks(2, 4, 100, tower, 10, projector).backward(160)  # 40 patches, 10 vectors

    assert backward(0, 0) == 0
    assert backward(0, 10) == 2 * (10 + 10) * 10
    assert backward(100, 10) == 2 * (10 + 10) * 10 + 2 * (100 + 100) * 40
    assert backward(3, 0) == 2 * 10 * 10 + 2 * (100 + 3) * 40  # an adapter of the tower: through both
    text, frozen = Size(1000), Size(1000, looks=Looks(2, 4, 100, 0, 10, 0))
    assert text.backward == frozen.backward == 0 and frozen.looking(160, training=True) == frozen.looking(160)


def test_a_ledger_with_pictures_goes_on():
    sizes = {"policy": Size(1000, 1000, looks=Looks(2, 4, 100, 100, 10, 10))}
    ledger = ComputeLedger(sizes)
    ledger.trained(3, pixels=160)
    ledger.step()
    again = ComputeLedger(sizes)
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again.totals == ledger.totals


@pytest.fixture(scope="module", params=list(tiny_vlms.FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_vlms.saved(request.param, folder)
    return folder


def opened(folder: Path, train: list[str] = EVERYTHING, **how: Any) -> tuple[Any, Any, ModelConfig]:
    config = ModelConfig(path=str(folder), dtype="float32", pictures=PictureConfig(train=train), **how)
    return *load_policy(config, seed=0), config


def test_products_are_those_that_pytorch_counts(family: Path):
    """Of one picture and of two tiles: without attention, which is not charged, and with norms and biases, which are
    no products: some percent of these narrow models."""
    model, tokenizer, _ = opened(family)
    renderer, size = Renderer(tokenizer), size_of(model)
    for side, shade in ((16, 2), (32, 3)):
        ids = renderer.encoder.encode(picture(side, shade))
        (seen,) = renderer.pictures.seen_among(ids)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eyes._encoded(model.base_model, [seen])
        found = counter.get_flop_counts()["Global"]
        products = sum(n for name, n in found.items() if str(name).rpartition(".")[2] in ("mm", "addmm", "convolution"))
        products += sum(n for name, n in found.items() if "bmm" in str(name) and "gemma3" in str(family))
        assert renderer.pixels([ids, ids]) == seen.pixels
        assert products <= size.looking(seen.pixels) <= 1.08 * products, found


def test_parameters_are_those_of_the_model(family: Path):
    model, _, config = opened(family)
    counts = {part: 0 for part in EVERYTHING}
    named = dict(model.named_parameters())
    for part, names in parts(model).items():
        counts[part] = sum(named[name].numel() for name in names)
    shape = model_shape(config)
    assert [shape.parameters, shape.sight.projector, shape.sight.tower] == [counts[part] for part in EVERYTHING]
    looks = size_of(model).looks
    assert (looks.patch, looks.merge) == (shape.sight.patch, shape.sight.merge)


@pytest.mark.parametrize("train", [EVERYTHING, ["projector"], ["tower"]])
def test_adapters_are_those_of_peft(family: Path, train: list[str]):
    peft = pytest.importorskip("peft")
    lora = Lora(r=2)
    model, _, config = opened(family, train, peft=lora)
    sight = model_shape(config).sight
    expected = sum(sight.lora_parameters(part, 2, "all-linear") for part in train if part != "language")
    if not expected:
        pytest.skip("the projector is no linear module, and PEFT adapts none of it")
    adapter = lora_config(lora)
    adapter.exclude_modules = frozen_modules(model, train)
    adapted = peft.get_peft_model(model, adapter)
    looks = size_of(adapted).looks
    assert looks.trained == expected


def test_an_estimate_counts_what_looks(family: Path, load):
    needs = Needs(data=("prompts",), rollouts=True, verifier=True, reference=True)

    def terms(train: list[str]) -> dict[str, int]:
        model = {"path": str(family), "pictures": {"train": train}}
        recipe = load({"name": "grpo"}, {"model": model})
        found = estimate_memory(recipe, needs, sequence_tokens=128, sequences_per_rank=4, device="cpu")
        return {name: size for name, size, _ in (*found.fixed, *found.training, *found.sampling)}

    shape = model_shape(ModelConfig(path=str(family), pictures=PictureConfig()))
    frozen, every = terms(["language"]), terms(EVERYTHING)
    assert frozen["weights"] == frozen["reference"] == every["weights"] == 4 * shape.whole
    assert frozen["gradients"] == 4 * shape.parameters and every["gradients"] == 4 * shape.whole
    assert every["pictures"] >= frozen["pictures"] > 0  # the same of a tower of one layer
    assert every["activations"] == frozen["activations"]
