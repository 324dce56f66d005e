"""Value-guided search: what it keeps, what it draws, and the command that uses it."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.schema import EvaluationConfig, ModelConfig
from posttrain.errors import ModelError
from posttrain.models.loading import load_policy
from posttrain.models.value import head_of, value_model
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.guided import GuidedEngine, step_ends
from posttrain.rollouts.transformers_engine import TransformersEngine

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def policy(tiny_model):
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    return model, tokenizer


def engine(policy, value, max_steps=20, cls=GuidedEngine):
    model, tokenizer = policy
    common = {"stop_ids": [tokenizer.eos_token_id], "pad_id": 0, "max_batch": 64}
    if cls is TransformersEngine:
        return cls(model, **common)
    steps = step_ends(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), len(tokenizer), ";")
    return cls(model, **common, value=value, step_ids=steps, max_steps=max_steps)


def sevens(rows):
    """Likes the token 7."""
    return [float(sum(token == 7 for token in row)) for row in rows]


def test_it_finds_what_the_value_likes(policy):
    search = Sampling(beams=6, max_new_tokens=24, seed=3)
    liked = engine(policy, sevens).generate(PROMPTS, search)
    disliked = engine(policy, lambda rows: [-value for value in sevens(rows)]).generate(PROMPTS, search)
    for prompt, yes, no in zip(PROMPTS, liked, disliked, strict=True):
        assert sevens([yes[0].ids])[0] > sevens([no[0].ids])[0], prompt


def test_its_log_probs_are_the_policys_and_its_ends_are_right(policy):
    model, tokenizer = policy
    for prompt, (best, second) in zip(
        PROMPTS, engine(policy, sevens).generate(PROMPTS, Sampling(n=2, beams=4, max_new_tokens=16)), strict=True
    ):
        assert best.ids != second.ids
        for found in (best, second):
            assert (found.finish == "stop") == (found.ids[-1] == tokenizer.eos_token_id) and len(found.ids) <= 16
            with torch.no_grad():
                logps = model(torch.tensor([prompt + found.ids])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = logps.gather(1, torch.tensor(found.ids)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(found.logps), expected, rtol=1e-4, atol=1e-4)


def test_a_finished_text_is_valued_before_its_end_token(policy):
    seen = []
    guided = engine(policy, lambda rows: [seen.append(list(row)) or 0.0 for row in rows])
    guided.generate(PROMPTS, Sampling(beams=4, max_new_tokens=30))
    assert seen and not any(2 == row[-1] for row in seen)  # 2 is the end token


def test_draws_depend_on_seed_and_prompt_number_alone(policy):
    both = engine(policy, sevens).generate(PROMPTS, Sampling(beams=3, max_new_tokens=12, seed=1))
    second = engine(policy, sevens).generate(PROMPTS[1:], Sampling(beams=3, max_new_tokens=12, seed=1, first_prompt=1))
    assert second[0] == both[1]
    other = engine(policy, sevens).generate(PROMPTS, Sampling(beams=3, max_new_tokens=12, seed=2))
    assert [c.ids for g in other for c in g] != [c.ids for g in both for c in g]


def test_without_a_search_it_is_the_plain_engine(policy):
    sampling = Sampling(n=2, max_new_tokens=8, seed=5)
    plain = engine(policy, None, cls=TransformersEngine).generate(PROMPTS, sampling)
    assert engine(policy, sevens).generate(PROMPTS, sampling) == plain


def test_it_counts_what_it_draws(policy):
    guided = engine(policy, sevens, max_steps=1)
    (group,) = guided.generate(PROMPTS[:1], Sampling(beams=4, max_new_tokens=12))
    assert guided.tokens_drawn >= 4 and guided.tokens_drawn > len(group[0].ids)


def test_a_delimiter_that_no_token_holds_is_refused(policy):
    tokenizer = policy[1]
    with pytest.raises(ModelError, match="no token") as caught:
        step_ends(tokenizer.decode, len(tokenizer), "Q")
    assert caught.value.where == "value.delimiter"


@pytest.mark.parametrize(
    ("keys", "message"),
    [({}, "set `beams`"), ({"beams": 2, "every": 5}, "not read while training")],
)
def test_a_value_without_its_search_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(benchmarks=["chain-sum-3"], value={"path": "critic"}, **keys)


@pytest.fixture
def critic(policy, tmp_path):
    model, tokenizer = policy
    classifier = value_model(model, pad_token_id=0)
    with torch.no_grad():
        head_of(classifier).weight.normal_()
    classifier.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    return tmp_path / "critic"


def test_eval_measures_the_guided_search(tiny_model, critic, tmp_path):
    arguments = ["eval", str(tiny_model), "--benchmarks", "chain-sum-3", "--limit", "3", "--max-new-tokens", "10"]
    arguments += [
        "--beams",
        "2",
        "--value",
        str(critic),
        "value.delimiter=;",
        "--output",
        str(tmp_path / "report.json"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (report,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert "beam@2" in json.dumps(report)


def test_sample_searches_with_a_value_model(tiny_model, critic, tmp_path):
    settings = {
        "model": {"path": str(tiny_model)},
        "data": {"prompts": {"task": "chain_sum", "levels": [2], "size": 3}},
        "verifier": [{"type": "procedural"}],
        "verifier_pool": {"workers": 0},
        "rollouts": {"samples_per_prompt": 2, "max_new_tokens": 8},
        "beams": 2,
        "value": {"path": str(critic), "delimiter": ";"},
        "output": str(tmp_path / "traces.jsonl"),
    }
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["sample", str(tmp_path / "sample.yaml")])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "traces.jsonl").read_text().splitlines()) == 6
    manifest = json.loads((tmp_path / "traces.manifest.json").read_text())
    assert manifest["sampling"]["value"]["delimiter"] == ";"
