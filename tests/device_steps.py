"""A few requests under several policies on a step executor, on the host or on a device; as a program, in Triton's interpreter.

``TRITON_INTERPRET=1 python -m tests.device_steps CHECKPOINT RESULTS SIDE ...`` writes what ``requests`` returns for every side.
A program, because the variable has to be set before a kernel is imported.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.interpreted import prepare
from trt_kv.decoder import Decoder
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.policies import policy_without_floor
from trt_kv.policy import Policy
from trt_kv.program import PHASES, Program, program_of_model
from trt_kv.runtime.backends.cuda.executor import TorchDeviceExecutor
from trt_kv.runtime.backends.cuda.step_buffers import StepSizes
from trt_kv.runtime.backends.cuda.store import TORCH_TYPES, DeviceKvPool
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
from trt_kv.runtime.model_runner import ModelRunner

PAGE_SIZE, CHUNK = 5, 20
PROMPTS = (7, 37, 18)
N_DECODED = 3
SHARES = (0.6, 0.3, 0.9)
CHANGES: dict[str, dict[str, Any]] = {
    "prefixkv_paper": {"kept": 0.6},
    "snapkv": {"kept": 0.5, "window": 8, "pooling": 3, "recent": 8},
    "h2o": {"kept": 0.5},
    "refreekv": {"exempt_layers": (0,), "threshold": 0.05},
    "freekv": {"tokens": 25, "sinks": 5, "recent": 5},
    "bestkey": {"tokens": 25, "sinks": 5, "recent": 5},
}
"""How presets are changed so that prompts as short as these have something to lose."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is run on a device: a policy in a type, batches padded to at most ``n_sequences``."""

    policy: str
    dtype: str = "float32"
    n_sequences: int = 4

    @property
    def largest(self) -> StepSizes:
        return StepSizes(n_tokens=CHUNK, n_rows=CHUNK, n_sequences=self.n_sequences, table_width=12)

    def __str__(self) -> str:
        return f"{self.policy}:{self.dtype}:{self.n_sequences}"

    @classmethod
    def from_text(cls, text: str) -> "Side":
        policy, dtype, n_sequences = text.split(":")
        return cls(policy=policy, dtype=dtype, n_sequences=int(n_sequences))


def changed_policy(name: str) -> Policy:
    return dataclasses.replace(policy_without_floor(name), **CHANGES.get(name, {}))


def programs_of(policy: Policy, decoder: Decoder) -> dict[str, Program]:
    shares = SHARES if policy.budget == "recipe" else None
    return {
        phase: program_of_model(decoder.config, policy, phase=phase, page_size=PAGE_SIZE, kept_shares=shares)
        for phase in PHASES
    }


def runner_on_the_host(name: str, checkpoint: Checkpoint) -> ModelRunner:
    policy, decoder = changed_policy(name), decoder_from_checkpoint(checkpoint)
    executor, programs = TorchDecoderExecutor(decoder), programs_of(policy, decoder)
    return host_runner(executor, HostKvPool(**_pool_sizes(decoder)), programs, chunk=CHUNK, decode=policy.decode)


def device_runner(side: Side, checkpoint: Checkpoint, *, device: str = "cpu", cuda_graphs: bool | None = None) -> ModelRunner:
    policy = changed_policy(side.policy)
    decoder = decoder_from_checkpoint(checkpoint, TORCH_TYPES[side.dtype])
    pool = DeviceKvPool(**_pool_sizes(decoder), dtype=side.dtype, device=device, spare_page=True)
    programs = programs_of(policy, decoder)
    executor = TorchDeviceExecutor(decoder, programs, pool, side.largest, cuda_graphs=cuda_graphs)
    return ModelRunner(executor, pool, programs, chunk=CHUNK, decode=policy.decode)


def _pool_sizes(decoder: Decoder) -> dict[str, Any]:
    config = decoder.config
    return {
        "n_pages": 100,
        "page_size": PAGE_SIZE,
        "n_kv_heads": config.n_kv_heads,
        "head_size": config.head_dim,
        "n_query_heads": config.n_heads,
    }


def requests(runner: ModelRunner) -> dict[str, np.ndarray]:
    """Prompts in chunks, then all of them decoded together, the first of them not to the end."""
    rng = np.random.default_rng(3)
    sequences = [runner.new_sequence() for _ in PROMPTS]
    found: dict[str, list[np.ndarray]] = {"prefill": [], "decode": [], "kv_len": [], "budget": []}
    for sequence, n in zip(sequences, PROMPTS, strict=True):
        found["prefill"].append(runner.prefill(sequence, rng.integers(3, 200, n).tolist()))
        found["budget"].append(sequence.adaptive_budget.copy())
    for step in range(N_DECODED):
        running = sequences[step >= N_DECODED // 2 :]
        found["decode"].extend(runner.decode(running, rng.integers(3, 200, len(sequences))[-len(running) :].tolist()))
        found["kv_len"].extend(sequence.kv_len.copy() for sequence in running)
    for sequence in sequences:
        sequence.release()
    runner.pool.check_integrity([])
    return {name: np.stack(values) for name, values in found.items()}


def main(checkpoint: str, results: str, *sides: str) -> None:
    prepare()
    arrays: dict[str, np.ndarray] = {}
    for side in sides:
        found = requests(device_runner(Side.from_text(side), open_checkpoint(Path(checkpoint))))
        arrays |= {f"{side}.{name}": array for name, array in found.items()}
    np.savez(results, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
