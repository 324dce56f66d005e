"""Units that both a reference and an answer name: the same amount in other words, or another amount."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

_FONT = r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|operatorname)"
_SPACE = r"(?:\s|\\[,;: ]|~)*"
_IN_FONT = rf"{_FONT}{_SPACE}\{{[^{{}}]*\}}"
_POWER = rf"{_SPACE}\^{_SPACE}\{{?{_SPACE}-?[0-9]{_SPACE}\}}?"
_SIGN = "\\\\(?:degree|cents?|pounds)|[\u00b0\u00a2\u20ac\u00a3\u00a5]|\\\\?\\$|\\^\\s*\\{?\\s*\\\\circ\\s*\\}?"
_BEHIND = re.compile(
    rf"(?:[0-9.)}}]|\\pi(?![A-Za-z])){_SPACE}((?:\\mu(?![A-Za-z]){_SPACE})?(?:{_IN_FONT}|[A-Za-z]+|{_SIGN})(?:{_POWER}|{_SPACE}/?{_SPACE}(?:{_IN_FONT}|[A-Za-z]+))*)\.?$"
)
_BEFORE = re.compile(r"^[-\u2212]?\s*(\\?\$|\\pounds|[\u20ac\u00a3\u00a5])")
_PART = re.compile(r"([a-z\u03bc\u00b0\u00a2$\u20ac\u00a3\u00a5]+)(?:\s*\^?\s*(-?[0-9]))?", re.IGNORECASE)


_FONTS_OF_UNITS = re.compile(rf"{_FONT}{_SPACE}\{{([^{{}}]*)\}}|\\[,;: ]|~")
_AMOUNT = r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\.?"
_AMOUNTS = re.compile(rf"{_AMOUNT}(?:\s*(?:,|\band\b|,\s*and\b)?\s*{_AMOUNT}){{1,3}}")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as what it measures.

    Attributes:
        measures: (quantity, power) pairs, sorted: length 1 and time -1 for a speed.
        factor: how many of the first units of these it is.
    """

    measures: tuple[tuple[str, int], ...]
    factor: Fraction


def _table() -> dict[str, Unit]:
    """Name of a unit -> what it measures, and how many of the first unit of that it is."""
    found: dict[str, Unit] = {}

    def add(factor: Fraction | int, names: str, **measures: int) -> None:
        unit = Unit(tuple(sorted(measures.items())), Fraction(factor))
        found.update(dict.fromkeys(names.split(), unit))

    prefixes = (("", "", 0), ("c", "centi", -2), ("m", "milli", -3), ("\u03bc", "micro", -6), ("k", "kilo", 3))
    for prefix, long, power in prefixes:
        factor = Fraction(10) ** power
        add(factor, f"{prefix}m {long}meter {long}meters {long}metre {long}metres", length=1)
        add(factor, f"{prefix}g {long}gram {long}grams", mass=1)
        litres = f"{prefix}l {prefix}L {long}liter {long}liters {long}litre {long}litres"
        add(factor / 1000, litres, length=3)
    for prefix, power in (("", 0), ("n", -9), ("m", -3), ("k", 3), ("M", 6), ("G", 9)):
        factor = Fraction(10) ** power
        add(factor, f"{prefix}Hz", time=-1)
        add(factor * 1000, f"{prefix}N", mass=1, length=1, time=-2)
        add(factor * 1000, f"{prefix}J", mass=1, length=2, time=-2)
        add(factor * 1000 * Fraction(1_602_176_634, 10**28), f"{prefix}eV", mass=1, length=2, time=-2)
        add(factor * 1000, f"{prefix}W", mass=1, length=2, time=-3)
        add(factor * 1000, f"{prefix}Pa", mass=1, length=-1, time=-2)
        add(factor * 1000, f"{prefix}V", mass=1, length=2, time=-3, current=-1)
        add(factor, f"{prefix}A", current=1)
    add(1, "K", kelvin=1)
    add(1, "degC", celsius=1)
    add(1, "degF", fahrenheit=1)
    add(Fraction(254, 10_000), "in inch inches", length=1)
    add(Fraction(3048, 10_000), "ft foot feet", length=1)
    add(Fraction(9144, 10_000), "yd yard yards", length=1)
    add(Fraction(1_609_344, 1000), "mi mile miles", length=1)
    add(Fraction(1_609_344, 3_600_000), "mph", length=1, time=-1)
    add(Fraction(1000, 3600), "kph kmh", length=1, time=-1)
    add(Fraction(45_359_237, 100_000), "lb lbs", mass=1)
    add(1, "s sec secs second seconds", time=1)
    add(60, "min mins minute minutes", time=1)
    add(3600, "h hr hrs hour hours", time=1)
    add(86_400, "day days", time=1)
    add(604_800, "week weeks", time=1)
    add(1, "month months", months=1)
    add(12, "year years", months=1)
    add(1, "$ dollar dollars USD", dollars=1)
    add(Fraction(1, 100), "\u00a2 cent cents", dollars=1)
    add(1, "\u20ac euro euros EUR", euros=1)
    add(1, "\u00a3 GBP", sterling=1)
    add(1, "\u00a5 yen JPY", yen=1)
    add(1, "\u00b0 degree degrees", angle=1)
    add(1, "rad radian radians", radians=1)
    return found


_UNITS = _table()
_RADIANS = (("radians", 1),)
UNIT_NAMES = frozenset(_UNITS)
"""Names and symbols of the units that are known."""


@lru_cache(maxsize=1024)
def unit_of(text: str) -> Unit | None:
    r"""The unit behind (or sign of money before) an amount, `5\text{ km}`; None without one, or with one not known."""
    if text.replace(",", "").replace(".", "").isdigit():  # most answers
        return None
    text = text.strip(" \t\n*").replace(r"\(", "").replace(r"\)", "")
    text = re.sub(r"(?<!\\)\$([^$]*[^$\\])\$", r"\1", text).strip()
    found = _BEHIND.search(text) or _BEFORE.search(text)
    unit = None if found is None else _read(found[1])
    # A multiple of pi is an angle in radians without the word too.
    return None if unit is not None and unit.measures == _RADIANS and r"\pi" in text else unit


def in_radians(answer: str) -> bool:
    """Whether an answer says that it is an angle in radians, other than as a multiple of pi."""
    unit = unit_of(answer)
    return unit is not None and unit.measures == _RADIANS


def says_degrees(text: str) -> bool:
    """Whether a text speaks of degrees and not of radians."""
    lower = text.lower()
    return ("degree" in lower or r"\circ" in lower or "\u00b0" in lower) and "radian" not in lower


def summed(text: str) -> str | None:
    r"""One amount for several that make it up, `2\text{ hours }30\text{ minutes}`; None for all else.

    The units must be of one kind, the larger first.
    """
    plain = _FONTS_OF_UNITS.sub(lambda m: f" {m[1] or ''} ", text).strip(" \t\n*$.")
    if not _AMOUNTS.fullmatch(plain):
        return None
    parts = [(Fraction(number), _UNITS.get(unit.lower()), unit) for number, unit in re.findall(_AMOUNT, plain)]
    units = [unit for _, unit, _ in parts if unit is not None]
    if len(units) < len(parts) or len({unit.measures for unit in units}) > 1:
        return None
    if any(one.factor <= other.factor for one, other in pairwise(units)):
        return None
    total = sum(number * unit.factor for number, unit, _ in parts if unit is not None) / units[0].factor
    return rf"\frac{{{total.numerator}}}{{{total.denominator}}}\text{{ {parts[0][2]}}}"


def _read(written: str) -> Unit | None:
    plain = re.sub(_FONT, "", written).replace("\u00b5", "\u03bc")
    plain = re.sub(r"\\mu[\s{]*", "\u03bc", plain)
    plain = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "\u00b0", plain).replace(r"\cent", "cent")
    plain = re.sub(r"\\pounds", "\u00a3", plain).replace("\\$", "$")
    plain = re.sub("\u00b0[\\s{~\\\\;,:]*([CF])(?![A-Za-z])", r"deg\1", plain)
    plain = " ".join(re.sub(r"\\[,;: ]|[{}~\\]", " ", plain).split())
    plain = re.sub(r"\s*\^\s*", "^", plain)
    measures: Counter[str] = Counter()
    factor, sign, power = Fraction(1), 1, 1
    for word in re.split(r"\s*(/)\s*|\s+", plain):
        word = (word or "").rstrip(".")
        if not word:
            continue
        if word in ("/", "per", "an", "a"):
            sign = -1
            continue
        if word in ("square", "sq", "cubic", "cu"):
            power = 3 if word in ("cubic", "cu") else 2
            continue
        part = _PART.fullmatch(word)
        known = None if part is None else _UNITS.get(part[1]) or _UNITS.get(part[1].lower())
        if known is None:
            return None
        exponent = sign * int(part[2] or power)
        for name, count in known.measures:
            measures[name] += exponent * count
        factor *= known.factor**exponent
        power = 1
    kept = tuple(sorted((name, count) for name, count in measures.items() if count))
    return Unit(kept, factor) if kept else None
