"""A newcomer's folder, made from docs/own.md: its files, its commands, nothing of this repository."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import posttrain as pt
from posttrain.cli.main import app
from posttrain.config.plugins import load_plugins
from posttrain.config.schema import TaskSource
from posttrain.contract.shell import same_run
from posttrain.data.tasks import generate_examples
from posttrain.errors import DataError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own.md").read_text()
FILES = dict(re.findall(r"^`(\S+\.\w+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch, plugins_forgotten):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    result = CliRunner().invoke(app, shlex.split(line.removeprefix("posttrain ")))
    assert result.exit_code == 0, (line, result.output, result.exception)
    return result.output


def test_the_page_as_it_stands(folder):
    assert len(FILES["rewards.py"].splitlines()) <= 10 and len(FILES["my_method.py"].splitlines()) <= 42
    assert COMMANDS[0].startswith("pip install") and COMMANDS[1].startswith("mkdir")
    said = {}
    for line in COMMANDS[2:]:
        if line.startswith("python "):
            runpy.run_path(line.split()[1], run_name="__main__")
        else:
            said[line] = run(line)
    contract = said["posttrain contract my_method.py"].splitlines()
    assert contract[-1].endswith("checks passed") and not any(line.startswith("FAIL") for line in contract)
    shown = PAGE[PAGE.index("my_reinforce: defaults") :].split("\n```")[0].splitlines()
    assert all(line in contract for line in shown if line != "...")
    assert "my_reinforce" in (folder / "runs/method/resolved.yaml").read_text()
    assert "judged" in (folder / "runs/reward/verifier.log").read_text()
    verdicts = {sample["verdict"] for sample in pt.load_run(folder / "runs/task").samples}
    assert verdicts <= {"correct", "wrong"} and verdicts
    assert pt.load_run(folder / "runs/rows").metrics[-1]["step"] == 2


def test_a_broken_method_is_told_so_and_ends_with_1(folder):
    text = FILES["my_method.py"].replace("total.unit, total.count,", "total.unit, 1 + total.count,")
    (folder / "broken.py").write_text(text.replace("my_reinforce", "broken"))
    result = CliRunner().invoke(app, ["contract", "--losses-only", "broken.py"])
    assert result.exit_code == 1
    failed = [line for line in result.output.splitlines() if line.startswith("FAIL")]
    assert failed and "Counts are known" in failed[0]
    assert re.search(r"^1 of \d+ checks failed", result.output, re.MULTILINE)

    (folder / "raises.py").write_text(FILES["my_method.py"].replace("my_reinforce", "raises").replace("masked(-", "(-"))
    result = CliRunner().invoke(app, ["contract", "--losses-only", "raises.py"])
    assert result.exit_code == 1
    assert re.search(r"AttributeError: 'tuple' .* \(raises.py, line \d+\)", result.output)

    for asked, words in (("sfft", "did you mean 'sft'"), ("rewards.py", "it registers no method")):
        result = CliRunner().invoke(app, ["contract", asked])
        assert result.exit_code == 1 and words in str(result.exception)

    for lost in ("check_strict", "levels"):
        (folder / "no_task.py").write_text(FILES["my_task.py"].replace(lost, "other").replace("larger", "no_task"))
        result = CliRunner().invoke(app, ["--plugin", "no_task.py", "methods"])
        assert result.exit_code == 1 and f"no `{lost}`" in str(result.exception)
    load_plugins(["my_task.py"], where="here")
    with pytest.raises(DataError, match="'larger' writes no traces: it has no `expert_trace`"):
        generate_examples(TaskSource(task="larger", levels=[1], size=2), "completions")


@pytest.mark.slow
def test_installed_without_a_clone_and_killed(tmp_path, folder):
    """A wheel in a folder of its own; a run of the method is killed by SIGKILL, and resumed."""
    wheel, site = tmp_path / "wheel", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *source, "--wheel-dir", str(wheel), str(ROOT)], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), *map(str, wheel.glob("*.whl"))], check=True)
    env = os.environ | {"PYTHONPATH": str(site)}
    posttrain = [sys.executable, "-m", "posttrain"]
    where = [sys.executable, "-c", "import posttrain; print(posttrain.__file__)"]
    assert subprocess.run(where, env=env, capture_output=True, text=True).stdout.startswith(str(site))
    subprocess.run([*posttrain, "train", "method.yaml"], env=env, check=True)
    killed = [*posttrain, "train", "method.yaml", "output=runs/killed"]
    process, log = subprocess.Popen(killed, env=env), folder / "runs/killed/metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 4):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*killed, "--resume", "auto"], env=env, check=True)
    same_run(folder / "runs/method", folder / "runs/killed")
    for line in (
        "contract my_method.py --ranks",
        "replay runs/killed --step 7",
        "train reward.yaml",
        "train task.yaml",
    ):
        subprocess.run([*posttrain, *line.split()], env=env, check=True)
    subprocess.run([sys.executable, "program.py"], env=env, check=True)
