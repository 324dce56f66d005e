"""Runs and reports to make pages of, and a real Chromium without a window to open them in.

The browser is driven over its debugging pipe, for which no package is needed.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.evaluation.report import SCHEMA, BenchmarkReport, Pass, ProblemRecord, Report, SamplingReport, Written
from posttrain.evaluation.runs import RunScore
from posttrain.evaluation.seeds import comparison_of
from posttrain.evaluation.sequential import SequentialPlan, first_useful_look
from posttrain.evaluation.statistics import mean_interval
from posttrain.safe_files import write_json_atomic
from posttrain.tracking.tracker import Tracker
from posttrain.verifiers.verdict import Status

SECONDS = 60.0
"""A page that is not there by then is broken; a healthy one takes a few."""


class Chromium:
    """One browser; `open` makes a page."""

    def __init__(self, binary: str, profile: Path) -> None:
        (read, theirs_out), (theirs_in, self._write) = os.pipe(), os.pipe()
        self._read, self._rest, self._last, self.events = read, b"", 0, []
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--disable-gpu", "--disable-dev-shm-usage", "--no-sandbox"]  # a container lets root make none
        # The debugging pipe is at descriptors 3 and 4.
        redirected = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirected, binary, *options],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; what happens meanwhile is put into `events`."""
        self._last += 1
        call = {"id": self._last, "method": method, "params": parameters}
        os.write(self._write, json.dumps(call | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], SECONDS)[0], "the browser does not answer"
            self._rest += os.read(self._read, 1 << 20)
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def open(self, file: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send("Page.navigate", url=file if isinstance(file, str) else file.as_uri())
        page.wait("document.documentElement?.dataset.ready === 'yes'")
        return page

    def close(self) -> None:
        self.send("Browser.close")
        self.process.wait(timeout=SECONDS)
        os.close(self._read)
        os.close(self._write)


class Page:
    """A page of the browser."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self.browser, self.session, self.target = browser, session, target

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **parameters)

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.ask(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        box = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key: a character, or a name such as `ArrowRight`."""
        text = {"text": key} if len(key) == 1 else {}
        code = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "End": 35, "Escape": 27}.get(key, 0)
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def write(self, text: str) -> None:
        """Text as typed into the field that has the focus."""
        self.send("Input.insertText", text=text)

    def choose(self, label: str, value: str) -> None:
        """Choose the option of a value in the field of a label."""
        self.ask(
            f"(() => {{ const [label, value] = {json.dumps([label, value])};"
            "const all = [...document.querySelectorAll('label')].filter(each => each.firstChild.data === label);"
            "const field = all[0].querySelector('select'); field.value = value;"
            "field.dispatchEvent(new Event('change')) })()"
        )

    @property
    def complaints(self) -> list[Any]:
        """Errors and warnings of the console, uncaught exceptions, and requests beside that for the file itself."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, what = event["method"], event["params"]
            if (
                method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
                or (method == "Log.entryAdded" and what["entry"]["level"] in ("warning", "error"))
                or (method == "Network.requestWillBeSent" and what["type"] != "Document")
            ):
                found.append(what)
        return found

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium: apt-get install chromium")
    browser = Chromium(binary, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def opened(chromium: Chromium) -> Iterator[Callable[..., Page]]:
    """Opens a file or address in a page that is closed after the test."""
    pages: list[Page] = []

    def open(file: Path | str, **options: Any) -> Page:
        pages.append(chromium.open(file, **options))
        return pages[-1]

    yield open
    for page in pages:
        page.close()


# ------------------------------------------------------------------------------------------------------------ records

SAMPLING = SamplingReport(greedy=True, samples=1, k=(1,), temperature=1.0, top_p=1.0, max_new_tokens=64, seed=0)
RECIPE = (
    "model: {path: start}\nmethod: {name: METHOD}\ndata: {prompts: {path: sums.csv}}\ntraining: {max_steps: STEPS}\n"
)


@pytest.fixture
def make_report() -> Callable[..., Report]:
    """A report of greedy verdicts on one benchmark: `make_report("base", "++-")`, `+` is right."""

    def make(label: str, verdicts: str, name: str = "sums") -> Report:
        statuses = [Status.CORRECT if each == "+" else Status.WRONG for each in verdicts]
        records = tuple(
            ProblemRecord(
                id=f"{name}/{i}",
                greedy=status,
                samples=1,
                judged=1,
                correct=0,
                prompt=f"<b>What is {i}?",
                reference=str(i),
                completions=(Written("greedy", status, f"Written {i} by {label}"),),
            )
            for i, status in enumerate(statuses)
        )
        right, total = statuses.count(Status.CORRECT), len(statuses)
        benchmark = BenchmarkReport(
            name=name,
            data={"path": "sums.csv"},
            verifier=[{"type": "numeric"}],
            problem_hash="feedface",
            repeated=0,
            sampling=SAMPLING,
            metrics={"greedy": mean_interval([float(each == "+") for each in verdicts]), "avg@1": None},
            greedy=Pass(total, 1, {Status.CORRECT: right, Status.WRONG: total - right}, 90, 300),
            sampled=Pass(total, 0, {Status.WRONG: total}, 90, 12 * total),
            seconds=1.0,
            records=records,
        )
        return Report(SCHEMA, label, "2030-01-01T00:00:00+00:00", "Engine", "template", {}, 2.0, (benchmark,))

    return make


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """A run folder: `values` per step beside reward and compute, `samples` and `tokens` as lines of its transcripts."""

    def make(
        folder: Path,
        steps: int = 20,
        *,
        method: str = "grpo",
        values: Callable[[int], dict[str, float]] = lambda step: {"reward": step / 20, "accuracy": step / 20},
        samples: Sequence[dict[str, Any]] = (),
        tokens: Sequence[dict[str, Any]] = (),
        evaluations: Mapping[int, Report] | None = None,
    ) -> Path:
        tracker = Tracker(folder, console="off", total_steps=steps)
        for step in range(1, steps + 1):
            spent = {
                "tokens_trained": 100,
                "tokens_sampled": 50,
                "tokens_scored": 0,
                "tokens_prompt": 10,
                "flops": 10**9,
            }
            totals = {f"{name}_total": amount * step for name, amount in spent.items()}
            clock = {"cpu_seconds_total": 2.0 * step, "wall_seconds": 1.5 * step}
            tracker.log(step, values(step) | spent | totals | clock)
        tracker.close(plots=False)
        recipe = RECIPE.replace("METHOD", method).replace("STEPS", str(steps))
        (folder / "resolved.yaml").write_text(recipe, encoding="utf-8")
        (folder / "environment.json").write_text('{"packages": {"torch": "2.13.0"}, "gpus": []}', encoding="utf-8")
        (folder / "data.json").write_text('{"kept": 400, "dropped": 0, "bad": {}}', encoding="utf-8")
        (folder / "model").mkdir()
        for name, rows in (("samples.jsonl", samples), ("tokens.jsonl", tokens)):
            if rows:
                (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for step, report in (evaluations or {}).items():
            report.save(folder / "evaluation" / f"step-{step:06d}.json")
        return folder

    return make


@pytest.fixture
def make_samples() -> Callable[[int], list[dict[str, Any]]]:
    """`make_samples(n)`: groups of 4 completions of a problem, 10 problems in turn; the first `step % 4` are right."""

    def make(n: int) -> list[dict[str, Any]]:
        return [
            {
                "step": row // 4,
                "problem": f"prompts/{row // 4 % 10}",
                "prompt": f"<|im_start|>user\nWhat is {row // 4 % 10} + 1?<|im_end|>\n",
                "completion": f"Completion {row}: I think that it is {row % 7}.",
                "reference": str(row // 4 % 10 + 1),
                "verdict": "correct" if row % 4 < row // 4 % 4 else "wrong",
                "reward": float(row % 4 < row // 4 % 4),
                "advantage": 0.5 if row % 4 < row // 4 % 4 else -0.5,
                "finished": True,
            }
            for row in range(n)
        ]

    return make


@pytest.fixture
def make_pairs() -> Callable[[int], list[dict[str, Any]]]:
    """`make_pairs(n)`: one pair a step, the chosen response ahead in every other one; the second token decides."""

    def response(text: str, reward: float) -> dict[str, Any]:
        values = {"logp": [-0.5, -2.0, -0.25], "reward": [0.0, reward, 0.125]}
        return {"text": ["It ", text, "<eos>"], "trained": [1, 1, 1], **values}

    def make(n: int) -> list[dict[str, Any]]:
        return [
            {"step": step, "prompt": f"<|user|>Question {step}", "margin": reward * 2}
            | {"chosen": response(f"good{step}", reward), "rejected": response(f"bad{step}", -reward)}
            for step, reward in ((step, 1.5 if step % 2 else -0.5) for step in range(n))
        ]

    return make


@pytest.fixture
def make_study() -> Callable[..., Path]:
    """`make_study(folder, {"arm": [scores by seed]})`: the folder of a study whose test decides where it can."""

    def make(folder: Path, arms: Mapping[str, Sequence[float]]) -> Path:
        def cell(seed: int, score: float) -> dict[str, Any]:
            spent = {"flops": 3e9, "tokens_trained": 300, "cpu_seconds": 30.0}
            points = [
                {
                    "step": step,
                    "score": score * step / 3,
                    "flops": 1e9 * step,
                    "tokens": 100 * step,
                    "seconds": 10 * step,
                }
                for step in range(4)
            ]
            found = {"seed": seed, "setting": {"training.learning_rate": 1e-3}, "key": f"{seed}", "error": ""}
            told = {
                "score": score,
                "run": f"runs/{seed}",
                "report": "report.json",
                "steps": 3,
                "scores": {"sums": score},
            }
            return found | told | {"spent": spent, "bought": {}, "curve": points}

        runs = {
            name: [RunScore(f"runs/{name}/{seed}", 3, 3e9, {"sums": score}, {}) for seed, score in enumerate(scores)]
            for name, scores in arms.items()
        }
        seeds = len(next(iter(arms.values())))
        plan = {"methods": list(arms), "benchmarks": ["sums"], "measure": "greedy", "seeds_per_look": seeds, "looks": 1}
        written = plan | {"alpha": 0.05, "tolerance": 0.05, "seed": 0}
        enough = first_useful_look(SequentialPlan(seeds, 1)) is not None and len(arms) > 1
        compared = comparison_of(runs, SequentialPlan(seeds, 1), written).to_dict() if enough else None
        study = {
            "schema": 1,
            "study": folder.name,
            "config": {"evaluate": {"measure": "greedy"}, "budget": {"flops": 3e9}},
            "plan": {"arms": list(arms), "seeds": list(range(seeds)), "measure": "greedy", "sequential": None},
            "changes": [],
            "arms": [
                {
                    "name": name,
                    "setting": {"training.learning_rate": 1e-3},
                    "tuned": [
                        {"setting": {"training.learning_rate": rate}, "score": rate * 100} for rate in (1e-3, 3e-3)
                    ],
                    "tuning": [],
                    "cells": [cell(seed, score) for seed, score in enumerate(scores)],
                    "complete": True,
                }
                for name, scores in arms.items()
            ],
            "comparison": compared,
            "undecidable": "" if enough else f"{seeds} seeds of each arm cannot tell any two apart at an error of 0.05",
        }
        write_json_atomic(folder / "study.json", study)
        return folder

    return make
