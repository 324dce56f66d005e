"""A chat template is a program of whoever made the model: it computes for a bounded time and makes a bounded text.

Before, what each template here does went on for ever or until the memory was full, in `check` as in training.
"""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest

from posttrain.config.schema import ModelConfig
from posttrain.data import template_bounds
from posttrain.data.rendering import Renderer
from posttrain.data.template_bounds import TooMuch, bounded
from posttrain.errors import ModelError
from posttrain.models.tokenizer import load_tokenizer

N = "9" * 10
DOUBLED = "{% set ns = namespace(x=START, y=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"


def doubled(step: str, use: str = "{{ ns.x }}", start: str = "'xx'") -> str:
    return DOUBLED.replace("START", start).replace("STEP", step) + use


def nested(use: str) -> str:
    both = "[ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y]"
    return doubled(both, use, "['x']")


MANY = "{% for a in range(99999) %}"
ENDLESS = {
    "loops within loops": MANY + MANY + "{% set x = 1 %}{% endfor %}{% endfor %}",
    "calls within calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "sums of many": "{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "blocks": MANY + "{% block b scoped %}" + MANY + "{% endfor %}{% endblock %}{% endfor %}",
    "a caller": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{% for i in range(99999) %}{% endfor %}{% endcall %}",
    "calls of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
}
LARGE = {
    "a text times a number": f"{{{{ 'x' * {N} }}}}",
    "a list times a number": f"{{{{ ([0] * {N})|length }}}}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "squares": doubled("ns.x * ns.x", start="9"),
    "center": f"{{{{ 'x'|center({N}) }}}}",
    "center of a text": f"{{{{ 'x'.center({N}) }}}}",
    "bytes": f"{{{{ (5).to_bytes({N}, 'big')|string }}}}",
    "a width": f"{{{{ '%{N}d' % 1 }}}}",
    "a width among the values": f"{{{{ '%*d' % ({N}, 1) }}}}",
    "a width in braces": f"{{{{ '{{:{N}d}}'.format(1) }}}}",
    "a width within braces": f"{{{{ '{{:{{}}}}'.format(1, {N}) }}}}",
    "a width in a filter": f"{{{{ '%{N}d'|format(1) }}}}",
    "indented JSON": f"{{{{ [[1]]|tojson(indent={N}) }}}}",
    "slices": f"{{{{ 'a'|slice({N})|list }}}}",
    "a batch": f"{{{{ 'a'|batch({N}, 'x')|list }}}}",
    "a block in a filter": f"{{% filter center({N}) %}}x{{% endfilter %}}",
    "text behind text": doubled("ns.x ~ ns.x"),
    "text and text": doubled("ns.x + ns.x"),
    "text in text": doubled("ns.x.replace('x', ns.x)"),
    "text between text": doubled("ns.x.join(ns.x)"),
    "texts that are translated": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "lists in lists, written": nested("{{ ns.x }}"),
    "lists in lists, as JSON": nested("{{ ns.x|tojson }}"),
    "lists in lists, as text": nested("{% set y = ns.x ~ 'a' %}"),
    "lists in lists, compared": nested("{{ ns.x == ns.y }}"),
    "lists in lists, tested": nested("{{ ns.x is eq(ns.y) }}"),
    "lists in lists, looked for": nested("{{ ns.x in [ns.y] }}"),
    "texts from a list that is made as it is read": "{{ range(99999)|map('center', 100000)|join }}",
    "such a list": "{{ range(99999)|map('center', 100000)|list|length }}",
    "such numbers": "{{ range(99999)|map('center', 16000000)|map('length')|sum }}",
    "texts of a macro": "{% set b = 'x' * 1000000 %}{% macro f() %}{% for a in range(99999) %}{{ b ~ a }}{% endfor %}"
    "{% endmacro %}{{ f() }}",
    "texts of the template": "{% for a in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "texts that are kept": "{% set y %}{% for a in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "a long template": "x" * 2_000_000,
}
DEEP = {
    "brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists": "{{ " + "[" * 250 + "a" + "]" * 250 + " }}",
    "nots": "{{ " + "not " * 3000 + "1 }}",
    "sums": "{{ a" + " + 1" * 3000 + " }}",
    "loops": "{% for a in [1] %}" * 50 + "x" + "{% endfor %}" * 50,
}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates have 0.1 s here. Where they have no bounds, as once, the test fails after 20 s."""
    monkeypatch.setattr(template_bounds, "SECONDS", 0.1)

    def too_long(*_: object) -> None:
        raise AssertionError("the template has no clock")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("template", (ENDLESS | LARGE | DEEP).values(), ids=ENDLESS | LARGE | DEEP)
def test_a_template_without_end_or_with_a_text_that_fills_the_memory(template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((TooMuch, RecursionError)):
        bounded(template).render(messages=[])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


@pytest.mark.parametrize("template", [ENDLESS["loops within loops"], LARGE["a width"], DEEP["loops"], DEEP["brackets"]])
def test_such_a_template_is_one_message(template: str, tiny_model: Path, tmp_path: Path, write_recipe) -> None:
    from posttrain.cli.check import check_recipe

    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    for use in (
        lambda: Renderer(load_tokenizer(ModelConfig(path=str(folder)))),
        lambda: check_recipe(
            write_recipe({"name": "sft"}, {"model.path": str(folder)}), [], online=False, world_size=1
        ),
    ):
        with pytest.raises(ModelError, match="the chat template is out of bounds: it") as caught:
            use()
        assert caught.value.where == "model.chat_template"
    with pytest.raises(TooMuch):  # nor by others who render with it
        load_tokenizer(ModelConfig(path=str(folder))).apply_chat_template([{"role": "user", "content": "x"}])


TOOL = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
TALKS = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "100 % of {0:123456789}?"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nyes", "reasoning_content": "y" * 40_000},
        {"role": "user", "content": "again" * 100_000},
    ],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "3"},
        {"role": "assistant", "content": "3"},
    ],
]
TEMPLATES = sorted((Path(__file__).resolve().parents[1] / "fixtures" / "templates").glob("*.jinja"))


def test_long_messages_and_large_numbers_are_no_attack() -> None:
    text = "x" * 1_000_000
    message = {"content": text, "made": 1_700_000_000, "of": [{"type": "text", "text": text}] * 4}
    for template, found in {
        "{{ 'In 2023-10-01 %s' % m.content }}": f"In 2023-10-01 {text}",
        "{{ 'In 2023 {}'.format(m.content) }}": f"In 2023 {text}",
        "{{ '%d' % m.made }}, {{ m.made|string }}, {{ m.made|default(1700000001) }}": ", ".join(["1700000000"] * 3),
        "{{ m.content|replace('y', '<br>')|trim|length }}": "1000000",
        "{{ m.of|map(attribute='text')|join('\n')|length }}": "4000003",
        "{% if m.content != m.of[0].text %}no{% endif %}{{ m.other|default(m.content)|length }}": "1000000",
        "{{ (m.content + m.content).split('z')|length }}": "1",
        "{{ [m, m]|tojson(indent=4)|length > 10000000 }}": "True",
    }.items():
        assert bounded(template).render(m=message) == found


@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_real_templates_write_what_they_wrote(path: Path) -> None:
    """Or say the same error of a conversation that they do not take."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    def written(template, **values: object) -> str:
        try:
            return template.render(bos_token="<s>", eos_token="</s>", strftime_now=str, documents=None, **values)
        # Whatever a template raises.
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    text, found = path.read_text(encoding="utf-8"), 0
    for talk in TALKS:
        for tools in (None, [{"type": "function", "function": TOOL}]):
            values = {"messages": talk, "tools": tools, "add_generation_prompt": talk[-1]["role"] == "user"}
            as_before = written(_cached_compile_jinja_template(text), **values)
            assert written(bounded(text), **values) == as_before
            found += "hi" in as_before or "again" in as_before
    assert found
