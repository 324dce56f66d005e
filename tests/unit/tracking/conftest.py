import pytest

from posttrain.tracking.metrics import METRICS, require


@pytest.fixture
def undeclared():
    """What a test logs without declaring it is forgotten behind it."""
    before = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(before)
    require.cache_clear()
