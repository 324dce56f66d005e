import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.sample import Origin, Sample
from posttrain.models.collate import collate, regrouped, split


def sample(ids, mask, logps=None):
    return Sample(ids=ids, loss_mask=mask, origin=Origin.POLICY, behaviour_logps=logps)


def test_masks_come_from_positions_even_when_padding_is_a_trained_token():
    pad = 2  # also the end token
    tensors = collate([sample([5, 6, 2], [0, 1, 1]), sample([5, 2], [0, 1])], pad)
    assert tensors["ids"].tolist() == [[5, 6, 2], [5, 2, 2]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert tensors["mask"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert "behaviour_logps" not in tensors


def test_the_first_token_is_never_trained_on():
    assert collate([sample([5, 6], [1, 1])], 0)["mask"].tolist() == [[0, 1]]


def test_behaviour_log_probs_are_aligned_to_tokens():
    tensors = collate([sample([5, 6, 7], [0, 1, 1], [0.0, -1.0, -2.0]), sample([5, 6], [0, 1], [0.0, -3.0])], 0)
    assert torch.equal(tensors["behaviour_logps"], torch.tensor([[0.0, -1, -2], [0, -3, 0]]))


def row(prompt, completion, *, length=3, trained=True):
    """`prompt` is the token that a prompt is made of."""
    return sample([prompt] * length + [9] * completion, [0] * length + [int(trained)] * completion)


def sizes(rows, parts):
    """What a packed pass computes of each micro-batch: prompts once, rows without their last token."""
    found = []
    for part in parts:
        trained = [rows[i] for i in part if 1 in rows[i].loss_mask]
        prompts = {tuple(s.ids[: s.loss_mask.index(1)]) for s in trained}
        found.append(sum(map(len, prompts)) + sum(sum(s.loss_mask) - 1 for s in trained))
    return found


def torn(rows, parts):
    """How often a prompt is computed again."""
    places = [{rows[i].ids[0] for i in part} for part in parts]
    return sum(map(len, places)) - len(set().union(*places))


def test_rows_that_are_padded_are_grouped_by_length_and_none_is_lost():
    rows = [row(n, n, length=1) for n in (5, 2, 9, 3, 7, 1)]
    assert split(rows, 2, packs=False) == [[4, 2], [3, 0], [5, 1]]


@pytest.mark.parametrize("packs", [False, True])
def test_rows_of_one_prompt_stay_together(packs):
    rows = [row(7, 1), row(8, 2), row(7, 9), row(8, 1), row(7, 2), row(8, 3)]
    assert split(rows, 3, packs=packs) == [[0, 4, 2], [3, 1, 5]]


def test_packed_rows_are_balanced_by_the_tokens_that_are_computed():
    """Groups of 4 with prompts of 10 and completions of a length per group: by length the long ones met."""
    lengths = [1, 50, 2, 60, 3, 70, 4, 80]
    rows = [row(prompt, n, length=10) for prompt, n in enumerate(lengths) for _ in range(4)]
    before, after = split(rows, 8, packs=False), split(rows, 8, packs=True)
    assert [len(part) for part in after] == [8] * 4 and sorted(sum(after, [])) == list(range(32))
    assert torn(rows, after) == 0
    assert sizes(rows, before)[0] == 2 * 10 + 4 * (79 + 69) and max(sizes(rows, after)) == 2 * 10 + 4 * (79 + 0)
    assert sum(sizes(rows, after)) == sum(sizes(rows, before))
    assert sizes(rows, after) == sorted(sizes(rows, after), reverse=True)


def test_ragged_completions_within_groups_that_do_not_fit_are_dealt_out():
    """A group of 8 in micro-batches of 4: cut once, and not into its short and its long half."""
    rows = [row(1, n) for n in (10, 20, 30, 40, 50, 60, 70, 80)]
    parts = split(rows, 4, packs=True)
    assert torn(rows, parts) == 1 and sizes(rows, parts) == [3 + 176, 3 + 176]
    assert max(sizes(rows, split(rows, 4, packs=False))) == 3 + 256


def test_groups_are_cut_only_where_they_cannot_fit():
    rows = [row(prompt, 5) for prompt, n in enumerate((5, 3, 4, 4, 2, 6)) for _ in range(n)]
    assert torn(rows, split(rows, 8, packs=True)) == 0
    rows = [row(prompt, 5) for prompt in range(3) for _ in range(8)]  # 24 rows in twos of 12: one of three must be cut
    assert torn(rows, split(rows, 12, packs=True)) == 1


def test_rows_without_trained_tokens_cost_nothing_and_fill_up():
    rows = [row(prompt, 40, trained=prompt > 1) for prompt in range(4) for _ in range(4)]
    parts = split(rows, 8, packs=True)
    assert sizes(rows, parts) == [3 + 4 * 39] * 2 and [len(part) for part in parts] == [8, 8]
    assert [len(part) for part in split(rows[:4], 2, packs=True)] == [2, 2]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.booleans(),
)
def test_any_rows_are_split_completely_deterministically_and_never_worse(groups, micro_batch, packs):
    rows = [row(prompt, n, length=3 + prompt) for prompt, n in groups]
    parts = split(rows, micro_batch, packs=packs)
    assert parts == split(rows, micro_batch, packs=packs)
    assert sorted(sum(parts, [])) == list(range(len(rows)))
    assert (
        len(parts) == -(-len(rows) // micro_batch) and 1 <= min(map(len, parts)) <= max(map(len, parts)) <= micro_batch
    )
    plain = sizes(rows, split(rows, micro_batch, packs=False))
    if packs:
        assert (sum(sizes(rows, parts)), max(sizes(rows, parts))) <= (sum(plain), max(plain))


def test_rows_of_several_micro_batches_are_put_together_anew_without_their_padding():
    samples = [Sample([1, *range(2, 2 + n)], [0] + [1] * n, Origin.POLICY) for n in (1, 4, 2, 3)]
    batches = []
    for number, rows in enumerate((samples[:2], samples[2:])):
        tensors = collate(rows, pad_id=9)
        tensors["advantages"] = torch.tensor([10.0 * number, 10.0 * number + 1])
        tensors["returns"] = tensors["ids"] * tensors["mask"] / 2
        batches.append(tensors)
    made = regrouped(batches, [3, 0, 2], micro_batch=2, pad_id=9, packs=False)
    assert [numbers for _, numbers in made] == [[0, 2], [3]]
    first = made[0][0]
    assert first["ids"].tolist() == [[1, 2, 9], [1, 2, 3]] and first["advantages"].tolist() == [0.0, 10.0]
    assert first["returns"].tolist() == [[0, 1, 0], [0, 1, 1.5]] and first["mask"].dtype == torch.bool
    whole = collate([samples[0], samples[2]], pad_id=9)
    assert all(torch.equal(first[name], value) for name, value in whole.items())
    assert made[1][0]["ids"].tolist() == [[1, 2, 3, 4]]
