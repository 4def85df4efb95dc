"""Fetches kvpress into its own folder: ``python -m benchmarks.kvpress.set_up [options for pip]``.

kvpress requires an older transformers than ours, and datasets, pandas, peft and others that none of the presses compared here
needs. So its wheel is fetched without dependencies to a folder outside ``sys.path``, and its presses are loaded one by one,
without the package's ``__init__``, which would import all of these and patch transformers.
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
    """The folder for the kvpress of ``requirements.txt``, inside the virtual environment."""
    return Path(sys.prefix) / f"kvpress-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"


def set_up(pip_options: Sequence[str] = ()) -> Path:
    """The folder, created atomically if it is missing (a download of 120 kB).

    Raises ``subprocess.CalledProcessError`` with pip's output if pip fails.
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
