"""Every key of a recipe is on a page and in `posttrain keys`, with a meaning."""

from pathlib import Path
from typing import get_args, get_origin

import pytest
from typer.testing import CliRunner

from posttrain.cli.keys import sections
from posttrain.cli.main import app
from posttrain.cli.reference import FILES, PAGES
from posttrain.cli.tables import parameter_rows
from posttrain.config import known
from posttrain.config.schema import Recipe
from posttrain.errors import RecipeError
from posttrain.methods import METHODS
from posttrain.pipeline.schema import pipeline_schema
from posttrain.pipeline.stages import STAGES

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments):
    return CliRunner().invoke(app, ["keys", *arguments], env={"COLUMNS": "300"}, catch_exceptions=False)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_that_of_the_program(name):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page == PAGES[name](), "run: python -m posttrain.cli.reference"


def test_every_key_is_on_a_page():
    """Not by the tables' own maker: of every schema that a file is read by, every field."""

    def fields(schema, seen):
        if schema in seen:
            return
        seen.add(schema)
        for name, info in schema.model_fields.items():
            yield schema, name
            for inner in known.members(info.annotation):
                inner = known.bare(inner)
                inner = known.bare(get_args(inner)[0]) if get_origin(inner) is list else inner
                for each in known.members(inner):
                    if known.is_model(known.bare(each)):
                        yield from fields(known.bare(each), seen)

    text = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in PAGES)
    roots = [Recipe, pipeline_schema(STAGES), *dict(FILES).values(), *(method.Config for method in METHODS.values())]
    keys = [found for root in roots for found in fields(root, set())]
    assert len({name for _, name in keys}) > 250
    assert not [f"{schema.__name__}.{name}" for schema, name in keys if f"| `{name}` |" not in text and name != "name"]


def test_parameters_say_what_they_are():
    rows = [(name, *row) for name, cls in METHODS.items() for row in parameter_rows(cls.Config) if row[0] != "name"]
    assert not [f"{method}: {key}" for method, key, _, _, meaning in rows if not meaning]


def test_every_section_and_key_says_what_it_is():
    assert not [each.title for each in sections() if not each.meaning]
    assert not [f"{each.title}: {key}" for each in sections() for key, _, _, meaning in each.rows if not meaning]


def test_the_keys_of_a_section():
    shown = run("model.peft").output
    assert "rank_pattern" in shown and "A low-rank adapter" in shown
    sources = run("data.prompts").output  # a file, a task or a generator
    assert all(key in sources for key in ("reference_pattern", "annotator", "reasoning_gym"))
    assert "(type: code)" in run("verifier").output
    assert "model.quantization" in run().output


def test_a_section_that_is_not_there():
    with pytest.raises(RecipeError, match="no section 'model.pft'\n  did you mean 'model.peft'"):
        run("model.pft")
