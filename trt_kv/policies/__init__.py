"""The named policies: one file each, holding one ``POLICY``. A new file here is a new name for ``--policy``."""

import dataclasses
import importlib
import pkgutil

from trt_kv.errors import UnknownNameError
from trt_kv.policy import Policy

ALIASES = {"pooledwindow": "prefixkv"}
"""Other names of presets, which ``policy_from_name`` accepts too."""


def policy_names() -> list[str]:
    """The name of every preset."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def policy_from_name(name: str) -> Policy:
    """The preset called ``name``, or whose alias it is; ``UnknownNameError`` lists the known ones."""
    name = ALIASES.get(name, name)
    if name not in policy_names():
        raise UnknownNameError("policy", name, policy_names())
    policy: Policy = importlib.import_module(f"{__name__}.{name}").POLICY
    return policy


def policy_without_floor(name: str) -> Policy:
    """The preset ``name`` with floor 0: it evicts from short prompts too, as in its paper."""
    return dataclasses.replace(policy_from_name(name), floor=0)
