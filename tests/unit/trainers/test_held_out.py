"""Held-out pairs during training: the split, the figures by hand, and that training takes no notice of them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.schema import FileSource, HeldOutConfig
from posttrain.data.held_out import hold_out, prompt_content
from posttrain.data.sample import Origin, Preference, Problem, Sample
from posttrain.errors import DataError, PosttrainError
from posttrain.evaluation.compare_pairs import compare_pairs, last_pairs
from posttrain.evaluation.preferences import HeldOutPairs
from posttrain.models.reference import frozen_copy
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.tracking.metrics import require
from posttrain.trainers import held_out as held_out_module
from posttrain.trainers.run import train

ALPHABET = "0123456789+=;#"
DPO = {"name": "dpo"}
SECTION = {"every": 2, "max_new_tokens": 8, "preferences": {"share": 0.25, "kl_prompts": 4, "kl_samples": 2}}


def rows(count, per_prompt=2):
    return [Preference(Problem(f"p:{i}", f"prompt {i // per_prompt}"), f"good {i}", f"bad {i}") for i in range(count)]


def test_a_share_of_the_prompts_is_held_out_whatever_the_order():
    config = HeldOutConfig(share=0.25)
    found = hold_out(config, rows(40), seed=0)
    assert (len(found.training), len(found.held_out), found.shared) == (30, 10, 0)
    apart = [{prompt_content(row) for row in side} for side in (found.training, found.held_out)]
    assert not apart[0] & apart[1] and len(apart[1]) == 5
    backwards = hold_out(config, rows(40)[::-1], seed=0)
    assert {row.problem.id for row in backwards.held_out} == {row.problem.id for row in found.held_out}
    other = hold_out(config, rows(40), seed=1)
    assert {row.problem.id for row in other.held_out} != {row.problem.id for row in found.held_out}
    assert len(hold_out(HeldOutConfig(share=0.25, limit=3), rows(40), seed=0).held_out) == 3


def test_a_file_of_its_own_leaves_all_rows_and_counts_prompts_that_are_trained_on(tmp_path):
    path = tmp_path / "held.jsonl"
    lines = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ("prompt 0", "new")]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = hold_out(HeldOutConfig(data=FileSource(path=str(path))), rows(4), seed=0)
    assert (len(found.training), len(found.held_out), found.shared) == (4, 2, 1)
    assert "1 of them have a prompt that is trained on" in found.summary()


def test_a_split_without_training_rows_is_refused():
    with pytest.raises(DataError, match="0 to train on"):
        hold_out(HeldOutConfig(share=0.9), rows(2), seed=0)


@pytest.mark.parametrize("section", [{}, {"share": 0.1, "data": {"path": "x.jsonl"}}])
def test_exactly_one_origin(section):
    with pytest.raises(ValueError, match="exactly one of `data`"):
        HeldOutConfig(**section)


def sample(prompt, completion):
    return Sample(prompt + completion, [0] * len(prompt) + [1] * len(completion), Origin.EXPERT)


class TwoTokens:
    """Answers every prompt with the completions [5] and [5, 6], the second one cut."""

    policy_version = 0

    def generate(self, prompts, sampling):
        assert sampling.n == 2 and not sampling.greedy and sampling.temperature == 1.0
        both = [Completion([5], [0.0], "stop", 0), Completion([5, 6], [0.0, 0.0], "length", 0)]
        return [both for _ in prompts]


def scores_of(value):
    """A scorer that gives every trained token `value(token, prompt's first token)`."""

    def score(samples):
        return [
            torch.tensor([value(t, s.ids[0]) * m for t, m in zip(s.ids, s.loss_mask, strict=True)]) for s in samples
        ]

    return score


def test_figures_by_hand():
    # Tokens of the chosen gain 0.5 nats for prompt 1 and lose 1 for prompt 2; the rejected stay.
    pairs = [
        {"chosen": sample([1], [5, 5]), "rejected": sample([1], [7])},
        {"chosen": sample([1], [5]), "rejected": sample([1], [7, 7, 7])},
        {"chosen": sample([2], [5, 5]), "rejected": sample([2], [7])},
        {"chosen": sample([3], [7]), "rejected": sample([3], [7])},
    ]
    gain = {1: 0.5, 2: -1.0, 3: 0.0}
    config = HeldOutConfig(share=0.1, kl_prompts=2, kl_samples=2)
    start = scores_of(lambda token, prompt: -2.0)
    policy = scores_of(lambda token, prompt: -2.0 + (gain[prompt] if token in (5, 6) else 0.0))
    found = HeldOutPairs(pairs, config, start, seed=0, max_new_tokens=2).measure(3, policy, TwoTokens())

    # By prompt: both right, wrong, a tie.
    assert found.accuracy.accuracy.value == pytest.approx(1 / 3) and found.accuracy.ties == 1
    assert found.accuracy_per_token.accuracy.value == pytest.approx(1 / 3)
    assert found.margin.value == pytest.approx((0.75 - 2.0 + 0.0) / 3)
    assert found.logps_chosen == pytest.approx((-3.0 - 1.5 - 6.0 - 2.0) / 4)
    assert found.logps_rejected == pytest.approx((-2.0 - 6.0 - 2.0 - 2.0) / 4)
    assert found.chosen_shift == pytest.approx((0.5 + 0.5 - 1.0 + 0.0) / 4)
    assert found.length_difference == pytest.approx((1 - 2 + 1 + 0) / 4)
    # Prompt 1: (0.5 + 1.0) / 2; prompt 2: (-1 - 2) / 2; t interval with one degree of freedom.
    assert found.drift.kl.value == pytest.approx((0.75 - 1.5) / 2)
    reach = 12.706204736432095 * (2.25 / math.sqrt(2)) / math.sqrt(2)
    assert found.drift.kl.high - found.drift.kl.value == pytest.approx(reach)
    assert (found.drift.length, found.drift.truncated, found.drift.prompts) == (1.5, 0.5, 2)
    for name in found.metrics():
        assert require(name).name == name


def logged(run, steps=None):
    """What `metrics.jsonl` says of training and of held-out pairs, without times."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [{k: v for k, v in e.items() if "second" not in k and "time" not in k} for e in events if "loss" in e]
    held_out = [e for e in events if any(key.startswith("held_out/") for key in e)]
    return training, held_out


@pytest.mark.parametrize("method", [DPO, {"name": "simpo"}, {"name": "hypo"}], ids=lambda m: m["name"])
def test_training_takes_no_notice(load, tmp_path, method):
    """The same bits with and without the evaluation; dropout is on, so a stray draw or mode would show."""
    file = tmp_path / "held.jsonl"
    file.write_text(json.dumps({"prompt": "1+2=", "chosen": "3#", "rejected": "4#"}) + "\n", encoding="utf-8")
    section = {**SECTION, "preferences": {"data": {"path": str(file), "chat": False}, "kl_prompts": 1}}
    plain = train(load(method, {"output": str(tmp_path / "plain"), "training.max_steps": 4}))
    measured = train(
        load(method, {"output": str(tmp_path / "measured"), "training.max_steps": 4, "evaluation": section})
    )
    ours, held_out = logged(measured.run_dir)
    theirs, _ = logged(plain.run_dir)
    assert [e["loss"] for e in ours] == [e["loss"] for e in theirs]
    weights = [(result.model_dir / "model.safetensors").read_bytes() for result in (plain, measured)]
    assert weights[0] == weights[1]
    assert [e["step"] for e in held_out] == [0, 2, 4]
    first, last = held_out[0], held_out[-1]
    assert first["held_out/ties"] == 1.0 and abs(first["held_out/kl"]) < 1e-4
    assert last["held_out/kl"] != 0.0 and "held_out/kl_low" not in last  # one prompt has no interval
    report = json.loads((measured.run_dir / "held_out" / "step-000004.json").read_text())
    assert (
        report["drift"]["kl"]["value"] == pytest.approx(last["held_out/kl"], rel=1e-5)
        and report["accuracy"]["pairs"] == 1
    )


def test_two_preference_runs_are_compared_row_by_row(load, tmp_path):
    """Held-out accuracy, margin and KL of two runs, from their folders alone; a run is like itself."""
    steps = {"plain": 1, "longer": 4}
    folders = []
    for name, count in steps.items():
        changes = {"output": str(tmp_path / name), "training.max_steps": count, "evaluation": SECTION}
        folders.append(str(train(load(DPO, changes)).run_dir))
    result = CliRunner().invoke(app, ["compare", *folders])
    assert result.exit_code == 0, result.output
    for measure in ("accuracy", "accuracy per token", "margin", "KL"):
        assert measure in result.output
    changes = {each.measure: each for each in compare_pairs(*(last_pairs(Path(folder)) for folder in folders))}
    assert changes["margin"].difference != 0.0 and changes["margin"].low < changes["margin"].difference
    reports = [json.loads(last_pairs(Path(folder)).read_text()) for folder in folders]
    assert changes["margin"].base == pytest.approx(reports[0]["margin"]["value"], abs=1e-9)
    assert changes["accuracy"].other == pytest.approx(reports[1]["accuracy"]["accuracy"]["value"], abs=1e-12)
    assert changes["KL"].other == pytest.approx(reports[1]["drift"]["kl"]["value"], abs=1e-9)
    same = compare_pairs(*(2 * [last_pairs(Path(folders[0]))]))
    assert all(each.difference == 0.0 and each.test.p == 1.0 for each in same)
    others = json.loads(last_pairs(Path(folders[0])).read_text())
    others["rows"]["pairs"].reverse()
    (tmp_path / "other.json").write_text(json.dumps(others))
    with pytest.raises(DataError, match="held out other pairs"):
        compare_pairs(last_pairs(Path(folders[0])), tmp_path / "other.json")


def test_a_share_is_not_trained_on_and_a_resumed_run_measures_the_same(load, tmp_path, capsys):
    changes = {"evaluation": SECTION, "training.max_steps": 4, "training.save_steps": 2}
    whole = train(load(DPO, changes | {"output": str(tmp_path / "whole")}))
    again = tmp_path / "again"
    first = load(DPO, changes | {"output": str(again)})
    stopped = train(first)
    # As after a kill behind step 2: the later checkpoint, the model and what was logged since are not there.
    shutil.rmtree(stopped.model_dir)
    shutil.rmtree(again / "checkpoints" / "checkpoint-4")
    shutil.rmtree(again / "held_out")
    train(first, resume="auto")
    assert logged(again)[0] == logged(whole.run_dir)[0]
    figures = [{k: v for k, v in e.items() if k.startswith("held_out/")} for e in logged(again)[1]]
    assert figures == [{k: v for k, v in e.items() if k.startswith("held_out/")} for e in logged(whole.run_dir)[1]]
    assert json.loads((again / "data.json").read_text())["kept"] == 27
    said = capsys.readouterr().out
    assert "13 pairs held out, 27 rows left to train on" in said and "step 4: of 13 held-out pairs" in said


@pytest.mark.parametrize(
    ("method", "section", "word"),
    [
        ({"name": "grpo"}, SECTION, "does not train a policy on pairs"),
        (DPO, {k: v for k, v in SECTION.items() if k != "every"}, "set `every`"),
        (DPO, {"every": 2}, "nothing to measure"),
    ],
)
def test_sections_without_sense_are_refused(load, method, section, word):
    with pytest.raises(PosttrainError, match=word):
        train(load(method, {"evaluation": section}))


def test_check_says_what_is_held_out(write_recipe):
    recipe = write_recipe(DPO, {"evaluation": SECTION})
    result = CliRunner().invoke(app, ["check", str(recipe)], catch_exceptions=False)
    assert "13 pairs held out, 27 rows left to train on" in result.output and "27 rows: 27 kept" in result.output
    assert "benchmarks:" not in result.output


STAGED = {"name": "curry_dpo", "curriculum": "gap", "stages": 2, "refresh_reference": True}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (DPO, {}),
        (DPO, {"model.peft": {"r": 4}}),
        ({"name": "simpo"}, {}),
        ({"name": "simpo"}, {"model.peft": {"r": 4}}),
        (STAGED, {}),
    ],
    ids=["reference", "adapter", "no reference", "no reference, adapter", "refreshed reference"],
)
def test_the_start_is_the_policy_as_the_run_found_it(load, tiny_model, tmp_path, method, changes):
    file = tmp_path / "held.jsonl"
    file.write_text(json.dumps({"prompt": "1+2=", "chosen": "3#", "rejected": "4#"}) + "\n", encoding="utf-8")
    pairs = {"data": {"path": str(file), "chat": False}, "kl_prompts": 1, "kl_samples": 3}
    section = {"every": 4, "max_new_tokens": 8, "preferences": pairs}
    result = train(load(method, {**changes, "evaluation": section, "training.max_steps": 4}))
    first, last = logged(result.run_dir)[1]
    gained = [last[f"held_out/logps_{role}"] - first[f"held_out/logps_{role}"] for role in ("chosen", "rejected")]
    assert last["held_out/margin"] == pytest.approx(gained[0] - gained[1], abs=1e-4) and abs(gained[0]) > 1e-3
    # The same completions, drawn and scored here.
    start, policy = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny_model, result.model_dir))
    prompt = [ALPHABET.index(character) + 4 for character in "1+2="]
    engine = TransformersEngine(policy, stop_ids=[2], pad_id=0, max_batch=8)
    (completions,) = engine.generate([prompt], Sampling(n=3, max_new_tokens=8))
    ratios = [log_prob(policy, prompt, c.ids) - log_prob(start, prompt, c.ids) for c in completions]
    assert last["held_out/kl"] == pytest.approx(sum(ratios) / 3, abs=1e-3)


@torch.no_grad()
def log_prob(model, prompt, ids):
    logps = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, torch.tensor(ids).unsqueeze(1)).sum())


def test_without_a_kl_no_copy_is_made(load, tmp_path, monkeypatch):
    copies = []
    monkeypatch.setattr(held_out_module, "frozen_copy", lambda model: copies.append(model) or frozen_copy(model))
    for prompts, expected in ((0, 0), (2, 1)):
        section = {**SECTION, "preferences": {"share": 0.25, "kl_prompts": prompts, "kl_samples": 2}}
        output = str(tmp_path / f"run-{prompts}")
        result = train(load({"name": "simpo"}, {"evaluation": section, "output": output}))
        assert len(copies) == expected
        report = json.loads((result.run_dir / "held_out" / "step-000002.json").read_text())
        assert (report["drift"] is None) == (prompts == 0) and report["accuracy"]["pairs"] == 13
