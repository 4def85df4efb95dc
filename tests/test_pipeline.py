"""The pipeline as Python callers use it: without click, without a terminal, without a signal handler of ours."""

import dataclasses
import importlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trt_kv
from tests.engines import traced_once
from tests.evaluation_tasks import write_tasks
from trt_kv.drift import Drift
from trt_kv.errors import EngineError, UsageError
from trt_kv.export import engine as engine_module
from trt_kv.manifest import load_manifest
from trt_kv.policies import policy_from_name
from trt_kv.recipe import Recipe

BUNDLED = "no CHECKPOINT given: using the small llama3 checkpoint that comes with trt-kv"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """``trt_kv.pipeline``, imported anew where neither click nor rich nor the command line can be imported."""
    monkeypatch.setattr(engine_module, "graph_from_checkpoint", traced_once)
    for name in [name for name in sys.modules if name.startswith(("trt_kv.pipeline", "trt_kv.cli", "click", "rich"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("click", "rich", "trt_kv.cli"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(trt_kv, "pipeline", None, raising=False)
    return importlib.import_module("trt_kv.pipeline")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Five prompts, which calibration reads from the files that evaluations read as well."""
    return write_tasks(tmp_path / "prompts.jsonl")


class Heard:
    """Callbacks that remember what they were told."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, int]] = {}
        self.notes: list[str] = []

    @property
    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {"on_progress": self.progress, "on_note": self.notes.append}

    def progress(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        self.stages[stage] = done, total


def test_an_engine_is_built_and_evaluated(
    pipeline: Any, tmp_path: Path, prompts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The bundled model, with nothing named that has a default; the same request again builds nothing."""
    heard = Heard()
    request = pipeline.BuildRequest(
        source=pipeline.ModelSource(model="llama3"), policy=policy_from_name("full"), out=tmp_path / "engine"
    )
    engine = pipeline.build_engine(request, **heard.callbacks)
    assert engine == tmp_path / "engine"
    assert heard.notes == [BUNDLED]
    assert set(heard.stages) == {"tracing graphs", "writing weights", "computing digests"}
    made = (engine / "manifest.json").stat().st_mtime_ns
    pipeline.build_engine(request, **heard.callbacks)
    assert heard.notes[1:] == [BUNDLED, f"{engine} is up to date"]
    assert (engine / "manifest.json").stat().st_mtime_ns == made

    heard = Heard()
    asked = pipeline.EvaluationRequest(engine=engine, tasks=prompts, out=tmp_path / "results.json", limit=3)
    evaluation = pipeline.evaluate(asked, **heard.callbacks)
    assert evaluation.is_finished
    assert len(evaluation.run.answers) == 3
    n_read = sum(answer.n_prompt_tokens for answer in evaluation.run.answers)
    assert heard.stages["evaluating engine"] == (n_read, n_read)
    assert heard.notes == []
    assert pipeline.evaluate(asked, **heard.callbacks) == evaluation
    assert heard.notes == [f"{tmp_path / 'results.json'}: 3 of 3 answers are already there"]
    assert capfd.readouterr() == ("", "")


def test_what_an_engine_needs_is_calibrated_on_the_way_and_callbacks_may_be_left_out(
    pipeline: Any, small_checkpoint_folder: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    request = pipeline.BuildRequest(
        source=pipeline.ModelSource(model="llama3", checkpoint=str(small_checkpoint_folder)),
        policy=dataclasses.replace(policy_from_name("prefixkv_paper"), kept=0.5),
        calibration=pipeline.CalibrationPlan(prompts=prompts, samples=2),
        target=pipeline.TargetPlan(page_size=8),
        out=tmp_path / "engine",
    )
    pipeline.build_engine(request)
    manifest = load_manifest(tmp_path / "engine")
    assert (manifest.policy.kept, manifest.page_size) == (0.5, 8)
    assert {"recipe.json", "recipe.png"} < set(manifest.files)
    assert Recipe.load(tmp_path / "engine" / "recipe.json").budget == 0.5
    assert capfd.readouterr() == ("", "")


def test_graphs_are_exported(pipeline: Any, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    source = pipeline.ModelSource(model="llama3", checkpoint=str(small_checkpoint_folder))
    heard = Heard()
    request = pipeline.ExportRequest(source=source, policy=policy_from_name("full"), out=tmp_path / "graphs")
    graphs = pipeline.export_graphs(request, **heard.callbacks)
    assert [graph.name for graph in graphs] == ["decode.onnx", "prefill.onnx"]
    assert heard.stages["tracing graphs"] == (2, 2)
    assert heard.notes == []


def test_a_recipe_is_calibrated(pipeline: Any, small_checkpoint_folder: Path, prompts: Path, tmp_path: Path) -> None:
    heard = Heard()
    request = pipeline.RecipeRequest(
        source=pipeline.ModelSource(model="llama3", checkpoint=str(small_checkpoint_folder)),
        policy=dataclasses.replace(policy_from_name("prefixkv_paper"), kept=0.5),
        calibration=pipeline.CalibrationPlan(prompts=prompts, samples=3),
        to_published=tmp_path / "published",
        out=tmp_path / "recipe.json",
    )
    written = pipeline.calibrate_recipe(request, **heard.callbacks)
    assert Recipe.load(written.recipe).budget == 0.5
    assert written.picture == tmp_path / "recipe.png"
    assert written.picture.is_file()
    assert written.published.parent == tmp_path / "published"
    assert heard.stages == {"calibrating": (3, 3)}
    assert heard.notes == []


def test_drift_thresholds_are_calibrated_on_text_of_ours_with_a_note(
    pipeline: Any, small_checkpoint_folder: Path, tmp_path: Path
) -> None:
    heard = Heard()
    request = pipeline.DriftRequest(
        source=pipeline.ModelSource(model="llama3", checkpoint=str(small_checkpoint_folder)),
        policy=dataclasses.replace(policy_from_name("freekv"), tokens=24, sinks=4, recent=8, drift="calibrated"),
        calibration=pipeline.CalibrationPlan(samples=1),
        drift=pipeline.DriftPlan(rate=0.2, tokens=12, page_size=4),
        out=tmp_path / "drift.json",
    )
    written = pipeline.calibrate_drift(request, **heard.callbacks)
    assert Drift.load(written).correction_rate == 0.2
    assert heard.stages == {"measuring queries": (1, 1)}
    (note,) = heard.notes
    assert note.startswith("no PROMPTS given")


def test_what_contradicts_itself_is_refused_when_it_is_asked_for(pipeline: Any, tmp_path: Path) -> None:
    source, full, freekv = pipeline.ModelSource(model="llama3"), policy_from_name("full"), policy_from_name("freekv")
    given, out = tmp_path / "given.json", tmp_path / "out.json"
    calibrated = dataclasses.replace(freekv, drift="calibrated")
    for request, others in (
        (pipeline.BuildRequest, {"policy": full, "recipe": given}),
        (pipeline.BuildRequest, {"policy": full, "drift": pipeline.DriftPlan(rate=0.2)}),
        (pipeline.ExportRequest, {"policy": full, "recipe": given}),
        (pipeline.RecipeRequest, {"policy": full}),
        (
            pipeline.RecipeRequest,
            {
                "policy": policy_from_name("prefixkv_paper"),
                "from_published": given,
                "calibration": pipeline.CalibrationPlan(prompts=given),
            },
        ),
        (pipeline.DriftRequest, {"policy": full}),
        (pipeline.DriftRequest, {"policy": freekv}),
        (pipeline.DriftRequest, {"policy": calibrated, "drift": pipeline.DriftPlan(file=given)}),
        (pipeline.DriftRequest, {"policy": calibrated, "recipe": given}),
    ):
        with pytest.raises(UsageError):
            request(source=source, out=out, **others)
    for name in ("batch_size", "limit", "max_new_tokens"):
        with pytest.raises(UsageError, match=name.replace("_", "-")):
            pipeline.EvaluationRequest(engine=tmp_path, tasks=given, **{name: 0})


def test_what_fails_raises(pipeline: Any, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        pipeline.evaluate(pipeline.EvaluationRequest(engine=tmp_path, tasks=prompts))
    (tmp_path / "there").mkdir()
    source, policy = pipeline.ModelSource(model="llama3"), policy_from_name("full")
    with pytest.raises(UsageError, match="exists already"):
        pipeline.build_engine(pipeline.BuildRequest(source=source, policy=policy, out=tmp_path / "there"))


def test_the_machine_is_examined(pipeline: Any) -> None:
    names = {finding.name for finding in pipeline.examine()}
    assert {"python", "memory", "torch CPU"} <= names
