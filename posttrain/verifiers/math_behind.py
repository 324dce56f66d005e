"""What stands behind the number of an answer: one unit or what is counted, or words that change or doubt the value."""

from __future__ import annotations

import re
from functools import lru_cache

from posttrain.verifiers.math_dimensions import UNIT_NAMES
from posttrain.verifiers.math_notation import number_word, undressed
from posttrain.verifiers.math_sides import MAX_PROMPT, sides
from posttrain.verifiers.math_units import SCALES, is_symbol, scaled, without_money, without_times

_FONT = r"\\(?:text|mathrm|mbox|textrm|textbf|textit|textsf|texttt|mathbf|mathsf|mathit|operatorname)\*?"
_WORDS = re.compile(rf"{_FONT}\s*\{{([^{{}}]*)\}}|(?<![\\A-Za-z])[A-Za-z]{{2,}}")
_WORKED_OUT = re.compile(r"\\(?:i{1,3}nt|sum|prod|lim)(?![a-z])")
_INDEX = re.compile(r"_\s*\{?\s*$|\\(?:begin|end)\s*\{\s*$")
_IN_FONT = re.compile(rf"{_FONT}\s*\{{([^{{}}]*)\}}")
_WHOLE = re.compile(rf"^{_FONT}\s*\{{\s*([^{{}}A-Za-z]*[0-9][^{{}}]*)\}}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\\?\$|\\mu(?![A-Za-z])|[\u00b5\u03bc](?=[A-Za-z])")
_POWER = re.compile(r"\^\s*(?:\{\s*[-\u2212]?\s*[1-4]\s*\}|[1-4])(?![0-9])|[\u00b9\u00b2\u00b3\u207b]")
_DEGREE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\u00b0")
_PHRASE = re.compile(r"[A-Za-z]+(?:(?:['-]|\s*/\s*|\s*\*\s*|\s+)[A-Za-z]+)*")
_MATHEMATICS = re.compile(
    r"e|i|d|pi|sqrt|frac|exp|ln|log|lg|(?:arc|a)?(?:sin|cos|tan|cot|sec|csc|tg|ctg)h?|sh|ch|th|max|min|gcd|lcm|det|abs"
    r"|floor|ceil"
)

_SCALING = frozenset(
    (
        # numbers
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million "
        "billion trillion hundreds thousands millions billions trillions lakh lakhs crore crores dozen dozens score "
        "scores gross myriad couple tens halves half third thirds quarter quarters fourth fourths fifth fifths sixth "
        "sixths seventh sevenths eighth eighths ninth ninths tenth tenths eleventh elevenths twelfth twelfths "
        "hundredth hundredths thousandth thousandths millionth millionths billionth billionths ppm ppb mille permille "
        "basis bps k googol infinite infinity "
        # operations
        "plus minus times divided multiplied over squared square-root cubed root power powers exponent factorial "
        "double doubled triple tripled twice thrice quadruple halved inverse inverted reciprocal negative negated "
        "opposite imaginary choose mod modulo base binary octal hexadecimal decimal log sin cos tan cot sec csc sqrt "
        "raised added subtracted decreased increased "
    ).split()
)
_CHANGING = _SCALING | frozenset(
    (
        # comparisons and ranges
        "least most less more fewer greater larger smaller above below under exceeding than maximum minimum max min "
        "between to through until up down beyond within almost nearly around about approximately approx roughly circa "
        "ish so "
        # what connects, doubts or denies
        "and or but plus-minus vs nor xor if when unless except where otherwise else either neither instead also not "
        "no non never none false wrong incorrect untrue maybe perhaps possibly probably likely guess guessing dunno "
        "unsure uncertain unknown something anything is are was were isn't option options"
    ).split()
)

_JOINING = frozenset(
    (
        "per a an the of from each every in for on at point city town line total altogether left remaining old long "
        "wide tall high deep all different distinct possible full whole complete unique"
    ).split()
)
_BEFORE_NAMES = frozenset("from of to at in point city town line".split())
"""Before the name of a point or a place: miles from A."""

_ASKED_FOR = frozenset("more less fewer".split())
"""What a question may ask for: how many more."""

_LEADING = frozenset("square sq cubic cu".split())
_COUNTED = frozenset(
    (
        "unit item thing object piece part step way time case point mark percent percentage number value solution root "
        "digit integer term factor element member set row column page line word letter question problem answer "
        "person people man men woman women child children kid boy girl student teacher worker friend player team "
        "family guest customer passenger visitor voter animal dog cat cow horse sheep goat pig chicken duck hen bird "
        "fish rabbit mouse mice bee ant egg apple orange banana pear peach plum grape cherry strawberry lemon tomato "
        "potato carrot cookie cake cupcake pie pizza slice sandwich candy chocolate muffin donut bagel loaf loaves "
        "bread cup glass bottle can jar box bag basket bucket bowl plate spoon tablespoon teaspoon pint quart gallon "
        "ounce oz pound ton tonne lb stone acre hectare mph kph kmh kmph knot century decade year month fortnight day "
        "night hour minute second week weekend microsecond millisecond nanosecond micrometer nanometer joule kilojoule "
        "calorie newton watt kilowatt volt ampere amp ohm hertz kilohertz megahertz pascal kelvin celsius fahrenheit "
        "mole coulomb tesla farad radian steradian bit byte kilobyte megabyte gigabyte kb mb gb tb kwh rpm "
        "dollar buck cent euro pence penny pennies dime nickel rupee peso yuan won ruble franc yen usd eur gbp inr "
        "coin bill stamp ticket card book notebook pen pencil crayon marker paper sheet shirt pant sock shoe dress "
        "hat ball game toy marble sticker balloon bead button car bus truck train boat ship plane bicycle bike wheel "
        "tire seat chair table room house building floor wall window door tree flower rose plant seed leaf leaves "
        "petal block brick tile board nail mile kilometer lap game goal run trip flight class lesson song "
        "computer phone photo picture message email inch inches foot feet yard degree am pm th st nd rd"
    ).split()
)
_NAMED = _COUNTED | _JOINING | _LEADING | UNIT_NAMES


def changed_by_words(answer: str, gold: str, prompt: str, strict: bool) -> bool:
    r"""Whether words behind the number of an answer may change its value, so that they are not to be dropped.

    What may stand there is one unit, as a product of units with powers, or one phrase that names what is counted.
    Nothing may follow it. Words of number, operation, comparison, doubt and denial are never dropped.

    Args:
        answer: as written.
        gold: the reference, a number, as written; words of it may be dropped.
        prompt: of the problem; words of it may be dropped.
        strict: whether each word must be known: a unit, one of a list of things often counted, of the prompt or of the
            reference. Otherwise all words but those that are never dropped may stand there.
    """
    text = _WHOLE.sub(r"\1", undressed(answer))
    if "=" in text or "\\" in text:
        text = next((side for side in reversed(sides(text)) if any(map(str.isnumeric, side))), text)
    start = _first_words(text)
    if start is None or "".join(answer.split()) == "".join(gold.split()):
        return False
    words = _phrase(text[start:])
    if words is None:
        return True
    amount = without_money(text[:start]).strip(" (\\,;:!~")
    if "(" in text and number_word(" ".join(words)) == amount:
        return False
    if words[0].lower() in SCALES and scaled(f"{amount} {words[0]}") is not None:
        words = words[1:]
    words = without_times(words)
    if words and words[-1].lower() in _LEADING:
        return True
    if len(words) > 1 and words[-1].isupper() and words[-2].lower() in _BEFORE_NAMES:
        words = words[:-1]
    return not all(_may_stand(word, gold, prompt, strict) for word in words)


def scaled_behind(number: str, sentence: str) -> bool:
    """Whether the word right behind a number of a sentence is one of number or operation: `6 tenths`."""
    behind = re.match(r"[\s$\\)*]*([A-Za-z]+)", sentence.rpartition(number)[2])
    return behind is not None and behind[1].lower() in _SCALING


def _first_words(text: str) -> int | None:
    """Where the first words behind a digit begin, other than names of functions and indices; None without any."""
    letters_multiply = _WORKED_OUT.search(text) is not None
    for found in _WORDS.finditer(text):
        if letters_multiply and found[1] is None:
            continue
        before = text[: found.start()]
        name = (found[0] if found[1] is None else found[1]).strip(" ~")
        if (
            not re.search("[A-Za-z]", name)
            or _MATHEMATICS.fullmatch(name)
            or not any(map(str.isnumeric, before))
            or _INDEX.search(before)
        ):
            continue
        return found.start()
    return None


def _phrase(tail: str) -> list[str] | None:
    """The words of a unit or a phrase; None if there is anything else."""
    tail = _FRACTION.sub(r" \1 / \2 ", _IN_FONT.sub(r" \1 ", tail))
    tail = _DEGREE.sub(" degree ", _POWER.sub(" ", _SPACING.sub(" ", tail)))
    tail = re.sub(r"\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|\u00b7|\u22c5", "*", tail).replace(r"\Omega", "ohm")
    tail = re.sub(r"/\s*\(([^()]*)\)", r"/ \1", tail)  # J/(kg K)
    tail = re.sub(r"\\?%", " percent ", tail).strip(" \t\n.,;{}()")
    found = _PHRASE.fullmatch(tail)
    return None if found is None else re.findall(r"[A-Za-z]+(?:'[A-Za-z]+)?", tail)


def _may_stand(word: str, gold: str, prompt: str, strict: bool) -> bool:
    lower = word.lower()
    if word in UNIT_NAMES or is_symbol(word):
        return True
    if lower in _ASKED_FOR and re.search(rf"\bhow\s+(?:many|much)\s+{lower}\b", prompt[-MAX_PROMPT:], re.IGNORECASE):
        return True
    if lower in _CHANGING:
        return False
    forms = _forms(lower)
    if not strict or not forms.isdisjoint(_NAMED):
        return True
    return any(not forms.isdisjoint(_words_of(text)) for text in (gold, prompt[-MAX_PROMPT:]))


def _forms(word: str) -> set[str]:
    """A word and what it may be the plural of."""
    forms = {word}
    if word.endswith("s"):
        forms.add(word[:-1])
    if word.endswith("es"):
        forms.add(word[:-2])
    if word.endswith("ies"):
        forms.add(word[:-3] + "y")
    return forms


@lru_cache(maxsize=256)
def _words_of(text: str) -> frozenset[str]:
    return frozenset(form for word in re.findall("[a-z]{2,}", text.lower()) for form in _forms(word))
