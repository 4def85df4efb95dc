"""Memory of a prefill with scores, budgets and eviction against its length: O(N * chunk), not O(N * N).

N prompt tokens. Each point is measured in its own process:
``python -m benchmarks.speed.prefill_memory FOLDER SIDE N CHUNK``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, Report, Row, Target, check_close
from benchmarks.memory import peak_growth_bytes
from benchmarks.models import (
    FULL,
    MASS,
    WINDOW,
    Shape,
    exported_model,
    model_runner,
    opened_model,
    random_checkpoint,
    random_tokens,
)
from trt_kv.policies import policy_without_floor
from trt_kv.policy_settings import policy_with
from trt_kv.runtime.model_runner import ModelRunner

MIB = 2**20
CHUNK = 512
SIDES = {
    "without scores": FULL,
    "window of 32 queries": WINDOW,
    "mass of all queries": MASS,
    **{name: policy_without_floor(name) for name in ("snapkv", "refreekv", "reach")},
}
BOUNDED_TOKENS, BOUNDED_CACHE = 4096, 8192
BOUNDED = f"snapkv, {BOUNDED_TOKENS} tokens, while reading"
SIDES[BOUNDED] = policy_with(
    policy_without_floor("snapkv"), {"budget": "constant", "tokens": BOUNDED_TOKENS, "evict": "while_reading"}
)
"""In a pool of ``BOUNDED_CACHE`` tokens, however long the prompt is."""
EAGER = "transformers, output_attentions"
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""malloc returns freed blocks of 64 KiB and more to the system, so that the peak counts memory in use only."""
LIMIT = 2.5
"""Limit of the growth from N/2 to N over that from N/4 to N/2: 2 is linear, 4 quadratic."""


def run(folder: Path, *, quick: bool) -> Report:
    """Peak resident memory of a prefill above that of the process before it, for growing prompts and chunks."""
    shape = Shape(n_layers=4, hidden_size=256, n_heads=8, n_kv_heads=2, head_dim=32, intermediate_size=704)
    lengths = (512, 1024, 2048) if quick else (4096, 8192, 16384, 32768)
    random_model = random_checkpoint(shape, folder / "checkpoint")
    exported_model(random_model, folder / "graphs")
    checks = [_check_scores(folder)]
    sides = ("mass of all queries",) if quick else tuple(SIDES)
    growth = {side: [_growth(folder, side, n, CHUNK) for n in lengths] for side in sides}
    rows = [
        _row(shape, side, n, CHUNK, bytes_) for side, found in growth.items() for n, bytes_ in zip(lengths, found, strict=True)
    ]
    if not quick:  # a prompt of 64k tokens in the memory of 8k
        rows.append(_row(shape, BOUNDED, 2 * lengths[-1], CHUNK, _growth(folder, BOUNDED, 2 * lengths[-1], CHUNK)))
    middle = lengths[-2]
    mass = "mass of all queries"
    chunks = [_row(shape, mass, middle, chunk, _growth(folder, mass, middle, chunk)) for chunk in (256, 1024)]
    eager = [_row(shape, EAGER, n, n, _growth(folder, EAGER, n, n)) for n in ((256, 512) if quick else (1024, 2048))]
    first, second, third = growth["mass of all queries"][-3:]
    return Report(
        title="Memory of prefill with scores",
        settings={"shape": shape.hf_config, "dtype": "float32", "malloc": RETURN_AT_ONCE},
        checks=checks,
        tables={
            f"prefill in chunks of {CHUNK} tokens": rows,
            f"mass at {middle} tokens, other chunks": chunks,
            "whole attention matrices, for comparison": eager,
            "straight line through the points": [_line(side, lengths, found) for side, found in growth.items()],
        },
        targets=[
            Target(
                what=f"memory of the step from {lengths[-2]} to {lengths[-1]} tokens / from {lengths[-3]} to {lengths[-2]}",
                measured=round((third - second) / (second - first), 2),
                limit=LIMIT,
            )
        ],
    )


def _growth(folder: Path, side: str, n_tokens: int, chunk: int) -> int:
    """Peak growth of a fresh process during the prefill, in bytes."""
    return int(_in_new_process(folder, side, n_tokens, chunk)["growth_bytes"])


def _check_scores(folder: Path) -> Check:
    """Check scores against the column sums of transformers' attention matrices, relative to the mean score of 1 per token."""
    ours, eager = (_in_new_process(folder, side, 256, 64)["importance"] for side in ("mass of all queries", EAGER))
    return check_close("importance against transformers' eager attention", np.array(ours), np.array(eager), within=1e-3)


def _in_new_process(folder: Path, side: str, n_tokens: int, chunk: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed.prefill_memory", str(folder), side, str(n_tokens), str(chunk)]
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


def _row(shape: Shape, side: str, n_tokens: int, chunk: int, growth_bytes: int) -> Row:
    """``scratch``: memory except weights and cached tokens, in units of one fp32 number per token and row of a chunk."""
    n_cached = min(n_tokens, BOUNDED_CACHE) if side == BOUNDED else n_tokens
    cache_bytes = n_cached * shape.n_layers * shape.n_kv_heads * (2 * shape.head_dim * 4 + 12)
    return {
        "side": side,
        "prompt_tokens": n_tokens,
        "chunk_tokens": chunk,
        "peak_growth_mib": round(growth_bytes / MIB, 1),
        "kv_cache_mib": round(cache_bytes / MIB, 1),
        "scratch_per_token_and_row": round((growth_bytes - cache_bytes) / (4 * n_tokens * chunk), 2),
        "attention_matrices_of_one_layer_mib": round(shape.n_heads * n_tokens**2 * 4 / MIB, 1),
    }


def _line(side: str, lengths: tuple[int, ...], growth: list[int]) -> Row:
    """Linear least squares of growth against prompt tokens."""
    slope, intercept = np.polyfit(lengths, growth, 1)
    rest = np.array(growth) - (intercept + slope * np.array(lengths))
    return {
        "side": side,
        "kib_per_token": round(slope / 1024, 2),
        "constant_mib": round(intercept / MIB, 1),
        "largest_deviation_percent": round(100 * float(np.abs(rest / growth).max()), 1),
    }


def _ours(folder: Path, side: str, n_tokens: int, chunk: int) -> dict[str, Any]:
    model = opened_model(folder / "graphs")
    cache_tokens = BOUNDED_CACHE if side == BOUNDED else n_tokens + 64
    runner = model_runner(model.executor(), model.config, policy=SIDES[side], cache_tokens=cache_tokens, chunk=chunk)
    tokens = random_tokens(n_tokens, model.config.vocab_size)
    _prefill(runner, tokens[:8])
    growth = peak_growth_bytes(lambda: _prefill(runner, tokens))
    importance_LN = runner.importance(tokens)[:, 0].tolist() if n_tokens <= CHUNK and SIDES[side].reads_attention else None
    return {"growth_bytes": growth, "importance": importance_LN}


def _prefill(runner: ModelRunner, tokens: list[int]) -> None:
    """Prefill a whole prompt, with the policy's eviction."""
    sequence = runner.new_sequence()
    runner.prefill(sequence, tokens)
    sequence.release()


def _eager(folder: Path, n_tokens: int) -> dict[str, Any]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint", attn_implementation="eager")
    tokens = torch.tensor([random_tokens(n_tokens, model.config.vocab_size)])
    importance: list[Any] = []

    def score(ids: torch.Tensor) -> None:
        with torch.inference_mode():
            attentions = model(ids, output_attentions=True).attentions
        importance[:] = [weights_BHNN[0].mean(dim=0).sum(dim=0).tolist() for weights_BHNN in attentions]

    score(tokens[:, :8])
    return {"growth_bytes": peak_growth_bytes(lambda: score(tokens)), "importance": importance}


def _answer(folder: str, side: str, n_tokens: str, chunk: str) -> dict[str, Any]:
    """Entry point of a measuring process."""
    if side == EAGER:
        return _eager(Path(folder), int(n_tokens))
    return _ours(Path(folder), side, int(n_tokens), int(chunk))


if __name__ == "__main__":
    print(json.dumps(_answer(*sys.argv[1:])))
