"""Memory of a long context with the cache in a file: weights, working sets and summaries, whatever the size of the whole cache.

Each point runs in its own process (``python -m benchmarks.speed.recall_memory FOLDER WHAT TOKENS MIB``). After loading its
weights it limits itself to that many MiB of private memory (RLIMIT_DATA); allocations beyond it raise MemoryError.
"""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import BenchmarkError, Check, Report, Row, Target
from benchmarks.memory import STATUS, peak_growth_bytes
from benchmarks.models import (
    PAGE_SIZE,
    ExportedModel,
    Shape,
    exported_model,
    model_runner,
    opened_model,
    random_checkpoint,
    random_tokens,
)
from benchmarks.speed.prefill_memory import RETURN_AT_ONCE
from benchmarks.speed.recall_cache import (
    AS_AT_08,
    FREEKV,
    RecallSide,
    WithQueries,
    fill_pages,
    limits_of,
    place_prompt,
    recall_side,
)
from benchmarks.speed.recall_sides import OWN_PAGES, WIDE, check_placed
from trt_kv.model_config import ModelConfig
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.store import HostTier, host_tier_at
from trt_kv.runtime.model_runner import ModelRunner

MIB = 2**20
N_STEPS = 8
QUICK = Shape(n_layers=2, hidden_size=128, n_heads=8, n_kv_heads=8, head_dim=64, intermediate_size=256, max_positions=2**18)
PROMPT_SHAPE = Shape(n_layers=2, hidden_size=256, n_heads=8, n_kv_heads=2, head_dim=32, intermediate_size=704)
CHUNK = 512
DECODE, WHOLE, PROMPT, WHOLE_PROMPT = "decode", "whole cache", "prompt", "prompt, whole cache"
SLACK_MIB = 64
"""MiB that the target allows beyond working sets and summaries: a step's arrays, two threads, the page tables."""


def run(folder: Path, *, quick: bool) -> Report:
    """Decoding at growing contexts under one limit, then real prefills."""
    shape = QUICK if quick else WIDE
    contexts, limit_mib = ((8192, 16384), 96) if quick else ((16384, 32768, 65536, 131072), 1024)
    lengths = (2048, 4096) if quick else (8192, 16384, 32768)
    exported_model(random_checkpoint(shape, folder / "checkpoint"), folder / "graphs")
    exported_model(random_checkpoint(PROMPT_SHAPE, folder / "prompt-checkpoint"), folder / "prompt-graphs")
    whole_mib = _cache_bytes(shape, contexts[-1]) / MIB
    _require_disk(folder, int(1.1 * whole_mib * MIB))
    refused = _in_new_process(folder, WHOLE, contexts[-1], limit_mib)
    checks = [
        check_placed(folder),
        Check(what="the whole cache does not fit under the limit: MiB allowed beyond it", error=limit_mib, allowed=whole_mib),
    ]
    if not refused["refused"]:
        raise BenchmarkError(
            "the limit does not hold", got=f"{whole_mib:.0f} MiB under {limit_mib} MiB", expected="MemoryError"
        )
    decoding = [_decode_row(shape, n, limit_mib, _in_new_process(folder, DECODE, n, limit_mib)) for n in contexts]
    reading = [_prompt_row(n, *(_in_new_process(folder, what, n, 0) for what in (PROMPT, WHOLE_PROMPT))) for n in lengths]
    last = decoding[-1]
    return Report(
        title="Memory with the cache in a file",
        settings={"shape": shape.hf_config, "prompt_shape": PROMPT_SHAPE.hf_config, "budget_tokens": FREEKV.tokens}
        | {"limit_mib": limit_mib, "steps": N_STEPS, "prompt_chunk": CHUNK, "malloc": RETURN_AT_ONCE},
        checks=checks,
        tables={
            f"decoding under a limit of {limit_mib} MiB beside the weights": decoding,
            "the whole cache under the same limit": [
                {"context_tokens": contexts[-1], "whole_cache_mib": round(whole_mib), "outcome": refused["outcome"]}
            ],
            "straight line through the points": [
                _line(name, decoding, key)
                for name, key in (
                    ("whole cache", "whole_cache_mib"),
                    ("working sets and summaries, as accounted", "accounted_mib"),
                    ("anonymous memory, as measured", "anonymous_growth_mib"),
                )
            ],
            f"reading a prompt in chunks of {CHUNK} tokens": reading,
        },
        targets=[
            Target(
                what=f"anonymous memory at {contexts[-1]} tokens / (working sets + summaries + {SLACK_MIB} MiB)",
                measured=round(last["anonymous_growth_mib"] / (last["accounted_mib"] + SLACK_MIB), 3),
                limit=1.0,
            )
        ],
    )


def _cache_bytes(shape: Shape, n_tokens: int) -> int:
    return n_tokens * shape.n_layers * shape.n_kv_heads * 2 * shape.head_dim * 4


def _require_disk(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise BenchmarkError(
            "no room for the file", got=f"{free} bytes free", expected=n_bytes, fix="set TMPDIR to a larger disk"
        )


def _in_new_process(folder: Path, what: str, n_tokens: int, limit_mib: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed.recall_memory", str(folder), what, str(n_tokens), str(limit_mib)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, **RETURN_AT_ONCE},
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _decode_row(shape: Shape, n_tokens: int, limit_mib: int, found: dict[str, Any]) -> Row:
    """``anonymous_growth``: peak resident memory of any step, above that of the process with its weights."""
    used = {name: n_bytes / MIB for name, n_bytes in found["used_bytes"].items()}
    return {
        "context_tokens": n_tokens,
        "whole_cache_mib": round(_cache_bytes(shape, n_tokens) / MIB),
        "limit_mib": limit_mib,
        "file_mib": round(found["file_bytes"] / MIB),
        "working_sets_mib": round(used["device"], 1),
        "summaries_mib": round(used["summaries"], 1),
        "accounted_mib": round(used["device"] + used["summaries"], 1),
        "anonymous_after_fill_mib": round((found["filled_bytes"] - found["before_bytes"]) / MIB, 1),
        "anonymous_growth_mib": round((found["most_bytes"] - found["before_bytes"]) / MIB, 1),
        "weights_and_libraries_mib": round(found["before_bytes"] / MIB),
        "step_ms": round(found["step_ms"]),
    }


def _prompt_row(n_tokens: int, recalled: dict[str, Any], whole: dict[str, Any]) -> Row:
    used = {name: n_bytes / MIB for name, n_bytes in recalled["used_bytes"].items()}
    beyond = recalled["growth_bytes"] / MIB - used["device"] - used["summaries"]
    return {
        "prompt_tokens": n_tokens,
        "whole_cache_mib": round(_cache_bytes(PROMPT_SHAPE, n_tokens) / MIB, 1),
        "peak_growth_mib": round(recalled["growth_bytes"] / MIB, 1),
        "working_sets_mib": round(used["device"], 1),
        "summaries_mib": round(used["summaries"], 1),
        "beyond_both_mib": round(beyond, 1),
        "peak_growth_with_whole_cache_mib": round(whole["growth_bytes"] / MIB, 1),
    }


def _line(name: str, rows: list[Row], key: str) -> Row:
    """Linear least squares of a column against tokens."""
    tokens, mib = (np.array([row[column] for row in rows], np.float64) for column in ("context_tokens", key))
    slope, intercept = np.polyfit(tokens, mib, 1)
    return {
        "line": name,
        "kib_per_token": round(slope * 1024, 3),
        "constant_mib": round(intercept, 1),
        "largest_deviation_mib": round(float(np.abs(mib - intercept - slope * tokens).max()), 1),
    }


def _decode(folder: Path, n_tokens: int, limit_mib: int) -> dict[str, Any]:
    """Memory and steps of one process with its cache in a file."""
    model = opened_model(folder / "graphs")
    executor = model.executor()
    _placed(folder, model, executor, 2 * FREEKV.tokens)[0].close()
    before = _limit_memory(limit_mib)
    side, host = _placed(folder, model, executor, n_tokens)
    filled = _anonymous_bytes()
    most, times = filled, []
    for _ in range(N_STEPS):
        start = time.perf_counter()
        side.decode()
        times.append(1e3 * (time.perf_counter() - start))
        most = max(most, _anonymous_bytes())
    return {
        "before_bytes": before,
        "filled_bytes": filled,
        "most_bytes": most,
        "file_bytes": os.fstat(host.file_descriptor).st_blocks * 512,
        "used_bytes": side.recall.used_bytes,
        "step_ms": float(np.median(times)),
    }


def _placed(folder: Path, model: ExportedModel, executor: DenseExecutor, n_tokens: int) -> tuple[RecallSide, Any]:
    """A sequence with its cache in a file, after a few steps."""
    config = model.config
    queries = AS_AT_08.queries(config, N_STEPS + 2)
    host = _file(folder, config, n_tokens)
    side = recall_side(WithQueries(executor, queries, first=n_tokens), config, host, ThreadedCopies())
    fill_pages(host, side.recall.summaries, config.n_layers * n_tokens // PAGE_SIZE)
    place_prompt(side.recall, side.sequence, limits_of(FREEKV), n_tokens, queries[0])
    side.decode()
    return side, host


def _file(folder: Path, config: ModelConfig, n_tokens: int) -> HostTier:
    n_pages = config.n_layers * (-(-n_tokens // PAGE_SIZE) + OWN_PAGES)
    return host_tier_at(
        f"file:{folder}", n_pages=n_pages, page_size=PAGE_SIZE, n_kv_heads=config.n_kv_heads, head_size=config.head_dim
    )


def _whole(folder: Path, n_tokens: int, limit_mib: int) -> dict[str, Any]:
    """Check that a pool for the whole cache cannot be allocated under the same limit."""
    model = opened_model(folder / "graphs")
    executor = model.executor()
    _limit_memory(limit_mib)
    try:
        model_runner(executor, model.config, cache_tokens=n_tokens)
    except MemoryError as error:
        return {"refused": True, "outcome": f"{type(error).__name__}: {error}"}
    return {"refused": False, "outcome": "it was given"}


def _limit_memory(limit_mib: int) -> int:
    """Limit this process to ``limit_mib`` MiB of private memory above the present; returns its anonymous bytes now."""
    gc.collect()
    limit = _status_bytes("VmData") + limit_mib * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return _anonymous_bytes()


def _anonymous_bytes() -> int:
    return _status_bytes("RssAnon")


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _prompt(folder: Path, n_tokens: int) -> dict[str, Any]:
    """Peak memory of a real prefill with the cache in a file."""
    model = opened_model(folder / "prompt-graphs")
    executor = model.executor()
    small = recall_side(executor, model.config, _file(folder, model.config, CHUNK), ThreadedCopies())
    _read(small.runner, model, 2 * PAGE_SIZE)
    side = recall_side(executor, model.config, _file(folder, model.config, n_tokens), ThreadedCopies())
    growth = peak_growth_bytes(lambda: _read(side.runner, model, n_tokens, side))
    return {"growth_bytes": growth, "used_bytes": side.recall.used_bytes}


def _whole_prompt(folder: Path, n_tokens: int) -> dict[str, Any]:
    model = opened_model(folder / "prompt-graphs")
    runner = model_runner(model.executor(), model.config, cache_tokens=n_tokens + PAGE_SIZE, chunk=CHUNK)
    _read(runner, model, 2 * PAGE_SIZE)
    return {"growth_bytes": peak_growth_bytes(lambda: _read(runner, model, n_tokens - 2 * PAGE_SIZE))}


def _read(runner: ModelRunner, model: ExportedModel, n_tokens: int, side: RecallSide | None = None) -> None:
    sequence = side.sequence if side is not None else runner.new_sequence()
    runner.prefill(sequence, random_tokens(n_tokens, model.config.vocab_size))
    if side is not None:
        side.settle()


def _answer(folder: str, what: str, n_tokens: str, limit_mib: str) -> dict[str, Any]:
    """Entry point of a measuring process."""
    if what in (DECODE, WHOLE):
        return {DECODE: _decode, WHOLE: _whole}[what](Path(folder), int(n_tokens), int(limit_mib))
    return {PROMPT: _prompt, WHOLE_PROMPT: _whole_prompt}[what](Path(folder), int(n_tokens))


if __name__ == "__main__":
    print(json.dumps(_answer(*sys.argv[1:])))
