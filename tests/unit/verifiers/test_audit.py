"""The audit, on data with known faults, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.config.audit import AuditConfig
from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.errors import DataError, RecipeError
from posttrain.verifiers.audit import audit, check_references, right_by_lenient_only
from posttrain.verifiers.gold import wrong_answers
from posttrain.verifiers.judge import build_judge
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.numeric import NumericVerifier
from posttrain.verifiers.verdict import Status

HERE = {"workers": 0}


def write_rows(folder: Path, rows: list[dict]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(folder: Path, rows: list[dict], verifier: dict, source: dict | None = None, **more) -> AuditConfig:
    data = {"path": write_rows(folder, rows), "prompt": "q", "reference": "a"} | (source or {})
    return AuditConfig.model_validate({"data": data, "verifier": [verifier], "verifier_pool": HERE} | more)


ROWS = [
    {"q": "1", "a": "9 * 2\n#### 18"},
    {"q": "2", "a": "3"},
    {"q": "3", "a": r"$\frac{1}{2}$"},
    {"q": "4", "a": "1,234.50"},
]


def test_sound_data_pass(tmp_path: Path) -> None:
    report = audit(settings(tmp_path, ROWS, {"type": "math"}))
    assert report.passed and report.rows == report.gold_correct == 4
    assert report.table["gold"] == {"correct": 4}
    assert report.table["empty"] == {"no_answer": 4}
    assert report.table["other row"] == {"wrong": 4}
    assert report.table["another number"] == report.table["other sign"] == {"wrong": 3}
    assert report.table["two answers"] == {"wrong": 3}
    assert not (report.unreadable or report.rejected or report.accepted or report.disagreements)
    assert report.per_second > 0


def test_gold_that_cannot_be_read_is_named_by_row(tmp_path: Path) -> None:
    rows = [ROWS[0], {"q": "x", "a": "}{"}, ROWS[1], {"q": "y", "a": r"\boxed{!!!}"}]
    report = audit(settings(tmp_path, rows, {"type": "math"}))
    assert not report.passed and report.gold_correct == 2
    assert [Path(found.where).name for found in report.unreadable] == ["rows.jsonl:2", "rows.jsonl:4"]
    assert report.unreadable[0].reference == "}{" and report.unreadable[0].status == "bad_reference"
    assert audit(settings(tmp_path, rows, {"type": "math"}, min_gold=0.5)).passed


def test_gold_that_is_not_correct_is_named_too(tmp_path: Path) -> None:
    """Solutions that contradict the reference."""
    rows = [{"q": "1", "a": "3", "s": "The answer is 3."}, {"q": "2", "a": "4", "s": "The answer is 5."}]
    report = audit(settings(tmp_path, rows, {"type": "math"}, {"completion": "s"}))
    assert (report.gold_correct, [found.status for found in report.rejected]) == (1, ["wrong"])


def test_spoilt_answers_that_are_correct_are_found(tmp_path: Path) -> None:
    """A verifier that looks at the last digit only."""
    rows = [{"q": str(n), "a": str(n)} for n in range(3)]
    lax = {"type": "numeric", "tolerance": 100.0}
    report = audit(settings(tmp_path, rows, lax))
    assert report.passed and [found.kind for found in report.accepted] == ["other row"] * 3


def test_profiles_and_what_a_model_wrote(tmp_path: Path) -> None:
    rows = [
        {"q": "1", "a": "5", "model": ["so it is 5", r"\boxed{5}", r"\boxed{6}"]},
        {"q": "2", "a": "6", "model": ["so it is 5", r"\boxed{5}", r"\boxed{6}"]},
    ]
    report = audit(settings(tmp_path, rows, {"type": "math"}, outputs="model"))
    assert report.table["model"] == {"no_answer": 2, "correct": 2, "wrong": 2}
    (found,) = report.disagreements
    assert (found.kind, found.status, found.other, found.completion) == ("model", "no_answer", "correct", "so it is 5")


def test_a_column_of_outputs_that_holds_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        audit(settings(tmp_path, ROWS, {"type": "math"}, outputs="none"))


def test_choices(tmp_path: Path) -> None:
    rows = [{"q": "1", "a": "1", "choices": ["x", "y", "z"]}, {"q": "2", "a": "z", "choices": ["x", "y", "z"]}]
    report = audit(settings(tmp_path, rows, {"type": "choice"}))
    assert report.passed and report.table["another letter"] == report.table["two answers"] == {"wrong": 2}


@pytest.mark.usefixtures("bubblewrap")
def test_code(tmp_path: Path) -> None:
    rows = [
        {
            "q": f"def f{n}(x):\n",
            "s": f"    return x + {n}\n",
            "test": f"assert f{n}(1) == {n + 1}",
            "entry_point": f"f{n}",
        }
        for n in range(2)
    ]
    report = audit(settings(tmp_path, rows, {"type": "code"}, {"reference": None, "completion": "s"}))
    assert report.passed and report.table["gold"] == {"correct": 2} and report.table["no code"] == {"wrong": 2}


def test_generated_tasks_bring_their_own_solutions() -> None:
    data = {"task": "chain_sum", "levels": [3], "size": 20}
    config = AuditConfig.model_validate({"data": data, "verifier": [{"type": "procedural"}], "verifier_pool": HERE})
    assert audit(config).table["gold"] == {"correct": 20}
    gym = {"data": {"reasoning_gym": "chain_sum", "size": 10}, "verifier": [{"type": "reasoning_gym"}]}
    assert audit(AuditConfig.model_validate(gym | {"verifier_pool": HERE})).gold_correct == 10


@pytest.mark.parametrize(
    "verifier",
    [{"type": "numeric", "pattern": "A: (.*)"}, {"type": "code", "isolation": "rlimit"}, {"type": "procedural"}],
)
def test_where_nothing_says_what_a_right_answer_looks_like(tmp_path: Path, verifier: dict) -> None:
    with pytest.raises(RecipeError, match="nothing says how a right answer") as caught:
        audit(settings(tmp_path, ROWS, verifier))
    assert caught.value.where == "data.completion"


def test_shaping_verifiers_take_part(tmp_path: Path) -> None:
    config = settings(tmp_path, ROWS, {"type": "math"})
    length = {"type": "length", "max": 100, "buffer": 50}
    shaped = AuditConfig.model_validate({"data": config.data, "verifier": [length, {"type": "math"}]})
    assert audit(shaped).passed


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        audit(settings(tmp_path, [], {"type": "math"}))


def test_wrong_answers_of_numbers_with_a_tolerance_are_not_guessed() -> None:
    config = NumericVerifier.Config(type="numeric", tolerance=0.5)
    assert set(wrong_answers(config, [(Problem("p", "", "3"), "3")])) == {"empty"}


def test_references_are_refused_before_a_run() -> None:
    judge = build_judge([MathVerifier.Config(type="math")], VerifierPoolConfig(workers=0))
    good = [Problem("a/0", "", "5"), Problem("a/1", "", r"\frac{1}{2}")]
    check_references(judge, good)
    bad = [Problem(f"a/{n}", "", "}{", where=f"rows.jsonl:{n}") for n in range(3, 18)]
    with pytest.raises(DataError) as caught:
        check_references(judge, good + bad)
    assert "15 of 17 references" in caught.value.what and caught.value.where == "rows.jsonl:3"
    assert "rows.jsonl:12" in caught.value.hint and "and 5 more" in caught.value.hint


# ------------------------------------------------------------------------------------------------------- the command


def run(*arguments: str):
    return CliRunner().invoke(app, ["verify", *arguments])


def write_config(folder: Path, rows: list[dict], **more) -> str:
    data = {"path": write_rows(folder, rows), "prompt": "q", "reference": "a"}
    content = {"data": data, "verifier": [{"type": "math"}], "verifier_pool": HERE} | more
    path = folder / "audit.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_the_command_passes_on_sound_data(tmp_path: Path) -> None:
    result = run("--config", write_config(tmp_path, ROWS))
    assert result.exit_code == 0, result.output
    assert "gold: 4 of 4 correct" in result.output and "answers per second" in result.output
    assert "two answers" in result.output


def test_the_command_fails_and_names_the_rows(tmp_path: Path) -> None:
    rows = [{"q": str(n), "a": "}{"} for n in range(20)] + ROWS
    output = tmp_path / "out" / "report.json"
    result = run("--config", write_config(tmp_path, rows), "--output", str(output))
    assert result.exit_code == 1
    assert "gold that cannot be read: 20" in result.output and "rows.jsonl:1 " in result.output
    assert "and 8 more" in result.output and "gold: 4 of 24 correct" in result.output
    report = json.loads(output.read_text())
    assert len(report["unreadable"]) == 20 and report["passed"] is False


def test_overrides_go_into_the_configuration(tmp_path: Path) -> None:
    rows = [{"q": "1", "a": "}{"}, ROWS[0]]
    assert run("--config", write_config(tmp_path, rows), "min_gold=0.5", "data.limit=2").exit_code == 0


def test_a_recipe_is_audited_by_its_prompts_and_verifiers(load, write_recipe) -> None:
    result = run(str(write_recipe({"name": "grpo"})))
    assert result.exit_code == 0, result.output
    assert "gold: 64 of 64 correct" in result.output


def test_a_recipe_without_verifiers(write_recipe) -> None:
    result = run(str(write_recipe({"name": "sft"})))
    assert isinstance(result.exception, RecipeError) and "nothing to verify" in result.exception.what


def test_neither_recipe_nor_configuration() -> None:
    result = run()
    assert isinstance(result.exception, RecipeError) and "--config FILE" in result.exception.hint


def test_answers_right_by_the_lenient_profile_only_are_counted(tmp_path: Path) -> None:
    outputs = [r"\boxed{18}", "So it is 18", "Final Answer: She makes 18.", "17"]
    rows = [{"q": "1", "a": "18", "out": outputs}]
    config = settings(tmp_path, rows, {"type": "math"}, outputs="out")
    report = audit(config)
    assert report.table["model"]["correct"] == 1 and report.lenient_only == {"gold": 0, "model": 2}
    written = [(Problem("1", "1", "18"), output) for output in outputs]
    pool = VerifierPoolConfig(workers=0)
    assert right_by_lenient_only([MathVerifier.Config(type="math")], pool, written) == 2
    assert right_by_lenient_only([MathVerifier.Config(type="math", answer_format="tags")], pool, written) == 3
    assert right_by_lenient_only([MathVerifier.Config(type="math", profile="lenient")], pool, written) is None
    assert right_by_lenient_only([NumericVerifier.Config(type="numeric")], pool, written) is None


@pytest.mark.parametrize("form", ["boxed", "hashes", "tags"])
def test_gold_is_written_in_the_form_that_earns_the_reward(tmp_path: Path, form: str) -> None:
    report = audit(settings(tmp_path, ROWS, {"type": "math", "answer_format": form}))
    assert report.passed and not report.accepted and report.lenient_only == {"gold": 0}


@pytest.mark.parametrize(
    ("config", "plain", "further"),
    [
        (MathVerifier.Config(type="math"), ["7", " -3", "1,234.5", "0", ".5"], [r"\frac{1}{2}", "x=3", "", "1,23,4"]),
        (NumericVerifier.Config(type="numeric"), ["7", "0", "1234"], ["1/2", "-3", "seven", ""]),
    ],
)
def test_references_that_are_seen_to_be_read_start_no_worker(config, plain, further, monkeypatch) -> None:
    judge = build_judge([config], VerifierPoolConfig())
    (verifier,) = judge.pool.verifiers
    for reference in plain:
        assert verifier.reads_plainly(reference)
        assert verifier(Problem("p", "q", reference=reference), "").status is not Status.BAD_REFERENCE
    assert not any(map(verifier.reads_plainly, further))

    def start(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("posttrain.verifiers.pool._Worker", start)
    check_references(judge, [Problem("p", "q", reference=reference) for reference in plain])
    judge.close()


def test_a_finding_without_a_detail_ends_in_no_colon(tmp_path: Path) -> None:
    rows = [row | {"out": f"She has {row['a']} of them"} for row in ROWS]
    result = run("--config", write_config(tmp_path, rows, outputs="out"))
    assert "(model): no_answer, other profile correct\n" in result.output
