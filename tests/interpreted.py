"""What every program does first that runs kernels in Triton's interpreter."""

import numpy as np
import torch

from trt_kv.plugins.triton_interpreter import change_language_once


def prepare() -> None:
    """One thread, memory without contents poisoned, and no time lost where the interpreter would lose it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN, or the largest integer
    np.seterr(divide="ignore")  # log2(0) is meant
    change_language_once()
