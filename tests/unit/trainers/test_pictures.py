"""Runs on pictures, from recipe to saved model, and what `check` and `train` refuse of them alike."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets.packaged_modules.parquet.parquet import Parquet
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file

from posttrain.cli.check import check_recipe
from posttrain.config.collection import PairSettings, SampleSettings
from posttrain.config.loading import load_recipe
from posttrain.config.pictured import WITH_TORCHVISION
from posttrain.config.schema import FileSource, ModelConfig
from posttrain.config.workers import EvaluationRun
from posttrain.data import pictures
from posttrain.data.pairs import write_pairs
from posttrain.data.sources import problems
from posttrain.data.traces import read_traces
from posttrain.errors import DataError, NeedsError, PosttrainError, StateError
from posttrain.evaluation.runner import evaluate_model
from posttrain.methods import CONFIGS
from posttrain.models.processor import OLDEST
from posttrain.report.collect import collect
from posttrain.report.page import payload
from posttrain.rollouts.collect import collect as collect_traces
from posttrain.trainers.run import train
from posttrain.verifiers.reward_model import RewardModelVerifier
from posttrain.verifiers.verdict import Answer

INIT = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 64}
TOWER = {"image_size": 16, "patch_size": 8, "hidden_size": 16}
ALL = ["language", "projector", "tower"]

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < OLDEST, reason="an older transformers, with which pictures are refused"
)

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "tiny_vlms.py"


def tiny_vlms() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_vlms", FIXTURE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures with a question, an answer and a wrong one; every fourth row has two pictures."""
    folder = tmp_path_factory.mktemp("rows")
    random, lines = np.random.RandomState(0), []
    for number in range(16):
        pixels = random.randint(0, 255, (8 + 8 * (number % 2), 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        shown = [f"{number}.png"] if number % 4 else ["0.png", f"{number}.png"]
        answer = {"completion": "ab", "chosen": "ab", "rejected": "ba", "answer": "ab"}
        lines.append({"prompt": "which? ", "images": shown} | answer)
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(rows: Path, folder: Path, method: str, **changes: Any) -> Path:
    """A recipe file of a run of two steps; changes by dotted keys, with `/` for the dots."""
    source = {"path": str(rows / "rows.jsonl"), "images": "images"}
    section = {"sft": "completions", "dpo": "preferences", "reward": "preferences"}.get(method, "prompts")
    made: dict[str, Any] = {
        "model": {"init": INIT, "pictures": {"train": ALL, "init": TOWER}},
        "data": {section: source | ({"reference": "answer"} if section == "prompts" else {})},
        "method": {"name": method},
        "batch": {"micro_batch": 4, "prompts_per_step" if section == "prompts" else "rows_per_step": 4},
        "training": {"learning_rate": 0.01, "max_steps": 2},
        "output": str(folder / "run"),
    }
    if section == "prompts":
        made["verifier"] = [{"type": "exact"}, {"type": "length", "max": 6, "buffer": 6, "unit": "characters"}]
        made["rollouts"] = {"samples_per_prompt": 4, "max_new_tokens": 6}
    for key, value in changes.items():
        at = made
        *steps, last = key.split("__")
        for step in steps:
            at = at.setdefault(step, {})
        at[last] = value
    folder.mkdir(exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(made))
    return file


def run(file: Path, **how: Any) -> Path:
    result = train(load_recipe(file, [], CONFIGS), **how)
    return result.run_dir


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "ppo", "reward"])
def test_every_shell_trains_all_parts_and_saves_what_it_trained(method: str, rows: Path, tmp_path: Path) -> None:
    """Saving compares the model that is loaded again with the one that was trained, on rows with their pictures."""
    folder = run(recipe(rows, tmp_path, method))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in metrics if "loss" in row)
    assert max(row.get("grad_norm", 0) for row in metrics) > 0
    assert (folder / "model" / "processor_config.json").is_file()
    shown = payload(collect([folder]))["runs"][0]["pictures"]
    if method not in ("sft", "reward"):  # which show no samples
        texts = (folder / ("tokens.jsonl" if method == "dpo" else "samples.jsonl")).read_text()
        assert set(shown) == set(re.findall(r"\[picture (\w{8}), ", texts)) != set()
        (folder / "pictures" / f"{next(iter(shown))}.jpg").write_bytes(b"<script>")
        assert len(payload(collect([folder]))["runs"][0]["pictures"]) == len(shown) - 1
    for address in shown.values():
        image = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))))
        assert image.format == "JPEG" and image.width == 16


@pytest.mark.parametrize("method", ["chord", "prefixrl"])
def test_traces_have_pictures_too(method: str, rows: Path, tmp_path: Path) -> None:
    """Beside the rollouts, and begun ones that the policy goes on from."""
    own = {
        "chord": {"expert_rows_per_step": 2, "mu_warmup_steps": 1, "mu_decay_steps": 2},
        "prefixrl": {"answer_pattern": "b"},
    }[method]
    traces = {"path": str(rows / "rows.jsonl"), "images": "images", "completion": "completion"}
    changes = {"data__traces": traces} | {f"method__{key}": value for key, value in own.items()}
    folder = run(recipe(rows, tmp_path, method, **changes))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples and all("[picture " in sample["prompt"] for sample in samples)


@pytest.mark.parametrize("family, method", [("qwen2_5_vl", "grpo"), ("gemma3", "dpo"), ("qwen3_vl", "sft")])
def test_an_adapter_on_a_loaded_model(family: str, method: str, rows: Path, tmp_path: Path) -> None:
    """Policy and reference look through the same tower; positions of several axes; a template that shows pictures."""
    start = tmp_path / "start"
    tiny_vlms().saved(family, start)
    model = {"path": str(start), "pictures": {}, "peft": {"type": "lora", "r": 2}}
    folder = run(recipe(rows, tmp_path, method, model=model))
    before, after = load_file(start / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    assert changed and not any("visual" in name or "vision" in name or "projector" in name for name in changed)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (folder / "model" / name).read_bytes() == (start / name).read_bytes()


def test_pairs_that_are_drawn(rows: Path, tmp_path: Path) -> None:
    """Of what the policy samples, whose pictures the ledger charges then too."""
    folder = run(recipe(rows, tmp_path, "online_dpo"))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("grad_norm", 0) for row in metrics) > 0


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_how_rows_are_split_into_micro_batches_changes_nothing(method: str, rows: Path, tmp_path: Path) -> None:
    """A picture of several micro-batches is looked at in each, and its gradients add up."""
    plain = {"training__optim": "sgd", "training__learning_rate": 1.0}
    found = []
    for micro in (4, 1):
        folder = run(recipe(rows, tmp_path / str(micro), method, batch__micro_batch=micro, **plain))
        found.append(load_file(folder / "model" / "model.safetensors"))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_resumed_is_uninterrupted(method: str, rows: Path, tmp_path: Path) -> None:
    """Rollouts that wait in a checkpoint name their pictures by what is in them; a critic goes on."""
    waiting = {"rollouts__delay": 1} if method == "grpo" else {}
    file = recipe(rows, tmp_path, method, training__max_steps=4, training__save_steps=2, **waiting)
    folder = run(file)
    whole = load_file(folder / "model" / "model.safetensors")
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    again = load_file(run(file, resume="auto") / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_reward_models_and_critics_are_loaded_with_their_eyes(rows: Path, tmp_path: Path) -> None:
    """A reward model judges by the pictures of the row; a critic beside an adapter is gone on with."""
    scorer = run(recipe(rows, tmp_path / "reward", "reward")) / "model"
    judge = RewardModelVerifier(RewardModelVerifier.Config(path=str(scorer)))
    source = FileSource(path=str(rows / "rows.jsonl"), images="images", reference="answer")
    asked = [*problems(source, "rows")][:3]
    verdicts = judge.verify(asked, [Answer("ab")] * 3)
    assert len({verdict.score for verdict in verdicts}) == 3  # alike but for their pictures
    alone = [judge.verify([problem], [Answer("ab")])[0].score for problem in asked]
    assert alone == pytest.approx([verdict.score for verdict in verdicts], abs=1e-6)
    short = RewardModelVerifier(RewardModelVerifier.Config(path=str(scorer), max_length=8))
    with pytest.raises(DataError, match="rows with pictures are not cut"):
        short.verify(asked, [Answer("ab")] * 3)
    verifier = [{"type": "reward_model", "path": str(scorer)}]
    first = run(recipe(rows, tmp_path / "ppo", "ppo", verifier=verifier, model__peft={"type": "lora", "r": 2}))
    assert (first / "critic" / "processor_config.json").is_file()
    run(recipe(rows, tmp_path / "again", "ppo", critic={"path": str(first / "critic")}))


def test_another_picture_behind_the_same_path_is_noticed(rows: Path, tmp_path: Path) -> None:
    copied = tmp_path / "rows"
    shutil.copytree(rows, copied)
    file = recipe(copied, tmp_path, "sft", training__max_steps=4, training__save_steps=2)
    folder = run(file)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    Image.new("RGB", (16, 16), (1, 2, 3)).save(copied / "5.png")
    with pytest.raises(StateError, match="content.rows"):
        run(file, resume="auto")


def test_the_trained_model_is_evaluated_on_pictures(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file, and of a data set of the Hub whose column holds them, from the cache of `datasets`."""
    model = ModelConfig(path=str(run(recipe(rows, tmp_path, "sft")) / "model"))
    source = {"path": str(rows / "rows.jsonl"), "images": "images", "reference": "answer"}
    benchmark = {"name": "which", "data": source, "verifier": [{"type": "exact"}]}
    asked = {"benchmarks": [benchmark], "samples": 1, "max_new_tokens": 4}
    report = evaluate_model(model, EvaluationRun.model_validate(asked), None)
    assert report.benchmarks[0].headline()["greedy"].value >= 0
    file, lines = tmp_path / "0.parquet", [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    columns = {name: [line[name] for line in lines] for name in ("prompt", "answer")}
    columns["images"] = [[(rows / name).read_bytes() for name in line["images"]] for line in lines]
    features = {name: datasets.Value("string") for name in columns} | {"images": datasets.List(datasets.Image())}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(file))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    builder = Parquet(cache_dir=str(tmp_path / "build"), dataset_name="which", data_files={"train": [str(file)]})
    builder.download_and_prepare(str(tmp_path / "cache" / "owner___which" / "default" / "0.0.0" / ("0" * 40)))
    of_hub = {"benchmarks": [benchmark | {"data": source | {"path": "owner/which"}}]}
    again = evaluate_model(model, EvaluationRun.model_validate(asked | of_hub), None)
    assert again.benchmarks[0].headline() == report.benchmarks[0].headline()
    with pytest.raises(NeedsError, match="with workers 2 is not built"):
        evaluate_model(model, EvaluationRun.model_validate(asked | {"workers": 2}), None)


def test_sampled_traces_bring_their_pictures(rows: Path, tmp_path: Path) -> None:
    """To offline methods, and to pairs that are made of them, in a process that has not read the rows."""
    source = {"path": str(rows / "rows.jsonl"), "images": "images", "reference": "answer"}
    asked: dict[str, Any] = {
        "model": {
            "path": str(run(recipe(rows, tmp_path, "sft", training__max_steps=8)) / "model"),
            "pictures": {},
        },
        "data": {"prompts": source},
        "verifier": [{"type": "exact"}, {"type": "length", "max": 6, "buffer": 6, "unit": "characters"}],
        "rollouts": {"samples_per_prompt": 16, "max_new_tokens": 6, "temperature": 2.0},
    }
    traces, pairs = tmp_path / "traces.jsonl", tmp_path / "pairs.jsonl"
    collect_traces(SampleSettings.model_validate(asked), traces, say=lambda _: None)
    before = traces.read_bytes()
    collect_traces(SampleSettings.model_validate(asked), traces, say=lambda _: None)  # goes on, with nothing to do
    assert traces.read_bytes() == before
    pictures.ALBUM.clear()
    write_pairs([traces], pairs, PairSettings())
    shown = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert all("<image>" in row["prompt"] and (tmp_path / row["images"][0]).is_file() for row in shown)
    for method, section in (("oreo", "traces"), ("dpo", "preferences")):
        pictures.ALBUM.clear()
        data = {"path": str(traces), "keep": "all"} if section == "traces" else {"path": str(pairs), "images": "images"}
        changes: dict[str, Any] = {"data": {section: data}, "model": asked["model"]}
        changes["batch"] = {"micro_batch": 2, "rows_per_step": 2}
        if method == "oreo":  # with its KL over the whole vocabulary
            changes |= {"verifier": None, "rollouts": None}
        run(recipe(rows, tmp_path / method, method, **changes))
    next((tmp_path / "traces.pictures").iterdir()).write_bytes((rows / "1.png").read_bytes())
    pictures.ALBUM.clear()
    with pytest.raises(DataError, match="another than the row was made with"):
        read_traces([traces])
    with pytest.raises(ValueError, match="`workers` is not built for pictures"):
        SampleSettings.model_validate(asked | {"workers": 2})


REFUSED = {
    "model.pictures": ("sft", {"data__completions__images": None}),
    "data.completions.images": ("sft", {"model__pictures": None}),
    "data.too_long": ("sft", {"data__too_long": "cut"}),
    "data.streaming": ("sft", {"data__streaming": True}),
    "method.name": ("rto", {"method__dpo_model": "x"}),
    "rollouts.mode": ("grpo", {"rollouts__engine": "vllm", "rollouts__mode": "server"}),
    "rollouts.engine": ("grpo", {"rollouts__engine": "vllm", "model": {"path": "FAMILY", "pictures": {}}}),
    "model.attn_implementation": (
        "sft",
        {"model": {"path": "x", "pictures": {}, "attn_implementation": "flex_attention"}},
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_built_is_refused_by_check_and_train_alike(key: str, rows: Path, tmp_path: Path) -> None:
    method, changes = REFUSED[key]
    if key == "rollouts.engine":
        if importlib.util.find_spec("torchvision") is not None:
            pytest.skip("torchvision is here")
        changes = {**changes, **started("qwen3_vl", tmp_path)}
    file = recipe(rows, tmp_path, method, **changes)
    said = []
    for ask in (lambda: check_recipe(file, [], online=False, world_size=1), lambda: run(file)):
        with pytest.raises(PosttrainError) as caught:
            ask()
        assert key in str(caught.value) and "()" not in str(caught.value)
        said.append(str(caught.value).splitlines()[0].partition(": ")[2])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("family", "trained", "targets", "part"),
    [
        ("qwen2_5_vl", ["language"], ["qkv"], "language"),
        ("qwen2_5_vl", ["language", "tower"], ["q_proj"], "tower"),
        ("gemma3", ["projector"], "all-linear", "projector"),
    ],
)
def test_a_part_that_an_adapter_does_not_reach_is_refused(
    family: str, trained: list[str], targets: Any, part: str, rows: Path, tmp_path: Path
) -> None:
    """PEFT ends with a traceback where nothing is adapted, and says nothing where one part of two is left out."""
    model = started(family, tmp_path)["model"]
    model = {**model, "pictures": {"train": trained}, "peft": {"type": "lora", "r": 2, "target_modules": targets}}
    file = recipe(rows, tmp_path, "sft", model=model)
    for ask in (lambda: check_recipe(file, [], online=False, world_size=1), lambda: run(file)):
        with pytest.raises(PosttrainError, match=f"nothing in the {part}"):
            ask()


def started(family: str, folder: Path) -> dict[str, Any]:
    tiny_vlms().saved(family, folder / "start")
    return {"model": {"path": str(folder / "start"), "pictures": {}}}


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
@pytest.mark.parametrize("family", sorted(WITH_TORCHVISION))
def test_vllm_is_refused_where_it_imports_torchvision(family: str, rows: Path, tmp_path: Path) -> None:
    """Also Gemma 3, whose processor we make ourselves: vLLM's file of the family imports torchvision's."""
    method, changes = REFUSED["rollouts.engine"]
    file = recipe(rows, tmp_path, method, **{**changes, **started(family, tmp_path)})
    with pytest.raises(PosttrainError, match=f"without torchvision.*{family}"):
        check_recipe(file, [], online=False, world_size=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_check_says_what_a_picture_takes(
    method: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "seen.png"
    check_recipe(recipe(rows, tmp_path, method), [], online=False, world_size=1, picture=file)
    said = capsys.readouterr().out
    assert "16 x 8, 4 tokens]" in said
    assert "pictures: 16, of 4 to 4 tokens" in said
    assert Image.open(file).size == (16, 16)
    assert method != "sft" or "which? [[ab<eos>]]" in said
