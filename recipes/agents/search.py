"""A tool for recipes/agents/grpo-tools-gsm8k.yaml: a search in facts.txt, a line for each fact."""

import re
from collections import Counter
from functools import cache
from math import log
from pathlib import Path

SHOWN = 2


def search(query: str) -> str:
    """Look up units, amounts of money, the calendar, shapes and other things that problems take for known.

    Args:
        query: a few words, for example: days in a leap year.
    """
    facts, rarity = known()
    asked = set(words(query))
    scored = [(sum(rarity[word] for word in asked & set(own)), -place, fact) for place, (fact, own) in enumerate(facts)]
    found = [fact for score, _, fact in sorted(scored, reverse=True)[:SHOWN] if score > 0]
    if not found:
        raise ValueError("nothing was found; use other words")
    return "\n".join(found)


@cache
def known() -> tuple[list[tuple[str, list[str]]], dict[str, float]]:
    """Facts with their words, and how rare each word is: the logarithm of facts by those that have it."""
    facts = [(fact, words(fact)) for fact in Path(__file__).with_name("facts.txt").read_text("utf-8").splitlines()]
    within = Counter(word for _, own in facts for word in set(own))
    return facts, {word: log((1 + len(facts)) / n) for word, n in within.items()}


def words(text: str) -> list[str]:
    """In small letters, without the s of a plural."""
    return [word.removesuffix("s") for word in re.findall(r"[a-z]+|\d+", text.lower())]
