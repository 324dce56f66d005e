"""Texts that others wrote reach the terminal as characters, never as commands to it.

Before there was one module that prints, commands printed rows, labels, names and errors as they came, `rich` read
markup in them, and so did logs and tracebacks of libraries.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import logging
import re
import shutil
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.cli.check import check_recipe
from posttrain.cli.inspect import inspect_command
from posttrain.cli.verify import verify_command
from posttrain.config.schema import ModelConfig
from posttrain.data.traces import Manifest, Trace, manifest_path
from posttrain.errors import ModelError
from posttrain.models.tokenizer import load_tokenizer
from posttrain.tracking.console import PlainConsole

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
ATTACKS = {
    "clipboard": CLIPBOARD,
    "clipboard in 8 bits": "\x9d52;c;cm0gLXJmIH4=\x9c",
    "title": "\x1b]0;root@host\x1b\\",
    "link": "\x1b]8;;file:///etc/passwd\x1b\\here\x1b]8;;\x1b\\",
    "erased screen": "\x1b[2J\x1b[H",
    "overwritten line": "all is wrong\rall is right",
    "backspaces": "wrong\x08\x08\x08\x08\x08right",
    "concealed": "\x1b[8mhidden\x1b[0m",
    "turned around": "\u202egnorw\u202c",
    "tags": "".join(chr(0xE0000 + ord(letter)) for letter in "hidden"),
    "no width": "wro\u200bng\ufeff",
    "a text in selectors of variants": "a" + "".join(chr(0xE0100 + 16 + ord(c)) for c in "wire money"),
    "a text in the old selectors": "a" + "".join(chr(0xFE00 + ord(c) % 16) * 2 for c in "wire money"),
    "fillers": "wro\u3164\u115f\uffa0\u2800\u034fng",
    "device status": "\x1b[6n\x05",
    "lone surrogate": "\ud800",
}
OBEYED = set("\x1b\x07\x08\r\x05\x9b\x9c\x9d\u202e\u202c\u200b\ufeff\ud800") | {chr(0xE0000 + i) for i in range(512)}
OBEYED |= set("\u3164\u115f\uffa0\u2800\u034f")


@pytest.fixture
def terminal() -> ModuleType:
    """The module that prints; asked for here, so that the tests of commands run without it."""
    from posttrain import terminal

    return terminal


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_nothing_that_a_terminal_obeys_is_left(attack: str, terminal, capsys: pytest.CaptureFixture[str]) -> None:
    shown = terminal.visible(f"before {attack} after")
    assert shown.startswith("before ") and shown.endswith(" after") and not OBEYED & set(shown)
    assert not re.search("[\ufe00-\ufe0f]{2}", shown)
    terminal.say(attack)
    terminal.say(attack, err=True, fg="red")
    terminal.console().print(attack)
    out = capsys.readouterr()
    assert not OBEYED & set(out.out + out.err)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_runs_console_shows_messages(attack: str) -> None:
    stream = io.StringIO()
    PlainConsole(10, "loss", stream).message(attack)
    assert not OBEYED & set(stream.getvalue())


def test_ordinary_text_and_json_stay_what_they_are(terminal) -> None:
    for text in ("a\tb\nc", "naïve 数学 \u0646\u0645\u200c\u06cc", "👩\u200d🔬 ∑ ½", "{'a': \"b\\n\"}"):
        assert terminal.visible(text) == text
    for attack in ATTACKS.values():
        written = json.dumps({"text": attack}, ensure_ascii=False)
        assert json.loads(terminal.visible(written)) == {"text": attack}


def test_a_rich_table_reads_no_markup_in_foreign_text(terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console(force_terminal=True).print("[link=file:///etc/passwd]here[/link] [bold]x[/bold]")
    assert capsys.readouterr().out == "[link=file:///etc/passwd]here[/link] [bold]x[/bold]\n"


def test_check_shows_rows(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{i}+1={CLIPBOARD}", "answer": str(i + 1)} for i in range(4)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.yaml").write_text(
        "model: {init: {hidden_size: 32, layers: 1, tokenizer: {type: bpe, vocab_size: 300}}}\n"
        "data: {prompts: {path: problems.jsonl, prompt: question, reference: answer}}\n"
        "method: {name: grpo}\nverifier: [{type: numeric}]\nrollouts: {samples_per_prompt: 4, max_new_tokens: 16}\n"
        "batch: {prompts_per_step: 4, micro_batch: 4}\ntraining: {max_steps: 2}\noutput: run\n"
    )
    check_recipe(Path("recipe.yaml"), [], online=False, world_size=1)
    out = capsys.readouterr().out
    assert "52;c;cm0gLXJmIH4=" in out and not OBEYED & set(out)


def test_verify_shows_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, config = tmp_path / f"{CLIPBOARD}.jsonl", tmp_path / "audit.yaml"  # shown as the place of the finding
    file.write_text(json.dumps({"prompt": "1+1", "reference": "two"}) + "\n")
    data = {"path": str(file), "reference": "reference"}
    config.write_text(json.dumps({"data": data, "verifier": [{"type": "numeric"}]}))
    verify_command(None, config, [], None)
    out = capsys.readouterr().out
    assert "gold that cannot be read" in out and "52;c;" in out and not OBEYED & set(out)


@pytest.mark.parametrize("as_json", [False, True])
def test_inspect_shows_names_of_policies(tmp_path: Path, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path, label = tmp_path / "traces.jsonl", f"policy{CLIPBOARD}\x9b2J"
    manifest = Manifest(id="m", kind="taken in", policy={"label": label}, data={}, problems_hash="")
    manifest_path(path).write_text(json.dumps(asdict(manifest)))
    path.write_text(Trace("p", 0, "q", "a", label, "m", "a", {}, verdict="correct", outcome=1.0).to_json() + "\n")
    inspect_command([path], policy=None, k="1", output=None, as_json=as_json)
    out = capsys.readouterr().out
    assert "52;c;" in out and not OBEYED & set(out)


def test_errors_show_names(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.cli.main import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({f"metho\x1b]52;c;eA==\x07{chr(0x202E)}": 1}))
    for arguments in (["check", str(recipe)], ["methods", CLIPBOARD], [CLIPBOARD]):
        monkeypatch.setattr(sys, "argv", ["posttrain", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr()
        assert ended.value.code == 2 and "52;c;" in out.err and not OBEYED & set(out.out + out.err)


def test_logs_and_tracebacks_of_others_are_guarded(terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)  # which is put back
    terminal.guard()
    log, handler = logging.getLogger("posttrain.test.library"), logging.StreamHandler()
    log.addHandler(handler)
    log.warning("config says %s, \rall is well\x1b[A", CLIPBOARD)
    log.removeHandler(handler)
    print("\x1b[8mhidden\x1b[0m \x1b[1;08mhidden", file=sys.stderr)
    sys.__excepthook__(ValueError, ValueError(CLIPBOARD), None)
    for part in ("\x1b", "]52;c;eA==\x07"):  # in two writes
        print(part, end="", file=sys.stdout)
    printed = streams[0].getvalue() + streams[1].getvalue()
    assert r"\rall is well\u001b[A" in printed, "a log moves nowhere"
    assert printed.count("\\u001b]52;c;") == 3 and "\x1b]" not in printed and "8m" in printed
    assert "\x1b[8m" not in printed and "\x1b[1;08m" not in printed
    print("\r 50%|\x1b[32m###\x1b[0m|\x1b[A\x1b[K", end="", file=sys.stderr)
    assert streams[1].getvalue().endswith("\r 50%|\x1b[32m###\x1b[0m|\x1b[A\x1b[K"), "a progress bar still moves"


def test_no_module_prints_by_itself(terminal) -> None:
    package = Path(terminal.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.name in ("terminal.py", "sandbox_runner.py"):  # the second speaks to its parent
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in ("print", "typer.echo", "typer.secho", "click.echo", "Console", "RichConsole") or name.endswith(
                ("stdout.write", "stderr.write")
            ):
                found.append(f"{path.relative_to(package)}:{node.lineno}: {name}")
    assert found == []


WORLD = """
import os, subprocess, sys
from posttrain.environments.base import Step

class World:
    def reset(self, problem, seed):
        return "begin"

    def step(self, action):
        print(action)
        print(action, file=sys.stderr)
        os.write(1, action.encode())
        os.write(2, action.encode())
        subprocess.run(["/bin/echo", action])
        raise ValueError(action)
"""


def test_an_environment_prints_into_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where there is no run, as in `check`, `play` and `eval`, it had the terminal, and so had what policies say."""
    from posttrain.data.sample import Problem
    from posttrain.environments.pool import EnvironmentPool
    from posttrain.environments.python import PythonEnvironment

    (tmp_path / "world.py").write_text(WORLD)
    config = PythonEnvironment.Config(factory=f"{tmp_path / 'world.py'}:World", workers=1)
    with closing(EnvironmentPool(config)) as pool:
        pool.reset({0: (Problem("p", "q"), 0)})
        pool.step({0: CLIPBOARD})
        written = pool.log.read_text(errors="replace")
        assert pool.log.stat().st_mode & 0o077 == 0
    assert written.count(r"\u001b]52;c;") >= 3 and written.count(CLIPBOARD) == 3  # by itself it writes what it likes
    said = capfd.readouterr()
    assert said.out + said.err == ""
    pool.log.unlink()


LOADS = """
import sys
from posttrain.terminal import guard
guard()
from posttrain.config.schema import ModelConfig
from posttrain.models.loading import load_policy
import posttrain.config.foreign_files as files
if sys.argv[2] == "unchecked":  # as where a model comes from the Hub's cache
    files.check_names = lambda names, file: None
load_policy(ModelConfig(path=sys.argv[1]), seed=0)
"""


def test_names_of_tensors_in_a_librarys_report(tmp_path: Path, tiny_model: Path, apart) -> None:
    """transformers prints the names of tensors that a model has too many, with colours of its own."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    moves = "\x1b[9A\x1b[2K\x1b[?25l\rall is well\x1b[J"
    save_file(weights | {f"extra{moves}": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "loads.py").write_text(LOADS)
    process = apart([tmp_path / "loads.py", folder, "unchecked"], tmp_path / "said")
    process.join(120)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert process.exitcode == 0, said
    assert r"extra\u001b[9A\u001b[2K\u001b[?25l\rall is well\u001b[J" in said
    assert not re.search(r"\x1b\[[0-9?;]*[^0-9?;m]", said)
    for name in (f"extra{moves}", "extra\nposttrain: all is well"):
        save_file(weights | {name: torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match="name is not printable"):
            load_tokenizer(ModelConfig(path=str(folder)))


LOGS = """
import logging
from posttrain.verifiers.verdict import Status, Verdict

class Logs:
    name = "logs"

    def __call__(self, problem, completion):
        logging.getLogger("a.parser").warning("cannot read %s", completion)
        return Verdict(Status.WRONG)
"""


def test_what_a_library_logs_in_a_worker(tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As parsers log an answer that they cannot read; from workers without a log it came to the terminal as it was."""
    from posttrain.config.schema import VerifierPoolConfig
    from posttrain.data.sample import Problem
    from posttrain.verifiers.pool import VerifierPool

    (tmp_path / "verifier_that_logs.py").write_text(LOGS)
    monkeypatch.syspath_prepend(tmp_path)
    verifier = importlib.import_module("verifier_that_logs").Logs()
    with closing(VerifierPool([verifier], VerifierPoolConfig(workers=1))) as pool:
        pool.verify([Problem("p", "q", "r")], [CLIPBOARD])
    said = capfd.readouterr().err
    assert r"cannot read \u001b]52;c;" in said and not OBEYED & set(said)
