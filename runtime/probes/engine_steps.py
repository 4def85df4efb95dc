"""Some steps of an engine: what they take without a long cache, and the memory of the process besides weights and caches."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trt_kv.runtime.backends.host.reservation import HostSizing
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.reservation import RequestSize

SHORT_TOKENS = 32
DECODE_TOKENS = 24
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class EngineSteps:
    """``step_ms``: of a decode step of ``batch`` sequences of about ``short_tokens`` tokens. ``chunk_ms``: to read a prompt of
    ``chunk_tokens``. ``program_bytes``: resident memory besides weights and the pages that were used.
    """

    batch: int
    short_tokens: int
    step_ms: float
    chunk_tokens: int
    chunk_ms: float
    program_bytes: int


def engine_steps(folder: Path, *, batch: int, kv_dtype: str, weight_bytes: int, base_bytes: int) -> EngineSteps:
    """Load the engine with a small pool and time it, the fastest of some rounds. ``base_bytes``: resident before that."""
    probe = Engine.load(folder, verify=False, cache_tokens=1, kv_dtype=kv_dtype, prefix_cache=False)
    manifest, chunk = probe.manifest, probe.runner.chunk
    probe.close()
    chunk_tokens = min(chunk, manifest.config.max_positions - 1)
    short = min(SHORT_TOKENS, chunk_tokens)
    n_new = min(DECODE_TOKENS, manifest.config.max_positions - short)
    sizing = HostSizing(
        manifest.cache_config,
        manifest.applied_policy,
        manifest.programs,
        page_size=manifest.page_size,
        kv_dtype=kv_dtype,
        chunk=chunk,
    )
    of_batch, of_chunk = RequestSize(n_prompt=short, max_new_tokens=n_new), RequestSize(n_prompt=chunk_tokens, max_new_tokens=1)
    needed = [sizing.of(of_batch, batch), sizing.of(of_chunk)]
    options = [sizing.options(one) for one in needed]
    tokens = {name: max(one[name] for one in options) for name in options[0]}
    rng = np.random.default_rng(0)

    def prompts(n_prompts: int, n_tokens: int) -> list[list[int]]:
        ids = rng.integers(3, manifest.config.vocab_size, (n_prompts, n_tokens))
        return [[int(token) for token in of_prompt] for of_prompt in ids]

    engine = Engine.load(
        folder,
        verify=False,
        kv_dtype=kv_dtype,
        prefix_cache=False,
        cache_tokens=tokens["cache_tokens"],
        host_tokens=tokens.get("host_tokens"),
    )
    with engine:
        chunk_s, step_s = [], []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            engine.generate(prompts(1, chunk_tokens)[0], max_new_tokens=1, temperature=0.0, ignore_eos=True)
            chunk_s.append(time.perf_counter() - started)
            results = engine.generate_batch(
                prompts(batch, short), max_new_tokens=n_new, min_tokens=n_new, temperature=0.0, ignore_eos=True
            )
            stamps = sorted(stamp for result in results for stamp in result.times.tokens)
            last_prompt = max(result.times.tokens[0] for result in results)
            after = [stamp for stamp in stamps if stamp > last_prompt]
            step_s.append((after[-1] - last_prompt) * batch / len(after) if after else 0.0)
        resident = resident_bytes()
    used = max(one.n_bytes for one in needed)
    return EngineSteps(
        batch=batch,
        short_tokens=short + n_new // 2,
        step_ms=min(step_s[1:]) * 1e3,
        chunk_tokens=chunk_tokens,
        chunk_ms=min(chunk_s[1:]) * 1e3,
        program_bytes=max(base_bytes, resident - weight_bytes - used),
    )


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
