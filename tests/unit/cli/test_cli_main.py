from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from posttrain.cli import main as cli
from posttrain.errors import RecipeError, RecipeErrors

RECIPE = """\
model: {init: {hidden_size: 32, layers: 1}}
data: {prompts: {task: chain_sum, levels: [2], size: 32}}
method: {name: grpo}
verifier: [{type: procedural}]
rollouts: {samples_per_prompt: 4, max_new_tokens: 16}
batch: {prompts_per_step: 4, micro_batch: 4}
training: {learning_rate: 1e-3, max_steps: 2}
output: run
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in an empty folder with a recipe; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("pipeline.yaml").write_text("pipeline: p\nstages: []\n")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["posttrain", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call


def test_help_loads_no_heavy_package() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['posttrain', *sys.argv[1:]]\n"
        "try:\n    runpy.run_module('posttrain', run_name='__main__')\n"
        "except SystemExit as end:\n    print('exit', end.code)\n"
        "print(*(m for m in ('torch', 'transformers', 'datasets', 'trl', 'matplotlib') if m in sys.modules), 'end')"
    )
    for arguments in (["--help"], ["train", "--help"], ["check", "--help"], ["eval", "--help"], ["run", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert "Usage:" in done.stdout and done.stdout.endswith("exit 0\nend\n")


def test_all_commands_are_there(call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for command in ("train", "run", "check", "eval", "contract", "convert", "methods", "env"):
        assert f" {command} " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["train", "recipe.yml"], "error: recipe.yml: no such file\n  did you mean 'recipe.yaml'?"),
        (
            ["train", "pipeline.yaml"],
            "error: pipeline.yaml: this is a pipeline, not a recipe\n  posttrain run pipeline.yaml",
        ),
        (["train", "recipe.yaml", "seed=x"], "error: override 'seed=x': seed: expected a whole number (at least 0"),
        (["check", "recipe.yaml", "batch.micro_batch=5"], "do not divide into micro-batches of 5\n  nearest:"),
        (["check", "recipe.yaml", "--world-size", "3"], "4 prompts per step do not divide by 3 ranks"),
        (["train", "recipe.yaml", "rollouts=null", "--dry-run"], "method grpo needs `rollouts`"),
        (["train", "recipe.yaml", "rollouts=null"], "method grpo needs `rollouts`"),
        (["train", "recipe.yaml", "method.name=gpro"], "unknown method 'gpro'\n  did you mean 'grpo'?"),
        (["methods", "gpro"], "error: no method 'gpro'\n  did you mean 'grpo'?"),
        (["eval", "model"], "error: nothing to evaluate on\n  give --benchmarks"),
        (["eval", "--benchmarks", "gsm8k"], "error: no model given"),
        (["eval", "model", "--benchmarks", "gsm8"], "did you mean 'gsm8k'?"),
        (
            ["eval", "model", "--benchmarks", "gsm8k", "--samples", "0"],
            "'samples=0': samples: must be at least 1, got 0",
        ),
        (["eval", "model", "--benchmarks", "gsm8k", "--k", "x"], "k.0: expected a whole number, got text 'x'"),
        (["eval", "model", "--benchmarks", "gsm8k", "sample=2"], "sample: unknown key\n  did you mean 'samples'?"),
        (["eval", "model", "--benchmarks", "gsm8k", "every=2"], "every: the key has no effect"),
        (["eval", "model", "--benchmarks", "gsm8k", "--dtype", "half"], "dtype: expected one of float32, bfloat16"),
        (["run", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
    ],
)
def test_user_errors_go_to_stderr_without_a_traceback(call, arguments: list[str], message: str) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err and "\nerror: " in f"\n{err}" and "Traceback" not in err


def test_wrong_usage(call) -> None:
    code, _, err = call("train")
    assert code == 2 and "Missing argument" in err
    code, _, err = call("trian", "recipe.yaml")
    assert code == 2 and "No such command" in err


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (RecipeErrors([RecipeError("a", where="f:1"), RecipeError("b", hint="c")]), 2, "error: f:1: a\nb\n  c\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(call, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, text: str) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def only() -> None:
        raise raised

    monkeypatch.setattr(cli, "app", app)
    found, _, err = call()
    assert found == code and err == text


def test_defects_keep_their_traceback(call, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def only() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["posttrain"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_dry_run_writes_the_resolved_recipe_and_stops(call) -> None:
    code, out, _ = call("train", "recipe.yaml", "training.max_steps=3", "--dry-run")
    assert code == 0 and out.endswith(f"resolved recipe: {Path('run/resolved.yaml')}\n")
    assert "optimizer steps       3" in out and "peak" in out
    text = Path("run/resolved.yaml").read_text()
    assert "max_steps: 3" in text and "adam_beta2: 0.999" in text
    # What was resolved is a recipe again, and a dry run may be repeated.
    code, out, _ = call("train", "run/resolved.yaml", "--dry-run")
    assert code == 0 and Path("run/resolved.yaml").read_text() == text


def test_dry_run_does_not_overwrite_a_run(call) -> None:
    Path("run/model").mkdir(parents=True)
    code, _, err = call("train", "recipe.yaml", "--dry-run")
    assert code == 2 and "run: this folder holds a run" in err and not Path("run/resolved.yaml").exists()


def test_dry_run_plans_for_the_ranks_of_a_launcher(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, out, _ = call("train", "recipe.yaml", "--dry-run")
    assert "ranks                 2" in out


def test_a_stopped_run_exits_with_its_signal_and_says_how_to_go_on(call, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.trainers import run

    def stopped(recipe, **options):
        return run.RunResult(Path(recipe.output), Path("model"), steps=1, stopped=True, signal=15)

    monkeypatch.setattr(run, "train", stopped)
    code, _, err = call("train", "recipe.yaml")
    assert code == 143
    assert "stopped after step 1; go on with: posttrain train recipe.yaml --resume auto" in err


def test_changes_are_allowed_only_where_something_is_resumed(call) -> None:
    code, _, err = call("train", "recipe.yaml", "--allow-changed", "seed")
    assert code == 2 and "--allow-changed has no effect without --resume" in err


def test_a_pipeline_stage_stopped_by_a_signal_exits_with_it(call, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.pipeline import runner

    def stopped(*_, **__):
        raise KeyboardInterrupt(15)

    monkeypatch.setattr(runner, "run_pipeline", stopped)
    assert call("run", "pipeline.yaml")[0] == 143


def test_replay_of_a_folder_without_a_run(call) -> None:
    code, _, err = call("replay", ".", "--step", "1")
    assert code == 2 and "no resolved.yaml here" in err


def test_methods(call) -> None:
    code, out, _ = call("methods")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "data.completions" in lines["sft"] and "data.prompts, rollouts, verifier" in lines["grpo"]
    code, out, _ = call("methods", "grpo")
    assert code == 0
    epsilon = next(line for line in out.splitlines() if line.split()[0] == "epsilon")
    assert "0.2" in epsilon and "a number (greater than 0)" in epsilon and "clip range" in epsilon


def test_benchmarks_are_listed(call) -> None:
    code, out, _ = call("eval", "--list")
    assert code == 0 and "gsm8k" in out and "countdown-3" in out
