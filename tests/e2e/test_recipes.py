"""Every recipe in the repository loads, passes `posttrain check`, and trains for two steps.

What a recipe would download, and a model that another recipe makes, is replaced by something small of the same form.
"""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.cli.play import play_command
from posttrain.config.loading import load_recipe
from posttrain.config.relative_paths import models_of
from posttrain.config.schema import FileSource, TaskSource, TraceSource
from posttrain.environments.gymnasium import GymnasiumText
from posttrain.environments.python import PythonEnvironment
from posttrain.environments.recorded import Recorded
from posttrain.methods import METHODS
from posttrain.methods.companions import Reasoner
from posttrain.models.loading import load_policy
from posttrain.pipeline.schema import load_pipeline
from posttrain.pipeline.stages import STAGES
from posttrain.trainers.run import train

ROOT = Path(__file__).resolve().parents[2]
FILES = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "recipes").rglob("*.yaml"))}
PIPELINES = [path for path, data in FILES.items() if "stages" in data]
RECIPES = [path for path in FILES if path not in PIPELINES]
JUDGED_BY = {path: yaml.safe_dump([FILES[path].get(key) for key in ("verifier", "environment")]) for path in RECIPES}
WITH_WORKERS = set({judged: path for path, judged in reversed(JUDGED_BY.items())}.values())
"""The first recipe of each verifier and environment. Workers of the others would load the same, and take longer to
start than all else that is done with a recipe here."""
CONFIGS = {name: cls.Config for name, cls in METHODS.items()}
WORLDS = ("data.prompts.levels=[3, 4, 5]", "data.prompts.size=16")
SCORED = ROOT / "tests" / "fixtures" / "scored_responses.jsonl"
WORD_PROBLEMS = ROOT / "tests" / "fixtures" / "word_problems.jsonl"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def small_pictured_model(tmp_path_factory):
    """What the recipes in recipes/pictures begin with."""
    recipe = ROOT / "recipes/pictures/sft-tiny-dot_sum.yaml"
    out = tmp_path_factory.mktemp("pictured") / "run"
    changes = ["training.max_steps=1", "data.completions.size=32", f"output={out}", "tracking.plots=false"]
    return train(load_recipe(recipe, changes, CONFIGS)).model_dir


def name_of(path):
    return str(path.relative_to(ROOT / "recipes"))


@pytest.fixture(scope="module")
def small_chat_model(tmp_path_factory):
    from posttrain.config.schema import ModelConfig

    folder = tmp_path_factory.mktemp("chat") / "model"
    init = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 2048}
    model, tokenizer = load_policy(ModelConfig(init=init), seed=0)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """What the expert does in the worlds of the recipes for agents, as these are here."""
    file = tmp_path_factory.mktemp("episodes") / "expert.jsonl"
    play_command(ROOT / "recipes/agents/grpo-rooms.yaml", [*WORLDS], "expert", 16, greedy=False, out=file)
    return file


def small_form(path, chat_model, testbed_model, pictured_model, offline_inputs, episodes, folder):
    """Overrides that make a recipe small and local without changing what it does."""
    recipe, (traces, critic) = load_recipe(path, [], CONFIGS), offline_inputs
    agents = path.parent.name == "agents"
    needs = METHODS[recipe.method.name](recipe.method).needs
    changes = ["training.max_steps=2", f"output={folder / 'run'}", "tracking.plots=false", "tracking.console=plain"]
    changes += [] if recipe.training.max_steps else ["training.num_train_epochs=null"]
    changes += ["training.save_steps=2"] if recipe.training.save_steps else []
    if recipe.model.path is not None:
        small = testbed_model if recipe.model.path.startswith("runs/") and not agents else chat_model
        small = small if recipe.model.pictures is None else pictured_model
        changes.append(f"model.path={small}")
    for section in needs.data:
        source = getattr(recipe.data, section)
        if path.parent.name in ("data", "real"):  # small files of the repository itself
            continue
        if isinstance(source, FileSource) and (ROOT / source.path).exists():
            continue
        if isinstance(source, FileSource):
            rows = SCORED if section == "preferences" else WORD_PROBLEMS
            changes += [f"data.{section}.path={rows}", f"data.{section}.name=null"]
        elif isinstance(source, TraceSource):
            changes.append(f"data.{section}.path={episodes if agents else traces}")
        else:
            changes.append(f"data.{section}.size=16")
    if isinstance(recipe.environment, Recorded.Config):
        changes.append(f"environment.path={episodes}")
    if agents and isinstance(recipe.data.prompts, TaskSource):
        changes += WORLDS
    changes += [f"method.{name}={testbed_model}" for name in models_of(recipe.method)]
    if recipe.critic is not None and recipe.critic.path is not None:
        changes.append(f"critic.path={critic}")
    changes += ["method.expert_rows_per_step=4"] if needs.expert_rows else []
    changes += ["data.max_prompt_length=null"] if recipe.data.max_prompt_length else []
    if needs.rollouts:
        changes += [f"rollouts.samples_per_prompt={max(2, needs.min_samples_per_prompt)}"]
        changes += ["rollouts.max_new_tokens=8", "batch.prompts_per_step=4"]
        changes += ["method.description_tokens=4"] if needs.companion(Reasoner) else []
    else:
        changes += ["batch.rows_per_step=8"]
    changes += ["rollouts.max_new_tokens=8"] if needs.samples else []
    changes += ["batch.micro_batch=4"]
    if path not in WITH_WORKERS:
        changes += ["verifier_pool.workers=0"] if recipe.verifier else []
        changes += ["environment.workers=0"] if recipe.environment is not None else []
    if recipe.evaluation is not None:
        changes += ["evaluation.every=2", "evaluation.benchmarks=[chain-sum-3]", "evaluation.limit=2"]
        changes += ["evaluation.max_new_tokens=8"]
    return changes


def needs_its_package(path):
    """Leaves the test out where the environment of the recipe is not installed."""
    environment = load_recipe(path, [], CONFIGS).environment
    if isinstance(environment, GymnasiumText.Config):
        pytest.importorskip("gymnasium")
    if isinstance(environment, PythonEnvironment.Config) and "textworld_game.py" in environment.factory:
        pytest.importorskip("textworld")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_loads_checks_and_trains(
    path, small_chat_model, tiny_model, small_pictured_model, offline_inputs, episodes, tmp_path
):
    needs_its_package(path)
    models = (small_chat_model, tiny_model, small_pictured_model)
    changes = small_form(path, *models, offline_inputs, episodes, tmp_path)
    checked = CliRunner().invoke(app, ["check", str(path), *changes])
    assert checked.exit_code == 0, checked.output + str(checked.exception)
    result = train(load_recipe(path, changes, CONFIGS))
    assert result.steps == 2 and not result.stopped
    assert (result.model_dir / "model.safetensors").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_checks_as_it_stands_without_a_network(path):
    """A recipe for local files, or a model that an earlier recipe makes, names them; all others pass."""
    needs_its_package(path)
    recipe = load_recipe(path, [], CONFIGS)
    made = {name: getattr(recipe.data, name) for name in ("prompts", "completions")}
    fewer = [f"data.{name}.size=256" for name, source in made.items() if getattr(source, "size", 0) > 256]  # all alike
    checked = CliRunner().invoke(app, ["check", str(path), *fewer])
    sources = (recipe.data.prompts, recipe.data.completions, recipe.data.preferences)
    local_rows = [s.path for s in sources if isinstance(s, FileSource) and s.path.endswith(".jsonl")]
    local_rows = [path for path in local_rows if not (ROOT / path).exists()]
    traces = recipe.data.traces
    local_rows += [traces.path.removesuffix(".jsonl")] if isinstance(traces, TraceSource) else []
    local_model = [recipe.model.path] if (recipe.model.path or "").startswith("runs/") else []
    if local_model or local_rows:
        assert checked.exit_code != 0
        assert any(missing in str(checked.exception) for missing in [*local_rows, *local_model])
    else:
        assert checked.exit_code == 0, checked.output + str(checked.exception)


@pytest.mark.parametrize("path", PIPELINES, ids=name_of)
def test_pipeline_loads(path):
    config, _ = load_pipeline(path, [], STAGES)
    assert config.stages
