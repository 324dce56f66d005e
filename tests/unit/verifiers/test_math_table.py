r"""Pairs of a gold answer and what is written, by where they come from, judged under both profiles.

A row is (gold, written, strict status) and is equal under the lenient profile unless it names a second status.
"""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.sample import Problem
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.math_equal import by_math_verify
from posttrain.verifiers.math_exact import same_number
from posttrain.verifiers.math_parse import parse
from posttrain.verifiers.math_units import plain_number
from posttrain.verifiers.pool import VerifierPool

STRICT = MathVerifier(MathVerifier.Config(type="math"))
LENIENT = MathVerifier(MathVerifier.Config(type="math", profile="lenient"))
C, W, N, U = "correct", "wrong", "no_answer", "unparseable"

TABLE: dict[str, list[tuple]] = {
    "GSM8K and SVAMP: money, counts, thousands": [
        ("18", "#### 18", C),
        ("18", "#### $18", C),
        ("18", "#### $18.00", C),
        ("18", "The answer is 18 dollars.", C),
        ("18", "The answer is $18 every day.", C),
        ("18", "So she makes $18 every day.", N, C),
        ("18", "**Answer:** 18", C),
        ("18", "**Final Answer**: 18", C),
        ("18", "Final Answer:\n18", C),
        ("18", "Final answer:\n\n$$18$$", C),
        ("18", "Answer: 18\nI hope this helps.", N, C),
        ("18", "#### 18\nI hope this helps.", C),
        ("18", "#### 17\n#### 18", C),
        ("17", "#### 17\n#### 18", W),
        ("70000", "#### 70,000", C),
        ("70000", "#### 70 000", C),
        ("70000", "#### 7,0000", W),
        ("1450000", r"\boxed{1{,}450{,}000}", C),
        ("145.0", r"\boxed{145}", C),
        ("145", "#### 145.00", C),
        ("145", "#### 145.5", W),
        ("0.5", "#### .5", C),
        ("-5", "#### -5", C),
        ("-5", "#### - 5", C),
        ("5", "#### +5", C),
        ("5", "#### 05", C),
        ("5", "#### 5.", C),
        ("5", "The answer is \u20ac5.", C),
        ("5", "The answer is 5\u20ac.", C),
        ("10", "#### 10 cents", C),
        ("5", "#### 5 kg", C),
        ("3", "#### 3 pm", C),
        ("5", "#### five", C),
        ("twelve", "#### 12", C),
        ("5", "#### 5 or 6", W),
        ("5", "#### 5, 6", W),
        ("5", "#### 5 6", U),
        ("30", "#### 5 6", U),  # not a product
        ("120", "#### 2 hours", W),
        ("1000000", "#### 1 million", C),
        ("3500000", r"\boxed{3.5 \text{ million}}", C),
        ("2500", "#### $2.5 thousand", C),
        ("3", "#### 3 million", W),
    ],
    "MATH and competitions: fractions": [
        (r"\frac{3}{4}", r"\boxed{\dfrac{3}{4}}", C),
        (r"\frac{3}{4}", r"\boxed{\tfrac34}", C),
        (r"\frac{3}{4}", r"\boxed{\frac 3 4}", C),
        (r"\frac{3}{4}", r"\boxed{3/4}", C),
        (r"\frac{3}{4}", r"\boxed{0.75}", C),
        (r"\frac{3}{4}", r"\boxed{.75}", C),
        (r"\frac{3}{4}", r"\boxed{75\%}", C),
        (r"\frac{3}{4}", r"\boxed{\frac{6}{8}}", C),
        (r"\frac{3}{4}", r"\boxed{\frac{4}{3}}", W),
        (r"1\frac{1}{2}", r"\boxed{\frac{3}{2}}", C),
        (r"\frac{3}{2}", r"\boxed{1\frac{1}{2}}", C),
        (r"\frac{1}{2}", r"\boxed{1\frac{1}{2}}", W),
        ("1 1/2", r"\boxed{1.5}", C),
        ("1.5", "#### 1 1/2", C),
        ("5.5", "#### 1 1/2", W),
        ("\u00bd", r"\boxed{\frac12}", C),
        ("0.5", "\\boxed{\u00bd}", C),
        ("2.5", "\\boxed{2\u00bd}", C),
        ("21/2", "\\boxed{2\u00bd}", W),
        (r"-\frac{1}{2}", r"\boxed{\frac{-1}{2}}", C),
        (r"-\frac{1}{2}", r"\boxed{-0.5}", C),
        (r"-\frac{1}{2}", r"\boxed{\frac{1}{2}}", W),
        (r"\frac{\pi}{2}", r"\boxed{\pi/2}", C),
        (r"\frac{\pi}{2}", "\\boxed{\u03c0/2}", C),
        (r"\frac{\sqrt{3}}{3}", r"\boxed{1/\sqrt{3}}", C),
        (r"\frac{\sqrt3}{2}", r"\boxed{\frac{\sqrt{3}}{2}}", C),
        (r"\frac{x}{y}", r"\boxed{x/y}", C),
        ("1/3", r"\boxed{0.333333}", C),  # six decimals
        ("1/3", r"\boxed{0.3333}", W),
        ("2/3", r"\boxed{0.67}", W),
    ],
    "MATH and competitions: intervals and inequalities": [
        ("(1,2)", r"\boxed{(1, 2)}", C),
        ("[1,2]", r"\boxed{(1,2)}", W),
        ("[1,2)", r"\boxed{[1,2)}", C),
        ("[1,2)", r"\boxed{(1,2]}", W),
        (r"[1,2]", r"\boxed{\left[1,2\right]}", C),
        (r"[1,2]", r"\boxed{x\in[1,2]}", C),
        (r"[1,2]", "\\boxed{x \u2208 [1,2]}", C),
        (r"(-\infty, 3]", r"\boxed{(-\infty,3]}", C),
        (r"(-\infty, 3]", r"\boxed{(-\infty,3)}", W),
        (r"(-\infty, 3]", r"\boxed{x \le 3}", C),
        (r"(-\infty, 3]", "\\boxed{x \u2264 3}", C),
        (r"(-\infty, 3]", r"\boxed{x < 3}", W),
        (r"x \le 3", r"\boxed{(-\infty,3]}", C),
        ("(1,2)", r"\boxed{1<x<2}", C),
        ("1<x<2", r"\boxed{(1,2)}", C),
        (r"(-\infty,1)\cup(2,\infty)", r"\boxed{(2,\infty)\cup(-\infty,1)}", C),
        (r"(-\infty,1)\cup(2,\infty)", "\\boxed{(-\u221e,1)\u222a(2,\u221e)}", C),
        (r"(-\infty,1)\cup(2,\infty)", r"\boxed{(-\infty,1]\cup(2,\infty)}", W),
    ],
    "MATH and competitions: sets, lists, pairs": [
        (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}", C),
        (r"\{1,2,3\}", r"\boxed{\{1,2\}}", W),
        ("1,2,3", r"\boxed{1, 2, 3}", C),
        ("1,2,3", r"\boxed{3,2,1}", C),
        ("1,2,3", r"\boxed{\{1,2,3\}}", C),
        (r"\{1,2\}", r"\boxed{1 \text{ and } 2}", C),
        ("1,2", r"\boxed{x=1,x=2}", C),
        ("1,2", r"\boxed{x=1 \text{ or } x=2}", C),
        ("1,2", r"\boxed{1}", W),
        ("1", r"\boxed{1,2}", W),
        ("2, -2", r"\boxed{\pm 2}", C),
        (r"\pm 2", r"\boxed{2,-2}", C),
        (r"\pm 2", "\\boxed{\u00b12}", C),
        (r"\pm 2", r"\boxed{2}", W),
        (r"\{1\}", r"\boxed{1}", C),
        (r"\emptyset", r"\boxed{\varnothing}", C),
        ("(3,4)", r"\boxed{(3, 4)}", C),
        ("(3,4)", r"\boxed{(4,3)}", W),
        ("(1,2,3)", r"\boxed{(1,2,3)}", C),
        ("(1,2,3)", r"\boxed{(3,2,1)}", W),
        (r"\left(3,\frac{\pi}{2}\right)", r"\boxed{(3,\pi/2)}", C),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix} 1 \\ 2 \end{bmatrix}}", C),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}", W),
    ],
    "MATH and competitions: algebra": [
        ("x^2+2x+1", r"\boxed{(x+1)^2}", C),
        ("x^2+2x+1", "\\boxed{x\u00b2+2x+1}", C),
        ("x^2+2x+1", r"\boxed{x^2+2x}", W),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", C),
        (r"2\sqrt{3}", "\\boxed{2\u221a3}", C),
        ("y=2x+1", r"\boxed{y = 2x + 1}", C),
        ("y=2x+1", r"\boxed{2x+1}", C),
        ("2x+1", r"\boxed{y=2x+1}", C),
        ("y=2x+1", r"\boxed{y=2x-1}", W),
        ("f(x)=x^2", r"\boxed{x^2}", C),
        ("x=5", r"\boxed{5}", C),
        ("x=5", r"\boxed{y=5}", W),
        (r"\log_2 3", r"\boxed{\frac{\ln 3}{\ln 2}}", C),
        (r"\binom{5}{2}", r"\boxed{10}", C),
        ("120", r"\boxed{5!}", C),
        ("2", r"\boxed{\sqrt{4}}", C),
        ("2", r"\boxed{1+1}", C),
        ("3+4i", r"\boxed{4i+3}", C),
        (r"\infty", r"\boxed{-\infty}", W),
        (r"\sin x", r"\boxed{\sin(x)}", C),
        ("2:3", r"\boxed{2:3}", C),
        ("2:3", r"\boxed{3:2}", W),
        ("101_2", r"\boxed{101_{2}}", C),
        ("204", r"\framebox{204}", C),  # AIME 2024
        ("204", r"so $\boxed 204$.", C),
        (r"\text{Evelyn}", r"\boxed{Evelyn}", C),
        ("even", r"\boxed{\text{odd}}", W),
        (r"\text{Yes}", r"\boxed{yes}", C),
        (r"\frac12", r"\boxed{\hbar \frac{1}{2} - F_\$}", U),  # a part of it would be right
        ("5", r"\boxed{@@@ $5$}", U),
    ],
    "MATH and competitions: units and percent": [
        ("5", r"\boxed{5\text{ cm}}", C),
        ("5", r"\boxed{5 \mathrm{~cm}}", C),
        ("5", r"\boxed{5\,\text{cm}^2}", C),
        ("5", "\\boxed{5 \\text{ cm}\u00b2}", C),
        (r"5\text{ cm}", r"\boxed{5}", C),
        ("5", r"\boxed{5\text{ m/s}}", C),
        ("5", r"\boxed{5 cm}", C),
        ("5", r"\boxed{5~\text{km}}", C),
        ("18", r"\boxed{\text{18 dollars}}", C),
        ("18", "#### 18 (dollars)", C),
        ("18", r"\boxed{18 \text{ dollars per day}}", C),
        ("1/2", r"\boxed{1/2 cup}", C),
        ("3.14", r"\boxed{\approx 3.14}", C),
        ("7", r"\boxed{7^{\text{th}}}", C),
        ("7", r"\boxed{7th}", C),
        ("3", r"\boxed{3 \text{ or more}}", U),
        ("3", r"\boxed{3 \text{ thirds}}", U),
        ("12", r"\boxed{12 \text{ and a half}}", U),
        (r"12\frac{1}{2}", r"\boxed{12 \text{ and a half}}", U),
        ("90", r"\boxed{90^\circ}", C),
        ("90", "\\boxed{90\u00b0}", C),
        ("90", r"\boxed{90 \text{ degrees}}", C),
        ("5", r"\boxed{\$5}", C),
        (r"25\%", r"\boxed{25\%}", C),
        (r"25\%", r"\boxed{25}", C),
        (r"25\%", r"\boxed{0.25}", C),
        (r"25\%", r"\boxed{2.5}", W),
        ("25", "The answer is 25%.", C),
        ("25", "The answer is 25 percent.", C),
        ("0.25", r"\boxed{25\%}", C),
    ],
    "Minerva: constants and notation of physics": [
        ("1.6", r"s=\frac{45}{3600} \frac{\pi}{180} 7200=\boxed{1.6} \mathrm{~cm}", C),
        ("4.5e33", r"\boxed{4.5 \times 10^{33}}", C),
        ("4.5e33", r"\boxed{4.6 \times 10^{33}}", W),
        ("1.6e-19", r"\boxed{1.6 \times 10^{-19}}", C),
        ("1.6e-19", r"\boxed{1.60\times10^{-19}\text{ C}}", C),
        ("1.6e-19", r"\boxed{1.7 \times 10^{-19}}", W),  # equal by six decimals
        ("1.6e-19", r"\boxed{0}", W),
        ("0", r"\boxed{10^{-9}}", W),
        ("0.001", r"\boxed{10^{-3}}", C),
        ("0.014286", r"\boxed{\frac{1}{70}}", C),
        ("1000000", r"\boxed{10^6}", C),
        ("-1./3", r"\boxed{-\frac13}", C),
        ("np.arcsin(10/13)", r"\boxed{\arcsin(10/13)}", C),
        ("np.arcsin(10/13)", r"\boxed{\arcsin(10/14)}", W),
        ("E_{1},E_{2}", r"\boxed{E_2, E_1}", C),
        ("E_{1},E_{2}", r"\boxed{E_1}", W),
        (r"\frac{10 L_{\odot}}{M_{\odot}^{6}}", r"\boxed{10 L_\odot / M_\odot^6}", C),
        (
            r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m}",
            r"\boxed{\hbar\omega(v+\frac12)-\frac{E_0^2e^2}{2m}}",
            C,
        ),
    ],
    "letters of options": [
        ("A", r"\boxed{A}", C),
        ("A", r"\boxed{\text{(A)}}", C),
        ("A", r"\boxed{\textbf{(A)}\ 12}", C),
        ("A", r"\boxed{\text{(A) } 5}", C),
        ("A", r"\boxed{A) 5}", C),
        ("A", "The answer is (A).", C),
        (r"\text{(A)}", r"\boxed{A}", C),
        ("A", r"\boxed{B) 5}", W),
        ("A", r"\boxed{B}", W),
        ("A", r"\boxed{A, B}", W),
    ],
    "several answers": [
        ("5", r"\boxed{5} or \boxed{6}", W),
        ("6", r"\boxed{5} or \boxed{6}", W),
        ("5", r"\boxed{5}, \boxed{6}, \boxed{7}", W),
        ("5", r"\boxed{5} or maybe 6", W, C),
        ("60", r"\boxed{60} minutes or 1 hour", W, C),
        ("5", r"\boxed{5 \text{ or } 6}", W),
        ("5", "The answer is 5 or 6", W),
        ("5", r"We get \boxed{6}. Wait, that is wrong. \boxed{5}", C),
        ("6", r"We get \boxed{6}. Wait, that is wrong. \boxed{5}", W),
        ("5", r"<think>\boxed{6}</think> So \boxed{5}.", C),
    ],
    "marks that nobody sees": [
        ("5", "\\boxed{\u200f5\u200e}", C),
        ("5", "\\boxed{\u200b5\ufeff}", C),
        ("12", "\\boxed{\u202e12}", U),  # shown as 21
        ("21", "\\boxed{\u202e12}", U),
        ("5", "\\boxed{5\x00}", U),
        ("5", "\x00\\boxed{5}\x00", C),
        ("5", "\\boxed{\uff15}", U),
        ("5", "\\boxed{\u0665}", U),
        ("5", "\\boxed{\u096b}", U),
        ("5", "\\boxed{\U0001d7d3}", U),  # bold
    ],
}
ROWS = [(origin, *row[:3], row[-1]) for origin, rows in TABLE.items() for row in rows]


@pytest.mark.parametrize(("origin", "gold", "written", "strict", "lenient"), ROWS)
def test_both_profiles(origin: str, gold: str, written: str, strict: str, lenient: str) -> None:
    problem = Problem("p", "", gold)
    assert STRICT(problem, written).status == strict, origin
    assert LENIENT(problem, written).status == lenient, origin


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 200 and len(set(ROWS)) == len(ROWS)


@pytest.mark.parametrize("gold", sorted({row[1] for row in ROWS}))
def test_every_gold_answer_equals_itself(gold: str) -> None:
    assert STRICT(Problem("p", "", gold), rf"\boxed{{{gold}}}").status == "correct"


# ------------------------------------------------------------------------------------- the route of plain numbers


def written_numbers(rng: random.Random) -> list[str]:
    value = rng.choice([rng.randint(-30, 30), rng.randint(-(10**6), 10**6), rng.randint(10**9, 10**12)])
    digits = rng.choice([0, 1, 2, 6])
    text = f"{value + (rng.randint(0, 10**digits) / 10**digits if digits else 0):.{digits}f}"
    return [
        text,
        f"{float(text):,.{digits}f}",
        text + ("0" if digits else ".0"),
        f"{float(text) + 1e-4:.6f}",
        f"-{text}",
    ]


def test_plain_numbers_are_judged_as_math_verify_judges_them() -> None:
    rng = random.Random(0)
    pairs = [tuple(rng.choices(written_numbers(rng), k=2)) for _ in range(300)]
    for gold, answer in pairs:
        if plain_number(gold) is None or plain_number(answer) is None:
            continue  # a double sign
        slow = by_math_verify(parse(gold), parse(answer))
        assert same_number(plain_number(gold), plain_number(answer)) == slow, (gold, answer)
    assert sum(plain_number(gold) == plain_number(answer) for gold, answer in pairs) > 30


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", 5),
        ("-5", -5),
        ("\u22125", -5),
        ("1,234.5", Fraction(2469, 2)),
        (".5", Fraction(1, 2)),
        ("1,23", None),
        ("5.", None),
        ("1/2", None),
        ("\u0665", None),
        ("", None),
        ("9" * 41, None),
        ("1e3", None),
    ],
)
def test_plain_number(text: str, number: Fraction | None) -> None:
    assert plain_number(text) == number


# ------------------------------------------------------------------------------------------------------ hostile text

NEST = 300
HOSTILE = [
    (r"\boxed{10^{10^{10}}}", {U}),
    (r"\boxed{10^10^10}", {U}),
    ("#### 10^10^10", {U}),
    ("The answer is 10^10^10.", {U}),
    (r"\boxed{2^{9999999999}}", {U}),
    (r"\boxed{" + r"\sqrt{" * NEST + "2" + "}" * NEST + "}", {U}),
    (r"\boxed{" + "(" * NEST + ")" * NEST + "}", {U}),
    (r"\boxed{" * 200_000, {U}),
    (r"\boxed{5}" * 100_000, {C}),
    ("9" * 1_000_000, {N}),
    ("\x00" * 1_000_000 + r"\boxed{5}", {C}),
    ("or " * 300_000 + r"\boxed{5}", {C}),
    ("answer to " * 100_000, {N}),
    ("$" * 1_000_000, {N}),
    ("#### " * 200_000, {U}),
    ("{" * 1_000_000, {N}),
    ("\\" * 1_000_000, {N}),
    ("\u202e" * 300_000, {N}),
    ("\ud800", {N}),
]
SLOW = [
    (r"\boxed{((((2^{9999})^{9999})^{9999}))}", {"timeout", U, W}),
    (r"\boxed{\binom{1000000000}{500000000}}", {"timeout", U, W}),
    (r"\boxed{" + r"\frac{1}{" * 18 + "2" + "}" * 18 + "}", {"timeout", U, W}),
]


@pytest.mark.parametrize("profile", ["strict", "lenient"])
def test_hostile_text_gets_its_verdict_and_the_pool_stays_healthy(profile: str) -> None:
    pool = VerifierPool(
        [MathVerifier(MathVerifier.Config(type="math", profile=profile))], VerifierPoolConfig(timeout=1.0)
    )
    problem, hostile = Problem("p", "", "5"), HOSTILE + (SLOW if profile == "strict" else [])
    texts = [text for text, _ in hostile] + [r"\boxed{5}", r"\boxed{\frac{10}{2}}", r"\boxed{6}"]
    rows = pool.verify([problem] * len(texts), texts)
    pool.close()
    assert [verdict.status for (verdict,) in rows[-3:]] == [C, C, W]
    for (text, allowed), (verdict,) in zip(hostile, rows, strict=False):
        extra = {W, C, U, "timeout"} if profile == "lenient" and N in allowed else set()
        assert verdict.status in allowed | extra, (text[:40], verdict)
