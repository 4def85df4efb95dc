"""What is compared: ways to run a model, ours and the peers', each with the forms of the model that it needs."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError
from benchmarks.peers.environments import peers_folder, python_of
from benchmarks.peers.subjects import Subject, converted, disk_bytes, engine_for
from trt_kv.openmp import WAITING

FREEKV_TOKENS = 2048
OURS = "trt-kv"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a worker needs: its interpreter, the runner's module, the model, options, and variables of its ``environment``.

    ``weight_bytes``: read in every step; 0: the runner tells. ``kv_element_bytes``: of a stored number of the cache, for
    runners that do not tell what a step reads. ``places_caches``: the runner can do without a prompt (``Job.synthetic``).
    ``sized_by_context``: it takes memory, or decides, by the longest context that it is set up for, so each has its own runner.
    """

    python: Path
    module: str
    model: Path
    options: dict[str, Any]
    weight_bytes: int
    kv_element_bytes: float | None = None
    places_caches: bool = False
    sized_by_context: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the tables. ``engine``: "trt-kv" or the peer's name. ``drops``: whether a step attends to a part of the cache.

    ``prepare`` raises ``BenchmarkError`` with the reason if the row cannot be had.
    """

    name: str
    engine: str
    weights: str
    cache: str
    drops: bool
    prepare: Callable[[Subject], Prepared]


def _ours(name: str, build: dict[str, Any], *, weights: str = "fp32", cache: str = "fp32", **load: Any) -> Row:
    def prepare(subject: Subject) -> Prepared:
        engine = engine_for(subject, build)
        options = dict(load)
        if "host_tier" in options:
            options["host_tier"] = options["host_tier"].format(folder=peers_folder())

        return Prepared(
            python=Path(sys.executable),
            module="ours",
            model=engine,
            options=options,
            weight_bytes=disk_bytes(engine / "graphs", ".data"),
            environment=WAITING,
            places_caches=True,
        )

    return Row(
        name=f"{OURS} {name}", engine=OURS, weights=weights, cache=cache, drops=build["policy"] != "full", prepare=prepare
    )


def _openvino(name: str, module: str = "openvino_genai", **options: Any) -> Row:
    def prepare(subject: Subject) -> Prepared:
        python = python_of("openvino")
        convert = "benchmarks.peers.runners.openvino_convert"
        folder = converted(subject, "openvino", lambda out: [str(python), "-m", convert, str(subject.gguf), str(out)])
        return Prepared(
            python=python,
            module=module,
            model=folder,
            options={"vocab_size": subject.vocab_size, **options},
            weight_bytes=disk_bytes(folder / "openvino_model.bin"),
            kv_element_bytes=1.0,
            places_caches=module == "openvino_runtime",
            sized_by_context="evict" in options,
        )

    return Row(
        name=name, engine="OpenVINO GenAI", weights="of the GGUF", cache="int8", drops="evict" in options, prepare=prepare
    )


def _llamacpp() -> Row:
    def prepare(subject: Subject) -> Prepared:
        return Prepared(
            python=python_of("llamacpp"),
            module="llamacpp",
            model=subject.gguf,
            options={"vocab_size": subject.vocab_size},
            weight_bytes=disk_bytes(subject.gguf),
            kv_element_bytes=2.0,
            sized_by_context=True,
        )

    return Row(name="llama.cpp", engine="llama.cpp", weights="of the GGUF", cache="fp16", drops=False, prepare=prepare)


def _onnxruntime_genai(precision: str) -> Row:
    def prepare(subject: Subject) -> Prepared:
        python = python_of("torch")
        folder = converted(
            subject,
            f"onnxruntime-{precision}",
            lambda out: [
                *(str(python), "-m", "benchmarks.peers.runners.onnxruntime_convert"),
                *(str(subject.folder), precision, str(out)),
            ],
        )
        return Prepared(
            python=python,
            module="onnxruntime_genai",
            model=folder,
            options={"vocab_size": subject.vocab_size},
            weight_bytes=disk_bytes(folder, ".data"),
            kv_element_bytes=4.0,
        )

    return Row(
        name=f"onnxruntime-genai {precision}",
        engine="onnxruntime-genai",
        weights=precision,
        cache="fp32",
        drops=False,
        prepare=prepare,
    )


def _transformers(dtype: str) -> Row:
    def prepare(subject: Subject) -> Prepared:
        return Prepared(
            python=python_of("torch"),
            module="transformers_torch",
            model=subject.folder,
            options={"vocab_size": subject.vocab_size, "dtype": dtype},
            weight_bytes=0,
            kv_element_bytes=4.0 if dtype == "float32" else 2.0,
            places_caches=True,
        )

    return Row(name=f"transformers {dtype}", engine="transformers", weights=dtype, cache=dtype, drops=False, prepare=prepare)


INT4 = {"quant": "int4"}
FULL = {"policy": "full"}
PART = {"policy": "pooledwindow", "budget": 0.2, "set": "budget=uniform"}
"""The same share in each layer: a recipe of that mean takes the same time, and costs a calibration."""
RECALL = {"policy": "freekv", "set": f"tokens={FREEKV_TOKENS}"}
FILE = "file:{folder}"
INT8_CACHE: dict[str, Any] = {"cache": "int8", "kv_dtype": "int8"}

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _ours("full fp32", FULL),
        _ours("full int4", FULL | INT4, weights="int4"),
        _ours("full int4, int8 cache", FULL | INT4, weights="int4", **INT8_CACHE),
        _ours("full int4, ONNX Runtime's matrices", FULL | INT4, weights="int4", dense="onnxruntime"),
        _ours("full int4, OpenVINO's matrices", FULL | INT4, weights="int4", dense="openvino"),
        _ours("pooledwindow 20 % fp32", PART),
        _ours("pooledwindow 20 % int4", PART | INT4, weights="int4"),
        _ours("pooledwindow 20 % int4, OpenVINO's matrices", PART | INT4, weights="int4", dense="openvino"),
        _ours("pooledwindow 20 % int4, int8 cache", PART | INT4, weights="int4", **INT8_CACHE),
        _ours("refreekv int4", {"policy": "refreekv"} | INT4, weights="int4"),
        _ours("freekv 2048 fp32, RAM", RECALL, host_tier="ram"),
        _ours("freekv 2048 int4, RAM", RECALL | INT4, weights="int4", host_tier="ram"),
        _ours("freekv 2048 int4, int8 cache, RAM", RECALL | INT4, weights="int4", host_tier="ram", **INT8_CACHE),
        _ours("freekv 2048 int4, file", RECALL | INT4, weights="int4", host_tier=FILE),
        _ours("freekv 2048 int4, int8 cache, file", RECALL | INT4, weights="int4", host_tier=FILE, **INT8_CACHE),
        _openvino("OpenVINO GenAI"),
        _openvino("OpenVINO GenAI, its eviction to 20 %", evict=0.2),
        _openvino("OpenVINO runtime", "openvino_runtime"),
        _llamacpp(),
        _onnxruntime_genai("int4"),
        _onnxruntime_genai("fp32"),
        _transformers("bfloat16"),
    )
}
"""By name, in the order of the tables."""

SHORT = (
    "trt-kv full int4",
    "trt-kv full int4, int8 cache",
    "trt-kv pooledwindow 20 % int4",
    "trt-kv pooledwindow 20 % int4, int8 cache",
    "trt-kv freekv 2048 int4, RAM",
    "trt-kv freekv 2048 int4, int8 cache, RAM",
    "trt-kv freekv 2048 int4, int8 cache, file",
    "OpenVINO GenAI",
    "OpenVINO runtime",
    "llama.cpp",
)
"""A selection for a short run: what the aims speak of."""


def prepared(row: Row, subject: Subject) -> Prepared | str:
    """What the row's worker needs, or why there is none."""
    try:
        return row.prepare(subject)
    except BenchmarkError as error:
        return " ".join(str(error).split())
