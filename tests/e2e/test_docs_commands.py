"""Commands of README and docs run as they are written: in a folder where what they name is small, or on the project."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config.loading import as_yaml
from posttrain.contract.recipes import tiny_recipe, write_model

ROOT = Path(__file__).parents[2]
DOCS = runpy.run_path(str(ROOT / "tests" / "unit" / "test_docs.py"))
README = re.search(r"```\n(posttrain check recipe.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]

OF_A_DOWNLOAD = "--data gsm8k=gsm8k.jsonl --limit 4 --max-new-tokens 8"
"""What takes the place of a benchmark that would be fetched."""

AXOLOTL = "base_model: model\ndatasets: [{path: rows.jsonl, type: alpaca}]\nmicro_batch_size: 2\nmax_steps: 4\n"


def run(words, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_readme(tmp_path):
    model = write_model(tmp_path / "model")
    recipe = tiny_recipe({"name": "grpo"}, tmp_path, model)
    recipe |= {"output": "runs/gsm8k-grpo"}
    recipe["training"] |= {"max_steps": 60, "save_steps": 50}
    problems = {"name": "sums", "data": {"task": "chain_sum", "levels": [2], "size": 4}}
    problems |= {"verifier": [{"type": "procedural"}]}
    recipe["evaluation"] = {"every": 60, "benchmarks": [problems], "max_new_tokens": 8}
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    sampled = {key: recipe[key] for key in ("data", "verifier")} | {"model": {"path": str(model)}}
    sampled |= {"rollouts": {"samples_per_prompt": 4, "max_new_tokens": 10}, "output": "traces.jsonl"}
    (tmp_path / "sample.yaml").write_text(as_yaml(sampled))
    (tmp_path / "axolotl.yaml").write_text(AXOLOTL)
    row = '{"question": "2+3=", "answer": "is\\n#### 5"}\n'
    (tmp_path / "gsm8k.jsonl").write_text(row * 8)
    ran = []
    for line in README.splitlines():
        words = shlex.split(line, comments=True)
        command = words[words.index("posttrain") + 1]
        if command == "run":
            continue  # two minutes by itself, and the first of all things that CI does
        if command == "train" and "--resume" not in words:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        if command == "convert":
            (tmp_path / "recipe.yaml").unlink()  # it overwrites nothing
        if words[0] == "accelerate":
            words = ["accelerate.commands.launch", *words[2:]]
        run([*words, *(OF_A_DOWNLOAD.split() if command == "eval" else [])], tmp_path)
        ran.append(command)
    assert ran.count("train") == 3 and len(ran) >= 10
    assert (tmp_path / "report.html").exists() and (tmp_path / "pairs.jsonl").exists() and (tmp_path / "out").is_dir()


def on_the_project():
    """Commands that only look, and whose files are the project's."""
    for page in DOCS["PAGES"]:
        lines = [
            line
            for _, language, block in DOCS["blocks"](page)
            if language in ("", "console")
            for line in DOCS["joined"](block)
        ]
        for line in lines:
            words = DOCS["words_of"](line)
            looks = words and words[0] in ("check", "inspect", "methods", "keys", "env", "verify", "eval", "--version")
            if not looks or any(word.isupper() for word in words) or (words[0] == "eval" and words[1:] != ["--list"]):
                continue
            if all((ROOT / word).exists() for word in words[1:] if re.search(r"\.(yaml|jsonl|py)$", word)):
                if not {"--output", "--plot", "--model"} & set(words):
                    yield words


LOOKS = {" ".join(words): words for words in on_the_project()}


@pytest.mark.slow
@pytest.mark.parametrize("line", LOOKS)
def test_commands_that_look_at_the_project(line):
    assert run(["posttrain", *LOOKS[line]], ROOT)
