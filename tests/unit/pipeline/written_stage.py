"""A stage kind that writes a text file, for tests of everything around a stage. As a script: run a pipeline with it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from posttrain.config.schema import FileSource, Section
from posttrain.errors import DataError
from posttrain.pipeline.inputs import local_paths
from posttrain.pipeline.runner import run_pipeline
from posttrain.pipeline.schema import substitute
from posttrain.pipeline.stages import STAGES, Stage


class WriteConfig(Section):
    text: str
    data: FileSource | None = None
    pause: str | None = None  # a file; the stage waits while it exists
    fail: bool = False
    bad: bool = False


class WriteStage(Stage):
    """Writes its text, with data and referenced files put in place of their paths, to `text.txt`."""

    Config = WriteConfig
    artefacts = {"text": "text.txt"}
    without_effect = ("pause", "fail")

    def resolved(self, resolve):
        return WriteConfig.model_validate(substitute(self.entry.config.model_dump(), resolve))

    def check(self, earlier):
        if self.entry.config.bad:
            raise DataError("bad from the start", where="text")

    def run(self, resolve, *, interrupted):
        config = self.resolved(resolve)
        with (self.folder / "attempts.log").open("a") as log:
            log.write("continued\n" if interrupted else "fresh\n")
        (self.folder / "part.txt").write_text("half")
        while config.pause is not None and Path(config.pause).exists():
            time.sleep(0.02)
        if config.fail:
            raise DataError("cannot write")
        parts = [Path(word).read_text() if Path(word).is_file() else word for word in config.text.split()]
        parts += [path.read_text() for path in local_paths(config)]
        (self.folder / "text.txt").write_text(" ".join(parts))

    def can_continue(self):
        return (self.folder / "part.txt").exists()


if __name__ == "__main__":
    STAGES["write"] = WriteStage
    run_pipeline(Path(sys.argv[1]), sys.argv[2:])
