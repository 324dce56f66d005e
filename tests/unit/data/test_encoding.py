"""The short way to the ids of a text gives what the tokenizer's own call does."""

import pytest

from posttrain.data.encoding import Encoder

KINDS = ("byte_level", "byte_level_spaced", "sentencepiece", "metaspace", "characters")
TEXTS = (
    "",
    "a",
    " the answer\n\nis  two ",
    "<s>x<|end|> y</s>",
    "d\u00e9j\u00e0 vu \U0001f600",
    "def add(a, b):",
    "<0x41>\t",
)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizers_call_whatever_it_was_told_before(family_tokenizer, kind):
    tokenizer = family_tokenizer(kind, ["<|end|>"], bos="<s>", eos="</s>")
    tokenizer.pad_token = "</s>"
    encoder = Encoder(tokenizer)
    assert encoder._plain

    def same():
        found = [encoder.encode(text) for text in TEXTS]
        assert found == [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
        return found

    whole = same()
    for told in (
        {"truncation": True, "max_length": 2},
        {"padding": "max_length", "max_length": 40},
        {"split_special_tokens": True},
    ):
        tokenizer(TEXTS[2], **told)
        assert encoder.encode(TEXTS[2]) == whole[2] and encoder.encode(TEXTS[3]) == whole[3]
    tokenizer.split_special_tokens = True
    assert same()[3] != whole[3]
    tokenizer.split_special_tokens = False
    tokenizer.add_tokens(["answer"])
    assert same()[2] != whole[2]


def test_a_class_with_a_way_of_its_own_is_asked(family_tokenizer):
    tokenizer = family_tokenizer("characters", [], bos=None, eos="</s>")

    class Other(type(tokenizer)):
        def _encode_plus(self, text, **told):
            return super()._encode_plus(text.upper(), **told)

    tokenizer.__class__ = Other
    assert Encoder(tokenizer).encode("ab") == tokenizer("ab", add_special_tokens=False).input_ids
    assert not Encoder(tokenizer)._plain
