"""What listens on a network does so on the job's interface and with a key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "slurm"


@pytest.mark.parametrize(("head", "name"), [("127.0.0.1", "lo"), ("localhost", "lo"), (None, "")])
def test_ranks_listen_on_the_interface_of_the_first_machine(head: str | None, name: str, tmp_path: Path) -> None:
    stand_in = tmp_path / "accelerate"
    stand_in.write_text('#!/bin/sh\necho "$GLOO_SOCKET_IFNAME,$NCCL_SOCKET_IFNAME"\n')
    stand_in.chmod(0o755)
    (tmp_path / "ip").write_text(
        '#!/bin/sh\n[ "$3" = addr ] && echo "1: lo    inet 127.0.0.1/8 scope host lo"\n'
        'echo "10.0.0.1 dev ib0 src 10.0.0.2"\n'
    )
    (tmp_path / "ip").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    arguments = ["--num_machines", "2", *(["--main_process_ip", head] if head else []), "-m", "posttrain"]
    command = [LAUNCH / "launch_node.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{name},{name}\n"
    chosen = environment | {"GLOO_SOCKET_IFNAME": "eth1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=chosen)
    assert done.stdout == f"eth1,{name}\n"


def test_ray_of_a_job_has_a_key_and_a_folder_of_its_own() -> None:
    script = (LAUNCH / "sample_with_ray.sbatch").read_text()
    assert "RAY_AUTH_MODE=token" in script and "--temp-dir" in script and "mkdir -m 700" in script
    assert script.count("ray start") == 1, "no node starts it in another way"


def test_ray_of_this_process_has_a_key() -> None:
    """Ray listens on all interfaces and runs what it is sent."""
    source = (
        "import os; from posttrain.rollouts import workers as w; w.require = lambda *_: None; w.require_ray(None); "
        "print(os.environ['RAY_AUTH_MODE'], len(os.environ['RAY_AUTH_TOKEN']))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["token", "64"]
