from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.collection import PairSettings
from posttrain.config.schema import FileSource
from posttrain.data.pairs import make_pairs
from posttrain.data.sources import preferences
from posttrain.data.traces import Trace


def traces(scores, problem="p", policy="base", texts=None, **keys) -> list[Trace]:
    """One trace per score; its text is its number."""
    return [
        Trace(
            problem, i, f"{problem}?", str(i) if texts is None else texts[i], policy, "m", reward=score, outcome=score
        )
        if not keys
        else Trace(problem, i, f"{problem}?", str(i), policy, "m", reward=score, outcome=score, **keys)
        for i, score in enumerate(scores)
    ]


def indices(scores, **settings):
    pairs, report = make_pairs({"p": traces(scores)}, PairSettings(**settings))
    return [(pair.chosen.sample, pair.rejected.sample) for pair in pairs], report


TABLE = [
    # scores, settings, pairs; no score stands twice, so that nothing is left to chance
    ([5, 4, 3, 2], {}, [(0, 3)]),
    ([2, 3, 4, 5], {}, [(3, 0)]),
    ([5, 4, 3, 2], {"strategy": "ranked"}, [(0, 3), (0, 2), (0, 1)]),
    ([5, 4, 3, 2], {"strategy": "margin"}, [(0, 3), (0, 2), (1, 3), (0, 1), (1, 2), (2, 3)]),
    ([5, 4, 3, 2], {"strategy": "margin", "margin": 2}, [(0, 3), (0, 2), (1, 3)]),
    ([5, 4, 3, 2], {"strategy": "ranked", "margin": 2}, [(0, 3), (0, 2)]),
    ([5, 4, 3, 2], {"strategy": "second_best"}, [(1, 3)]),
    ([5, 4], {"strategy": "second_best"}, []),
    ([5, 4], {"margin": 1}, [(0, 1)]),
    ([5, 4], {"margin": 1.5}, []),
    ([1, 1, 1], {"strategy": "margin"}, []),
    ([1], {}, []),
    ([None, 1, None, 0], {}, [(1, 3)]),
    ([None, None], {}, []),
]


@pytest.mark.parametrize(("scores", "settings", "expected"), TABLE)
def test_strategies(scores, settings, expected):
    assert indices(scores, **settings)[0] == expected


def test_gold_is_the_best():
    pairs, _ = make_pairs({"p": traces([1.0, 0.5, 0.0])}, PairSettings(strategy="second_best"))
    assert (pairs[0].gold.sample, pairs[0].gold_score, pairs[0].margin) == (0, 1.0, 0.5)
    pairs, _ = make_pairs({"p": traces([1, 1, 0])}, PairSettings(strategy="second_best"))
    assert {pairs[0].gold.sample, pairs[0].chosen.sample} == {0, 1} and pairs[0].rejected.sample == 2


REASONS = [
    ([1, 0], "best_worst", 0.0, "prompts_used"),
    ([1, 1], "best_worst", 0.0, "prompts_tied"),
    ([1, 0], "best_worst", 2.0, "prompts_narrow"),
    ([1, None], "best_worst", 0.0, "prompts_single"),
    ([1, 0, 0], "second_best", 0.0, "prompts_tied"),
    ([1, 0.5, 0], "second_best", 0.6, "prompts_narrow"),
    ([1, 0], "second_best", 0.0, "prompts_single"),
]


@pytest.mark.parametrize(("scores", "strategy", "margin", "reason"), REASONS)
def test_every_prompt_is_used_or_has_a_reason(scores, strategy, margin, reason):
    report = indices(scores, strategy=strategy, margin=margin)[1].to_dict()
    counts = {name: report[name] for name in ("prompts_used", "prompts_tied", "prompts_single", "prompts_narrow")}
    assert counts == dict.fromkeys(counts, 0) | {reason: 1}


def test_what_is_left_out_is_counted():
    rows = traces([1, 0, 1, 0, None, 1], texts=["a", "b", "a", " ", "c", "d"])
    rows += [Trace("p", 6, "p?", "long", "base", "m", reward=5.0, finished=False)]
    pairs, report = make_pairs({"p": rows}, PairSettings(strategy="margin"))
    assert {(pair.chosen.text, pair.rejected.text) for pair in pairs} == {("a", "b"), ("d", "b")}
    assert (report.traces, report.repeated, report.empty, report.unscored, report.unfinished) == (7, 1, 1, 1, 1)
    pairs, report = make_pairs({"p": rows}, PairSettings(unfinished=True))
    assert pairs[0].chosen.text == "long" and report.unfinished == 0


def test_reward_or_outcome():
    rows = [
        Trace("p", 0, "p?", "shaped", "base", "m", outcome=0.0, reward=2.0),
        Trace("p", 1, "p?", "right", "base", "m", outcome=1.0, reward=1.0),
    ]
    chosen = [make_pairs({"p": rows}, PairSettings(score=score))[0][0].chosen.text for score in ("reward", "outcome")]
    assert chosen == ["shaped", "right"]


def test_max_pairs_keeps_a_random_part_in_order():
    groups = {f"p{i}": traces([5, 4, 3, 2], problem=f"p{i}") for i in range(20)}
    pairs, report = make_pairs(groups, PairSettings(strategy="margin", max_pairs=2))
    assert report.pairs == len(pairs) == 40 and report.over_limit == 80
    by_problem = [[p for p in pairs if p.chosen.problem_id == name] for name in groups]
    assert all([p.rank for p in part] == [0, 1] and part[0].margin >= part[1].margin for part in by_problem)
    assert len({tuple((p.chosen.sample, p.rejected.sample) for p in part) for part in by_problem}) > 3


def test_ties_are_broken_by_seed_and_problem_alone():
    groups = {f"p{i}": traces([1] * 5 + [0] * 5, problem=f"p{i}") for i in range(30)}

    def chosen(part, seed=0):
        made = make_pairs({name: groups[name] for name in part}, PairSettings(seed=seed))[0]
        return {pair.chosen.problem_id: (pair.chosen.sample, pair.rejected.sample) for pair in made}

    whole = chosen(groups)
    assert len(set(whole.values())) > 5
    assert chosen(["p7"]) == {"p7": whole["p7"]}
    assert chosen(groups, seed=1) != whole


def test_report_of_lengths_margins_and_policies():
    rows = [
        Trace("p", 0, "p?", "abc", "teacher", "m", reward=1.0),
        Trace("p", 1, "p?", "ab", "base", "n", reward=0.0),
        Trace("q", 0, "q?", "a", "base", "n", reward=3.0),
        Trace("q", 1, "q?", "abcde", "base", "n", reward=0.0),
    ]
    groups = {"p": rows[:2], "q": rows[2:]}
    report = make_pairs(groups, PairSettings(), own=rows[1:3])[1]
    assert report.margin == {"mean": 2.0, "min": 1.0, "max": 3.0}
    assert (report.chosen_length, report.rejected_length, report.length_unit) == (2.0, 3.5, "characters")
    assert report.longer_chosen == 0.5
    assert report.by_policy == {"teacher": (0.5, 0.0), "base": (0.5, 1.0)}
    assert report.own == (0.5, 0.5)
    assert make_pairs(groups, PairSettings())[1].own is None
    assert make_pairs({"p": traces([1, 0], ids=[1, 2], logps=[0.0, 0.0])}, PairSettings())[1].length_unit == "tokens"


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), max_size=8),
    st.sampled_from(["best_worst", "margin", "ranked", "second_best"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 3),
)
def test_pairs_keep_their_promise(scores, strategy, margin, seed):
    pairs, report = make_pairs({"p": traces(scores)}, PairSettings(strategy=strategy, margin=margin, seed=seed))
    assert all(pair.margin >= margin and pair.margin > 0 for pair in pairs)
    assert len({(pair.chosen.text, pair.rejected.text) for pair in pairs}) == len(pairs) == report.pairs
    assert [pair.margin for pair in pairs] == sorted((pair.margin for pair in pairs), reverse=True)
    assert all(pair.gold_score >= pair.chosen_score for pair in pairs if strategy == "second_best")
    if strategy == "margin":
        known = [score for score in scores if score is not None]
        apart = sum(a - b >= margin and a > b for a in known for b in known)
        assert len(pairs) == apart


@pytest.mark.parametrize("messages", [False, True])
def test_rows_are_read_back(tmp_path, messages):
    prompt = ({"role": "user", "content": "1+1?"},) if messages else "1+1?"
    rows = [Trace("p", i, prompt, f" {i}\n", "base", "m", reference="2", reward=2.0 - i) for i in range(3)]
    pairs, _ = make_pairs({"p": rows}, PairSettings(strategy="second_best"))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair.to_row()) + "\n" for pair in pairs))
    read = preferences(FileSource(path=str(path), reference="reference", others={"gold": "gold"}), "preferences")[0]
    assert (read.problem.prompt, read.problem.reference) == (prompt, "2")
    texts = [
        part if isinstance(part, str) else part[0]["content"]
        for part in (read.chosen, read.rejected, read.others["gold"])
    ]
    assert texts == [" 1\n", " 2\n", " 0\n"]
    assert read.scores == {"chosen": 1.0, "rejected": 0.0, "gold": 2.0}
    assert read.problem.meta["problem_id"] == "p" and read.problem.meta["rank"] == 0
    assert preferences(FileSource(path=str(path)), "preferences")[0].chosen == read.chosen
