"""What another model reads where the policy reads a token."""

import copy

import pytest
from transformers import AutoTokenizer

from posttrain.data.rendering import Renderer
from posttrain.errors import ModelError
from posttrain.models.vocabulary import check_same_vocabulary


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def test_the_same_tokens_are_taken_whatever_else_the_tokenizer_does(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.padding_side, other.chat_template = "left", "{{ messages }}"
    check_same_vocabulary(Renderer(tokenizer), other, "method.teacher")


def test_a_token_more_there_is_no_harm_and_one_less_is(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<further>"])
    check_same_vocabulary(Renderer(tokenizer), other, "method.teacher")
    with pytest.raises(ModelError, match=r"1 of \d+ ids differ.*'<further>' here and for nothing there"):
        check_same_vocabulary(Renderer(other), tokenizer, "method.teacher")


def test_ends_that_the_other_model_does_not_know_are_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "#"
    with pytest.raises(ModelError, match="completions of the policy end with .*, those of the dpo model with '#'"):
        check_same_vocabulary(Renderer(tokenizer), other, "method.dpo_model")
