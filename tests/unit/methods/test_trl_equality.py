"""Loss and gradient of our methods against those of TRL's own trainers, on the same tokens and weights, in float32.

TRL tokenizes, collates and computes its loss as it would in training. Our side takes the same tokens, log-probs from
the fused head, and the loss sums of the method divided by their counts.
"""

import copy

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from posttrain.config.schema import ModelConfig
from posttrain.methods import METHODS
from posttrain.methods.base import Scored
from posttrain.models.loading import load_policy
from posttrain.models.token_logps import prepare, token_logps
from posttrain.objectives.batch import PreferenceBatch, TokenBatch

ROWS = [
    {"prompt": "1+2=", "chosen": "3", "rejected": "12", "reference": "1+2=3"},
    {"prompt": "20+22=", "chosen": "42 or so", "rejected": "7", "reference": "42"},
    {"prompt": "9-4=", "chosen": "five", "rejected": "9 minus 4", "reference": "5."},
]


@pytest.fixture(scope="module")
def parts():
    """Policy, a reference that differs from it, tokenizer."""
    init = {"hidden_size": 16, "layers": 2, "heads": 2, "max_length": 64, "tokenizer": {"type": "characters"}}
    policy, tokenizer = load_policy(ModelConfig(init=init), seed=0)
    reference = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy, reference, tokenizer


def arguments(folder, **more):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(ROWS),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }


def value_and_gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(name, parameters, roles, parts):
    """Loss and gradients of our method for (ids, attention, mask) by role."""
    policy, reference = (copy.deepcopy(model) for model in parts[:2])
    method = METHODS[name](METHODS[name].Config(**parameters))
    responses = {}
    for model in (policy, reference):
        prepare(model)
    for role, (ids, attention, mask) in roles.items():
        mask = mask.bool()
        logps = token_logps(policy, ids, attention, mask)[0]
        ref = None
        if method.needs.reference:
            with torch.no_grad():
                ref = token_logps(reference, ids, attention, mask)[0]
        responses[role] = TokenBatch(mask=mask, logps=logps, ref_logps=ref)
    values = {"preference": torch.ones(len(ROWS))} if name == "cpl" else {}
    terms = method.loss(PreferenceBatch(responses, values)).values()
    return value_and_gradients(sum(term.value / term.count for term in terms), policy)


def assert_equal(found, expected):
    assert expected[0].abs() > 1e-3 and expected[1]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    largest = max(grad.abs().max() for grad in expected[1].values())
    assert largest > 1e-4
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=float(1e-5 * largest), msg=name)


def stacked(inputs, names):
    """Roles of a batch that holds them one after the other."""
    tensors = [inputs[key].chunk(len(names)) for key in ("input_ids", "attention_mask", "completion_mask")]
    return {name: tuple(tensor[i] for tensor in tensors) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("name", "parameters", "trl"),
    [
        ("dpo", {"beta": 0.3}, {"beta": 0.3}),
        ("dpo", {"loss": "robust", "label_smoothing": 0.2}, {"loss_type": "robust", "label_smoothing": 0.2}),
        ("dpo", {"loss": "hinge", "beta": 0.3}, {"loss_type": "hinge", "beta": 0.3}),
        ("dpo", {"loss": "ipo", "tau": 0.2, "per_token": True}, {"loss_type": "ipo", "beta": 0.2}),
        ("dpo", {"beta": 2.0, "per_token": True}, {"loss_type": "sigmoid_norm", "beta": 2.0}),
        ("dpo", {"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
        ("dpo", {"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
        (
            "dpo",
            {"divergence": "alpha", "alpha": 0.3},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},  # TRL's is 1 - alpha
        ),
        ("hypo", {"lam": 0.0, "beta": 0.3}, {"beta": 0.3}),
        ("curry_dpo", {"beta": 0.3}, {"beta": 0.3}),
        ("cpl", {"kl": True, "lam": 1.0, "alpha": 0.3}, {"beta": 0.3}),
    ],
)
def test_dpo_trainer(name, parameters, trl, parts, tmp_path):
    policy, reference, tokenizer = parts
    trainer = DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(**arguments(tmp_path, **trl)),
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS]),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = value_and_gradients(trainer._compute_loss(trainer.model, inputs, False), trainer.model)
    assert_equal(ours(name, parameters, stacked(inputs, ("chosen", "rejected")), parts), expected)


@pytest.mark.parametrize(
    ("name", "parameters", "trl"),
    [
        ("simpo", {"beta": 2.5, "gamma_beta_ratio": 0.55}, {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.375}),
        (
            "simpo",
            {"beta": 2.0, "gamma": 0.3, "label_smoothing": 0.1},
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.3, "label_smoothing": 0.1},
        ),
        (
            "simpo",
            {"beta": 2.0, "gamma": 0.3, "sft_weight": 1.0},
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.3, "cpo_alpha": 1.0},
        ),
        ("cpl", {"lam": 1.0, "alpha": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
        ("tpo", {"alpha": 0.0, "beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
    ],
)
def test_cpo_trainer(name, parameters, trl, parts, tmp_path):
    policy, _, tokenizer = parts
    trainer = CPOTrainer(
        model=copy.deepcopy(policy),
        args=CPOConfig(**arguments(tmp_path, **{"cpo_alpha": 0.0, **trl})),
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS]),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
    roles = {
        role: (inputs[f"{role}_input_ids"], inputs[f"{role}_attention_mask"], inputs[f"{role}_labels"] != -100)
        for role in ("chosen", "rejected")
    }
    assert_equal(ours(name, parameters, roles, parts), value_and_gradients(loss, trainer.model))


@pytest.mark.parametrize(
    ("parameters", "trl"),
    [
        ({"beta": 0.2, "alpha": 0.9}, {"beta": 0.2, "tpo_alpha": 0.9}),
        (
            {"variant": "tpo_l", "beta": 2.0, "gamma": 0.3, "alpha": 0.5},
            {"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 0.3, "tpo_alpha": 0.5},
        ),
    ],
)
def test_tpo_trainer(parameters, trl, parts, tmp_path):
    policy, _, tokenizer = parts
    trainer = TPOTrainer(
        model=copy.deepcopy(policy),
        args=TPOConfig(**arguments(tmp_path, **trl)),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = value_and_gradients(trainer._compute_loss(trainer.model, inputs, False), trainer.model)
    assert_equal(ours("tpo", parameters, stacked(inputs, ("chosen", "rejected", "gold")), parts), expected)


def test_orpo_trainer(parts, tmp_path):
    """Its likelihood is over prompt and response, ours over the response: the same where ours gets both."""
    policy, _, tokenizer = parts
    trainer = ORPOTrainer(
        model=copy.deepcopy(policy),
        args=ORPOConfig(**arguments(tmp_path, beta=0.4)),
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS]),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
    expected = value_and_gradients(loss, trainer.model)
    model = copy.deepcopy(policy)
    prepare(model)
    method, terms = METHODS["orpo"](METHODS["orpo"].Config(lam=0.4)), {}
    for term, whole in (("preference", False), ("nll", True)):
        responses = {}
        for role in ("chosen", "rejected"):
            ids, attention = inputs[f"{role}_input_ids"], inputs[f"{role}_attention_mask"]
            mask = attention.bool() if whole else inputs[f"{role}_labels"] != -100
            mask[:, 0] = False
            responses[role] = TokenBatch(mask=mask, logps=token_logps(model, ids, attention, mask)[0])
        terms[term] = method.loss(PreferenceBatch(responses))[term]
    assert_equal(value_and_gradients(sum(term.value / term.count for term in terms.values()), model), expected)


def test_kto_trainer(parts, tmp_path):
    """On one micro-batch, where TRL's reference point is that of the step, with TRL's mismatched rows."""
    policy, reference, tokenizer = parts
    labels = [True, False, True]
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    trainer = KTOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=KTOConfig(**arguments(tmp_path, beta=0.3, undesirable_weight=1.5, train_sampling_strategy="sequential")),
        train_dataset=Dataset.from_list([row | {"label": label} for row, label in zip(rows, labels, strict=True)]),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = value_and_gradients(trainer._compute_loss(trainer.model, inputs, False), trainer.model)
    ours, theirs = copy.deepcopy(policy), copy.deepcopy(reference)
    for model in (ours, theirs):
        prepare(model)

    def of(model, kind):
        mask = inputs[f"{kind}completion_mask"].bool()
        return mask, token_logps(model, inputs[f"{kind}input_ids"], inputs[f"{kind}attention_mask"], mask)[0]

    method = METHODS["kto"](METHODS["kto"].Config(beta=0.3, undesirable_weight=1.5))
    with torch.no_grad():
        method.observe(float(of(ours, "KL_")[1].sum() - of(theirs, "KL_")[1].sum()), len(ROWS))
        ref = of(theirs, "")[1]
    assert method.kl > 0
    mask, logps = of(ours, "")
    batch = PreferenceBatch({"completion": TokenBatch(mask=mask, logps=logps, ref_logps=ref)})
    batch.values["label"] = inputs["label"].float()
    (part,) = method.loss(batch).values()
    assert_equal(value_and_gradients(part.value / part.count, ours), expected)


@pytest.mark.parametrize(
    ("parameters", "trl"),
    [({"beta": 0.3}, {"beta": 0.3}), ({"loss": "ipo", "tau": 0.2}, {"beta": 0.2, "loss_type": "ipo"})],
)
def test_online_dpo_trainer(parameters, trl, parts, tmp_path, monkeypatch):
    """On the same two completions of each prompt and the same rewards, of which none are equal."""
    policy, reference, tokenizer = parts
    prompts, first, second, rewards = (
        ["1+2=", "3+4=", "9-4="],
        ["3", "12", "5"],
        ["12", "7", "9-4"],
        [1, 0, 2, 0.5, 3, 1],
    )

    def ids(texts):
        rows = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id)
        return padded, torch.stack([torch.arange(padded.size(1)) < len(row) for row in rows]).long()

    (asked, asked_mask), (written, written_mask) = ids(prompts * 2), ids(first + second)
    assert bool(asked_mask.all())
    trainer = OnlineDPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        reward_funcs=lambda completions, **_: rewards,
        args=OnlineDPOConfig(**arguments(tmp_path, max_length=32, max_new_tokens=8, **trl)),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    monkeypatch.setattr(trainer, "_generate", lambda *_: (asked, asked_mask, written, written_mask, None))
    loss = trainer.training_step(trainer.model, {"prompt": prompts})
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    ours, theirs = copy.deepcopy(policy), copy.deepcopy(reference)
    for model in (ours, theirs):
        prepare(model)
    rows = (torch.cat((asked, written), 1), torch.cat((asked_mask, written_mask), 1))
    mask = torch.cat((torch.zeros_like(asked_mask), written_mask), 1).bool()
    logps = token_logps(ours, *rows, mask)[0]
    with torch.no_grad():
        ref = token_logps(theirs, *rows, mask)[0]
    method = METHODS["online_dpo"](METHODS["online_dpo"].Config(**parameters))
    scored = Scored(
        rewards=torch.tensor(rewards),
        outcomes=torch.tensor(rewards),
        known=torch.ones(6, dtype=torch.bool),
        groups=torch.tensor([0, 1, 2] * 2),
        lengths=mask.sum(1),
        finished=torch.ones(6, dtype=torch.bool),
        max_new_tokens=8,
    )
    made = method.weigh(scored, logps.detach().sum(1), ref.sum(1))
    batch = TokenBatch(mask=mask, logps=logps, ref_logps=ref, advantages=made.advantages)
    (part,) = method.loss(batch).values()
    found = value_and_gradients(part.value / part.count, ours)[1]
    total, n = made.metrics["pairs/loss"]
    assert_equal((torch.tensor(total / n), found), (loss, expected))
