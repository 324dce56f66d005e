from __future__ import annotations

from datetime import date

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.config.schema import ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.errors import ModelError
from posttrain.models.chat_template import set_template, with_clock, with_defaults

TEMPLATE = (
    "{%- macro turn(m) %}[{{ m.role }}{{ ' ' + mood if mood is defined }}] {{ m.content }}\n{% endmacro %}\n"
    "{%- for m in messages %}{{ turn(m) }}{% endfor %}"
    "{%- if add_generation_prompt %}[assistant] {% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
)
CLOCK = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%A\") }}|{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "1+1?"}]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    letters = {chr(code): code - 31 for code in range(32, 127)} | {"<eos>": 0, "\n": 96}
    backend = Tokenizer(models.WordLevel(letters, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=TEMPLATE)


def config(**keys: object) -> ModelConfig:
    return ModelConfig(init={}, **keys)


def test_settings_become_defaults_that_the_saved_tokenizer_keeps(tokenizer, tmp_path):
    def as_asked(**more: object) -> str:
        return tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **more)

    asked = {"enable_thinking": False, "mood": 'so "so"\nback\\slash'}
    expected = as_asked(**asked)
    assert expected != as_asked() and expected.endswith("<think></think>")
    set_template(tokenizer, config(template_kwargs=asked))
    assert as_asked() == expected
    renderer = Renderer(tokenizer)
    assert tokenizer.decode(renderer.prompt_ids(Problem("p", "1+1?"))) == expected
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == expected
    assert Renderer(loaded).template_hash == renderer.template_hash
    # Who asks for something else gets it.
    other = loaded.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert "<think>" not in other


def test_a_template_from_a_file_or_as_text(tokenizer, tmp_path):
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    path = tmp_path / "mine.jinja"
    path.write_text(text, encoding="utf-8")
    for given in (str(path), text):
        set_template(tokenizer, config(chat_template=given))
        assert tokenizer.chat_template == text
    with pytest.raises(ModelError, match="no template can be read") as error:
        set_template(tokenizer, config(chat_template=str(tmp_path / "mein.jinja")))
    assert "mine.jinja" in error.value.hint and error.value.where == "model.chat_template"


def test_nothing_asked_changes_nothing(tokenizer):
    set_template(tokenizer, config())
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("keys", "where", "message"),
    [
        ({"template_kwargs": {"enable_thinkng": False}}, "model.template_kwargs.enable_thinkng", "does not read"),
        ({"template_kwargs": {"messages": []}}, "model.template_kwargs.messages", "does not read"),
        ({"template_date": "2026-01-31"}, "model.template_date", "does not read the clock"),
        ({"chat_template": "{% for m in messages %}"}, "model.chat_template", "no Jinja template"),
        (
            {"chat_template": "{{ strftime_now(messages[0].content) }}", "template_date": "2026-01-31"},
            "model.template_date",
            "computes how it reads the clock",
        ),
    ],
)
def test_what_cannot_be_set(tokenizer, keys, where, message):
    with pytest.raises(ModelError, match=message) as error:
        set_template(tokenizer, config(**keys))
    assert error.value.where == where


def test_settings_without_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="there is no chat template") as error:
        set_template(tokenizer, config(template_kwargs={"enable_thinking": False}))
    assert error.value.where == "model.template_kwargs"


def test_the_clock_stands_still_on_a_day_and_is_named_where_it_runs(tokenizer):
    tokenizer.chat_template = CLOCK
    running = Renderer(tokenizer)
    assert len(running.clock) == 2 and "model.template_date" in running.notices()[0]
    set_template(tokenizer, config(template_date=date(2026, 1, 31)))
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "31 Jan 2026 Saturday|1+1?"
    still = Renderer(tokenizer)
    assert still.clock == {} and still.notices() == [] and still.template_hash != running.template_hash


def test_a_default_goes_before_text_that_begins_with_space():
    # Jinja takes the line break behind a block, and the spaces before one at the start of a line.
    template = "\n  {% if x %}yes{% endif %} {{ messages }}"
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    plain = environment.from_string(template).render(x=True, messages=1)
    assert environment.from_string(with_defaults(template, {"x": True})).render(messages=1) == plain
    assert with_clock(template, None) == template
