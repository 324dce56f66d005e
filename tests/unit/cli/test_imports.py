"""What each command and each shell imports. Time cannot be tested; the modules that take it can."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = ("PIL", "torch", "peft", "datasets", "pandas", "trl", "accelerate", "matplotlib", "vllm", "ray", "sympy")
PICTURES = (
    "posttrain.data.fetched",
    "posttrain.models.picture_classifier",
    "posttrain.data.pictures",
    "posttrain.data.picture_text",
    "posttrain.models.processor",
    "posttrain.models.eyes",
    "posttrain.models.tower",
    "posttrain.rollouts.vllm_pictures",
)
"""What no run on text imports."""

RECIPES = {
    "dpo": """
model: {init: {hidden_size: 32, layers: 1}}
data: {preferences: {path: pairs.jsonl}}
method: {name: dpo}
batch: {rows_per_step: 2, micro_batch: 2}
training: {learning_rate: 1.0e-3, max_steps: 2}
output: run
""",
    "grpo": """
model: {init: {hidden_size: 32, layers: 1}}
data: {prompts: {path: problems.jsonl, prompt: question, reference: answer}}
verifier: [{type: numeric}]
rollouts: {samples_per_prompt: 2, max_new_tokens: 8}
method: {name: grpo}
batch: {prompts_per_step: 2, micro_batch: 2}
training: {learning_rate: 1.0e-3, max_steps: 2}
output: run
""",
    "sample": """
data: {prompts: {path: problems.jsonl, prompt: question, reference: answer}}
verifier: [{type: numeric}]
rollouts: {samples_per_prompt: 2, max_new_tokens: 8}
output: traces.jsonl
""",
}
FOLDER = "model={path: start}"

WITHOUT_TORCH = """
import json, sys
found = {}
def note(name):
    beside = {"PIL"} if "transformers.utils" in sys.modules else set()  # which imports it by itself
    found[name] = sorted(m for m in HEAVY if m in sys.modules and m not in beside) + [
        m for m in sys.modules if m.startswith("transformers.models.") and ".modeling_" in m]
import posttrain
note("import posttrain")
import posttrain.methods
note("import posttrain.methods")
from posttrain.cli.main import app
def run(*arguments):
    sys.argv = ["posttrain", *arguments]
    try:
        app(arguments, standalone_mode=False)
    except SystemExit as ended:
        assert ended.code in (0, None), (arguments, ended.code)
    note(" ".join(arguments))
run("--help")
run("--version")
run("methods")
run("methods", "grpo")
for arguments in CHECKS:
    run("check", *arguments)
from posttrain.models.tokenizer import load_tokenizer
from posttrain.config.schema import ModelConfig
tokenizer = load_tokenizer(ModelConfig(path="start"))
class Imports(Exception): pass
def said(text):
    said_by[command].append(text)
    note(f"{command}: {text}")
    if text.startswith("importing PyTorch"):
        raise Imports
import posttrain.cli.main, posttrain.cli.train, posttrain.cli.evaluate, posttrain.cli.sample
for module in (posttrain.cli.main, posttrain.cli.train, posttrain.cli.evaluate, posttrain.cli.sample):
    module.phase = said
said_by = {}
for command, arguments in SLOW.items():
    said_by[command] = []
    try:
        run(command, *arguments)
    except Imports:
        pass
ids = tokenizer.apply_chat_template([{"role": "user", "content": "1+1=?"}], add_generation_prompt=True)["input_ids"]
json.dump({"imported": found, "said": said_by, "ids": ids, "class": type(tokenizer).__name__}, open("found.json", "w"))
"""


def python(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def start_folder(folder: Path) -> None:
    """A tiny model with a chat template, saved."""
    import torch

    from posttrain.config.schema import ModelInit
    from posttrain.models.initial import build_model
    from posttrain.models.tokenizer import build_tokenizer

    init = ModelInit(hidden_size=16, layers=1)
    tokenizer = build_tokenizer(init.tokenizer, None)
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(folder)
    build_model(init, tokenizer, seed=0, dtype=torch.float32).save_pretrained(folder)


def test_nothing_that_computes_is_imported_where_nothing_is_computed(tmp_path: Path) -> None:
    for name, recipe in RECIPES.items():
        (tmp_path / f"{name}.yaml").write_text(recipe)
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "x"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    latex = [r"\frac{1}{2}", r"\sqrt{3}", r"x^2+1", r"\left(1, 2\right]"]  # read by a worker, with sympy
    rows = [{"question": f"{i}+1=", "answer": latex[i]} for i in range(4)]
    (tmp_path / "latex.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start_folder(tmp_path / "start")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    lora = ["dpo.yaml", FOLDER, "model.peft={type: lora, r: 2}"]
    latex = ["grpo.yaml", FOLDER, "verifier=[{type: math}]", "data.prompts.path=latex.jsonl"]
    checks = [["dpo.yaml"], ["grpo.yaml"], ["dpo.yaml", FOLDER], ["grpo.yaml", FOLDER], lora, latex]
    slow = {
        "train": ["dpo.yaml", FOLDER],
        "eval": ["start", "--benchmarks", "chain-sum-3"],
        "sample": ["start", "--config", "sample.yaml"],
    }
    python(f"HEAVY, CHECKS, SLOW = {(*HEAVY, *PICTURES)}, {checks}, {slow}\n{WITHOUT_TORCH}", tmp_path)

    found = json.loads((tmp_path / "found.json").read_text())
    assert all(imported == [] for imported in found["imported"].values()), found["imported"]
    assert len(found["imported"]) == 12 + 2 * len(slow)  # each was noted
    for command, said in found["said"].items():  # before seconds of imports somebody has been told, twice
        assert [text.split()[0] for text in said] == ["reading", "importing"], command
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert after - before == {Path("found.json")}, "check writes nothing"

    from posttrain.config.schema import ModelConfig
    from posttrain.models.tokenizer import load_tokenizer

    here = load_tokenizer(ModelConfig(path=str(tmp_path / "start")))
    template = here.apply_chat_template([{"role": "user", "content": "1+1=?"}], add_generation_prompt=True)
    assert (found["ids"], found["class"]) == (template["input_ids"], type(here).__name__), "the tokenizer is the same"


SHELLS_ALONE = """
import json, sys
import posttrain.trainers.run as run
from importlib import import_module
def trainers():
    names = {m.split(".")[2] for m in sys.modules if m.startswith("trl.trainer.") and m.endswith("_trainer")}
    return sorted(names - {"base_trainer"})
found = {"pictures": [m for m in PICTURES if m in sys.modules]}
found |= {"run": trainers(), "plots": "matplotlib" in sys.modules, "vllm": "vllm" in sys.modules}
shells = {}
for name in ("sft", "offline", "reward", "preference", "online"):
    before = set(trainers())
    module, shell = run.SHELLS[name]
    assert getattr(import_module(module), shell).__mro__
    shells[name] = sorted(set(trainers()) - before)
from pathlib import Path
from posttrain.config.loading import load_recipe
from posttrain.methods import CONFIGS
run.train(load_recipe(Path("dpo.yaml"), [], CONFIGS))
found["pictures"] += [m for m in PICTURES if m in sys.modules]
json.dump({**found, "shells": shells}, open("found.json", "w"))
"""


def test_a_shell_imports_its_own_trl_trainer_alone(tmp_path: Path) -> None:
    """And a whole run on text nothing that is about pictures."""
    (tmp_path / "dpo.yaml").write_text(RECIPES["dpo"])
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "x"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    python(f"PICTURES = {PICTURES}\n{SHELLS_ALONE}", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {
        "pictures": [],
        "run": [],
        "plots": False,
        "vllm": False,
        "shells": {
            "sft": ["sft_trainer"],
            "offline": [],  # it stands on the same one
            "reward": ["reward_trainer"],
            "preference": ["dpo_trainer"],
            "online": ["grpo_trainer"],
        },
    }


COLLECTIONS = """
import gc
from posttrain.imports import importing
seen = []
gc.callbacks.append(lambda when, found: seen.append(found["generation"]) if when == "start" else None)
with importing():
    made = [[number] for number in range(200_000)]
assert seen == [], seen
assert gc.isenabled() and gc.get_freeze_count() > 200_000
gc.collect()
with importing():
    cycle = [made]
    cycle.append(cycle)
    before = gc.get_freeze_count()
assert gc.get_freeze_count() == before, "garbage of a run would stay for good"
del cycle
assert gc.collect() > 0
"""


def test_imports_are_not_searched_for_garbage_and_what_comes_after_them_is(tmp_path: Path) -> None:
    python(COLLECTIONS, tmp_path)
