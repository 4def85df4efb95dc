"""The requests of ``tests.device_steps`` under freekv, the cache on the host or whole on the device; as a program, in Triton's
interpreter: ``TRITON_INTERPRET=1 python -m tests.device_recall_requests CHECKPOINT`` fails where the two differ in any bit.
"""

import sys
from pathlib import Path

import numpy as np

from tests.device_steps import CHUNK, PROMPTS, Side, changed_policy, device_runner, programs_of, requests
from tests.interpreted import prepare
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.runtime.backends.cuda.executor import TorchDeviceExecutor
from trt_kv.runtime.backends.cuda.recall.driver import DeviceRecall, RecallCapacity
from trt_kv.runtime.backends.cuda.store import TORCH_TYPES, DeviceKvPool
from trt_kv.runtime.model_runner import ModelRunner

N_HOST_PAGES = 100


def recalling_runner(side: Side, checkpoint: Checkpoint, *, device: str, cuda_graphs: bool) -> tuple[ModelRunner, DeviceRecall]:
    """As ``device_runner``, with the cache on the host."""
    policy = changed_policy(side.policy)
    decoder = decoder_from_checkpoint(checkpoint, TORCH_TYPES[side.dtype])
    config, programs = decoder.config, programs_of(policy, decoder)
    pool = DeviceKvPool(
        n_pages=0,
        page_size=int(programs["decode"][0][0].attributes["page_size"]),
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        dtype=side.dtype,
        device=device,
        spare_page=True,
    )
    capacity = RecallCapacity(
        host_pages=N_HOST_PAGES, sequences=len(PROMPTS) + 1, longest_prompt=max(PROMPTS), largest_chunk=CHUNK
    )
    recall = DeviceRecall(programs["decode"], capacity, pool, n_query_heads=config.n_heads)
    executor = TorchDeviceExecutor(decoder, programs, pool, side.largest, cuda_graphs=cuda_graphs, kernels=recall.kernels)
    executor.warm_up()
    return ModelRunner(executor, pool, programs, chunk=CHUNK, tiers=recall), recall


def check(checkpoint: Checkpoint, *, device: str, cuda_graphs: bool) -> None:
    """Both say the same, a copy of a sequence goes on like the sequence, and everything is given back."""
    side = Side(policy="freekv")
    runner, recall = recalling_runner(side, checkpoint, device=device, cuda_graphs=cuda_graphs)
    expected = requests(device_runner(side, checkpoint, device=device, cuda_graphs=cuda_graphs))
    for name, array in requests(runner).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    sequence = runner.new_sequence()
    runner.prefill(sequence, range(3, 3 + max(PROMPTS)))
    runner.decode([sequence], [5])
    twin = sequence.fork()
    for i in range(2):
        one, other = runner.decode([sequence, twin], [7 + i, 7 + i])
        np.testing.assert_array_equal(one, other)
    assert (sequence.held_tokens <= sequence.kv_len).all()
    for each in (sequence, twin):
        each.release()
    recall.host.check_integrity([])
    assert recall.sets.rows == []


if __name__ == "__main__":
    prepare()
    check(open_checkpoint(Path(sys.argv[1])), device="cpu", cuda_graphs=False)
