"""The command line. Each command delegates to one function, and only its body imports heavy packages.

One module although it is long: it is the reference of all options in one place, and holds no logic.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain import __version__
from posttrain.cli.first_process import if_first
from posttrain.errors import LostRankError, PosttrainError, RecipeError
from posttrain.imports import importing
from posttrain.phases import phase
from posttrain.terminal import guard, say

app = typer.Typer(
    name="posttrain",
    help="Post-training of language models from one YAML recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="dotted overrides: training.max_steps=50")
]
EngineName = Annotated[str | None, typer.Option("--engine", help="what samples: transformers or vllm")]
Workers = Annotated[int | None, typer.Option("--workers", help="processes that sample and verify; above 1 on Ray")]
RayAddress = Annotated[str | None, typer.Option("--address", help="a running Ray cluster; default: this machine alone")]


def _print_version(asked: bool) -> None:
    if asked:
        say(f"posttrain {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point. User errors go to stderr without a traceback and exit with 2; a signal N exits with 128 + N."""
    if_first()
    guard()
    try:
        app()
    except PosttrainError as error:
        # Every rank finds the same mistake, and a lost rank has been told already: say it once.
        if os.environ.get("RANK", "0") == "0" and not isinstance(error, LostRankError):
            say("error: ", fg="red", bold=True, err=True, nl=False)
            say(str(error), err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of a library in Rust, which derives it from no `Exception`
            what = f"a library gave up: {error}; patterns in a tokenizer.json or a chat template do so"
        elif getattr(error, "errno", None) == errno.ENAMETOOLONG or "determine home directory" in str(error):
            what = f"no such path: {str(error)[:200]}"
        else:
            raise
        say("error: ", fg="red", bold=True, err=True, nl=False)
        say(what, err=True)
        sys.exit(2)


@app.callback()
def every_command(
    plugin: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|MODULE", help="load your own methods, tasks, ... first; several times"),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version and stop")
    ] = False,
) -> None:
    """Post-training of language models from one YAML recipe."""
    if plugin:
        phase(f"loading {', '.join(plugin)}")
        from posttrain.config.plugins import load_plugins

        load_plugins(plugin, where="--plugin")


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="go on from the newest checkpoint, or from this one")
    ] = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="resume although this differs, e.g. training.learning_rate; several times"),
    ] = None,
    trust_checkpoint: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoint", help="resume from DeepSpeed or FSDP state of somebody else, which may run code"
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, write resolved.yaml, and stop")] = False,
) -> None:
    """Train by a recipe. Works alone and under `accelerate launch`.

    Stopped by SIGINT, SIGTERM or SIGUSR1 it saves a checkpoint and exits with 130, 143 or 138: run it again with
    `--resume auto`.
    """
    phase(f"reading {recipe}")
    from posttrain.cli.train import dry_run as run_dry
    from posttrain.cli.train import run

    if dry_run:
        run_dry(recipe, overrides or [], world_size=int(os.environ.get("WORLD_SIZE", "1")))
    else:
        sys.exit(run(recipe, overrides or [], resume, allow_changed or [], trust_checkpoint))


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="YAML pipeline", show_default=False)],
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="last stage to run")] = None,
    force: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="run this stage again; may be given several times")
    ] = None,
) -> None:
    """Run the stages of a pipeline; finished stages are kept."""
    phase(f"reading {pipeline}")
    from posttrain.pipeline.runner import run_pipeline

    try:
        run_pipeline(pipeline, overrides or [], until=until, force=force or [])
    except KeyboardInterrupt as interrupt:  # a stage that a signal stopped says which
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    online: Annotated[bool, typer.Option("--online", help="fetch data and tokenizer that are not here yet")] = False,
    world_size: Annotated[int, typer.Option(min=1, help="ranks to plan the batch for")] = 1,
    batch: Annotated[
        bool, typer.Option("--batch", help="also make the first batch and show it; loads the model")
    ] = False,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="run the code that the recipe names: plugins, the model's own code")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PNG file for the first picture as the model sees it")
    ] = None,
) -> None:
    """Check a recipe: what it asks you to trust, keys, needs, batch table, one rendered sample, memory estimate; of a
    pipeline what it asks you to trust, and each stage.

    Loads no weights and runs none of the recipe's code by itself.
    """
    with importing():
        from posttrain.config.plugins import have_plugins, named_plugins
        from posttrain.models.without_torch import keep_torch_out

        # A plugin may need torch, and transformers with it.
        if not batch and not have_plugins() and not (run_code and named_plugins(recipe, overrides or [])):
            keep_torch_out()
        from posttrain.cli.check import check_pipeline, check_recipe, is_pipeline

    if is_pipeline(recipe):
        if batch or world_size > 1 or picture is not None:
            raise RecipeError(
                "--batch, --picture and --world-size have no effect on a pipeline",
                hint="check its recipes by themselves",
            )
        check_pipeline(recipe, overrides or [], online=online, run_code=run_code)
        return
    settings: dict[str, Any] = {"online": online, "world_size": world_size, "run_code": run_code, "batch": batch}
    settings["picture"] = picture
    check_recipe(recipe, overrides or [], **settings)
    if batch:
        from posttrain.cli.preview import print_first_batch

        print_first_batch(recipe, overrides or [])


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="folder or Hub id; not with --list", show_default=False)
    ] = None,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the keys of a recipe's `evaluation` section")
    ] = None,
    benchmarks: Annotated[
        str | None, typer.Option(help="names and YAML files of own benchmarks, separated by commas")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="local file for a named benchmark; may be given several times"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="sampled completions per problem")] = None,
    k: Annotated[str | None, typer.Option(help="pass@k to report, separated by commas")] = None,
    maj: Annotated[str | None, typer.Option(help="maj@k to report, separated by commas")] = None,
    beams: Annotated[int | None, typer.Option(help="also measure beam search of this width")] = None,
    value: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="guide the search of --beams by this value model, over steps")
    ] = None,
    revisions: Annotated[int | None, typer.Option(help="also measure answers revised this many times")] = None,
    revision_template: Annotated[
        str | None, typer.Option(help="prompt of a revision, with {prompt} and {answer}; as in training")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="first N problems of each benchmark")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="tokens per completion")] = None,
    dtype: Annotated[str, typer.Option(help="type of the weights: float32, bfloat16, float16")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Hub commit, tag or branch of the model")] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="chat template in place of the tokenizer's; as model.chat_template"),
    ] = None,
    template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="YAML", help="settings of the chat template, e.g. '{enable_thinking: false}'"),
    ] = None,
    template_date: Annotated[
        str | None, typer.Option(metavar="DAY", help="what a chat template that reads the clock takes for today")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the report; an interrupted evaluation goes on beside it")
    ] = None,
    harness: Annotated[str | None, typer.Option(help="lm-eval: run tasks of lm-evaluation-harness")] = None,
    tasks: Annotated[str | None, typer.Option(help="tasks of the harness, separated by commas")] = None,
    tasks_path: Annotated[Path | None, typer.Option(help="folder with further task files of the harness")] = None,
    fewshot: Annotated[int | None, typer.Option(help="examples in the harness's prompts")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="put the harness's prompts into the chat template")
    ] = False,
    list_benchmarks: Annotated[bool, typer.Option("--list", help="list the benchmarks and stop")] = False,
    rewards: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML: compare an implicit and an explicit reward on the same pairs instead"),
    ] = None,
    engine: EngineName = None,
    workers: Workers = None,
    address: RayAddress = None,
) -> None:
    """Evaluate a model: accuracy, pass@k and maj@k with intervals, truncation."""
    if not list_benchmarks:
        phase(f"reading the settings of the evaluation of {model or rewards}")
    from posttrain.cli import evaluate as command

    if list_benchmarks:
        command.print_benchmarks()
        return
    if rewards is not None:
        from posttrain.cli.rewards import rewards_command

        alone = {"--config": config, "--benchmarks": benchmarks, "--samples": samples, "--harness": harness}
        alone |= {"--k": k, "--maj": maj, "--data": data, "--limit": limit, "--max-new-tokens": max_new_tokens}
        alone |= {"--engine": engine, "--workers": workers, "--address": address}
        command.refuse_beside_rewards(model, alone)
        rewards_command(rewards, [*([] if model is None else [model]), *(overrides or [])], output)
        return
    arguments = command.harness_arguments(harness, tasks, tasks_path, fewshot, limit, chat_template)
    options: dict[str, Any] = {"samples": samples, "limit": limit, "max_new_tokens": max_new_tokens, "beams": beams}
    options |= {"revisions": revisions, "value.path": value, "engine": engine, "workers": workers, "address": address}
    options |= {"revision_template": None if revision_template is None else json.dumps(revision_template)}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    lists: dict[str, Any] = {"benchmarks": benchmarks, "k": k, "maj": maj}
    given += [f"{name}=[{value}]" for name, value in lists.items() if value is not None]
    given += [f"benchmark_paths.{path}" for path in data or []]
    policy = {"dtype": dtype, "revision": revision, "chat_template": template, "template_date": template_date}
    settings = [f"{key}={json.dumps(value)}" for key, value in policy.items() if value is not None]
    settings += [] if template_kwargs is None else [f"template_kwargs={template_kwargs}"]
    command.evaluate_command(model, config, [*given, *(overrides or [])], settings, output, arguments)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUNS...", help="NAME=FOLDER,FOLDER,... per method; or a YAML file; or reports", show_default=False
        ),
    ],
    benchmarks: Annotated[str | None, typer.Option(help="names, separated by commas; default: all shared")] = None,
    measure: Annotated[str | None, typer.Option(help="greedy, avg@n, pass@k or maj@k")] = None,
    report: Annotated[str | None, typer.Option(help="report within each run; default: last while training")] = None,
    seeds_per_look: Annotated[int | None, typer.Option(help="seeds of each method between two looks")] = None,
    looks: Annotated[int | None, typer.Option(help="looks at most")] = None,
    alpha: Annotated[float | None, typer.Option(help="error over all pairs and looks")] = None,
    compute: Annotated[str | None, typer.Option(help="unequal compute: require, match or report")] = None,
    tolerance: Annotated[float | None, typer.Option(help="share by which compute may differ")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; a later look must continue it")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file")] = None,
) -> None:
    """Compare methods over seeds at equal compute, or single runs problem by problem."""
    from posttrain.cli.compare import compare_command

    options = {
        "benchmarks": None if benchmarks is None else benchmarks.split(","),
        "measure": measure,
        "report": report,
        "seeds_per_look": seeds_per_look,
        "looks": looks,
        "alpha": alpha,
        "compute": compute,
        "tolerance": tolerance,
    }
    given = {name: value for name, value in options.items() if value is not None}
    compare_command(runs, given, output, plot)


@app.command()
def study(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY|traces", help="YAML study; a recipe with --sweep; or the word traces", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value|TRACES", help="dotted overrides; after `traces` its files")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V,V,...", help="values of a recipe's key, each an arm; several times: all combinations"
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="number of seeds; of a sweep 3 without it")] = None,
    measure: Annotated[str | None, typer.Option(help="greedy, avg@n, pass@k or maj@k")] = None,
    output: Annotated[str | None, typer.Option(help="folder of the study")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at once, each in a process of its own")] = 1,
    address: Annotated[
        str | None, typer.Option(help="run them on a Ray cluster that shares this folder; `local` starts one here")
    ] = None,
    only_check: Annotated[bool, typer.Option("--check", help="check every arm, say what would run, and stop")] = False,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code", help="with --check: run plugins and models' code; of `study traces`: verifiers that are code"
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="of `study traces`: folder or Hub id that all arms start from")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="of `study traces`: budget of each run")] = None,
    rates: Annotated[
        str | None, typer.Option(metavar="V,V,...", help="of `study traces`: learning rates; several are tuned over")
    ] = None,
) -> None:
    """Run arms over seeds at one budget, and say which is better; the same call goes on with a broken-off study.

    `posttrain study traces FILE... --model M --flops F` tries every method that can use the traces.
    """
    phase(f"reading {target}")
    from posttrain.cli.study import of_target, study_command, traces_command

    options: dict[str, Any] = {"seeds": seeds, "measure": measure, "output": output}
    only_traces = {"model": model, "flops": flops, "rates": rates}
    if str(target) == "traces":
        options |= only_traces | {"sweep": sweep, "address": address, "check": only_check, "jobs": jobs}
        options["run_code"] = run_code
        traces_command([Path(each) for each in overrides or []], options)
        return
    for name, value in only_traces.items():
        if value is not None:
            raise RecipeError(f"--{name} has no effect without `traces`", hint="posttrain study traces FILE --model M")
    if run_code and not only_check:
        raise RecipeError(
            "--run-code has no effect on a study that runs, whose recipes are trusted", hint="add --check"
        )
    asked = of_target(target, overrides or [], sweep or [], options)
    study_command(asked, jobs=jobs, address=address, check=only_check, run_code=run_code)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS...", help="folders of runs or pipelines; reports of eval and compare", show_default=False
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="the HTML file; default: report.html")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="show it in a browser and follow runs that go on")] = False,
    host: Annotated[str | None, typer.Option(help="address to serve at; default: this machine alone")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="port to serve at; default: a free one")] = None,
) -> None:
    """Write one HTML file on runs: did it work, curves, samples, evaluations, comparisons, compute, recipes."""
    from posttrain.cli.report import report_command, serve_command

    if serve:
        if output is not None:
            raise RecipeError("--serve writes no file", where="--output", hint="leave one of them out")
        serve_command(runs, host or "127.0.0.1", port or 0)
        return
    for name, value in {"--host": host, "--port": port}.items():
        if value is not None:
            raise RecipeError("it is read with --serve", where=name, hint="add --serve, or leave it out")
    report_command(runs, output or Path("report.html"))


@app.command()
def sample(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|FILE", help="model, with --config; or settings with a `model` section")
    ],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with data, verifier, rollouts, ...")] = None,
    output: Annotated[Path | None, typer.Option(help="trace file, .jsonl; as the key `output`")] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="also write the traces as Parquet")] = False,
    engine: EngineName = None,
    workers: Workers = None,
    address: RayAddress = None,
) -> None:
    """Sample many verified completions per prompt into a trace file; the same call goes on with a broken-off one."""
    phase(f"reading the settings of {config or target}")
    from posttrain.cli.sample import sample_command

    options = {"rollouts.engine": engine, "workers": workers, "address": address}
    sample_command(target, config, overrides or [], output, parquet, options)


prepare = typer.Typer(help="Make training data out of traces, and traces out of texts.", no_args_is_help=True)
app.add_typer(prepare, name="prepare")
TraceFiles = Annotated[list[Path], typer.Argument(metavar="TRACES...", help="trace files", show_default=False)]


@prepare.command("rows")
def rows(
    path: Annotated[str, typer.Argument(metavar="DATA", help="file, folder or Hub id", show_default=False)],
    out: Annotated[Path, typer.Option(help="file for the rows, .jsonl or .parquet")],
    to: Annotated[
        str | None,
        typer.Option(help="what they become: prompts, completions, preferences or unpaired; default: as they are"),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="what they are, also stepwise; default: as their columns say")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a key of the source, e.g. prompt=question")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="how they are written: prompt-completion, messages, sharegpt, alpaca, preference or "
            "preference-implicit; default: the plainest"
        ),
    ] = None,
) -> None:
    """Rows of any form in the plain one: messages, pairs, labels; in another form, or as rows of another kind."""
    from posttrain.cli.prepare import rows_command

    rows_command(path, out, keys or [], kind, to, form)


@prepare.command("pairs")
def prepare_pairs(
    traces: TraceFiles,
    out: Annotated[Path, typer.Option(help="file for the pairs, .jsonl")],
    strategy: Annotated[str, typer.Option(help="best_worst, margin, ranked or second_best")] = "best_worst",
    margin: Annotated[float, typer.Option(help="smallest difference of scores")] = 0.0,
    score: Annotated[str, typer.Option(help="reward or outcome")] = "reward",
    max_pairs: Annotated[int | None, typer.Option(help="pairs per prompt")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="also use completions cut at the limit")] = False,
    seed: Annotated[int, typer.Option(help="of the choice between equal ones")] = 0,
    own: Annotated[Path | None, typer.Option(help="traces of the policy to be trained, to report the overlap")] = None,
) -> None:
    """Preference pairs out of scored completions, with a report."""
    from posttrain.cli.prepare import pairs_command

    given = {"strategy": strategy, "margin": margin, "score": score, "unfinished": unfinished, "seed": seed}
    pairs_command(traces, out, given | ({} if max_pairs is None else {"max_pairs": max_pairs}), own)


@prepare.command("responses")
def prepare_responses(
    traces: TraceFiles,
    out: Annotated[Path, typer.Option(help="file for the rows, .jsonl")],
    n: Annotated[int, typer.Option("--n", help="responses per row")] = 4,
    choose: Annotated[str, typer.Option(help="spread (over the ranks) or random")] = "spread",
    score: Annotated[str, typer.Option(help="reward or outcome")] = "reward",
    unfinished: Annotated[bool, typer.Option("--unfinished", help="also use completions cut at the limit")] = False,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
) -> None:
    """Rows of n scored completions of a prompt (BRAIn, Curry-DPO, A-LoL)."""
    from posttrain.cli.prepare import responses_command

    given = {"n": n, "choose": choose, "score": score, "unfinished": unfinished, "seed": seed}
    responses_command(traces, out, given)


@prepare.command("completions")
def prepare_completions(
    traces: TraceFiles,
    out: Annotated[Path, typer.Option(help="file for the rows, .jsonl")],
    per_problem: Annotated[int | None, typer.Option(help="different completions per problem at most")] = None,
    seed: Annotated[int, typer.Option(help="of the choice among more")] = 0,
) -> None:
    """Correct completions to imitate (rejection sampling, SFT)."""
    from posttrain.cli.prepare import completions_command

    completions_command(traces, out, {"seed": seed} | ({} if per_problem is None else {"per_problem": per_problem}))


@prepare.command("prefixes")
def prepare_prefixes(
    traces: TraceFiles,
    model: Annotated[str, typer.Option(help="folder or Hub id of the model that goes on from them: its tokenizer")],
    out: Annotated[Path, typer.Option(help="file for the prefixes, .jsonl")],
    low: Annotated[float, typer.Option(help="shortest prefix, as a share of its trace")] = 0.4,
    high: Annotated[float, typer.Option(help="longest prefix, as a share of its trace")] = 0.8,
    cuts: Annotated[int, typer.Option(help="prefixes of a problem")] = 3,
    boundary: Annotated[str, typer.Option(help="token or line")] = "token",
    separator: Annotated[str, typer.Option(help="text that ends a line")] = "\n",
    answer_pattern: Annotated[
        str | None, typer.Option(help="where the final answer begins; default: the reference as a word")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the cuts")] = 0,
) -> None:
    """The prefixes that `prefixrl` cuts from correct traces, without their answers, with a report."""
    from posttrain.cli.prepare import prefixes_command

    given = {"fraction_low": low, "fraction_high": high, "cuts_per_problem": cuts, "boundary": boundary}
    given |= {"separator": separator, "answer_pattern": answer_pattern, "cut_seed": seed}
    prefixes_command(traces, out, given, model)


@prepare.command("steps")
def prepare_steps(
    config: Annotated[Path, typer.Argument(metavar="FILE", help="YAML: model, traces, verifier, output, ...")],
    overrides: Overrides = None,
) -> None:
    """Label the steps of traces by how often a model ends right from behind each: data for the method prm."""
    from posttrain.cli.prepare import steps_command

    steps_command(config, overrides or [])


@prepare.command("traces")
def prepare_traces(
    config: Annotated[Path, typer.Argument(metavar="FILE", help="YAML: data.completions, policy, output, ...")],
    overrides: Overrides = None,
) -> None:
    """Take in completions of other models or people as traces, verified if the file says how."""
    from posttrain.cli.prepare import take_in_command

    take_in_command(config, overrides or [])


@prepare.command("episodes")
def prepare_episodes(
    config: Annotated[Path, typer.Argument(metavar="FILE", help="YAML: data.completions, reward, output, ...")],
    overrides: Overrides = None,
) -> None:
    """Take in conversations of agents, with tools and rewards, as episodes."""
    from posttrain.cli.prepare import episodes_command

    episodes_command(config, overrides or [])


@app.command()
def inspect(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...", help="data (file, folder, Hub id), trace files, or a recipe", show_default=False
        ),
    ],
    policy: Annotated[
        str | None, typer.Option(help="traces: whose figures; default: the one that sampled most")
    ] = None,
    k: Annotated[
        str | None, typer.Option(help="traces: pass@k to report, separated by commas; default: 1,4,16")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures, per problem too for traces")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    model: Annotated[str | None, typer.Option(help="data: its tokenizer and template count the tokens")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="data: prompts, completions, preferences, unpaired or stepwise; default: by columns"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="data: this split of a folder or Hub data set")] = None,
    name: Annotated[str | None, typer.Option(help="data: this configuration of a folder or Hub data set")] = None,
    no_near: Annotated[bool, typer.Option("--no-near", help="data: do not look for near duplicates")] = False,
    against: Annotated[
        list[str] | None, typer.Option(help="data: benchmark or file that the rows should not overlap with")
    ] = None,
    words: Annotated[int, typer.Option(min=3, help="data: words of a run that counts as overlap")] = 13,
    max_length: Annotated[int | None, typer.Option(min=2, help="data: share lost to this many tokens")] = None,
    max_prompt_length: Annotated[int | None, typer.Option(min=1, help="data: the same for prompts")] = None,
    token_rewards: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|MODEL", help="the DPO policy's implicit reward of every token of these traces or pairs instead"
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="model that the policy was trained from; default: as its run says")
    ] = None,
    beta: Annotated[float | None, typer.Option(min=0, help="of the training; default: as its run says")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first N responses (--token-rewards)")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file: coloured tokens (--token-rewards), lengths (data)")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="pairs without the chat template; default: as the run says")
    ] = False,
    dtype: Annotated[str, typer.Option(help="type of the weights (--token-rewards)")] = "float32",
) -> None:
    """What data or traces are like: sizes, roles, duplicates, overlap with tests; pass rates, variety, advice.

    With --token-rewards: which tokens of traces or of preference pairs a policy trained by DPO rewards.
    """
    from posttrain.data.traces import manifest_path

    only = {"--reference": reference, "--beta": beta, "--limit": limit, "--plain": plain or None}
    if token_rewards is not None:
        from posttrain.cli.token_rewards import token_rewards_command

        paths = [Path(target) for target in targets]
        token_rewards_command(paths, token_rewards, reference, beta, limit, output, plot, plain, dtype)
        return
    _without_effect(only, "without --token-rewards")
    of_data = {"--model": model, "--kind": kind, "--no-near": no_near or None, "--against": against, "--plot": plot}
    of_data |= {"--max-length": max_length, "--max-prompt-length": max_prompt_length, "--split": split, "--name": name}
    if policy or k or any(manifest_path(Path(target)).is_file() for target in targets):
        from posttrain.cli.inspect import inspect_command

        _without_effect(of_data, "on traces")
        inspect_command(
            [Path(target) for target in targets], policy=policy, k=k or "1,4,16", output=output, as_json=as_json
        )
        return
    from posttrain.cli.inspect_data import Options, inspect_data

    chosen = {key: value for key, value in (("split", split), ("name", name)) if value is not None}
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    options = Options(model, kind, chosen, not no_near, against or [], words, **limits, output=output, plot=plot)
    inspect_data(targets, options, as_json=as_json)


def _without_effect(given: dict[str, Any], why: str) -> None:
    """Refuse options that were given and nobody would read."""
    for option, value in given.items():
        if value is not None:
            raise RecipeError(f"{option} has no effect {why}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output folder of a run", show_default=False)],
    step: Annotated[int, typer.Option(min=1, help="optimizer step, as in metrics.jsonl")],
    row: Annotated[str | None, typer.Option(metavar="M.R", help="all of row R of micro-batch M")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for all rows")] = None,
) -> None:
    """Rebuild the batch of one step of a run: text, mask, log-probs, advantage and loss of every row."""
    from posttrain.cli.replay import replay_command

    replay_command(run, step, row, output)


@app.command()
def play(
    recipe: RecipeFile,
    overrides: Overrides = None,
    agent: Annotated[str, typer.Option(help="who acts: policy, person, or of rooms expert or weak")] = "policy",
    episodes: Annotated[int, typer.Option(min=1, help="problems to play, the first of data.prompts")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="episodes of each problem")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="the policy takes the likeliest tokens")] = False,
    out: Annotated[Path | None, typer.Option(help="file for the episodes, .jsonl")] = None,
    again: Annotated[
        Path | None, typer.Option(metavar="FILE", help="play the actions of these episodes instead, and compare")
    ] = None,
) -> None:
    """Play episodes of a recipe's environment: success, turns and tokens, with intervals; the last one is shown."""
    from posttrain.cli.play import again_command, play_command

    if again is not None:
        again_command(recipe, overrides or [], again)
    else:
        play_command(recipe, overrides or [], agent, episodes, samples=samples, greedy=greedy, out=out)


@app.command()
def verify(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="YAML recipe: its prompts and verifiers", show_default=False)
    ] = None,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with `data` and `verifier`; no recipe then")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the report, with all findings")] = None,
) -> None:
    """Audit verifiers on a data set: gold against gold, spoilt gold, profiles, speed. Exits with 1 if gold fails."""
    from posttrain.cli.verify import verify_command

    sys.exit(0 if verify_command(recipe, config, overrides or [], output) else 1)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="run, model, checkpoint or adapter folder", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="type of the weights; default: as they are")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="merge an adapter into its base model")] = False,
    max_shard_size: Annotated[str, typer.Option(help="largest file of weights, e.g. 5GB")] = "50GB",
) -> None:
    """Write a model as a folder that others load: adapter merged, one type, safetensors; loaded again to compare."""
    from posttrain.cli.export import export_command

    export_command(source, out, dtype, merge, max_shard_size)


@app.command()
def contract(
    method: Annotated[
        str,
        typer.Argument(
            metavar="FILE|NAME", help="file of a method of your own, or a method's name", show_default=False
        ),
    ],
    parameters: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="parameters of the method: beta=0.1")
    ] = None,
    ranks: Annotated[bool, typer.Option("--ranks", help="also train on two ranks; starts two processes")] = False,
    losses_only: Annotated[bool, typer.Option("--losses-only", help="train no model")] = False,
) -> None:
    """Check that a method keeps the contract: splits, padding, masks, empty batches, gradient, resume. Else exits 1."""
    from posttrain.cli.contract import contract_command

    sys.exit(0 if contract_command(method, parameters or [], ranks=ranks, losses_only=losses_only) else 1)


@app.command()
def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML of TRL's command line, axolotl or LLaMA-Factory", show_default=False),
    ],
    method: Annotated[
        str | None, typer.Option(help="method of the recipe; default: what the file says, else sft")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="processes it ran on: their batch size is per process")] = 1,
    out: Annotated[Path | None, typer.Option(help="file for the recipe; default: it is printed")] = None,
) -> None:
    """Turn another tool's configuration into a recipe, and list what it could not carry over."""
    from posttrain.cli.convert import convert_command

    convert_command(file, method, ranks, out)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="show the parameters of this method")] = None,
) -> None:
    """List the methods, or the parameters of one."""
    from posttrain.cli.tables import print_method, print_methods

    if name is None:
        print_methods()
    else:
        print_method(name)


@app.command()
def keys(
    section: Annotated[str | None, typer.Argument(metavar="SECTION", help="dotted key, e.g. model.peft")] = None,
) -> None:
    """List the sections of a recipe, or the keys of one."""
    from posttrain.cli.keys import print_keys

    print_keys(section)


@app.command()
def env() -> None:
    """Show the supported stack and what is installed; exits with 1 if something is out of range."""
    from posttrain.cli.tables import print_stack

    sys.exit(0 if print_stack() else 1)
