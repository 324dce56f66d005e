"""Units that both a reference and an answer name: the same amount in other words, or another amount."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_FONT = r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|operatorname)"
_SPACE = r"(?:\s|\\[,;: ]|~)*"
_IN_FONT = rf"{_FONT}{_SPACE}\{{[^{{}}]*\}}"
_POWER = rf"{_SPACE}\^{_SPACE}\{{?{_SPACE}-?[0-9]{_SPACE}\}}?"
_SIGN = "\\\\(?:degree|cents?|pounds)|[\u00b0\u00a2\u20ac\u00a3\u00a5]|\\\\?\\$|\\^\\s*\\{?\\s*\\\\circ\\s*\\}?"
_BEHIND = re.compile(
    rf"(?:[0-9.)}}]|\\pi(?![A-Za-z])){_SPACE}((?:{_IN_FONT}|[A-Za-z]+|{_SIGN})(?:{_POWER}|{_SPACE}/?{_SPACE}(?:{_IN_FONT}|[A-Za-z]+))*)\.?$"
)
_BEFORE = re.compile(r"^[-\u2212]?\s*(\\?\$|\\pounds|[\u20ac\u00a3\u00a5])")
_PART = re.compile(r"([a-z\u00b0\u00a2$\u20ac\u00a3\u00a5]+)(?:\s*\^?\s*(-?[0-9]))?", re.IGNORECASE)


def _table() -> dict[str, tuple[str, Fraction]]:
    """Name of a unit -> what it measures, and how many of the first unit of that it is."""
    found: dict[str, tuple[str, Fraction]] = {}

    def add(what: str, factor: Fraction | int, names: str) -> None:
        found.update({name: (what, Fraction(factor)) for name in names.split()})

    for prefix, long, power in (("", "", 0), ("c", "centi", -2), ("m", "milli", -3), ("k", "kilo", 3)):
        factor = Fraction(10) ** power
        add("length", factor, f"{prefix}m {long}meter {long}meters {long}metre {long}metres")
        add("mass", factor, f"{prefix}g {long}gram {long}grams")
        add("volume", factor, f"{prefix}l {prefix}L {long}liter {long}liters {long}litre {long}litres")
    add("length", Fraction(254, 10_000), "in inch inches")
    add("length", Fraction(3048, 10_000), "ft foot feet")
    add("length", Fraction(9144, 10_000), "yd yard yards")
    add("length", Fraction(1_609_344, 1000), "mi mile miles")
    add("mass", Fraction(45_359_237, 100_000), "lb lbs")
    add("time", 1, "s sec secs second seconds")
    add("time", 60, "min mins minute minutes")
    add("time", 3600, "h hr hrs hour hours")
    add("time", 86_400, "day days")
    add("time", 604_800, "week weeks")
    add("dollars", 1, "$ dollar dollars USD")
    add("dollars", Fraction(1, 100), "\u00a2 cent cents")
    add("euros", 1, "\u20ac euro euros EUR")
    add("sterling", 1, "\u00a3 GBP")
    add("yen", 1, "\u00a5 yen JPY")
    add("angle", 1, "\u00b0 degree degrees")
    add("radians", 1, "rad radian radians")
    return found


_UNITS = _table()
UNIT_NAMES = frozenset(_UNITS)
"""Names and symbols of the units that are known."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as what it measures.

    Attributes:
        measures: (quantity, power) pairs, sorted: length 1 and time -1 for a speed.
        factor: how many of the first units of these it is.
    """

    measures: tuple[tuple[str, int], ...]
    factor: Fraction


@lru_cache(maxsize=1024)
def unit_of(text: str) -> Unit | None:
    r"""The unit behind (or sign of money before) an amount, `5\text{ km}`; None without one, or with one not known."""
    if text.replace(",", "").replace(".", "").isdigit():  # most answers
        return None
    text = text.strip(" \t\n*").replace(r"\(", "").replace(r"\)", "")
    text = re.sub(r"(?<!\\)\$([^$]*[^$\\])\$", r"\1", text).strip()
    found = _BEHIND.search(text) or _BEFORE.search(text)
    return None if found is None else _read(found[1])


def _read(written: str) -> Unit | None:
    plain = re.sub(_FONT, "", written)
    plain = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "\u00b0", plain).replace(r"\cent", "cent")
    plain = re.sub(r"\\pounds", "\u00a3", plain).replace("\\$", "$")
    plain = " ".join(re.sub(r"\\[,;: ]|[{}~\\]", " ", plain).split())
    plain = re.sub(r"\s*\^\s*", "^", plain)
    measures: Counter[str] = Counter()
    factor, sign, power = Fraction(1), 1, 1
    for word in re.split(r"\s*(/)\s*|\s+", plain):
        if not word:
            continue
        if word in ("/", "per", "an", "a"):
            sign = -1
            continue
        if word in ("square", "sq", "cubic"):
            power = 3 if word == "cubic" else 2
            continue
        part = _PART.fullmatch(word)
        known = None if part is None else _UNITS.get(part[1]) or _UNITS.get(part[1].lower())
        if known is None:
            return None
        exponent = sign * int(part[2] or power)
        measures[known[0]] += exponent
        factor *= known[1] ** exponent
        power = 1
    kept = tuple(sorted((name, count) for name, count in measures.items() if count))
    return Unit(kept, factor) if kept else None
