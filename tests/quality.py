"""What ``make report ARGS=--quick`` measures, once per session."""

import shutil
from pathlib import Path

import pytest

from benchmarks.quality.measure import measure
from benchmarks.quality.plans import QUICK_HOST_PLANS, QUICK_SETTINGS
from benchmarks.quality.recall.measure import measure_recall
from benchmarks.quality.recall.results import RecallResults
from benchmarks.quality.results import Results
from benchmarks.quality.settings import Settings
from tests.engines import shared
from trt_kv.export.checkpoints.base import Checkpoint


def measured(checkpoint: Checkpoint, engine: Path, parts: Path, settings: Settings, told: list[str]) -> Results:
    """Results of the policies that drop tokens."""
    return measure(
        checkpoint,
        engine,
        settings,
        folder=parts,
        command="a test",
        on_progress=lambda stage, done, total: told.append(f"{stage} {done}/{total}"),
        tell=told.append,
    )


def measured_recall(checkpoint: Checkpoint, engine: Path, parts: Path, told: list[str]) -> RecallResults:
    """Results of the policies whose cache stays on the host."""
    return measure_recall(
        checkpoint,
        engine,
        QUICK_SETTINGS,
        QUICK_HOST_PLANS,
        folder=parts,
        command="a test",
        on_progress=lambda stage, done, total: told.append(f"{stage} {done}/{total}"),
    )


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory, full_folder: Path, bundled_checkpoint: Checkpoint) -> Path:
    """What the quick report keeps of what it has measured: this process' copy."""

    def measure_all(folder: Path) -> None:
        told: list[str] = []
        measured(bundled_checkpoint, full_folder, folder, QUICK_SETTINGS, told)
        assert "minutes" in told[0]
        done, total = told[-1].removeprefix("measuring ").split("/")
        assert abs(int(done) - int(total)) <= 1
        measured_recall(bundled_checkpoint, full_folder, folder, [])

    whole = shared(tmp_path_factory, "report-parts", measure_all)
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("report") / "parts"))


@pytest.fixture(scope="session")
def quick(full_folder: Path, bundled_checkpoint: Checkpoint, parts: Path) -> Results:
    """What ``--quick`` measures of policies that drop tokens."""
    return measured(bundled_checkpoint, full_folder, parts, QUICK_SETTINGS, [])


@pytest.fixture(scope="session")
def quick_recall(full_folder: Path, bundled_checkpoint: Checkpoint, parts: Path) -> RecallResults:
    """What ``--quick`` measures of policies whose cache stays on the host."""
    return measured_recall(bundled_checkpoint, full_folder, parts, [])
