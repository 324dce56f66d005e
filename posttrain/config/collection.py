"""What `posttrain sample`, `prepare traces` and `prepare pairs` are told. The sections are those of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.config.schema import ModelConfig, RolloutConfig, Section, Source, VerifierConfig, VerifierPoolConfig


class SampleData(Section):
    """The problems that are sampled for."""

    prompts: Source
    max_prompt_length: int | None = Field(None, ge=1, description="tokens; default: no limit but the model's")
    too_long: Literal["drop", "error"] = Field("drop", description="what happens to longer ones: leave out, stop")
    max_lost_share: float = Field(0.1, ge=0.0, le=1.0, description="stop if a larger share of prompts is left out")


class SampleSettings(Section):
    """All of a sampling run but where its result goes.

    Completions of a prompt are drawn in rounds. Whether a prompt has enough correct ones is looked at after each round,
    so that which completions there are follows from these settings alone, however often the run was broken off.
    """

    model: ModelConfig
    data: SampleData
    verifier: list[VerifierConfig] = Field(min_length=1)
    verifier_pool: VerifierPoolConfig = VerifierPoolConfig()
    rollouts: RolloutConfig = RolloutConfig()
    stop_at_correct: int | None = Field(
        None,
        ge=1,
        description="sample no more for a prompt with this many correct completions; default: never stop",
    )
    samples_per_round: int | None = Field(
        None, ge=1, description="completions per prompt between two looks; default: 8, or all without stop_at_correct"
    )
    prompts_per_chunk: int = Field(64, ge=1, description="prompts given to the engine at once; no effect on the result")
    seed: int = 0
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: as torch chooses")

    @model_validator(mode="after")
    def _no_adapter(self) -> SampleSettings:
        if self.model.peft is not None:
            raise ValueError("an adapter section has no effect on sampling: give the trained model's folder as path")
        return self

    @property
    def round_size(self) -> int:
        """Completions per prompt in one round."""
        most = self.rollouts.samples_per_prompt
        given = self.samples_per_round or (most if self.stop_at_correct is None else 8)
        return min(given, most)


class SampleConfig(SampleSettings):
    """A sampling run: `posttrain sample`."""

    output: str = Field(description="file for the traces, .jsonl; its manifest is written beside it")


class TakeInData(Section):
    """Problems with written completions."""

    completions: Source


class TakeInConfig(Section):
    """Text-only traces from files or from other models: `posttrain prepare traces`."""

    data: TakeInData
    policy: str = Field(description="who wrote the completions, e.g. a model's name")
    provenance: str = Field("", description="how they came about, in words: prompt, temperature, licence, ...")
    verifier: list[VerifierConfig] | None = Field(None, min_length=1, description="default: they are not verified")
    verifier_pool: VerifierPoolConfig = VerifierPoolConfig()
    output: str = Field(description="file for the traces, .jsonl; its manifest is written beside it")


class PairSettings(Section):
    """How pairs are made of scored completions."""

    strategy: Literal["best_worst", "margin", "ranked", "second_best"] = Field(
        "best_worst",
        description="best against worst; all pairs above `margin`; the best against every lower one; second best "
        "against worst, with the best as gold",
    )
    margin: float = Field(0.0, ge=0.0, description="smallest difference of scores; equal scores never make a pair")
    score: Literal["reward", "outcome"] = Field("reward", description="what completions are compared by")
    max_pairs: int | None = Field(None, ge=1, description="pairs per prompt, drawn at random; default: all")
    unfinished: bool = Field(False, description="also use completions that were cut at the token limit")
    seed: int = Field(0, description="of the choice between equally good ones, and of what max_pairs keeps")
