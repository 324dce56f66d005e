from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config.schema import Lora, ModelConfig, ModelInit, TokenizerInit
from posttrain.config.shapes import PUBLIC_SHAPES, ModelShape, model_shape

# Parameter counts as the model cards or the safetensors indexes of these repositories state them.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_counts(name: str, parameters: int) -> None:
    assert PUBLIC_SHAPES[name].parameters == parameters


def meta_model(shape: ModelShape):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        shape.architecture,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def counted(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-0.5B",
        "Qwen/Qwen2.5-7B",
        "Qwen/Qwen3-0.6B",
        "meta-llama/Llama-3.2-3B",
        "HuggingFaceTB/SmolLM2-360M",
    ],
)
def test_counts_are_those_of_transformers(name: str) -> None:
    assert counted(meta_model(PUBLIC_SHAPES[name])) == PUBLIC_SHAPES[name].parameters


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_random_models_as_they_are_built(architecture: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from posttrain.models.initial import build_model
    from posttrain.models.tokenizer import build_tokenizer

    init = ModelInit(
        architecture=architecture,
        hidden_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        intermediate_size=80,
        tie_embeddings=tied,
    )
    model = build_model(init, build_tokenizer(init.tokenizer, None), seed=0, dtype=torch.float32)
    assert counted(model) == model_shape(ModelConfig(init=init)).parameters


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size"),
    [
        (TokenizerInit(), 100),
        (TokenizerInit(alphabet="aab"), 6),
        (TokenizerInit(type="bpe", vocab_size=300), 300),
    ],
)
def test_vocabulary_of_random_models(tokenizer: TokenizerInit, vocab_size: int) -> None:
    assert model_shape(ModelConfig(init=ModelInit(tokenizer=tokenizer))).vocab_size == vocab_size


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B"])
def test_a_local_folder_is_read(tmp_path: Path, name: str) -> None:
    meta_model(PUBLIC_SHAPES[name]).config.save_pretrained(tmp_path)
    assert model_shape(ModelConfig(path=str(tmp_path))) == PUBLIC_SHAPES[name]


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"attention_bias": True}])
def test_unknown_shapes_stay_unknown(tmp_path: Path, change: dict) -> None:
    meta_model(PUBLIC_SHAPES["meta-llama/Llama-3.2-1B"]).config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert model_shape(ModelConfig(path=str(tmp_path))) is None
    assert model_shape(ModelConfig(path="someone/some-model")) is None


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["mlp.down_proj"]])
def test_lora_counts_are_those_of_peft(targets: list[str] | str) -> None:
    peft = pytest.importorskip("peft")
    shape = PUBLIC_SHAPES["Qwen/Qwen3-0.6B"]
    config = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(meta_model(shape), config)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert shape.lora_parameters(8, Lora(r=8, target_modules=targets).target_modules) == trained
