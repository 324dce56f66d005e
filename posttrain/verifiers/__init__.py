"""Verifiers by the name that a recipe gives as `type`. A verifier is one file: a class, with its `Config`."""

from __future__ import annotations

from typing import Any, TypeVar

from posttrain.registry import Registry

VERIFIERS: Registry[Any] = Registry(
    "verifier",
    {
        "math": "posttrain.verifiers.math:MathVerifier",
        "exact": "posttrain.verifiers.exact:ExactVerifier",
        "numeric": "posttrain.verifiers.numeric:NumericVerifier",
        "format": "posttrain.verifiers.format:FormatVerifier",
        "procedural": "posttrain.verifiers.procedural:ProceduralVerifier",
        "reasoning_gym": "posttrain.verifiers.gym:GymVerifier",
        "choice": "posttrain.verifiers.choice:ChoiceVerifier",
        "code": "posttrain.verifiers.code:CodeVerifier",
        "length": "posttrain.verifiers.length:LengthVerifier",
        "repetition": "posttrain.verifiers.repetition:RepetitionVerifier",
        "reward_model": "posttrain.verifiers.reward_model:RewardModelVerifier",
        "principled": "posttrain.verifiers.principled:PrincipledVerifier",
        "levels": "posttrain.verifiers.levels:LevelsVerifier",
        "process_reward": "posttrain.verifiers.process_reward:ProcessRewardVerifier",
        "judge": "posttrain.verifiers.llm_judge:JudgeVerifier",
        "python": "posttrain.verifiers.python:PythonVerifier",
    },
)

V = TypeVar("V")


def register(verifier: type[V]) -> type[V]:
    """Make a verifier of a plugin known by the `type` of its `Config`; to be used as a decorator.

    The class is called with its section, its instances with a problem and a completion (`verdict.Verifier`); or they
    have `verify` for whole batches (`verdict.BatchVerifier`).

    Raises:
        PluginError: it has no `Config` with a type, or the type is taken.
    """
    VERIFIERS.add_class(verifier, "type")
    return verifier
