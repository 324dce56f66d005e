"""A reward model, tiny and with random weights, but real."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.errors import ModelError
from posttrain.verifiers.exact import ExactVerifier
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.reward_model import RewardModelVerifier
from posttrain.verifiers.verdict import Answer


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A one-output classifier on the backbone of the tiny model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tmp_path_factory.mktemp("reward")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():  # so that scores are far enough apart
        model.score.weight.mul_(50)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def verifier(folder, **changes) -> RewardModelVerifier:
    return RewardModelVerifier(RewardModelVerifier.Config(type="reward_model", path=str(folder), **changes))


def verify(one: RewardModelVerifier, texts: list[str], prompt="1+1="):
    return one.verify([Problem("p", prompt)] * len(texts), [Answer(text) for text in texts])


def alone(folder, text: str) -> float:
    """The classifier's output on one sequence without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item()


TEXTS = ["2", "3;4;5;6;7", "", "1+1=2#2", "2"]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_do_not_depend_on_the_batch(folder, batch_size: int) -> None:
    found = verify(verifier(folder, transform="none", batch_size=batch_size), TEXTS)
    assert [v.score for v in found] == pytest.approx([alone(folder, f"1+1={text}<eos>") for text in TEXTS], abs=1e-4)
    assert [v.status == "correct" for v in found] == [v.score > 0 for v in found]


def test_sigmoid_and_threshold(folder) -> None:
    raw = [v.score for v in verify(verifier(folder, transform="none"), TEXTS)]
    found = verify(verifier(folder, threshold=sorted(raw)[2]), TEXTS)
    assert [v.score for v in found] == pytest.approx([1 / (1 + math.exp(-value)) for value in raw])
    assert [v.status == "correct" for v in found] == [value > sorted(raw)[2] for value in raw]


def test_long_sequences_lose_their_beginning(folder) -> None:
    one = verifier(folder, max_length=8, transform="none")
    long, short = verify(one, ["9" * 50 + "1+1=2#2+", "9" * 90 + "1+1=2#2+"])
    assert long.score == pytest.approx(short.score) and "cut from" in long.detail


def test_it_draws_no_random_numbers(folder) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    verify(verifier(folder), TEXTS)
    assert torch.equal(torch.get_rng_state(), state)


def test_outcome_or_shaping_beside_another(folder) -> None:
    pool = VerifierPoolConfig(workers=0)
    section = {"type": "reward_model", "path": str(folder), "weight": 0.5}
    judge = build_judge([RewardModelVerifier.Config(**section)], pool)
    (judgement,) = judge.judge([Problem("p", "1+1=")], ["2"])
    assert judgement.outcome == judgement.verdicts["reward_model"].score == judgement.reward / 0.5
    judge.close()
    judge = build_judge(
        [RewardModelVerifier.Config(**section, outcome=False), ExactVerifier.Config(type="exact")], pool
    )
    (judgement,) = judge.judge([Problem("p", "1+1=", "2")], ["2"])
    assert list(judgement.verdicts) == ["exact", "reward_model"] and judgement.outcome == 1.0
    judge.close()


def test_chat_messages_go_through_the_template(folder, tmp_path) -> None:
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0:0] }}#{{ m['content'] }};{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    one = verifier(tmp_path / "chat", transform="none")
    messages = ({"role": "user", "content": "1+1="},)
    (found,) = verify(one, ["2"], messages)
    assert found.score == pytest.approx(alone(folder, "#1+1=;#2;"), abs=1e-4)
    assert verify(one, ["2"]) == [found]


def test_a_language_model_is_no_reward_model(tiny_model) -> None:
    with pytest.raises(ModelError, match="no trained sequence classifier") as caught:
        verify(verifier(tiny_model), ["2"])
    assert "score" in caught.value.what


def test_two_outputs_are_no_reward(tiny_model, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="2 outputs"):
        verify(verifier(tmp_path), ["2"])


def test_a_folder_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        verify(verifier(tmp_path / "none"), ["2"])


def test_an_output_that_is_not_finite_is_a_crash(folder) -> None:
    one = verifier(folder)
    verify(one, ["2"])
    with torch.no_grad():
        one._loaded[0].score.weight.fill_(float("nan"))
    assert verify(one, ["2"])[0].status == "crash"
