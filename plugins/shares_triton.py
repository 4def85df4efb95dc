"""Budgets as shares of a number of tokens, in Triton kernels: the same numbers as ``trt_kv.policy.kept_tokens``."""

import triton
import triton.language as tl


@triton.jit
def kept_of_share(n: tl.tensor, kept_share: tl.tensor) -> tl.tensor:
    """n - round((1 - kept_share) * n) as int64, the share in fp32, its product in fp64, halves to the even neighbour."""
    share = (tl.zeros([], tl.float32) + kept_share).to(tl.float64)
    dropped = (1.0 - share) * n.to(tl.float64)
    # Adding 2**52 rounds to a whole number.
    dropped = (dropped + 4503599627370496.0) - 4503599627370496.0
    return n - dropped.to(tl.int64)


@triton.jit
def whole_part_of_share(n: tl.tensor, share: tl.tensor) -> tl.tensor:
    """floor(share * n) as int64 for n >= 0, by the same rules."""
    exact = (tl.zeros([], tl.float32) + share).to(tl.float64)
    return (exact * n.to(tl.float64)).to(tl.int64)
