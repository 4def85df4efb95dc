"""Commands that are printed for the user to run next: they work as printed, in the current folder."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def command_line(words: Sequence[object]) -> str:
    """``words`` after the program's name, quoted for a shell."""
    return shlex.join([*_program(), *map(str, words)])


def as_argument(path: Path) -> str:
    """``path`` so that it is not taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _program() -> list[str]:
    """The program as this process was started, ``trt-kv`` if a shell finds the same one under that name."""
    script = Path(sys.argv[0])
    if script.parts[-2:] == ("trt_kv", "__main__.py"):
        return [sys.executable, "-m", "trt_kv"]
    found = shutil.which("trt-kv")
    if script.name != "trt-kv" or not script.exists() or (found is not None and script.samefile(found)):
        return ["trt-kv"]
    return [sys.argv[0]]
