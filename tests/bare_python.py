"""A Python environment with click and nothing else, made without a network."""

import shutil
import sys
import venv
from pathlib import Path

import click


def make_bare_environment(folder: Path) -> Path:
    """Make a virtual environment in ``folder`` that holds click only, without even pip; return its site-packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    shutil.copytree(Path(click.__file__).parent, site / "click", ignore=shutil.ignore_patterns("__pycache__"))
    return site
