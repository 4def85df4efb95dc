"""Which package belongs to which extra, lazy imports of them, and the error that says what to install."""

import importlib
from types import ModuleType

from trt_kv.errors import MissingDependencyError

# By import name, as pyproject.toml has them; a test compares the two.
BASE = ("click", "numba", "numpy", "onnxruntime", "rich", "tokenizers", "torch")
EXTRAS = {"build": ("huggingface_hub", "matplotlib", "onnx", "onnxscript", "safetensors"), "gpu": ("triton",)}
# Packages that no extra installs, because they are of use on some machines only.
SEPARATE = ("tensorrt", "tensorrt_rtx")


def install_command(package: str) -> str | None:
    """The command that installs ``package`` (a top-level import name), or None for a package we know nothing about."""
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"pip install 'trt-kv[{extra}]'"
    if package in BASE:
        return "pip install trt-kv"
    if package in SEPARATE:
        return f"pip install {package}"
    return None


def require(module: str) -> ModuleType:
    """Import ``module`` (top-level or dotted, ours or another's) or raise ``MissingDependencyError`` naming the extra.

    The package that is reported is the one whose import failed, however deep: ``require("trt_kv.export.graph")`` without
    onnx reports onnx. Any other failure, a missing module of trt-kv itself included, is raised as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = missing_dependency(error)
        if missing is None:
            raise
        raise missing from error


def missing_dependency(error: ModuleNotFoundError) -> MissingDependencyError | None:
    """What ``error`` means to a user, or None where it is no missing package that we know how to install."""
    package = (error.name or "").partition(".")[0]
    command = install_command(package)
    if command is None:
        return None
    return MissingDependencyError(f"the package {package!r} is not installed", fix=command)


def require_tensorrt() -> ModuleType:
    """The package ``tensorrt``, or ``tensorrt_rtx`` where only that one is installed: both have the same Python API.

    Raises ``MissingDependencyError`` that says what to install where neither can be imported.
    """
    for package in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
    raise MissingDependencyError(
        "TensorRT is not installed",
        got="neither the package 'tensorrt' nor 'tensorrt_rtx'",
        fix="pip install tensorrt  (data-center and other NVIDIA GPUs), or: pip install tensorrt_rtx  (RTX GPUs)",
    )
