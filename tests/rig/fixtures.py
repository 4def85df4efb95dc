"""The rig as fixtures. A test that asks for one fails, and never skips, where the rig cannot be set up."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.rig.set_up import set_up


@pytest.fixture(scope="session")
def tensorrt() -> Iterator[ModuleType]:
    """TensorRT: the installed one, or the rig's."""
    if importlib.util.find_spec("tensorrt") is not None:
        yield importlib.import_module("tensorrt")
        return
    folder = str(set_up())
    sys.path.append(folder)
    yield importlib.import_module("tensorrt")
    sys.path.remove(folder)
