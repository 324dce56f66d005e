"""The pages lead to each other, and what they show is so: commands exist, recipes are valid, code compiles."""

import itertools
import json
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import jinja2
import pytest
import typer
from pydantic import create_model

from posttrain.cli.main import app
from posttrain.config.audit import AuditConfig
from posttrain.config.collection import SampleConfig, StepLabelConfig, TakeInConfig, TakeInEpisodesConfig
from posttrain.config.comparison import CompareConfig
from posttrain.config.known import walk
from posttrain.config.loading import build_recipe
from posttrain.config.locations import raise_all
from posttrain.config.rewards import RewardsConfig
from posttrain.config.schema import BenchmarkFile, Recipe
from posttrain.config.section import Section
from posttrain.config.validation import Context, method_config, validate
from posttrain.config.workers import EvaluationRun
from posttrain.config.yaml_file import read_text
from posttrain.methods import METHODS
from posttrain.pipeline.schema import pipeline_schema
from posttrain.pipeline.stages import STAGES
from posttrain.study.schema import StudyConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "data").rglob("*.md"),
]
FIRST = ROOT / "docs" / "README.md"
CLI = typer.main.get_command(app)
WRITTEN_BEFORE = [{"name": name, "train": "recipes/quickstart.yaml"} for name in ("base", "round_1")]
"""Stages that a page's stages may refer to."""


def text_of(page):
    """Without blocks of code, in which nothing is a link."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def blocks(page):
    """(line, language, text) of every block of code."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: each.start()].count("\n") + 1, each[2], textwrap.dedent(each[3])) for each in found]


def links(page):
    """(target, anchor) of every link that stays within the project."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text_of(page))
    return [(link.partition("#")[0], link.partition("#")[2]) for link in found if "://" not in link]


def anchors(page):
    """As a forge makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_broken(page):
    for target, anchor in links(page):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{target} is not there"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target} has no heading {anchor!r}"


def test_every_page_is_two_links_from_the_first():
    def linked(page):
        return {(page.parent / target).resolve() for target, _ in links(page) if target.endswith(".md")}

    near = linked(FIRST)
    reached = near | {found for page in near if page.exists() for found in linked(page)}
    pages = {page for page in PAGES if "design" not in page.parts and page.name not in ("README.md", "CHANGELOG.md")}
    assert not {str(page.relative_to(ROOT)) for page in pages - reached}


def test_every_page_is_in_the_list_of_the_site():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert not {page for page in pages if not page.startswith(("methods/", "design/"))} - listed


# ------------------------------------------------------------------------------------------- questions of a newcomer

QUESTIONS = {
    "how do I get a first run?": (["First run in five minutes"], "3. Train", "posttrain run recipes/quickstart.yaml"),
    "which method should I use?": (["choose a method"], "By what you have", "[grpo](methods/grpo.md)"),
    "how do I reward what I like?": (["all that a reward may do"], "Your own reward", "type: python"),
    "how do I train on my own data?": (["data"], "Sources", "path:"),
    "what are the keys of LoRA?": (["LoRA keys"], "LoRA", "target_modules"),
    "how do I train in 4 bits?": (["bases in 4 and 8 bits"], "Bases in 4 and 8 bits", "quantization: {bits: 4"),
    "how do I use several GPUs?": (["scale"], "From one CPU to many nodes", "accelerate launch"),
    "it was killed, what now?": (["resume"], "Stopping, resuming, and what can go wrong", "--resume auto"),
    "how do I run a sweep?": (["sweeps"], "Sweeps: several settings, several seeds", "for seed in"),
    "did it work?": (["report"], "What it answers", "did it work"),
    "how do I log to wandb?": (["trackers"], "Trackers: wandb, trackio, tensorboard, mlflow", "report_to=[wandb]"),
    "how do I serve the result?": (["serving"], "Serve the result", "vllm serve"),
    "what does this key mean?": (["keys of a recipe"], "training", "learning_rate"),
    "what does this parameter of DPO mean?": (["all methods", "dpo"], "Formula", "beta"),
    "what about TRL?": (["beside TRL and others"], "What posttrain does not do", "No images"),
}
"""Question -> the links to click from the first page, the heading where the answer stands, and a part of the answer."""


def section(page, heading):
    """What stands under a heading, down to the next one of its level or above; blocks of code are no headings."""
    lines = page.read_text(encoding="utf-8").splitlines()
    fences = list(itertools.accumulate(line.lstrip().startswith("```") for line in lines))
    levels = [
        len(line) - len(line.lstrip("#")) if line.startswith("#") and number % 2 == 0 else 0
        for line, number in zip(lines, fences, strict=True)
    ]
    (start,) = [at for at, level in enumerate(levels) if level and lines[at].lstrip("# ") == heading]
    ends = [at for at in range(start + 1, len(lines)) if 0 < levels[at] <= levels[start]]
    return "\n".join(lines[start : ends[0] if ends else len(lines)])


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_newcomers_question_is_two_clicks_away(question):
    clicks, heading, answer = QUESTIONS[question]
    assert len(clicks) <= 2
    page = FIRST
    for click in clicks:
        targets = re.findall(rf"\[{re.escape(click)}\]\(([^)\s]+)\)", text_of(page))
        assert targets, f"{page.name} has no link {click!r}"
        page = (page.parent / targets[0].partition("#")[0]).resolve()
    assert answer in section(page, heading)


# ------------------------------------------------------------------------------------------------- what pages show

SHOWN = [
    pytest.param(page, number, language, block, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, language, block in blocks(page)
]


def shown(*languages):
    """The blocks of these languages, as parameters of a test."""
    return [each for each in SHOWN if each.values[2] in languages]


def words_of(line):
    """The words of a command of ours within a line of a shell, or None: up to a comment, a pipe or the next command."""
    words = shlex.split(re.split(r"\s(?:\||&&|>|<|;)(?:\s|$)", line.removeprefix("$ "))[0], comments=True)
    while words and (words[0] in ("srun", "!") or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
        words = words[1:]
    if words[:2] == ["accelerate", "launch"] and "posttrain" in words:
        words = words[words.index("posttrain") :]
    return words[1:] if words and words[0] in ("posttrain", ".venv/bin/posttrain") else None


def command_of(words):
    """The command that the words name, with the rest of them."""
    command, context = CLI, CLI.make_context("posttrain", [], resilient_parsing=True)
    options, rest, _ = CLI.make_parser(context).parse_args(list(words))
    while rest and isinstance(command, type(CLI)) and rest[0] != "COMMAND":  # any of them
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None, f"no command of {' '.join(words)!r}"
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
    return command, context, rest


def sentence_commands(page):
    """Commands within sentences: `posttrain keys SECTION`."""
    return [text for text in re.findall(r"`(posttrain [^`]*)`", text_of(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    """Blocks give whole commands; sentences may leave out arguments, and then name a command and its options."""
    lines = [line for _, language, block in blocks(page) if language in ("", "console") for line in joined(block)]
    whole = [words for line in lines if (words := words_of(line)) is not None]
    for words in whole:
        command, context, rest = command_of(words)
        if isinstance(command, type(CLI)):
            assert words == ["--version"], words
            continue
        given = command.make_context(context.info_name, rest, parent=context.parent).params
        if context.info_name in ("train", "check"):
            unknown = [key for each in given["overrides"] or () if not is_key(key := each.split("=")[0])]
            assert not unknown, f"no keys of a recipe: {unknown}"
    for text in sentence_commands(page):
        command, context, rest = command_of(words_of(text.replace("[", "").replace("]", "")))
        if not isinstance(command, type(CLI)):
            command.make_parser(context).parse_args(rest)


def is_key(key):
    """Whether a recipe may have this dotted key; what a method or an open mapping may have is not looked at."""
    place, _, last = key.rpartition(".")
    sections = [section for path, section in walk(Recipe) if ".".join(map(str, path)) == place]
    return place == "method" or any(last in section.model_fields for section in sections)


def joined(block):
    """The lines of a shell's block; one that ends with a backslash goes on in the next."""
    return block.replace("\\\n", " ").splitlines()


def partial(schema):
    """The same section with no key required, for a page that shows a part of it."""
    fields = {name: (info.annotation | None, None) for name, info in schema.model_fields.items()}
    return create_model(schema.__name__, __base__=Section, **fields)


RECIPE = partial(Recipe)
OTHERS = [
    *(
        SampleConfig,
        BenchmarkFile,
        AuditConfig,
        RewardsConfig,
        TakeInConfig,
        TakeInEpisodesConfig,
        StepLabelConfig,
        CompareConfig,
    ),
    *(EvaluationRun, StudyConfig),
]


def alternatives(block):
    """A block in which a key of the top level stands several times shows several ways: each is a fragment."""
    block = re.sub(r",? *\.\.\.(?=[ }\]])", "", block)
    keys = re.findall(r"^\w+(?=:)", block, flags=re.MULTILINE)
    return re.split(r"^(?=\w+:)", block, flags=re.MULTILINE)[1:] if len(set(keys)) < len(keys) else [block]


@pytest.mark.parametrize(("page", "number", "language", "block"), shown("yaml"))
def test_recipes_are_valid(page, number, language, block, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for place, name in re.findall(r"([\w./]+):([A-Za-z]\w*)\b", block):  # code of the user's own that it names
        file = tmp_path / (place if place.endswith(".py") else place.replace(".", "/") + ".py")
        if place.endswith(".py") or "." in place:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"def {name}(): ...\n")
    for text in alternatives(block):
        data, locations = read_text(text, str(tmp_path / f"{page.stem}.{number}.yaml"))
        raise_all(faults(data, locations))


def faults(data, locations):
    """What the schema says against a block: a recipe or a part of one, a pipeline or its stages, another file."""
    methods = {name: cls.Config for name, cls in METHODS.items()}
    if isinstance(data, list):
        data = {"pipeline": "shown", "output": "runs/shown", "stages": [*WRITTEN_BEFORE, *data]}
    if "stages" in data:
        schema = pipeline_schema(STAGES)
        return validate(schema, data, Context(locations, schema))[1]
    if "plugins" in data:  # they define what is unknown here; tests/e2e runs these
        data = {key: value for key, value in data.items() if key not in ("plugins", "method", "data")}
    others = [schema for schema in OTHERS if set(data) <= set(schema.model_fields)]
    if set(data) <= set(Recipe.model_fields) or not others:
        whole = {"model", "data", "method", "batch", "training", "output"} <= set(data)
        if whole:
            build_recipe(data, locations, methods)
            return []
        method = data.pop("method", None)
        found = validate(RECIPE, data, Context(locations, Recipe, methods))[1]
        return found + (
            [] if method is None else method_config(method, methods, Context(locations, Recipe, methods))[1]
        )
    return validate(partial(others[0]), data, Context(locations, others[0]))[1]


@pytest.mark.parametrize(("page", "number", "language", "block"), shown("python"))
def test_python_compiles(page, number, language, block):
    compile(block, f"{page}:{number}", "exec")


@pytest.mark.parametrize(("page", "number", "language", "block"), shown("json", "toml", "jinja"))
def test_other_files_parse(page, number, language, block):
    {"json": json.loads, "toml": tomllib.loads, "jinja": jinja2.Environment().parse}[language](block)


def test_every_attack_that_is_listed_is_a_test_and_every_file_of_attacks_is_listed():
    """The last column names files, from tests/attacks, and behind each in brackets parts of the names of its tests."""
    folder, named = ROOT / "tests" / "attacks", set()
    rows = re.findall(r"^\| .* \|$", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed = [
        row.rstrip("| ").rpartition(" | ")[2] for row in rows if re.search(r"\.py`|unit/", row.rpartition(" | ")[2])
    ]
    numbers = [int(row.split()[1]) for row in rows if row.split()[1].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 20
    for text in listed:
        for file, parts in re.findall(r"`([./\w]+(?:\.py|/))`(?: \(((?:`\w+`(?:, )?)+)\))?", text):
            path = (folder / file).resolve()
            assert path.exists(), file
            named.add(path)
            tests = re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")) if path.is_file() else []
            for part in re.findall(r"\w+", parts):
                assert any(part in test for test in tests), f"{file} has no test of {part}"
    assert {path for path in folder.glob("test_*.py")} <= named
    assert all("(`" in text for text in listed[-len(numbers) :]), "each of the further ones names its test"
