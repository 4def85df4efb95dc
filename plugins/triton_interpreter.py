"""Kernels without a GPU: a process that is started with ``TRITON_INTERPRET=1`` runs them in Triton's interpreter."""

from typing import Any

from trt_kv.require import require


def change_language_once() -> None:
    """Let the interpreter patch ``triton.language`` once per process and leave it patched.

    By default it patches at every launch and at every call of a function inside a kernel, which takes two fifths of its time.
    A process that interprets kernels compiles none, so the original functions are not needed.
    """
    interpreter: Any = require("triton.runtime.interpreter")
    language, change = interpreter.tl, interpreter._patch_lang
    changed: set[frozenset[int]] = set()

    def change_once(function: Any) -> Any:
        names = function.__globals__.values()
        seen = frozenset(id(value) for value in names if value is language or value is language.core)
        if seen not in changed:
            changed.add(seen)
            change(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = change_once
