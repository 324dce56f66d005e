"""`posttrain run`: check every stage, then run in order those whose inputs changed.

Reading order: `run_pipeline` is the whole story; `_Run.stage` is what happens with one stage.
"""

from __future__ import annotations

import gc
import os
import re
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from posttrain import terminal
from posttrain.config.locations import Locations
from posttrain.config.trust import Trusted
from posttrain.errors import PosttrainError, RecipeError, RecipeErrors, StackError, nearest
from posttrain.pipeline.cache import (
    StageRecord,
    Standing,
    examine,
    key_of,
    mark_done,
    mark_started,
    move_aside,
    read_records,
)
from posttrain.pipeline.inputs import input_paths
from posttrain.pipeline.schema import PipelineConfig, load_pipeline, references
from posttrain.pipeline.stages import STAGES, Stage, as_written
from posttrain.safe_files import refuse_linked_folders
from posttrain.state.lock import locked

LOCK = ".pipeline.lock"
_PLACE = re.compile(r"override '|.+\.ya?ml:\d")


def run_pipeline(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    until: str | None = None,
    force: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Run a pipeline, or what is left of it. Relative paths other than recipes are taken from the working directory.

    Args:
        path: the pipeline file.
        overrides: `output=...` or `<stage name>.<dotted key>=value`.
        until: last stage to run; default: all.
        force: stages to run although their result is there; stages that read them follow.
        console: where the progress goes; default: standard output.

    Raises:
        PosttrainError: something is wrong with a stage; raised before the first one runs where it can be known.
        KeyboardInterrupt: stopped by the user; the same call goes on from there.
    """
    _refuse_ranks()
    console = console or terminal.console()
    config, locations = load_pipeline(path, overrides, STAGES)
    stages = stages_of(config, locations, path)
    for name in (*force, *([until] if until else [])):
        if name not in {stage.name for stage in stages}:
            hint = nearest(name, (stage.name for stage in stages))
            raise RecipeError(f"no stage {name!r} in this pipeline", where=str(path), hint=hint)
    last = [stage.name for stage in stages].index(until) if until else len(stages) - 1
    command = shlex.join(["posttrain", "run", str(path), *overrides])
    run_stages(config, stages, console, last=last, force=force, command=command)


def run_stages(
    config: PipelineConfig,
    stages: Sequence[Stage],
    console: Console,
    *,
    last: int,
    command: str,
    force: Sequence[str] = (),
) -> None:
    """Check all stages and run those up to number `last`; the rest is as `run_pipeline`.

    Args:
        command: what goes on with a run that was broken off, for people.
    """
    check_stages(stages)
    run, output = _Run(config, stages, set(force), console, command), Path(config.output)
    for folder in (output, *(stage.folder for stage in stages)):
        refuse_linked_folders(folder)
    with locked(output / LOCK, lambda line: console.print(Text(line, style="yellow")), what="a run of a pipeline"):
        for stage in stages[: last + 1]:
            run.stage(stage)
            _free_memory()
    run.conclude(stages[: last + 1])


def stages_of(config: PipelineConfig, locations: Locations, file: Path, *, run_code: bool = True) -> list[Stage]:
    """The stages of a pipeline, each with its folder; recipes are named from the folder of `file`.

    Without `run_code` they are for being looked at: neither plugins nor code of models are run.
    """
    output = Path(config.output)
    return [
        STAGES[entry.kind](entry, output / entry.name, file, number, locations, run_code)
        for number, entry in enumerate(config.stages)
    ]


def trusted_by(stages: Sequence[Stage]) -> list[Trusted]:
    """What a run of the stages has one trust, with the name of the stage before each key.

    Raises:
        RecipeError: a stage cannot be read.
    """
    return [replace(each, key=f"{stage.name}: {each.key}") for stage in stages for each in stage.trusted()]


def check_stages(stages: Sequence[Stage], *, unread: Collection[str] = ()) -> None:
    """Check all stages, so that a mistake in the last one is not found after the first has run for hours.

    Args:
        stages: in their order.
        unread: names of those whose data and models are not looked at.

    Raises:
        PosttrainError: the only problem, or RecipeErrors with the first problem of every stage that has one.
    """
    found: list[PosttrainError] = []
    earlier: dict[str, Stage] = {}
    for stage in stages:
        try:
            read_records(stage.folder)
            _check_paths(stage, earlier)
            if stage.name not in unread:
                stage.check(earlier)
        except RecipeErrors as several:
            found += [_placed(error, stage) for error in several.errors]
        except PosttrainError as error:
            found.append(_placed(error, stage))
        earlier[stage.name] = stage
    if len(found) == 1:
        raise found[0]
    if found:
        raise RecipeErrors(found)


def _check_paths(stage: Stage, earlier: dict[str, Stage]) -> None:
    for path in input_paths(stage.resolved(as_written)):
        for other in earlier.values():
            if Path(path).resolve().is_relative_to(other.folder.resolve()):
                raise RecipeError(
                    f"{path!r} is made by stage {other.name!r}, and a plain path would hide that from the cache",
                    hint="write " + " or ".join(f"${{{other.name}.{artefact}}}" for artefact in other.artefacts),
                )


def _placed(error: PosttrainError, stage: Stage) -> PosttrainError:
    """The error with the stage's place in front, unless it names a place in a file or an override itself."""
    if _PLACE.match(error.where):
        return error
    error.where = f"{stage.place}: stage {stage.name}" + (f": {error.where}" if error.where else "")
    return error


class _Run:
    """One call of `run_pipeline`: which stages are done, and how that is told."""

    def __init__(
        self, config: PipelineConfig, stages: Sequence[Stage], force: set[str], console: Console, command: str
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.force, self.console, self.command = force, console, command
        self.records: dict[str, StageRecord] = {}
        self._say(Text.assemble(("pipeline ", "dim"), (config.pipeline, "bold"), (f" into {config.output}", "dim")))

    def stage(self, stage: Stage) -> None:
        """Use a stage's result if it is current, else make it."""
        inputs = stage.inputs(self._key)
        reads = {name: self.records[name].run_id for name, _ in references(stage.entry)}
        wanted = StageRecord(stage.name, key_of(inputs), inputs, reads)
        standing = examine(stage.folder, wanted, stage.artefacts)
        if standing.state == "done" and stage.name not in self.force:
            assert standing.record is not None  # what is cached has one
            self.records[stage.name] = standing.record
            self._header(stage, f"cached ({standing.record.finished})", "green")
            return
        interrupted, reasons = self._clear(stage, standing)
        self._header(stage, "goes on" if interrupted else "runs", "cyan")
        self._tell(reasons)
        mark_started(stage.folder, wanted)
        started = time.perf_counter()
        try:
            stage.run(self._path, interrupted=interrupted)
        except BaseException as error:
            self._broken_off(stage, error)
            raise
        self.records[stage.name] = mark_done(stage.folder, wanted, stage.artefacts)
        self._header(stage, f"done in {time.perf_counter() - started:.1f} s", "green")

    def conclude(self, stages: Sequence[Stage]) -> None:
        """Print the results, and where to look next."""
        for stage in stages:
            stage.conclude(self._path, self.console)
        self._say(Text("\nwhere to look next", style="bold"))
        for stage in stages:
            for label, target in stage.next_steps():
                self._say(Text(f"  {stage.name}: {label}: {target}"))

    def _clear(self, stage: Stage, standing: Standing) -> tuple[bool, list[str]]:
        """Move away what the stage cannot build on. Returns whether it goes on with what is there, and why it runs."""
        reasons = list(standing.reasons)
        if standing.record is None:
            return False, reasons
        if stage.name in self.force:
            reasons = ["asked for by force"]
        elif standing.state == "interrupted" and stage.can_continue():
            return True, reasons or [f"an attempt of {standing.record.started} was broken off"]
        elif standing.state == "interrupted":
            reasons = reasons or ["an attempt was broken off before there was anything to go on from"]
        kept = move_aside(stage.folder, standing.record.key)
        return False, [*reasons, f"earlier files are kept in {kept}"]

    def _broken_off(self, stage: Stage, error: BaseException) -> None:
        word = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self._header(stage, word, "red")
        self._tell([f"finished stages are kept; to go on from here: {self.command}"])

    def _key(self, name: str, artefact: str) -> str:
        return f"{as_written(name, artefact)}@{self.records[name].key}"

    def _path(self, name: str, artefact: str) -> str:
        stage = self.stages[name]
        return str(stage.folder / stage.artefacts[artefact])

    def _header(self, stage: Stage, state: str, style: str) -> None:
        position = f"[{stage.number + 1}/{len(self.stages)}] "
        kind = f" ({stage.entry.kind}) "
        self._say(Text.assemble((position, "dim"), (stage.name, "bold"), (kind, "dim"), (state, style)))

    def _tell(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._say(Text(f"      {line}", style="dim"))

    def _say(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def _refuse_ranks() -> None:
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise StackError(
            f"a pipeline runs in one process, and this is one of {ranks}",
            hint="launch its training stages one by one: `accelerate launch -m posttrain train RECIPE`",
        )


def _free_memory() -> None:
    """Drop what a stage's model left behind in reference cycles and in the allocator."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
