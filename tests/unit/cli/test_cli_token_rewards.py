"""`inspect --token-rewards`: by hand and by the models' own forward passes; pieces of text, picture, errors."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.errors import DataError, ModelError, RecipeError
from posttrain.evaluation.token_rewards import text_pieces
from posttrain.objectives.preference import token_rewards
from posttrain.tracking.heat_strip import Strip, draw_strips
from posttrain.trainers.run import train


def call(*words) -> str:
    return CliRunner().invoke(app, ["inspect", *map(str, words)], catch_exceptions=False).output


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory, make_recipe_data):
    """A finished DPO run of a few steps; its pairs lie beside it."""
    from posttrain.config.loading import build_recipe
    from posttrain.config.locations import Locations
    from posttrain.methods import METHODS

    folder = tmp_path_factory.mktemp("dpo")
    data = make_recipe_data(tiny_model, folder, {"name": "dpo", "beta": 0.25})
    recipe = build_recipe(data, Locations("recipe"), {name: cls.Config for name, cls in METHODS.items()})
    return train(recipe).run_dir


def test_values_by_hand():
    logps, ref = torch.tensor([-0.5, -2.0, -0.2]).double(), torch.tensor([-0.7, -1.0, -0.25]).double()
    found = token_rewards(logps, ref, 0.1)
    assert found.tolist() == pytest.approx([0.02, -0.1, 0.005], abs=1e-7) and float(found.sum()) == pytest.approx(
        -0.075
    )
    with pytest.raises(ValueError, match="shape"):
        token_rewards(logps, ref[:2], 0.1)


def test_a_run_says_its_reference_and_beta_and_tokens_sum_to_the_implicit_reward(run, tiny_model, tmp_path):
    pairs = run.parent / "preferences.jsonl"
    out = call(
        pairs, "--token-rewards", run, "--limit", 6, "--output", tmp_path / "r.jsonl", "--plot", tmp_path / "r.png"
    )
    assert "beta 0.25" in out and "chosen" in out and "rejected" in out
    rows = read(tmp_path / "r.jsonl")
    assert [row["role"] for row in rows] == ["chosen", "rejected"] * 3
    written = [json.loads(line) for line in pairs.read_text().splitlines()][:3]
    both = [AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "model", tiny_model)]
    for number, row in enumerate(rows):
        pair = written[number // 2]
        assert row["prompt"] == pair["prompt"] and "".join(row["pieces"]) == pair[row["role"]] + "<eos>"
        vocabulary = "0123456789+=;#"
        prompt = [vocabulary.index(c) + 4 for c in pair["prompt"]]
        with torch.no_grad():
            ids = torch.tensor([prompt + row["ids"]])
            logps = [model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1] for model in both]
        own, ref = (values.gather(1, ids[0, len(prompt) :, None]).squeeze(1) for values in logps)
        torch.testing.assert_close(torch.tensor(row["rewards"]), 0.25 * (own - ref), atol=1e-5, rtol=1e-4)
        assert row["reward"] == pytest.approx(float(0.25 * (own - ref).sum()), abs=1e-4)
    assert any(abs(row["reward"]) > 1e-3 for row in rows), "the run has not moved"
    assert imread(tmp_path / "r.png").shape[2] == 4


def test_traces_keep_their_token_ids(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("problems.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    settings = {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": {"path": "problems.jsonl", "reference": "answer"}},
        "verifier": [{"type": "exact"}],
        "verifier_pool": {"workers": 0},
        "rollouts": {"samples_per_prompt": 3, "max_new_tokens": 5},
        "output": "t.jsonl",
    }
    Path("s.yaml").write_text(json.dumps(settings))
    CliRunner().invoke(app, ["sample", "s.yaml"], catch_exceptions=False)
    out = call(
        "t.jsonl", "--token-rewards", run / "model", "--reference", tiny_model, "--beta", 2, "--output", "r.jsonl"
    )
    assert "beta 2" in out
    traces = read(Path("t.jsonl"))
    for row, trace in zip(read(Path("r.jsonl")), traces, strict=True):
        assert (row["ids"], row["role"]) == (trace["ids"], trace["verdict"])
        assert row["ref_logps"] == pytest.approx(trace["logps"], abs=1e-4)


def test_pieces_of_bytes_join_to_the_text():
    """Characters of several tokens, among them one that is cut off by the end."""
    alphabet = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("a ⊕ b\n").input_ids
    pieces = text_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) > 6 and "".join(pieces) == "a ⊕ b\n"
    assert pieces[2:5] == ["", "", "⊕"]
    assert "".join(text_pieces(tokenizer, ids[:4])).startswith("a ")


def test_a_picture_wraps_long_texts_and_has_a_limit(tmp_path):
    strip = Strip("long", ["token$ "] * 40, [(-1.0) ** i * i for i in range(40)])
    small, large = (draw_strips([strip] * n, "x", tmp_path / f"{n}.png") for n in (1, 3))
    assert imread(large).shape[0] > 1.7 * imread(small).shape[0]
    with pytest.raises(DataError, match="--limit"):
        draw_strips([strip] * 60, "x", tmp_path / "too_long.png")
    with pytest.raises(DataError, match="no tokens"):
        draw_strips([], "x", tmp_path / "none.png")


def test_mistakes_say_what_to_do(run, tiny_model, tmp_path):
    pairs = run.parent / "preferences.jsonl"
    with pytest.raises(RecipeError, match="give --reference"):
        call(pairs, "--token-rewards", run / "model", "--beta", 1)
    with pytest.raises(RecipeError, match="give --beta"):
        call(pairs, "--token-rewards", run / "model", "--reference", tiny_model)
    with pytest.raises(RecipeError, match="--limit has no effect without --token-rewards"):
        call(pairs, "--limit", 3)
    other = tmp_path / "other"
    from posttrain.config.schema import ModelConfig
    from posttrain.models.loading import load_policy

    model, tokenizer = load_policy(ModelConfig(init={"hidden_size": 16, "layers": 1, "heads": 2}), seed=0)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="vocabulary is not that of the policy"):
        call(pairs, "--token-rewards", run / "model", "--reference", other, "--beta", 1)
