"""What `posttrain sample`, `prepare traces` and `prepare pairs` are told. The sections are those of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from posttrain.config.patterns import Pattern
from posttrain.config.revisions import RevisionTemplate, check_revisions
from posttrain.config.schema import (
    FileSource,
    ModelConfig,
    RolloutConfig,
    Section,
    Source,
    ValueSearchConfig,
    VerifierPoolConfig,
)
from posttrain.config.sentences import SentenceControl
from posttrain.config.verifier import AnyVerifier
from posttrain.config.workers import WorkerSettings, check_rollouts, check_shared


class SampleData(Section):
    """The problems that are sampled for."""

    prompts: Source
    max_prompt_length: int | None = Field(None, ge=1, description="tokens; default: no limit but the model's")
    too_long: Literal["drop", "error"] = Field("drop", description="what happens to longer ones: leave out, stop")
    max_lost_share: float = Field(0.1, ge=0.0, le=1.0, description="stop if a larger share of prompts is left out")


def _of_text(model: ModelConfig) -> ModelConfig:
    if model.pictures is not None:
        raise ValueError("steps of answers about pictures cannot be labelled yet: leave out `pictures`")
    return model


TextModel = Annotated[ModelConfig, AfterValidator(_of_text)]


class SampleSettings(WorkerSettings):
    """All of a sampling run but where its result goes.

    Completions of a prompt are drawn in rounds. Whether a prompt has enough correct ones is looked at after each round,
    so that which completions there are follows from these settings alone, however often the run was broken off.
    """

    model: ModelConfig
    data: SampleData
    verifier: list[AnyVerifier] = Field(min_length=1)
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
    beams: int | None = Field(
        None,
        ge=2,
        description="width of a beam search for the `samples_per_prompt` likeliest completions; default: drawn ones",
    )
    value: ValueSearchConfig | None = Field(None, description="guide that search by a value model over steps")
    revisions: int = Field(0, ge=0, description="times that each completion is revised by the model (SRPO)")
    revision_template: RevisionTemplate | None = Field(
        None, description="prompt of a revision, with {prompt} and {answer}: the one it was trained with"
    )
    sentences: SentenceControl | None = Field(
        None,
        description="ask for levels before each sentence (method ldc); rollouts.max_new_tokens is for a sentence, and "
        "traces hold no log-probs",
    )
    seed: int = 0
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: as torch chooses")

    @model_validator(mode="after")
    def _sentences_alone(self) -> SampleSettings:
        if self.sentences is not None and (self.beams is not None or self.revisions):
            other = "beams" if self.beams is not None else "revisions"
            raise ValueError(f"`sentences` draws answers sentence by sentence: leave out `{other}`")
        return self

    @model_validator(mode="after")
    def _template_of_revisions(self) -> SampleSettings:
        check_revisions(self.revisions, self.revision_template)
        return self

    @model_validator(mode="after")
    def _search_draws_nothing(self) -> SampleSettings:
        if self.beams is None:
            if self.value is not None:
                raise ValueError("`value` guides a search: set `beams` to its width")
            return self
        if not self.rollouts.samples_per_prompt <= self.beams <= self.rollouts.max_batch:
            raise ValueError(
                f"beams {self.beams} must be at least rollouts.samples_per_prompt "
                f"({self.rollouts.samples_per_prompt}) and at most rollouts.max_batch ({self.rollouts.max_batch})"
            )
        idle = sorted({"temperature", "top_p", "top_k"} & self.rollouts.model_fields_set)
        idle = [f"rollouts.{key}" for key in idle] + ["stop_at_correct"] * (self.stop_at_correct is not None)
        idle += ["samples_per_round"] * (self.samples_per_round is not None)
        if idle:
            raise ValueError(f"`beams` searches and draws nothing: {', '.join(idle)} would have no effect")
        return self

    @model_validator(mode="after")
    def _without_a_trainer(self) -> SampleSettings:
        check_rollouts(self.rollouts, beams=self.beams)
        check_shared(self.workers, self.verifier)
        return self

    @model_validator(mode="after")
    def _pictures_here(self) -> SampleSettings:
        if self.model.pictures is not None:
            others = {"rollouts.engine": self.rollouts.engine != "transformers", "workers": self.workers > 1}
            others |= {"value": self.value is not None, "sentences": self.sentences is not None}
            for key in (key for key, other in others.items() if other):
                raise ValueError(f"`{key}` is not built for pictures: sample by transformers, in one process")
        return self

    @model_validator(mode="after")
    def _no_adapter(self) -> SampleSettings:
        if self.model.adapted:
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
    verifier: list[AnyVerifier] | None = Field(None, min_length=1, description="default: they are not verified")
    verifier_pool: VerifierPoolConfig = VerifierPoolConfig()
    output: str = Field(description="file for the traces, .jsonl; its manifest is written beside it")


class ConversationData(Section):
    """Conversations that were agents' episodes."""

    completions: FileSource


class TakeInEpisodesConfig(Section):
    """Episodes out of conversations with rewards: `posttrain prepare episodes`."""

    data: ConversationData
    reward: str = Field(
        "reward",
        description="column with the reward of a conversation, a number that its last action gets, or a list of one "
        "for each assistant turn",
    )
    success: str | None = Field(
        None, description="column with true or false: whether it was solved; default: the sum of rewards says it"
    )
    output: str = Field(description="file for the episodes, .jsonl")


class StepLabelConfig(Section):
    """Labels of the steps of traces, by completions from behind each: `posttrain prepare steps`."""

    model: TextModel
    traces: list[str] = Field(min_length=1, description="trace files; those cut at the token limit are left out")
    verifier: list[AnyVerifier] = Field(min_length=1, description="says which completions are right")
    verifier_pool: VerifierPoolConfig = VerifierPoolConfig()
    separator: str = Field("\n", min_length=1, description="text between two steps")
    samples: int = Field(8, ge=1, description="completions from behind each step")
    threshold: float | None = Field(
        None, gt=0, le=1, description="share of right completions from which on a step is labelled right; default: any"
    )
    max_new_tokens: int = Field(512, ge=1, description="tokens of a completion")
    temperature: float = Field(1.0, gt=0, description="of the completions")
    max_batch: int = Field(64, ge=1, description="sequences that the engine holds at once; no effect on the result")
    traces_per_chunk: int = Field(64, ge=1, description="traces given to the engine at once; no effect on the result")
    seed: int = Field(0, description="of the draws")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: as torch chooses")
    output: str = Field(description="file for the rows, .jsonl; a report is written beside it")

    @model_validator(mode="after")
    def _no_adapter(self) -> StepLabelConfig:
        if self.model.adapted:
            raise ValueError("an adapter section has no effect on sampling: give the trained model's folder as path")
        return self


class TraceSettings(Section):
    """Which of the completions of a prompt are used, and what they are compared by."""

    score: Literal["reward", "outcome"] = Field("reward", description="what completions are compared by")
    unfinished: bool = Field(False, description="also use completions that were cut at the token limit")


class ResponseSettings(TraceSettings):
    """Rows of n scored completions of one prompt: `posttrain prepare responses`."""

    n: int = Field(4, ge=2, description="different completions per row; a prompt with fewer gives none")
    choose: Literal["spread", "random"] = Field(
        "spread",
        description="which n: the best, the worst and evenly by rank between them; or drawn at random, as methods need "
        "that estimate an expectation over the policy's own samples",
    )
    seed: int = Field(0, description="of the draw, and of the order of equally good ones")


class CompletionSettings(Section):
    """Written completions out of correct traces (rejection sampling): `posttrain prepare completions`."""

    per_problem: int | None = Field(None, ge=1, description="different completions per problem at most; default: all")
    seed: int = Field(0, description="of the choice among more")


class PairSettings(TraceSettings):
    """How pairs are made of scored completions."""

    strategy: Literal["best_worst", "margin", "ranked", "second_best"] = Field(
        "best_worst",
        description="best against worst; all pairs above `margin`; the best against every lower one; second best "
        "against worst, with the best as gold",
    )
    margin: float = Field(0.0, ge=0.0, description="smallest difference of scores; equal scores never make a pair")
    max_pairs: int | None = Field(None, ge=1, description="pairs per prompt, drawn at random; default: all")
    seed: int = Field(0, description="of the choice between equally good ones, and of what max_pairs keeps")


class PrefixSettings(Section):
    """Where prefixes are cut from correct traces; names and meaning as in the method `prefixrl`."""

    fraction_low: float = Field(0.4, ge=0, lt=1, description="shortest prefix, as a share of its trace's tokens")
    fraction_high: float = Field(0.8, gt=0, le=1, description="longest prefix, as a share of its trace's tokens")
    cuts_per_problem: int = Field(3, ge=1, description="prefixes of a problem, over its traces in turn")
    boundary: Literal["token", "line"] = Field("token", description="where a prefix may end")
    separator: str = Field("\n", min_length=1, description="text that ends a line; boundary line only")
    answer_pattern: Pattern | None = Field(
        None, description="where the final answer begins, which no prefix shows; default: the reference as a word"
    )
    cut_seed: int = Field(0, ge=0, description="of the cuts")

    @model_validator(mode="after")
    def _range(self) -> PrefixSettings:
        if self.fraction_low > self.fraction_high:
            raise ValueError(f"fraction_low {self.fraction_low} is above fraction_high {self.fraction_high}")
        return self
