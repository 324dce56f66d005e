"""An evaluation by several workers: every chunk of every pass of every benchmark goes to one that is free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from posttrain.config.schema import VerifierPoolConfig
from posttrain.data.rendering import Renderer
from posttrain.errors import EngineError
from posttrain.evaluation.journal import Chunk, Journal
from posttrain.evaluation.passes import Outcome, PassPlan, PreparedBenchmark, missing, outcome_of
from posttrain.models.loading import load_policy
from posttrain.rollouts.engine import Engine
from posttrain.rollouts.standalone import EngineSettings, Extent, open_engine
from posttrain.rollouts.workers import run_on_workers
from posttrain.state.identity import contents
from posttrain.verifiers.judge import build_judge


@dataclass(frozen=True, slots=True)
class EvaluationPart:
    """A chunk that is to be made: (number of the benchmark, name of the pass), its plan, key and problems."""

    place: tuple[int, str]
    plan: PassPlan
    key: str
    problems: slice


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A `Job`: what a worker needs to evaluate like the command itself.

    Attributes:
        settings: of the engine, the model included.
        extent: sizes the engine.
        seed: of a model without a path.
        prepared: the benchmarks.
        pool: how verifiers run.
        content: hashes of the model, as the command found it.
    """

    settings: EngineSettings
    extent: Extent
    seed: int
    prepared: tuple[PreparedBenchmark, ...]
    pool: VerifierPoolConfig
    content: dict[str, str]

    def open(self) -> Evaluation:
        """Load the policy.

        Raises:
            ModelError: as `load_policy`.
            EngineError: another model is found at that place than the command found.
        """
        policy, tokenizer = load_policy(self.settings.model, seed=self.seed)
        renderer = Renderer(tokenizer, generation_eos=policy.generation_config.eos_token_id)
        if content_of(renderer, policy) != self.content:
            raise EngineError(
                f"a worker finds another model at {self.settings.model.path!r} than the command did",
                where="model",
                hint="give a folder that all machines of the cluster share",
            )
        return Evaluation(self, open_engine(policy, tokenizer, renderer, self.settings, self.extent), renderer)


class Evaluation:
    """What a worker has opened. Parts come by benchmark, so one judge is open at a time."""

    def __init__(self, job: Evaluator, engine: Engine, renderer: Renderer) -> None:
        self.job, self.engine, self.renderer = job, engine, renderer
        self.number: int | None = None
        self.benchmark: PreparedBenchmark | None = None

    def run(self, part: EvaluationPart) -> Iterator[Chunk]:
        """The chunk."""
        number, _ = part.place
        if self.benchmark is None or self.number != number:
            if self.benchmark is not None:
                self.benchmark.judge.close()
            prepared = self.job.prepared[number]
            judge = build_judge(prepared.benchmark.verifier, self.job.pool)
            self.number, self.benchmark = number, replace(prepared, judge=judge)
        yield part.plan.chunk(self.engine, self.renderer, self.benchmark, part.key, part.problems)


def run_passes(
    job: Evaluator,
    plans: Sequence[Mapping[str, PassPlan]],
    journal: Journal | None,
    *,
    workers: int,
    address: str | None,
) -> dict[tuple[int, str], Outcome]:
    """All passes. What the journal has is not done again, and what is done is entered.

    Args:
        job: with as many benchmarks as there are `plans`.
        plans: the passes of every benchmark, by name.
        journal: None keeps nothing.
        workers, address: as `run_on_workers`.

    Raises:
        PosttrainError: as `run_on_workers` and `Evaluator.open`.
    """
    chunks: dict[tuple[int, str], list[Chunk]] = {}
    parts: list[EvaluationPart] = []
    for number, (prepared, named) in enumerate(zip(job.prepared, plans, strict=True)):
        for name, plan in named.items():
            place, key = (number, name), "" if journal is None else journal.key(plan.identity)
            chunks[place] = [] if journal is None else journal.done(key)
            wanted = missing(len(prepared.problems), chunks[place], plan.step)
            parts += [EvaluationPart(place, plan, key, part) for part in wanted]
    # Judges hold processes and do not travel; each worker has its own.
    sent = replace(job, prepared=tuple(replace(each, judge=None) for each in job.prepared))
    with closing(run_on_workers(sent, parts, workers=workers, address=address)) as results:
        for number, chunk in results:
            if journal is not None:
                journal.append(chunk)
            chunks[parts[number].place].append(chunk)
    return {place: outcome_of(made) for place, made in chunks.items()}


def content_of(renderer: Renderer, policy: PreTrainedModel) -> dict[str, str]:
    """Hashes of weights and chat template: what an evaluation is an evaluation of."""
    return contents((), (), renderer.template_hash, policy)["content"]
