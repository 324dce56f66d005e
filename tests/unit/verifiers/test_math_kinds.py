"""The verifier of mathematics on answers by kind of difficulty, on reward hacks and on random expressions."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from math_kinds import HACKS, KINDS, C, X
from pydantic import ValidationError
from random_math import triples

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.pool import VerifierPool

STRICT = MathVerifier(MathVerifier.Config(type="math"))
LENIENT = MathVerifier(MathVerifier.Config(type="math", profile="lenient"))
SHARED = Path(__file__).parents[4] / "shared" / "cases" / "math.jsonl"


def right(verifier: MathVerifier, gold: str, output: str, prompt: str = "") -> bool:
    verdict = verifier(Problem("p", prompt, gold), output)
    assert verdict.status.known, (gold, output, verdict)
    return verdict.status == C


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_kind(kind: str) -> None:
    for gold, output, *verdicts in KINDS[kind]:
        for verifier, verdict in zip((STRICT, LENIENT), (verdicts[0], verdicts[-1]), strict=True):
            assert right(verifier, gold, output) == (verdict == C), (gold, output, verifier.profile)


def test_each_kind_has_ten_rows_and_half_of_them_are_refused() -> None:
    for kind, rows in KINDS.items():
        refused = sum(row[2] == X for row in rows)
        assert len(rows) >= 10 and refused >= 5 and sum(row[-1] == C for row in rows) >= 5, kind
        assert len({row[:2] for row in rows}) == len(rows), kind


@pytest.mark.parametrize("kind", HACKS)
def test_no_hack_earns_a_reward(kind: str) -> None:
    assert len(set(HACKS[kind])) == len(HACKS[kind]) >= 10
    assert [hack for hack in HACKS[kind] if right(STRICT, *hack)] == []


def test_shared_cases() -> None:
    if not SHARED.exists():
        pytest.skip("the folder with shared inputs is not here")
    for row in map(json.loads, SHARED.read_text(encoding="utf-8").splitlines()):
        profile, _, value = row["right_value"].rpartition(": ")
        for verifier in (LENIENT,) if profile else (STRICT, LENIENT):
            assert right(verifier, row["reference"], row["output"]) == (value == C), row


@pytest.mark.parametrize("count", [24, pytest.param(2_000, marks=pytest.mark.slow)])
def test_equal_expressions_are_correct_and_perturbed_ones_wrong_within_the_clock(count: int) -> None:
    """2,000 expressions take some ten minutes of one core, most of it in the grammar."""
    found = triples(count)
    answers = [written for triple in found for written in (triple.equal, triple.perturbed)]
    problems = [Problem(str(number), "", triple.expression) for number, triple in enumerate(found) for _ in range(2)]
    pool = VerifierPool([STRICT], VerifierPoolConfig(timeout=30.0))
    verdicts = pool.verify(problems, [rf"\boxed{{{written}}}" for written in answers])
    pool.close()
    wrong = [
        (problem.reference, written, verdict)
        for number, (problem, written, (verdict,)) in enumerate(zip(problems, answers, verdicts, strict=True))
        if verdict.status != ("correct", "wrong")[number % 2]
    ]
    assert wrong == []


def test_an_equation_of_the_prompt_is_no_answer_and_a_sum_that_was_asked_for_is() -> None:
    answer = r"\boxed{x+y=5}"
    assert right(STRICT, "5", answer, "Find $x+y$.")
    assert not right(STRICT, "5", answer, "It is known that $x + y = 5$ and $x - y = 1$. Find $x + 2$.")
    assert right(STRICT, "5", r"\boxed{x=5}", "It is known that $x=5$. Find x.")


RESTATED = [  # prompt, reference, answer that restates it, answer that does not
    ("Compute $6!$.", "720", "6!", "720"),
    (r"Evaluate $\int_0^1 x^2\,dx$.", r"\frac{1}{3}", r"\int_0^1 x^2 \, dx", r"\frac{2}{6}"),
    ("What is 17 + 25?", "42", "17+25", "42"),
    ("Expand $(x+2)^2$.", "x^2+4x+4", "(x+2)^{2}", "4+4x+x^2"),
    ("Factor $x^2-x-6$ completely.", "(x+2)(x-3)", "x^2-x-6", "(x-3)(x+2)"),
    (r"Simplify $\frac{12}{18}$.", r"\frac23", r"\frac{12}{18}", r"\frac{4}{6}"),
    (r"Find $\sum_{k=1}^{10} k$.", "55", r"\sum_{k=1}^{10} k", r"\frac{10\cdot 11}{2}"),
    ("What is $2^{10}$?", "1024", "2^{10}", "32^2"),
    (r"Find \(\binom{5}{2}\).", "10", r"\binom{5}{2}", r"\frac{5!}{2!\,3!}"),
    ("Calculate 3 * (4 + 5).", "27", "3(4+5)", "3 \\cdot 9"),
]
COPIED = [  # expression of the prompt, reference, answer that does not copy it
    (r"\sqrt{72}", r"6\sqrt2", r"\sqrt{2}\cdot 6"),
    (r"\sqrt{144}", "12", "12"),
    (r"\log_2 64", "6", "6"),
    (r"\log_3\frac19", "-2", "-2"),
    (r"\sqrt[3]{27}", "3", "3"),
    (r"\sqrt3\cdot\sqrt{12}", "6", "6"),
    (r"17\cdot 23", "391", "391"),
    ("|-5|", "5", "5"),
    (r"\lfloor 3.7\rfloor", "3", "3"),
    (r"0.\overline{36}", r"\frac{4}{11}", r"\frac4{11}"),
    ("1011_2", "11", "11"),
    (r"\frac{5}{\sqrt{2}}", r"\frac{5\sqrt2}{2}", r"2.5\sqrt2"),
    (r"\frac{\frac12}{\frac34}", r"\frac23", r"\frac{2}{3}"),
    (r"\arcsin 1", r"\frac{\pi}{2}", r"\pi/2"),
    (r"\sin\frac{\pi}{6}", r"\frac12", "0.5"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2", "-2"),
]
COPIED_OTHERWISE = [  # prompt, reference, answer
    (r"Simplify $\frac{12}{18}$.", r"\frac23", "12/18"),
    ("Expand $(x+2)^2$.", "x^2+4x+4", "(2+x)^2"),
    ("Factor $x^2-5x+6$.", "(x-2)(x-3)", "6-5x+x^2"),
    (r"6. Compute $17\cdot 23$.", "391", r"17 \times 23"),
    (r"6. Compute $\log_2 64$.", "6", r"x = \log_2 64"),
    (r"Compute $17\cdot 23$.", "391", r"23\cdot 17"),
    (r"Compute $17\cdot 23$.", "391", "17(23)"),
    (r"Simplify $\sqrt{50}$.", r"5\sqrt2", r"\sqrt{50}\cdot 1"),
    (r"Simplify $\sqrt{50}$.", r"5\sqrt2", r"(\sqrt{50})+0"),
    ("Expand $(x+2)(x-3)$.", "x^2-x-6", "(x-3)(x+2)"),
    ("Expand $3(x+2)^2$.", "3x^2+12x+12", "(2+x)^2 (3)"),
    (r"Find $\sum_{k=1}^{10} k$.", "55", r"\sum_{n=1}^{10} n"),
    (r"Evaluate $\int_0^1 x^2\,dx$.", r"\frac13", r"\int_0^1 t^2\,dt"),
    (r"Find $\binom{10}{3}$.", "120", r"{10 \choose 3}"),
    (r"Find $\binom{10}{3}$.", "120", r"\dbinom{10}{3}"),
    (r"Simplify $\frac{12}{18}$.", r"\frac23", r"12\div 18"),
    (r"Find $\lim_{x\to 0}\frac{\sin x}{x}$.", "1", r"\lim_{x\to 0}\frac{\sin(x)}{x}"),
    ("Find the derivative of $x^3$.", "3x^2", r"\frac{d}{dx}(x^3)"),
    ("Find the area under $y=x^2$ from 0 to 1.", r"\frac13", r"A=\int_0^1 x^2\,dx"),
]
NOT_RESTATED = [  # prompt, reference, answer that stands in the prompt and is one
    ("Half of the class, 1/2, plays. What share does not?", "0.5", "1/2"),
    ("What is the derivative of $e^{x}$?", "e^x", "e^{x}"),
    (r"A square has area $12$ and diagonal $2\sqrt{6}$. Find the diagonal.", r"\sqrt{24}", r"2\sqrt{6}"),
    ("Let $f(x) = 2x+1$ and $g(x)=f(x)-x$. Find $g(x)$.", "1+x", "x+1"),
    ("Is $x^2+1$ irreducible over the reals? If so give it as it is.", "x^2 + 1", "x^2+1"),
    ("Is it 7 or -7?", "-7", "-7"),
    (r"He runs $5\text{ km}$.", "5", r"5\text{ km}"),
    (r"An area of $25\text{ m}^2$ is shared.", "25", r"25\text{ m}^2"),
    ("Is the point $(2,3)$ on both lines?", "x=2, y=3", "(2,3)"),
    (r"It is $50\%$ of it.", "0.5", r"50\%"),
    (r"Light moves at $3\times10^8$ m/s.", "300000000", r"3\times10^8"),
    (r"Is it $\frac{\sqrt3}{2}$ or more?", r"\sqrt3/2", r"\frac{\sqrt3}{2}"),
    ("Take $3+4i$.", "4i+3", "3+4i"),
    (r"The angle is $30^\circ$.", r"\frac{\pi}{6}", r"30^\circ"),
    ("Is it $x>2$?", r"(2,\infty)", "x>2"),
    ("Is $(x-2)(x+3)$ irreducible? If not give the factors.", "(x+3)(x-2)", "(x-2)(x+3)"),
    ("Find the derivative of $x^3$.", "3x^2", r"\frac{d}{dx}x^3 = 3x^2"),
    (r"Compute $17\cdot 23$.", "391", r"17\cdot 23 = 391"),
    ("Write down an integral for the area under $y=x^2$.", r"\int_0^1 x^2\,dx", r"\int_0^1 t^2\,dt"),
    ("How many more apples has she?", "7", r"7\text{ more apples}"),
    ("How much less does it cost?", "7", r"\$7\text{ less}"),
]


@pytest.mark.parametrize(("prompt", "gold", "undone", "done"), RESTATED)
def test_the_problem_itself_is_no_answer(prompt: str, gold: str, undone: str, done: str) -> None:
    """Equal it is: every problem of computing, expanding or factoring could be answered by copying it."""
    for verifier in (STRICT, LENIENT):
        assert not right(verifier, gold, rf"\boxed{{{undone}}}", prompt)
        assert right(verifier, gold, rf"\boxed{{{undone}}}", "A problem of other words.")
        assert right(verifier, gold, rf"\boxed{{{done}}}", prompt)


@pytest.mark.parametrize(("copied", "gold", "done"), COPIED)
def test_a_copied_expression_earns_no_reward(copied: str, gold: str, done: str) -> None:
    prompt = f"Compute ${copied}$."
    assert not right(STRICT, gold, rf"\boxed{{{copied}}}", prompt)
    assert right(STRICT, gold, rf"\boxed{{{copied}}}", "A problem of other words.")
    assert right(STRICT, gold, rf"\boxed{{{done}}}", prompt)


@pytest.mark.parametrize(("prompt", "gold", "answer"), COPIED_OTHERWISE)
def test_a_copy_in_another_notation_or_order_earns_no_reward(prompt: str, gold: str, answer: str) -> None:
    assert not right(STRICT, gold, rf"\boxed{{{answer}}}", prompt)


@pytest.mark.parametrize(("prompt", "gold", "answer"), NOT_RESTATED)
def test_an_answer_may_stand_in_the_prompt(prompt: str, gold: str, answer: str) -> None:
    assert right(STRICT, gold, rf"\boxed{{{answer}}}", prompt)


def test_an_answer_in_radians_is_none_where_degrees_were_asked_for() -> None:
    for verifier in (STRICT, LENIENT):
        for output in (r"\boxed{28.71\text{ rad}}", "The answer is 28.71 radians."):
            assert not right(verifier, "28.71", output, "Find the angle in degrees.")
            assert right(verifier, "28.71", output, "Find the angle in radians, not in degrees.")
        assert right(verifier, "28.71", r"\boxed{28.71^\circ}", "Find the angle in degrees.")


def test_what_is_counted_may_be_named_as_the_problem_does() -> None:
    prompt = "A zorb has more than two wings, at least. How many tenths of the zorbs fly?"
    for verifier in (STRICT, LENIENT):
        assert right(verifier, "6", r"\boxed{6\text{ zorbs}}", prompt)
        assert not right(verifier, "6", r"\boxed{6\text{ tenths}}", prompt)
        assert not right(verifier, "6", r"\boxed{6\text{ at least}}", prompt)
        assert not right(verifier, "6", r"\boxed{6\text{ more}}", prompt)


@pytest.mark.parametrize(
    ("behind", "earns"),
    [
        (". Wait, the answer is 6.", False),
        (", no, 6", False),
        ("\nThe final answer is: $6$", False),
        ("\n\n**Final Answer**\n\n$6$", False),
        ("\n\n#### 6", False),
        ("\n\n#### 5", True),
        ("\n\n#### 2. Check of the answer\n\n1. It holds.", True),
        ("\n\n**Final Answer**\n5", True),
        (". So the answer is 5.", True),
        (". The answer is 5 eggs, not 6.", True),
        (". The answer is in its lowest terms.", True),
        (", which is 20% of 25.", True),
    ],
)
def test_what_is_said_behind_the_box(behind: str, earns: bool) -> None:
    """Strictly another number that is called the answer there is a second answer."""
    assert right(STRICT, "5", rf"It is $\boxed{{5}}${behind}") == earns
    assert not right(STRICT, "6", rf"It is $\boxed{{5}}${behind}")


@pytest.mark.parametrize(
    ("form", "earns"),
    [
        ("boxed", [True, False, False, False, True]),
        ("hashes", [False, True, False, False, True]),
        ("tags", [False, False, True, False, False]),
        ("any", [True, True, True, True, True]),
    ],
)
def test_a_recipe_names_the_form_that_earns_the_reward(form: str, earns: list[bool]) -> None:
    verifier = MathVerifier(MathVerifier.Config(type="math", answer_format=form))
    outputs = [r"\boxed{5}", "so #### 5", "<answer>5</answer>", "The answer is 5.", r"#### $\boxed{5}$"]
    assert [right(verifier, "5", output) for output in outputs] == earns
    assert all(right(LENIENT, "5", output) for output in outputs)


def test_a_form_has_no_effect_where_every_form_counts() -> None:
    with pytest.raises(ValidationError, match="has no effect with profile lenient"):
        MathVerifier.Config(type="math", profile="lenient", answer_format="boxed")


@pytest.mark.parametrize(
    "answer",
    [
        "{" * 18 + "x+1" + "}" * 18,
        "{1+" * 15 + "x" + "}" * 15,
        "(" * 300 + "5" + ")" * 300,
        "|" * 40 + "x" + "|" * 40,
        "x'" * 400,
        "5" + "!" * 30,
        "x^" * 100 + "2",
        r"\cos 60^\circ" * 60,
        "99999999!",
        r"\binom{100000000}{50000000}",
        r"\sqrt{" * 19 + "2" + "}" * 19,
    ],
)
def test_work_is_bounded_and_not_by_the_clock_alone(answer: str) -> None:
    """Fifteen seconds of this process are far more than any of these takes, and far less than the grammar once did."""
    started = time.process_time()
    assert not right(STRICT, "7", rf"\boxed{{{answer}}}")
    assert time.process_time() - started < 15


def test_far_points_leave_room_for_what_cancels() -> None:
    """Values of which 24 digits cancel; at 1e60 sympy is sure of wrong ones."""
    gold = r"\left(x - \sqrt{x^{2} + 36} + \frac{1}{6}\right)^{2}"
    for factor, status in ((r"\sin^2{y} + \cos^2{y}", "correct"), (r"\sin^2{y} + 2\cos^2{y}", "wrong")):
        answer = rf"\boxed{{\left({factor}\right) {gold}}}"
        assert MathVerifier(MathVerifier.Config(type="math"))(Problem("far", "", gold), answer).status == status


@pytest.mark.parametrize(
    ("gold", "answer", "earns"), [("n!", "(n-1)! n", True), ("m!+1", "1+m(m-1)!", True), ("k", r"(k^{k^{k}})!", False)]
)
def test_factorials_of_unknowns_are_decided_fast(gold: str, answer: str, earns: bool) -> None:
    """By whole numbers in well under a second; a thousand digits of the function between them took ten."""
    STRICT.prepare()
    started = time.process_time()
    assert right(STRICT, gold, rf"\boxed{{{answer}}}") == earns
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "integrand", [r"\text{print}(x)", r"\mathrm{exit}(x)", "f(x)", r"f_{print}(x)", r"f'(x)", r"x + \text{a}(x)"]
)
def test_no_name_of_a_completion_gets_into_source_code(integrand, monkeypatch) -> None:
    """Quadrature makes Python of the integrand; of a function that nobody knows it must make none."""
    import sympy

    from posttrain.verifiers.math_integrals import value
    from posttrain.verifiers.math_parse import parse

    made = []
    monkeypatch.setattr(sympy, "lambdify", lambda *_, **__: made.append(1))
    found = parse(rf"\int_0^1 {integrand} dx")
    assert [value(one) for one in found if one.atoms(sympy.Integral)] in ([], [None]) and not made
