import torch

from posttrain.data.sample import Origin, Sample
from posttrain.trainers.collate import collate, split


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


def test_split_groups_rows_of_similar_length_and_loses_none():
    rows = [sample([1] * n, [0] * n) for n in (5, 2, 9, 2, 7, 1)]
    parts = split(rows, 2)
    assert parts == [[5, 1], [3, 0], [4, 2]]


def test_split_keeps_rows_of_one_prompt_together():
    def row(prompt, completion):
        return sample([prompt] * 3 + [9] * completion, [0] * 3 + [1] * completion)

    rows = [row(7, 1), row(8, 2), row(7, 9), row(8, 1), row(7, 2), row(8, 3)]
    assert split(rows, 3) == [[3, 1, 5], [0, 4, 2]]
