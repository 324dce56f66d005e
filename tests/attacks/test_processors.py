"""A model's processor of pictures, which may be anybody's: it fills no memory, runs nothing, and is one message."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from PIL import Image

from posttrain.config.pictures import PictureConfig
from posttrain.config.schema import ModelConfig
from posttrain.data.pictures import mark, take_in
from posttrain.errors import DataError, ModelError
from posttrain.models.processor import OLDEST
from posttrain.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < OLDEST, reason="pictures are refused with it")

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "tiny_vlms.py"
BILLION = 10**9
IMAGES, WHOLE = "preprocessor_config.json", "processor_config.json"


@pytest.fixture(scope="module", params=["idefics3", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("tiny_vlms", FIXTURE)
    tiny_vlms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_vlms)
    folder = tmp_path_factory.mktemp(request.param)
    tiny_vlms.saved(request.param, folder)
    return folder


def look(folder: Path) -> int:
    """Places of a picture, as `check` looks at one."""
    if not (folder / "p.png").exists():
        Image.new("RGB", (20, 30)).save(folder / "p.png")
    tokenizer = load_tokenizer(ModelConfig(path=str(folder), pictures=PictureConfig()), offline=True)
    (seen,) = tokenizer.pictures.seen_in(mark(take_in("p.png", folder, "rows:1")))
    return seen.places


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (IMAGES, {"size": {"longest_edge": BILLION, "shortest_edge": BILLION}}),
        (IMAGES, {"size": {"height": 10**5, "width": 10**5}}),
        (IMAGES, {"max_image_size": {"longest_edge": -1}}),
        (IMAGES, {"temporal_patch_size": BILLION}),
        (IMAGES, {"patch_size": 1e300}),
        (IMAGES, {"image_grid_pinpoints": [[BILLION, BILLION]]}),
        (WHOLE, {"image_seq_len": BILLION}),
        (WHOLE, {"image_processor": {"size": {"shortest_edge": 10**12}}}),
    ],
)
def test_sizes_that_fill_the_memory(file: str, changes: dict[str, Any], model: Path) -> None:
    assert 0 < look(model) < 100
    whole = (model / file).read_text()
    try:
        (model / file).write_text(json.dumps(json.loads(whole) | changes))
        with pytest.raises(ModelError, match="must be from 0 to") as raised:
            look(model)
        assert raised.value.where == str(model / file)
    finally:
        (model / file).write_text(whole)


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 5000 + "1" + "}" * 5000, "[1]", '{"size": {"depth": 3}}', '{"size": "large"}', '{"patch_size": "x"}']
    + ['{"image_processor_type": "X", "auto_map": {"AutoImageProcessor": "evil.Evil"}}'],
)
def test_settings_that_a_processor_cannot_have(text: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked at the terminal whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    mine = (model / IMAGES).read_text()
    try:
        changed = text if len(text) > 1000 or text[0] == "[" else json.dumps(json.loads(mine) | json.loads(text))
        (model / IMAGES).write_text(changed)
        (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(model / 'mark')!r}).touch()\n")
        try:
            assert look(model) > 0  # some families have no use for a key
        except (ModelError, DataError):
            pass
        assert not (model / "mark").exists()
    finally:
        (model / IMAGES).write_text(mine)
