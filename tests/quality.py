"""What ``make report ARGS=--quick`` measures, once per session."""

from pathlib import Path

import pytest

from benchmarks.quality.measure import measure
from benchmarks.quality.plans import QUICK_HOST_PLANS, QUICK_SETTINGS
from benchmarks.quality.recall.measure import measure_recall
from benchmarks.quality.recall.results import RecallResults
from benchmarks.quality.results import Results
from benchmarks.quality.settings import Settings
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
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quick report keeps what it has measured."""
    return tmp_path_factory.mktemp("report") / "parts"


@pytest.fixture(scope="session")
def quick(full_folder: Path, bundled_checkpoint: Checkpoint, parts: Path) -> Results:
    """What ``--quick`` measures of policies that drop tokens."""
    told: list[str] = []
    results = measured(bundled_checkpoint, full_folder, parts, QUICK_SETTINGS, told)
    assert "minutes" in told[0]
    done, total = told[-1].removeprefix("measuring ").split("/")
    assert abs(int(done) - int(total)) <= 1
    return results


@pytest.fixture(scope="session")
def quick_recall(full_folder: Path, bundled_checkpoint: Checkpoint, parts: Path) -> RecallResults:
    """What ``--quick`` measures of policies whose cache stays on the host."""
    return measured_recall(bundled_checkpoint, full_folder, parts, [])
