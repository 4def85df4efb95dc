"""Makes a folder with NVIDIA's real tritonserver from PyPI: ``python -m tests.triton_rig.set_up [options for pip]``.

The wheel of PyTriton holds the whole server with its Python backend, for CPUs too. Nothing of PyTriton itself is run.
"""

import ctypes.util
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "requirements.txt", HERE / "set_up.py")
SERVER = Path("pytriton") / "tritonserver"
STUB = "triton_python_backend_stub"
GLIBC = (2, 34)


def reason_not_to() -> str | None:
    """Why the server cannot run here; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"tritonserver's wheel is for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    glibc = tuple(int(part) for part in os.confstr("CS_GNU_LIBC_VERSION").split()[-1].split(".")[:2])  # type: ignore[union-attr]
    if glibc < GLIBC:
        return f"tritonserver needs glibc 2.34, not {glibc}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return "tritonserver's Python backend needs numpy 1.26, which there is up to Python 3.12"
    if not (python_libraries() / _libpython()).exists() and ctypes.util.find_library(_libpython()) is None:
        return f"tritonserver's Python backend needs {_libpython()}, the interpreter as a library"
    return None


def python_libraries() -> Path:
    """The folder that has the interpreter as a library, if it was built with one."""
    return Path(str(sysconfig.get_config_var("LIBDIR")))


def _libpython() -> str:
    return f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"


def rig_folder() -> Path:
    """Where the rig of these sources is, or will be: inside the virtual environment, on no path that Python searches."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    return Path(sys.prefix) / f"triton-rig-{digest[:12]}"


def set_up(pip_options: Sequence[str] = ()) -> Path:
    """The rig's folder, made first if it is not there (a download of 90 MB); whole or not at all.

    ``subprocess.CalledProcessError`` with the output of pip where that fails.
    """
    folder = rig_folder()
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="triton-rig-") as scratch:
        made = Path(scratch) / "rig"
        command = [sys.executable, "-m", "pip", "install", *pip_options, "--no-deps", "--target", str(made)]
        done = subprocess.run(
            [*command, "-r", str(HERE / "requirements.txt")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout[-4000:])
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = made / SERVER / "python_backend_stubs" / version / STUB
        shutil.copy(stub, made / SERVER / "backends" / "python")  # where the server looks; its libraries are found from there
        if not folder.is_dir():
            made.rename(folder)
    return folder


if __name__ == "__main__":
    if (reason := reason_not_to()) is not None:
        sys.stderr.write(f"no Triton test rig, whose tests are skipped: {reason}\n")
        sys.exit()
    try:
        sys.stdout.write(f"{os.fspath(set_up(sys.argv[1:]))}\n")
    except subprocess.CalledProcessError as error:
        sys.exit(f"setting up the Triton test rig failed: {error.output}")
