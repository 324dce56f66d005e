r"""Derivatives and Greek letters as unknowns of their own.

The grammar would work them out: $dy/dx$ of a letter y that holds no x is 0 to sympy, $\gamma$ is Euler's constant.
"""

from __future__ import annotations

import re

_PARTS = r"(?:\s*_\s*(?:\{[^{}]*\}|[A-Za-z0-9]))?"
_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|(?:var)?rho"
    r"|sigma|tau|upsilon|(?:var)?phi|chi|psi|omega|ell|Gamma|Delta|Theta|Lambda|Xi|Sigma|Upsilon|Phi|Psi|Omega)(?![A-Za-z])"
)
_UNKNOWN = rf"(?:{_GREEK}|[A-Za-z]){_PARTS}"
_CALLED = r"(?:\s*(?:\\left\s*)?\(\s*[a-z](?:\s*,\s*[a-z])*\s*(?:\\right\s*)?\))?"
_D = r"(?:\\partial(?![A-Za-z])|d)"
_POWER = r"(?:\s*\^\s*(?:\{\s*[0-9n]\s*\}|[0-9n]))?"
_BY = rf"(?:{_D}\s*{_UNKNOWN}{_POWER}\s*)+"
_OF = rf"(?P<of>{_UNKNOWN}){_CALLED}"
_DERIVATIVE = re.compile(
    rf"\\[dtc]?frac\s*\{{\s*(?P<d>{_D}{_POWER})\s*{_OF}\s*\}}\s*\{{\s*(?P<by>{_BY})\}}"
    rf"|\\[dtc]?frac\s*\{{\s*(?P<d2>{_D}{_POWER})\s*\}}\s*\{{\s*(?P<by2>{_BY})\}}\s*(?:\\left\s*)?(?P<open>\()?"
    rf"\s*{_OF.replace('of', 'of2')}\s*(?(open)(?:\\right\s*)?\)|(?=[-+=,;)\]}}]|$))"
    rf"|(?<![A-Za-z\\_])(?P<d3>{_D}{_POWER})\s*{_OF.replace('of', 'of3')}\s*/\s*"
    rf"(?P<by3>{_D}\s*{_UNKNOWN}{_POWER})(?![A-Za-z])"
)
_DOTTED = re.compile(rf"\\(d{{0,3}}dot)(?![A-Za-z])\s*(?:\{{\s*({_UNKNOWN})\s*\}}({_PARTS})|({_UNKNOWN}))")
_PRIMED = re.compile(
    rf"(\\[A-Za-z]+|[A-Za-z])({_PARTS})\s*((?:'|\u2032)++|\^\s*(?:\{{\s*(?:\\prime\s*|'\s*)+\}}|\\prime(?![A-Za-z])|'))"
    r"(?!\s*(?:\\left\s*)?\()"
)
_GAMMA = re.compile(
    r"\\(gamma|Gamma)(?![A-Za-z])(?:\s*_\s*(?:\{([^{}]*)\}|([A-Za-z0-9])))?(\s*\{?\s*(?:\\(?:left|[bB]igg?l?)\s*)?\()?"
)


def as_unknowns(latex: str) -> str:
    r"""The same with a letter of its own for each derivative of an unknown, and for $\gamma$ and $\Gamma$.

    Derivatives that are spelt alike are the same letter. What can be worked out stays: `\frac{d}{dx} x^2`, and
    $\Gamma$ before a bracket, which is the function.
    """
    if "d" in latex or r"\partial" in latex:
        latex = _DOTTED.sub(lambda m: _letter(m[1], m[2] or m[4], m[3] or ""), _DERIVATIVE.sub(_derivative, latex))
    if "'" in latex or "\u2032" in latex or r"\prime" in latex:
        latex = _PRIMED.sub(_primed, latex)
    return _GAMMA.sub(_gamma, latex) if "amma" in latex else latex


def _derivative(found: re.Match[str]) -> str:
    parts = found.groupdict()
    number = next(place for place in ("", "2", "3") if parts[f"of{place}"] is not None)
    of, by = parts[f"of{number}"], parts[f"by{number}"]
    if re.fullmatch(rf"{_D}\s*{re.escape(of)}{_POWER}\s*", by):
        return found[0]
    return _letter(parts[f"d{number}"], of, "by", by)


def _primed(found: re.Match[str]) -> str:
    if len(found[1]) > 1 and not re.fullmatch(_GREEK, found[1]):
        return found[0]
    marks = len(re.findall(r"'|\u2032|\\prime", found[3]))
    return _letter(found[1], found[2], "prime" * marks)


def _gamma(found: re.Match[str]) -> str:
    if found[4] and found[1] == "Gamma":
        return found[0]
    return _letter(found[1], found[2] or found[3] or "") + (found[4] or "")


def _letter(*words: str) -> str:
    """An index says which it is; nobody writes this letter with one."""
    name = "".join(words).replace(r"\partial", "partial")
    return rf" \Upsilon_{{{re.sub('[^A-Za-z0-9]', '', name)}}} "
