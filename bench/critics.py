"""Critics, offline RL and resets on the testbed: three comparisons over seeds, each from one base per seed.

    python bench/critics.py --output runs/bench/critics --seeds 1 2 3 --jobs 2

- `offline`: OREO (steps, tokens, and with the KL estimated on the traces' tokens), step-level DAPO, rejection-sampling
  SFT and DPO on verifier pairs, on the same traces: the base's own verified answers to sums of four terms. Every arm
  takes the same number of updates of its policy; FLOPs stand beside it.
- `search`: the step-level OREO policy of that comparison, greedy, by a search that a value model guides, and as the
  best of n samples by the same value model with at least as many tokens drawn. Two value models: OREO's own, and a
  plain one fitted afterwards to verified samples of the trained policy (`dapo_step`, phase critic). Beside them what
  the values get right: whether right texts are above wrong ones, and which wrong ones the traces could show.
- `resets`: PPO and GRPO against DR-PO with half of the rollouts reset, on sums of six terms, of which the base gets
  few samples right (`--terms` takes others, and `--base-steps` a base that gets fewer right). Every RL arm has the same
  budget of FLOPs; `drpo` pays for sampling its traces out of it, `drpo_expert` resets into answers that an expert gave
  for nothing, as in the paper, and `sft_expert` just imitates those.

A finished cell is a JSON file that is not made again, so the command can be broken off and repeated. At the end a table
is made of the cells that are there; `--report` does only that, with `--load FILE` on cells of others. `--smoke` makes
everything tiny, to see that it runs. Seeds 0 and 100 were used to try settings and are not to be among those reported.
One file, because the three share bases, traces and the way of measuring. Tables: critics_report.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cells as saved
import torch
import yaml
from critics_report import auc, report, within

from posttrain.config.collection import PairSettings, SampleSettings
from posttrain.config.loading import load_recipe
from posttrain.config.schema import EvaluationConfig, ModelConfig, TaskSource, ValueSearchConfig, VerifierPoolConfig
from posttrain.data.pairs import write_pairs
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Problem
from posttrain.data.sources import problems
from posttrain.data.steps import StepCutter
from posttrain.evaluation.runner import evaluate_model
from posttrain.methods import METHODS
from posttrain.models.loading import load_policy
from posttrain.models.size import non_embedding_parameters
from posttrain.models.token_logps import prepare, token_logps
from posttrain.rollouts.collect import collect
from posttrain.rollouts.engine import Completion, Sampling
from posttrain.rollouts.value_search import ValueSearchEngine, search_engine
from posttrain.safe_files import write_json_atomic
from posttrain.trainers.run import RunResult, train
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.procedural import ProceduralVerifier
from posttrain.verifiers.verdict import Judge

BASE_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "testbed" / "sft-tiny-chain_sum.yaml"
CONFIGS = {name: cls.Config for name, cls in METHODS.items()}
VERIFIER = [{"type": "procedural", "profile": "strict"}]
QUIET = ["tracking.console=off", "tracking.plots=false"]
WIDTHS = (2, 3)
"""Of the guided search."""
UNLIKELY = 0.02
"""A step that the base writes more rarely than this is taken as one that the traces do not show."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large everything is.

    Attributes:
        dense: terms of the sums of `offline` and `search`.
        sparse: those of `resets`.
        base_steps: updates of the base.
        pool: training problems.
        tries: completions per problem that the traces are made of, dense and sparse.
        steps: updates of an offline arm.
        refit: updates of the plain value model.
        fresh: held-out problems.
        budget: FLOPs per parameter of an arm of `resets`.
    """

    dense: int = 4
    sparse: int = 6
    base_steps: int = 1500
    pool: int = 1024
    tries: tuple[int, int] = (16, 40)
    steps: int = 200
    refit: int = 400
    fresh: int = 500
    budget: float = 10e6


SMOKE = Size(dense=2, sparse=3, base_steps=300, pool=32, tries=(8, 8), steps=4, refit=4, fresh=8, budget=2e5)


def max_new_tokens(level: int) -> int:
    """Eight characters a step at most, the answer, the end, and some to spare."""
    return 8 * (level - 1) + 12


# ------------------------------------------------------------------------------------------------------ what is shared


def base_of(output: Path, size: Size, seed: int) -> Path:
    run_dir = output / f"base-{seed}"
    if not (run_dir / "model").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        changes = [f"output={run_dir}", f"seed={seed}", f"data.completions.seed={seed}"]
        changes += [f"training.max_steps={size.base_steps}", *QUIET]
        finished(train(load_recipe(BASE_RECIPE, changes, CONFIGS)))
    return run_dir / "model"


def traces_of(output: Path, size: Size, seed: int, level: int) -> tuple[Path, dict[str, Any]]:
    """The base's own verified answers, and what they cost."""
    return sampled(output / f"traces-{level}-{seed}", base_of(output, size, seed), size, seed, level)


def sampled(folder: Path, model: Path, size: Size, seed: int, level: int) -> tuple[Path, dict[str, Any]]:
    """Verified answers of a model to the training problems, and what they cost."""
    if not (folder / "bought.json").exists():
        settings = SampleSettings(
            model={"path": str(model)},
            data={"prompts": pool(size, seed, level)},
            verifier=VERIFIER,
            verifier_pool={"workers": 0},
            rollouts={
                "samples_per_prompt": size.tries[level == size.sparse],
                "max_new_tokens": max_new_tokens(level),
                "max_batch": 1024,
            },
            seed=seed,
            threads=1,
        )
        bought = collect(settings, folder / "traces.jsonl", say=lambda _: None)
        found = {"flops": bought.flops, "traces": bought.traces, "correct": bought.correct}
        write_json_atomic(folder / "bought.json", found)
    return folder / "traces.jsonl", json.loads((folder / "bought.json").read_text(encoding="utf-8"))


def pool(size: Size, seed: int, level: int) -> dict[str, Any]:
    return {"task": "chain_sum", "levels": [level], "size": size.pool, "seed": seed}


def fresh(size: Size, level: int) -> dict[str, Any]:
    """Problems of the same level that nobody trained on."""
    return {"task": "chain_sum", "levels": [level], "size": size.fresh, "split": "test"}


def measured(model: Path, size: Size, level: int) -> dict[str, float]:
    """Greedy and sampled accuracy on fresh problems."""
    config = EvaluationConfig(
        benchmarks=[{"name": "fresh", "data": fresh(size, level), "verifier": VERIFIER}],
        samples=4,
        max_new_tokens=max_new_tokens(level),
        max_batch=1024,
    )
    report = evaluate_model(ModelConfig(path=str(model)), config, None)
    return {name: value.value for name, value in report.benchmarks[0].headline().items()}


def run(recipe: dict[str, Any], folder: Path) -> tuple[Path, float]:
    """Train from the beginning in a folder: the run folder, and its FLOPs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, "output": str(folder), "threads": 1}, sort_keys=False), encoding="utf-8")
    result = finished(train(load_recipe(path, QUIET, CONFIGS)))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return result.run_dir, max(row.get("flops_total", 0.0) for row in rows)


def finished(result: RunResult) -> RunResult:
    """The argument, unless a signal ended the run: then nothing is to be made of it."""
    if result.stopped:
        raise SystemExit(f"{result.run_dir}: signal {result.signal} ended the run")
    return result


# ------------------------------------------------------------------------------------------------------------ offline

STEPS = {"delimiter": ";"}
OREO = {"name": "oreo", "beta": 0.03, "kl_reg": 0.03}
OFFLINE: dict[str, dict[str, Any]] = {
    "sft": {"method": {"name": "sft"}, "rate": 3e-4},
    "dpo": {"method": {"name": "dpo", "beta": 0.5}, "rate": 1e-4},
    "dapo_step": {"method": {"name": "dapo_step", "beta": 0.2, **STEPS}, "rate": 3e-4},
    "oreo_step": {"method": {**OREO, "level": "step", **STEPS}, "rate": 3e-4, "critic": 1e-3},
    "oreo_token": {"method": OREO, "rate": 3e-4, "critic": 1e-3},
    "oreo_k3": {"method": {**OREO, "level": "step", **STEPS, "unbiased_kl": False}, "rate": 3e-4, "critic": 1e-3},
}
"""Method, learning rate, and that of the critic."""


def offline_recipe(arm: str, output: Path, size: Size, seed: int, level: int, folder: Path) -> dict[str, Any]:
    """The recipe of an offline arm; makes pairs, or a critic apart, where the arm takes them."""
    traces, _ = traces_of(output, size, seed, level)
    given, rows = OFFLINE[arm], 64 if size.steps > 10 else 8
    data: dict[str, Any] = {"traces": {"path": str(traces), "keep": "all"}}
    if arm == "sft":
        data["traces"]["keep"] = "correct"
        return supervised(base_of(output, size, seed), data, size, seed)
    if arm == "dpo":
        pairs = traces.with_name("pairs.jsonl")
        if not pairs.exists():
            write_pairs([traces], pairs, PairSettings(strategy="margin", max_pairs=4, seed=seed))
        data = {"preferences": {"path": str(pairs), "chat": False}}
    recipe = {
        "model": {"path": str(base_of(output, size, seed))},
        "data": data,
        "method": given["method"],
        "batch": {"rows_per_step": rows, "micro_batch": rows},
        "training": {"learning_rate": given["rate"], "max_steps": size.steps},
        "seed": seed,
    }
    if "critic" in given:
        recipe["critic"] = {"learning_rate": given["critic"]}
    if arm == "dapo_step":
        critic = {**recipe, "method": {"name": "dapo_step", "phase": "critic", **STEPS}}
        critic["training"] = {"learning_rate": 1e-3, "max_steps": size.steps}
        made, _ = run(critic, folder.with_name(f"{folder.name}-critic"))
        recipe["critic"] = {"path": str(made / "critic")}
    return recipe


def supervised(base: Path, data: dict[str, Any], size: Size, seed: int) -> dict[str, Any]:
    """The recipe of an SFT arm."""
    rows = 64 if size.steps > 10 else 8
    return {
        "model": {"path": str(base)},
        "data": data,
        "method": OFFLINE["sft"]["method"],
        "batch": {"rows_per_step": rows, "micro_batch": rows},
        "training": {"learning_rate": OFFLINE["sft"]["rate"], "max_steps": size.steps},
        "seed": seed,
    }


def offline_cell(arm: str, output: Path, size: Size, seed: int) -> dict[str, Any]:
    base = base_of(output, size, seed)
    if arm == "base":
        return {"level": size.dense, "flops": 0.0, **measured(base, size, size.dense)}
    folder = output / "offline" / arm / f"seed-{seed}"
    made, flops = run(offline_recipe(arm, output, size, seed, size.dense, folder), folder)
    _, bought = traces_of(output, size, seed, size.dense)
    return {"level": size.dense, "flops": flops, "traces": bought, **measured(made / "model", size, size.dense)}


# ------------------------------------------------------------------------------------------------------------- search


def search_cell(arm: str, output: Path, size: Size, seed: int) -> dict[str, Any]:
    """Accuracy and tokens drawn per problem: greedy; for each value model and width, guided and best of n."""
    folder = output / "offline" / "oreo_step" / f"seed-{seed}"
    if not (folder / "critic").exists():
        run(offline_recipe("oreo_step", output, size, seed, size.dense, folder), folder)
    path = folder / "critic"
    found: dict[str, Any] = {"flops": 0.0}
    if arm == "refit":
        path, found["flops"] = refit(output, size, seed, folder)
    config = ModelConfig(path=str(folder / "model"))
    policy, tokenizer = load_policy(config, seed=seed)
    renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
    value = ValueSearchConfig(path=str(path), delimiter=";")
    engine = search_engine(
        policy.requires_grad_(False), config, renderer, value, pad_id=tokenizer.pad_token_id, max_batch=1024
    )
    asked = problems(TaskSource(**fresh(size, size.dense)), "fresh")
    prompts, limit = [renderer.prompt_ids(problem) for problem in asked], max_new_tokens(size.dense)
    judge = build_judge([ProceduralVerifier.Config(type="procedural")], VerifierPoolConfig(workers=0))
    ways: dict[str, dict[str, float]] = {}

    def note(name: str, answers: list[Completion], drawn: int) -> None:
        right = statistics.mean(outcomes(judge, renderer, asked, answers))
        ways[name] = {"accuracy": right, "tokens": drawn / len(asked)}

    greedy = [group[0] for group in engine.generate(prompts, Sampling(max_new_tokens=limit, greedy=True))]
    note("greedy", greedy, sum(len(one.ids) for one in greedy))
    for width in WIDTHS:
        before = engine.tokens_drawn
        guided = [g[0] for g in engine.generate(prompts, Sampling(max_new_tokens=limit, beams=width, seed=seed))]
        drawn = engine.tokens_drawn - before
        note(f"guided@{width}", guided, drawn)
        n = -(-drawn // max(sum(len(one.ids) for one in greedy), 1))
        groups = engine.generate(prompts, Sampling(n=n, max_new_tokens=limit, seed=seed))
        note(f"best_of_n@{width}", best_of(engine, prompts, groups), sum(len(c.ids) for g in groups for c in g))
        ways[f"best_of_n@{width}"]["n"] = n
    rights = [outcomes(judge, renderer, asked, list(answers)) for answers in zip(*groups, strict=True)]
    ways["one sample"] = {"accuracy": statistics.mean(map(statistics.mean, rights)), "tokens": ways["greedy"]["tokens"]}
    judge.close()
    found["values"] = judged(
        engine, base_of(output, size, seed), renderer, prompts, groups, list(zip(*rights, strict=True))
    )
    return found | {"ways": ways}


def refit(output: Path, size: Size, seed: int, policy: Path) -> tuple[Path, float]:
    """A plain value model of a trained policy, fitted to verified samples of its own: its folder and its FLOPs."""
    traces, bought = sampled(output / f"refit-traces-{seed}", policy / "model", size, seed, size.dense)
    rows = 64 if size.steps > 10 else 8
    recipe = {
        "model": {"path": str(policy / "model")},  # the value model starts from its weights
        "data": {"traces": {"path": str(traces), "keep": "all"}},
        "method": {"name": "dapo_step", "phase": "critic", **STEPS},
        "batch": {"rows_per_step": rows, "micro_batch": rows},
        "training": {"learning_rate": 1e-3, "max_steps": size.refit},
        "seed": seed,
    }
    made, flops = run(recipe, output / "refit" / f"seed-{seed}")
    return made / "critic", flops + bought["flops"]


def judged(
    engine: ValueSearchEngine,
    base: Path,
    renderer: Renderer,
    prompts: list[list[int]],
    groups: list[list[Completion]],
    rights: list[tuple[float, ...]],
) -> dict[str, float]:
    """What the values of finished samples get right, and how many wrong ones hold a step that the base hardly writes.

    Returns:
        `auc`: share of pairs of a right and a wrong text where the right one has the higher value. `within`: the same
        over pairs of one problem. `unlikely_wrong`, `unlikely_right`: shares of wrong and of right texts with a step
        of a probability under `UNLIKELY` under the base. `auc_unlikely`, `auc_likely`: `auc` with such wrong ones only,
        and with the other ones only.
    """
    model, _ = load_policy(ModelConfig(path=str(base)), seed=0)
    prepare(model)
    cutter = StepCutter(renderer.text, ";")
    rows = []
    for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        values = engine.value([text_before_end(prompt, one) for one in group])
        for one, value, right in zip(group, values, rights[number], strict=True):
            rows.append((number, value, right > 0, rarest_step(model, cutter, prompt, one) < UNLIKELY))
    wrong = [row for row in rows if not row[2]]
    right = [value for _, value, is_right, _ in rows if is_right]
    return {
        "auc": auc(right, [row[1] for row in wrong]),
        "within": within([row[:3] for row in rows]),
        "unlikely_wrong": statistics.mean(row[3] for row in wrong) if wrong else 0.0,
        "unlikely_right": statistics.mean(row[3] for row in rows if row[2]) if right else 0.0,
        "auc_unlikely": auc(right, [row[1] for row in wrong if row[3]]),
        "auc_likely": auc(right, [row[1] for row in wrong if not row[3]]),
    }


@torch.no_grad()
def rarest_step(model: torch.nn.Module, cutter: StepCutter, prompt: list[int], one: Completion) -> float:
    """Probability under a model of the step of a completion that it is the least likely to write."""
    ids = torch.tensor([[*prompt, *one.ids]])
    mask = torch.zeros(ids.shape)
    mask[:, len(prompt) :] = 1
    logps = token_logps(model, ids, torch.ones_like(ids), mask).logps[0, len(prompt) :]
    steps = torch.tensor(cutter.numbers(one.ids))
    return float(torch.zeros(int(steps.max()) + 1).index_add(0, steps, logps).min().exp())


def text_before_end(prompt: list[int], one: Completion) -> list[int]:
    return [*prompt, *(one.ids[:-1] if one.finish == "stop" else one.ids)]


def best_of(engine: ValueSearchEngine, prompts: list[list[int]], groups: list[list[Completion]]) -> list[Completion]:
    """The completion of each group that the value model likes best, valued before its end token."""
    chosen = []
    for prompt, group in zip(prompts, groups, strict=True):
        values = engine.value([text_before_end(prompt, one) for one in group])
        chosen.append(group[max(range(len(group)), key=lambda i: (group[i].finish == "stop", values[i]))])
    return chosen


def outcomes(judge: Judge, renderer: Renderer, asked: list[Problem], answers: list[Completion]) -> list[float]:
    texts = [renderer.text(one.ids) for one in answers]
    judgements = judge.judge(asked, texts, [len(one.ids) for one in answers])
    return [float(one.outcome or 0.0) for one in judgements]


# ------------------------------------------------------------------------------------------------------------- resets

KL = {"kl_coef": 0.01, "epochs": 2, "whiten_rewards": False}
RESETS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "beta": 0.01, "updates_per_rollout": 2},
    "ppo": {"name": "ppo", **KL},
    "drpo": {"name": "drpo", "reset_share": 0.5, **KL},
    "drpo_expert": {"name": "drpo", "reset_share": 0.5, **KL},
}


def resets_cell(arm: str, output: Path, size: Size, seed: int) -> dict[str, Any]:
    base, folder, level = base_of(output, size, seed), output / "resets" / arm / f"seed-{seed}", size.sparse
    if arm == "base":
        return {"level": level, "flops": 0.0, **measured(base, size, level)}
    policy, _ = load_policy(ModelConfig(path=str(base)), seed=0)
    budget, found = size.budget * non_embedding_parameters(policy), {"level": level, "sampling_flops": 0.0}
    if arm == "sft_expert":
        recipe = supervised(base, {"completions": pool(size, seed, level)}, size, seed)
        made, flops = run(recipe, folder)
        return found | {"flops": flops, "steps": size.steps, **measured(made / "model", size, level)}
    prompts = 16 if size.steps > 10 else 4
    recipe = {
        "model": {"path": str(base)},
        "data": {"prompts": pool(size, seed, level)},
        "verifier": VERIFIER,
        "verifier_pool": {"workers": 0},
        "rollouts": {"samples_per_prompt": 8, "max_new_tokens": max_new_tokens(level)},
        "method": RESETS[arm],
        "batch": {"prompts_per_step": prompts, "micro_batch": prompts * 8},
        "training": {"learning_rate": 3e-4, "max_steps": 4},
        "seed": seed,
    }
    if arm == "drpo_expert":
        recipe["data"]["traces"] = pool(size, seed, level)
    if arm == "drpo":
        traces, bought = traces_of(output, size, seed, level)
        found |= {"sampling_flops": bought["flops"], "correct_traces": bought["correct"]}
        if not bought["correct"]:
            return found | {"flops": bought["flops"], "steps": 0, **measured(base, size, level)}
        recipe["data"]["traces"] = {"path": str(traces)}
    if arm != "grpo":
        recipe["critic"] = {"learning_rate": 1e-3}
    _, probed = run(recipe, folder.with_name(f"{folder.name}-probe"))  # not charged
    steps = max(int((budget - found["sampling_flops"]) / (probed / 4)) // 2 * 2, 2)
    recipe["training"]["max_steps"] = steps
    made, flops = run(recipe, folder)
    return found | {"flops": found["sampling_flops"] + flops, "steps": steps, **measured(made / "model", size, level)}


# --------------------------------------------------------------------------------------------------------------- cells

PARTS = {
    "offline": (offline_cell, ["base", *OFFLINE]),
    "search": (search_cell, ["own", "refit"]),
    "resets": (resets_cell, ["base", "sft_expert", *RESETS]),
}


def place(output: Path, cell: Mapping[str, Any]) -> Path:
    return output / cell["part"] / f"{cell['arm']}-{cell['seed']}.json"


def cell(part: str, arm: str, seed: int, output: Path, size: Size) -> None:
    """Make one cell, unless it is there."""
    path = place(output, {"part": part, "arm": arm, "seed": seed})
    if path.exists():
        return
    torch.set_num_threads(1)
    started = time.process_time()
    found = PARTS[part][0](arm, output, size, seed)
    seconds = time.process_time() - started
    write_json_atomic(path, {"part": part, "arm": arm, "seed": seed, "cpu_seconds": seconds} | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/critics"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--arms", nargs="+", help="of these parts; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--terms", type=int, help="of the sums of `resets`; another number takes an output of its own")
    parser.add_argument("--base-steps", type=int, help="updates of the base; another number takes an output of its own")
    parser.add_argument("--budget", type=float, help="FLOPs per parameter of an arm of `resets`; likewise")
    parser.add_argument("--report", action="store_true", help="only the table, of the cells that are there")
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    saved.add_options(parser)
    given = parser.parse_args()
    saved.load(given.load, partial(place, given.output))
    size = SMOKE if given.smoke else Size()
    size = size if given.terms is None else replace(size, sparse=given.terms)
    size = size if given.budget is None else replace(size, budget=given.budget)
    size = size if given.base_steps is None else replace(size, base_steps=given.base_steps)
    if not given.report:
        for seed in given.seeds:  # shared by the cells, so made before they part
            base_of(given.output, size, seed)
            for part, level in (("offline", size.dense), ("resets", size.sparse)):
                if part in given.parts or (part == "offline" and "search" in given.parts):
                    traces_of(given.output, size, seed, level)
        cells = [(p, a, s) for s in given.seeds for p in given.parts for a in PARTS[p][1] if a in (given.arms or [a])]
        # The search reads what an offline cell leaves.
        for parts in (("offline", "resets"), ("search",)):
            chosen = [one for one in cells if one[0] in parts]
            context = multiprocessing.get_context("forkserver")
            with ProcessPoolExecutor(given.jobs, mp_context=context) as workers:
                for done in [workers.submit(cell, *one, given.output, size) for one in chosen]:
                    done.result()
    table = report(given.output, {part: arms for part, (_, arms) in PARTS.items()})
    (given.output / "report.md").write_text(table, encoding="utf-8")
    print(table)
    saved.save(given.save, given.output, "*/*-*.json", partial(place, given.output))


if __name__ == "__main__":
    main()
