"""Lazy imports of heavy packages, with an error that says what to install."""

import importlib
from types import ModuleType

from trt_kv.errors import MissingDependencyError

_EXTRA_OF_PACKAGE = {
    "torch": "build",
    "onnx": "build",
    "onnxscript": "build",
    "onnx_ir": "build",
    "safetensors": "build",
    "huggingface_hub": "build",
    "matplotlib": "build",
    "numpy": "runtime",
    "numba": "runtime",
    "onnxruntime": "runtime",
    "tokenizers": "runtime",
    "rich": "runtime",
}


def require(package: str) -> ModuleType:
    """Import ``package`` (a top-level or dotted module name) or raise ``MissingDependencyError`` naming the extra."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF_PACKAGE.get(package.partition(".")[0], "all")
        raise MissingDependencyError(
            f"the package {package.partition('.')[0]!r} is not installed",
            fix=f"pip install 'trt-kv[{extra}]'",
        ) from error
