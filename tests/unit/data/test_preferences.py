from __future__ import annotations

import csv
import json
from collections import Counter

import pytest

from posttrain.config.schema import FileSource, GymSource, TaskSource
from posttrain.data.files import read_rows
from posttrain.data.preferences import Unusable, usable
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example
from posttrain.data.sources import preferences
from posttrain.errors import DataError, RecipeError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path):
    """`read(rows, **keys)` writes the rows and reads them as pairs."""

    def make(*rows: dict, **keys):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return preferences(FileSource(path=str(path), **keys), "preferences")

    return make


Q, A, B = user("1+1?"), said("2"), said("3")
S, T = ({"role": "system", "content": text} for text in "ST")
HH = "\n\nHuman: 1+1?\n\nAssistant:"
FORMS = [
    # row, keys, prompt, chosen, rejected
    ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, {}, "1+1?", "2", "3"),
    ({"q": "1+1?", "good": "2", "bad": "3"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}, "1+1?", "2", "3"),
    ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, {"template": "Q: {prompt}"}, "Q: 1+1?", "2", "3"),
    ({"prompt": [Q], "chosen": [A], "rejected": [B]}, {}, (Q,), (A,), (B,)),
    ({"prompt": [Q], "chosen": "2", "rejected": "3"}, {}, (Q,), "2", "3"),
    ({"prompt": "1+1?", "chosen": [A], "rejected": [B]}, {}, "1+1?", (A,), (B,)),
    # whole conversations, beside a copy of their first turn or not
    ({"prompt": "1+1?", "chosen": [Q, A], "rejected": [Q, B]}, {}, (Q,), (A,), (B,)),
    ({"chosen": [Q, A], "rejected": [Q, B]}, {}, (Q,), (A,), (B,)),
    ({"chosen": [Q, A], "rejected": [Q, B]}, {"system": "S"}, ({"role": "system", "content": "S"}, Q), (A,), (B,)),
    # a column with the system message, as in the pairs of Orca
    ({"system": "S", "q": "1+1?", "chosen": "2", "rejected": "3"}, {"prompt": "q"}, (S, Q), "2", "3"),
    ({"system": "S", "chosen": [Q, A], "rejected": [Q, B]}, {}, (S, Q), (A,), (B,)),
    ({"system": "S", "prompt": [S, Q], "chosen": [A], "rejected": [B]}, {}, (S, Q), (A,), (B,)),
    ({"system": " ", "prompt": "1+1?", "chosen": "2", "rejected": "3"}, {}, "1+1?", "2", "3"),
    ({"system": "S", "prompt": "1+1?", "chosen": "2", "rejected": "3"}, {"chat": False}, "1+1?", "2", "3"),
    ({"system": "S", "prompt": "1+1?", "chosen": "2", "rejected": "3"}, {"system": "T"}, (T, Q), "2", "3"),
    ({"chosen": "1+1 is 2", "rejected": "1+1 is 3"}, {}, "1+1 is", " 2", " 3"),
    # text that repeats the prompt
    ({"prompt": "Q: 1+1\nA:", "chosen": "Q: 1+1\nA: 2", "rejected": "Q: 1+1\nA: 3"}, {}, "Q: 1+1\nA:", " 2", " 3"),
    (
        {"prompt": "1 + 1?", "chosen": "1 + 1? 2", "rejected": "1 + 1? 3"},
        {"template": "Q: {prompt}", "chat": True},
        "Q: 1 + 1?",
        " 2",
        " 3",
    ),
    ({"prompt": "1+1", "chosen": "1+1 is 2", "rejected": "3"}, {}, "1+1", "1+1 is 2", "3"),  # one of them only
    # dialogues, also beside a prompt column or begun in it
    ({"prompt": "1+1?", "chosen": f"{HH} 2", "rejected": f"{HH} 3"}, {}, (Q,), (A,), (B,)),
    ({"prompt": HH, "chosen": f"{HH} 2", "rejected": f"{HH} 3"}, {}, (Q,), (A,), (B,)),
    ({"prompt": HH, "chosen": " 2", "rejected": " 3"}, {}, (Q,), "2", "3"),
    ({"prompt": HH, "chosen": " 2", "rejected": " 3"}, {"chat": False}, HH, " 2", " 3"),
    ({"chosen": f"{HH} 2", "rejected": f"{HH} 3"}, {}, (Q,), (A,), (B,)),
    ({"chosen": f"{HH} 2", "rejected": f"{HH} 3"}, {"chat": False}, HH, " 2", " 3"),
    (
        {"chosen": f"{HH} 2\n\nHuman: sure?\n\nAssistant: yes", "rejected": f"{HH} 2\n\nHuman: sure?\n\nAssistant: no"},
        {},
        (Q, A, user("sure?")),
        (said("yes"),),
        (said("no"),),
    ),
    # they part at a turn of the human: the assistant's turn before it belongs to both
    (
        {"chosen": f"{HH} 2\n\nHuman: sure?\n\nAssistant: yes", "rejected": f"{HH} 2\n\nHuman: no\n\nAssistant: no"},
        {},
        (Q,),
        (A, user("sure?"), said("yes")),
        (A, user("no"), said("no")),
    ),
    (
        {"chosen": [Q, A, user("sure?"), said("yes")], "rejected": [Q, A, user("no"), said("no")]},
        {},
        (Q,),
        (A, user("sure?"), said("yes")),
        (A, user("no"), said("no")),
    ),
    # a conversation, and single messages that follow it
    (
        {
            "conversations": [{"from": "human", "value": "1+1?"}],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "3"},
        },
        {},
        (Q,),
        (A,),
        (B,),
    ),
    ({"messages": [S, Q], "chosen": A, "rejected": [B]}, {}, (S, Q), (A,), (B,)),
    ({"messages": [Q], "chosen": [Q, A], "rejected": [Q, B]}, {"prompt": "messages"}, (Q,), (A,), (B,)),
    # one goes on where the other ends
    (
        {"chosen": f"{HH} 2", "rejected": f"{HH} 2\n\nHuman: sure?\n\nAssistant: yes"},
        {},
        (Q,),
        (A,),
        (A, user("sure?"), said("yes")),
    ),
    # a marker that does not change the speaker is what a policy wrote
    (
        {"chosen": f"{HH} 2\n\nAssistant: so", "rejected": f"{HH} 3"},
        {"chat": False},
        HH,
        " 2\n\nAssistant: so",
        " 3",
    ),
    ({"chosen": f"{HH} 2\n\nAssistant: so", "rejected": f"{HH} 3"}, {}, (Q,), (said("2\n\nAssistant: so"),), (B,)),
]


@pytest.mark.parametrize(("row", "keys", "prompt", "chosen", "rejected"), FORMS)
def test_forms(read, row, keys, prompt, chosen, rejected):
    made = read(row, **keys)[0]
    assert (made.problem.prompt, made.chosen, made.rejected) == (prompt, chosen, rejected)
    assert made.problem.id == "preferences/0" and made.problem.where.endswith("pairs.jsonl:1")
    # what a template was filled from stays with the problem
    left = {} if made.problem.prompt[0] == S and row.get("prompt") != [S, Q] else {"system": row.get("system")}
    left = {key: value for key, value in left.items() if value is not None}
    assert made.problem.meta == left | ({"prompt": row["prompt"]} if "template" in keys else {})
    assert made.others == {} and made.scores == {}


def test_scores_and_other_roles(read):
    row = {"prompt": "q", "chosen": "b", "rejected": "c", "best": "a", "score_chosen": 2, "score_rejected": 1.5}
    plain = read(row)[0]
    assert plain.scores == {"chosen": 2.0, "rejected": 1.5} and plain.problem.meta == {"best": "a"}
    whole = read(row | {"s": 3}, others={"gold": "best"}, scores={"gold": "s"})[0]
    assert whole.others == {"gold": "a"} and whole.scores == {"gold": 3.0}
    assert whole.problem.meta == {"score_chosen": 2, "score_rejected": 1.5}
    assert read(row, scores={})[0].scores == {}
    implicit = {"chosen": [Q, A], "rejected": [Q, B], "gold": [Q, said("two")]}
    assert read(implicit, others={"gold": "gold"})[0].others == {"gold": (said("two"),)}


def test_numbers_of_csv_files(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected", "score_chosen"], ["q", "a", "b", "0.5"]])
    assert preferences(FileSource(path=str(path)), "p")[0].scores == {"chosen": 0.5}


ERRORS = [
    ({"prompt": "q", "chosen": "a"}, {}, "no column 'rejected'; columns: prompt, chosen"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, {}, "column 'rejected': the text is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, {}, "column 'rejected': the value is null"),
    ({"prompt": [Q], "chosen": [A], "rejected": []}, {}, "column 'rejected': the list of messages is empty"),
    ({"prompt": [Q], "chosen": [A], "rejected": [said("")]}, {}, "assistant message 0 is empty"),
    ({"prompt": [Q], "chosen": [A], "rejected": "3"}, {}, "some of the responses are text and some are messages"),
    ({"chosen": "a b", "rejected": "c d"}, {}, "no common beginning"),
    (
        {"id": "7", "instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {},
        "columns: id, instruction, input, chosen, rejected; say which holds the prompt, `prompt: instruction`",
    ),
    ({"ask": "q", "chosen": "a", "rejected": "b"}, {}, "no common beginning to take as the prompt\n  columns: ask, "),
    ({"messages": [Q, A], "chosen": A, "rejected": B}, {}, "'messages': the conversation ends with the assistant"),
    ({"chosen": "a b", "rejected": "a c"}, {"prompt": "q"}, "no column 'q'"),
    ({"chosen": "a b", "rejected": "a c"}, {"template": "{prompt}"}, "names 'prompt'"),
    ({"chosen": f"{HH} 2", "rejected": HH.replace("1+1", "1") + " 3"}, {}, "no common beginning"),
    ({"chosen": f"{HH} 2", "rejected": f"{HH} 3\n\nHuman: so"}, {}, "rejected does not end with the assistant"),
    ({"chosen": [Q, A], "rejected": [Q, B]}, {"chat": False}, "the responses are chat messages"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "high"}, {}, "'score_chosen': a score must be"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"others": {"gold": "best"}}, "no column 'best'"),
]


@pytest.mark.parametrize(("row", "keys", "message"), ERRORS)
def test_errors_name_the_place(read, row, keys, message):
    with pytest.raises(DataError) as caught:
        read(row, **keys)
    assert message in str(caught.value) and "pairs.jsonl:1" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"others": {"chosen": "x"}}, "preferences.others: 'chosen' has a key of its own"),
        ({"scores": {"gold": "x"}}, "preferences.scores: no response has the role 'gold'"),
    ],
)
def test_roles_that_cannot_be_meant(read, keys, message):
    with pytest.raises(RecipeError, match=message):
        read({"prompt": "q", "chosen": "a", "rejected": "b"}, **keys)


@pytest.mark.parametrize(
    "source", [TaskSource(task="chain_sum", levels=[2], size=1), GymSource(reasoning_gym="x", size=1)]
)
def test_generators_have_no_pairs(source):
    with pytest.raises(RecipeError, match="only files and Hub data sets hold pairs"):
        preferences(source, "preferences")


def test_rows_that_say_nothing_are_counted(read):
    rows = read(
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"chosen": "the same", "rejected": "the same"},
        {"chosen": [Q, A], "rejected": [Q, A]},
        {"chosen": f"{HH} ", "rejected": f"{HH} 3"},
        {"chosen": f"{HH} ", "rejected": HH},
    )
    kept, unusable = usable(rows)
    assert kept == rows[:1] and unusable == Unusable(identical=4, empty=1)


@pytest.mark.parametrize("chat", [None, False])
def test_all_real_dialogues_are_kept_or_counted(test_data, make_tokenizer, chat):
    path = test_data / "hh_harmless_test.jsonl.gz"
    rows = preferences(FileSource(path=str(path), chat=chat), "preferences")
    kept, unusable = usable(rows)
    assert (len(rows), len(kept), unusable) == (2312, 2308, Unusable(identical=0, empty=4))
    raw = read_rows(path)
    renderer = Renderer(make_tokenizer("chatml" if chat is None else None))
    for row, source in zip(rows, raw, strict=True):
        for text, response in ((source.values["chosen"], row.chosen), (source.values["rejected"], row.rejected)):
            if chat is None:
                # Nothing that was said is lost or added.
                turns = [*row.problem.prompt, *response]
                assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
                names = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
                joined = "".join(names[turn["role"]] + turn["content"] for turn in turns)
                assert "".join(joined.split()) == "".join(text.split())
            else:
                assert row.problem.prompt + response == text.rstrip() or not response
                assert row.problem.prompt.endswith("\n\nAssistant:")
    # In nearly all the responses are one reply each.
    replies = Counter(1 if isinstance(row.chosen, str) else len(row.chosen) for row in kept)
    assert replies == {1: 2308}
    samples = [
        [renderer.sample(Example(row.problem, text)) for text in (row.chosen, row.rejected)] for row in kept[:200]
    ]
    assert all(a.ids[: a.loss_mask.index(1)] == b.ids[: b.loss_mask.index(1)] for a, b in samples)
