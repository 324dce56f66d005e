"""Verifiers by the name that a recipe gives as `type`. Imports neither torch nor what a verifier loads when used."""

from __future__ import annotations

from typing import Any

from posttrain.verifiers.exact import ExactVerifier
from posttrain.verifiers.format import FormatVerifier
from posttrain.verifiers.gym import GymVerifier
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.numeric import NumericVerifier
from posttrain.verifiers.procedural import ProceduralVerifier

VERIFIERS: dict[str, Any] = {
    verifier.name: verifier
    for verifier in (
        MathVerifier,
        ExactVerifier,
        NumericVerifier,
        FormatVerifier,
        ProceduralVerifier,
        GymVerifier,
    )
}
