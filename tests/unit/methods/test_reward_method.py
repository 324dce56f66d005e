"""The method `reward`: against TRL's RewardTrainer, and what it refuses."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from posttrain.config.schema import ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Preference, Problem
from posttrain.errors import DataError
from posttrain.methods.reward import Reward
from posttrain.models.collate import collate
from posttrain.models.loading import load_classifier
from posttrain.objectives.batch import PreferenceBatch, TokenBatch

ROWS = [
    {"prompt": "1+2=", "chosen": "3", "rejected": "12", "margin": 0.5},
    {"prompt": "20+22=", "chosen": "42 or so", "rejected": "7", "margin": 1.0},
    {"prompt": "9-4=", "chosen": "five", "rejected": "9 minus 4", "margin": 0.0},
]


def row(number=0, **meta):
    given = ROWS[number]
    problem = Problem(f"pairs/{number}", given["prompt"], meta=meta, where=f"pairs.jsonl:{number + 1}", chat=False)
    return Preference(problem, given["chosen"], given["rejected"])


@pytest.fixture(scope="module")
def classifier():
    init = {"hidden_size": 16, "layers": 2, "heads": 2, "max_length": 64, "tokenizer": {"type": "characters"}}
    model, tokenizer = load_classifier(ModelConfig(init=init), seed=0)
    with torch.no_grad():
        model.score.weight.mul_(20)  # so that scores are far enough apart
    return model, tokenizer


@pytest.mark.parametrize(
    ("parameters", "columns", "trl"),
    [
        ({}, [], {}),
        ({"margin": "margin"}, ["margin"], {}),
        ({"center_rewards_coefficient": 0.1}, [], {"center_rewards_coefficient": 0.1}),
    ],
    ids=["plain", "margin", "centre"],
)
def test_loss_and_gradient_equal_those_of_trl(parameters, columns, trl, classifier, tmp_path):
    model, tokenizer = classifier
    theirs = copy.deepcopy(model)
    data = Dataset.from_list([{k: r[k] for k in ("prompt", "chosen", "rejected", *columns)} for r in ROWS])
    arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": len(ROWS), "report_to": []}
    quiet = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    trainer = RewardTrainer(
        model=theirs, args=RewardConfig(**arguments, **quiet, **trl), train_dataset=data, processing_class=tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    theirs.eval()
    expected = trainer.compute_loss(theirs, batch)
    expected.backward()

    method, renderer = Reward(Reward.Config(**parameters)), Renderer(tokenizer)
    rows = [row(number, margin=ROWS[number]["margin"]) for number in range(len(ROWS))]
    samples = [method.responses(one, renderer) for one in rows]
    tensors = collate([one[role] for role in ("chosen", "rejected") for one in samples], tokenizer.pad_token_id)
    mine = copy.deepcopy(model).eval()
    scores = mine(input_ids=tensors["ids"], attention_mask=tensors["attention_mask"]).logits[:, 0].chunk(2)
    masks = tensors["mask"].chunk(2)
    responses = {role: TokenBatch(masks[i], scores=scores[i]) for i, role in enumerate(("chosen", "rejected"))}
    values = [method.values(one) for one in rows]
    values = {name: torch.tensor([one[name] for one in values]) for name in values[0]}
    (part,) = method.loss(PreferenceBatch(responses, values)).values()
    found = part.value / part.count
    found.backward()

    assert [sample["chosen"].ids for sample in samples] == list(trainer.train_dataset["chosen_ids"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    assert largest > 1e-3
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=float(1e-6 * largest), msg=name)


def test_metrics_and_ties():
    method = Reward(Reward.Config())
    mask = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 1, 1]]).bool()
    chosen = TokenBatch(mask, scores=torch.tensor([1.0, 0.5, -1.0]))
    rejected = TokenBatch(mask.flip(1).roll(1, 1), scores=torch.tensor([0.0, 0.5, 1.0]))
    (part,) = method.loss(PreferenceBatch({"chosen": chosen, "rejected": rejected})).values()
    found = {name: float(total / n) for name, (total, n) in part.diagnostics.items()}
    assert found["pairs/accuracy"] == pytest.approx(1 / 3) and found["pairs/ties"] == pytest.approx(1 / 3)
    assert found["pairs/margin"] == pytest.approx(-1 / 3)
    assert "pairs/logps_chosen" not in found


def test_a_row_with_an_empty_response_is_not_counted():
    method = Reward(Reward.Config())
    mask = torch.tensor([[0, 1], [0, 0]]).bool()
    scores = torch.tensor([0.3, 9.0], requires_grad=True)
    rows = PreferenceBatch(
        {role: TokenBatch(mask, scores=scores * (role == "chosen")) for role in ("chosen", "rejected")}
    )
    (part,) = method.loss(rows).values()
    part.value.backward()
    assert float(part.count) == float(method.counts(rows)["preference"]) == 1
    assert scores.grad[1] == 0 and scores.grad[0] != 0


def test_scores_of_another_shape_are_a_defect():
    with pytest.raises(ValueError, match="scores have shape"):
        TokenBatch(torch.ones(2, 3, dtype=torch.bool), scores=torch.zeros(3))


@pytest.mark.parametrize(("meta", "said"), [({}, "no column 'gap'"), ({"gap": "wide"}, "finite number")])
def test_a_margin_must_be_in_every_row(meta, said):
    method = Reward(Reward.Config(margin="gap"))
    with pytest.raises(DataError, match=said) as caught:
        method.prepare([row(0, gap=1.0), row(1, **meta)])
    assert "pairs.jsonl:2" in caught.value.where


def test_it_needs_pairs_and_nothing_else():
    needs = Reward(Reward.Config()).needs
    assert needs.data == ("preferences",) and needs.classifier
    off = {f.name for f in dataclasses.fields(needs) if getattr(needs, f.name) is True} - {"classifier"}
    assert not off
