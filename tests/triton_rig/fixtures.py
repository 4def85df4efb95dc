"""The rig as a fixture. Tests that ask for it are skipped where tritonserver cannot run, and fail if it cannot be installed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.triton_rig.set_up import reason_not_to, set_up


@pytest.fixture(scope="session")
def triton_rig() -> Iterator[Path]:
    """The folder with tritonserver, in which its client library can be imported."""
    if (reason := reason_not_to()) is not None:
        pytest.skip(reason)
    folder = set_up()
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))
