"""The named policies: one file each, holding one ``POLICY``. A new file here is a new name for ``--policy``."""

import importlib
import pkgutil

from trt_kv.errors import UnknownNameError
from trt_kv.policy import Policy


def policy_names() -> list[str]:
    """Every name that ``policy_from_name`` accepts."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def policy_from_name(name: str) -> Policy:
    """The preset called ``name``; ``UnknownNameError`` lists the known ones."""
    if name not in policy_names():
        raise UnknownNameError("policy", name, policy_names())
    policy: Policy = importlib.import_module(f"{__name__}.{name}").POLICY
    return policy
