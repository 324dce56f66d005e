"""Tiny real tokenizers: one token per character, with the chat templates and special tokens of common families."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
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
OPENS_THOUGHT = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>' }}")
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
