"""What is compared: our server with each policy, llama.cpp's, and engines that have none in the same loop of clients.

Every row is started for a ``Room``, and turns its bytes of KV cache into what its program wants to be told.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import peers_folder, python_of
from benchmarks.peers.protocol import Refusal, Setup
from benchmarks.peers.rows import FULL, INT4, PART
from benchmarks.peers.subjects import Subject, converted, engine_for
from benchmarks.serving_peers.clients import openai_door
from benchmarks.serving_peers.contenders import Contender, runner, server
from trt_kv.kv_memory import token_bytes
from trt_kv.manifest import load_manifest
from trt_kv.openmp import WAITING

OURS = "trt-kv"
BLOCK = 32
"""Tokens of a block of OpenVINO's cache on a CPU."""
LLAMA_MULTIPLE = 256
"""llama.cpp rounds the tokens of a sequence up to a multiple of it."""
PACKAGE = "benchmarks.serving_peers.runners"


@dataclass(frozen=True, kw_only=True)
class Room:
    """``n_sequences`` at once, of at most ``n_prompt`` tokens and as many as ``n_tokens`` generated ones.

    ``cache_bytes``: of the KV cache, whatever that is enough for; None: enough for all.
    """

    n_sequences: int
    n_prompt: int
    n_tokens: int
    threads: int
    cache_bytes: int | None = None

    @property
    def context(self) -> int:
        return self.n_prompt + self.n_tokens

    def cache_tokens(self, bytes_per_token: float, *, multiple: int = 32) -> int:
        """Tokens of all sequences together; each takes whole multiples."""
        if self.cache_bytes is not None:
            return int(self.cache_bytes / bytes_per_token) // multiple * multiple
        return self.n_sequences * -(-(self.context + 1) // multiple) * multiple


Opened = AbstractContextManager[Contender | Refusal]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the tables. ``prepare`` makes what is missing, and returns what starts it; ``BenchmarkError`` if it cannot."""

    name: str
    cache: str
    prepare: Callable[[Subject], Callable[[Room], Opened]]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def _log(name: str) -> Path:
    return peers_folder() / "logs" / f"serving-{name}.log".replace(" ", "_")


def our_cache(engine: Path, dtype: str | None, room: Room) -> dict[str, Any]:
    """Options of ``Engine.load`` for the room: pages of keys, values, positions and scores in all layers, no kept prefixes."""
    manifest = load_manifest(engine)
    n_bytes = manifest.config.n_layers * token_bytes(manifest.config, dtype or "float32")
    n_tokens = room.cache_tokens(n_bytes, multiple=manifest.page_size)
    return {"max_sequences": room.n_sequences, "cache_tokens": n_tokens, "kv_dtype": dtype, "prefix_cache": False}


def our_server(engine: Path, options: Mapping[str, Any], *, threads: int, log: Path) -> Opened:
    """``trt-kv serve`` of an engine."""
    given = {"port": 0, "threads": threads, **options}
    words = [word for name, value in given.items() if value is not None for word in _words(name.replace("_", "-"), value)]
    command = [sys.executable, "-m", "trt_kv", "serve", str(engine), *words]
    return server(command, openai_door, dict(options), log=log, environment=WAITING)


def _words(name: str, value: object) -> list[str]:
    """An option on the command line."""
    return [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]


def _ours(name: str, build: dict[str, Any], *, dtype: str | None = None, recalls: bool = False) -> Row:
    row = f"{OURS} {name}"

    def prepare(subject: Subject) -> Callable[[Room], Opened]:
        engine = engine_for(subject, build | INT4)

        def start(room: Room) -> Opened:
            options = our_cache(engine, dtype, room)
            if recalls:
                options |= {"host_tier": "ram", "host_tokens": options.pop("cache_tokens")}
            return our_server(engine, options, threads=room.threads, log=_log(row))

        return start

    return Row(name=row, cache=dtype or "fp32", prepare=prepare)


def _llamacpp(name: str, *, q8_0: bool = False) -> Row:
    def prepare(subject: Subject) -> Callable[[Room], Opened]:
        python = python_of("llamacpp")
        bytes_per_token = subject.kv_bytes(34 / 32 if q8_0 else 2.0)

        def start(room: Room) -> Opened:
            each = -(-(room.context + 1) // LLAMA_MULTIPLE) * LLAMA_MULTIPLE
            n_fitting = room.cache_tokens(bytes_per_token, multiple=LLAMA_MULTIPLE) // each
            options = {"n_parallel": min(room.n_sequences, n_fitting), "threads": room.threads, "q8_0": q8_0}
            options["n_ctx"] = each * int(options["n_parallel"])
            command = [str(python), "-m", f"{PACKAGE}.llamacpp_server", str(subject.gguf), json.dumps(options)]
            door = functools.partial(openai_door, cache_prompt=False)
            return server(command, door, options, log=_log(name), environment={})

        return start

    return Row(name=name, cache="q8_0" if q8_0 else "fp16", prepare=prepare)


def _openvino(name: str, *, share: float | None = None) -> Row:
    def prepare(subject: Subject) -> Callable[[Room], Opened]:
        python = python_of("openvino")
        convert = "benchmarks.peers.runners.openvino_convert"
        folder = converted(subject, "openvino", lambda out: [str(python), "-m", convert, str(subject.gguf), str(out)])
        # Bytes, with a scale and a zero point (fp32) for each channel of the keys of a block, and each token of its values.
        per_head = 2 * BLOCK * subject.head_size + 8 * (subject.head_size + BLOCK)
        block_bytes = subject.n_layers * subject.n_kv_heads * per_head

        def start(room: Room) -> Opened:
            n_tokens = room.cache_tokens(block_bytes / BLOCK, multiple=BLOCK)
            options = {"n_sequences": room.n_sequences, "block_bytes": block_bytes, "chunk": OPENVINO_CHUNK}
            options["cache_bytes"] = n_tokens // BLOCK * block_bytes
            if share is not None:
                options["evict"] = int(share * room.context)
            setup = Setup(model=str(folder.absolute()), threads=room.threads, context=room.context, options=options)
            return runner(python, f"{PACKAGE}.openvino_batching", setup, log=_log(name), environment=_threads(room))

        return start

    return Row(name=name, cache="int8", prepare=prepare)


OPENVINO_CHUNK = 512
"""Tokens of a step, prompts and answers together."""


def _onnxruntime(name: str) -> Row:
    def prepare(subject: Subject) -> Callable[[Room], Opened]:
        python = python_of("torch")
        convert = "benchmarks.peers.runners.onnxruntime_convert"
        words = [str(python), "-m", convert, str(subject.folder), "int4"]
        folder = converted(subject, "onnxruntime-int4", lambda out: [*words, str(out)])

        def start(room: Room) -> Opened:
            setup = Setup(model=str(folder.absolute()), threads=room.threads, context=room.context)
            return runner(python, f"{PACKAGE}.onnxruntime_loop", setup, log=_log(name), environment=_threads(room))

        return start

    return Row(name=name, cache="fp32", prepare=prepare)


def _threads(room: Room) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(room.threads)}


WHILE_READING = PART | {"set": f"{PART['set']} evict=while_reading reserve=512"}
EVICTING = "OpenVINO GenAI, its eviction to 20 %"
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _ours("full", FULL),
        _ours("full, int8 cache", FULL, dtype="int8"),
        _ours("pooledwindow 20 %", PART),
        _ours("pooledwindow 20 %, int8 cache", PART, dtype="int8"),
        _ours("pooledwindow 20 %, evicting while reading, int8 cache", WHILE_READING, dtype="int8"),
        _ours("prefixkv", {"policy": "prefixkv"}),
        _ours("refreekv", {"policy": "refreekv"}),
        _ours("freekv 2048, RAM", {"policy": "freekv", "set": "tokens=2048"}, recalls=True),
        _llamacpp("llama.cpp"),
        _llamacpp("llama.cpp, q8_0 cache", q8_0=True),
        _openvino("OpenVINO GenAI"),
        _openvino(EVICTING, share=0.2),
        _onnxruntime("onnxruntime-genai, one at a time"),
    )
}
"""By name, in the order of the tables. All weights are those of the GGUF file or, in onnxruntime-genai, int4."""
