from __future__ import annotations

from pydantic import Field

from posttrain.cli import tables
from posttrain.cli.tables import needs_in_words, parameter_rows, print_stack, print_table
from posttrain.config.needs import Needs
from posttrain.config.schema import Section
from posttrain.config.stack import Package


class Parameters(Section):
    share: float = Field(0.5, ge=0, lt=1, description="a share")
    steps: int = Field(description="how many")
    on: bool = False
    names: list[str] | None = None
    separator: str = "\n"


def test_parameters_of_a_config() -> None:
    assert parameter_rows(Parameters) == [
        ("share", "0.5", "a number (at least 0 and below 1)", "a share"),
        ("steps", "required", "a whole number", "how many"),
        ("on", "false", "true or false", ""),
        ("names", "-", "a list of texts", ""),
        ("separator", r"'\n'", "text", ""),
    ]


def test_needs_in_words() -> None:
    needs = Needs(data=("prompts", "completions"), rollouts=True, verifier=True, reference=True)
    assert needs_in_words(needs) == "data.prompts, data.completions, rollouts, verifier, reference"


def test_columns_are_aligned(capsys) -> None:
    print_table([("a", "bbb", "c"), ("dddd", "e", "")], "title")
    assert capsys.readouterr().out == "\ntitle\n  a     bbb  c\n  dddd  e\n"


def test_stack_table(capsys, monkeypatch) -> None:
    packages = [
        Package("python", None, ">=3.11", "3.11.7"),
        Package("torch", None, ">=2.11,<2.14", "2.13.0+cpu"),
        Package("vllm", "vllm", ">=0.32,<0.33", None),
    ]
    monkeypatch.setattr(tables, "stack", lambda: packages)
    assert print_stack() is True
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["torch", "2.13.0+cpu", ">=2.11,<2.14", "ok"]
    assert lines[3].split() == ["vllm", "-", ">=0.32,<0.33", "vllm", "not", "installed"]
    packages += [Package("trl", None, "<1", "1.2"), Package("peft", None, "<1", None)]
    assert print_stack() is False
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].endswith("OUT OF RANGE") and lines[5].endswith("MISSING")
