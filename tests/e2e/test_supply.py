"""The lock file and the bill of materials say what is installed, and nothing about where it came from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import posttrain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def supply():
    def run(kind):
        command = [sys.executable, str(ROOT / ".ci" / "supply.py"), kind]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run


@pytest.fixture(scope="module")
def declared():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]


def pins(text):
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_the_lock_file_is_within_the_declared_ranges(declared):
    locked = pins((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    for requirement in declared:
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    assert "huggingface-hub" in locked and "posttrain" not in locked


def test_a_lock_is_made_of_what_is_installed(supply, declared):
    locked = pins(supply("lock"))
    assert {canonicalize_name(requirement.name) for requirement in declared} <= set(locked)


def test_bill_of_materials(supply):
    bill = json.loads(supply("sbom"))
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "posttrain")
    assert bill["metadata"]["component"]["version"] == posttrain.__version__
    versions = {part["name"]: part["version"] for part in bill["components"]}
    assert versions == pins(supply("lock"))
    assert all(part["purl"] == f"pkg:pypi/{part['name']}@{part['version']}" for part in bill["components"])
    assert supply("sbom") == supply("sbom")
