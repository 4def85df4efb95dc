"""A virtual environment for each peer, made when it is first needed, in a folder inside ours that its requirements name."""

import hashlib
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from benchmarks.harness import BenchmarkError

REQUIREMENTS = Path(__file__).parent / "requirements"
SECONDS = 1200
"""The longest that an installation may take."""


def peers_folder() -> Path:
    """Where environments, models and engines of this benchmark are kept: inside our own virtual environment."""
    return Path(sys.prefix) / "peers"


def python_of(name: str) -> Path:
    """The interpreter of the environment for ``requirements/NAME.txt``, which is created if it is missing.

    ``BenchmarkError`` with the end of pip's output if it cannot be.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    folder = peers_folder() / f"{name}-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    # Environments cannot be moved: one without the mark was interrupted, and is made again in place.
    mark = folder / "complete"
    if mark.exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        venv.create(folder, clear=True, with_pip=True)
        with tempfile.TemporaryFile() as log:
            command = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
            done = subprocess.run(command, stdout=log, stderr=log, timeout=SECONDS, check=False)
            log.seek(0)
            said = log.read().decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchmarkError(f"no environment for {name}", got=str(error)) from error
    if done.returncode != 0:
        raise BenchmarkError(f"{name} cannot be installed", got=said[-500:])
    mark.touch()
    return python
