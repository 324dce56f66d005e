"""A chat model that others pretrained, on rows that others wrote: every shell a few steps, by the commands of a user.

`make test-real` makes the model (build/smollm2, SmolLM2-135M-Instruct) and runs these. Rows are GSM8K and HH-RLHF where
the folder of real data is, else the project's own of the same form.
"""

import gzip
import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain.tracking.events import read_events

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("POSTTRAIN_SMOLLM2", ROOT / "build" / "smollm2"))
DATA = Path(os.environ.get("POSTTRAIN_TEST_DATA", ROOT.parent / "shared" / "data"))

LORA = {"type": "lora", "r": 8}
SUMS = {
    "path": str(ROOT / "recipes/real/sums_train.csv"),
    "prompt": "a",
    "reference": "sum",
    "template": "What is {a}+{b}? Answer with the number alone.",
}
GROUPS = {
    # Shaping makes rewards of a group differ in a few steps, in which the model may be right nowhere or everywhere.
    "verifier": [{"type": "numeric"}, {"type": "length", "unit": "characters", "max": 80, "buffer": 80, "weight": 0.1}],
    "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 24, "temperature": 0.5},
    "batch": {"prompts_per_step": 2, "micro_batch": 8},
}


@pytest.fixture(scope="module", autouse=True)
def model():
    assert (MODEL / "model.safetensors").exists(), "no model: make build/smollm2/model.safetensors"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of 24 word problems with solutions, and of 12 pairs of dialogues, none long."""
    folder = tmp_path_factory.mktemp("rows")
    problems = DATA / "gsm8k_train.jsonl"
    problems = problems if problems.exists() else ROOT / "tests/fixtures/word_problems.jsonl"
    solved = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines()[:400]]
    solved = [row for row in solved if len(row["question"]) < 200 and len(row["answer"]) < 160][:24]
    pairs = DATA / "hh_harmless_test.jsonl.gz"
    if pairs.exists():
        with gzip.open(pairs, "rt", encoding="utf-8") as lines:
            found = [json.loads(next(lines)) for _ in range(300)]
        found = [row for row in found if max(len(row["chosen"]), len(row["rejected"])) < 500][:12]
    else:
        found = [json.loads(line) for line in (ROOT / "data/pairs.jsonl").read_text(encoding="utf-8").splitlines()[:12]]
    for name, each in (("solved", solved), ("pairs", found)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    return folder


def posttrain(*arguments, cwd):
    """The command; what it printed."""
    command = [sys.executable, "-m", "posttrain", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def train(folder, name, recipe, *arguments):
    """Train a recipe on the model; its run folder and the metrics of each step. No alarm may ring."""
    recipe = {"model": {"path": str(MODEL), "peft": LORA}, **recipe, "output": str(folder / name)}
    recipe.setdefault("training", {"learning_rate": 1e-4, "max_steps": 3})
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    checked = posttrain("check", folder / f"{name}.yaml", cwd=folder)
    printed = posttrain("train", folder / f"{name}.yaml", *arguments, cwd=folder)
    events = read_events(folder / name / "metrics.jsonl")
    assert not [event["alarm"] for event in events if "alarm" in event]
    for text in (checked, printed):
        assert not re.search(r"warning|alarm|did not move|more than one BOS", text, re.IGNORECASE), text
    return folder / name, [event for event in events if "loss" in event]


def pairs_source(rows):
    return {"path": str(rows / "pairs.jsonl")}


def test_supervised_training_of_all_weights_learns_and_saves(rows, tmp_path):
    recipe = {
        "model": {"path": str(MODEL)},
        "data": {
            "completions": {
                "path": str(rows / "solved.jsonl"),
                "prompt": "question",
                "completion": "answer",
                "limit": 8,
            }
        },
        "method": {"name": "sft"},
        "batch": {"rows_per_step": 8, "micro_batch": 8},
        "training": {"learning_rate": 1e-4, "max_steps": 4, "lr_scheduler_type": "constant"},
    }
    run, steps = train(tmp_path, "sft", recipe)
    losses = [step["loss"] for step in steps]
    assert losses[-1] < 0.9 * losses[0], losses  # the same eight rows each step
    model, info = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"] and model.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


def test_dpo_with_an_adapter(rows, tmp_path):
    recipe = {
        "data": {"preferences": pairs_source(rows), "max_length": 256},
        "method": {"name": "dpo", "beta": 0.1},
        "batch": {"rows_per_step": 4, "micro_batch": 4},
    }
    run, steps = train(tmp_path, "dpo", recipe)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # B is zero, so policy and reference are one
    merged = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
    assert any(not torch.equal(merged[name], start[name]) for name in start)
    assert (run / "adapter" / "adapter_config.json").exists()


def test_a_reward_model_and_its_measure(rows, tmp_path):
    recipe = {
        "model": {"path": str(MODEL)},
        "data": {"preferences": pairs_source(rows), "max_length": 256},
        "method": {"name": "reward"},
        "batch": {"rows_per_step": 4, "micro_batch": 4},
        "training": {"learning_rate": 1e-5, "max_steps": 2},
    }
    run, _ = train(tmp_path, "reward", recipe)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(run / "model", output_loading_info=True)
    assert classifier.config.num_labels == 1 and not info["missing_keys"]


ONLINE = {
    "grpo": ({"name": "grpo"}, ()),
    "chord": ({"name": "chord", "expert_rows_per_step": 2}, ("traces",)),
    "prefixrl": ({"name": "prefixrl"}, ("traces",)),
}


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_method(name, rows, tmp_path):
    method, kinds = ONLINE[name]
    traces = tmp_path / "traces.jsonl"
    lines = (ROOT / "recipes/real/sums_train.csv").read_text(encoding="utf-8").splitlines()[1:17]
    sums = [dict(zip("abc", map(int, line.split(",")), strict=True)) for line in lines]
    written = [
        {
            "prompt": f"What is {row['a']}+{row['b']}? Answer with the number alone.",
            "answer": f"{row['a']} and {row['b']} together are {row['c']}.",
            "sum": str(row["c"]),
        }
        for row in sums
    ]
    traces.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    source = {"path": str(traces), "prompt": "prompt", "reference": "sum"}
    data = {"prompts": source, **{kind: {**source, "completion": "answer"} for kind in kinds}}
    run, steps = train(tmp_path, name, {**GROUPS, "data": data, "method": method})
    assert len(steps) == 3 and all(math.isfinite(step["loss"]) for step in steps)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert samples and all(sample["prompt"].count("What is") == 1 for sample in samples)
    assert AutoModelForCausalLM.from_pretrained(run / "model")


CHAT_WITH_TOOLS = """\
{%- if tools %}{{ "<|im_start|>system\\nCall a tool as <tool_call>{name, arguments}</tool_call>:" }}
{%- for tool in tools %}{{ "\\n" + (tool | tojson) }}{% endfor %}{{ "<|im_end|>\\n" }}{% endif %}
{%- for message in messages %}{{ "<|im_start|>" + message.role + "\\n" + (message.content or "") }}
{%- for call in message.tool_calls or [] %}{% set call = call.function or call %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{ "<|im_end|>\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""


def test_tools_on_word_problems(rows, tmp_path):
    """The recipe with a calculator and a search, from a start that has seen the calculator used a few times."""
    recipe = yaml.safe_load((ROOT / "recipes/agents/grpo-tools-gsm8k.yaml").read_text(encoding="utf-8"))
    asked = recipe["data"]["prompts"]["template"]
    calculator = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    calculator = {"name": "calculate", "description": "Work out a sum.", "parameters": calculator}
    shown = []
    for row in map(json.loads, (rows / "solved.jsonl").read_text(encoding="utf-8").splitlines()):
        steps, answer = row["answer"].split("####")
        sums = re.findall(r"(\d[\d.+*/ -]*[+*/-][\d.+*/ -]*\d) ?=", re.sub("<<.*?>>", "", steps))
        conversation = [{"role": "user", "content": asked.format(question=row["question"])}]
        for each in sums:
            call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": each}}}
            conversation.append({"role": "assistant", "content": "", "tool_calls": [call]})
            conversation.append({"role": "tool", "content": f"{eval(each):.10g}"})
        conversation.append({"role": "assistant", "content": f"\\boxed{{{answer.strip()}}}"})
        shown.append({"messages": conversation, "tools": [{"type": "function", "function": calculator}]})
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown), encoding="utf-8")
    start = {"model": {"path": str(MODEL), "chat_template": CHAT_WITH_TOOLS}, "method": {"name": "sft"}}
    start |= {
        "data": {"completions": {"path": str(tmp_path / "shown.jsonl")}},
        "batch": {"rows_per_step": 4, "micro_batch": 4},
    }
    run, _ = train(tmp_path, "start", {**start, "training": {"learning_rate": 1e-4, "max_steps": 6}})
    recipe["data"]["prompts"] |= {"path": str(rows / "solved.jsonl"), "limit": 8}
    del recipe["data"]["prompts"]["name"]
    functions = [str(ROOT / "recipes/agents" / each) for each in recipe["environment"]["functions"]]
    recipe["environment"] |= {"functions": functions, "max_turns": 3, "episode_tokens": 640}
    recipe["model"] = {"path": str(run / "model"), "peft": LORA}
    recipe["verifier"].append(GROUPS["verifier"][1])
    recipe["rollouts"] |= {"samples_per_prompt": 4, "max_new_tokens": 48}
    recipe["batch"] = {"prompts_per_step": 2, "micro_batch": 8}
    recipe["training"] = {"learning_rate": 1e-4, "max_steps": 2}
    run, steps = train(tmp_path, "tools", recipe)
    assert len(steps) == 2 and all(math.isfinite(step["loss"]) for step in steps)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [turn for sample in samples for turn in map(str, sample.get("turns", ()))]
    assert any("<tool_call>" in text for text in texts)  # and was answered: the next turn is what the tool returned
    assert any(re.fullmatch(r"[^<]*\d[^<]*(<.*)?", text, re.DOTALL) for text in texts)
    assert all(0 <= step["invalid_action_share"] < 1 for step in steps)
    assert any(step["grad_norm"] > 0 for step in steps)


def test_a_run_resumed_is_the_same_bit_for_bit(tmp_path):
    recipe = {**GROUPS, "data": {"prompts": {**SUMS, "limit": 8}}, "method": {"name": "grpo"}}
    recipe["training"] = {"learning_rate": 1e-4, "max_steps": 2, "save_steps": 1}
    run, _ = train(tmp_path, "grpo", recipe)
    whole = (run / "model" / "model.safetensors").read_bytes()
    for path in (run / "checkpoints").glob("checkpoint-2/*"):
        path.unlink() if path.is_file() else None
    (run / "checkpoints" / "checkpoint-2").rename(tmp_path / "away")
    posttrain("train", tmp_path / "grpo.yaml", "--resume", "auto", cwd=tmp_path)
    assert (run / "model" / "model.safetensors").read_bytes() == whole


BENCHMARK = {"name": "sums", "data": {**SUMS, "limit": 16}, "verifier": [{"type": "numeric"}]}


def evaluate(folder, *arguments, **keys):
    (folder / "eval.yaml").write_text(yaml.safe_dump({"benchmarks": [BENCHMARK], **keys}), encoding="utf-8")
    posttrain("eval", MODEL, "--config", "eval.yaml", "--output", "report.json", *arguments, cwd=folder)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_evaluation(tmp_path):
    report = evaluate(tmp_path, max_new_tokens=12)
    (entry,) = report["benchmarks"].values() if isinstance(report["benchmarks"], dict) else report["benchmarks"]
    assert "greedy" in json.dumps(entry)


def test_sampling(tmp_path):
    settings = {"data": {"prompts": {**SUMS, "limit": 4}}, **{key: GROUPS[key] for key in ("verifier", "rollouts")}}
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    posttrain("sample", MODEL, "--config", "sample.yaml", "--output", "traces.jsonl", cwd=tmp_path)
    traces = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(traces) == 16
    assert {trace["verdict"] for trace in traces} <= {"correct", "wrong", "no_answer", "unparseable"}


@pytest.mark.serve
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
def test_vllm_evaluates_more_prompts_than_it_reads_at_once(tmp_path):
    """61 prompts of 46 tokens, five samples each: more than the 4,096 tokens of a pass on a CPU."""
    padded = "Please think of it for a while, and then tell me in as few words as you can: What is {a}+{b}?"
    benchmark = {**BENCHMARK, "data": {**SUMS, "template": padded, "limit": 61}}
    report = evaluate(tmp_path, "--engine", "vllm", "--samples", "5", benchmarks=[benchmark], max_new_tokens=4)
    assert report
