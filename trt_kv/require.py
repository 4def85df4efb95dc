"""Which package belongs to which extra, their lazy import, and the error with the command that installs them."""

import importlib
from types import ModuleType

from trt_kv.errors import MissingDependencyError

# By import name, as in pyproject.toml; a test compares the two.
BASE = ("click", "jinja2", "numba", "numpy", "onnxruntime", "rich", "tokenizers")
EXTRAS = {
    "build": ("huggingface_hub", "matplotlib", "onnx", "onnxscript", "safetensors", "torch"),
    "gguf": ("gguf", "transformers"),
    "gpu": ("torch", "triton"),
    "openvino": ("openvino",),
    "serve": ("llguidance", "prometheus_client", "pydantic", "starlette", "uvicorn"),
    "smollm2": ("gguf", "transformers"),
    "structured": ("llguidance",),
}
# Packages that no extra installs, because only some machines can use them.
SEPARATE = ("tensorrt", "tensorrt_rtx")


def install_command(package: str, *, extra: str = "build") -> str | None:
    """The command that installs ``package`` (a top-level import name), or None for an unknown package.

    ``extra``: the extra that is meant if several have the package.
    """
    extras = [name for name, packages in EXTRAS.items() if package in packages]
    if extras:
        return f"pip install 'trt-kv[{extra if extra in extras else extras[0]}]'"
    if package in BASE:
        return "pip install trt-kv"
    if package in SEPARATE:
        return f"pip install {package}"
    return None


def require(module: str, *, extra: str = "build") -> ModuleType:
    """Import ``module`` (top-level or dotted, of trt-kv or third-party) or raise ``MissingDependencyError`` naming the extra.

    ``extra``: see ``install_command``.
    The package that is reported is the one whose import failed, however deep: ``require("trt_kv.export.graph")`` without
    onnx reports onnx. Any other failure, a missing module of trt-kv itself included, is raised as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = missing_dependency(error, extra=extra)
        if missing is None:
            raise
        raise missing from error


def missing_dependency(error: ModuleNotFoundError, *, extra: str = "build") -> MissingDependencyError | None:
    """The error for the user, or None if ``error`` is not about a package of this list."""
    package = (error.name or "").partition(".")[0]
    command = install_command(package, extra=extra)
    if command is None:
        return None
    return MissingDependencyError(f"the package {package!r} is not installed", fix=command)


def require_tensorrt() -> ModuleType:
    """The package ``tensorrt``, or ``tensorrt_rtx`` if only that one is installed: both have the same Python API.

    Raises ``MissingDependencyError`` with the command to install one if neither can be imported.
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
