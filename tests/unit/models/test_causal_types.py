"""Every causal type that transformers can build tiny is scored, sampled from and saved rightly, or refused.

The tables of `config.model_types`, which `posttrain check` reads, are compared with what is found.
"""

import copy

import pytest
import torch

from posttrain.config import model_types
from posttrain.errors import ModelError
from posttrain.models import token_logps
from posttrain.models.proof import prove_scoring
from posttrain.models.router_proof import prove_router_loss
from posttrain.rollouts.texts import read_texts, sampling_way

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 30, 31, 0, 0], [13, 14, 15, 16, 17, 0, 0, 0]])
LENGTHS = [8, 6, 5]
ATTENDING = (IDS != 0).long()
MASK = (ATTENDING * torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])).float()
AT_LEAST = 160
"""Types that are covered; fewer are a fault of the rules that make models small, or of another transformers."""

covered: dict[str, str] = {}


def types(small_causal):
    return [name for name in small_causal.TYPES if name not in small_causal.NOT_BUILT]


def own(model, ids):
    row = torch.tensor([ids])
    return model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0].float().log_softmax(-1)


def check_scores(model):
    """Log-probs and gradients of all parameters, of padded rows that share a beginning."""
    plain = copy.deepcopy(model)
    token_logps.prepare(model)
    found = token_logps.token_logps(model, IDS, ATTENDING, MASK).logps[MASK.bool()]
    rows = zip(IDS.tolist(), LENGTHS, strict=True)
    expected = torch.cat(
        [own(plain, row[:n])[3:-1].gather(-1, torch.tensor(row[4:n])[:, None]).squeeze(-1) for row, n in rows]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 2, len(expected))
    for logps in (expected, found):
        (logps * weights).sum().backward()
    theirs, ours = ({n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (plain, model))
    scale = max(grad.abs().max() for grad in theirs.values())
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=float(1e-4 * scale), msg=name)
    return expected


def check_router(model):
    """The table says whether routers have a load-balancing loss, which ours is then."""
    model, kind = copy.deepcopy(model), model.config.get_text_config().model_type
    token_logps.prepare(model)
    try:
        prove_router_loss(model)
        assert kind in model_types.BALANCED, "its load-balancing loss is not in the table"
    except ModelError as error:
        assert kind not in model_types.BALANCED, error


@torch.no_grad()
def check_sampling(model):
    """Greedy tokens of two prompts, copied and chosen from, against reading every text from its beginning."""
    way = sampling_way(model, 0)
    prompts = [[5, 6, 7, 8, 9], [12, 13, 14] + ([15, 16] if way == "equal" else [])]
    texts, rows = read_texts(model, prompts, 0, way), [list(prompts[0]), list(prompts[1]), list(prompts[1])]
    texts.select(torch.tensor([0, 1, 1]))
    for _ in range(3):
        expected = torch.stack([own(model, row)[-1] for row in rows])
        torch.testing.assert_close(texts.logits.float().log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
        tokens = expected[:, 4:].argmax(-1) + 4  # no special token, which some types see as padding
        rows = [row + [token] for row, token in zip(rows, tokens.tolist(), strict=True)]
        texts.advance(tokens)
    return way


@torch.no_grad()
def check_saved(model, folder):
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()  # the text part of a wrapper is not every time an auto class
    torch.testing.assert_close(own(again, [5, 6, 7, 8]), own(model, [5, 6, 7, 8]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", range(8))
def test_a_type_is_right_or_refused(small_causal, part, tmp_path):
    wrong = []
    for name in types(small_causal)[part::8]:
        model = small_causal.build(name)
        kind = model.config.model_type
        if kind in covered:
            covered[name] = covered[kind]
            continue
        try:
            found = prove_scoring(model)
        except ModelError as error:
            covered[name] = "refused"
            if kind not in model_types.REFUSED:
                wrong.append(f"{name}: {error}")
            continue
        tables = kind in model_types.WHOLE_LOGITS, kind in model_types.SHAREABLE
        dropout = "dropout" in found.why  # GPT-2 has some by default
        if kind in model_types.REFUSED or tables != (found.way == "logits", found.way == "packed" or dropout):
            wrong.append(f"{name}: scored by {found.way}, the tables say {tables}")
        try:
            check_scores(copy.deepcopy(model))
            way = check_sampling(model)
            check_router(model)
            listed = kind in model_types.EQUAL_LENGTHS, kind in model_types.READ_AGAIN
            if listed != (way == "equal", way == "whole"):
                wrong.append(f"{name}: sampled {way}, the tables say {listed}")
            check_saved(model, tmp_path / name)
        except (AssertionError, ModelError, RuntimeError, ValueError) as error:
            wrong.append(f"{name}: {type(error).__name__} {str(error)[:300]}")
        covered[name] = covered[kind] = found.way
    assert not wrong, "\n".join(wrong)


def test_enough_types_are_covered(small_causal):
    """How many types there are, how many are built, and why the others are not; the parts above go through all."""
    built = types(small_causal)
    print(f"{len(built)} of {len(small_causal.TYPES)} causal types are built tiny")
    assert len(built) >= AT_LEAST
    assert set(small_causal.NOT_BUILT) <= set(small_causal.TYPES) and all(small_causal.NOT_BUILT.values())


def test_the_tables_name_types_that_there_are(small_causal):
    known = {small_causal.small_config(name).get_text_config().model_type for name in types(small_causal)}
    known |= set(small_causal.TYPES)
    for table in ("SHAREABLE", "WHOLE_LOGITS", "EQUAL_LENGTHS", "READ_AGAIN", "REFUSED", "BALANCED"):
        assert getattr(model_types, table) <= known, table


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama"}, []),
        ({"model_type": "recurrent_gemma"}, ["whole logits", "reads every row again"]),
        ({"model_type": "bart"}, ["equal length"]),
        ({"model_type": "mixtral", "router_aux_loss_coef": 0.001}, ["model.router_loss: 0.001 adds it"]),
        ({"model_type": "mixtral", "router_aux_loss_coef": 0.001, "output_router_logits": True}, []),
        ({"model_type": "llama4", "text_config": {"router_aux_loss_coef": 0.001}}, ["load-balancing loss"]),
    ],
)
def test_what_check_says(config, said):
    notes = model_types.forward_notes(config, classifier=False, samples=True)
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))


def test_check_refuses_what_a_run_refuses():
    with pytest.raises(ModelError, match="no causal language models"):
        model_types.forward_notes({"model_type": "xlnet"}, classifier=False, samples=False)
    with pytest.raises(ModelError, match="is_decoder"):
        model_types.forward_notes({"model_type": "bert"}, classifier=False, samples=False)
    assert model_types.forward_notes({"model_type": "bert"}, classifier=True, samples=False) == []
