"""The recipe's say over a chat template: another one, its settings, its date.

All three become text of the template itself, so that training, sampling, evaluation and whoever loads the saved
tokenizer render alike without knowing of the recipe: `model.template_kwargs` as defaults of the template's variables,
`model.template_date` as a clock that stands still. A caller of the saved tokenizer can still pass other values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateSyntaxError, meta

from posttrain.bounded_files import read_bytes
from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
"""Variables that are set at every rendering."""

_CLOCK = "strftime_now"
_CLOCK_CALL = re.compile(r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)")
_GENERATION = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def set_template(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Give the tokenizer the chat template that the recipe asks for; it stays as it is where nothing is asked.

    Raises:
        ModelError: no such file, text that is no Jinja template, settings that the template does not read, or a date
            for a template that reads no clock.
    """
    if config.chat_template is not None:
        tokenizer.chat_template = template_text(config.chat_template)
    if not config.template_kwargs and config.template_date is None:
        return
    if tokenizer.chat_template is None:
        key = "template_kwargs" if config.template_kwargs else "template_date"
        raise ModelError(
            "there is no chat template to set anything in",
            where=f"model.{key}",
            hint="give one as `model.chat_template`, or leave the key out",
        )
    template = tokenizer.get_chat_template()
    _check_names(template, config.template_kwargs, set(tokenizer.special_tokens_map))
    tokenizer.chat_template = with_clock(with_defaults(template, config.template_kwargs), config.template_date)


def template_text(given: str) -> str:
    """The template that a recipe gives, as the text itself or as a file that holds it.

    Raises:
        ModelError: no such file, an unreadable one, or text that is no Jinja template.
    """
    text = given
    if "{{" not in given and "{%" not in given:
        path = Path(given).expanduser()
        try:
            text = read_bytes(path, ModelError).decode()
        except (OSError, UnicodeDecodeError) as error:
            near = sorted(p.name for p in path.parent.glob("*.jinja")) if path.parent.is_dir() else []
            raise ModelError(
                f"no template can be read from {given!r}",
                where="model.chat_template",
                hint=nearest(path.name, near) or "give a file with a Jinja template, or the text of one",
            ) from error
    _parsed(text)
    return text


def with_defaults(template: str, values: Mapping[str, Any]) -> str:
    """The template with values for variables that its caller does not set."""
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in values.items()
    ]
    return "".join(lines) + template


def with_clock(template: str, today: date | None) -> str:
    """The template with a clock that always says `today`, at midnight.

    Raises:
        ModelError: it reads no clock, or asks for the time in a form that only its caller knows.
    """
    if today is None:
        return template
    calls = len(re.findall(rf"{_CLOCK}\s*\(", template))
    formats = sorted({double or single for double, single in _CLOCK_CALL.findall(template)})
    if not calls or len(_CLOCK_CALL.findall(template)) < calls:
        reason = "does not read the clock" if not calls else "computes how it reads the clock"
        raise ModelError(f"the chat template {reason}", where="model.template_date", hint="leave the key out")
    said = {text: datetime(today.year, today.month, today.day).strftime(text) for text in formats}
    clock = f"{{%- macro {_CLOCK}(format) -%}}{{{{- {_literal(said)}[format] -}}}}{{%- endmacro %}}\n"
    return clock + template


def _check_names(template: str, values: Mapping[str, Any], given: set[str]) -> None:
    read = meta.find_undeclared_variables(_parsed(template)) - _GIVEN - given - {_CLOCK, "raise_exception"}
    for name in values:
        if name not in read:
            known = ", ".join(sorted(read)) or "nothing"
            raise ModelError(
                f"the chat template does not read {name!r}; it reads {known}",
                where=f"model.template_kwargs.{name}",
                hint=nearest(name, read) or "leave the key out",
            )


def _parsed(template: str) -> Any:
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # nosec B701 # it renders nothing
    try:
        # Marks of what is generated are a tag of transformers' own.
        return environment.parse(_GENERATION.sub(r"{%\1 if true \2%}{% endif %}", template))
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the text is no Jinja template: {error.message} (line {error.lineno})", where="model.chat_template"
        ) from error
    except RecursionError as error:
        raise ModelError("the text is no Jinja template: nested too deeply", where="model.chat_template") from error


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
