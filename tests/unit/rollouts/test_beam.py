"""Beam search against enumeration, against transformers' own, and on tables small enough to do by hand."""

import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.errors import EngineError
from posttrain.rollouts.beam import Extensions, beam_search
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.transformers_engine import TransformersEngine

VOCABULARY, STOP, LONGEST = 5, 2, 3
PROMPTS = [[3, 4, 1], [1], [4, 4, 3, 1, 3, 3]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    config = LlamaConfig(
        **shape, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=STOP
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # far from uniform, so that choices matter
    return model.eval()


def engine(model, max_batch=1024, **keys):
    return TransformersEngine(model, stop_ids=[STOP], pad_id=0, max_batch=max_batch, **keys)


def log_prob(model, prompt, completion):
    with torch.no_grad():
        logps = (
            model(torch.tensor([prompt + list(completion)])).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        )
    return sum(float(logps[place, token]) for place, token in enumerate(completion))


def all_completions():
    """Every token sequence that ends at its first stop token or at the limit."""
    for length in range(1, LONGEST + 1):
        for ids in itertools.product(range(VOCABULARY), repeat=length):
            if STOP not in ids[:-1] and (ids[-1] == STOP or length == LONGEST):
                yield ids


@pytest.mark.parametrize("n", [1, 7])
def test_a_search_as_wide_as_the_space_finds_the_best_of_all(model, n):
    width = VOCABULARY**LONGEST
    found = engine(model).generate(PROMPTS, Sampling(n=n, beams=width, max_new_tokens=LONGEST))
    for prompt, completions in zip(PROMPTS, found, strict=True):
        everything = sorted(all_completions(), key=lambda ids: -log_prob(model, prompt, ids))
        assert [tuple(completion.ids) for completion in completions] == everything[:n]
        for completion in completions:
            assert sum(completion.logps) == pytest.approx(log_prob(model, prompt, completion.ids), abs=1e-5)
            assert completion.finish == ("stop" if completion.ids[-1] == STOP else "length")


@pytest.mark.parametrize("width", [2, 3, 5])
def test_narrow_searches_are_those_of_transformers_without_a_length_penalty(model, width):
    found = engine(model).generate(PROMPTS, Sampling(n=2, beams=width, max_new_tokens=8))
    for prompt, completions in zip(PROMPTS, found, strict=True):
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            num_beams=width,
            num_return_sequences=2,
            do_sample=False,
            length_penalty=0.0,
            early_stopping="never",
        )
        theirs = [row[len(prompt) :].tolist() for row in output]
        theirs = [ids[: ids.index(STOP) + 1] if STOP in ids else ids for ids in theirs]
        assert [completion.ids for completion in completions] == theirs


def test_a_wider_search_never_finds_less(model):
    best = [
        [sum(c.logps) for (c,) in engine(model).generate(PROMPTS, Sampling(beams=width, max_new_tokens=4))]
        for width in (2, 5, 25, VOCABULARY**4)
    ]
    exact = best[-1]
    assert all(found <= limit + 1e-6 for row in best for found, limit in zip(row, exact, strict=True))
    greedy = [sum(c.logps) for (c,) in engine(model).generate(PROMPTS, Sampling(greedy=True, max_new_tokens=4))]
    assert any(wide > first + 1e-3 for wide, first in zip(exact, greedy, strict=True)), "no prompt tells them apart"


@pytest.mark.parametrize("max_batch", [3, 4, 7, 64])
def test_a_search_does_not_depend_on_the_batch_nor_on_the_seed(model, max_batch):
    expected = engine(model).generate(PROMPTS, Sampling(n=2, beams=3, max_new_tokens=8))
    found = engine(model, max_batch).generate(PROMPTS, Sampling(n=2, beams=3, max_new_tokens=8, seed=9))
    assert [[c.ids for c in group] for group in found] == [[c.ids for c in group] for group in expected]


def table_search(first, second, **keys):
    """A search over two tokens whose distributions are given: `first` (V,), and `second[a]` (V,) after token a."""
    last = [0]

    def advance(rows, tokens):
        last[0] += 1
        return torch.tensor([second[token] for token in tokens], dtype=torch.float64).log()

    logits = torch.tensor([first], dtype=torch.float64).log()
    (beams,) = beam_search([[0]], logits, advance, max_new_tokens=2, stop_ids=[], **keys)
    assert last[0] == 1
    return beams


def test_two_beams_find_what_greedy_misses():
    first, second = [0.6, 0.4], [[0.5, 0.5], [0.9, 0.1]]
    (narrow,) = table_search(first, second, width=1, n=1)
    (wide,) = table_search(first, second, width=2, n=1)
    assert narrow.score == pytest.approx(-1.203972804326, abs=1e-12)
    assert (wide.ids, wide.score) == ((1, 0), pytest.approx(-1.021651247532, abs=1e-12))


class Values:
    """A scorer that likes token 1, whatever the policy thinks of it."""

    falls = False

    def __call__(self, extensions: Extensions) -> torch.Tensor:
        assert extensions.prompts == [[0]] and extensions.tokens.shape == extensions.totals.shape
        before = torch.tensor([beam.ids.count(1) for beam in extensions.beams], dtype=torch.float64)
        return before.unsqueeze(1) + (extensions.tokens == 1).double()


def test_a_scorer_of_ones_own_decides_what_is_kept():
    first, second = [0.9, 0.1], [[0.9, 0.1], [0.9, 0.1]]
    (found,) = table_search(first, second, width=2, n=1, scorer=Values())
    assert (found.ids, found.score) == ((1, 1), 2.0)
    assert sum(found.logps) == pytest.approx(math.log(0.1 * 0.1))


def test_the_engine_takes_a_scorer(model):
    class ShortFirst:
        falls = True

        def __call__(self, extensions: Extensions) -> torch.Tensor:
            lengths = torch.tensor([float(len(beam.ids) + 1) for beam in extensions.beams], dtype=torch.float64)
            return extensions.totals / 1e6 - lengths.unsqueeze(1)

    found = engine(model, scorer=ShortFirst()).generate(PROMPTS, Sampling(beams=VOCABULARY, max_new_tokens=6))
    assert [completion.ids for (completion,) in found] == [[STOP]] * len(PROMPTS)


@pytest.mark.parametrize(
    ("sampling", "max_batch"), [(Sampling(n=3, beams=2, max_new_tokens=4), 8), (Sampling(beams=4, max_new_tokens=4), 3)]
)
def test_searches_that_cannot_be_made_are_refused(model, sampling, max_batch):
    with pytest.raises(EngineError, match="beam search of width"):
        engine(model, max_batch).generate([[1]], sampling)


def test_more_completions_than_there_are_is_an_error(model):
    with pytest.raises(EngineError, match="only 5 completions"):
        engine(model).generate([[1]], Sampling(n=6, beams=6, max_new_tokens=1))
