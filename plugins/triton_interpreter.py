"""Kernels without a GPU: a process that was started with ``TRITON_INTERPRET=1`` runs them in Triton's interpreter."""

from typing import Any

from trt_kv.require import require


def change_language_once() -> None:
    """Let the interpreter put its functions into ``triton.language`` once per process and leave them there.

    By itself it does so at every launch, and again at every call of a function inside a kernel, which is two fifths of its
    time. A process in which kernels are interpreted compiles none, so nobody needs the language as it was.
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
