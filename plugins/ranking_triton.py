"""Choosing the largest of many numbers without sorting them: byte by byte from histograms, in kernels that share this.

Keys are int64 in [0, 2**32). The ``wanted``-th largest is found in four steps: of the keys that begin with the bytes known so
far, a histogram counts the next byte.
"""

import triton
import triton.language as tl


@triton.jit
def ordered_key(values: tl.tensor) -> tl.tensor:
    """Keys in the order of fp32 ``values``, equal where those are (0.0 and -0.0). What is not a number has the key 0."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return tl.where(values == values, rising, 0)


@triton.jit
def next_bytes(keys: tl.tensor, mask: tl.tensor, prefix: tl.tensor, nth: tl.tensor) -> tl.tensor:
    """[256] int32: how often each value is byte number ``nth`` of the keys that begin with ``prefix``, all bytes before it."""
    asked = mask & ((keys >> (32 - 8 * nth)) == prefix)
    return tl.histogram(((keys >> (24 - 8 * nth)) & 255).to(tl.int32), 256, asked)


@triton.jit
def extended(prefix: tl.tensor, wanted: tl.tensor, histogram: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The prefix with one byte more, the how manieth largest the key is among those that begin so, and how many these are."""
    at_least = tl.cumsum(histogram, reverse=True)
    byte = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    values = tl.arange(0, 256)
    above = tl.sum(tl.where(values > byte, histogram, 0), 0)
    return prefix * 256 + byte, wanted - above, tl.sum(tl.where(values == byte, histogram, 0), 0)
