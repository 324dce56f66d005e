"""What `posttrain compare` is told when it compares methods over seeds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from posttrain.config.schema import Section


class CompareConfig(Section):
    """Methods, each with the folders of its runs. The plan of the test must be fixed before the first look."""

    methods: dict[str, list[str]] = Field(
        min_length=2, description="name -> folders of its runs, one per seed, in the order in which they were run"
    )
    benchmarks: list[str] | None = Field(
        None, min_length=1, description="of the evaluations; a run's score is their mean; default: all they share"
    )
    measure: str = Field("greedy", description="greedy, avg@n, pass@k or maj@k")
    report: str | None = Field(
        None, description="report within each run folder; default: the last evaluation while training"
    )
    seeds_per_look: int = Field(3, ge=1, description="seeds of each method between two looks at the result")
    looks: int = Field(5, ge=1, description="looks at most")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="probability that any two methods that are alike are told apart, at any look"
    )
    compute: Literal["require", "match", "report"] = Field(
        "require",
        description="unequal compute: refuse; or score each run at its last evaluation within the smallest budget "
        "(and the tolerance); or go on and say so",
    )
    tolerance: float = Field(0.1, ge=0, description="compute counts as equal if the largest is at most this much more")
    seed: int = Field(0, description="of random permutations and the bootstrap")

    @field_validator("methods")
    @classmethod
    def _have_runs(cls, methods: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, runs in methods.items():
            if not runs:
                raise ValueError(f"method {name!r} has no runs")
        folders = [run for runs in methods.values() for run in runs]
        twice = next((run for run in folders if folders.count(run) > 1), None)
        if twice is not None:
            raise ValueError(f"the run {twice!r} is given twice")
        return methods
