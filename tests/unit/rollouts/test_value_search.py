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
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.value_search import ValueSearchEngine, step_ends

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def policy(tiny_model):
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    return model, tokenizer


def engine(policy, value, max_steps=20, cls=ValueSearchEngine):
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
    assert [(one.ids, one.finish) for one in second[0]] == [(one.ids, one.finish) for one in both[1]]
    for one, other in zip(second[0], both[1], strict=True):  # another batch size, so rounded otherwise
        assert one.logps == pytest.approx(other.logps, abs=1e-5)
    other = engine(policy, sevens).generate(PROMPTS, Sampling(beams=3, max_new_tokens=12, seed=2))
    assert [c.ids for g in other for c in g] != [c.ids for g in both for c in g]


@pytest.mark.parametrize("long", [66, 60])
def test_a_long_prompt_beside_it_changes_nothing(policy, long):
    """96 positions: with 30 new tokens a prompt of 66 just fits."""
    search = Sampling(n=3, beams=3, max_new_tokens=30, seed=2)
    (alone,) = engine(policy, sevens).generate([[5, 8]], search)
    beside = engine(policy, sevens).generate([[5, 8], [6, 7, 9] * (long // 3)], search)
    assert [one.ids for one in beside[0]] == [one.ids for one in alone]
    for one, other in zip(beside[0], alone, strict=True):  # padded otherwise, so rounded otherwise
        assert one.finish == other.finish and one.logps == pytest.approx(other.logps, abs=1e-5)
    assert max(len(found.ids) for found in alone) > 12 and max(len(found.ids) for found in beside[1]) <= 30


class Tree:
    """Continues the texts of a table, whatever is drawn, and remembers what it was asked.

    Args:
        children: text -> its continuations.
    """

    def __init__(self, prompt, children):
        self.prompt, self.children, self.asked = prompt, children, []

    def generate(self, contexts, sampling, limits):
        texts = [tuple(context[len(self.prompt) :]) for context in contexts]
        self.asked.append((texts, list(limits), sampling.prompt_numbers))
        assert all(len(self.children[text]) == sampling.n for text in texts)
        return [[Completion(list(ids), [-0.5] * len(ids), "stop", 0) for ids in self.children[text]] for text in texts]


D, END = 20, 2
"""What ends a step, and the end token."""


def test_the_best_texts_go_on_at_every_step(policy):
    prompt = [5, 6]
    tree = Tree(
        prompt,
        {
            (): [(10, D), (11, D)],
            (11, D): [(12, D), (13, D)],
            (10, D): [(14, D), (15, END)],
            (10, D, 14, D): [(16, END), (16, END)],
            (11, D, 13, D): [(17, END), (18, D)],
            (11, D, 13, D, 18, D): [(19, END), (19, D)],
        },
    )
    values = {
        (10, D): 0.3,
        (11, D): 0.5,
        (11, D, 12, D): 0.1,
        (11, D, 13, D): 0.2,
        (10, D, 14, D): 0.9,
        (10, D, 15): 0.4,  # a finished text before its end token
        (10, D, 14, D, 16): 0.35,
        (11, D, 13, D, 17): 0.7,
        (11, D, 13, D, 18, D): 0.6,
        (11, D, 13, D, 18, D, 19): 0.65,
        (11, D, 13, D, 18, D, 19, D): 0.99,  # cut at 8 tokens: the best value, and not finished
    }
    guided = engine(policy, lambda rows: [values[tuple(row[len(prompt) :])] for row in rows])
    guided._steps = tree
    (found,) = guided.generate([prompt], Sampling(n=2, beams=2, max_new_tokens=8, first_prompt=3))
    assert tree.asked == [
        ([()], [8], (6,)),
        ([(11, D), (10, D)], [6, 6], (6, 7)),
        ([(10, D, 14, D), (11, D, 13, D)], [4, 4], (6, 7)),
        ([(11, D, 13, D, 18, D)], [2], (6,)),
    ]
    assert [tuple(one.ids) for one in found] == [(11, D, 13, D, 17, END), (11, D, 13, D, 18, D, 19, END)]
    assert all(one.finish == "stop" and one.logps == [-0.5] * len(one.ids) for one in found)
    assert guided.tokens_drawn == 2 * 2 + 4 * 2 + 4 * 2 + 2 * 2


def test_without_a_search_it_is_the_plain_engine(policy):
    sampling = Sampling(n=2, max_new_tokens=8, seed=5)
    plain = engine(policy, None, cls=TransformersEngine).generate(PROMPTS, sampling)
    assert engine(policy, sevens).generate(PROMPTS, sampling) == plain


def test_it_counts_what_it_draws(policy):
    guided = engine(policy, sevens, max_steps=1)
    (group,) = guided.generate(PROMPTS[:1], Sampling(beams=4, max_new_tokens=12))
    assert guided.tokens_drawn >= 4 and guided.tokens_drawn > len(group[0].ids)


def test_where_no_step_ends_it_is_the_best_of_n_samples(policy):
    model, tokenizer = policy
    common = {"stop_ids": [tokenizer.eos_token_id], "pad_id": 0, "max_batch": 64}
    best_of = ValueSearchEngine(model, **common, value=sevens, step_ids=[], max_steps=20)
    (group,) = best_of.generate(PROMPTS[:1], Sampling(n=5, beams=5, max_new_tokens=12, seed=4))
    assert all(one.finish == "stop" or len(one.ids) == 12 for one in group)
    finished = [sevens([one.ids[:-1]])[0] for one in group if one.finish == "stop"]
    assert finished == sorted(finished, reverse=True)
    assert best_of.tokens_drawn == sum(len(one.ids) for one in group)  # five samples, which differ


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
    assert report["beam"]["drawn_tokens"] > report["beam"]["new_tokens"] > 0
    assert report["sampled"]["drawn_tokens"] == 0 and "tokens drawn for each" in result.output


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
