"""From a recipe to a reward model that others load: rendering, loading, saving, what is refused."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.config.preflight import check_needs
from posttrain.config.schema import ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Problem
from posttrain.errors import ModelError, NeedsError
from posttrain.methods.reward import Reward
from posttrain.models.loading import load_classifier, load_policy
from posttrain.trainers.run import train
from posttrain.verifiers.reward_model import RewardModelVerifier
from posttrain.verifiers.verdict import Answer

REWARD = {"name": "reward"}
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
INIT = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 64, "tokenizer": {"type": "characters"}}


def verifier(folder):
    return RewardModelVerifier(RewardModelVerifier.Config(type="reward_model", path=str(folder), transform="none"))


def output(folder, ids):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


def test_the_verifier_loads_it_and_scores_what_was_trained_on(load, tmp_path):
    result = train(load(REWARD, {"training.max_steps": 30}))
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    judge = verifier(result.model_dir)
    right = 0
    for row in rows[:8]:
        problem = Problem("p", row["prompt"], chat=False)
        good, bad = judge.verify([problem] * 2, [Answer(row["chosen"]), Answer(row["rejected"])])
        sample = Renderer(tokenizer).conversation(Example(problem, row["chosen"]))
        assert sample.ids[-1] == tokenizer.eos_token_id
        assert good.score == pytest.approx(output(result.model_dir, sample.ids), abs=1e-5)
        right += good.score > bad.score
    assert right >= 7  # the rejected ones all end alike
    last = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["pairs/accuracy"] > 0.9 and last["loss"] < math.log(2)


def test_a_model_from_scratch_trains_too(load):
    changes = {"model": {"init": INIT}, "training.max_steps": 2}
    result = train(load(REWARD, changes))
    assert AutoModelForSequenceClassification.from_pretrained(result.model_dir).config.num_labels == 1


def test_a_reward_model_is_trained_on(load, tmp_path):
    first = train(load(REWARD, {"output": str(tmp_path / "first")}))
    model, tokenizer = load_classifier(ModelConfig(path=str(first.model_dir)), seed=7)
    saved = AutoModelForSequenceClassification.from_pretrained(first.model_dir)
    assert torch.equal(model.score.weight, saved.score.weight)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_head_follows_from_the_seed_alone(tiny_model):
    config = ModelConfig(path=str(tiny_model))
    heads = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(heads))
        heads.append(load_classifier(config, seed=seed)[0].score.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("eos_token + ", "")], ids=["end token", "none"])
def test_a_chat_is_read_as_the_template_has_it(template, tmp_path):
    model, tokenizer = load_classifier(ModelConfig(init=INIT), seed=0)
    tokenizer.chat_template = template
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    problem = Problem("p", "what is 1+1?")
    sample = Renderer(tokenizer).conversation(Example(problem, "2"))
    messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": "2"}]
    assert sample.ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert len(sample.loss_mask) == len(sample.ids) and 1 in sample.loss_mask
    (found,) = verifier(tmp_path).verify([problem], [Answer("2")])
    assert found.score == pytest.approx(output(tmp_path, sample.ids), abs=1e-5)


def test_text_without_a_chat_stays_text_for_whoever_loads_it(load, tiny_model, tmp_path):
    """A tokenizer with a template, and a recipe with `chat: false`: the trained folder has no template."""
    model, _ = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    result = train(load(REWARD, {"model.path": str(tmp_path / "chat"), "training.max_steps": 1}))
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template is None


def test_two_outputs_are_refused(tiny_model, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="2 outputs"):
        load_classifier(ModelConfig(path=str(tmp_path)), seed=0)


def test_a_folder_without_a_backbone_is_refused(tiny_model, tmp_path):
    model, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), seed=0)
    tokenizer.save_pretrained(tmp_path)
    kept = {name: value for name, value in model.state_dict().items() if "layers.1." not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ModelError, match="lacks weights of its backbone: model.layers.1"):
        load_classifier(ModelConfig(path=str(tmp_path)), seed=0)


def test_an_evaluation_of_answers_is_refused(load):
    recipe = load(REWARD, {"evaluation": {"benchmarks": ["chain-sum-3"], "every": 2}})
    with pytest.raises(NeedsError, match="writes no answers") as caught:
        check_needs(recipe, Reward(recipe.method).needs, "reward")
    assert "evaluation" in caught.value.where
