"""`check` counts the tokens of few prompts, and says of all what a run would say."""

from __future__ import annotations

import pytest

from posttrain.config.schema import TokenizerInit
from posttrain.data import few_prompts
from posttrain.data.bad_rows import BadRows
from posttrain.data.few_prompts import UNREAD
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.truncation import fit_prompts
from posttrain.models.tokenizer import build_tokenizer

LIMIT = 60
TEMPLATE = "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}<bos>"
TEXTS = ["2 + 2", *("a sum of one and two " * n for n in range(1, 40)), *("\u00fc" * n for n in (5, 20, 40))]


@pytest.fixture
def tokenizer():
    made = build_tokenizer(TokenizerInit(type="bpe", vocab_size=300), TEXTS[:40])
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(autouse=True)
def five(monkeypatch):
    monkeypatch.setattr(few_prompts, "FEW", 5)


def fitted(renderer, bad, chat):
    problems = [Problem(str(number), text, chat=chat, where=f"row {number}") for number, text in enumerate(TEXTS)]
    if renderer.counts_few:
        prompts = few_prompts.few_prompts(problems, renderer, LIMIT, bad, "prompts")
    else:
        prompts = bad.made(problems, lambda problem: (problem, renderer.prompt_ids(problem)), "prompts")
    return fit_prompts(prompts, LIMIT, max_lost_share=1.0, ledger=bad.ledger("prompts"))


@pytest.mark.parametrize("chat", [True, False])
def test_what_fits_is_what_a_run_finds(tokenizer, chat):
    (few, said), (every, known) = (fitted(Renderer(tokenizer, count_few=c), BadRows(), chat) for c in (True, False))
    assert [problem.id for problem, _ in few] == [problem.id for problem, _ in every]
    assert (said.kept, said.dropped) == (known.kept, known.dropped) and known.dropped > 3 and known.kept > 3
    assert {"41", "42"} & {problem.id for problem, _ in every} != {"41", "42"}  # by characters one more would fit
    unread = [problem.id for problem, ids in few if ids is UNREAD]
    assert unread and "0" not in unread  # the first is shown
    assert all(ids in (UNREAD, real) for (_, ids), (_, real) in zip(few, every, strict=True))
    assert f"tokens were counted of {len(TEXTS) - len(unread)} prompts" in said.lines()[-1]


def test_what_a_row_is_refused_for_is_found_without_its_ids(tokenizer):
    """A row that begins with two BOS tokens."""
    texts = [*TEXTS[:20], 2 * tokenizer.bos_token + "1", "2 + 3"]
    problems = [Problem(str(number), text, chat=False, where=f"row {number}") for number, text in enumerate(texts)]
    found = {}
    for few in (True, False):
        bad, renderer = BadRows(), Renderer(tokenizer, count_few=few)
        if few:
            few_prompts.few_prompts(problems, renderer, None, bad, "prompts")
        else:
            bad.made(problems, renderer.prompt_ids, "prompts")
        found[few] = bad.ledger("prompts").bad
    assert found[True] == found[False] and sum(found[True].values()) == 1


def test_other_vocabularies_are_counted_whole():
    characters = build_tokenizer(TokenizerInit(type="characters"), None)
    assert not Renderer(characters, count_few=True).counts_few
    rewriting = build_tokenizer(TokenizerInit(type="bpe", vocab_size=300), TEXTS[:40])
    assert Renderer(rewriting, count_few=True).counts_few
    from tokenizers import normalizers

    rewriting.backend_tokenizer.normalizer = normalizers.NFKC()  # one character may become eighteen
    assert not Renderer(rewriting, count_few=True).counts_few
