from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config.schema import ModelConfig
from posttrain.errors import ModelError, PosttrainError
from posttrain.evaluation.report import Report
from posttrain.pipeline.cache import key_of
from posttrain.pipeline.inputs import input_paths
from posttrain.pipeline.runner import check_stages
from posttrain.pipeline.schema import load_pipeline
from posttrain.pipeline.stages import STAGES, Stage, as_written

SFT = """\
model:
  init: {hidden_size: 16, layers: 1, heads: 2, max_length: 64, tokenizer: {alphabet: "0123456789+=;#"}}
data:
  completions: {task: chain_sum, levels: [2], size: 16}
method: {name: sft}
batch: {rows_per_step: 8, micro_batch: 8}
training: {learning_rate: 1.0e-3, max_steps: 2}
tracking: {console: "off", plots: false}
output: somewhere/else
"""
GRPO = """\
model: {path: not/there/model}
data:
  prompts: {task: chain_sum, levels: [2], size: 16}
verifier: [{type: procedural}]
rollouts: {samples_per_prompt: 2, max_new_tokens: 8}
method: {name: grpo}
batch: {prompts_per_step: 4, micro_batch: 8}
training: {max_steps: 1}
tracking: {console: "off", plots: false}
output: somewhere/else
"""
WHOLE = """
- name: base
  train: recipes/sft.yaml
- name: base_eval
  eval: {model: "${base.model}", benchmarks: [chain-sum-2], limit: 4, max_new_tokens: 8}
- name: rl
  train: recipes/grpo.yaml
  set: {model.path: "${base.model}"}
- name: rl_eval
  eval: {model: {path: "${rl.model}"}, benchmarks: [chain-sum-2], limit: 4, max_new_tokens: 8}
- name: result
  compare: {base: "${base_eval.report}", other: "${rl_eval.report}"}
"""


@pytest.fixture
def stages(pipeline_file):
    """Builds the stages of a pipeline beside the two recipes."""

    def build(text: str, *overrides: str) -> dict[str, Stage]:
        path = pipeline_file(text)
        Path("recipes").mkdir(exist_ok=True)
        Path("recipes/sft.yaml").write_text(SFT)
        Path("recipes/grpo.yaml").write_text(GRPO)
        config, places = load_pipeline(path, overrides, STAGES)
        folder = Path(config.output)
        return {
            entry.name: STAGES[entry.kind](entry, folder / entry.name, path, number, places)
            for number, entry in enumerate(config.stages)
        }

    return build


def problems_of(stages: dict[str, Stage]) -> str:
    with pytest.raises(PosttrainError) as caught:
        check_stages(list(stages.values()))
    return str(caught.value)


def key(stage: Stage) -> str:
    return key_of(stage.inputs(as_written))


def test_a_whole_pipeline_passes_its_checks(stages):
    check_stages(list(stages(WHOLE).values()))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("recipes/grpo.yaml", "recipes/grop.yaml", "stage rl: recipes/grop.yaml: no such file"),
        ('model.path: "${base.model}"', "training.max_stepz: 3", "pipeline.yaml:10: training.max_stepz: unknown key"),
        ('model.path: "${base.model}"', "training.max_steps: -3", "pipeline.yaml:10: training.max_steps: must be"),
        ('model.path: "${base.model}"', "seed.x: 1", "pipeline.yaml:10: seed"),
        ('model.path: "${base.model}"', "output: x", "pipeline.yaml:10: output: a train stage writes into its own"),
        ('model.path: "${base.model}"', "seed: 1", "stage rl: model.path: no model folder 'not/there/model'"),
        ('model.path: "${base.model}"', "model.path: out/base/model", "'out/base/model' is made by stage 'base'"),
        ('{model.path: "${base.model}"}', "{batch.micro_batch: 3}", "pipeline.yaml:10: batch.micro_batch: 4 prompts"),
        (
            '{model.path: "${base.model}"}',
            "{batch.prompts_per_step: 32}",
            "a step takes 32 prompts, and the data has 16",
        ),
        ('{model.path: "${base.model}"}', "{rollouts.samples_per_prompt: 1}", "needs at least 2 samples per prompt"),
        (
            '{model.path: "${base.model}"}',
            '{data.prompts: {path: rows.jsonl, reference: answer}, model.path: "${base.model}"}',
            "stage rl: rows.jsonl",
        ),
        ('{path: "${rl.model}"}, benchmarks: [chain-sum-2]', "x, benchmarks: [chain-sum]", "no benchmark 'chain-sum'"),
        ('"${rl.model}"}', '"${rl.model}", peft: {}}', "stage rl_eval: model.peft: an adapter"),
        ('"${rl.model}"}', '"${rl.model}"}, k: [4]', "stage rl_eval: k: pass@4 needs"),
        ('"${rl.model}"}', '"${rl.model}"}, samples: 4', "`samples` is 1 and 4"),
        (
            "[chain-sum-2], limit: 4, max_new_tokens: 8}\n- name: result",
            "[chain-sum-3], limit: 4, max_new_tokens: 8}\n- name: result",
            "share no benchmark",
        ),
        ('other: "${rl_eval.report}"', "other: gone.json", "stage result: gone.json: no such report"),
    ],
)
def test_mistakes_are_found_before_anything_runs(stages, old: str, new: str, message: str):
    assert old in WHOLE
    assert message in problems_of(stages(WHOLE.replace(old, new)))


def test_references_in_a_recipe_file_are_refused(stages):
    built = stages(WHOLE)
    Path("recipes/grpo.yaml").write_text(GRPO.replace("not/there/model", "'${base.model}'"))
    message = problems_of(built)
    assert message.startswith(
        "recipes/grpo.yaml:1: model.path: '${base.model}': references are read in the pipeline file"
    )


def test_an_inline_recipe_is_the_same_as_a_file(stages):
    indented = "".join(f"    {line}\n" for line in SFT.splitlines() if not line.startswith("output"))
    built = stages(f"- name: a\n  train: recipes/sft.yaml\n- name: b\n  train:\n{indented}")
    assert key(built["a"]) == key(built["b"])
    assert built["b"].resolved(as_written).output == "out/b"
    wrong = stages(f"- name: b\n  train:\n{indented}".replace("max_steps", "max_stepz"))
    assert problems_of(wrong).startswith("pipeline.yaml:12: training.max_stepz: unknown key")
    given = stages(f"- name: b\n  train:\n{indented}    output: x\n")
    assert "pipeline.yaml:14: a train stage writes into its own" in problems_of(given)


@pytest.mark.parametrize(
    ("stage", "override", "same"),
    [
        ("base", "output=other", True),
        ("base", "base.tracking.plots=true", True),
        ("base", "base.training.report_to=[tensorboard]", True),
        ("base", "base.training.run_name=x", True),
        ("base", "base.training.max_steps=2", True),
        ("base", "base.training.max_steps=3", False),
        ("base", "base.training.learning_rate=2e-3", False),
        ("base", "base.seed=1", False),
        ("rl", "rl.model.path=other/model", False),
        ("rl_eval", "rl_eval.samples=1", True),
        ("rl_eval", "rl_eval.samples=2", False),
        ("result", "result.other=${base_eval.report}", False),
    ],
)
def test_what_changes_a_key(stages, stage: str, override: str, same: bool):
    assert (key(stages(WHOLE)[stage]) == key(stages(WHOLE, override)[stage])) is same


def test_keys_follow_the_keys_of_what_is_read(stages):
    rl = stages(WHOLE)["rl"]
    first, second = (key_of(rl.inputs(lambda stage, artefact, n=n: f"{stage}.{artefact}@{n}")) for n in "12")
    assert first != second


def test_local_models_and_data_are_hashed_by_content(stages):
    built = stages(WHOLE, "rl.model.path=mine", "rl_eval.model.path=mine")
    Path("mine").mkdir()
    before = [key(built[name]) for name in ("base", "rl", "rl_eval")]
    Path("mine/config.json").write_text("{}")
    after = [key(built[name]) for name in ("base", "rl", "rl_eval")]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, False]
    assert list(built["rl"].inputs(as_written)["files"]) == ["mine/config.json"]


def test_input_paths_of_nested_sections(stages):
    text = """
    - name: e
      eval:
        model: m
        benchmarks:
          - {name: x, data: {path: x.jsonl}, verifier: [{type: math}]}
          - chain-sum-2
    """
    assert sorted(input_paths(stages(text)["e"].resolved(as_written))) == ["m", "x.jsonl"]


def test_an_eval_stage_takes_a_path_or_a_model_section(stages):
    built = stages(WHOLE)
    assert built["base_eval"].resolved(as_written).model == ModelConfig(path="${base.model}")
    assert built["rl_eval"].resolved(lambda *_: "a/b").model == ModelConfig(path="a/b")


def test_train_evaluate_compare_for_real(stages, run):
    stages(WHOLE)
    printed = run(Path("pipeline.yaml"))
    reports = [Report.load(Path(f"out/{name}/report.json")) for name in ("base_eval", "rl_eval")]
    assert [report.model_label for report in reports] == ["out/base/model", "out/rl/model"]
    assert len(reports[0].benchmarks[0].records) == 4
    table = json.loads(Path("out/result/table.json").read_text())
    assert (table["base"], table["other"]) == ("out/base/model", "out/rl/model")
    assert Path("out/result/table.md").read_text().count("\n") == 6
    assert "chain-sum-2, 4 problems" in printed
    assert "rl: model: out/rl/model" in printed
    assert not Path("somewhere").exists()

    again = run(Path("pipeline.yaml"))
    assert again.count("cached") == 5
    assert "chain-sum-2, 4 problems" in again

    Path("out/base/model/config.json").write_text("{")
    with pytest.raises(ModelError):
        run(Path("pipeline.yaml"), force=["rl"])
    assert "stage.json" not in [path.name for path in Path("out/rl").iterdir()]


DATA = """
- name: base
  train: recipes/sft.yaml
- name: traces
  sample:
    model: {path: "${base.model}"}
    data: {prompts: {path: problems.jsonl, reference: answer}}
    verifier: [{type: exact, pattern: "^(.)"}]
    verifier_pool: {workers: 0}
    rollouts: {samples_per_prompt: 48, max_new_tokens: 4, temperature: 2.0}
- name: pairs
  pairs: {traces: ["${traces.traces}"], strategy: margin, max_pairs: 4, unfinished: true}
- name: scored
  responses: {traces: ["${traces.traces}"], n: 3, unfinished: true}
- name: correct
  completions: {traces: ["${traces.traces}"], per_problem: 2}
"""


def test_traces_and_pairs_for_real(stages, run, monkeypatch):
    built = stages(DATA)
    rows = [{"prompt": f"{i}+1=", "answer": str(i)} for i in range(4)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = key(built["traces"])
    for override, same in (("prompts_per_chunk=1", True), ("rollouts.max_batch=9", True), ("seed=1", False)):
        changed = stages(DATA, f"traces.{override}")["traces"]
        assert (key(changed) == before) is same

    from posttrain.rollouts.trace_file import TraceFile

    append = TraceFile.append

    def killed(self, traces):
        append(self, traces[:30])
        raise KeyboardInterrupt

    monkeypatch.setattr(TraceFile, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        run(Path("pipeline.yaml"))
    monkeypatch.setattr(TraceFile, "append", append)
    printed = run(Path("pipeline.yaml"))
    assert "traces (sample) goes on" in printed
    lines = Path("out/traces/traces.jsonl").read_text().splitlines()
    numbers = [(json.loads(line)["problem_id"], json.loads(line)["sample"]) for line in lines]
    assert len(set(numbers)) == len(numbers) == 4 * 48
    report = json.loads(Path("out/pairs/pairs.report.json").read_text())
    assert report["pairs"] == len(Path("out/pairs/pairs.jsonl").read_text().splitlines()) > 0
    for name, file in (("scored", "responses"), ("correct", "completions")):
        lines = Path(f"out/{name}/{file}.jsonl").read_text().splitlines()
        assert len(lines) == json.loads(Path(f"out/{name}/{file}.report.json").read_text())["rows"] > 0
    assert run(Path("pipeline.yaml")).count("cached") == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'pairs: {traces: ["${traces.traces}"]',
            "pairs: {traces: [gone.jsonl]",
            "stage pairs: gone.jsonl: no such trace file",
        ),
        ('"${traces.traces}"], n: 3', "gone.jsonl], n: 3", "stage scored: gone.jsonl: no such trace file"),
        ("n: 3", "n: 1", "must be at least 2"),
        ('"${traces.traces}"', '"${traces.model}"', "stage 'traces' (sample) has no 'model'"),
        ("strategy: margin", "strategy: margn", "did you mean 'margin'"),
        ("path: problems.jsonl, reference: answer", "path: gone.jsonl", "stage traces: gone.jsonl: no such file"),
        ("max_new_tokens: 4", "max_tokens: 4", "unknown key"),
    ],
)
def test_mistakes_in_data_stages(stages, old, new, message):
    assert old in DATA
    Path("problems.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    with pytest.raises(PosttrainError) as caught:
        check_stages(list(stages(DATA.replace(old, new)).values()))
    assert message in str(caught.value)


def test_a_train_stage_resumes_from_its_checkpoints(stages, run, monkeypatch):
    stages("- {name: base, train: recipes/sft.yaml, set: {training.save_steps: 1, training.max_steps: 3}}")
    from posttrain.pipeline.stages import TrainStage

    whole = TrainStage.run

    def killed_at_the_end(self, resolve, *, interrupted):
        whole(self, resolve, interrupted=interrupted)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainStage, "run", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        run(Path("pipeline.yaml"))
    monkeypatch.setattr(TrainStage, "run", whole)
    weights = Path("out/base/model/model.safetensors").read_bytes()
    assert "goes on" in run(Path("pipeline.yaml"))
    assert Path("out/base/model/model.safetensors").read_bytes() == weights
    assert [path.name for path in Path("out").iterdir() if path.is_dir()] == ["base"]
