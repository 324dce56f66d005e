"""Rows of several responses in micro-batches: balanced by what is computed, with the gradient of the whole step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.data.sample import Origin, Sample
from posttrain.methods import METHODS
from posttrain.models.collate import collate, split, split_pairs
from posttrain.models.token_logps import prepare, token_logps
from posttrain.objectives.batch import PreferenceBatch, TokenBatch


def response(prompt, length, *, token=9):
    return Sample([*prompt, *[token] * length], [0] * len(prompt) + [1] * length, Origin.EXPERT)


def pair(prompt, chosen, rejected, *, shared=10):
    """`prompt` is the token that the prompt is made of."""
    return [response([prompt] * shared, chosen, token=8), response([prompt] * shared, rejected, token=9)]


def computed(pairs, part):
    """Tokens of a packed pass: each prompt once, responses without their last token."""
    prompts = {tuple(pairs[i][0].ids[: pairs[i][0].loss_mask.index(1)]) for i in part}
    return sum(map(len, prompts)) + sum(sum(each.loss_mask) - 1 for i in part for each in pairs[i])


def test_long_pairs_are_dealt_out_instead_of_meeting():
    pairs = [pair(n, length, length) for n, length in enumerate([100, 1, 90, 1, 2, 80, 2, 70])]
    by_length = split_pairs(pairs, 4, packs=False)
    balanced = split_pairs(pairs, 4, packs=True)
    assert by_length == [[7, 5, 2, 0], [1, 3, 4, 6]]
    assert [computed(pairs, part) for part in by_length] == [40 + 2 * (69 + 79 + 89 + 99), 40 + 2 * 2]
    assert [sorted(part) for part in balanced] == [[0, 1, 4, 7], [2, 3, 5, 6]]
    assert [computed(pairs, part) for part in balanced] == [40 + 2 * (99 + 69 + 1), 40 + 2 * (89 + 79 + 1)]


def test_both_responses_count_and_not_the_longer_one_alone():
    pairs = [pair(0, 60, 1), pair(1, 50, 50), pair(2, 55, 1), pair(3, 50, 1)]
    parts = split_pairs(pairs, 2, packs=True)
    assert sorted(map(sorted, parts)) == [[0, 2], [1, 3]]


def test_pairs_of_one_prompt_compute_it_once():
    pairs = [pair(7, 5, 5), pair(8, 6, 6), pair(7, 9, 9), pair(8, 1, 1)]
    assert sorted(map(sorted, split_pairs(pairs, 2, packs=True))) == [[0, 2], [1, 3]]


def test_prompts_within_a_row_that_differ_are_all_computed():
    """The responses of row 0 follow prompts of their own, so it costs nearly as much as the other three."""
    own_prompts = [response([n] * 40, 2) for n in (1, 2, 6)]
    pairs = [own_prompts, *([response([n] * 40, 2) for _ in range(3)] for n in (3, 4, 5))]
    assert sorted(map(sorted, split_pairs(pairs, 3, packs=True))) == [[0], [1, 2, 3]]


def test_rows_of_one_response_are_split_as_samples_are():
    samples = [response([n % 3] * 5, 3 + 7 * n % 11) for n in range(9)]
    for packs in (False, True):
        assert split_pairs([[sample] for sample in samples], 4, packs=packs) == split(samples, 4, packs=packs)


lengths = st.integers(min_value=1, max_value=30)


@given(st.lists(st.tuples(st.integers(0, 4), lengths, lengths), min_size=1, max_size=14), st.integers(1, 5))
def test_every_row_once_and_never_worse_than_by_length(rows, micro_batch):
    pairs = [pair(*row) for row in rows]
    parts, before = (split_pairs(pairs, micro_batch, packs=packs) for packs in (True, False))
    assert sorted(sum(parts, [])) == list(range(len(pairs)))
    assert len(parts) == -(-len(pairs) // micro_batch) and all(1 <= len(part) <= micro_batch for part in parts)
    cost, old = ([computed(pairs, part) for part in way] for way in (parts, before))
    assert (sum(cost), max(cost)) <= (sum(old), max(old))


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_the_gradient_is_that_of_all_rows_at_once(name):
    torch.manual_seed(0)
    shape = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_key_value_heads=2)).double()
    prepare(model)
    method = METHODS[name](METHODS[name].Config())
    pairs = [pair(n % 4, 1 + 13 * n % 17, 1 + 7 * n % 15) for n in range(9)]

    def gradient(parts):
        model.zero_grad()
        batches = [collate([pairs[i][role] for role in (0, 1) for i in part], 0) for part in parts]
        counts = {}
        for tensors in batches:
            for term, n in method.counts(compared(tensors)).items():
                counts[term] = counts.get(term, 0) + n
        for tensors in batches:
            logps = token_logps(model, tensors["ids"], tensors["attention_mask"], tensors["mask"]).logps
            sums = method.loss(compared(tensors, logps))
            sum(part.value / counts[term] for term, part in sums.items()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def compared(tensors, logps=None):
        half = len(tensors["ids"]) // 2
        parts = {"chosen": slice(0, half), "rejected": slice(half, None)}
        return PreferenceBatch(
            {
                role: TokenBatch(
                    tensors["mask"][part],
                    logps=None if logps is None else logps[part],
                    entropies=None if logps is None else torch.zeros_like(logps[part]),
                    ref_logps=-2 * tensors["mask"][part].double(),
                )
                for role, part in parts.items()
            }
        )

    whole = gradient([list(range(9))])
    assert whole.norm() > 1e-3
    parts = split_pairs(pairs, 3, packs=True)
    assert parts != split_pairs(pairs, 3, packs=False)
    torch.testing.assert_close(gradient(parts), whole, rtol=1e-10, atol=1e-13)
