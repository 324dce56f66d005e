"""What `posttrain verify --config FILE` reads."""

from __future__ import annotations

from pydantic import Field

from posttrain.config.schema import Section, Source, VerifierPoolConfig
from posttrain.config.verifier import AnyVerifier


class AuditConfig(Section):
    """A data set and the verifiers to audit on it."""

    data: Source = Field(description="problems; gold answers from `completion` where it is named, else the reference")
    verifier: list[AnyVerifier] = Field(min_length=1)
    verifier_pool: VerifierPoolConfig = VerifierPoolConfig()
    outputs: str | None = Field(
        None, description="column with what a model wrote (text, or a list of texts), to compare profiles on"
    )
    min_gold: float = Field(1.0, ge=0, le=1, description="least share of gold answers that must be correct")
