"""What a report of many samples costs: `python bench/report_page.py [--samples 50000]`. Needs a Chromium.

CPU seconds of making the page, and of all processes of a Chromium that opens it at its samples and writes out what it
then shows, less those for an empty page. Completions are of 150 random words.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil

from posttrain.report.collect import collect
from posttrain.report.page import page
from posttrain.terminal import say

GROUP = 8


def write_run(folder: Path, samples: int) -> Path:
    """A run with that many samples, and metrics of every group."""
    rng, words = random.Random(0), [f"word{number}" for number in range(3000)]
    metrics, rows = [], []
    for step in range(1, samples // GROUP + 1):
        metrics.append({"step": step, "time": float(step), "reward": rng.random(), "entropy": 0.5, "grad_norm": 1.0})
        for _ in range(GROUP):
            verdict = rng.choice(("correct", "wrong", "no_answer"))
            completion = " ".join(rng.choices(words, k=150))
            row = {"step": step, "problem": f"prompts/{step % 2000}", "prompt": f"Problem {step % 2000}"}
            rows.append(row | {"completion": completion, "verdict": verdict, "reward": rng.random(), "advantage": 0.1})
    for name, lines in (("metrics.jsonl", metrics), ("samples.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def seconds_to_show(address: str, folder: Path) -> tuple[float, str]:
    """CPU seconds of the browser, whose processes are asked while they live, and the document that it wrote out."""
    browser = shutil.which("chromium") or "chromium"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", address]
    spent: dict[int, float] = {}
    with (folder / "shown.html").open("wb") as shown:
        running = psutil.Popen([browser, *options], stdout=shown, stderr=subprocess.DEVNULL)
        while running.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for process in (running, *running.children(recursive=True)):
                    times = process.cpu_times()
                    spent[process.pid] = times.user + times.system
            time.sleep(0.02)
    return sum(spent.values()), (folder / "shown.html").read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        collected = collect([write_run(folder, arguments.samples)])
        started = time.process_time()
        text = page(collected)
        spent_here = time.process_time() - started
        say(f"page of {arguments.samples:,} samples: {len(text) / 1e6:.1f} MB, {spent_here:.1f} CPU s")
        file = folder / "page.html"
        file.write_text(text, encoding="utf-8")
        spent = []
        for _ in range(arguments.repeats):
            empty, _ = seconds_to_show("about:blank", folder)
            opened, shown = seconds_to_show(f"{file.as_uri()}#samples", folder)
            assert f"{arguments.samples:,} of {arguments.samples:,} samples" in shown, "no samples on the page"
            spent.append(opened - empty)
        say(f"to open it at its samples: {median(spent):.2f} CPU s ({min(spent):.2f} to {max(spent):.2f})")


if __name__ == "__main__":
    main()
