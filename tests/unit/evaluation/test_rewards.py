"""`posttrain eval --rewards`: one implicit and one explicit reward on the same pairs, end to end on tiny models."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.loading import parse_config
from posttrain.config.rewards import RewardsConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Problem
from posttrain.errors import DataError, ModelError, RecipeError
from posttrain.evaluation.rewards import evaluate_rewards


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Policy, reference and reward model; the policy is the reference with other weights."""
    folder = tmp_path_factory.mktemp("rewards")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        classifier.score.weight.mul_(50)
    for name, model in (("policy", policy), ("classifier", classifier)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"policy": str(folder / "policy"), "reference": str(tiny_model), "classifier": str(folder / "classifier")}


ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "3;4"},
    {"prompt": "1+1=", "chosen": "2;", "rejected": "11"},
    {"prompt": "2+2=", "chosen": "4", "rejected": "4"},  # says nothing
    {"prompt": "2+3=", "chosen": "5#5#5", "rejected": "6"},
    {"prompt": "9+9=", "chosen": "18", "rejected": "9" * 200},  # longer than the model's positions
    {"prompt": "7+1=", "chosen": "8", "rejected": "9"},
]


@pytest.fixture
def config(models, tmp_path):
    paths = {}
    for name, rows in (("held_out", ROWS), ("elsewhere", ROWS[:4])):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "implicit": {"policy": models["policy"], "reference": models["reference"], "beta": 0.2},
        "explicit": {"path": models["classifier"]},
        "data": {
            "elsewhere": {"path": str(paths["elsewhere"]), "chat": False, "shift": "prompt"},
            "held_out": {"path": str(paths["held_out"]), "chat": False},
        },
        "max_lost_share": 0.5,
        "threads": 1,
    }


def run(config, **changes):
    return evaluate_rewards(parse_config({**config, **changes}, RewardsConfig))


def logp(folder, row, response):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sample = Renderer(tokenizer).sample(Example(Problem("p", row["prompt"], chat=False), response))
    ids = torch.tensor([sample.ids])
    logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float((logps * torch.tensor(sample.loss_mask[1:])).sum())


def output(folder, row, response):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(row["prompt"] + response).input_ids + [tokenizer.eos_token_id]
    return float(model(torch.tensor([ids])).logits[0, 0])


@torch.no_grad()
def test_both_rewards_on_the_same_rows(config, models):
    report = run(config)
    assert [one.name for one in report.sets] == ["held_out", "elsewhere"]  # in distribution first
    held_out = report.sets[0]
    assert held_out.rows == {
        **{"total": 6, "kept": 4, "cut": 0, "dropped": 2, "eos_lost": 0, "identical": 1, "empty": 0},
        **{"bad": {}, "first": {}, "said": {}, "sources": {}, "unasked": {}, "notes": [], "of_rows": None},
        "lost_share": pytest.approx(1 / 3),
    }
    assert held_out.prompts == 3
    used = [ROWS[i] for i in (0, 1, 3, 5)]
    ratio = {}
    for row in used:
        for role in ("chosen", "rejected"):
            scores = [logp(models[name], row, row[role]) for name in ("policy", "reference")]
            ratio[row["chosen"], role] = scores[0] - scores[1]
    implicit = [ratio[row["chosen"], "chosen"] - ratio[row["chosen"], "rejected"] for row in used]
    explicit = [
        output(models["classifier"], row, row["chosen"]) - output(models["classifier"], row, row["rejected"])
        for row in used
    ]
    for name, margins, scale in (("implicit", implicit, 0.2), ("explicit", explicit, 1.0)):
        found = held_out.scores[name]
        assert found.margin == pytest.approx(scale * sum(margins) / 4, abs=1e-4)
        right = [float(margin > 0) for margin in margins]
        assert found.found.accuracy.value == pytest.approx(((right[0] + right[1]) / 2 + right[2] + right[3]) / 3)
        assert found.found.pairs == 4 and found.found.ties == 0
    gap = held_out.scores["explicit"].found.accuracy.value - held_out.scores["implicit"].found.accuracy.value
    assert held_out.explicit_minus_implicit.value == pytest.approx(gap)
    # "5#5#5" is longer than "6", "2" shorter than "3;4", the others are equally long
    assert held_out.scores["longer"].by_length.balanced == 0.5 and held_out.scores["longer"].by_length.equal == 2
    inside, outside = (one.scores["implicit"].found.accuracy.value for one in report.sets)
    assert report.out_of_distribution["implicit"] == pytest.approx(outside - inside)
    assert len(set(report.weights.values())) == 3


def test_beta_changes_margins_and_no_accuracy(config):
    one = run(config).sets[0].scores["implicit"]
    config["implicit"] |= {"beta": 2.0}
    other = run(config).sets[0].scores["implicit"]
    assert other.found == one.found and other.margin == pytest.approx(10 * one.margin)


def test_a_policy_that_was_not_trained_ties_everywhere(config, models):
    config["implicit"] |= {"policy": models["reference"]}
    found = run(config).sets[0].scores["implicit"].found
    assert found.ties == found.pairs == 4 and found.decided is None


@pytest.mark.parametrize("without", ["implicit", "explicit"])
def test_one_reward_alone(without, config):
    del config[without]
    report = run(config)
    assert without not in report.sets[0].scores and report.sets[0].explicit_minus_implicit is None
    assert len(report.sets[0].scores) == (2 if without == "implicit" else 5)


def test_batches_change_nothing_but_rounding(config):
    one, other = (run(config, batch_size=size).sets[0].scores for size in (1, 16))
    for name, found in one.items():
        assert other[name].margin == pytest.approx(found.margin, abs=1e-5)


def test_the_command_prints_a_table_and_writes_a_report(config, tmp_path):
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump(config))
    arguments = ["eval", "--rewards", str(tmp_path / "rewards.yaml"), "--output", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, [*arguments, "batch_size=4"])
    assert done.exit_code == 0, done.output + str(done.exception)
    assert "held_out (shift: id): 4 pairs, 3 prompts" in done.output
    assert "6, 4 kept, 0 cut, 2 dropped (1 identical, 0 empty)" in done.output
    assert "explicit - implicit" in done.output and "out of distribution" in done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["settings"]["batch_size"] == 4 and report["environment"]["packages"]["torch"]
    accuracy = report["sets"][0]["scores"]["explicit"]["found"]["accuracy"]
    assert f"{100 * accuracy['value']:.1f} [{100 * accuracy['low']:.1f}" in done.output


def test_what_is_refused(config, models, tmp_path):
    with pytest.raises(RecipeError, match="give `implicit`"):
        run({"data": config["data"]})
    with pytest.raises(ModelError, match="no trained sequence classifier") as caught:
        run(config, explicit={"path": models["reference"]})
    assert caught.value.where == "explicit.path"
    with pytest.raises(ModelError, match="no model folder") as caught:
        run(config, implicit=config["implicit"] | {"reference": "./nowhere"})
    assert caught.value.where == "implicit.reference"
    with pytest.raises(DataError, match="would be lost"):
        run(config, max_lost_share=0.1)


def test_policy_and_reference_must_read_alike(config, models, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models["reference"]), None
    tokenizer = AutoTokenizer.from_pretrained(models["reference"])
    tokenizer.add_tokens(["new"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="different tokenizers"):
        run(config, implicit=config["implicit"] | {"reference": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["some/model"], "no MODEL is read"), (["--benchmarks", "gsm8k"], "--benchmarks has no effect")],
)
def test_options_of_the_other_evaluation_are_refused(arguments, said, tmp_path):
    (tmp_path / "rewards.yaml").write_text("data: {}")
    done = CliRunner().invoke(app, ["eval", *arguments, "--rewards", str(tmp_path / "rewards.yaml")])
    assert isinstance(done.exception, RecipeError) and said in str(done.exception)
