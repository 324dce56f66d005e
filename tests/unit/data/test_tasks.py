"""Procedural tasks: formats, checkers, annotators, splits."""

from __future__ import annotations

import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from posttrain.config.schema import TaskSource, WeakAnnotator
from posttrain.data.pictures import known, marks_of
from posttrain.data.sample import Problem
from posttrain.data.tasks import TASKS, generate_examples, generate_problems, split_of
from posttrain.data.tasks.base import unsure_facts
from posttrain.errors import DataError
from posttrain.verifiers.procedural import ProceduralVerifier

SUM = Problem("s", "3+8+5=", "16", {"task": "chain_sum", "level": 3, "terms": [3, 8, 5], "target": 16})
COUNTDOWN = Problem("c", "8 3 25:49=", "49", {"task": "countdown", "level": 3, "numbers": [8, 3, 25], "target": 49})
CHAIN = Problem(
    "v",
    "b=a+7;a=3;c=b+1;b?",
    "0",
    {
        "task": "variable_chain",
        "level": 2,
        "chain": ["a", "b"],
        "definitions": {"a": [None, 3], "b": ["a", 7], "c": ["b", 1]},
        "target": 0,
    },
)
DIGITS = Problem("g", "", "16", {"task": "digit_sum", "level": 3, "terms": [3, 8, 5], "target": 16})
MAZE = Problem(  # a1 is open below, a2 to its right and b1 below: the way is around
    "m",
    "",
    "3",
    {"task": "maze", "level": 2, "open": [[2, 2], [1, 0]], "ends": [[0, 0], [1, 0]], "target": 3},
)
DOTS = Problem("d", "", "16", {"task": "dot_sum", "level": 3, "terms": [3, 8, 5], "target": 16})

# (problem, completion, strict status, lenient status); the first row of each task is the format of the design page.
CHECKS = [
    (SUM, "3+8=11;11+5=16;#16", "correct", "correct"),
    (SUM, " 3+8=11;11+5=16;#16\n", "correct", "correct"),
    (SUM, "8+5=13;3+13=16;#16", "correct", "correct"),  # any order
    (SUM, "3+8=12;12+5=16;#16", "wrong", "correct"),  # two wrong steps, right answer
    (SUM, "3+8=11;11+5=17;#16", "wrong", "correct"),
    (SUM, "3+8=11;#16", "wrong", "correct"),  # a term left over
    (SUM, "#16", "wrong", "correct"),
    (SUM, "8+8=16;#16", "wrong", "correct"),  # 8 is there once
    (SUM, "11+5=16;#16", "wrong", "correct"),  # 11 is not there yet
    (SUM, "3+8=11;11+5=16;16+0=16;#16", "wrong", "correct"),
    (SUM, "3+8=11;11+5=16;#17", "wrong", "wrong"),
    (SUM, "3*5=15;15+8=23;#16", "unparseable", "correct"),  # no such operator here
    (SUM, "3+8=11;11+5=16;#16 and so on", "unparseable", "correct"),
    (SUM, "3+8=11 ; 11+5=16;#16", "unparseable", "correct"),
    (SUM, "03+8=11;11+5=16;#16", "unparseable", "correct"),
    (SUM, "3+8=11;11+5=16;#16#16", "unparseable", "correct"),
    (SUM, "3+8=11;11+5=16;#", "unparseable", "unparseable"),
    (SUM, "3+8=11;11+5=16", "no_answer", "no_answer"),
    (SUM, "", "no_answer", "no_answer"),
    (SUM, "3+8=11;11+5=16;#16x", "unparseable", "unparseable"),
    (SUM, "3+8=11;11+5=16;#" + "1" * 10_000, "unparseable", "unparseable"),
    (SUM, "\u0663+8=11;11+5=16;#\u0661\u0666", "unparseable", "unparseable"),  # Arabic digits
    (COUNTDOWN, "8*3=24;24+25=49;#49", "correct", "correct"),
    (COUNTDOWN, "8+3=11;11+25=36|8*3=24;24+25=49;#49", "correct", "correct"),  # an attempt that failed
    (COUNTDOWN, "8+3=11;11+25=36;#36", "wrong", "wrong"),  # gave up
    (COUNTDOWN, "8+3=11;11+25=36;#49", "wrong", "correct"),  # claims the target
    (COUNTDOWN, "8*3=24;24+25=49;#49|8+3=11;11+25=36;#36", "wrong", "wrong"),  # the last attempt counts
    (COUNTDOWN, "8*3=24;25+24=49;#49", "correct", "correct"),
    (COUNTDOWN, "49-0=49;#49", "wrong", "correct"),
    (COUNTDOWN, "3-8=-5;#49", "unparseable", "correct"),  # negative numbers are outside the game
    (COUNTDOWN, "8/3=2;2+25=27;#49", "wrong", "correct"),  # not an exact division
    (COUNTDOWN, "8*3=24;24+25=49|", "no_answer", "no_answer"),
    (CHAIN, "a=3;b=3+7=0#0", "correct", "correct"),
    (CHAIN, "a=3;b=3+7=0;c=0+1=1#0", "correct", "correct"),  # a distractor, derived rightly
    (CHAIN, "b=3+7=0;a=3#0", "wrong", "correct"),  # b before what it depends on
    (CHAIN, "a=3;b=3+7=1#0", "wrong", "correct"),
    (CHAIN, "a=3;b=3+7=0#1", "wrong", "wrong"),
    (CHAIN, "a=3;b=4+6=0#0", "wrong", "correct"),  # right sum, wrong definition
    (CHAIN, "a=3;b=0#0", "wrong", "correct"),  # a step left out
    (CHAIN, "a=3#0", "wrong", "correct"),
    (CHAIN, "a=3;a=3;b=3+7=0#0", "wrong", "correct"),
    (CHAIN, "a=3;z=3+7=0#0", "wrong", "correct"),
    (CHAIN, "#0", "unparseable", "correct"),
    (CHAIN, "a=3;b=3+7=10#10", "unparseable", "wrong"),
    (CHAIN, "a=3;b=3+7=0;#0", "unparseable", "correct"),
    (CHAIN, "a=3;b=3+7=0", "no_answer", "no_answer"),
    (DOTS, "3+8+5=;3+8=11;11+5=16;#16", "correct", "correct"),
    (DOTS, "3+8+5=;3+8=12;12+5=17;#17", "wrong", "wrong"),
    (DOTS, "3+8+4=;3+8=11;11+4=15;#15", "wrong", "wrong"),  # seen wrongly, added rightly
    (DOTS, "8+3+5=;3+8=11;11+5=16;#16", "wrong", "correct"),  # another picture
    (DOTS, "3+8=11;11+5=16;#16", "unparseable", "correct"),  # nothing is said to be seen
    (DOTS, "3+8+5=;", "no_answer", "no_answer"),
    (DIGITS, "3+8+5=;3+8=11;11+5=16;#16", "correct", "correct"),
    (DIGITS, "3+9+5=;3+9=12;12+5=17;#17", "wrong", "wrong"),
    (MAZE, "a1>b1,22,10=;a1S1;a2E2;b2N3;#3", "correct", "correct"),
    (MAZE, "a1>b1,22,10=;a1S1;a2E2;b2N3;#4", "wrong", "wrong"),
    (MAZE, "a1>b1,22,10=;a1S1;a2E3;b2N4;#4", "wrong", "wrong"),  # counted wrongly
    (MAZE, "a1>b1,22,10=;a1E1;#1", "wrong", "wrong"),  # through a wall
    (MAZE, "a1>b1,22,10=;a1N1;a2E2;b2N3;#3", "wrong", "correct"),  # out of the picture
    (MAZE, "a1>b1,22,10=;a1S1;a2E2;#3", "wrong", "correct"),  # not there
    (MAZE, "a1>b1,22,10=;a1S1;a2N2;a1S3;a2E4;b2N5;#3", "unparseable", "correct"),  # longer than any way
    (MAZE, "a1>b1,22,10=;a1S1;b2N2;#3", "wrong", "correct"),  # from where it is not
    (MAZE, "a1>b2,22,10=;a1S1;a2E2;#2", "wrong", "wrong"),  # another end is said to be seen
    (MAZE, "a1>b1,32,10=;a1E1;#1", "wrong", "wrong"),  # another maze
    (MAZE, "a1S1;a2E2;b2N3;#3", "unparseable", "correct"),
    (MAZE, "a1>b1,22,10=;", "no_answer", "no_answer"),
]


@pytest.mark.parametrize(("problem", "completion", "strict", "lenient"), CHECKS)
def test_checks(problem: Problem, completion: str, strict: str, lenient: str) -> None:
    task = TASKS[problem.meta["task"]]
    assert task.check_strict(problem, completion).status == strict
    assert task.check_lenient(problem, completion).status == lenient


def test_what_is_seen_wrongly_is_told_from_what_is_added_wrongly() -> None:
    answers = ("3+8+5=;3+8=12;12+5=17;#17", "3+8+4=;3+8=11;11+4=15;#15", "3+8+4=;", "#16", "")
    found = [TASKS["dot_sum"].check_description(DOTS, answer).status.value for answer in answers]
    assert found == ["correct", "wrong", "wrong", "no_answer", "no_answer"]
    assert "3+8+5 is to be seen" in TASKS["dot_sum"].check_strict(DOTS, answers[1]).detail


@pytest.mark.parametrize("name", ["dot_sum", "digit_sum"])
def test_a_miscounting_annotator_describes_what_is_not_there_at_its_rate(name: str) -> None:
    weakness = WeakAnnotator(unsure_share=0.0, miscount_share=0.25, miscount_rate=0.7, fact_seed=3)
    source = TaskSource(task=name, levels=[1, 2], size=3000, annotator="weak", weakness=weakness)
    told: dict[int, list[int]] = {}
    for example in generate_examples(source, "x"):
        terms = example.problem.meta["terms"]
        said = list(map(int, example.completion.partition("=;")[0].split("+")))
        for shown, number in zip(terms, said, strict=True):
            told.setdefault(shown, []).append(number - shown)
        seen = TASKS[name].check_description(example.problem, example.completion).status
        assert (seen == "correct") == (said == terms)
        # It goes on from what it describes, so the answer is right where the description is.
        assert (TASKS[name].check_lenient(example.problem, example.completion).status == "correct") == (said == terms)
    shares = {shown: sum(errors) / len(errors) for shown, errors in told.items()}
    assert all(set(errors) <= {0, 1} for errors in told.values())
    unsure = {shown: share for shown, share in shares.items() if share}
    assert len(unsure) == 2 and 9 not in unsure
    assert all(0.62 < share < 0.78 for share in unsure.values())


def test_a_maze_is_what_its_picture_shows() -> None:
    """Read from the pixels: which cells begin and end, and where there is no wall."""
    source = TaskSource(task="maze", levels=[2, 3, 4, 5, 6], size=50)
    for problem in generate_problems(source, "x"):
        n = problem.meta["level"]
        cell, (digest,) = 31 // n, marks_of([problem.prompt])
        image = known(digest, "").load()
        middle = [[image.getpixel((cell * x + 2, cell * y + 2)) for x in range(n)] for y in range(n)]
        assert [middle[y][x] for x, y in problem.meta["ends"]] == [(0, 255, 0), (255, 0, 0)]
        assert sum(colour != (0, 0, 0) for row in middle for colour in row) == 2
        seen = [
            [
                (image.getpixel((cell * (x + 1), cell * y + 2)) == (0, 0, 0))
                + 2 * (image.getpixel((cell * x + 2, cell * (y + 1))) == (0, 0, 0))
                for x in range(n)
            ]
            for y in range(n)
        ]
        assert seen == problem.meta["open"]
        assert sum(way.bit_count() for row in seen for way in row) == n * n - 1  # one way from each cell to each other


def test_a_weak_walker_ends_elsewhere_or_counts_too_many() -> None:
    def traces(**weakness: float) -> list[tuple[str, ...]]:
        weak = WeakAnnotator(**weakness)
        source = TaskSource(task="maze", levels=[3, 4], size=400, annotator="weak", weakness=weak)
        task = TASKS["maze"]
        checks = task.check_description, task.check_lenient, task.check_strict
        return [tuple(c(e.problem, e.completion).status.value for c in checks) for e in generate_examples(source, "x")]

    assert set(traces(unsure_share=0.0)) == {("correct",) * 3}
    counted = traces(unsure_share=0.5, error_rate=0.7)
    assert set(counted) == {("correct",) * 3, ("correct", "wrong", "wrong")}
    elsewhere = traces(unsure_share=0.0, miscount_share=0.5, miscount_rate=0.7)
    assert set(elsewhere) == {("correct",) * 3, ("wrong",) * 3}  # a way to the cell below is longer or shorter
    assert 0.1 < sum(first == "wrong" for first, _, _ in elsewhere) / 400 < 0.6


def test_digits_are_told_apart_by_their_pixels() -> None:
    rng, shapes = random.Random(0), {}
    for number in range(1, 10):
        for _ in range(20):
            image = Image.new("L", (8, 8))
            TASKS["digit_sum"].draw(image, (0, 0), number, rng)
            shapes.setdefault(number, set()).add(image.crop(image.getbbox()).point(bool).tobytes())
    assert all(len(drawn) == 1 for drawn in shapes.values())
    assert len(set.union(*shapes.values())) == 9


def test_a_task_without_descriptions_has_none_to_check() -> None:
    verifier = ProceduralVerifier(ProceduralVerifier.Config(profile="description"))
    assert verifier(SUM, "3+8=11;11+5=16;#16").status == "bad_reference"
    assert verifier(DOTS, "3+8+5=;#3").status == "correct"


@pytest.mark.parametrize("problem", [SUM, COUNTDOWN, CHAIN])
def test_the_failed_step_is_named(problem: Problem) -> None:
    wrong = {"chain_sum": "3+8=12;12+5=17;#17", "countdown": "8*3=21;21+25=46;#46", "variable_chain": "a=4;b=4+7=1#1"}
    task = problem.meta["task"]
    assert "step 1" in TASKS[task].check_strict(problem, wrong[task]).detail


ANSWERED = sorted(set(TASKS) - {"rooms"})
"""Tasks whose traces are one text that ends with the answer; the traces of the others are conversations."""


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(ANSWERED), seed=st.integers(0, 2**32), data=st.data())
def test_expert_traces_are_right_at_every_level(name: str, seed: int, data: st.DataObject) -> None:
    task = TASKS[name]
    level = data.draw(st.sampled_from(task.levels))
    problem = task.problem(random.Random(seed), level)
    trace = task.expert_trace(problem)
    assert task.check_strict(problem, trace).status == "correct", (problem.prompt, trace)
    assert task.check_lenient(problem, trace).status == "correct"
    assert trace.endswith("#" + problem.reference)
    assert problem.meta["level"] == level and problem.meta["task"] == name


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(ANSWERED), seed=st.integers(0, 2**32), data=st.data())
def test_weak_traces_have_the_format_and_are_right_in_the_answer_only_by_right_steps(name, seed, data) -> None:
    task, rng = TASKS[name], random.Random(seed)
    # Beyond four sums the excesses of a variable chain can add up to ten.
    level = data.draw(st.sampled_from([level for level in task.levels if name != "variable_chain" or level <= 5]))
    problem = task.problem(rng, level)
    trace = task.weak_trace(problem, rng, WeakAnnotator())
    strict, lenient = task.check_strict(problem, trace), task.check_lenient(problem, trace)
    assert strict.status == lenient.status and strict.status in ("correct", "wrong"), (problem.prompt, trace)


@pytest.mark.parametrize("name", ["chain_sum", "variable_chain"])
def test_weak_annotator_errs_on_its_facts_at_its_rate(name: str) -> None:
    weakness = WeakAnnotator(unsure_share=0.4, error_rate=0.7, fact_seed=3)
    facts = unsure_facts(0.4, 3)
    assert len(facts) == 36
    source = TaskSource(task=name, levels=[2], size=6000, annotator="weak", weakness=weakness)
    unsure = wrong = 0
    written: dict[tuple[int, int], set[str]] = {}
    for example in generate_examples(source, "x"):
        meta = example.problem.meta
        if name == "chain_sum":
            fact = tuple(meta["terms"])
        else:
            fact = tuple(meta["definitions"][variable][1] for variable in meta["chain"])
        right = TASKS[name].check_strict(example.problem, example.completion).status == "correct"
        if fact not in facts:
            assert right, (fact, example.completion)
            continue
        unsure += 1
        if not right:
            wrong += 1
            written.setdefault(fact, set()).add(example.completion.rpartition("#")[2])
    assert unsure > 1500
    # Five standard deviations of a binomial share.
    assert abs(wrong / unsure - 0.7) < 5 * (0.7 * 0.3 / unsure) ** 0.5
    assert all(len(results) == 1 for results in written.values())  # one fixed wrong result for each fact


def test_weak_errors_compound_and_are_carried_on() -> None:
    weakness = WeakAnnotator(unsure_share=1.0, error_rate=1.0)
    trace = TASKS["chain_sum"].weak_trace(SUM, random.Random(0), weakness)
    first, second, answer = trace.split(";")
    carried = first.partition("=")[2]
    assert carried in ("12", "13") and second.startswith(f"{carried}+5=")
    assert answer == "#" + second.partition("=")[2] and int(answer[1:]) >= 18


def test_facts_depend_on_their_seed_alone() -> None:
    assert unsure_facts(0.45, 0) == unsure_facts(0.45, 0)
    assert set(unsure_facts(0.45, 0)) != set(unsure_facts(0.45, 1))
    assert len(unsure_facts(1.0, 0)) == 90 and not unsure_facts(0.0, 0)


def test_weak_countdown_gives_up_at_its_rate() -> None:
    def traces(rate: float) -> list[tuple[bool, int]]:
        source = TaskSource(
            task="countdown", levels=[4], size=1500, annotator="weak", weakness=WeakAnnotator(give_up_rate=rate)
        )
        return [
            (TASKS["countdown"].check_strict(e.problem, e.completion).status == "correct", e.completion.count("|"))
            for e in generate_examples(source, "x")
        ]

    always, sometimes, never = traces(1.0), traces(0.5), traces(0.0)
    assert all(failed == 0 for _, failed in always)
    assert all(right for right, _ in never)  # shown the solution in the end
    failures = sum(failed + (not right) for right, failed in sometimes)
    given_up = sum(not right for right, _ in sometimes)
    assert abs(given_up / failures - 0.5) < 5 * 0.5 / failures**0.5
    accuracy = [sum(right for right, _ in group) for group in (always, sometimes, never)]
    assert accuracy[0] < accuracy[1] < accuracy[2]


def test_base_quality_of_the_default_weak_annotator() -> None:
    """The shares that the design page's bases grew from: 1 - 0.45 * 0.8 at level 2, and falling with the level."""
    accuracy = []
    for level in (2, 3, 4, 6):
        source = TaskSource(task="chain_sum", levels=[level], size=2000, annotator="weak")
        examples = generate_examples(source, "x")
        right = sum(TASKS["chain_sum"].check_strict(e.problem, e.completion).score for e in examples)
        accuracy.append(right / len(examples))
    assert accuracy == sorted(accuracy, reverse=True)
    assert 0.5 < accuracy[0] < 0.75 and 0.05 < accuracy[3] < 0.2


@pytest.mark.parametrize("name", sorted(TASKS))
def test_splits_are_disjoint_whatever_the_seeds(name: str) -> None:
    levels = [level for level in (2, 3, 4) if level in TASKS[name].levels]
    prompts = {}
    for split in ("train", "test"):
        prompts[split] = {
            (problem.prompt, problem.meta.get("world"))  # worlds of rooms may look alike at first
            for seed in range(3)
            for problem in generate_problems(
                TaskSource(task=name, levels=levels, size=600, seed=seed, split=split), "x"
            )
        }
    assert prompts["train"] and prompts["test"] and not prompts["train"] & prompts["test"]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_about_a_fifth_of_the_prompts_is_test(name: str) -> None:
    rng = random.Random(0)
    drawn = [split_of(TASKS[name], TASKS[name].problem(rng, 5)) for _ in range(4000)]
    assert abs(drawn.count("test") / 4000 - 0.2) < 5 * (0.2 * 0.8 / 4000) ** 0.5


def test_a_permutation_of_a_countdown_problem_stays_in_its_split() -> None:
    task, rng = TASKS["countdown"], random.Random(1)
    for _ in range(100):
        problem = task.problem(rng, 4)
        shuffled = Problem("", "other text", None, dict(problem.meta, numbers=rng.sample(problem.meta["numbers"], 4)))
        assert split_of(task, problem) == split_of(task, shuffled)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_same_section_gives_the_same_problems_and_a_longer_one_begins_with_them(name: str) -> None:
    section = {"task": name, "levels": {3: 2.0, 4: 1.0}, "annotator": "weak", "seed": 5}
    short = generate_examples(TaskSource(size=40, **section), "x")
    again = generate_examples(TaskSource(size=40, **section), "x")
    longer = generate_examples(TaskSource(size=80, **section), "x")
    other = generate_examples(TaskSource(size=40, **dict(section, seed=6)), "x")
    assert short == again == longer[:40]
    assert [e.problem.prompt for e in short] != [e.problem.prompt for e in other]
    assert pickle.loads(pickle.dumps(short)) == short


def test_identity_and_place() -> None:
    problems = generate_problems(TaskSource(task="chain_sum", levels=[2, 4], size=6), "data.prompts")
    assert [p.id for p in problems] == [f"data.prompts/{i}" for i in range(6)]
    assert [p.meta["level"] for p in problems] == [2, 4, 2, 4, 2, 4]  # in turn
    assert problems[3].where == "chain_sum[train] seed 0 level 4 problem 3"
    assert problems[0].prompt.count("+") == 1 and problems[1].prompt.count("+") == 3


def test_weights_set_the_shares_of_levels() -> None:
    problems = generate_problems(TaskSource(task="chain_sum", levels={2: 3.0, 4: 1.0, 5: 0.0}, size=2000), "x")
    levels = [p.meta["level"] for p in problems]
    assert levels.count(5) == 0 and abs(levels.count(2) / 2000 - 0.75) < 0.05


def test_a_tiny_level_repeats_its_prompts() -> None:
    sizes = {}
    for split in ("train", "test"):
        problems = generate_problems(TaskSource(task="chain_sum", levels=[2], size=1000, split=split), "x")
        sizes[split] = len({p.prompt for p in problems})
        assert len(problems) == 1000
    assert sum(sizes.values()) == 81


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"task": "chain_sum", "levels": [1], "split": "test"}, "no prompt in the test split"),
        ({"task": "chain_sum", "levels": [0]}, "no level 0"),
        ({"task": "countdown", "levels": {1: 1.0}}, "levels 2 to 6 can be made"),
        ({"task": "chain_sum", "levels": []}, "no levels given"),
        ({"task": "chain_sum", "levels": {}}, "cannot be drawn from"),
        ({"task": "chain_sum", "levels": {2: 0.0}}, "cannot be drawn from"),
        ({"task": "chain_sum", "levels": {2: 2.0, 3: -1.0}}, "cannot be drawn from"),
    ],
)
def test_levels_that_cannot_be_made(section: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        generate_problems(TaskSource(size=10, **section), "data.prompts")
    assert caught.value.where == "data.prompts.levels"


def test_weakness_of_the_expert_is_refused() -> None:
    source = TaskSource(task="chain_sum", levels=[2], size=1, weakness=WeakAnnotator())
    with pytest.raises(DataError, match="no effect"):
        generate_examples(source, "x")
