"""Commands of README and docs run as they are written, page by page and in their order, in a folder where all that they
name is there and small. Those that cannot run here stand in `NOT_RUN` with the reason."""

import gzip
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import posttrain as pt
from posttrain.config.schema import ModelConfig
from posttrain.contract.recipes import tiny_recipe, write_preferences, write_traces
from posttrain.data.traces import manifest_path
from posttrain.models.loading import load_policy

ROOT = Path(__file__).parents[2]
DOCS = runpy.run_path(str(ROOT / "tests" / "unit" / "test_docs.py"))

VLLM = "needs vLLM; tests/e2e/test_vllm_*.py and test_workers.py run such commands where it is installed"
MEASURES = "measures for minutes to hours; tests/e2e/test_speed_bench.py runs the scripts for a moment"
INDEX = "installs from an index of packages; tests/e2e/test_package.py installs the wheel, CI the rest"
OWN = "tests/e2e/test_own_files.py runs the whole page, with the files that it shows"
HUB = "fetches tasks from a hub"
NOT_RUN = {
    "make quickstart": "CI runs its command; it takes minutes",
    "make test": "it is what runs this",
    "posttrain run recipes/quickstart.yaml": "CI runs it for minutes; the folder of these tests holds a short one",
    "docker run": "needs Docker",
    "srun posttrain": "needs Slurm; tests/contracts/test_survival.py sends the same signals",
    "[ $? -eq 138 ]": "needs Slurm",
    "vllm serve": VLLM,
    "posttrain sample SETTINGS.yaml --engine vllm": VLLM,
    "posttrain sample s.yaml --engine vllm": VLLM,
    "posttrain eval MODEL --benchmarks gsm8k --engine vllm": VLLM,
    "python bench/": MEASURES,
    "python3 -m venv": INDEX,
    ".venv/bin/pip install": INDEX,
    "source .venv/bin/activate": INDEX,
    "pip install": INDEX,
    "posttrain train recipe.yaml training.report_to=[wandb]": "needs an account; tests/unit/trainers/test_trackers.py",
    "posttrain eval MODEL --harness lm-eval": f"{HUB}; tests/unit/evaluation/test_harness.py",
    "posttrain study traces": "trains ten arms; tests/unit/study/test_study_traces.py runs a small one",
    "mkdir mine && cd mine": OWN,
    "posttrain check reward.yaml": OWN,
    "posttrain train reward.yaml": OWN,
    "posttrain contract my_method.py": OWN,
    "posttrain train method.yaml": OWN,
    "posttrain replay runs/method --step 3": OWN,
    "posttrain check task.yaml --run-code": OWN,
    "posttrain train task.yaml": OWN,
    "python program.py": OWN,
}
"""Beginning of a command -> why it does not run here."""

GSM8K = "--data gsm8k=gsm8k.jsonl --limit 4 --max-new-tokens 8"
CHANGED = {
    "posttrain eval runs/gsm8k-grpo/model --benchmarks gsm8k": ("--output", f"{GSM8K} --output"),
    "posttrain eval MODEL --benchmarks gsm8k,math500": (
        "--max-new-tokens 2048",
        f"{GSM8K} --data math500=math500.jsonl",
    ),
    "posttrain eval MODEL --benchmarks gsm8k,humaneval": ("--data humaneval", "--max-new-tokens 8 --data humaneval"),
    "posttrain inspect rows.jsonl": ("--against gsm8k", "--against tests.jsonl"),
    "posttrain sample runs/sft/model": ("runs/traces.jsonl", "runs/sampled.jsonl"),  # what follows wants right ones
    "posttrain eval runs/srpo/model": ("--revisions", "--limit 4 --max-new-tokens 8 --revisions"),
}
"""Beginning of a command -> what of it is put otherwise here: benchmarks that would be fetched are files, and small."""


# --------------------------------------------------------------------------------------------------------- the pages


def commands(page):
    """Those of a page in order: each a line of a shell, with what continues it."""
    for _, language, block in DOCS["blocks"](page):
        if language not in ("", "console"):
            continue
        lines = DOCS["joined"](block)
        shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        loop = []
        for line in shown or lines:
            loop.append(line)
            if loop[0].startswith("for ") and line.strip() != "done; done":
                continue
            command = "\n".join(loop)
            loop = []
            if not command.lstrip().startswith("#") and command.strip():
                yield re.sub(r"\s+#[^\n]*", "", command)


def begins(command, table):
    """The entry of a table that a command begins with."""
    return next((key for key in table if command.startswith(key)), None)


ON_PAGES = {page: list(commands(page)) for page in DOCS["PAGES"]}
RUN = {page: [each for each in found if begins(each, NOT_RUN) is None] for page, found in ON_PAGES.items()}


def test_no_entry_is_without_its_command():
    every = [command for found in ON_PAGES.values() for command in found]
    for key in (*NOT_RUN, *CHANGED):
        assert any(command.startswith(key) for command in every), f"no page has {key!r}"
    for command in every:
        found = begins(command, CHANGED)
        assert found is None or CHANGED[found][0] in command, f"{command} has no {CHANGED[found][0]}"


# ------------------------------------------------------------------------------------------------------- the folder

CHAT = (
    "{% for m in messages %}{{ m.content + '<eos>' if m.role == 'assistant' else '<bos>' + m.content + '>' }}"
    "{% endfor %}"
)
SUMS = {"data": {"prompts": {"task": "chain_sum", "levels": [2], "size": 8}}, "verifier": [{"type": "procedural"}]}
ROWS = {"prompt": "What is 2 + 3?", "completion": "It is 5."}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


def as_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


class World:
    """A folder in which commands of the pages find what they name."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "recipes").symlink_to(ROOT / "recipes")
        (folder / "data").symlink_to(ROOT / "data")
        init = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 512}
        for part in load_policy(ModelConfig(init=init, chat_template=CHAT), seed=0):
            part.save_pretrained(folder / "MODEL")
        for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "runs/sft/model", "runs/base/model", "runs/srpo/model"):
            shutil.copytree(folder / "MODEL", folder / name)
        self.files()
        self.settings()
        self.runs()

    def write(self, name, data):
        text = data if isinstance(data, str) else yaml.safe_dump(data)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def files(self):
        """Rows of data and traces."""
        self.write("gsm8k.jsonl", as_lines(*({"question": f"{n}+3=", "answer": f"is\n#### {n + 3}"} for n in range(8))))
        shutil.copy(self.folder / "gsm8k.jsonl", self.folder / "gsm8k_test.jsonl")
        self.write("math500.jsonl", as_lines(*({"problem": f"{n}+3=", "answer": str(n + 3)} for n in range(4))))
        with gzip.open(self.folder / "humaneval.jsonl.gz", "wt") as file:
            file.write(as_lines(HUMANEVAL))
        self.write("rows.jsonl", as_lines(*({**ROWS, "prompt": f"What is {n} + 3?"} for n in range(20))))
        chats = (
            {"messages": [{"role": "user", "content": f"{n}+1?"}, {"role": "assistant", "content": "?"}]}
            for n in range(4)
        )
        self.write("chats/data/train_sft-00000.jsonl", as_lines(*chats))
        votes = [
            {"prompt": f"{n}+1?", "completion": text, "label": text == "good"}
            for n in range(4)
            for text in ("good", "bad")
        ]
        self.write("votes.jsonl", as_lines(*votes))
        self.write("tests.jsonl", as_lines({"prompt": "What is 7 + 3?"}))
        for name in ("traces.jsonl", "runs/traces.jsonl", "runs/expert.jsonl"):
            path = write_traces(self.folder / name, [2, 3], 16)
            manifest = json.loads(manifest_path(path).read_text()) | {"id": path.stem}
            manifest_path(path).write_text(json.dumps(manifest))
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows += [row | {"sample": 3, "text": row["text"] + "1"} for row in rows if row["sample"] == 1]
            self.write(name, as_lines(*(row | {"reward": row["outcome"], "manifest": path.stem} for row in rows)))
        for name in ("pairs.jsonl", "held_out.jsonl", "summaries.jsonl", "stronger.jsonl"):
            write_preferences(self.folder / name)
        self.write(
            "minerva.jsonl", as_lines({"problem": "2+3=", "solution": "It is \\boxed{5}.", "completions": ["5"]})
        )

    def settings(self):
        """Files of settings that pages name and, where they show one, with its keys."""
        recipe = self.recipe({"name": "grpo"}, "runs/gsm8k-grpo", {"training.max_steps": 60, "training.save_steps": 50})
        self.write("recipe.yaml", recipe)
        self.write("RECIPE", SUMS | {key: value for key, value in recipe.items() if key not in SUMS})
        sampled = SUMS | {"verifier": recipe["verifier"], "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 8}}
        self.write("sample.yaml", sampled | {"model": {"path": "MODEL"}, "output": "sampled.jsonl"})
        self.write("axolotl.yaml", "base_model: MODEL\ndatasets: [{path: rows.jsonl, type: alpaca}]\nmax_steps: 4\n")
        self.write("audit.yaml", {"data": {"path": "minerva.jsonl", "prompt": "problem", "reference": "solution"}}
                   | {"verifier": [{"type": "math"}], "outputs": "completions"})  # fmt: skip
        steps = {"model": {"path": "runs/sft/model"}, "traces": ["traces.jsonl"], "verifier": [{"type": "procedural"}]}
        self.write("steps.yaml", steps | {"samples": 2, "max_new_tokens": 4, "separator": ";", "output": "steps.jsonl"})
        rewards = {"implicit": {"policy": "runs/dpo/model", "reference": "runs/sft/model"}}
        rewards |= {"explicit": {"path": "runs/reward/model"}, "data": {"held_out": {"path": "held_out.jsonl"}}}
        self.write("rewards.yaml", rewards)
        self.write("sft.yaml", self.recipe({"name": "sft"}, "unused"))
        self.write("grpo.yaml", self.recipe({"name": "grpo"}, "unused"))
        evaluate = {"benchmarks": ["chain-sum-2"], "samples": 2, "measure": "avg@2", "limit": 4, "max_new_tokens": 8}
        study = {
            "study": "small",
            "output": "runs/small-study",
            "seeds": 2,
            "arms": {"sft": "sft.yaml", "grpo": "grpo.yaml"},
        }
        self.write("study.yaml", study | {"evaluate": evaluate})

    def recipe(self, method, output, changes=None):
        """A tiny recipe that evaluates on gsm8k where it can."""
        (self.folder / "made").mkdir(exist_ok=True)
        evaluation = {"benchmarks": ["gsm8k"], "benchmark_paths": {"gsm8k": "gsm8k.jsonl"}, "samples": 4}
        given = {"evaluation": evaluation | {"max_new_tokens": 8, "every": 2}, "tracking.console": "plain"}
        given |= {"training.max_steps": 2, **(changes or {})}
        return tiny_recipe(method, self.folder / "made", Path("MODEL"), given) | {"output": output}

    def runs(self):
        """Runs that pages look at."""
        pairs = {"data.preferences": {"path": "pairs.jsonl", "chat": False}}
        held = {"evaluation": {"every": 2, "max_new_tokens": 8, "preferences": {"share": 0.2}}}
        self.train({"name": "dpo"}, "runs/dpo", pairs | held | {"model.path": "runs/sft/model"})
        self.train({"name": "simpo"}, "runs/simpo", pairs | held)
        self.train({"name": "reward"}, "runs/reward", pairs | {"evaluation": None})
        for seed in range(3):
            self.train({"name": "grpo"}, f"runs/grpo-{seed}", {"seed": seed})
            self.train({"name": "grpo", "scale_rewards": "none"}, f"runs/dapo-{seed}", {"seed": seed})
        shutil.copytree(self.folder / "runs/grpo-0", self.folder / "runs/gsm8k-grpo")
        shutil.copytree(self.folder / "runs/dapo-0", self.folder / "runs/gsm8k-rloo")
        for name, of in (("base", "grpo-0"), ("tuned", "dapo-1"), ("before", "grpo-1"), ("after", "dapo-2")):
            report = max((self.folder / "runs" / of / "evaluation").glob("step-*.json"))
            shutil.copy(report, self.folder / f"{name}.json")
        saved = {"training.max_steps": 300, "training.save_steps": 300, "evaluation": None}
        self.train({"name": "sft"}, "runs/my-run", saved)
        self.train({"name": "sft"}, "runs/lora", {"evaluation": None, "model.peft": {"type": "lora", "r": 2}})
        shutil.copytree(self.folder / "runs/lora/adapter", self.folder / "runs/my-run/adapter")
        short = "base.training.max_steps=20 grpo.training.max_steps=3 base_eval.limit=8 grpo_eval.limit=8"
        run(f"posttrain run recipes/quickstart.yaml {short}", self.folder)
        compared = "posttrain compare a=runs/grpo-0,runs/grpo-1,runs/grpo-2 b=runs/dapo-0,runs/dapo-1,runs/dapo-2"
        run(f"{compared} --benchmarks gsm8k --measure avg@4 --output comparison.json", self.folder)
        run("posttrain study study.yaml", self.folder)

    def train(self, method, output, changes):
        recipe = self.recipe(method, output, {"tracking.console": "off", **changes})
        pt.train({key: value for key, value in recipe.items() if value is not None})


OF_A_PAGE = {
    "README.md": dict.fromkeys(("runs/gsm8k-grpo", "pairs.jsonl")),
    "resume.md": {"runs/a": None, "recipe.yaml": ("runs/a", {"training.max_steps": 420, "training.save_steps": 100})},
    "agents.md": {
        "recipe.yaml": (
            "runs/agents/grpo",
            {
                "data.prompts": {"task": "rooms", "levels": [2], "size": 100},
                "environment": {"type": "rooms", "max_turns": 3, "episode_tokens": 256, "workers": 0},
                "verifier": None,
                "verifier_pool": None,
                "evaluation": None,
                "rollouts.max_new_tokens": 6,
            },
        )
    },
    "sweeps.md": {"recipe.yaml": ("runs/swept", {})},
    "studies.md": {"recipe.yaml": ("runs/swept", {}), "runs/small-study": None},
    "choose.md": dict.fromkeys(("runs/traces.jsonl", "runs/traces.manifest.json")),
    "data.md": {"pairs.jsonl": None},
    "evaluation.md": {"comparison.json": None},
}
"""Page -> what is otherwise in its folder: gone, or a recipe with this output and these changes."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(folder)
    try:
        return World(folder)
    finally:
        os.chdir(before)


# ---------------------------------------------------------------------------------------------------------- running


def environment():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "PATH": path, "HF_HUB_OFFLINE": "1"}


def run(command, folder):
    started = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(started, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def serve(command, folder):
    """A command that goes on until Ctrl-C, once it has said where."""
    started = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and "http://127.0.0.1:" in started.stdout.readline()
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=60) in (0, 130)


PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page, found in RUN.items() if found]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page, world, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(world.folder, folder, symlinks=True)
    for name, other in OF_A_PAGE.get(page.name, {}).items():
        if other is not None:
            recipe = world.recipe({"name": "grpo"}, *other)
            (folder / name).write_text(
                yaml.safe_dump({key: value for key, value in recipe.items() if value is not None})
            )
        elif (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    for command in RUN[page]:
        key = begins(command, CHANGED)
        if key is not None:
            command = command.replace(*CHANGED[key])
        if "--serve" in command:
            serve(command, folder)
        else:
            run(command, folder)
