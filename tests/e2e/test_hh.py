"""bench/hh.py on a few rows in the form of HH-RLHF: every method trains, no row is lost, rewards are compared."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "hh.py"
WORDS = "tell me about the cat and how it sleeps in a warm box near our old door please".split()


def dialogue(turns):
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(turns))


def rows():
    """60 pairs whose chosen reply is polite; one pair says nothing, one has an empty reply, one is very long."""
    chance = random.Random(0)

    def words(n):
        return " ".join(chance.choices(WORDS, k=n))

    found = []
    for number in range(60):
        start = [words(4 + number % 5)] if number % 3 else [words(3), words(4), words(5)]
        replies = [f"sorry, {words(2 + number % 3)}", words(4 + number % 4)]
        found.append(
            {role: dialogue([*start, reply]) for role, reply in zip(("chosen", "rejected"), replies, strict=True)}
        )
    found[7]["rejected"] = found[7]["chosen"]
    found[8]["rejected"] = dialogue(["hello there", " "])
    found[8]["chosen"] = dialogue(["hello there", "sorry, no"])
    found[9]["chosen"] = dialogue([words(300), "sorry, the cat"])
    found[9]["rejected"] = found[9]["chosen"].replace("sorry, the cat", "sleeps")
    return found


@pytest.fixture(scope="module")
def hh():
    spec = importlib.util.spec_from_file_location("hh", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_trains_on_dialogues_and_no_row_is_lost(hh, monkeypatch, capsys, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    small = {"hidden_size": 16, "layers": 1, "heads": 2, "tokenizer": {"type": "bpe", "vocab_size": 300}}
    monkeypatch.setattr(hh, "INIT", hh.INIT | small)
    hh.main(["--data", str(data), "--output", str(out), "--warm-up-epochs", "1"])
    printed = capsys.readouterr().out
    sides = [(out / name).read_text().splitlines() for name in ("train.jsonl", "held_out.jsonl")]
    assert sum(map(len, sides)) == 60 and 4 < len(sides[1]) < 25
    assert sorted(json.loads(line)["chosen"] for side in sides for line in side) == sorted(r["chosen"] for r in rows())
    for name in hh.METHODS_RUN:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
        assert line.split("|")[7].strip() == "yes"  # every logged loss is finite
        assert (out / name / "model" / "model.safetensors").is_file()
        ledger = json.loads((out / name / "data.json").read_text())
        assert ledger["total"] == len(sides[0]) == ledger["kept"] + ledger["cut"] + ledger["dropped"]
        lost = [row for row in map(json.loads, sides[0]) if row["chosen"] == row["rejected"]]
        assert ledger["identical"] == len(lost)
    assert f"{len(sides[1])} rows:" in printed and "held-out rows" in printed

    config = tmp_path / "rewards.yaml"
    models = {"policy": str(out / "dpo" / "model"), "reference": str(out / "start" / "model")}
    written = {
        "implicit": models,
        "explicit": {"path": str(out / "reward" / "model")},
        "data": {"held_out": {"path": str(out / "held_out.jsonl"), "chat": False}},
        **hh.LIMITS,
    }
    config.write_text(json.dumps(written))  # JSON is YAML
    done = CliRunner().invoke(app, ["eval", "--rewards", str(config)], catch_exceptions=False)
    ours = [line for line in printed.splitlines() if line.startswith("| dpo |")][0].split("|")[2].strip()
    theirs = [line for line in done.output.splitlines() if line.split()[:1] == ["implicit"]][0]
    assert ours in theirs  # the same accuracy by both ways
