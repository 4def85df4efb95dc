"""Fetches kvpress into a folder of its own: ``python -m benchmarks.kvpress.set_up [options for pip]``.

kvpress asks for an older transformers than ours, and for datasets, pandas, peft and others that none of the presses
compared here needs. So its wheel is fetched without dependencies, onto no path that Python searches, and its presses are
loaded one by one, without the package's ``__init__``, which would import all of that and patch transformers.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def kvpress_folder() -> Path:
    """Where the kvpress of ``requirements.txt`` is, or will be: inside the virtual environment."""
    return Path(sys.prefix) / f"kvpress-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"


def set_up(pip_options: Sequence[str] = ()) -> Path:
    """The folder, filled first where it is not there (a download of 120 kB); whole or not at all.

    Raises ``subprocess.CalledProcessError`` with pip's output where pip fails.
    """
    folder = kvpress_folder()
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="kvpress-") as scratch:
        made = Path(scratch) / "made"
        command = [sys.executable, "-m", "pip", "install", *pip_options, "--no-deps", "--target", str(made)]
        command += ["-r", str(REQUIREMENTS)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout[-4000:])
        if not folder.is_dir():
            made.rename(folder)
    return folder


def press_class(module: str, name: str) -> Any:
    """The class ``name`` of ``kvpress.presses.<module>``, unmodified."""
    if "kvpress" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("kvpress", None, is_package=True)
        spec.submodule_search_locations = [str(set_up() / "kvpress")]
        sys.modules["kvpress"] = importlib.util.module_from_spec(spec)
    return getattr(importlib.import_module(f"kvpress.presses.{module}"), name)


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{os.fspath(set_up(sys.argv[1:]))}\n")
    except subprocess.CalledProcessError as error:
        sys.exit(f"fetching kvpress failed: {' '.join(error.cmd)}\n{error.output}")
