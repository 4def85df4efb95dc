"""trt-kv: engines whose attention keeps, drops or pages the KV cache by policy.

The classes that generate text can be imported from here (``from trt_kv import Engine``); they are loaded when first used.

The modules at this level define errors, configs, policies, and the recipe and manifest formats. Except for ``decoder``, which
imports torch, they import nothing heavy.
"""

import os
from typing import TYPE_CHECKING

# ONNX Runtime reads this when it is imported: by runtime/backends/onnx_runtime.py, or by a program that uses trt_kv too.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["AsyncEngine", "Engine", "Generation", "SamplingParams"]

if TYPE_CHECKING:
    from trt_kv.runtime.async_engine import AsyncEngine
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.generation import Generation
    from trt_kv.runtime.sampling import SamplingParams
else:
    # Type checkers must not see __getattr__: it would give every misspelt name a type.
    _MODULES = {"AsyncEngine": "async_engine", "Engine": "engine", "Generation": "generation", "SamplingParams": "sampling"}

    def __getattr__(name: str) -> object:
        """Import a class of ``__all__`` on first use; ``MissingDependencyError`` if a package that it needs is missing."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from trt_kv.require import require

        return getattr(require(f"{__name__}.runtime.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
