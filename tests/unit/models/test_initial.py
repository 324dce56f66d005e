import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from posttrain.config.schema import ModelConfig, ModelInit, TokenizerInit
from posttrain.errors import ModelError
from posttrain.models.initial import build_model
from posttrain.models.loading import load_policy
from posttrain.models.tokenizer import PRINTABLE, build_tokenizer, load_tokenizer

CHARACTERS = build_tokenizer(TokenizerInit(), None)


@given(st.text(alphabet=PRINTABLE, max_size=40))
def test_characters_round_trip(text):
    """All but the names of special tokens, which hypothesis finds among the constants of the code."""
    assume(not any(name in text for name in CHARACTERS.all_special_tokens))
    ids = CHARACTERS(text).input_ids
    assert len(ids) == len(text) and CHARACTERS.decode(ids) == text


def test_an_alphabet_of_ones_own():
    tokenizer = build_tokenizer(TokenizerInit(alphabet="01+=#;"), None)
    assert len(tokenizer) == 10
    assert tokenizer("1+x").input_ids[-1] == tokenizer.unk_token_id


@given(st.text(max_size=40))
def test_bpe_round_trips_any_text(text):
    tokenizer = bpe()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def bpe(cache=[]):  # noqa: B006 - learnt once
    if not cache:
        corpus = ["the cat sat on the mat", "3 + 8 = 11, so the answer is 11"] * 20
        cache.append(build_tokenizer(TokenizerInit(type="bpe", vocab_size=300), corpus))
    return cache[0]


def test_bpe_learns_from_the_corpus_and_needs_one():
    assert len(bpe()("the cat").input_ids) < len("the cat")
    with pytest.raises(ModelError, match="learnt from the recipe's data"):
        build_tokenizer(TokenizerInit(type="bpe"), None)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_weights_depend_on_the_seed_alone(architecture):
    config = ModelInit(architecture=architecture, hidden_size=16, layers=1, heads=2)
    models = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator must not matter
        models.append(build_model(config, CHARACTERS, seed=seed, dtype=torch.float32))
    same, differ = ([p for p in m.parameters()] for m in (models[1], models[2]))
    first = list(models[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, differ, strict=True))


def test_a_saved_policy_loads_again(tmp_path):
    init = ModelConfig(init=ModelInit(hidden_size=16, layers=1))
    model, tokenizer = load_policy(init, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_policy(ModelConfig(path=str(tmp_path)), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = "12 + 3 = 15 #"
    assert tokenizer_again.decode(tokenizer_again(text).input_ids) == text


def test_a_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match=r"no model folder") as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path / "modle")))
    assert str(tmp_path / "model") in caught.value.hint


def test_pickled_weights_are_not_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError, match="no safetensors weights"):
        load_policy(ModelConfig(path=str(tmp_path)), seed=0)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config.json"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_folder_without_a_tokenizer(tiny_model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(ModelError, match="holds a model and no tokenizer") as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert "copy tokenizer.json" in caught.value.hint
