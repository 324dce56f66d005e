"""What loading promises about the weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError
from posttrain.models.loading import ALIGNMENT, load_classifier, load_policy


def test_the_same_weights_give_the_same_bits_wherever_they_lie_in_the_file(tiny_model, tmp_path):
    """A longer header moves the weights by a few bytes, and MKL's small products depend on that."""
    ids = torch.tensor([[5]])  # a product with one row is one of those
    found = []
    for length in range(0, 64, 8):
        folder = tmp_path / str(length)
        folder.mkdir()
        for file in tiny_model.iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        metadata = {"format": "pt", "note": "x" * length}
        save_file(load_file(tiny_model / "model.safetensors"), folder / "model.safetensors", metadata)
        for load in (load_policy, load_classifier):
            model, _ = load(ModelConfig(path=str(folder)), seed=0)
            assert all(p.data_ptr() % ALIGNMENT == 0 for p in model.parameters()), length
        model, _ = load_policy(ModelConfig(path=str(folder)), seed=0)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # still tied
        with torch.no_grad():
            found.append(model(ids).logits)
    assert all(torch.equal(logits, found[0]) for logits in found)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_start_without_some_weights_is_refused(tiny_model, tmp_path, lost):
    """transformers would draw them at random, with a table in the log."""
    shutil.copytree(tiny_model, tmp_path / "start")
    file = tmp_path / "start" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 weights of a LlamaForCausalLM: {lost}"):
        load_policy(ModelConfig(path=str(tmp_path / "start")), seed=0)


def test_weights_that_cannot_be_converted_are_named(tiny_model, small_causal, tmp_path, capfd, monkeypatch):
    """Experts are one tensor in memory and one by one in files; transformers' own error points to the log."""
    folder = tmp_path / "start"
    model = small_causal.build("mixtral", vocab_size=len(AutoTokenizer.from_pretrained(tiny_model)))
    model.save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    found = load_file(folder / "model.safetensors")
    wrong = next(name for name in found if ".0." in name and name.endswith("experts.1.w1.weight"))
    found[wrong] = found[wrong][:-1].clone()
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    for load in (load_policy, load_classifier):
        with pytest.raises(ModelError, match=r"layers\.0\..*gate_up_proj cannot be made of the weights in its files: "):
            load(ModelConfig(path=str(folder)), seed=0)
    assert "Traceback" not in capfd.readouterr().err

    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "stack", no_memory)
    with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):  # which ends a run with an estimate of its memory
        load_policy(ModelConfig(path=str(folder)), seed=0)
