"""The command that builds an engine again, from the one in its manifest."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def how_to_rebuild(folder: Path, reproduce: object) -> str:
    """The command that builds ``folder`` again; ``reproduce``: the command in its manifest, if any. It is only shown if it is
    one of ours: whoever made the folder could have written any other.
    """
    command = build_command(reproduce)
    if command is None:
        return "build the engine again with this version of trt-kv"
    return f"build the engine again: {command} --out {shlex.quote(str(folder))} --force"


def build_command(reproduce: object) -> str | None:
    """``reproduce`` as a shell reads it, if it is a `trt-kv build`."""
    try:
        words = shlex.split(reproduce) if isinstance(reproduce, str) else []
    except ValueError:
        return None
    return shlex.join(words) if words[:2] == ["trt-kv", "build"] else None


def in_new_words(reproduce: object, policy: Mapping[str, Any]) -> object:
    """The command of an engine from before policies had a floor, in the words that make the same policy now."""
    command = build_command(reproduce)
    if command is None or policy.get("budget") == "full" or policy.get("residency") == "host":
        return reproduce
    words = shlex.split(command)
    if "prefixkv" in words and policy.get("name") == "prefixkv":
        words[words.index("prefixkv")] = "prefixkv_paper"
    return shlex.join([*words, "--set", "floor=0"])
