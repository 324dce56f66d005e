"""Rows kept, cut and dropped are the rows read, by reason and source, for every kind of source."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.config.loading import load_recipe
from posttrain.config.schema import Recipe
from posttrain.data.bad_rows import BadRows
from posttrain.data.preparation import load_known, load_rows
from posttrain.data.rendering import Renderer
from posttrain.data.streaming import StreamedSamples, added
from posttrain.data.traces import Manifest, Trace, manifest_path
from posttrain.data.truncation import Ledger
from posttrain.methods import METHODS
from posttrain.trainers.rows import prepare

LIMIT = 60
LONG = "x" * 90
RECIPE = """
model: {init: {hidden_size: 16, layers: 1, heads: 2, max_length: 512}}
method: {name: METHOD}
training: {max_steps: 4}
output: runs/x
"""


def pair(draw: random.Random, fate: str) -> dict:
    row = {"prompt": "a question", "chosen": "good", "rejected": "bad"}
    role = draw.choice(["chosen", "rejected"])
    change = {"empty": {role: " "}, "null": {role: None}, "long": {role: LONG}, "identical": {"rejected": "good"}}
    return row | change.get(fate, {}) if fate != "lacking" else {key: row[key] for key in row if key != role}


def example(draw: random.Random, fate: str) -> dict:
    row = {"prompt": "a question", "completion": "an answer"}
    key = draw.choice(list(row))
    change = {"empty": {key: ""}, "null": {key: None}, "long": {"completion": LONG}}
    return row | change.get(fate, {}) if fate != "lacking" else {k: v for k, v in row.items() if k != "completion"}


def conversation(draw: random.Random, fate: str) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": "hi"} for i in range(2 * draw.randint(1, 2))]
    change = {"empty": "", "null": None, "long": LONG}
    turns[-1] = turns[-1] | ({"content": change[fate]} if fate in change else {})
    return {"messages": turns if fate != "lacking" else turns[:1]}


def prompt(draw: random.Random, fate: str) -> dict:
    row = {"prompt": "a question", "gold": "7"}
    change = {"empty": {"prompt": "\n"}, "null": {"gold": None}, "long": {"prompt": LONG}}
    return row | change.get(fate, {}) if fate != "lacking" else {"prompt": "a question"}


def labelled(draw: random.Random, fate: str) -> dict:
    row = {"prompt": "a question", "completion": "an answer", "label": draw.choice([True, False])}
    change = {"empty": {"completion": "\t"}, "null": {"label": None}, "long": {"completion": LONG}}
    return row | change.get(fate, {}) if fate != "lacking" else {"prompt": "a question", "completion": "an answer"}


def steps(draw: random.Random, fate: str) -> dict:
    number = draw.randint(1, 3)
    row = {"prompt": "a question", "completions": ["a step"] * number, "labels": [True] * number}
    change = {"empty": {"completions": [*row["completions"][:-1], " "]}, "null": {"completions": None}}
    change |= {"long": {"completions": [*row["completions"][:-1], LONG]}, "lacking": {"labels": [True] * (number + 1)}}
    return row | change.get(fate, {})


KINDS: dict[str, tuple[str, str, Callable, dict]] = {
    # kind: section of the data, method that reads it, maker of rows, keys of the source
    "prompts": ("prompts", "grpo", prompt, {"reference": "gold"}),
    "pairs": ("preferences", "dpo", pair, {}),
    "pairs of a reward model": ("preferences", "reward", pair, {}),
    "completions": ("completions", "sft", example, {}),
    "conversations": ("completions", "sft", conversation, {}),
    "labelled completions": ("unpaired", "kto", labelled, {}),
    "labelled steps": ("stepwise", "prm", steps, {}),
    "traces": ("traces", "sft", example, {"completion": "completion"}),
    "traces beside rollouts": ("traces", "chord", example, {"completion": "completion"}),
}
FATES = ("good", "good", "good", "empty", "null", "lacking", "long", "identical")


def recipe(folder: Path, method: str, data: dict) -> Recipe:
    further = {"online": "\nrollouts: {samples_per_prompt: 2, max_new_tokens: 4}\nverifier: [{type: exact}]"}
    batch = {"online": "prompts_per_step: 2"}
    shell = METHODS[method].shell
    text = RECIPE.replace("METHOD", method) + f"data: {json.dumps(data)}\n" + further.get(shell, "")
    file = folder / "recipe.yaml"
    file.write_text(text + f"\nbatch: {{{batch.get(shell, 'rows_per_step: 2')}, micro_batch: 2}}\n")
    return load_recipe(file, [], {name: found.Config for name, found in METHODS.items()})


def ledger_of(asked: Recipe, renderer: Renderer) -> tuple[Ledger, object, Ledger | None]:
    """What became of the rows, the rows, and what became of the traces beside them."""
    method, bad = METHODS[asked.method.name](asked.method), BadRows(asked.data.bad_rows)
    rows, written = load_rows(asked, method.needs, bad=bad), load_known(asked, method.needs, bad=bad)
    vocabulary = len(renderer.tokenizer)
    prepared = prepare(asked, method, rows, written, renderer, vocabulary=vocabulary, world_size=1, bad=bad)
    return prepared.ledger, prepared.items, prepared.traces_ledger


def agrees(ledger: Ledger, fates: list[str], cuts: bool) -> None:
    """What the ledger of a source says is what its rows are."""
    found = Counter(fates)
    assert ledger.total == ledger.kept + ledger.cut + ledger.dropped == len(fates)
    assert (ledger.kept, ledger.cut) == (found["good"], found["long"] if cuts else 0)
    assert ledger.identical == found["identical"]
    # Some empty replies are seen when a row is read, others when responses are compared.
    assert ledger.empty + sum(ledger.bad.values()) == found["empty"] + found["null"] + found["lacking"]
    assert ledger.dropped == sum(found[fate] for fate in FATES[3:]) - (found["long"] if cuts else 0)
    assert set(ledger.first) == set(ledger.bad)


@pytest.mark.parametrize("policy", ["drop", "cut"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_kept_cut_or_dropped(make_tokenizer, tmp_path, kind, policy):
    section, method, make, keys = KINDS[kind]
    draw = random.Random(kind)
    fates = {name: [draw.choice(FATES[: None if make is pair else -1]) for _ in range(n)] for name, n in
             (("one", 150), ("two", 90))}  # fmt: skip
    sources = []
    for name, asked in fates.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(make(draw, fate)) + "\n" for fate in asked))
        sources.append({"path": str(file), **keys})
    data = {section: sources, "max_length": LIMIT, "max_prompt_length": 20, "too_long": policy, "max_lost_share": 1.0}
    if method == "chord":
        data["prompts"] = {"task": "chain_sum", "levels": [2], "size": 4}
    if make is conversation:
        data |= {"max_length": 100, "max_prompt_length": 60}
    renderer = Renderer(make_tokenizer("chatml" if make is conversation else None))
    ledger, items, beside = ledger_of(recipe(tmp_path, method, data), renderer)
    if method == "chord":
        ledger = beside
    assert ledger.total == 240 and set(ledger.sources) == {"one", "two"}
    for name, asked in fates.items():
        agrees(ledger.sources[name], asked, policy == "cut")
    if method != "chord":
        assert len(items) == ledger.kept + ledger.cut


def test_rows_that_are_streamed_are_counted_as_they_are_read(make_tokenizer, tmp_path):
    draw = random.Random("streamed")
    fates = [draw.choice(FATES[:-1]) for _ in range(200)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(example(draw, fate)) + "\n" for fate in fates))
    data = {"completions": {"path": str(file)}, "max_length": LIMIT, "streaming": True, "max_lost_share": 1.0}
    probed, items, _ = ledger_of(recipe(tmp_path, "sft", data), Renderer(make_tokenizer()))
    agrees(probed, fates, cuts=False)
    assert isinstance(items, StreamedSamples)
    for number in range(len(items)):
        assert items[number].ids
    read = added([items.ledgers])
    found = Counter(fates)
    # In place of each bad row another one was drawn, until it was a good one: kept is one for each number.
    assert read.kept == 200 and read.total == read.kept + read.dropped >= 200 + sum(found.values()) - found["good"]


def test_a_conversation_of_several_sequences_is_one_row(make_tokenizer, tmp_path):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"#{i}"} for i in range(6)]
    long = [*turns[:-1], {"role": "assistant", "content": LONG}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (turns, turns[:2], long)))
    renderer = Renderer(make_tokenizer("strips_history"))
    for policy, counts, sequences in (("drop", (2, 0, 1), 3 + 1), ("cut", (2, 1, 0), 3 + 1 + 3)):
        data = {"completions": {"path": str(file)}, "max_length": 100, "too_long": policy, "max_lost_share": 1.0}
        ledger, items, _ = ledger_of(recipe(tmp_path, "sft", data), renderer)
        assert (ledger.kept, ledger.cut, ledger.dropped) == counts and len(items) == sequences
        assert ledger.eos_lost == counts[1]


def test_traces_that_the_recipe_does_not_ask_for_are_counted_too(make_tokenizer, tmp_path):
    rows = [("0", "right", "correct")] * 5 + [("1", "wrong", "wrong")] * 3 + [("2", " ", "correct")] * 2
    rows += [("3", LONG, "correct")]
    traces = [Trace(f"p/{id}", n, f"{id}?", text, "me", "m", verdict=v) for n, (id, text, v) in enumerate(rows)]
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(trace.to_json() + "\n" for trace in traces))
    manifest = Manifest("m", "sampled", {"label": "p"}, {}, "0")
    manifest_path(file).write_text(json.dumps({name: getattr(manifest, name) for name in manifest.__slots__}))
    data = {"traces": {"path": str(file), "per_problem": 2}, "max_length": LIMIT, "max_lost_share": 1.0}
    ledger, items, _ = ledger_of(recipe(tmp_path, "sft", data), Renderer(make_tokenizer()))
    assert (ledger.kept, ledger.dropped, len(items)) == (2, 1, 2)
    assert ledger.unasked == {"beyond `per_problem`": 3, "not correct (`keep`)": 3, "without text": 2}
    assert ledger.total + sum(ledger.unasked.values()) == len(rows)
    assert "3 more left out: not correct (`keep`)" in ledger.summary()


def test_rows_that_a_method_makes_others_of_say_how_many_were_read(make_tokenizer, tmp_path):
    scores = [
        (3.0, 2.0, 1.0),
        (1.0, 1.0, 1.0),
        (2.0, 1.0, 1.0),
    ]  # two pairs, none, and two
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "third": "d"}
        | {"score_chosen": x, "score_rejected": y, "score_third": z}
        for x, y, z in scores
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"preferences": {"path": str(file), "others": {"third": "third"}}}
    ledger, _, _ = ledger_of(recipe(tmp_path, "curry_dpo", data), Renderer(make_tokenizer()))
    assert (ledger.total, ledger.of_rows) == (4, 3)
    assert ledger.summary().startswith("4 rows, which the method makes of 3: 4 kept")
