"""The rig as fixtures. A test that asks for one fails, and never skips, where the rig cannot be set up."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.rig.set_up import set_up


@pytest.fixture(scope="session")
def tensorrt() -> Iterator[ModuleType]:
    """TensorRT: the installed one, or the rig's."""
    folder = str(set_up())
    sys.path.append(folder)
    import tensorrt as module

    yield module
    sys.path.remove(folder)
