"""What a pass computes, and when sharing pays."""

import pytest
import torch
from transformers import LlamaConfig

from posttrain.models.shared_prefix import Costs, Segment, plan

CPU = torch.device("cpu")
FREE_CALLS = Costs(token=100.0, pair=1.0, call=0.0, merge=0.0)


def rows(*pairs, width=None):
    """ids and mask of rows given as (prompt, completion) tokens."""
    width = width or max(len(p) + len(c) for p, c in pairs)
    ids, mask = torch.zeros(len(pairs), width, dtype=torch.long), torch.zeros(len(pairs), width)
    for row, (prompt, completion) in enumerate(pairs):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask[row, len(prompt) : len(prompt) + len(completion)] = 1
    return ids, mask


def test_a_shared_prompt_stands_once_and_the_last_token_is_no_input():
    ids, mask = rows(([7, 8, 9], [1, 2]), ([5, 6], [3, 4, 3]), ([7, 8, 9], [4, 5, 6]), width=9)
    made = plan(ids, mask, FREE_CALLS, layouts=True, device=CPU)
    assert ids.flatten()[made.source].tolist() == [[7, 8, 9, 5, 6, 3, 4, 1, 4, 5]]
    assert made.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 3, 3, 4]]
    # Row 0: 1 from the prompt's end, 2 from its own 1; row 2 likewise; row 1 along its own segment.
    assert list(zip(ids.flatten()[made.targets].tolist(), made.predictors.tolist(), strict=True)) == [
        (1, 2), (2, 7), (4, 2), (5, 8), (6, 9), (3, 4), (4, 5), (3, 6),
    ]  # fmt: skip
    first, second = made.layout.groups
    assert first.segment == Segment(0, 3) and first.rows == 2
    assert [(branch.segment, branch.before) for branch in first.branches] == [(Segment(7, 1), 3), (Segment(8, 2), 3)]
    assert second.segment == Segment(3, 4) and second.branches == ()


def test_what_turns_have_in_common_stands_once():
    """Three cuts of an episode of three turns, and one that begins like it: an action, an observation, and so on."""
    ids, mask = rows(
        ([7, 8], [1, 2]), ([7, 8, 1, 2, 5, 6], [3, 2]), ([7, 8, 1, 2, 5, 6, 3, 2, 5], [4]), ([7, 8], [1, 9, 3])
    )
    made = plan(ids, mask, FREE_CALLS, layouts=True, device=CPU)
    assert ids.flatten()[made.source].tolist() == [[7, 8, 1, 2, 5, 6, 3, 2, 5, 9]]
    assert made.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 3]]
    (group,) = made.layout.groups
    assert [(part.segment, part.rows, len(path)) for part, path in group.walk()] == [
        (Segment(0, 3), 4, 0),  # 7 8 1, where the first row ends
        (Segment(3, 0), 1, 1),
        (Segment(3, 4), 2, 1),  # 2 5 6 3, where the second row ends
        (Segment(7, 0), 1, 2),
        (Segment(7, 2), 1, 2),
        (Segment(9, 1), 1, 1),
    ]
    assert made.layout.longest == 9
    found = zip(ids.flatten()[made.targets].tolist(), made.predictors.tolist(), strict=True)
    assert list(found) == [(1, 1), (2, 2), (3, 5), (2, 6), (4, 8), (1, 1), (9, 2), (3, 9)]


def test_what_pays_for_some_rows_only_is_shared_by_these():
    costs = Costs(token=1.0, pair=0.0, call=10.0, merge=0.0)  # 31 tokens saved pay for the calls
    ids, mask = rows(([9] * 4 + [1] * 40, [2]), ([9] * 4 + [1] * 40, [3]), ([9] * 4 + [5] * 3, [4]))
    first, second = plan(ids, mask, costs, layouts=True, device=CPU).layout.groups
    assert (first.segment.length, first.rows) == (44, 2)
    assert (second.segment.length, second.rows) == (7, 1)


def test_rows_without_sharing_lose_their_padding_only():
    ids, mask = rows(([7], [1, 2, 3, 4, 5, 6, 7, 8]), ([5], [3]))
    made = plan(ids, mask, FREE_CALLS, layouts=True, device=CPU)
    assert made.source.shape == (1, 9) and not made.layout.crosses
    plain = plan(ids, mask, FREE_CALLS, layouts=False, device=CPU)
    assert plain.layout is None and plain.source.shape == (2, 8)
    for one in (made, plain):
        assert ids.flatten()[one.source].flatten()[one.predictors].tolist() == [7, 1, 2, 3, 4, 5, 6, 7, 5]


@pytest.mark.parametrize(
    ("prompt", "completions", "shared"),
    [(512, [128] * 8, True), (1, [128] * 8, False), (64, [64] * 2, True), (300, [100], False)],
)
def test_sharing_where_it_pays(prompt, completions, shared):
    costs = Costs.of(LlamaConfig(hidden_size=256), CPU)
    ids, mask = rows(*(([3] * prompt, [4 + row] * n) for row, n in enumerate(completions)))
    made = plan(ids, mask, costs, layouts=True, device=CPU)
    assert (made.layout is not None) == shared


def test_neighbouring_groups_of_equal_shape_share_their_attention_calls():
    completions = ([8, 9, 9], [9, 9, 9]) * 3
    ids, mask = rows(
        *(([prompt] * 4, written) for prompt, written in zip((1, 1, 2, 2, 3, 3), completions, strict=True)),
        (([6] * 5, [1, 2])),
        (([6] * 5, [3])),
    )
    layout = plan(ids, mask, FREE_CALLS, layouts=True, device=CPU).layout
    assert [(cross.n, cross.prefix.length, cross.branches.length) for cross in layout.crosses] == [(3, 4, 4), (1, 5, 1)]
    assert [(batch.n, batch.length) for batch in layout.branches] == [(6, 2), (1, 1)]
    assert layout.branches[0].tokens == slice(17, 29)


def test_ragged_segments_are_padded_where_that_is_cheaper_than_a_call():
    ids, mask = rows(*(([prompt] * 3, [9] * n) for prompt, n in enumerate((2, 5, 3))))
    costs = Costs(token=100.0, pair=1.0, call=17.0, merge=0.0)
    prefixes = plan(ids, mask, costs, layouts=True, device=CPU).layout.prefixes
    assert [(batch.n, batch.length) for batch in prefixes] == [(3, 7)]
    assert prefixes[0].padding.tolist() == [12, 13, 18, 19, 20]
    assert sorted(prefixes[0].targets.tolist()) == list(range(16))
    costs = Costs(token=100.0, pair=1.0, call=2.0, merge=0.0)
    assert len(plan(ids, mask, costs, layouts=True, device=CPU).layout.prefixes) == 3


def test_nothing_to_score():
    ids, mask = rows(([1, 2], [3]))
    made = plan(ids, mask * 0, FREE_CALLS, layouts=True, device=CPU)
    assert made.source.shape == (1, 1) and made.predictors.numel() == 0 and made.layout is None
