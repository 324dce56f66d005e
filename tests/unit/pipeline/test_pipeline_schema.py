from __future__ import annotations

import pytest

from posttrain.errors import RecipeError
from posttrain.pipeline.schema import load_pipeline, references, substitute
from posttrain.pipeline.stages import STAGES

GOOD = """
- name: base
  train: base.yaml
  set: {training.max_steps: 2000}
- name: base_eval
  eval: {model: "${base.model}", benchmarks: [chain-sum-2]}
- name: rl
  train: {model: {path: "${base.run}/checkpoints/checkpoint-5"}, seed: 1}
- name: result
  compare: {base: "${base_eval.report}", other: reports/other.json}
- name: played
  play: {recipe: rooms.yaml, episodes: 9}
"""


def test_a_good_pipeline(pipeline_file):
    config, _ = load_pipeline(pipeline_file(GOOD), [], STAGES)
    assert [(entry.name, entry.kind) for entry in config.stages] == [
        ("base", "train"),
        ("base_eval", "eval"),
        ("rl", "train"),
        ("result", "compare"),
        ("played", "play"),
    ]
    assert [references(entry) for entry in config.stages] == [
        [],
        [("base", "model")],
        [("base", "run")],
        [("base_eval", "report")],
        [],
    ]


ONE = '- {{name: one, train: one.yaml}}\n- {{name: two, train: two.yaml, set: {{{key}: "{value}"}}}}\n'


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("- {name: 2fast, train: a.yaml}", "pipeline.yaml:4: stages.0.name: stage name '2fast': letters"),
        ("- {name: a-b, train: a.yaml}", "stage name 'a-b': letters"),
        ("- {name: output, train: a.yaml}", "stage name 'output' is a key of the pipeline itself"),
        (
            "- {name: a, train: a.yaml}\n- {name: a, train: a.yaml}",
            "pipeline.yaml:5: stages.1.name: stage name 'a' is used",
        ),
        ("- {name: a}", f"stage 'a' needs exactly one of {', '.join(STAGES)}; it has none"),
        ("- {name: a, train: }", f"stage 'a' needs exactly one of {', '.join(STAGES)}; it has train"),
        ("- {name: a, train: x, compare: {base: x, other: y}}", "it has train, compare"),
        ("- {name: a, tain: a.yaml}", "stages.0.tain: unknown key\n  did you mean 'train'?"),
        ("- {name: a, eval: {model: x, benchmark: [y]}}", "did you mean 'benchmarks'?"),
        ("- {name: a, eval: {model: x, benchmarks: [y]}, set: {k: 1}}", "`set` has no effect in an eval stage"),
        ("- {name: a, eval: {model: x, benchmarks: [y], every: 5}}", "`every` has no effect in an eval stage"),
        (ONE.format(key="model.path", value="${on.model}"), "no stage 'on' before 'two'; did you mean 'one'?"),
        (
            ONE.format(key="model.path", value="${one.modle}"),
            "stage 'one' (train) has no 'modle'; did you mean 'model'?",
        ),
        (ONE.format(key="model.path", value="${two.model}"), "only stages before 'two' can be referenced"),
        (
            ONE.format(key="model.path", value="${one}"),
            "${one} is no reference: write ${stage.artefact}, e.g. ${one.model}",
        ),
        (
            ONE.format(key="model.path", value="${one.run}"),
            "pipeline.yaml:5: stages.1.set.model.path: ${one.run}: a model",
        ),
        (ONE.format(key="run", value="x/${one.model}/${nine.model}"), "no stage 'nine' before 'two'"),
        (
            "- {name: a, train: a.yaml, set: {model.path: '${b.model}'}}\n- {name: b, train: b.yaml}",
            "and 'b' is not one",
        ),
        (
            "- {name: a, train: a.yaml}\n- {name: b, compare: {base: '${a.model}', other: x.json}}",
            "stages.1.compare.base: ${a.model}: a report is read here, not a model",
        ),
    ],
)
def test_mistakes_are_named_with_their_line(pipeline_file, stages: str, message: str):
    with pytest.raises(RecipeError) as caught:
        load_pipeline(pipeline_file(stages), [], STAGES)
    assert message in str(caught.value)


def test_all_mistakes_are_found_in_one_pass(pipeline_file):
    text = "- {name: a, train: a.yaml, set: {x: '${c.model}'}}\n- {name: a}\n"
    with pytest.raises(RecipeError) as caught:
        load_pipeline(pipeline_file(text), [], STAGES)
    assert len(caught.value.errors) == 3


def test_dollar_braces_of_templates_are_no_references(pipeline_file):
    text = "- name: a\n  train: {template: 'it costs ${price}, {prompt}', pattern: '^${1}'}"
    config, _ = load_pipeline(pipeline_file(text), [], STAGES)
    assert references(config.stages[0]) == []


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("output=other", lambda c: c.output, "other"),
        ("base.training.max_steps=50", lambda c: c.stages[0].set, {"training.max_steps": 50}),
        ("base.data.levels=[1, 2]", lambda c: c.stages[0].set["data.levels"], [1, 2]),
        ("rl.seed=2", lambda c: c.stages[2].set, {"seed": 2}),
        ("rl.model.path=${base.model}", lambda c: c.stages[2].set, {"model.path": "${base.model}"}),
        ("base_eval.samples=4", lambda c: c.stages[1].config.samples, 4),
        ("base_eval.benchmarks.0=chain-sum-3", lambda c: c.stages[1].config.benchmarks, ["chain-sum-3"]),
        ("played.episodes=3", lambda c: c.stages[4].config.episodes, 3),
        ("played.environment.max_turns=3", lambda c: c.stages[4].set, {"environment.max_turns": 3}),
        ("result.other=${base_eval.report}", lambda c: c.stages[3].config.other, "${base_eval.report}"),
    ],
)
def test_overrides_by_stage_name(pipeline_file, override: str, where, value):
    config, _ = load_pipeline(pipeline_file(GOOD), [override], STAGES)
    assert where(config) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bsae.seed=1", "override 'bsae.seed=1': no stage 'bsae'\n  did you mean 'base'?"),
        ("outptu=x", "no stage 'outptu'\n  did you mean 'output'?"),
        ("base=1", "an override of a stage is `stage.section.key=value`"),
        ("base.seed", "an override is `section.key=value`"),
        ("base.seed=", "override 'base.seed=': no value"),
        ("base_eval.sample=4", "override 'base_eval.sample=4': stages.1.eval.sample: unknown key"),
        ("base_eval.samples=x", "override 'base_eval.samples=x': stages.1.eval.samples: expected"),
        ("base_eval.benchmarks.7=x", "has no entry '7'"),
        (
            "base.model.path=${rl.model}",
            "override 'base.model.path=${rl.model}': stages.0.set.model.path: ${rl.model}: only",
        ),
    ],
)
def test_wrong_overrides_are_named(pipeline_file, override: str, message: str):
    with pytest.raises(RecipeError) as caught:
        load_pipeline(pipeline_file(GOOD), [override], STAGES)
    assert message in str(caught.value)


def test_substitute_reaches_every_string():
    value = {"a": ["${x.y}", {"b": "p/${x.y}/q/${z.w}"}], "c": 3, "d": "${x}"}
    expected = {"a": ["<x y>", {"b": "p/<x y>/q/<z w>"}], "c": 3, "d": "${x}"}
    assert substitute(value, lambda stage, artefact: f"<{stage} {artefact}>") == expected
