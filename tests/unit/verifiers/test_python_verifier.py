"""Rewards in a user's own file: how they are found, called, judged and bounded."""

from __future__ import annotations

import importlib
import logging
import math
import textwrap
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from posttrain.config.loading import parse_config
from posttrain.config.own_code import digests, find
from posttrain.config.schema import Section, VerifierPoolConfig
from posttrain.config.verifier import AnyVerifier
from posttrain.data.sample import Problem
from posttrain.errors import RecipeError, VerifierError
from posttrain.verifiers.audit import check_references
from posttrain.verifiers.judge import build_judge

CONFIG = TypeAdapter(AnyVerifier)
HERE = {"workers": 0}
"""For what a function is given and says alone: a worker takes longer to start than all of these together."""
TEXT = Problem("p", "2+3?", "5", {"level": 2, "answer": "5", "task": "math"})
CHAT = Problem("c", ({"role": "user", "content": "2+3?"},), "5", {"answer": "5"})

REWARDS = """
import asyncio, os, time

def right(completion, reference):
    return completion.strip() == reference

def graded(completion, reference, level, scale=1.0):
    return scale * level / 10

def everything(completion, prompt, reference, row, messages, token_count):
    assert prompt == "2+3?" and reference == "5" and row["level"] == 2, (prompt, reference, row)
    assert messages == [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": completion}]
    return token_count / 10

def numpy_number(completion):
    import numpy
    return numpy.float32(0.75)

def verdict(completion):
    from posttrain.verifiers.verdict import Status, Verdict
    return Verdict(Status.NO_ANSWER, 0.0, "nothing there")

def sometimes(completion):
    return None if completion == "skip" else 1.0

async def slow_service(completion):
    await asyncio.sleep(600 if completion == "hang" else 0.05)
    if completion == "raise":
        raise ValueError("service is down")
    return 1

class Counter:
    def __init__(self, start):
        self.count = start
    def __call__(self, completion):
        self.count += 1
        return self.count

class Asks:
    async def __call__(self, completion):
        return len(completion)

def obey(completion):
    if completion == "raise":
        raise ValueError("no number in it")
    if completion == "hang":
        time.sleep(600)
    if completion == "busy":
        while True: pass
    if completion == "memory":
        held = []
        while True: held.append(bytearray(16 << 20))
    if completion == "print":
        print("x" * 1_000_000)
        os.write(2, b"straight to the descriptor")
    if completion == "nan":
        return float("nan")
    if completion == "text":
        return "1.0"
    if completion == "list":
        return [1.0]
    if completion == "fork":
        os.fork()
    if completion == "exit":
        os._exit(3)
    if completion == "quit":
        raise SystemExit(1)
    return 1.0

def batch(completions, prompts, reference, level, **kwargs):
    return [float(text == gold) for text, gold in zip(completions, reference)]

def batch_obey(completions, **kwargs):
    if "raise" in completions:
        raise KeyError("gone")
    if "hang" in completions:
        time.sleep(600)
    if "short" in completions:
        return [1.0]
    if "nan" in completions:
        return [float("nan") if text == "nan" else 1.0 for text in completions]
    return [None if text == "skip" else 1.0 for text in completions]

async def batch_service(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]

def text_only(text):
    return 1.0

def wants(completion, solution):
    return 1.0

NOT_A_FUNCTION = 3
"""

# Reward functions as users of TRL write them: after its documentation (a format, a column, one of several tasks) and
# after what strangers publish (tags in a chat, a count of tags, a number behind a mark).
TRL_STYLE = r'''
import re

def format_reward_func(completions, **kwargs):
    """1 where the completion thinks first, then answers."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content) else 0.0 for content in contents]

def boxed_answer(completions, answer, **kwargs):
    found = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    return [1.0 if match and match.group(1) == gold else 0.0 for match, gold in zip(found, answer)]

def math_only(prompts, completions, task, **kwargs):
    return [(1.0 if "5" in completion else -1.0) if kind == "math" else None
            for completion, kind in zip(completions, task)]

def xml_answer(text):
    return text.split("<answer>")[-1].split("</answer>")[0].strip()

def correctness_reward(prompts, completions, answer, **kwargs) -> list[float]:
    question = prompts[0][-1]["content"]
    assert question == "2+3?"
    responses = [completion[0]["content"] for completion in completions]
    return [2.0 if xml_answer(r) == a else 0.0 for r, a in zip(responses, answer)]

def count_tags(completions, **kwargs) -> list[float]:
    return [sum(0.25 for tag in ("<think>", "</think>", "<answer>", "</answer>") if c[0]["content"].count(tag) == 1)
            for c in completions]

def behind_hashes(completions, answer, **kwargs):
    return [float(c.split("####")[-1].strip() == a) for c, a in zip(completions, answer)]

def longer_is_better(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def ends_at_length(prompts, completions, completion_ids, answer, log_metric=None, log_extra=None, **kwargs):
    right = [a in c for c, a in zip(completions, answer)]
    if log_extra:
        log_extra("golden", list(answer))
    if log_metric:
        log_metric("accuracy", sum(right) / len(right))
    return [1.0 if good and ids[-1] == 9 else 0.0 for good, ids in zip(right, completion_ids)]

def only_ids(completion, completion_ids):
    return sum(completion_ids) / 10
'''

# The habits of three reward files that many copy: a chat answer that loses a little for every character behind its end
# and prints what it saw; an equation over a column of numbers, evaluated, with samples written to a file of its own;
# a function made by another one, which parses with math-verify and its alarm signal and grades by length.
PUBLISHED = r"""
import math, os, random, re

from math_verify import parse, verify

def tidy_tags(completions, **kwargs) -> list[float]:
    def score(text):
        points = sum(0.125 for tag in ("<reasoning>\n", "\n</reasoning>\n") if text.count(tag) == 1)
        if text.count("\n<answer>\n") == 1:
            points += 0.125 - 0.001 * len(text.split("\n</answer>\n")[-1])
        if text.count("\n</answer>") == 1:
            points += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
        return points
    contents = [completion[0]["content"] for completion in completions]
    print("-" * 20, f"\nResponse:\n{contents[0]}")
    return [score(text) for text in contents]

def equation(completions, target, nums, **kwargs):
    rewards = []
    for completion, goal, numbers in zip(completions, target, nums):
        try:
            completion = "<think>" + completion
            with open("successes.txt", "a") as log:
                log.write(completion + "\n")
            found = re.search(r"<answer>(.*?)</answer>", completion).group(1).strip()
            used = [int(n) for n in re.findall(r"\d+", found)]
            if sorted(used) != sorted(numbers) or not re.match(r"^[\d+\-*/().\s]+$", found):
                rewards.append(0.0)
                continue
            value = eval(found, {"__builtins__": None}, {})
            rewards.append(1.0 if abs(float(value) - float(goal)) < 1e-5 else 0.0)
        except Exception:
            rewards.append(0.0)
    return rewards

def scaled_by_length(wrong=(-1.0, -0.5), right=(0.5, 1.0), longest=40):
    def scaled(completions, solution, **kwargs):
        rewards = []
        for completion, gold in zip(completions, solution):
            text = completion[0]["content"]
            low, high = right if verify(parse(gold), parse(text)) else reversed(wrong)
            progress = min(1.0, len(text) / longest)
            rewards.append(float(low + 0.5 * (high - low) * (1.0 + math.cos(progress * math.pi))))
        return rewards
    return scaled

cosine = scaled_by_length()

def stuck_after_math_verify(completions, solution, **kwargs):
    parse(solution[0])
    while True:
        pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "trl_style.py").write_text(TRL_STYLE)
    (tmp_path / "published.py").write_text(PUBLISHED)
    return tmp_path


def test_the_log_holds_nothing_that_a_terminal_would_obey(judged, folder, caplog) -> None:
    """What a completion brings, printed or in an exception, is in the log as it would be on the terminal."""
    (folder / "telling.py").write_text(
        "import logging, sys\n"
        "def score(completion):\n"
        "    print('out', completion); print('err', completion, file=sys.stderr)\n"
        "    logging.warning('logged %s', completion)\n"
        "    raise ValueError(f'raised {completion}')\n"
    )
    judged("telling.py:score", ["\x1b]52;c;ZXZpbA==\x07 \u202eturned\udc80"])
    log = (folder / "verifier.log").read_text()
    for word in ("out", "err", "logged", "raised"):
        assert rf"{word} \u001b]52;c;ZXZpbA==\u0007 \u202eturned" in log
    assert not set(log + caplog.text) & {"\x1b", "\x07", "\u202e", "\udc80"}
    assert r"raised \u001b]52;c" in caplog.text


@pytest.fixture
def judged(folder: Path):
    judges = []

    def judge(function, completions, *, problem=TEXT, pool=None, tokens=None, ids=None, more=(), **keys):
        written = {"type": "python", "function": f"{folder}/{function}", **keys}
        configs = [CONFIG.validate_python(one) for one in (written, *more)]
        config = VerifierPoolConfig(**{"timeout": 5.0, **(pool or {})})
        judges.append(build_judge(configs, config, folder / "verifier.log"))
        return judges[-1].judge([problem] * len(completions), completions, tokens, ids)

    yield judge
    for one in judges:
        one.close()


def found(judgements):
    return [(j.status.value, j.reward) for j in judgements]


def test_one_completion_at_a_time(judged) -> None:
    assert found(judged("rewards.py:right", ["5", "6"])) == [("correct", 1.0), ("wrong", 0.0)]
    graded = judged("rewards.py:graded", ["x"], options={"scale": 2.0}, pool=HERE)
    assert found(graded) == [("wrong", 0.4)]  # a column, an option
    assert found(judged("rewards.py:graded", ["x"], threshold=0.2, pool=HERE)) == [("correct", 0.2)]
    assert found(judged("rewards.py:everything", ["x"], tokens=[7], pool=HERE)) == [("correct", 0.7)]
    assert found(judged("rewards.py:numpy_number", ["x"])) == [("correct", 0.75)]
    assert found(judged("rewards.py:verdict", ["x"])) == [("no_answer", 0.0)]
    assert found(judged("rewards.py:sometimes", ["skip", "x"])) == [("skipped", None), ("correct", 1.0)]


def test_an_instance_is_made_once_per_worker(judged) -> None:
    counted = judged("rewards.py:Counter", ["a", "b", "c"], options={"start": 10}, pool={"workers": 1})
    assert [j.reward for j in counted] == [11.0, 12.0, 13.0]
    assert found(judged("rewards.py:Asks", ["abc"])) == [("correct", 3.0)]


@pytest.mark.parametrize("workers", [0, 1])
def test_awaited_completions_share_their_time_and_not_their_fate(judged, workers: int) -> None:
    started = time.monotonic()
    texts = ["a"] * 40 + (["raise", "hang"] if workers else ["raise"])
    statuses = [
        j.status.value for j in judged("rewards.py:slow_service", texts, pool={"timeout": 2.0, "workers": workers})
    ]
    assert statuses == ["correct"] * 40 + (["crash", "timeout"] if workers else ["crash"])
    assert time.monotonic() - started < 60  # 40 times 600 would be hours


def test_all_completions_of_a_prompt_at_once(judged) -> None:
    assert found(judged("rewards.py:batch", ["5", "6", "5"])) == [("correct", 1.0), ("wrong", 0.0), ("correct", 1.0)]
    assert found(judged("rewards.py:batch_service", ["abc", "", "a"])) == [
        ("correct", 3.0),
        ("wrong", 0.0),
        ("correct", 1.0),
    ]
    assert found(judged("rewards.py:batch_obey", ["skip", "a"], pool=HERE)) == [("skipped", None), ("correct", 1.0)]


def test_a_shaping_function_that_skips_adds_nothing(judged) -> None:
    exact = {"type": "exact"}
    both = judged("rewards.py:sometimes", ["skip", "5"], outcome=False, weight=0.5, more=[exact])
    assert found(both) == [("wrong", 0.0), ("correct", 1.5)]


HOSTILE = {
    "raise": "crash",
    "hang": "timeout",
    "busy": "timeout",
    "memory": "crash",
    "print": "correct",
    "nan": "crash",
    "text": "crash",
    "list": "crash",
    "fork": "correct",
    "exit": "crash",
    "quit": "crash",
}


def test_what_misbehaves_harms_no_other(judged, folder, capfd, caplog) -> None:
    texts = [text for order in HOSTILE for text in ("fine", order)] + ["fine"]
    with caplog.at_level(logging.WARNING):
        verdicts = judged("rewards.py:obey", texts, pool={"timeout": 6.0, "memory_mb": 256, "workers": 2})
    assert [j.status.value for j in verdicts] == [s for status in HOSTILE.values() for s in ("correct", status)] + [
        "correct"
    ]
    details = {text: next(iter(j.verdicts.values())).detail for text, j in zip(texts, verdicts, strict=True)}
    assert "ValueError: no number in it (rewards.py, line 45)" in details["raise"]
    assert "returned nan" in details["nan"] and "returned str" in details["text"] and "MemoryError" in details["memory"]
    log = (folder / "verifier.log").read_text()
    assert "xxxx" in log and "straight to the descriptor" in log and "no number in it" in log
    out, err = capfd.readouterr()
    assert "xxx" not in out + err and "Traceback" not in out
    (warning,) = [record.getMessage() for record in caplog.records]  # the first one only
    assert "rewards.py" in warning and "line" in warning and "verifier.log" in warning


def test_a_batch_that_misbehaves_is_lost_as_a_whole_and_no_other(judged) -> None:
    pool = {"timeout": 1.0, "workers": 2}
    for order, status in (("raise", "crash"), ("hang", "timeout"), ("short", "crash")):
        assert [j.status.value for j in judged("rewards.py:batch_obey", ["a", order, "b"], pool=pool)] == [status] * 3
    assert [j.status.value for j in judged("rewards.py:batch_obey", ["a", "nan"], pool=pool)] == ["correct", "crash"]


@pytest.mark.parametrize(
    ("function", "problem", "texts", "rewards"),
    [
        ("format_reward_func", CHAT, ["<think>a</think><answer>5</answer>", "5"], [1.0, 0.0]),
        ("boxed_answer", TEXT, [r"so \boxed{5}", "5"], [1.0, 0.0]),
        ("math_only", TEXT, ["5", "6"], [1.0, -1.0]),
        ("math_only", Problem("q", "?", None, {"task": "code"}), ["5"], [None]),
        ("correctness_reward", CHAT, ["<answer>5</answer>", "5 or 6"], [2.0, 0.0]),
        ("count_tags", CHAT, ["<think>a</think><answer>5</answer>", "<think>"], [1.0, 0.25]),
        ("behind_hashes", TEXT, ["#### 5", "#### 6"], [1.0, 0.0]),
    ],
)
def test_functions_written_for_trl_run_unchanged(judged, function, problem, texts, rewards) -> None:
    assert [j.reward for j in judged(f"trl_style.py:{function}", texts, problem=problem, pool=HERE)] == rewards


NUMBERS = Problem("n", "reach 10 with 2, 3, 5", "10", {"target": 10, "nums": [2, 3, 5]})
SOLUTION = Problem("s", ({"role": "user", "content": "2+3?"},), "5", {"solution": "$5$"})


@pytest.mark.parametrize(
    ("function", "problem", "texts", "rewards"),
    [
        # Four tags at 0.125, and 0.001 off twice for each character behind the last one.
        ("tidy_tags", CHAT, ["<reasoning>\na\n</reasoning>\n<answer>\n5\n</answer>\n", "5"], [0.5, 0.0]),
        ("tidy_tags", CHAT, ["<reasoning>\na\n</reasoning>\n<answer>\n5\n</answer>\nabc"], [0.5 - 0.003 - 0.003]),
        ("equation", NUMBERS, ["a</think><answer>2+3+5</answer>", "<answer>2*5</answer>", "<answer>2*3</answer>", "10"],
         [1.0, 0.0, 0.0, 0.0]),
        ("equation", NUMBERS, ["<answer>2/(3-3)+5</answer>", "<answer>(2*5*3)/3</answer>"], [0.0, 0.0]),
        # Half of the longest length: cos(pi / 2) = 0 is the middle of the right range and of the wrong one.
        ("cosine", SOLUTION, ["the answer is then $5$", "the answer is then $6$"], [
            0.5 + 0.25 * (1 + math.cos(22 / 40 * math.pi)), -0.5 - 0.25 * (1 + math.cos(22 / 40 * math.pi))]),
    ],
)  # fmt: skip
def test_reward_files_that_many_copy_run_unchanged(
    judged, folder, monkeypatch, capfd, function, problem, texts, rewards
):
    monkeypatch.chdir(folder)
    found = [j.reward for j in judged(f"published.py:{function}", texts, problem=problem)]
    assert found == pytest.approx(rewards, abs=1e-12)
    assert "Response" not in "".join(capfd.readouterr())


def test_the_alarm_of_a_library_does_not_stop_the_clock(judged) -> None:
    found = judged("published.py:stuck_after_math_verify", ["5"], problem=SOLUTION, pool={"timeout": 3.0})
    assert [j.status.value for j in found] == ["timeout"]


def test_functions_written_for_trl_may_read_tokens_and_log(judged, folder) -> None:
    ids = [[7, 9], [1, 2, 3]]
    for function, rewards in (("longer_is_better", [2.0, 3.0]), ("ends_at_length", [1.0, 0.0])):
        found = judged(f"trl_style.py:{function}", ["so 5", "so 6"], ids=ids)
        assert [j.reward for j in found] == rewards
    assert "accuracy: 0.5" in (log := (folder / "verifier.log").read_text()) and "golden: ['5', '5']" in log
    assert [j.reward for j in judged("trl_style.py:only_ids", ["a", "b"], ids=ids)] == [1.6, 0.6]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("accuracy_rewards", "accuracy_reward"),
        ("accuracy_rewards", "reasoning_accuracy_reward"),
        ("format_rewards", "think_format_reward"),
    ],
)
def test_functions_that_trl_comes_with_say_here_what_they_say_there(module, name, folder) -> None:
    texts = [r"<think>a\nb</think>\boxed{5}", r"\boxed{4} </think> so \boxed{5}", r"\boxed{6}", "5", ""]
    gold = SOLUTION.meta["solution"]
    theirs = getattr(importlib.import_module(f"trl.rewards.{module}"), name)(
        [[{"role": "assistant", "content": text}] for text in texts], solution=[gold] * len(texts)
    )
    written = CONFIG.validate_python({"type": "python", "function": f"trl.rewards.{module}:{name}"})
    judge = build_judge([written], VerifierPoolConfig(timeout=30.0, workers=0), folder / "log")
    try:
        ours = [judgement.reward for judgement in judge.judge([SOLUTION] * len(texts), texts)]
    finally:
        judge.close()
    assert ours == theirs and len(set(ours)) == 2


class _File(Section):
    verifier: list[AnyVerifier]


def errors_of(function, folder, monkeypatch, **keys):
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError) as caught:
        parse_config({"verifier": [{"type": "python", "function": function, **keys}]}, _File)
    return str(caught.value)


def test_mistakes_are_found_before_anything_runs(folder, monkeypatch) -> None:
    (folder / "broken.py").write_text("def score(completion:\n")
    (folder / "explodes.py").write_text("raise SystemExit('it ran')\ndef score(completion): return 1\n")
    assert "did you mean 'right'" in errors_of("rewards.py:rigth", folder, monkeypatch)
    assert "did you mean 'rewards.py'" in errors_of("reward.py:right", folder, monkeypatch)
    assert "line 1" in errors_of("broken.py:score", folder, monkeypatch)
    assert "no module 'no_such_package'" in errors_of("no_such_package:score", folder, monkeypatch)
    assert "not of the form" in errors_of("rewards.py", folder, monkeypatch)
    parse_config({"verifier": [{"type": "python", "function": "explodes.py:score"}]}, _File)  # reads, does not run


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        ("rewards.py:text_only", {}, "neither `completion` nor `completions`"),
        ("rewards.py:right", {"strict": True}, "no parameter for the option 'strict'"),
        ("rewards.py:wants", {}, "'solution', which is no column"),
        ("rewards.py:NOT_A_FUNCTION", {}, "no function"),
        ("rewards.py:Counter", {}, "missing 1 required positional argument: 'start'"),
        ("missing_import.py:score", {}, "No module named 'nowhere_to_be_found' (missing_import.py, line 1)"),
    ],
)
def test_mistakes_are_found_before_the_first_completion(folder, function, options, said) -> None:
    (folder / "missing_import.py").write_text("import nowhere_to_be_found\ndef score(completion): return 1\n")
    written = {"type": "python", "function": f"{folder}/{function}", "options": options}
    judge = build_judge([CONFIG.validate_python(written)], VerifierPoolConfig(), folder / "log")
    try:
        with pytest.raises(VerifierError) as caught:
            judge.start([TEXT])
        assert said in str(caught.value) and function in str(caught.value)
    finally:
        judge.close()


def test_references_are_not_tried_on_the_users_code(folder) -> None:
    """It may cost money, or count its calls."""
    written = {"type": "python", "function": f"{folder}/rewards.py:obey"}
    judge = build_judge([CONFIG.validate_python(written)], VerifierPoolConfig(), folder / "log")
    check_references(judge, [TEXT])
    assert not judge.pool._workers


def test_files_are_taken_from_the_recipe_then_from_here(folder, tmp_path_factory, monkeypatch) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "rewards.py").write_text("def right(completion): return 1\n")
    (here / "only_here.py").write_text("from rewards import *\ndef score(completion): return 1\n")
    monkeypatch.chdir(here)
    assert find("rewards.py:right", folder).file == folder / "rewards.py"
    assert find("only_here.py:score", folder).file == here / "only_here.py"


def test_the_hash_is_that_of_source_and_name(folder) -> None:
    def hash_of(name):
        return list(
            digests([CONFIG.validate_python({"type": "python", "function": f"{folder}/rewards.py:{name}"})]).values()
        )

    before = hash_of("right")
    assert before != hash_of("graded")
    (folder / "rewards.py").write_text(textwrap.dedent(REWARDS) + "\n# changed\n")
    assert before != hash_of("right")
