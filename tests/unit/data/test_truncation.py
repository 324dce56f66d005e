from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.sample import Origin, Problem, Sample
from posttrain.data.truncation import Ledger, fit_groups, fit_prompts, fit_samples
from posttrain.errors import DataError


def sample(prompt: int, completion: int, name: str = "d/0", **more) -> Sample:
    """Ids 100, 101, ... in the prompt and 200, 201, ... in the completion."""
    ids = [*range(100, 100 + prompt), *range(200, 200 + completion)]
    return Sample(ids, [0] * prompt + [1] * completion, Origin.EXPERT, name, **more)


CUTS = [
    # prompt, completion, limits, kept ids, finished; None is dropped
    (3, 2, (None, None), [100, 101, 102, 200, 201], True),
    (3, 2, (3, 5), [100, 101, 102, 200, 201], True),
    (3, 2, (2, None), [101, 102, 200, 201], True),  # the prompt on its left; the end token stays
    (3, 2, (None, 4), [100, 101, 102, 200], False),  # the completion on its right
    (3, 2, (2, 4), [101, 102, 200, 201], True),
    (3, 2, (1, 2), [102, 200], False),
    (3, 2, (None, 3), None, None),  # no room for the completion
    (3, 2, (2, 2), None, None),
    (0, 3, (1, 2), [200, 201], False),
]


@pytest.mark.parametrize(("prompt", "completion", "limits", "expected", "finished"), CUTS)
def test_cut(prompt, completion, limits, expected, finished):
    given, other = sample(prompt, completion), sample(0, 1, "d/1")
    fitted, ledger = fit_samples([given, other], *limits, "cut", 1.0)
    assert given.ids == sample(prompt, completion).ids
    assert fitted[-1] is other
    if expected is None:
        assert (len(fitted), ledger) == (1, Ledger(kept=1, dropped=1))
        return
    assert fitted[0].ids == expected and fitted[0].finished is finished
    assert fitted[0].loss_mask == [int(token >= 200) for token in expected]
    changed = expected != given.ids
    assert ledger == Ledger(kept=2 - changed, cut=int(changed), eos_lost=int(not finished))


def test_cut_keeps_log_probs_aligned_and_all_else():
    given = sample(3, 2, behaviour_logps=[0.0, 0.0, 0.0, -1.0, -2.0], finished=False, group=4, policy_version=2)
    fitted, ledger = fit_samples([given], 2, 3, "cut", 1.0)
    assert fitted[0].behaviour_logps == [0.0, 0.0, -1.0]
    assert (fitted[0].group, fitted[0].policy_version, fitted[0].origin) == (4, 2, Origin.EXPERT)
    # It had no end token to lose.
    assert ledger == Ledger(cut=1)


@pytest.mark.parametrize(
    ("head_ids", "expected"),
    [([100], [100, 103, 104]), ([7], [102, 103, 104]), ([], [102, 103, 104]), ([100, 101, 102], [102, 103, 104])],
)
def test_the_head_of_a_prompt_survives_a_cut(head_ids, expected):
    fitted, _ = fit_samples([sample(5, 1)], 3, None, "cut", head_ids=head_ids)
    assert fitted[0].ids == [*expected, 200]
    prompts, ledger = fit_prompts([(Problem("p", ""), list(range(100, 105)))], 3, "cut", head_ids=head_ids)
    assert prompts[0][1] == expected and ledger == Ledger(cut=1)


def test_turns_of_others_behind_the_last_trained_token_are_no_loss():
    several = Sample([1, 2, 3, 4, 5], [0, 1, 0, 1, 0], Origin.EXPERT)
    fitted, ledger = fit_samples([several], None, 4, "cut")
    assert (fitted[0].loss_mask, fitted[0].finished, ledger) == ([0, 1, 0, 1], True, Ledger(cut=1))
    fitted, ledger = fit_samples([several], None, 3, "cut", 1.0)
    assert (fitted[0].loss_mask, fitted[0].finished, ledger) == ([0, 1, 0], False, Ledger(cut=1, eos_lost=1))


def test_drop():
    rows = [sample(2, 2, f"d/{i}") for i in range(9)] + [sample(2, 9, "d/9")]
    fitted, ledger = fit_samples(rows, None, 4, "drop", 0.1)
    assert fitted == rows[:9] and ledger == Ledger(kept=9, dropped=1)
    assert ledger.lost_share == 0.1
    assert ledger.summary() == "10 rows: 9 kept, 0 cut (0 without their end token), 1 dropped"
    counts = {
        "kept": 9,
        "cut": 0,
        "dropped": 1,
        "eos_lost": 0,
        "identical": 0,
        "empty": 0,
        "bad": {},
        "unasked": {},
        "first": {},
        "said": {},
        "sources": {},
        "notes": [],
        "of_rows": None,
    }
    assert ledger.to_dict() == {**counts, "total": 10, "lost_share": 0.1}


def test_error_names_row_and_setting():
    with pytest.raises(DataError) as error:
        fit_samples([sample(2, 2), sample(2, 3, "d/1")], 9, 4, "error")
    assert error.value.where == "d/1" and "the row has 5 tokens, max_length is 4" in str(error.value)
    with pytest.raises(DataError) as error:
        fit_prompts([(Problem("p", "", where="file:3"), [1, 2, 3])], 2, "error")
    assert error.value.where == "file:3" and "the prompt has 3 tokens, max_prompt_length is 2" in str(error.value)


def test_too_many_lost():
    rows = [sample(2, 2), sample(2, 9), sample(8, 2)]
    with pytest.raises(DataError) as error:
        fit_samples(rows, 4, 7, "drop", 0.5)
    text = str(error.value)
    assert "66.7% of the rows would be lost, data.max_lost_share allows 50.0%" in text
    assert "1 kept, 0 cut (0 without their end token), 2 dropped" in text
    assert "raise data.max_prompt_length (now 4: 1 prompts are longer, the longest has 8 tokens)" in text
    assert "raise data.max_length (now 7: 2 rows are longer, the longest has 11 tokens)" in text
    with pytest.raises(DataError, match="data.max_length"):
        fit_samples([sample(2, 2), sample(2, 9)], None, 4, "cut", 0.1)
    with pytest.raises(DataError, match="no row is left"):
        fit_prompts([(Problem("p", ""), [1, 2, 3])], 2, "drop", 1.0)


def test_nothing_in_nothing_out():
    assert fit_samples([], 1, 2) == ([], Ledger())
    assert fit_prompts([], 1) == ([], Ledger())
    assert Ledger().lost_share == 0.0


def test_an_untrained_row_is_an_error():
    with pytest.raises(DataError, match="its completion is empty") as error:
        fit_samples([sample(3, 0, "d/7")], None, None)
    assert error.value.where == "d/7"


@given(
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=8),
    max_prompt_length=st.none() | st.integers(1, 10),
    max_length=st.none() | st.integers(2, 16),
    policy=st.sampled_from(["drop", "cut"]),
)
def test_every_row_is_accounted_for(lengths, max_prompt_length, max_length, policy):
    rows = [sample(prompt, completion, f"d/{i}") for i, (prompt, completion) in enumerate(lengths)]
    try:
        fitted, ledger = fit_samples(rows, max_prompt_length, max_length, policy, 1.0)
    except DataError as error:
        assert f"{len(rows)} dropped" in str(error)
        return
    assert ledger.kept + ledger.cut + ledger.dropped == ledger.total == len(rows)
    assert len(fitted) == ledger.kept + ledger.cut
    assert sum(row in rows for row in fitted) == ledger.kept
    assert sum(not row.finished for row in fitted) == ledger.eos_lost
    names = [row.problem_id for row in fitted]
    assert names == sorted(set(names))
    by_name = {row.problem_id: row for row in rows}
    for row in fitted:
        original, prompt = by_name[row.problem_id], row.loss_mask.index(1)
        assert max_prompt_length is None or prompt <= max_prompt_length
        assert max_length is None or len(row.ids) <= max_length
        start = original.loss_mask.index(1)
        assert row.ids[:prompt] == original.ids[start - prompt : start]
        assert row.ids[prompt:] == original.ids[start : start + len(row.ids) - prompt]
        assert row.finished == (row.ids[-1] == original.ids[-1])


def test_a_row_of_several_is_used_whole_or_not_at_all():
    other = replace(sample(6, 9, "d/2"), ids=[*range(100, 106), *range(300, 309)])
    rows = [
        {"chosen": sample(2, 2, "d/0"), "rejected": sample(2, 3, "d/0")},  # fits
        {"chosen": sample(2, 2, "d/1"), "rejected": sample(2, 4, "d/1")},  # one of them loses its end
        {"chosen": sample(6, 2, "d/2"), "rejected": other},  # the prompt too, alike in both
        {"chosen": sample(0, 1, "d/3"), "rejected": sample(9, 1, "d/3")},  # prompts of their own
    ]
    fitted, ledger = fit_groups(rows, 3, 5, "cut", 1.0, ledger=Ledger(dropped=2, identical=1, empty=1))
    assert [row["chosen"].problem_id for row in fitted] == ["d/0", "d/1", "d/2", "d/3"]
    assert fitted[0] == rows[0] and fitted[1]["chosen"] == rows[1]["chosen"]
    assert [sample.ids for sample in fitted[2].values()] == [[103, 104, 105, 200, 201], [103, 104, 105, 300, 301]]
    assert fitted[3]["rejected"].ids == [106, 107, 108, 200]
    assert ledger == Ledger(kept=1, cut=3, dropped=2, eos_lost=2, identical=1, empty=1)
    assert ledger.summary().endswith("2 dropped (1 identical, 1 empty)")

    same = {"chosen": sample(6, 2, "d/4"), "rejected": sample(6, 9, "d/4")}  # but for what is cut off
    _, ledger = fit_groups([*rows, same], 3, 5, "cut", 1.0)
    assert ledger == Ledger(kept=1, cut=3, dropped=1, eos_lost=2, identical=1)

    fitted, ledger = fit_groups(rows, 3, 5, "drop", 1.0)
    assert fitted == rows[:1] and ledger == Ledger(kept=1, dropped=3)
    with pytest.raises(DataError, match="d/1: the row has 6 tokens"):
        fit_groups(rows, 3, 5, "error", 1.0)
    with pytest.raises(DataError, match="look at the rows that are identical"):
        fit_groups(rows[:1], 3, 5, "drop", 0.5, ledger=Ledger(dropped=2, identical=2))
