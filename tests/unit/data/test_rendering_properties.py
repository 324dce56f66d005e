"""What a row says reaches the tokens, and nothing else does: random rows, in tokenizers of each family."""

from __future__ import annotations

from functools import cache
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.rendering import Renderer
from posttrain.data.sample import Example, Problem

KINDS = ("byte_level", "byte_level_spaced", "sentencepiece", "metaspace", "characters")
MARKS = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = [
    "one",
    " two",
    "the",
    "  ",
    " ",
    "\n",
    "\n\n",
    "=",
    "a, b):",
    "<|im_end|>",
    "<|im_start|>user\n",
    "</s>",
    "<think>",
]
ASCII = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join)
ANY = st.lists(st.sampled_from([*WORDS, "é", "数", "😀", "\t"]), min_size=1, max_size=6).map("".join)


@pytest.fixture(scope="module")
def renderer_of(family_tokenizer):
    @cache
    def make(kind: str) -> Renderer:
        return Renderer(family_tokenizer(kind, MARKS, bos="<s>", eos="</s>", template=CHATML))

    return make


def said(text: str) -> bool:
    return bool(text.strip())


@pytest.mark.parametrize("rows", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_spans_are_the_assistant_turns(renderer_of, kind, rows):
    renderer, content = renderer_of(kind), (ASCII if kind == "characters" else ANY).filter(said)

    @settings(max_examples=rows, deadline=None, database=None)
    @given(
        system=st.none() | content, turns=st.lists(st.tuples(content, content, st.booleans()), min_size=1, max_size=3)
    )
    def check(system, turns):
        turns = [*turns[:-1], (*turns[-1][:2], True)]
        prompt = [] if system is None else [{"role": "system", "content": system}]
        later = []
        for question, answer, loss in turns:
            later.append({"role": "user", "content": question})
            later.append({"role": "assistant", "content": answer} | ({} if loss else {"weight": 0}))
        sample = renderer.sample(Example(Problem("p", (*prompt, later[0])), tuple(later[1:])))
        runs = [list(run) for on, run in groupby(zip(sample.ids, sample.loss_mask, strict=True), lambda x: x[1]) if on]
        found = [[token for token, _ in run] for run in runs]
        assert [renderer.text(ids) for ids in found] == [answer for _, answer, loss in turns if loss]
        ends = [place for place, token in enumerate(sample.ids) if token in renderer.stop_ids]
        assert len(ends) == len(prompt) + len(later) and ends[-1] == len(sample.ids) - 1
        assert all(ids[-1] in renderer.stop_ids for ids in found)
        # The whole is the rendering, and the prompt is the one of rollouts.
        messages = [*prompt, *later]
        whole = "".join(f"<|im_start|>{row['role']}\n{row['content']}<|im_end|>\n" for row in messages)
        if kind not in ("sentencepiece", "byte_level_spaced"):  # which put a space behind each special token
            assert renderer.encoder.pieces(sample.ids, [0] * len(sample.ids))[0][0] == whole.removesuffix("\n")
        if turns[0][2]:  # a reply that is context may share a token with the prompt before it
            prompt_ids = renderer.prompt_ids(Problem("p", (*prompt, later[0])))
            assert sample.ids[: len(prompt_ids)] == prompt_ids

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_completion_is_joined_without_a_space(renderer_of, kind):
    renderer = renderer_of(kind)
    words = [word for word in WORDS if not word.startswith(("<|", "</s"))]
    text = st.lists(st.sampled_from(words), min_size=1, max_size=6).map("".join).filter(said)

    @settings(max_examples=60, deadline=None, database=None)
    @given(prompt=text, completion=text)
    def check(prompt, completion):
        sample = renderer.sample(Example(Problem("p", prompt, chat=False), completion))
        trained = sample.ids[sample.prompt_length :]
        assert renderer.text(trained) == completion and trained[-1] == renderer.tokenizer.eos_token_id
        shown = renderer.encoder.pieces(sample.ids, sample.loss_mask)
        whole = renderer.tokenizer.decode(sample.ids)
        assert "".join(piece for piece, _ in shown) == whole
        # What a tokenizer takes away or puts in front of the whole stands before the prompt, not before the completion.
        assert whole.endswith(prompt.lstrip(" ") + completion + "</s>")

    check()


def test_code_goes_on_where_the_prompt_ends(renderer_of):
    for kind in ("sentencepiece", "metaspace", "byte_level_spaced"):
        renderer = renderer_of(kind)
        problem = Problem("p", "def add(", chat=False)
        sample = renderer.sample(Example(problem, "a, b):\n    return a + b"))
        whole = renderer.tokenizer.decode(sample.ids).lstrip(" ")
        assert whole == "def add(a, b):\n    return a + b</s>"
        # A rollout is given to a verifier as it stands, its first spaces included.
        assert renderer.text(renderer.encoder.behind("    return a")) == "    return a"
