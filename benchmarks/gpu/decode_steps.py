"""Decoded tokens per second of the device executor: full cache and PrefixKV's, launched one by one and as CUDA graphs."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.device import WARMUP, copy_bandwidth, device, on_gpu
from benchmarks.harness import Check, Report, Row, Timings, check_close, take_turns
from benchmarks.models import FULL, PAGE_SIZE, Shape, model_runner, random_checkpoint, random_tokens
from trt_kv.decoder import Decoder
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.hf_config import model_config_from_hf
from trt_kv.model_config import ModelConfig
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, program_of_model
from trt_kv.runtime.backends.cuda.executor import TorchDeviceExecutor
from trt_kv.runtime.backends.cuda.step_buffers import StepSizes
from trt_kv.runtime.backends.cuda.store import TORCH_TYPES, DeviceKvPool
from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner

LLAMA_1B = Shape(
    n_layers=16, hidden_size=2048, n_heads=32, n_kv_heads=8, head_dim=64, intermediate_size=8192, vocab_size=128256
)
SMALL = Shape(n_layers=3, hidden_size=48, n_heads=6, n_kv_heads=2, head_dim=16, intermediate_size=40, vocab_size=90)
PREFIXKV = policy_from_name("prefixkv_paper")
KEPT = 0.3
HEADROOM = 256
"""Tokens that a sequence may grow by."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """Sequences after their prefill, and the runner that continues them."""

    runner: ModelRunner
    sequences: Sequence[SequenceCache]

    def decode(self) -> np.ndarray:
        """One step; logits [B, V]."""
        return self.runner.decode(self.sequences, [5] * len(self.sequences))


class DeviceModel:
    """One decoder and one pool with room for one more sequence, and runners on them, with or without CUDA graphs."""

    def __init__(self, decoder: Decoder, policy: Policy, *, n_tokens: int, batch: int, chunk: int, dtype: str) -> None:
        config = decoder.config
        width = -(-(n_tokens + HEADROOM) // PAGE_SIZE)
        n_pages = config.n_layers * width * (batch + 1)
        sizes = {"page_size": PAGE_SIZE, "n_kv_heads": config.n_kv_heads, "head_size": config.head_dim}
        self.pool = DeviceKvPool(n_pages=n_pages, **sizes, dtype=dtype, device=device(), spare_page=True)
        self.decoder, self.policy, self.chunk = decoder, policy, chunk
        self.largest = StepSizes(n_tokens=max(chunk, batch), n_rows=batch, n_sequences=batch, table_width=width)

    def runner(self, *, cuda_graphs: bool) -> ModelRunner:
        config = self.decoder.config
        shares = _shares(config.n_layers) if self.policy.budget == "recipe" else None
        programs = {
            phase: program_of_model(config, self.policy, phase=phase, page_size=PAGE_SIZE, kept_shares=shares)
            for phase in PHASES
        }
        executor = TorchDeviceExecutor(self.decoder, programs, self.pool, self.largest, cuda_graphs=cuda_graphs)
        return ModelRunner(executor, self.pool, programs, chunk=self.chunk, decode=self.policy.decode)


def run(*, quick: bool) -> Report:
    """A random model like Llama 3.2 1B in bf16; its batches are copies of one sequence."""
    bandwidth = copy_bandwidth(quick=quick)
    config = model_config_from_hf((SMALL if quick else LLAMA_1B).hf_config, source="benchmark")
    dtype = "float32" if quick else "bfloat16"
    decoder = _random_decoder(config, TORCH_TYPES[dtype])
    policies = {"full": FULL, f"prefixkv_paper {KEPT:.0%}": PREFIXKV}
    rows: list[Row] = []
    checks = [_check_against_host(policy, name) for name, policy in policies.items()]
    for n_tokens in (20,) if quick else (8192, 32768):
        for batch in (2,) if quick else (1, 8):
            sides: dict[str, Side] = {}
            for name, policy in policies.items():
                model = DeviceModel(decoder, policy, n_tokens=n_tokens, batch=batch, chunk=16 if quick else 2048, dtype=dtype)
                found, check = _sides(model, name, n_tokens, batch)
                sides |= found
                checks.append(check)
            timings = take_turns(
                {name: side.decode for name, side in sides.items()}, rounds=1 if quick else 40, warmup=0 if quick else WARMUP
            )
            rows += _rows(sides, timings, decoder, bandwidth, n_tokens)
    return Report(
        title="Decode steps of the executor on a device, from token ids to logits on the host",
        settings={
            "shape": dataclasses.asdict(SMALL if quick else LLAMA_1B),
            "dtype": dtype,
            "shares": _shares(config.n_layers),
        },
        checks=checks,
        tables={"wall time, medians": rows},
    )


def _sides(model: DeviceModel, name: str, n_tokens: int, batch: int) -> tuple[dict[str, Side], Check]:
    """The same sequences by launches and, on a GPU, by replays, after a check that the results are equal."""
    runners = {f"{name}, launched": model.runner(cuda_graphs=False)}
    if on_gpu():
        runners[f"{name}, CUDA graphs"] = model.runner(cuda_graphs=True)
    runner = next(iter(runners.values()))
    first = runner.new_sequence()
    start = time.perf_counter()
    runner.prefill(first, random_tokens(n_tokens, model.decoder.config.vocab_size))
    print(f"{name}: {n_tokens} tokens read in {time.perf_counter() - start:.1f} s")
    sequences = [first, *(first.fork() for _ in range(batch - 1))]
    sides = {side: Side(runner=runner, sequences=sequences) for side, runner in runners.items()}
    launched, *_, last = (_next_step(side.runner, first) for side in [*sides.values(), *sides.values()])
    what = f"{name}, {n_tokens} tokens, the same step launched and by the last of {list(sides)}"
    return sides, check_close(what, last, launched, within=0.1)


def _next_step(runner: ModelRunner, sequence: SequenceCache) -> np.ndarray:
    """Logits of the next step of a copy of the sequence."""
    twin = sequence.fork()
    logits = runner.decode([twin], [5])
    twin.release()
    return logits


def _rows(sides: Mapping[str, Side], timings: Timings, decoder: Decoder, bandwidth: float, n_tokens: int) -> list[Row]:
    rows = []
    weights = {name: p for name, p in decoder.named_parameters() if decoder.lm_head is None or "embed_tokens" not in name}
    weight_bytes = sum(p.numel() * p.element_size() for p in weights.values())
    for name, side in sides.items():
        pool = side.runner.pool
        slot_bytes = pool.kv[0].nbytes // pool.page_size
        kv_bytes = slot_bytes * sum(int(sequence.kv_len.sum()) for sequence in side.sequences)
        row = timings.row(name)
        bound_ms = (weight_bytes + kv_bytes) / bandwidth * 1e3
        rows.append(
            {
                "tokens": n_tokens,
                "batch": len(side.sequences),
                "side": name,
                **row,
                "tokens_per_s": float(f"{len(side.sequences) / row['median_ms'] * 1e3:.4g}"),
                "kv_mib": round(kv_bytes / 2**20, 1),
                "time_over_reading_weights_and_kv": float(f"{row['median_ms'] / bound_ms:.3g}"),
            }
        )
    return rows


def _check_against_host(policy: Policy, name: str) -> Check:
    """A small model in fp32 on the device, and on the host's kernels."""
    with tempfile.TemporaryDirectory(prefix="trt-kv-bench-") as folder:
        decoder = decoder_from_checkpoint(random_checkpoint(SMALL, Path(folder) / "small"))
        shares = _shares(SMALL.n_layers) if policy.budget == "recipe" else None
        host = model_runner(
            TorchDecoderExecutor(decoder), decoder.config, policy=policy, kept_shares=shares, cache_tokens=64, chunk=16
        )
        expected = _few_steps(host)
        model = DeviceModel(decoder, policy, n_tokens=40, batch=1, chunk=16, dtype="float32")
        got = _few_steps(model.runner(cuda_graphs=on_gpu()))
    return check_close(f"{name} on the device and on the host, logits", got, expected, within=1e-3)


def _few_steps(runner: ModelRunner) -> np.ndarray:
    sequence = runner.new_sequence()
    logits = [runner.prefill(sequence, random_tokens(20, SMALL.vocab_size)), runner.decode([sequence], [7])[0]]
    sequence.release()
    return np.stack(logits)


def _random_decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """Random weights with the usual scale, created on their device."""
    torch.manual_seed(0)
    on = device()
    with torch.device("meta"):
        decoder = Decoder(config)
    weights = {
        name: torch.ones(size, dtype=dtype, device=on)
        if len(size) == 1
        else torch.randn(size, dtype=dtype, device=on) * size[-1] ** -0.5
        for name, size in config.tensor_shapes().items()
    }
    decoder.load_state_dict(weights, assign=True)
    return decoder.requires_grad_(False).eval()


def _shares(n_layers: int) -> list[float]:
    """Kept shares that differ between layers like calibrated ones, ``KEPT`` on average: the first layers keep more."""
    slope = np.linspace(1.5, 0.5, n_layers)
    return [round(float(share), 4) for share in KEPT * slope]
