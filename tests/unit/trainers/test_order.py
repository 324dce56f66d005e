import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.trainers.order import StagedOrder, StepOrder, WeightedOrder, order_of


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 3))
def test_every_pass_uses_every_item_once(n_items, per_step, seed):
    order = StepOrder(n_items, per_step, seed)
    stream = [item for step in range(3 * n_items) for item in order.items(step)]
    for start in range(0, len(stream) - n_items + 1, n_items):
        assert sorted(stream[start : start + n_items]) == list(range(n_items))


def test_a_step_is_a_function_of_seed_and_number():
    forward, random_access = StepOrder(10, 4, 7), StepOrder(10, 4, 7)
    expected = [forward.items(step) for step in range(9)]
    assert [random_access.items(step) for step in (8, 0, 5, 2)] == [expected[i] for i in (8, 0, 5, 2)]
    assert StepOrder(10, 4, 8).items(0) != expected[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_step_without_overlap(world_size):
    order = StepOrder(11, 4, 0)
    for step in range(5):
        shares = [order.share(step, rank, world_size) for rank in range(world_size)]
        assert [item for share in shares for item in share] == order.items(step)
        assert len({len(share) for share in shares}) == 1


def test_one_stage_is_the_plain_order():
    plain, staged = StepOrder(10, 4, 7), StagedOrder([list(range(10))], 4, 9, 7)
    assert [staged.items(step) for step in range(9)] == [plain.items(step) for step in range(9)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 20))
def test_stages_follow_one_another_in_proportion_to_their_items(sizes, extra):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    stages = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    max_steps = len(sizes) + extra
    order = StagedOrder(stages, 2, max_steps, 0)
    seen = [order.stage(step) for step in range(max_steps)]
    assert seen == sorted(seen) and set(seen) == set(range(len(sizes)))
    for step in range(max_steps):
        assert set(order.items(step)) <= set(stages[seen[step]])
        halves = order.share(step, 0, 2) + order.share(step, 1, 2)
        assert halves == order.items(step)
    for number, size in enumerate(sizes):
        assert abs(seen.count(number) - max_steps * size / sum(sizes)) <= len(sizes)


def test_weighted_draws_follow_the_weights_and_the_seed():
    order = order_of([0.1, 0.0, 0.6, 0.3], 500, seed=3)
    assert isinstance(order, WeightedOrder) and isinstance(order_of([1.0, 1.0], 2, seed=3), StepOrder)
    drawn = [i for step in range(20) for i in order.items(step)]
    shares = [drawn.count(i) / len(drawn) for i in range(4)]
    assert shares[1] == 0 and shares == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=0.02)
    assert order.items(7) == order.items(7) != order.items(8)
    assert order.share(7, 0, 2) + order.share(7, 1, 2) == order.items(7)
    with pytest.raises(ValueError, match="weights"):
        WeightedOrder([], 1, 0)
