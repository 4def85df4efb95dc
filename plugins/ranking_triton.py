"""Radix selection of the largest of many numbers, byte by byte from histograms; Triton functions shared by several kernels.

Keys are int64 in [0, 2**32). The ``wanted``-th largest is found in four steps, each with a histogram of the next byte of the
keys that begin with the bytes found so far.
"""

import triton
import triton.language as tl


@triton.jit
def ordered_key(values: tl.tensor) -> tl.tensor:
    """Keys in the order of fp32 ``values``, equal for equal values (0.0 and -0.0 too). NaN has the key 0."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return tl.where(values == values, rising, 0)


@triton.jit
def next_bytes(keys: tl.tensor, mask: tl.tensor, prefix: tl.tensor, nth: tl.tensor) -> tl.tensor:
    """[256] int32: histogram of byte number ``nth`` of the keys whose earlier bytes are ``prefix``."""
    asked = mask & ((keys >> (32 - 8 * nth)) == prefix)
    return tl.histogram(((keys >> (24 - 8 * nth)) & 255).to(tl.int32), 256, asked)


@triton.jit
def extended(prefix: tl.tensor, wanted: tl.tensor, histogram: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The prefix extended by one byte, the rank of the wanted key among the keys with that prefix, and their number."""
    at_least = tl.cumsum(histogram, reverse=True)
    byte = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    values = tl.arange(0, 256)
    above = tl.sum(tl.where(values > byte, histogram, 0), 0)
    return prefix * 256 + byte, wanted - above, tl.sum(tl.where(values == byte, histogram, 0), 0)
