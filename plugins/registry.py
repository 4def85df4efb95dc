"""Every op by name: its spec and its implementations, found by folder."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from trt_kv import plugins
from trt_kv.errors import UnknownNameError
from trt_kv.opspec import OpSpec

IMPLEMENTATIONS = ("reference", "cpu")

Kernel = Callable[..., tuple[Any, ...]]
"""Takes the spec's inputs and attributes by name, updates states in place, returns the spec's other outputs."""


def op_folders() -> list[str]:
    """The folders of ``plugins`` that hold an op."""
    return sorted(module.name for module in pkgutil.iter_modules(plugins.__path__) if module.ispkg)


def op_specs() -> dict[str, OpSpec]:
    """All specs by op name."""
    specs = (importlib.import_module(f"trt_kv.plugins.{folder}.spec").SPEC for folder in op_folders())
    return {spec.name: spec for spec in specs}


def kernel(op: str, implementation: str) -> Kernel:
    """The function ``run`` of ``plugins/<op>/<implementation>.py``.

    Raises ``UnknownNameError`` for an op or implementation nobody wrote.
    """
    if op not in op_specs():
        raise UnknownNameError("op", op, op_specs())
    if implementation not in IMPLEMENTATIONS:
        raise UnknownNameError("implementation", implementation, IMPLEMENTATIONS)
    run: Kernel = importlib.import_module(f"trt_kv.plugins.{op_specs()[op].folder}.{implementation}").run
    return run
