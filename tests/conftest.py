"""What holds in every test: fixed seeds, reproducible properties, GPU tests only where there is a GPU; added files."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import numpy as np
import pytest

from trt_kv import policies, scores

# Before torch is imported: OpenMP threads that spin between kernels make small models slow, tenfold on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

pytest_plugins = ["tests.engines", "tests.quality", "tests.rig.fixtures", "tests.triton_rig.fixtures"]

# derandomize: the same examples in CI and at home; no deadline: the first call of a compiled kernel takes seconds.
hypothesis.settings.register_profile("trt-kv", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("trt-kv")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  for third-party code that still draws from the global state
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def policy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are policies too."""
    yield from _added_folder(policies, tmp_path / "policies", monkeypatch)


@pytest.fixture
def score_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are scores too."""
    yield from _added_folder(scores, tmp_path / "scores", monkeypatch)


def _added_folder(package: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A second folder of the package. Its modules are forgotten after the test: another one may use their names."""
    folder.mkdir()
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    yield folder
    for file in folder.glob("*.py"):
        sys.modules.pop(f"{package.__name__}.{file.stem}", None)
        vars(package).pop(file.stem, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files marked ``early`` first. Skip tests marked ``gpu``, with a reason, where torch finds no CUDA device."""
    items.sort(key=lambda item: item.get_closest_marker("early") is None)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
