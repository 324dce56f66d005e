"""Which methods a set of traces suits, with the reason.

The limits below are judgement, not measurement: they say where a person who has seen many runs would begin to doubt.
They stand here to be argued with, and each piece of advice names the figure that it follows from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.evaluation.inspect import Inspection

UNKNOWN = 0.05
"""More traces than this without a verdict: the verifier comes first."""

TRUNCATED = 0.2
"""More traces than this cut at the limit: rewards then measure the limit."""

GROUP = 8
"""Group size that online methods are judged at."""

INFORMATIVE, SCARCE = 0.3, 0.1
"""Share of informative groups above which online learning has signal in most steps, and below which in hardly any."""

EASY = 0.9
"""Mean pass rate above which there is little left to learn."""

PAIRS, FEW_PAIRS = 0.3, 0.05
"""Share of problems with a correct and a wrong text that makes preference methods worth it, and that is too few."""

SOLVED = 0.3
"""Share of problems with a correct trace that makes a set to imitate."""

HARD_RATE, HARD_SHARE = 0.1, 0.1
"""A problem below this pass rate is hard; hard ones with a correct trace above this share feed prefixes and experts."""

NEVER = 0.5
"""Share of problems that nobody solves, above which the set itself is the matter."""

REPEATED = 0.5
"""Share of repeated texts above which sampling has little variety."""

Word = Literal["yes", "perhaps", "no", "first"]


@dataclass(frozen=True, slots=True)
class Advice:
    """What data are good for, in words.

    Attributes:
        family: what is advised on.
        methods: the names of its methods in a recipe; some may not be in this version.
        word: `first` is something to mend before any training.
        reason: with the figure.
    """

    family: str
    methods: tuple[str, ...]
    word: Word
    reason: str


def advise(found: Inspection) -> list[Advice]:
    """Advice in the order of reading: what to mend, then families of methods."""
    if not found.pass_at and not any(each.judged for each in found.figures):
        return [Advice("verifier", (), "first", "no trace has a verdict, so nothing can be said about methods")]
    return [*_first(found), _online(found), _preference(found), _imitation(found), _prefixes(found), _experts(found)]


def _first(found: Inspection) -> list[Advice]:
    advice = []
    if found.unknown > UNKNOWN:
        reason = f"{found.unknown:.0%} of the traces have no verdict: mend the verifier or the references"
        advice.append(Advice("verifier", (), "first", reason))
    if found.truncated is not None and found.truncated > TRUNCATED:
        reason = f"{found.truncated:.0%} of the traces are cut at the token limit: raise rollouts.max_new_tokens"
        advice.append(Advice("length", (), "first", reason))
    never = found.never_by_anyone / found.prompts
    if never > NEVER:
        reason = (
            f"{never:.0%} of the problems are solved by nobody: add easier ones, more samples, or traces of experts"
        )
        advice.append(Advice("problems", (), "first", reason))
    rate = found.pass_at.get(1)
    if rate is not None and rate.value > EASY:
        advice.append(Advice("problems", (), "first", f"pass rate {rate.value:.0%}: harder problems teach more"))
    if 1 - found.distinct > REPEATED:
        reason = f"{1 - found.distinct:.0%} of the texts are repeats: groups and pairs vary little"
        advice.append(Advice("variety", (), "first", reason))
    return advice


def _online(found: Inspection) -> Advice:
    methods = ("grpo", "lite_ppo")
    foretold = {size: interval.value for size, interval in found.informative.items()}
    share = foretold.get(GROUP, 0.0)
    low, high = (found.informative[GROUP].low, found.informative[GROUP].high) if GROUP in foretold else (0.0, 0.0)
    reason = f"{share:.0%} ({low:.0%} to {high:.0%}) of groups of {GROUP} would have rewards that differ"
    if (share >= INFORMATIVE and low < SCARCE) or (share < SCARCE and high >= INFORMATIVE):
        return Advice("online RL", methods, "perhaps", f"{reason}: too few traces to tell; sample more per prompt")
    if share >= INFORMATIVE:
        return Advice("online RL", methods, "yes", reason)
    larger = [size for size, value in foretold.items() if size > GROUP and value >= INFORMATIVE]
    if share >= SCARCE or larger:
        way = f"groups of {larger[0]} would make it {foretold[larger[0]]:.0%}" if larger else "filter groups"
        return Advice("online RL", methods, "perhaps", f"{reason}; {way}")
    return Advice("online RL", methods, "no", f"{reason}: most steps would have no gradient")


def _preference(found: Inspection) -> Advice:
    word: Word = "yes" if found.pairs >= PAIRS else "perhaps" if found.pairs >= FEW_PAIRS else "no"
    reason = f"{found.pairs:.0%} of the problems have a correct and a wrong text to pair (`posttrain prepare pairs`)"
    return Advice("preferences", ("dpo", "simpo", "hypo"), word, reason)


def _imitation(found: Inspection) -> Advice:
    solved = sum(bool(each.correct or each.correct_by_others) for each in found.figures) / found.prompts
    word: Word = "yes" if solved >= SOLVED else "perhaps" if solved >= HARD_SHARE else "no"
    return Advice("SFT on correct traces", ("sft",), word, f"{solved:.0%} of the problems have a correct trace")


def _prefixes(found: Inspection) -> Advice:
    hard = [each for each in found.figures if (each.pass_rate or 0.0) < HARD_RATE]
    share = sum(bool(each.correct or each.correct_by_others) for each in hard) / found.prompts
    reason = (
        f"{share:.0%} of the problems are hard (pass rate below {HARD_RATE:.0%}) and have a correct trace to start from"
    )
    return Advice("prefixes of traces", ("prefixrl",), "yes" if share >= HARD_SHARE else "no", reason)


def _experts(found: Inspection) -> Advice:
    helped = sum(bool(each.correct_by_others) for each in found.figures) / found.prompts
    beyond = sum(bool(each.correct_by_others and not each.correct) for each in found.figures) / found.prompts
    reason = f"others solve {helped:.0%} of the problems, {beyond:.0%} that this policy never does"
    word: Word = "yes" if beyond >= HARD_SHARE else "perhaps" if helped >= HARD_SHARE else "no"
    return Advice("expert traces inside RL", ("chord", "red"), word, reason)
