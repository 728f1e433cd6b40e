"""Shared settings and fixtures: seeds and examples that are the same in every run, and the real cells, when there."""

import os
import random
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# However slow the machine is.
PATIENT = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("same", derandomize=True, **PATIENT)
hypothesis.settings.register_profile("random", print_blob=True, **PATIENT)
# Workers share the cores; a pool of threads in each would make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the tests may reach the network; loopback servers set their own endpoint.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    """Property tests see the same examples in every run; in the slow run, or with GPPC_RANDOM=1, fresh ones."""
    fresh = is_slow_run(config) or os.environ.get("GPPC_RANDOM") == "1"
    hypothesis.settings.load_profile("random" if fresh else "same")


def is_slow_run(config) -> bool:
    """Whether the slow tests were asked for."""
    return config.getoption("markexpr") == "slow"


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    """Takes property tests into the slow run, and says why tests on real cells do not run where these are absent."""
    absent = pytest.mark.skip(reason=f"real cells are absent: no folder {REAL_DATA.name} beside the checkout")
    for item in items:
        if is_slow_run(config) and hypothesis.is_hypothesis_test(item.function):
            item.add_marker("slow")
        if "real_data" in item.keywords and not REAL_DATA.is_dir():
            item.add_marker(absent)


@pytest.hookimpl(tryfirst=True)  # before its fixtures are made
def pytest_runtest_setup(item):
    """Starts every test with the same global random numbers, whichever tests ran before it in the process."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real cells and screens, for tests marked `real_data`."""
    return REAL_DATA
