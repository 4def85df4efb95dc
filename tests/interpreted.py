"""What every program does first that runs kernels in Triton's interpreter."""

from typing import Any

import numpy as np
import torch


def prepare() -> None:
    """One thread, memory without contents poisoned, and Triton's language changed once instead of at every call."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN, or the largest integer
    np.seterr(divide="ignore")  # log2(0) is meant
    _change_language_once()


def _change_language_once() -> None:
    """The interpreter puts its own functions into ``triton.language`` at every launch, and again at every call of a function
    inside a kernel, which is two fifths of its time. Nothing in such a process compiles: they may stay.
    """
    from triton.runtime import interpreter

    language, change = interpreter.tl, interpreter._patch_lang
    changed: set[frozenset[int]] = set()

    def change_once(function: Any) -> Any:
        seen = frozenset(id(value) for value in function.__globals__.values() if value is language or value is language.core)
        if seen not in changed:
            changed.add(seen)
            change(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = change_once
