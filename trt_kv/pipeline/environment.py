"""The checks of ``trt-kv doctor``. They do not install, change or download anything."""

import enum
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from trt_kv import __file__ as package_file
from trt_kv import __version__
from trt_kv.errors import CheckpointError, MissingDependencyError
from trt_kv.presets import PRESETS, Preset
from trt_kv.require import BASE, EXTRAS, SEPARATE, install_command, require

GIB = 1024**3
OLDEST_MAJOR = 8
"""The oldest major compute capability that tests compile the kernels for: that of A100."""
PURPOSES = {
    "build": "builds, calibrates and exports engines",
    "gguf": "reads GGUF files",
    "gpu": "runs engines on NVIDIA GPUs",
    "openvino": "runs engines on a CPU with --dense openvino",
    "serve": "serves engines over HTTP",
    "smollm2": "reads the model smollm2",
    "structured": "outputs that conform to a schema or a grammar",
}


class State(enum.Enum):
    """The state of a finding: only ``MISSING`` makes doctor fail."""

    OK = "ok"
    OPTIONAL = "optional"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; ``fix`` is a command or an instruction, empty if there is nothing to do."""

    section: str
    name: str
    state: State
    text: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at this machine and this installation; takes seconds, because onnxruntime, numba and torch are imported."""
    return [*_machine(), *_packages(), *_backends(), *map(_model, PRESETS.values())]


def _machine() -> Iterator[Finding]:
    section = "machine"
    yield Finding(section=section, name="trt-kv", state=State.OK, text=f"{__version__} in {Path(package_file).parent}")
    yield Finding(section=section, name="python", state=State.OK, text=f"{platform.python_version()} ({sys.executable})")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(section=section, name="cores", state=State.OK, text=f"{usable} usable of {os.cpu_count()}")
    yield Finding(section=section, name="memory", state=State.OK, text=_memory())


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return f"{total / GIB:.1f} GiB"
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"


def _packages() -> Iterator[Finding]:
    for package in BASE:
        yield _package("packages that every command needs", package, State.MISSING)
    for extra, packages in EXTRAS.items():
        yield _extra(extra, packages)
    for package in sorted({package for packages in EXTRAS.values() for package in packages}):
        yield _package("packages of the extras", package, State.OPTIONAL)


def _extra(extra: str, packages: Sequence[str]) -> Finding:
    """Whether all packages of an extra are installed, and what it is for."""
    section, name = "extras", f"trt-kv[{extra}]"
    missing = [package for package in packages if _version(package) is None]
    if not missing:
        return Finding(section=section, name=name, state=State.OK, text=PURPOSES[extra])
    text = f"{PURPOSES[extra]}; not installed: {', '.join(missing)}"
    return Finding(section=section, name=name, state=State.OPTIONAL, text=text, fix=f"pip install 'trt-kv[{extra}]'")


def _package(section: str, package: str, absent: State) -> Finding:
    version = _version(package)
    if version is None:
        return Finding(section=section, name=package, state=absent, text="not installed", fix=install_command(package) or "")
    return Finding(section=section, name=package, state=State.OK, text=version)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> Iterator[Finding]:
    section = "what can run an engine"
    # A missing package is reported among the packages already; this checks whether it works.
    if importlib.util.find_spec("onnxruntime") is not None:
        yield _onnxruntime(section)
    if importlib.util.find_spec("numba") is not None:
        yield _kernel_threads(section)
    if importlib.util.find_spec("torch") is not None:
        yield from _torch(section)
    if importlib.util.find_spec("numba") is not None:
        yield _kernel_cache(section)
    for package in SEPARATE:
        if importlib.util.find_spec(package) is None:
            yield Finding(
                section=section,
                name=package,
                state=State.OPTIONAL,
                text="not found; only useful with an NVIDIA GPU",
                fix=install_command(package) or "",
            )
        else:
            yield _accelerator(section, package)
    yield _tensorrt_llm(section)


def _tensorrt_llm(section: str) -> Finding:
    """Whether TensorRT-LLM is installed, and has the options that ``--target tensorrt-llm`` writes."""
    from trt_kv.export.targets.tensorrt_llm_fields import missing_fields

    name = "tensorrt_llm"
    if importlib.util.find_spec(name) is None:
        text = "not found; folders of --target tensorrt-llm can be written, and not run, here"
        return Finding(section=section, name=name, state=State.OPTIONAL, text=text)
    try:
        missing = missing_fields()
    except Exception as error:  # noqa: BLE001  what an import of it raises without a GPU is not known
        return Finding(section=section, name=name, state=State.OPTIONAL, text=f"does not load: {_first_line(error)}")
    version = _version(name) or "unknown version"
    if missing:
        text = f"{version} lacks options that --target tensorrt-llm writes: {', '.join(missing)}"
        fix = "take another version, or remove these from llm_options.yaml"
        return Finding(section=section, name=name, state=State.OPTIONAL, text=text, fix=fix)
    return Finding(section=section, name=name, state=State.OK, text=f"{version}; has the options of --target tensorrt-llm")


def _accelerator(section: str, package: str) -> Finding:
    """An optional package that is installed: its version, or why it does not load."""
    try:
        version = getattr(require(package), "__version__", "found")
    except (ImportError, OSError, MissingDependencyError) as error:
        fix = install_command(package) or ""
        return Finding(
            section=section, name=package, state=State.OPTIONAL, text=f"does not load: {_first_line(error)}", fix=fix
        )
    runs = "builds and runs engines for --target tensorrt" if package.startswith("tensorrt") else "compiles kernels"
    return Finding(section=section, name=package, state=State.OK, text=f"{version}; {runs}")


def _kernel_cache(section: str) -> Finding:
    """Whether compiled CPU kernels are kept from one run to the next."""
    name = "cache of kernels"
    try:
        folder = require("trt_kv.plugins.jit").cache_folder()
    except (ImportError, OSError) as error:
        return _unusable(section, name, "numba", error)
    if folder is None:
        text, fix = "none: each run compiles its kernels, some seconds", "set NUMBA_CACHE_DIR to a folder that can be written"
        return Finding(section=section, name=name, state=State.OPTIONAL, text=text, fix=fix)
    return Finding(section=section, name=name, state=State.OK, text=folder)


def _onnxruntime(section: str) -> Finding:
    name = "onnxruntime providers"
    try:
        providers = require("trt_kv.runtime.backends.onnx_runtime").ort.get_available_providers()
    except (ImportError, OSError) as error:
        return _unusable(section, name, "onnxruntime", error)
    return Finding(section=section, name=name, state=State.OK, text=", ".join(providers))


def _kernel_threads(section: str) -> Finding:
    """The library whose threads run the CPU kernels. numba's own, its last resort, ends the process if two threads use it."""
    name = "CPU kernels"
    for module, library in (("tbbpool", "TBB"), ("omppool", "OpenMP")):
        try:
            importlib.import_module(f"numba.np.ufunc.{module}")
        except ImportError:
            continue
        return Finding(section=section, name=name, state=State.OK, text=f"numba, with threads of {library}")
    text = "neither OpenMP nor TBB: two engines must not run in two threads, and engines that recall pages may end the process"
    fix = "install libgomp (Debian, Ubuntu: apt-get install libgomp1), or pip install tbb"
    return Finding(section=section, name=name, state=State.MISSING, text=text, fix=fix)


def _torch(section: str) -> Iterator[Finding]:
    try:
        torch = require("torch")
    except (ImportError, OSError) as error:
        yield _unusable(section, "torch", "torch", error, state=State.OPTIONAL)
        return
    yield Finding(section=section, name="torch CPU", state=State.OK, text=f"{torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding(section=section, name="torch CUDA", state=State.OK, text=f"CUDA {torch.version.cuda}: {devices}")
    else:
        yield Finding(section=section, name="torch CUDA", state=State.OPTIONAL, text="no usable GPU; engines run on the CPU")
    yield _device(section, torch)


def _device(section: str, torch: ModuleType) -> Finding:
    """Whether ``--device cuda`` works."""
    name = "--device cuda"
    if not torch.cuda.is_available():
        fix = "needs an NVIDIA GPU, its driver, and a build of torch for CUDA"
        return Finding(section=section, name=name, state=State.OPTIONAL, text="not usable: no GPU", fix=fix)
    try:
        triton = require("triton").__version__
    except (ImportError, OSError, MissingDependencyError) as error:
        text, fix = f"not usable without Triton: {_first_line(error)}", install_command("triton") or ""
        return Finding(section=section, name=name, state=State.OPTIONAL, text=text, fix=fix)
    major, minor = torch.cuda.get_device_capability(0)
    if major < OLDEST_MAJOR:
        text = f"not tested on compute capability {major}.{minor}; kernels are compiled for {OLDEST_MAJOR}.0 and newer"
        return Finding(section=section, name=name, state=State.OPTIONAL, text=text)
    text = f"runs engines built for onnxruntime: Triton {triton}, compute capability {major}.{minor}"
    return Finding(section=section, name=name, state=State.OK, text=text)


def _model(preset: Preset) -> Finding:
    """A bundled checkpoint is checked; another may be missing, and is checked when it is opened."""
    if preset.packaged is None:
        return _bundled_model(preset)
    section, location = "models", preset.location
    if location is None:
        text = f"not installed: {preset.summary}"
        return Finding(section=section, name=preset.name, state=State.OPTIONAL, text=text, fix=preset.install_command)
    return Finding(section=section, name=preset.name, state=State.OK, text=f"{preset.parameters} parameters in {location}")


def _bundled_model(preset: Preset) -> Finding:
    """Whether the preset's bundled checkpoint has its files, readable JSON and weights as long as their header says."""
    from trt_kv.export.checkpoints.safetensors_file import read_safetensors_header

    folder = preset.bundled_folder
    section, name = "models", f"{preset.name} ({preset.bundled})"
    try:
        for file in ("config.json", "tokenizer.json"):
            json.loads((folder / file).read_text(encoding="utf-8"))
        tensors = read_safetensors_header(folder / "model.safetensors")
    except (OSError, ValueError, CheckpointError) as error:
        fix = "reinstall trt-kv; its files are damaged"
        return Finding(section=section, name=name, state=State.MISSING, text=_first_line(error), fix=fix)
    n_parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return Finding(section=section, name=name, state=State.OK, text=f"{n_parameters / 1e6:.1f} M parameters in {folder}")


def _unusable(section: str, name: str, package: str, error: Exception, *, state: State = State.MISSING) -> Finding:
    """A package that is installed but does not load, e.g. because a shared library is missing."""
    return Finding(section=section, name=name, state=state, text=_first_line(error), fix=install_command(package) or "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
