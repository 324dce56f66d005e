"""Did it work? Real runs, small ones, answer in the first screen of their report."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import posttrain as pt
from posttrain.cli.main import app
from posttrain.contract.recipes import tiny_recipe, write_model
from posttrain.report.collect import collect
from posttrain.report.page import page

ROOT = Path(__file__).resolve().parents[3]
SUMS = {"benchmarks": ["chain-sum-2"], "limit": 16, "max_new_tokens": 8}
SHORT = ["base.training.max_steps=20", "grpo.training.max_steps=3", "base_eval.limit=8", "grpo_eval.limit=8"]


def command(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)


def trained(method, folder, changes):
    folder.mkdir()
    recipe = tiny_recipe(method, folder, folder.parent / "model", {"tracking.console": "off", **changes})
    return pt.train(recipe).run_dir


def quickstart(folder):
    command("run", ROOT / "recipes" / "quickstart.yaml", f"output={folder / 'quickstart'}", *SHORT)
    return [folder / "quickstart"], "Greedy accuracy on chain-sum-4"


def dpo(folder):
    held = {"every": 2, "max_new_tokens": 8, "preferences": {"share": 0.2}}
    return [trained({"name": "dpo"}, folder / "dpo", {"evaluation": held})], "of held-out pairs have moved"


def oreo(folder):
    run = trained({"name": "oreo"}, folder / "oreo", {"evaluation": {"every": 2, **SUMS}})
    return [run], "Greedy accuracy on chain-sum-2"


def evaluation_pair(folder):
    write_model(folder / "other", seed=1)
    for name in ("model", "other"):
        pt.evaluate(folder / name, output=folder / f"{name}.json", **SUMS)
    return [folder / "model.json", folder / "other.json"], "Greedy accuracy on chain-sum-2 is"


def study(folder):
    recipe = tiny_recipe({"name": "sft"}, folder, folder / "model", {"evaluation": SUMS})
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe))
    arms = {"slow": "sft.yaml", "fast": {"recipe": "sft.yaml", "set": {"training.learning_rate": 0.03}}}
    text = {"study": "rates", "output": str(folder / "study"), "seeds": 2, "arms": arms, "evaluate": SUMS}
    (folder / "study.yaml").write_text(yaml.safe_dump(text))
    command("study", folder / "study.yaml")
    return [folder / "study"], "has the highest mean"


@pytest.mark.slow
@pytest.mark.parametrize("make", [quickstart, dpo, oreo, evaluation_pair, study])
def test_the_first_screen_says_whether_it_worked(make, opened, tmp_path):
    write_model(tmp_path / "model")
    paths, said = make(tmp_path)
    (tmp_path / "page.html").write_text(page(collect(paths)), encoding="utf-8")
    shown = opened(tmp_path / "page.html")
    first = shown.ask("document.querySelector('.finding').innerText")
    assert said in first and "How sure:" in first
    assert any(tone in first for tone in ("▲ Better", "▼ Worse", "◆ No clear difference"))
    assert shown.ask("document.querySelector('.finding').getBoundingClientRect().bottom < innerHeight")
    assert not shown.complaints
