from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.order import MixtureOrder, StagedOrder, StepOrder, WeightedOrder, minibatches_of, order_of


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


SIZES = {"a": 7, "b": 40, "c": 3}


def sources(sizes: dict[str, int]) -> dict[str, list[int]]:
    starts = dict(zip(sizes, [0, 7, 47], strict=True))
    return {name: list(range(starts[name], starts[name] + size)) for name, size in sizes.items()}


def mixture(shares: tuple[float, float, float] = (0.5, 0.3, 0.2), per_step: int = 6, seed: int = 1, **limits: int):
    return MixtureOrder(sources(SIZES), [(0, dict(zip("abc", shares, strict=True)))], per_step, seed, limits)


@given(st.tuples(*[st.floats(0.01, 1)] * 3), st.integers(1, 9), st.integers(0, 3))
def test_a_mixture_draws_by_weight_in_every_step(raw, per_step, seed):
    shares = tuple(weight / sum(raw) for weight in raw)
    order = mixture(shares, per_step, seed)
    owner = {item: name for name, items in sources(SIZES).items() for item in items}
    seen: dict[str, list[int]] = {name: [] for name in SIZES}
    for step in range(12):
        items = order.items(step)
        assert len(items) == per_step and items == order.between(step * per_step, (step + 1) * per_step)
        for name, share in zip("abc", shares, strict=True):
            assert abs(sum(owner[item] == name for item in items) - share * per_step) < 1 + 1e-9
        for item in items:
            seen[owner[item]].append(item)
    for name, items in seen.items():  # shuffled passes over each source
        size = SIZES[name]
        for start in range(0, len(items) - size + 1, size):
            assert sorted(items[start : start + size]) == sources(SIZES)[name]
        assert order.drawn(12)[name] == len(items) and order.passes(12)[name] == len(items) / size


def test_a_mixture_is_a_function_of_seed_and_step():
    forward, random_access = mixture(), mixture()
    expected = [forward.items(step) for step in range(9)]
    assert [random_access.items(step) for step in (8, 0, 5, 2)] == [expected[i] for i in (8, 0, 5, 2)]
    assert mixture(seed=2).items(0) != expected[0]
    assert forward.share(3, 0, 2) + forward.share(3, 1, 2) == expected[3]
    assert forward.between(4, 15) == [item for items in expected for item in items][4:15]


def test_realised_shares_agree_with_the_weights():
    drawn = mixture(per_step=7).drawn(400)
    assert [drawn[name] / 2800 for name in "abc"] == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


def test_weights_change_at_steps():
    shares = [(0, (1.0, 0.0, 0.0)), (4, (0.5, 0.5, 0.0)), (9, (0.0, 0.25, 0.75))]
    stages = [(start, dict(zip("abc", each, strict=True))) for start, each in shares]
    order, again = (MixtureOrder(sources(SIZES), stages, 4, 1) for _ in range(2))
    owner = {item: name for name, items in sources(SIZES).items() for item in items}
    drawn = [Counter(owner[item] for item in order.items(step)) for step in range(12)]
    assert drawn == [{"a": 4}] * 4 + [{"a": 2, "b": 2}] * 5 + [{"b": 1, "c": 3}] * 3
    assert again.items(10) == order.items(10) and order.weights(8) == stages[1][1]


def test_a_source_ends_after_its_passes_and_the_others_keep_their_proportions():
    order = mixture(a=14, c=3)
    last = next(step for step in range(99) if "a" in order.ends(step))
    assert order.drawn(last)["a"] < 14 == order.drawn(last + 1)["a"] == order.drawn(200)["a"]
    assert order.drawn(200) == {"a": 14, "b": 1200 - 17, "c": 3}
    ends = {name: step for step in range(50) for name in order.ends(step)}
    assert set(ends) == {"a", "c"} and ends["a"] == last
    with pytest.raises(ValueError, match="all sources have ended before step"):
        mixture(a=7, b=5, c=3).drawn(4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_pass_puts_every_group_into_one_minibatch_and_each_rank_has_equally_many(world_size):
    groups, parts = list(range(24)), 3
    whole = minibatches_of(groups, parts, seed=0, window=5, epoch=0)
    for rank in range(world_size):
        share = groups[rank * 24 // world_size : (rank + 1) * 24 // world_size]
        mine = minibatches_of(share, parts, seed=0, window=5, epoch=0)
        assert mine == [whole[group] for group in share]
        assert [mine.count(part) for part in range(parts)] == [8 // world_size] * parts
    others = [minibatches_of(groups, parts, 0, 5, 1), minibatches_of(groups, parts, 0, 6, 0)]
    assert all(other != whole for other in [*others, minibatches_of(groups, parts, 1, 5, 0)])
