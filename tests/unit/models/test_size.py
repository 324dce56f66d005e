"""Parameters that compute is counted by, against a count by hand."""

from types import SimpleNamespace

import pytest
import torch

from posttrain.models.size import non_embedding_parameters, size_of
from posttrain.tracking.ledger import ComputeLedger

HIDDEN, VOCABULARY, LAYERS = 32, 48, 2


def test_a_dense_model_counts_all_but_the_table_that_is_looked_up(small_causal):
    model = small_causal.build("llama", tie_word_embeddings=False)
    # q and o are 32 x 32, k and v 32 x 16; three matrices of the MLP are 32 x 48; two norms a layer, one at the end.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * HIDDEN
    assert non_embedding_parameters(model) == LAYERS * layer + HIDDEN + VOCABULARY * HIDDEN


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_of_experts_those_that_a_token_goes_through_count(small_causal, model_type):
    model = small_causal.build(model_type, tie_word_embeddings=False, num_experts_per_tok=1)
    inner = model.config.get_text_config()
    width = getattr(inner, "moe_intermediate_size", None) or inner.intermediate_size
    expert = 3 * HIDDEN * width
    experts, everything = 4, sum(parameter.numel() for parameter in model.parameters())
    assert non_embedding_parameters(model) == everything - VOCABULARY * HIDDEN - LAYERS * (experts - 1) * expert
    size = size_of(model)
    assert size.trained == size.parameters
    ledger = ComputeLedger({"policy": size})
    ledger.trained(10)
    assert ledger.step()["flops"] == 60 * non_embedding_parameters(model)


def test_a_packed_weight_counts_what_it_stands_for(small_causal):
    model = small_causal.build("llama", tie_word_embeddings=False)
    before = size_of(model)
    layer = model.model.layers[0].mlp.up_proj
    shape = layer.weight.shape
    # As bitsandbytes leaves a weight of four bits: two in a byte, and the shape beside it.
    layer.weight = torch.nn.Parameter(torch.zeros(shape.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(shape=shape)
    assert size_of(model).parameters == before.parameters
    assert size_of(model).trained == before.trained - shape.numel()
