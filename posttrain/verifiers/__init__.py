"""Verifiers by the name that a recipe gives as `type`. Imports neither torch nor what a verifier loads when used."""

from __future__ import annotations

from typing import Any

from posttrain.verifiers.choice import ChoiceVerifier
from posttrain.verifiers.code import CodeVerifier
from posttrain.verifiers.exact import ExactVerifier
from posttrain.verifiers.format import FormatVerifier
from posttrain.verifiers.gym import GymVerifier
from posttrain.verifiers.length import LengthVerifier
from posttrain.verifiers.llm_judge import JudgeVerifier
from posttrain.verifiers.math import MathVerifier
from posttrain.verifiers.numeric import NumericVerifier
from posttrain.verifiers.procedural import ProceduralVerifier
from posttrain.verifiers.process_reward import ProcessRewardVerifier
from posttrain.verifiers.python import PythonVerifier
from posttrain.verifiers.repetition import RepetitionVerifier
from posttrain.verifiers.reward_model import RewardModelVerifier

VERIFIERS: dict[str, Any] = {
    verifier.name: verifier
    for verifier in (
        MathVerifier,
        ExactVerifier,
        NumericVerifier,
        FormatVerifier,
        ProceduralVerifier,
        GymVerifier,
        ChoiceVerifier,
        CodeVerifier,
        LengthVerifier,
        RepetitionVerifier,
        RewardModelVerifier,
        ProcessRewardVerifier,
        JudgeVerifier,
        PythonVerifier,
    )
}
