"""The families of models that can be built: one file each, holding one ``FAMILY``. A new file here is a new ``model_type``."""

import importlib
import pkgutil

from trt_kv.errors import UnknownNameError
from trt_kv.family import Family


def family_names() -> list[str]:
    """The ``model_type`` of every family."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family_from_name(name: str) -> Family:
    """The family whose ``model_type`` is ``name``; ``UnknownNameError`` lists the known ones."""
    if name not in family_names():
        raise UnknownNameError("family of models", name, family_names())
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family
