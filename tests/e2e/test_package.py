"""What is published: an archive of the sources, and a wheel made of that alone, with all that the program reads."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import posttrain

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools.build_meta import {what}; print({what}(sys.argv[1]))"
READ = {"posttrain/py.typed", "posttrain/report/template.html", "posttrain/report/vendor/uPlot.iife.min.js"}


def build(what, folder, out):
    command = [sys.executable, "-c", BUILD.format(what=what), str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Sources to an archive, the archive to a wheel."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "posttrain", folder / "tree/posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "tree")
    archive = build("build_sdist", folder / "tree", folder)
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    return build("build_wheel", next((folder / "unpacked").iterdir()), folder)


def test_the_wheel_holds_all_of_the_program(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    assert held >= {str(file.relative_to(ROOT)) for file in (ROOT / "posttrain").rglob("*.py")} | READ
    assert not [name for name in held if name.startswith(("tests/", "build/", "docs/"))]


def test_it_runs_where_it_was_installed(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)
    env = os.environ | {"PYTHONPATH": str(site)}
    said = subprocess.run([str(site / "bin" / "posttrain"), "--version"], env=env, cwd=tmp_path, capture_output=True)
    assert said.stdout.decode() == f"posttrain {posttrain.__version__}\n"
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert found.version == posttrain.__version__
    assert {"trackers", "docs", "vllm", "deepspeed"} <= set(found.metadata.get_all("Provides-Extra"))
