"""Whatever a user feeds in, only a PosttrainError comes out, in bounded time: recipes, rows, templates, checkpoints.

Each test prints the input that broke it. `--hypothesis-seed=N` takes another walk; the slow tests walk further.
"""

import copy
import gzip
import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.config.loading import dump_recipe, load_recipe
from posttrain.config.preflight import check_needs, plan_batch
from posttrain.config.schema import FileSource
from posttrain.data.sources import examples, preferences, problems
from posttrain.errors import PosttrainError
from posttrain.methods import METHODS
from posttrain.state.checkpoint import (
    STAGING,
    STATE_FILE,
    _seal,
    commit,
    complete_checkpoints,
    find_checkpoint,
    read_state,
    retain,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {name: method.Config for name, method in METHODS.items()}
RECIPES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").rglob("*.yaml"))]
SHORT, LONG = 60, 5000


def walk(n):
    """Examples for a test; a single one that takes 20 s counts as a hang."""
    return settings(
        max_examples=n,
        deadline=timedelta(seconds=20),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
        print_blob=True,
        derandomize=n == SHORT,
    )


def only_user_errors(call, *arguments):
    """Its result, or None after an error that says what is wrong."""
    try:
        return call(*arguments)
    except PosttrainError as error:
        assert str(error).strip() and error.what
        return None


# ------------------------------------------------------------------------------------------------------------ recipes

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "~", "${base.model}", "1e-6", "0x10", "2026-01-01", "\u2028", "!!python/object:os.system", "."]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def paths(node, at=()):
    yield at
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from paths(node[key], (*at, key))


@st.composite
def recipe_trees(draw):
    """A recipe of the repository with a few values replaced, keys removed, renamed or added."""
    tree = copy.deepcopy(yaml.safe_load(draw(st.sampled_from(RECIPES))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.sampled_from([path for path in paths(tree) if path] or [("model",)]))
        node = tree
        for key in at[:-1]:
            node = node[key]
        action = draw(st.sampled_from(["replace", "remove", "rename", "add"]))
        if action == "remove" and at[-1] in (node if isinstance(node, dict) else range(len(node))):
            del node[at[-1]]
        elif action == "rename" and isinstance(node, dict) and at[-1] in node:
            node[draw(st.text(max_size=8))] = node.pop(at[-1])
        elif action == "add" and isinstance(node, dict):
            node[draw(st.one_of(st.text(max_size=8), st.sampled_from(["peft", "init", "limit", "beta"])))] = draw(
                values
            )
        else:
            node[at[-1]] = draw(values)
    return yaml.safe_dump(tree, allow_unicode=draw(st.booleans()))


@st.composite
def recipe_texts(draw):
    """A recipe of the repository with a few characters or lines changed."""
    text = draw(st.sampled_from(RECIPES))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 20)))
        inserts = st.one_of(
            st.text(max_size=6), st.sampled_from(["\t", "&a ", "*a", "<<: ", "{", "]", "? ", "---\n", "\0"])
        )
        text = text[:start] + draw(inserts) + text[end:]
    return text


def load_and_plan(path, overrides=()):
    recipe = load_recipe(path, list(overrides), CONFIGS)
    needs = METHODS[recipe.method.name](recipe.method).needs
    check_needs(recipe, needs, recipe.method.name)
    plan_batch(recipe, needs, world_size=1, rows=64)
    return recipe


def try_recipe(folder, content):
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    recipe = only_user_errors(load_and_plan, path)
    if recipe is not None:
        again = folder / "again.yaml"
        again.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(again, [], CONFIGS) == recipe


overrides = st.lists(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(
            ["model.path", "training.max_steps", "data", "method.name", "a..b", "verifier.0.type", "x", ""]
        ),
        st.sampled_from(["=", "", "=="]),
        st.one_of(st.text(max_size=10), st.sampled_from(["{", "[1", "*a", "!!x y", "null", "1e999"])),
    ),
    max_size=3,
)


@walk(SHORT)
@given(content=st.one_of(recipe_trees(), recipe_texts(), st.binary(max_size=80)))
def test_recipes(content, tmp_path):
    try_recipe(tmp_path, content)


@walk(SHORT)
@given(given_overrides=overrides, text=st.sampled_from(RECIPES))
def test_overrides(given_overrides, text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    only_user_errors(load_and_plan, path, given_overrides)


@pytest.mark.slow
@walk(LONG)
@given(content=st.one_of(recipe_trees(), recipe_texts(), st.binary(max_size=400)))
def test_recipes_further(content, tmp_path):
    try_recipe(tmp_path, content)


# ---------------------------------------------------------------------------------------------------------- data rows

COLUMNS = ("prompt", "completion", "chosen", "rejected", "x")
cells = st.one_of(values, st.sampled_from(["2+2=", "", " ", [{"role": "user", "content": "hi"}], [{"role": 1}]]))


@st.composite
def rows(draw):
    """A good row with a few cells replaced or taken away."""
    row = {name: draw(st.text(min_size=1, max_size=5)) for name in COLUMNS}
    for name in draw(st.sets(st.sampled_from(COLUMNS), max_size=2)):
        if draw(st.booleans()):
            row[name] = draw(cells)
        else:
            del row[name]
    return json.dumps(row, ensure_ascii=draw(st.booleans()))


TEMPLATES = ["{prompt}", "{x}{prompt}", "{", "{0}", "{prompt.__class__}", "{prompt!r}", "{prompt:>9999999999}"]
OPTIONS = {
    "prompt": st.sampled_from(["x", "none"]),
    "reference": st.sampled_from(["x", "none"]),
    "template": st.one_of(st.sampled_from(TEMPLATES), st.text(max_size=12)),
    "system": st.text(max_size=4),
    "chat": st.booleans(),
    "limit": st.integers(1, 3),
}
lines = st.one_of(rows(), rows(), rows(), st.text(max_size=30))


@st.composite
def sources(draw):
    """Options of a source, few at a time, so that most rows are read."""
    names = draw(st.sets(st.sampled_from(sorted(OPTIONS)), max_size=2))
    options = {name: draw(OPTIONS[name]) for name in sorted(names)}
    if "reference" in names:
        options["reference_pattern"] = draw(st.sampled_from([None, "(a)", "(", "a", "", "(a|b)+"]))
    return {"completion": "completion"} | options


def try_rows(folder, content, suffix, given_source):
    path = folder / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    source = FileSource(path=str(path), **given_source)
    for read in (problems, examples, preferences):
        found = only_user_errors(read, source, "rows")
        if found:
            try_rendering(found)


def try_rendering(found):
    renderer = renderer_of_tests()
    for row in found:
        only_user_errors(renderer.prompt_ids, getattr(row, "problem", row))
        if hasattr(row, "completion"):
            only_user_errors(renderer.sample, row)


def renderer_of_tests(known=[]):  # noqa: B006
    from posttrain.config.schema import TokenizerInit
    from posttrain.data.rendering import Renderer
    from posttrain.models.tokenizer import build_tokenizer

    if not known:
        known.append(Renderer(build_tokenizer(TokenizerInit(type="characters"), None)))
    return known[0]


contents = st.one_of(
    st.lists(rows(), min_size=1, max_size=3).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(lines, max_size=4).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=60),
)
suffixes = st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet"])


@walk(SHORT)
@given(content=contents, suffix=suffixes, given_source=sources())
def test_data_rows(content, suffix, given_source, tmp_path):
    try_rows(tmp_path, content, suffix, given_source)


@pytest.mark.slow
@walk(LONG)
@given(content=contents, suffix=suffixes, given_source=sources())
def test_data_rows_further(content, suffix, given_source, tmp_path):
    try_rows(tmp_path, content, suffix, given_source)


# ---------------------------------------------------------------------------------------------------- chat templates

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
PIECES = [
    "{{",
    "}}",
    "{%",
    "%}",
    "messages",
    "[0]",
    ".x",
    "|upper",
    "/0",
    "raise_exception('no')",
    "{% for i in y %}",
    "'",
]


@st.composite
def templates(draw):
    text = TEMPLATE
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 10)))
        text = text[:start] + draw(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))) + text[end:]
    return text


def try_template(template):
    from posttrain.config.schema import TokenizerInit
    from posttrain.data.rendering import Renderer
    from posttrain.data.sample import Example, Problem
    from posttrain.models.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(TokenizerInit(type="characters"), None)
    tokenizer.chat_template = template
    renderer = only_user_errors(Renderer, tokenizer)
    if renderer is not None:
        problem = Problem("p", ({"role": "user", "content": "2+2="},))
        only_user_errors(renderer.prompt_ids, problem)
        only_user_errors(renderer.sample, Example(problem, "4"))


@walk(SHORT)
@given(template=templates())
def test_chat_templates(template):
    try_template(template)


@pytest.mark.slow
@walk(LONG)
@given(template=templates())
def test_chat_templates_further(template):
    try_template(template)


# ------------------------------------------------------------------------------------------------- prompt templates

PROMPT_PIECES = [
    "{x}",
    "{prompt}",
    "{{",
    "}}",
    "{",
    "}",
    "{0}",
    "{x.y}",
    "{x!r}",
    "{x:>9999999999}",
    "{}",
    "{ x }",
    "%s",
]


@walk(SHORT)
@given(parts=st.lists(st.one_of(st.sampled_from(PROMPT_PIECES), st.text(max_size=4)), max_size=6), cell=cells)
def test_prompt_templates(parts, cell, tmp_path):
    row = json.dumps({"prompt": "1+1=", "x": cell, "completion": "2"}).encode()
    try_rows(tmp_path, row, ".jsonl", {"completion": "completion", "template": "".join(parts)})


# ------------------------------------------------------------------------------------------------------- checkpoints

CHECKPOINT_FILES = {"model.safetensors": b"weights" * 20, "optimizer.pt": b"moments" * 20}
MANIFESTS = st.recursive(
    st.one_of(scalars, st.sampled_from(["../../etc/passwd", "/etc/passwd", "model.safetensors", "\0"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from([*CHECKPOINT_FILES, "..", "/", "bytes", "sha256", "x"]), inner, max_size=2),
    ),
    max_leaves=5,
)


@st.composite
def broken_checkpoints(draw):
    """Changes to the files of a checkpoint: name -> new content, or None for a file that is gone; and to its state."""
    files = {}
    for name in draw(st.sets(st.sampled_from([*CHECKPOINT_FILES, "posttrain.json"]), max_size=2)):
        files[name] = draw(st.one_of(st.none(), st.binary(max_size=60), st.sampled_from([b"[" * 5000, b"{}", b"null"])))
    keys = st.sampled_from(["format", "step", "files", "seal", "made_by", "new"])
    return files, draw(st.dictionaries(keys, st.one_of(MANIFESTS, values), max_size=2))


def try_checkpoint(folder, change):
    """Only what is whole is found, also where somebody wrote a fitting checksum over nonsense."""
    files, state = change
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    staged = folder / "checkpoints" / STAGING / "checkpoint-3"
    staged.mkdir(parents=True)
    for name, content in CHECKPOINT_FILES.items():
        (staged / name).write_bytes(content)
    checkpoint = staged.parents[1] / staged.name
    commit(staged, checkpoint, {"step": 3, "made_by": {}})
    if state:
        sealed = json.loads((checkpoint / STATE_FILE).read_text()) | state
        sealed.pop("seal")
        (checkpoint / STATE_FILE).write_text(json.dumps(sealed | {"seal": _seal(sealed)}))
    for name, content in files.items():
        (checkpoint / name).unlink()
        if content is not None:
            (checkpoint / name).write_bytes(content)
    for resume in ("auto", str(checkpoint)):
        found = only_user_errors(find_checkpoint, checkpoint.parent, resume)
        if found is not None:
            assert isinstance(read_state(found.checkpoint)["step"], int)
            assert all((found.checkpoint / name).read_bytes() == content for name, content in CHECKPOINT_FILES.items())
    assert only_user_errors(complete_checkpoints, checkpoint.parent) is not None
    assert only_user_errors(retain, checkpoint.parent, 1) == []


@walk(SHORT)
@given(change=broken_checkpoints())
def test_checkpoints(change, tmp_path):
    try_checkpoint(tmp_path, change)


@pytest.mark.slow
@walk(LONG)
@given(change=broken_checkpoints())
def test_checkpoints_further(change, tmp_path):
    try_checkpoint(tmp_path, change)
