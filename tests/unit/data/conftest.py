"""Tiny real tokenizers: one token per character, with the chat templates and special tokens of common families; and
others that cut text as the tokenizers of the large families do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:;!?'+-=#<>|_/"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + "
    "m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The end token of a turn is not the EOS, and another token follows at the very end.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Opens a thought in the generation prompt that the finished conversation does not have.
OPENS_THOUGHT = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
# Strips the reasoning of all replies but the last.
STRIPS_HISTORY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] if loop.last else "
    "m['content'].split('#')[-1]) + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "phi3": PHI3,
    "no_stop": NO_STOP,
    "opens_thought": OPENS_THOUGHT,
    "strips_history": STRIPS_HISTORY,
    "double_bos": "{{ bos_token }}" + LLAMA3,
    "drops_reply": "{{ messages[0]['content'] }}",
    "drops_system": CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
    "refuses_system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + CHATML,
}
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer(template=name or None, adds="" | "bos" | "bos eos", pad_is_eos=False)`."""

    def make(template: str | None = None, adds: str = "", pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
        vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *CHARACTERS])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.decoder = decoders.Fuse()
        if adds:
            single = {"bos": "<bos> $A", "bos eos": "<bos> $A <eos>"}[adds]
            specials = [("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
            backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
            pad_token="<eos>" if pad_is_eos else "<pad>",
        )
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
        tokenizer.chat_template = None if template is None else TEMPLATES[template]
        return tokenizer

    return make


@pytest.fixture(scope="session")
def family_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`family_tokenizer(kind, specials, bos=..., eos=..., template=None)`, of one of these kinds: `byte_level` (GPT-2,
    Llama 3, Qwen), `byte_level_spaced` (it puts a space before a text), `sentencepiece` (Llama 2 as first converted,
    which puts one behind every special token too), `metaspace` (Llama 2 and Mistral as of today), `characters`."""
    return _family_tokenizer


_TEXT = [
    "the first answer is one\n\nand the second answer is two",
    "def add(a, b):\n    return a + b",
    "so it goes  on",
]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _family_tokenizer(
    kind: str, specials: Sequence[str], *, bos: str | None, eos: str, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `KINDS` with these special tokens and a few learnt words."""
    specials = list(dict.fromkeys([*specials, *([] if bos is None else [bos]), eos]))
    backend = {"byte_level": _byte_level, "byte_level_spaced": _byte_level, "characters": _characters}.get(
        kind, _sentencepiece
    )(kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = template
    return tokenizer


def _byte_level(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("spaced"))
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_TEXT * 3, trainer)
    return backend


def _sentencepiece(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if kind == "sentencepiece":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([text.replace("\n", " ") for text in _TEXT] * 3, trainer)
    learnt = backend.get_vocab()
    # Bytes are pieces of the vocabulary, not words that a text is searched for.
    vocabulary = learnt | {byte: len(learnt) + number for number, byte in enumerate(_BYTES)}
    merges = [tuple(pair) if isinstance(pair, list) else pair for pair in _merges(backend)]
    backend.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return backend


def _merges(backend: Tokenizer) -> list:
    return json.loads(backend.to_str())["model"]["merges"]


def _characters(kind: str) -> Tokenizer:
    letters = {chr(code): code - 31 for code in range(32, 127)} | {"<unk>": 0, "\n": 96, "é": 97, "▁": 98}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return backend
