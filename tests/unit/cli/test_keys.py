"""Every key of a recipe is on a page and in `posttrain keys`, with a meaning."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli.keys import recipe_page, sections
from posttrain.cli.main import app
from posttrain.errors import RecipeError

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments):
    return CliRunner().invoke(app, ["keys", *arguments], env={"COLUMNS": "300"}, catch_exceptions=False)


def test_the_page_is_that_of_the_schema():
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == recipe_page(), "run: python -m posttrain.cli.keys > docs/recipe.md"


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
