"""Random conversations: what is trained on is what the assistant said, and every row read is kept, cut or dropped."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.config.needs import Needs
from posttrain.config.schema import DataConfig, FileSource, ModelConfig, Recipe
from posttrain.data.bad_rows import BadRows
from posttrain.data.preparation import fit_rows, load_rows
from posttrain.data.rendering import Renderer

ROWS, LISTS = 35, 10
"""Rows of one example, and examples per tokenizer family: 2,100 rows over the six of them; if slow, 2,030 each."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<unk>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "def add(a, b): return a + b", "Grüße, 東京! 1 + 2 = 3"] * 3


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=MARKS, initial_alphabet=sorted(alphabet))
    )
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Spaces as marks within pieces, and bytes for characters that the vocabulary lacks; as Llama 2 has it."""
    pieces = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def word_pieces() -> Tokenizer:
    """Words, or pieces of them that begin with `##`; spaces are not kept."""
    letters = sorted({c for text in (*CORPUS, *WORDS) for c in text if not c.isspace()})
    pieces = [*MARKS, *letters, *(f"##{c}" for c in letters), "the", "##ing", "quick"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


WORDS = [
    "the",
    "quick",
    "Grüße",
    "東京",
    "a+b",
    "def",
    "add(a,",
    "b):",
    "1",
    "<",
    "|im_end",
    "e\u0301",
    "😀",
    "'tis",
    "##x",
]
SPACED = ("byte_level_spaced", "sentencepiece", "metaspace")
"""Families that put a space in front of a text, of the kinds of `family_tokenizer`."""

FAMILIES = {"byte level": byte_level, "sentencepiece-like": sentencepiece_like, "word pieces": word_pieces}


def renderer(family: str) -> Renderer:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=FAMILIES[family](), eos_token="<|im_end|>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return Renderer(tokenizer)


said = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
answer = st.one_of(said, said, said, said.map(lambda text: f" {text}\n\n{text} "), st.just(" "))


@st.composite
def conversation(draw: st.DrawFn) -> dict:
    turns = [{"role": "system", "content": draw(said)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(said)})
        weight = draw(st.sampled_from([None, None, 0, 1]))
        turns.append({"role": "assistant", "content": draw(answer)} | ({} if weight is None else {"weight": weight}))
    if draw(st.integers(0, 30)) == 0:
        turns = turns[:-1]
    return {"messages": turns}


def recipe(folder: Path, halves: tuple[list[dict], list[dict]]) -> Recipe:
    sources = []
    for name, rows in zip(("one", "two"), halves, strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(FileSource(path=str(folder / f"{name}.jsonl")))
    data = DataConfig(completions=sources, max_length=90, too_long="cut", max_lost_share=1.0)
    return Recipe.model_construct(data=data, model=ModelConfig.model_construct(path=None, init=None), rollouts=None)


@pytest.mark.parametrize("lists", [LISTS, pytest.param(58, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [*FAMILIES, *SPACED])
def test_trained_text_is_what_the_assistant_said_and_every_row_is_counted(family_tokenizer, family, lists):
    if family in SPACED:
        specials = {"bos": None, "eos": "<|im_end|>", "template": CHATML}
        made = Renderer(family_tokenizer(family, ["<|im_start|>"], **specials))
    else:
        made = renderer(family)
    good = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "quick"}]}

    @settings(max_examples=lists, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(conversation(), min_size=ROWS, max_size=ROWS))
    def check(rows: list[dict]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            halves = ([good, *rows[: ROWS // 2]], [good, *rows[ROWS // 2 :]])
            bad, needs = BadRows(), Needs(data=("completions",))
            asked = recipe(Path(folder), halves)
            loaded = load_rows(asked, needs, bad=bad)
            samples, ledger = fit_rows(asked, needs, loaded, made, bad)
        for name, half in zip(("one", "two"), halves, strict=True):
            of_source = ledger.sources[name]
            expected = [_trainable(row["messages"]) for row in half]
            assert of_source.kept + of_source.cut + of_source.dropped == len(half)
            assert sum(of_source.bad.values()) == sum(one is None for one in expected) <= of_source.dropped
        assert ledger.total == ROWS + 2 and len(samples) == ledger.kept + ledger.cut
        rows_of = {
            f"{name}/{i}": row for name, half in zip(("one", "two"), halves, strict=True) for i, row in enumerate(half)
        }
        for sample in samples:
            texts = [f"{text}<|im_end|>" for text in _trainable(rows_of[sample.problem_id]["messages"])]
            found = _spans(made, sample)
            if sample.finished:
                assert [_plain(text, family) for text in found] == [_plain(text, family) for text in texts]
            else:  # cut on its right
                assert _plain("".join(texts), family).startswith(_plain("".join(found), family).rstrip("\ufffd"))

    check()


def _trainable(turns: list[dict]) -> list[str] | None:
    """What is to be trained on; None for a row that cannot be used."""
    while turns and turns[-1]["role"] != "assistant":
        turns = turns[:-1]
    replies = [turn for turn in turns if turn["role"] == "assistant"]
    if not replies or any(not turn["content"].strip() for turn in replies):
        return None
    return [turn["content"] for turn in replies if turn.get("weight") != 0] or None


def _spans(made: Renderer, sample) -> list[str]:
    if made.encoder.puts_space:  # which decoding by itself takes away again
        return [text for text, trained in made.encoder.pieces(sample.ids, sample.loss_mask) if trained]
    runs: list[list[int]] = []
    before = 0
    for token, trained in zip(sample.ids, sample.loss_mask, strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(token)
        before = trained
    return [made.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in runs]


def _plain(text: str, family: str) -> str:
    return "".join(text.split()) if family == "word pieces" else text
