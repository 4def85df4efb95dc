"""Makes a folder from which ``import tensorrt`` works without a GPU: ``python -m tests.rig.set_up [options for pip]``.

NVIDIA's own ``tensorrt`` wheels are fetched from NVIDIA and are large. PyPI holds the Python bindings alone, and, inside an
ONNX Runtime plug-in, the TensorRT-RTX library with its parser. ``forward.cpp`` joins the two. NVIDIA does not support the
combination: it parses graphs and builds engines as TensorRT does, and is never shipped. It cannot run engines without a driver.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("requirements.txt", "forward.cpp", "set_up.py"))
LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
FORWARDED = ("libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer_plugin.so.11")
"""What the bindings link to; one library under three names, beside the bindings, where their RPATH looks first."""


def rig_folder() -> Path:
    """Where the rig of these sources is, or will be: inside the virtual environment, on no path that Python searches."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    return Path(sys.prefix) / f"tensorrt-rig-{digest[:12]}"


def set_up(pip_options: Sequence[str] = ()) -> Path:
    """The rig's folder, made first if it is not there (a download of 150 MB); whole or not at all.

    Raises ``subprocess.CalledProcessError`` with the output of pip or of the compiler where one of them fails.
    """
    folder = rig_folder()
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="tensorrt-rig-") as scratch:
        made = Path(scratch) / "rig"
        requirements = str(HERE / "requirements.txt")
        _run(sys.executable, "-m", "pip", "install", *pip_options, "--no-deps", "--target", str(made), "-r", requirements)
        _join(made)
        if not folder.is_dir():
            made.rename(folder)
    return folder


def _join(folder: Path) -> None:
    """Compile the forwarding library beside the bindings, and link what it and the parser load by short names."""
    bindings = folder / "tensorrt"
    (folder / "tensorrt_bindings").rename(bindings)
    first, *others = FORWARDED
    source, out = str(HERE / "forward.cpp"), str(bindings / first)
    _run("g++", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{first}", "-Wl,-rpath,$ORIGIN", "-o", out, source, "-ldl")
    for name in others:
        (bindings / name).symlink_to(first)
    for short, pattern in (
        ("libtensorrt_rtx.so", "libtensorrt_rtx.so.*"),
        ("libtensorrt_onnxparser_rtx.so.1", "libtensorrt_onnxparser_rtx.so.*"),
    ):
        (library,) = (folder / LIBRARIES).glob(pattern)
        (bindings / short).symlink_to(Path("..") / LIBRARIES / library.name)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout[-4000:])


if __name__ == "__main__":
    if shutil.which("g++") is None:
        sys.exit("the TensorRT test rig needs a C++ compiler: install g++")
    try:
        sys.stdout.write(f"{os.fspath(set_up(sys.argv[1:]))}\n")
    except subprocess.CalledProcessError as error:
        sys.exit(f"setting up the TensorRT test rig failed: {' '.join(error.cmd)}\n{error.output}")
