"""The files of launch/ for containers and clusters: among each other, and as their own readers have them."""

import re
import shutil
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "launch" / "docker").glob("*.Dockerfile"))
KUBERNETES, SKYPILOT = ROOT / "launch" / "kubernetes" / "train.yaml", ROOT / "launch" / "skypilot" / "train.yaml"


def shell_is_sound(text):
    """The shell reads it, and files of the project that it names are there."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    named = re.findall(r"launch/[\w./-]+", text)
    assert named and all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images(file):
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[1].startswith(f"#   docker build --file {file.relative_to(ROOT)} ")
    for sources in re.findall(r"^COPY (.*) \./$", text, flags=re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"ARG EXTRAS=(\S+)", text + "ARG EXTRAS=dev")[0].split(",")) <= set(extras)
    last = re.findall(r"^USER (\S+)$", text, flags=re.MULTILINE)[-1]
    assert last == "1000" and f"useradd --create-home --uid {last}" in text, "runs as no administrator"
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", str(file)], check=True)


def test_an_image_holds_what_the_package_is_built_of():
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"posttrain", "pyproject.toml", "README.md", "requirements.lock", "launch"} <= set(kept)
    assert all((ROOT / name).exists() for name in kept)


def test_the_job_of_kubernetes():
    service, policy, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == labels
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(given["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(given["GPUS"])
    (line,) = container["args"]
    first = re.search(r"--main_process_ip (\S+)", line)[1]
    assert first == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert set(re.findall(r"\$(\w+)", line.replace("$((", ""))) <= {*given, "JOB_COMPLETION_INDEX"}
    shell_is_sound(line.replace("/opt/posttrain/", ""))
    volumes = {each["name"] for each in job["spec"]["template"]["spec"]["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == volumes
    if find_spec("kubernetes_validate"):
        import kubernetes_validate

        for resource in (service, policy, job):
            kubernetes_validate.validate(resource, "1.32", strict=True)


def test_the_task_of_skypilot(monkeypatch, tmp_path):
    task = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))
    shell_is_sound(task["run"])
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    assert (ROOT / task["envs"]["RECIPE"]).is_file()
    if find_spec("sky"):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(ROOT)
        import sky

        assert sky.Task.from_yaml(str(SKYPILOT)).num_nodes == 1
