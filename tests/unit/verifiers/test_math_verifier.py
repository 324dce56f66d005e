"""Mathematical equality. Rows come from the data sets named beside them, from what models write, or from the rules."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from posttrain.data.sample import Problem
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.math_answer import TAIL, final_answer
from posttrain.verifiers.math_notation import as_latex

STRICT = MathVerifier(MathVerifier.Config(type="math"))
LENIENT = MathVerifier(MathVerifier.Config(type="math", profile="lenient"))

# (gold, completion, strict status)
WHERE_THE_ANSWER_STANDS = [
    ("5", r"So \boxed{5}", "correct"),
    ("5", r"so \fbox{5}.", "correct"),
    ("5", r"\boxed{ 5 }" + "\n\nLet me know if you need more.", "correct"),
    ("5", r"We get \boxed{6}. Wait, that is wrong. \boxed{5}", "correct"),  # the last counts
    ("5", r"We get \boxed{5}. Wait, that is wrong. \boxed{6}", "wrong"),
    ("5", r"\boxed{6} #### 5", "wrong"),  # a box goes before all else
    ("5", r"\boxed{5} or \boxed{6}", "wrong"),  # hedging
    ("5", r"\boxed{6} or \boxed{5}", "wrong"),
    ("5", r"\boxed{5}\boxed{6}", "wrong"),
    ("5", r"\boxed{5}, \boxed{6}, \boxed{7}", "wrong"),
    ("5", r"\boxed{5} or maybe 6", "wrong"),
    ("5", r"\boxed{5 \text{ or } 6}", "wrong"),
    ("5", r"\boxed{5, 6}", "wrong"),
    ("5", r"\boxed{5}, that is, \boxed{5}.", "correct"),  # the same twice
    ("5", r"\boxed{5} cents, or less if it rains.", "correct"),  # no second value
    ("1,2", r"\boxed{1} and \boxed{2}", "correct"),  # the reference has two
    ("1,2", r"$x=\boxed{1}$ or $x=\boxed{2}$", "correct"),
    ("5", r"\boxed{5", "unparseable"),  # cut off
    ("5", r"First \boxed{5}. Then \boxed{6", "unparseable"),
    ("5", r"\boxed{}", "unparseable"),
    ("5", "It is\n#### 5", "correct"),  # GSM8K
    ("5", "#### 4\n#### 5", "correct"),
    ("5", "####", "no_answer"),
    ("5", "so #### 5", "correct"),
    ("5", "The answer is 5.", "correct"),
    ("5", "**The answer is 5**", "correct"),
    ("5", "Answer: 5", "correct"),
    ("5", "The answer to the question is $5$.", "correct"),
    ("5", "Final Answer: The final answer is $5$. I hope it is correct.", "correct"),  # Minerva's prompt
    ("5", "The answer is 5 or 6", "wrong"),
    ("5", "The answer is $5$ or $6$.", "wrong"),
    ("5", "The answer is 5. Or is it 6?", "no_answer"),
    ("5", "The answer is 5.\nLet me check that again.", "no_answer"),  # not the final statement
    ("5", "5", "no_answer"),
    ("5", "I think it is 5", "no_answer"),
    ("5", "", "no_answer"),
    ("120", "The answer is $5!$", "correct"),  # not the end of the sentence
    ("5", "The answer is 5!", "correct"),
]

FORMS = [
    ("70000", r"\boxed{70,000}", "correct"),
    ("70,000", r"\boxed{70000}", "correct"),
    ("70000", r"\boxed{\$70,000}", "correct"),
    ("70000", "#### $70,000", "correct"),
    ("$70,000", "#### 70000", "correct"),
    ("70000", r"\boxed{70{,}000}", "correct"),
    ("70000", r"\boxed{70\,000}", "correct"),
    ("70000", "#### 70 000", "correct"),
    ("0", r"\boxed{70 000}", "wrong"),  # not a product with 000
    ("18", "#### 18 dollars per day", "correct"),
    ("18", r"\boxed{18 eggs}", "correct"),
    ("18", r"\boxed{18\text{ eggs}}", "correct"),
    ("5", "The answer is 5 km/h.", "correct"),
    ("3", r"\boxed{3 million}", "wrong"),  # not a unit
    ("3000000", r"\boxed{3}", "wrong"),
    ("145.0", "#### 145", "correct"),  # SVAMP
    ("-5", r"\boxed{-5}", "correct"),
    ("-5", "\\boxed{\u22125}", "correct"),  # Unicode minus
    ("5", r"\boxed{-5}", "wrong"),
    ("0.5", r"\boxed{\frac{1}{2}}", "correct"),
    ("0.5", r"\boxed{1/2}", "correct"),
    ("-1./3", r"\boxed{-\frac13}", "correct"),  # Minerva
    ("1/3", r"\boxed{0.333333}", "correct"),  # six decimals
    ("1/3", r"\boxed{0.33}", "wrong"),
    ("4.5e33", r"\boxed{4.5 \times 10^{33}}", "correct"),  # Minerva
    ("4.5e33", r"\boxed{4.5e33}", "correct"),
    ("4.5e33", r"\boxed{4.5e32}", "wrong"),
    ("1500", "#### 1.5e3", "correct"),
    ("90^\\circ", r"\boxed{90}", "correct"),
    ("18", r"\boxed{18\%}", "correct"),  # math-verify's rule
    ("5", r"\boxed{x=5}", "correct"),
    ("x=5", r"\boxed{5}", "correct"),
    ("(x+1)^2", r"\boxed{x^2+2x+1}", "correct"),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", "correct"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", "correct"),
    ("(1,2)", r"\boxed{(2,1)}", "wrong"),
    ("12", r"\boxed{1,2}", "wrong"),
    ("Monday", r"\boxed{\text{Monday}}", "correct"),
    ("listen", r"\boxed{silent}", "wrong"),  # letters are not factors
    ("(B)", r"\boxed{B}", "correct"),
    ("5", "\\boxed{\u0665}", "unparseable"),  # Arabic digit
]

ABUSE = [
    ("5", "x" * 1_000_000 + r" \boxed{5}", "correct"),
    ("5", r"\boxed{5}" + "x" * TAIL, "no_answer"),
    ("5", r"\boxed{" + "9" * 1001 + "}", "unparseable"),
    ("5", r"\boxed{" + "(" * 400 + ")" * 400 + "}", "unparseable"),  # seconds in the parser
    ("5", r"\boxed{" + "{" * 400 + "}" * 400 + "}", "unparseable"),
    ("5", "#### 5}{", "unparseable"),
    ("6", "#### 5} \\boxed{6}", "correct"),
    ("5", "$" * 100_000, "no_answer"),
    ("5", r"\boxed{\boxed{5}}", "correct"),
    ("5", r"\boxed{\boxed{5}\boxed{6}}", "unparseable"),
    ("5", r"\boxed{" * 6 + "5" + "}" * 6, "unparseable"),
    ("5", r"\boxed{!!!}", "unparseable"),
]


@pytest.mark.parametrize(("gold", "completion", "status"), WHERE_THE_ANSWER_STANDS + FORMS + ABUSE)
def test_strict(gold: str, completion: str, status: str) -> None:
    verdict = STRICT(Problem("p", "", gold), completion)
    assert verdict.status == status, verdict
    assert verdict.score == (1.0 if status == "correct" else 0.0)


@pytest.mark.parametrize(
    ("gold", "completion", "status"),
    [(gold, completion, status) for gold, completion, status in WHERE_THE_ANSWER_STANDS + FORMS if status == "correct"]
    + [
        ("18", "so she sells 18 eggs", "correct"),
        ("5", "5", "correct"),
        (r"\frac{1}{2}", "thus $x=0.5$", "correct"),
        ("5", "The answer is 5.\nLet me check that again.", "correct"),
        ("5", "six", "no_answer"),
        ("5", "so she sells 18 eggs", "wrong"),
        ("5", r"We get \boxed{5}. Wait. \boxed{6}", "wrong"),
    ],
)
def test_lenient_takes_all_that_strict_takes_and_more(gold: str, completion: str, status: str) -> None:
    assert LENIENT(Problem("p", "", gold), completion).status == status


@pytest.mark.parametrize("reference", [None, "", "   ", "!!!", "}{", "word " * 400])
def test_bad_references(reference: str | None) -> None:
    verdict = STRICT(Problem("p", "", reference), r"\boxed{5}")
    assert verdict.status == "bad_reference" and verdict.score is None


def test_it_runs_outside_of_the_main_thread() -> None:
    """math-verify's own time limits raise there, since they need signals."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(STRICT(Problem("p", "", "5"), r"\boxed{\frac{10}{2}}")))
    thread.start()
    thread.join()
    assert verdicts[0].status == "correct"


def test_a_vast_factorial_is_not_worked_out_and_its_neighbours_are_judged() -> None:
    from posttrain.config.schema import VerifierPoolConfig
    from posttrain.verifiers.pool import VerifierPool

    pool = VerifierPool([STRICT], VerifierPoolConfig(timeout=1.0))
    completions = [r"\boxed{5}", r"\boxed{99999999!}", r"\boxed{6}"]
    rows = pool.verify([Problem("p", "", "5")] * 3, completions)
    pool.close()
    assert [verdict.status for (verdict,) in rows] == ["correct", "unparseable", "wrong"]


@pytest.mark.parametrize(
    ("answer", "latex"),
    [
        ("$18$", "18"),
        ("$$ 18. $$", "18"),
        (r"\(x\)", "x"),
        ("**18**", "18"),
        ("-$5", "-5"),
        ("1 234 567", "1234567"),
        ("2 sin x", "2 sin x"),
        ("3 choose 2", "3 choose 2"),
        ("1.5E-3", r"1.5 \times 10^{-3}"),
        ("2e", "2e"),
        ("xy", "xy"),
        ("No solution", r"\emptyset"),
    ],
)
def test_as_latex(answer: str, latex: str) -> None:
    assert as_latex(answer) == latex


def test_escaped_braces_do_not_close_a_box() -> None:
    assert final_answer(r"\boxed{\{1, \frac{1}{2}\}}").answer == r"\{1, \frac{1}{2}\}"


def rows_of(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]


def number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


# file, reference of a row, ways to write the gold answer, share that must be right
GOLD = [
    ("gsm8k_test.jsonl", lambda r: r["answer"], [lambda r: r["answer"]], 1.0),
    (
        "svamp.jsonl",
        lambda r: str(r["Answer"]),
        [
            lambda r: f"The answer is {r['Answer']}.",
            lambda r: f"#### {number(r['Answer'])}",
            lambda r: f"\\boxed{{{float(r['Answer']):,}}}",
        ],
        1.0,
    ),
    ("aime24.jsonl", lambda r: str(r["answer"]), [lambda r: f"\\boxed{{{r['answer']}}}"], 1.0),
    ("amc23.jsonl", lambda r: str(r["answer"]), [lambda r: f"\\boxed{{{number(r['answer'])}}}"], 1.0),
    ("minerva_math.jsonl", lambda r: r["solution"], [lambda r: r["solution"]], 1.0),
]


def check_gold(folder: Path, file: str, reference, written, share: float, step: int) -> None:
    rows = rows_of(folder, file)[::step]
    verdicts = [STRICT(Problem("p", "", reference(row)), write(row)) for row in rows for write in written]
    right = [verdict.status == "correct" for verdict in verdicts]
    assert rows and sum(right) >= share * len(right), [v for v in verdicts if v.status != "correct"][:5]


@pytest.mark.parametrize(("file", "reference", "written", "share"), GOLD, ids=[row[0] for row in GOLD])
def test_gold_against_gold_on_a_sample(test_data: Path, file: str, reference, written, share: float) -> None:
    check_gold(test_data, file, reference, written, share, step=10 if "gsm" in file or "svamp" in file else 1)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "reference", "written", "share"), GOLD, ids=[row[0] for row in GOLD])
def test_gold_against_gold_on_all_rows(test_data: Path, file: str, reference, written, share: float) -> None:
    check_gold(test_data, file, reference, written, share, step=1)


def test_perturbed_gold_is_wrong(test_data: Path) -> None:
    for row in rows_of(test_data, "gsm8k_test.jsonl")[::25]:
        gold = row["answer"].rpartition("#### ")[2]
        for bad in (f"{gold}1", f"-{gold}", f"{gold}.5", f"{gold} or {gold}1"):
            assert STRICT(Problem("p", "", row["answer"]), f"#### {bad}").status == "wrong", (gold, bad)
