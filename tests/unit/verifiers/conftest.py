"""What tests of code need, and the tables beside the tests for them to import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from posttrain.errors import StackError
from posttrain.verifiers.sandbox import Limits, Sandbox

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """Skips where bubblewrap is missing or may not make namespaces."""
    try:
        Sandbox(Limits()).check()
    except StackError as error:
        pytest.skip(error.what)
