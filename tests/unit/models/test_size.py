"""Parameters that compute is counted by, against a count by hand."""

import pytest

from posttrain.models.size import non_embedding_parameters
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
    ledger = ComputeLedger(non_embedding_parameters(model))
    ledger.trained(10)
    assert ledger.step()["flops"] == 60 * non_embedding_parameters(model)
