"""Further attacks with files of data, models and runs that others made: refused with one message, or harmless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from posttrain import safe_files
from posttrain.config.adapters import adapter_config, module_names, resolved
from posttrain.config.foreign_files import READ
from posttrain.config.positions import config_json
from posttrain.config.schema import FileSource, ModelConfig
from posttrain.data.folders import folder_files
from posttrain.data.sources import problems
from posttrain.data.traces import manifest_path, read_traces
from posttrain.errors import DataError, ModelError, PosttrainError, StateError
from posttrain.evaluation.report import Report
from posttrain.models.tokenizer import load_tokenizer
from posttrain.state.lock import locked, say_on_stderr

DEEP = "[" * 100_000
"""JSON that Python's own reader gives up on with a RecursionError."""


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of a model folder, to spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_jinja_in_data_is_text(tmp_path: Path, tiny_model: Path, small_causal) -> None:
    """A row that holds a template is not rendered, whatever template is around it."""
    from posttrain.data.rendering import Renderer

    attack = "{{ ''.__class__.__mro__ }}{% for i in range(9) %}x{% endfor %}"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": attack, "reference": "{{ 7 * 7 }}"}) + "\n")
    source = FileSource(path=str(tmp_path / "rows.jsonl"), reference="reference", template="Q: {prompt}")
    (problem,) = problems(source, "data.prompts")
    assert attack in str(problem.prompt) and problem.reference == "{{ 7 * 7 }}"
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text = tokenizer.apply_chat_template([{"role": "user", "content": attack}], tokenize=False)
    assert text == attack
    assert Renderer(tokenizer) is not None


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch mark') }}"]
    + ["{{ messages.append(1) }}", "{% for i in range(10 ** 9) %}x{% endfor %}", "{{ ('%c' * 9) | attr('__mul__') }}"],
)
def test_a_template_of_a_model_reaches_nothing(template: str, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    from jinja2.exceptions import TemplateError

    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))
    tokenizer.chat_template = template
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except (TemplateError, OverflowError):
        text = ""
    assert "class" not in text and not (tmp_path / "mark").exists()


def test_a_tokenizer_with_a_huge_list_of_merges(model: Path) -> None:
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate((256 << 20) + 1)  # holes take no room here
    with pytest.raises(ModelError, match="larger than 256 MiB"):
        load_tokenizer(ModelConfig(path=str(model)))


@pytest.mark.parametrize("content", [DEEP, '{"a":' * 50_000, "7", '["x"]', "\ud800", '{"n": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_settings_of_a_model_that_are_no_settings(name: str, content: str, model: Path) -> None:
    (model / name).write_bytes(content.encode(errors="surrogatepass"))
    read = config_json if name == "config.json" else lambda _: adapter_config(model)
    if name == "adapter_config.json":
        with pytest.raises(ModelError, match="JSON"):
            read(None)
        (model / name).unlink()
    else:
        with pytest.raises(ModelError, match="JSON"):
            read(ModelConfig(path=str(model)))


@pytest.mark.parametrize(
    "header",
    [
        (1 << 62).to_bytes(8, "little"),
        b"\xff" * 8,
        (99_000_000).to_bytes(8, "little") + b"{}",
        b"",
        b"\x02\0\0\0\0\0\0\0[]",
    ]
    + [(100_000).to_bytes(8, "little") + b"[" * 100_000],
)
def test_a_header_of_weights_that_would_fill_the_memory(header: bytes, model: Path) -> None:
    (model / "model.safetensors").write_bytes(header)
    with pytest.raises(ModelError):
        module_names(ModelConfig(path=str(model)))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("inner", [False, True])
def test_settings_of_a_model_that_name_native_code(key: str, inner: bool, model: Path) -> None:
    """transformers fetches such a kernel and runs it, where the package for that is installed."""
    from posttrain.models.loading import load_policy

    config = json.loads((model / "config.json").read_text())
    value = {"": "evil/kernel"} if inner else "evil/kernel:function"
    (model / "config.json").write_text(json.dumps(config | ({"text_config": {key: value}} if inner else {key: value})))
    for read in (lambda given: load_policy(given, seed=0), config_json):
        with pytest.raises(ModelError, match="names code of the Hub"):
            read(ModelConfig(path=str(model)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", "x"),
        ("num_attention_heads", 0),
        ("hidden_size", -5),
        ("hidden_size", True),
        ("tie_word_embeddings", "maybe"),
        ("vocab_size", 10**12),
        ("model_type", 7),
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_settings_of_a_model_with_values_that_none_has(key: str, value: object, inner: bool, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | ({"text_config": {key: value}} if inner else {key: value})))
    for read in (config_json, load_tokenizer):
        with pytest.raises(ModelError, match=f"{key} must be") as caught:
            read(ModelConfig(path=str(model)))
        assert caught.value.where == str(model / "config.json")


def test_settings_of_a_model_that_are_a_device(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    for read in (config_json, load_tokenizer):
        with pytest.raises(ModelError, match="is a link to /dev/zero"):
            read(ModelConfig(path=str(model)))
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    for read in (config_json, load_tokenizer):
        with pytest.raises(ModelError, match="no plain file"):
            read(ModelConfig(path=str(model)))


def test_a_tokenizer_of_brackets(model: Path) -> None:
    (model / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="no JSON") as caught:
        load_tokenizer(ModelConfig(path=str(model)))
    assert caught.value.where.startswith(str(model / "tokenizer.json"))


def brackets(depth: int) -> list[str]:
    """Lists, and objects, within one another: few enough for Python's reader, too many for who goes into them."""
    return ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth]


@pytest.mark.parametrize("depth", [100, 400, 700])
@pytest.mark.parametrize("name", READ)
def test_files_of_a_model_with_brackets_in_brackets(name: str, depth: int, model: Path) -> None:
    file = model / f"{name}.json"
    whole = file.read_text() if file.exists() else '{"x": 1}'
    for inner in brackets(depth):
        file.write_text(f'{whole.rstrip()[:-1]}, "more": {inner}}}')
        with pytest.raises(ModelError, match="nested more than 64 deep") as caught:
            load_tokenizer(ModelConfig(path=str(model)))
        assert caught.value.where == str(file)


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', '{"added_tokens": [7]}', '{"version": []}'])
def test_a_tokenizer_that_is_none(content: str, model: Path) -> None:
    """Of each the libraries raise something else."""
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="cannot load"):
        load_tokenizer(ModelConfig(path=str(model)))


def test_a_reward_model_is_looked_at_like_the_policy(model: Path) -> None:
    from posttrain.verifiers.reward_model import RewardModelVerifier, load_scorer

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_implementation": "evil/kernel:function"}))
    with pytest.raises(ModelError, match="names code of the Hub"):
        load_scorer(RewardModelVerifier.Config(type="reward_model", path=str(model)))


@pytest.mark.parametrize("depth", [100, 400, 700])
def test_recipes_and_rows_with_brackets_in_brackets(depth: int, tmp_path: Path) -> None:
    from posttrain.config.loading import load_recipe
    from posttrain.methods import CONFIGS

    recipe, rows = tmp_path / "recipe.yaml", tmp_path / "rows.jsonl"
    for inner in [*brackets(depth), "- " * depth + "x", "? " * depth + "x"]:
        recipe.write_text(f"seed: 1\nmodel:\n  {inner}\n")
        with pytest.raises(PosttrainError, match="nested too deeply"):
            load_recipe(recipe, [], CONFIGS)
    for inner in brackets(depth):
        rows.write_text(json.dumps({"prompt": "x", "reference": "1"})[:-1] + f', "more": {inner}}}\n')
        assert len(list(problems(FileSource(path=str(rows)), "data.prompts"))) == 1, "a column that nobody asks for"
        for column in ("prompt", "messages"):
            rows.write_text(f'{{"{column}": {inner}}}\n')
            with pytest.raises(DataError):
                list(problems(FileSource(path=str(rows)), "data.prompts"))


def test_a_card_of_anchors(tmp_path: Path) -> None:
    """What its names would be written out fills the memory; it is read as a recipe is."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "x"}\n')
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    lines += ["configs: [{config_name: *a29, data_files: train.jsonl}]"]
    (tmp_path / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    assert folder_files(tmp_path, "train", None, (".jsonl",)) == [tmp_path / "train.jsonl"]


def test_a_model_of_a_type_that_nobody_knows(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nothing_like_it"}))
    with pytest.raises(ModelError, match="nothing_like_it"):
        load_tokenizer(ModelConfig(path=str(model)))


def test_a_model_of_a_billion_layers(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(ModelError, match="which no model has"):
        config_json(ModelConfig(path=str(model)))


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/weights.safetensors", 7, None])
def test_a_list_of_weights_that_leads_out_of_the_folder(name: object, model: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside of the folder"):
        load_tokenizer(ModelConfig(path=str(model)))


def test_settings_that_need_a_package_which_is_not_here(model: Path) -> None:
    from posttrain.models.loading import load_policy

    config = json.loads((model / "config.json").read_text())
    quantised = {"quant_method": "torchao", "quant_type": {"default": {"_type": "os.system", "_data": {}}}}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(ModelError):
        load_policy(ModelConfig(path=str(model)), seed=0)


MODEL_LINKS = (
    *("README.md", "chat_template.jinja", "additional_chat_templates/x.jinja", "generation_config.json"),
    *("preprocessor_config.json", "vocab.txt", "additional_chat_templates"),
)


@pytest.mark.parametrize("name", MODEL_LINKS)
def test_a_model_with_a_link_to_a_file_of_yours_is_not_published(name: str, model: Path, tmp_path: Path) -> None:
    from posttrain.cli.export import export_command
    from posttrain.verifiers.reward_model import ScorerConfig, load_scorer

    secret = tmp_path / "secret"
    if name == "additional_chat_templates":
        secret.mkdir()
        (secret / "x.jinja").write_text("a key")
    else:
        secret.write_text('{"key": "a secret"}')
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    for use in (
        lambda: export_command(str(model), tmp_path / "out", None, False, "5GB"),
        lambda: load_tokenizer(ModelConfig(path=str(model))),
        lambda: resolved(ModelConfig(path=str(model))),
        lambda: load_scorer(ScorerConfig(type="reward_model", path=str(model))),
    ):
        with pytest.raises(ModelError, match="is not within the model's folder"):
            use()
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_a_link_to_a_file_of_yours(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (adapter / "adapter_model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="is not within the model's folder"):
        resolved(ModelConfig.model_validate({"path": str(model), "adapter": {"path": str(adapter)}}))


def test_a_model_in_the_hubs_cache_is_links_and_loaded(model: Path, tmp_path: Path) -> None:
    blobs, copy = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    copy.mkdir(parents=True)
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (copy / file.name).symlink_to(f"../../blobs/{file.name}")
    assert load_tokenizer(ModelConfig(path=str(copy))).eos_token_id is not None


@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja", "vocab.txt"])
def test_a_text_of_a_model_that_would_fill_disk_or_memory(name: str, model: Path, tmp_path: Path) -> None:
    from posttrain.cli.export import export_command

    with (model / name).open("wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(ModelError, match="larger than 256 MiB"):
        export_command(str(model), tmp_path / "out", None, False, "5GB")
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left"


def test_a_run_whose_model_is_a_link_is_not_exported(model: Path, tmp_path: Path) -> None:
    from posttrain.cli.export import export_command

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").write_text("model: {path: x}\n")
    (tmp_path / "run" / "model").symlink_to(model)
    with pytest.raises(DataError, match="is not within the folder"):
        export_command(str(tmp_path / "run"), tmp_path / "out", None, False, "5GB")


RUN_FILES = ("resolved.yaml", "environment.json", "data.json", "samples.jsonl", "metrics.jsonl", "evaluation")


@pytest.mark.parametrize("name", [*RUN_FILES, "evaluation/step-00000001.json", "held_out/step-00000001.json", "new"])
def test_a_run_with_a_link_to_a_file_of_yours(name: str, tmp_path: Path) -> None:
    from posttrain.api import load_run
    from posttrain.cli.compare import compare_command
    from posttrain.cli.report import report_command

    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss": 1.0}\n')
    (tmp_path / "secret").write_text('{"key": "a secret"}\n')
    place = run / name
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "secret")
    for use in (
        lambda: load_run(run),
        lambda: report_command([run], tmp_path / "out.html"),
        lambda: compare_command([str(run), str(other)], {}, None, None),
        lambda: compare_command([f"a={run}", f"b={other}"], {}, None, None),
    ):
        with pytest.raises(DataError, match="which is not within the folder") as caught:
            use()
        assert caught.value.where == str(place)
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("name", ["stage", "stage/report.json"])
def test_a_pipeline_with_a_link_to_a_file_of_yours(name: str, tmp_path: Path) -> None:
    from posttrain.cli.report import report_command

    (tmp_path / "secret").mkdir()
    for folder in (tmp_path / "secret", tmp_path / "out" / "stage"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.json").write_text('{"started": "2020"}')
    if name == "stage":
        (tmp_path / "out" / "stage").rename(tmp_path / "before")
    (tmp_path / "out" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="which is not within the folder"):
        report_command([tmp_path / "out"], tmp_path / "out.html")


def test_an_export_to_a_link(model: Path, tmp_path: Path) -> None:
    from posttrain.cli.export import export_command

    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "out").symlink_to(victim)
    with pytest.raises(ModelError, match="something already"):
        export_command(str(model), tmp_path / "out", None, False, "5GB")
    (tmp_path / "to_be").symlink_to(tmp_path / "nowhere")
    export_command(str(model), tmp_path / "to_be", None, False, "5GB")
    assert not list(victim.iterdir()) and not (tmp_path / "nowhere").exists()


def test_a_pickle_under_the_name_of_safe_weights(model: Path, tmp_path: Path) -> None:
    import pickle

    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "mark"),)

    (model / "model.safetensors").write_bytes(pickle.dumps(Boom()))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    from posttrain.models.loading import load_policy

    with pytest.raises(PosttrainError):
        load_policy(ModelConfig(path=str(model)), seed=0)
    assert not (tmp_path / "mark").exists()


def test_a_model_card_that_is_a_link(tmp_path: Path, load) -> None:
    from posttrain.trainers.model_card import write_card

    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").symlink_to(victim)
    write_card(folder, load({"name": "sft"}), run_dir=tmp_path, steps=1, spent="1 FLOP", classifier=False, kind="model")
    assert victim.read_text() == "precious" and not (folder / "README.md").is_symlink()
    assert "posttrain" in (folder / "README.md").read_text()


@pytest.mark.parametrize("content", [DEEP, "{", "[]", '{"schema": ' + "9" * 5000 + "}", "null"])
def test_reports_and_manifests_that_are_none(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        Report.from_json(content, where="report.json")
    traces = tmp_path / "traces.jsonl"
    traces.write_text("{}\n")
    manifest_path(traces).write_text(content)
    with pytest.raises(DataError):
        read_traces([traces])


def test_rows_nested_too_deeply(tmp_path: Path) -> None:
    for name, text in (("rows.jsonl", f'{{"prompt": {DEEP}\n'), ("rows.json", f'[{{"prompt": {DEEP}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="not JSON"):
            list(problems(FileSource(path=str(tmp_path / name)), "data.prompts"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": f'[{{"role": {DEEP}'}) + "\n")
    with pytest.raises(DataError):
        list(problems(FileSource(path=str(tmp_path / "rows.jsonl")), "data.prompts"))


def test_a_folder_of_data_that_leads_elsewhere(tmp_path: Path) -> None:
    """Names in a folder's card are patterns; none reaches out of the folder."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"prompt": "secret"}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "x"}\n')
    for pattern in ("../secret.jsonl", str(secret), "**/../../secret.jsonl"):
        card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": pattern}]}]}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        with pytest.raises(DataError, match="is not within it"):
            folder_files(folder, "train", None, (".jsonl",))
    (folder / "README.md").unlink()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.jsonl"}]}))
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="is not within it"):
        folder_files(folder, None, None, (".jsonl",))


@pytest.mark.parametrize("inner", ["", "data", "train"])
def test_a_folder_of_data_with_a_link_to_a_file_of_yours(inner: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"prompt": "secret"}\n')
    folder = tmp_path / "data"
    (folder / inner).mkdir(parents=True)
    (folder / inner / "train.jsonl").symlink_to(secret)
    with pytest.raises(DataError, match="which is not within the folder"):
        folder_files(folder, "train", None, (".jsonl",))
    blobs, copy = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    (copy / inner).mkdir(parents=True)
    (blobs / "a").write_text('{"prompt": "x"}\n')
    (copy / inner / "train.jsonl").symlink_to(blobs / "a")
    assert folder_files(copy, "train", None, (".jsonl",)) == [copy / inner / "train.jsonl"], "as the Hub's cache has it"


@pytest.mark.parametrize("value", ["9" * 400, '"x"', "[1]", "{}", '{"a": 1}', "9" * 5000])
def test_metrics_of_a_run_that_are_no_numbers(value: str, tmp_path: Path) -> None:
    from posttrain.cli.report import report_command

    for line in (f'{{"step": 1, "loss": {value}}}', f'{{"step": {value}}}', f'{{"step": 1, "time": {value}}}'):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(DataError):
            report_command([tmp_path], tmp_path / "report.html")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "one").mkdir()
    for text in ("[]", "{}", "{", "[" * 100_000):
        (tmp_path / "one" / "stage.json").write_text(text)
        with pytest.raises(DataError, match="record of a stage"):
            report_command([tmp_path], tmp_path / "report.html")


def test_a_recipe_of_anchors_does_not_grow(tmp_path: Path) -> None:
    from posttrain.config.loading import load_recipe
    from posttrain.methods import CONFIGS

    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\nmodel: *a29\n")
    with pytest.raises(PosttrainError):
        load_recipe(tmp_path / "recipe.yaml", [], CONFIGS)


@pytest.mark.parametrize(
    "text",
    ["model: &a {x: *a}", "a: &a [*a]", "seed: 0x" + "f" * 200_000, "seed: " + "9" * 6000, "? [a, b]\n: 1", "~: 2"]
    + ["a: " + "[" * 20_000, "".join(" " * depth + "a:\n" for depth in range(2_000))],
)
def test_a_recipe_that_is_more_than_it_looks(text: str, tmp_path: Path) -> None:
    """It contains itself, is nested without end, or has what no path or no number of Python's may have."""
    from posttrain.config.loading import load_recipe
    from posttrain.methods import CONFIGS

    (tmp_path / "recipe.yaml").write_text(text + "\n")
    with pytest.raises(PosttrainError) as raised:
        load_recipe(tmp_path / "recipe.yaml", [], CONFIGS)
    assert len(str(raised.value)) < 1_000


def test_a_text_that_no_path_may_be_is_refused_where_it_is_written() -> None:
    from posttrain.config.yaml_file import read_text

    with pytest.raises(PosttrainError, match="recipe.yaml:2: output: a text with a NUL character"):
        read_text('a: 1\noutput: "a\\0b"', "recipe.yaml")


@pytest.mark.parametrize(
    "override",
    ["data.prompts.size=1000000000000", "seed=4294967296", "seed=-1", "model.init.layers=1000000000"]
    + ["model.init.hidden_size=100000000000", "model.init.tokenizer.vocab_size=1000000000000"]
    + ["batch.prompts_per_step=10000000", "batch.micro_batch=10000000", "rollouts.samples_per_prompt=10000000"],
)
def test_numbers_of_a_recipe_that_would_fill_the_memory_or_end_in_a_library(override: str, tmp_path: Path) -> None:
    """`check` made problems without end, and a vocabulary for which Rust ended the process."""
    from posttrain.config.loading import load_recipe
    from posttrain.methods import CONFIGS

    (tmp_path / "recipe.yaml").write_text(
        "model: {init: {tokenizer: {type: bpe}}}\ndata: {prompts: {task: chain_sum, levels: [2], size: 8}}\n"
        "verifier: [{type: procedural}]\nrollouts: {samples_per_prompt: 4, max_new_tokens: 4}\nmethod: {name: grpo}\n"
        "batch: {prompts_per_step: 4, micro_batch: 4}\ntraining: {max_steps: 1}\noutput: run\n"
    )
    load_recipe(tmp_path / "recipe.yaml", [], CONFIGS)
    with pytest.raises(PosttrainError, match="must be at least .* and at most"):
        load_recipe(tmp_path / "recipe.yaml", [override], CONFIGS)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [mark]", "!!python/name:os.system", "!!timestamp x"])
def test_a_recipe_of_tags_makes_no_objects(tag: str, tmp_path: Path, monkeypatch) -> None:
    from posttrain.config.loading import load_recipe
    from posttrain.methods import CONFIGS

    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(f"model: {tag}\n")
    with pytest.raises(PosttrainError):
        load_recipe(Path("recipe.yaml"), [], CONFIGS)
    assert not Path("mark").exists()


def test_a_lock_file_full_of_brackets(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").write_text("[" * 4096)
    with locked(tmp_path / ".run.lock", say_on_stderr, what="a run"):
        pass


def test_a_link_planted_between_looking_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    beside = tmp_path / f".out.json.{os.getpid()}.tmp"
    monkeypatch.setattr(safe_files, "clear", lambda path: beside.symlink_to(victim))
    with pytest.raises((FileExistsError, StateError)):
        safe_files.write_text_atomic(tmp_path / "out.json", "{}")
    assert victim.read_text() == "precious"


def test_two_runs_that_make_the_secret_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.state import signature

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(signature.sign("seal"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and found[0] is not None
    assert [path.name for path in signature.secret_file().parent.iterdir()] == ["checkpoint.key"]


def test_modules_in_the_working_folder_are_not_imported(tmp_path: Path) -> None:
    """As a user has it who looks at a recipe in a folder that somebody sent."""
    for name in ("typer", "yaml", "torch", "json", "posttrain_plugin", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    command = [sys.executable, "-P", "-c", "import sys; sys.argv = ['posttrain', 'methods']; "]
    command[-1] += "from posttrain.cli.main import main; main()"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "a\x00b", "$(touch mark)", "a b"])
def test_names_of_stages_are_plain(name: str, tmp_path: Path) -> None:
    from posttrain.pipeline.runner import run_pipeline

    stage = {"name": name, "kind": "train", "model": {"init": {"hidden_size": 16}}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "stages": [stage]}))
    with pytest.raises(PosttrainError):
        run_pipeline(tmp_path / "pipeline.yaml", [], until=None, force=[])
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors"])
def test_weights_that_are_a_pipe_or_a_folder(name: str, tmp_path: Path) -> None:
    """An archive can hold a pipe, which was waited for without end; a folder was a traceback."""
    (tmp_path / "config.json").write_text("{}")
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / name)
        with pytest.raises(ModelError, match="no plain file") as raised:
            load_tokenizer(ModelConfig(path=str(tmp_path)))
        assert raised.value.where == str(tmp_path / name)
        (os.unlink if make is os.mkfifo else os.rmdir)(tmp_path / name)
