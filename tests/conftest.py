"""Shared settings and fixtures: the real cells, when they are there."""

import os
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile("gppc", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gppc")
# Nothing in the tests may reach the network; loopback servers set their own endpoint.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(config, items):
    """Says why tests on real cells do not run where the cells are absent."""
    if REAL_DATA.is_dir():
        return
    absent = pytest.mark.skip(reason=f"real cells are absent: no folder {REAL_DATA.name} beside the checkout")
    for item in items:
        if "real_data" in item.keywords:
            item.add_marker(absent)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real cells and screens, for tests marked `real_data`."""
    return REAL_DATA
