"""Every op by name: its spec and its implementations, found by folder."""

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from trt_kv import plugins
from trt_kv.errors import UnknownNameError
from trt_kv.opspec import OpSpec

IMPLEMENTATIONS = ("reference", "cpu")
"""Implementations that every op has; they take numpy arrays."""

Kernel = Callable[..., tuple[Any, ...]]
"""Takes the spec's inputs and attributes by name, updates states in place, returns the spec's other outputs."""

Implementation = Callable[[Any], tuple[Any, ...]]
"""The same with the op's ``Arguments``: ``run`` of an op's module, or of code that keeps the op's states elsewhere."""


def op_folders() -> list[str]:
    """The folders of ``plugins`` that hold an op."""
    return sorted(module.name for module in pkgutil.iter_modules(plugins.__path__) if module.ispkg)


def op_specs() -> Mapping[str, OpSpec]:
    """All specs by op name."""
    return _specs()


@functools.cache
def _specs() -> Mapping[str, OpSpec]:
    """Found once: loading an engine asks for each node."""
    specs = (importlib.import_module(f"trt_kv.plugins.{folder}.spec").SPEC for folder in op_folders())
    return MappingProxyType({spec.name: spec for spec in specs})


def kernel(op: str, implementation: str) -> Kernel:
    """``run`` of ``plugins/<op>/<implementation>.py`` as a kernel with named arguments.

    Raises ``UnknownNameError`` for an unknown op or implementation.
    """
    if op not in op_specs():
        raise UnknownNameError("op", op, op_specs())
    if implementation not in IMPLEMENTATIONS:
        raise UnknownNameError("implementation", implementation, IMPLEMENTATIONS)
    return called_by_name(op, importlib.import_module(f"trt_kv.plugins.{op_specs()[op].folder}.{implementation}").run)


def device_kernel(op: str) -> Kernel | None:
    """The op's GPU kernels, which take torch tensors and launch on the current stream; None if the op has no
    ``plugins/<op>/triton.py`` or Triton is not installed. Triton is imported at the first call.

    Raises ``UnknownNameError`` for an unknown op.
    """
    if op not in op_specs():
        raise UnknownNameError("op", op, op_specs())
    module = f"trt_kv.plugins.{op_specs()[op].folder}.triton"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(module) is None:
        return None
    return called_by_name(op, lambda arguments: importlib.import_module(module).run(arguments))


def called_by_name(op: str, run: Implementation) -> Kernel:
    """``run`` as a kernel: named arguments become the op's ``Arguments`` of ``plugins/<op>/arguments.py``."""
    arguments = importlib.import_module(f"trt_kv.plugins.{op_specs()[op].folder}.arguments").Arguments
    return lambda **given: run(arguments(**given))
