"""Whether segments can be part of a CUDA graph recorded around them; as a program, since a refusal may end the process.

``python -m tests.onnxruntime_capture ENGINE`` needs a GPU. It says "yes", or fails with what refused.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.onnxruntime_steps import segments_of, two_rows

N_WARM_UPS = 3
"""What ONNX Runtime needs until it allocates nothing more for a shape."""


def blend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of attention: depends on all three and keeps nothing."""
    return q + (k * (layer + 1)).mean(1, keepdim=True) - v.mean(1, keepdim=True)


def main(engine: str) -> None:
    decoder = segments_of(Path(engine), device="cuda")
    inputs = two_rows("cuda")
    with torch.inference_mode():
        with torch.cuda.stream(decoder.stream):
            for _ in range(N_WARM_UPS):
                decoder(*inputs, blend)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=decoder.stream, capture_error_mode="thread_local"):
            recorded = decoder(*inputs, blend)
        inputs[0].add_(1)
        graph.replay()
        torch.cuda.synchronize()
        with torch.cuda.stream(decoder.stream):
            launched = decoder(*inputs, blend)
        torch.cuda.synchronize()
    assert torch.equal(recorded, launched), "a replay gives other results than a launch"
    sys.stdout.write("yes\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
