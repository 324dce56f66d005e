"""What tests of code need."""

from __future__ import annotations

import pytest

from posttrain.errors import StackError
from posttrain.verifiers.sandbox import Limits, Sandbox


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """Skips where bubblewrap is missing or may not make namespaces."""
    try:
        Sandbox(Limits()).check()
    except StackError as error:
        pytest.skip(error.what)
