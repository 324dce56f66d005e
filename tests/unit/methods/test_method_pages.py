"""Every preference method, and the online ones named here, have a page whose recipe loads and finds what it needs."""

import re
from pathlib import Path

import pytest

from posttrain.config.loading import load_recipe
from posttrain.config.preflight import check_needs
from posttrain.methods import METHODS
from posttrain.methods.base import PreferenceMethod

PAGES = Path(__file__).parents[3] / "docs" / "methods"
ONLINE = ["prefixrl", "rec", "asymre", "a_star_po", "opd", "sdft", "opmd", "rlsp", "rlgf", "nlpo"]
ONLINE += ["ui_s1", "digirl", "archer", "sophia"]
NAMES = [name for name, cls in METHODS.items() if issubclass(cls, PreferenceMethod)] + ONLINE


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_of_a_page_loads(name, tmp_path):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    written = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    recipes = [each for each in written if re.search(r"^output:", each, flags=re.MULTILINE)]  # others are parts of one
    configs, names = {known: cls.Config for known, cls in METHODS.items()}, []
    for number, recipe in enumerate(recipes):
        path = tmp_path / f"recipe{number}.yaml"
        path.write_text(recipe, encoding="utf-8")
        loaded = load_recipe(path, [], configs)
        names.append(loaded.method.name)
        check_needs(loaded, METHODS[names[-1]](loaded.method).needs, names[-1])
    assert name in names


@pytest.mark.parametrize("name", NAMES)
def test_a_page_names_only_parameters_that_exist(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    fields = METHODS[name].Config.model_fields
    written = set(re.findall(r"^\| .*?`(\w+): ", page, flags=re.MULTILINE))
    assert written <= set(fields)
