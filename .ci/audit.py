"""Looks the locked versions up in a data base of known vulnerabilities, with pip-audit.

Of all locks at once; a package that several have is looked up once. No two may have different versions of one.

Exit status: 0 if none is known, or if nobody could be asked (then it says what was skipped and why); 1 if one is known;
the tool's own status if it fails in another way. With `--strict`, as for a release, it is 1 too if any package could
not be looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOCK, MORE = "requirements.lock", "locks/*.lock"
AUDIT = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
NO_NETWORK = (
    "ConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
    "SSLError",
    "NameResolutionError",
    "Max retries exceeded",
    "Could not connect",
    "Tunnel connection failed",
    "Could not find a version",
)
"""How the tools say that nobody answered."""


def main(strict: bool = False) -> int:
    """Install the tool if it is missing, ask, and say what came of it."""
    locks = [Path(LOCK), *sorted(Path().glob(MORE))]
    try:
        installed = subprocess.run([sys.executable, "-m", "pip_audit", "--version"], capture_output=True)
        if installed.returncode != 0:
            asked = run(["-m", "pip", "install", "--quiet", "pip-audit"])
            if asked.returncode != 0:
                return skipped(asked, strict) if unreachable(asked) else failed(asked)
        found = run([*AUDIT, *(word for lock in locks for word in ("--requirement", str(lock)))])
    except subprocess.TimeoutExpired as error:
        print(f"audit skipped: no answer within {error.timeout:g} s", file=sys.stderr)
        return int(strict)
    if found.returncode not in (0, 1) or not found.stdout.strip():
        return skipped(found, strict) if unreachable(found) else failed(found)
    rows = json.loads(found.stdout)["dependencies"]
    known = [(row, flaw) for row in rows for flaw in row.get("vulns", ())]
    for row, flaw in known:
        mended = ", ".join(flaw.get("fix_versions", ())) or "no version yet"
        print(f"{row['name']} {row['version']}: {flaw['id']}, mended in {mended}")
    reasons = {row["name"]: row["skip_reason"] for row in rows if "skip_reason" in row}
    if len(reasons) == len(rows):
        why = next(iter(reasons.values()), "nothing is locked")
        print(f"audit skipped, not one of {len(rows)} packages could be looked up: {why}", file=sys.stderr)
        return int(strict)
    print(f"audit: {len(rows) - len(reasons)} packages of {len(locks)} locks, {len(known)} known vulnerabilities")
    if reasons:
        print(f"not audited: {', '.join(reasons)}")
    return 1 if known or (strict and reasons) else 0


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """This Python with the arguments, at most ten minutes."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)


def unreachable(process: subprocess.CompletedProcess[str]) -> bool:
    """Whether it failed for want of a network."""
    return any(sign in process.stderr for sign in NO_NETWORK)


def skipped(process: subprocess.CompletedProcess[str], strict: bool) -> int:
    """Say that nothing was audited."""
    print(f"audit skipped, the data base cannot be reached: {last_line(process)}", file=sys.stderr)
    return int(strict)


def failed(process: subprocess.CompletedProcess[str]) -> int:
    """Hand on a failure that has another reason."""
    print(process.stderr, file=sys.stderr)
    return process.returncode or 1


def last_line(process: subprocess.CompletedProcess[str]) -> str:
    """What the tool said last."""
    return (process.stderr.strip().splitlines() or ["no reason given"])[-1][:200]


if __name__ == "__main__":
    sys.exit(main(strict=sys.argv[1:] == ["--strict"]))
