"""Choosing the largest of many numbers without sorting them: digit by digit from a histogram, in kernels that share this."""

import triton
import triton.language as tl


@triton.jit
def ordered_key(values: tl.tensor) -> tl.tensor:
    """Integers in [0, 2**32), as int64, in the order of fp32 ``values``; equal where those are (0.0 and -0.0).

    What is not a number comes last: its key is 0.
    """
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return tl.where(values == values, rising, 0)


@triton.jit
def is_candidate(keys: tl.tensor, prefix: tl.tensor, NTH: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Keys of ``BITS`` bits whose first ``NTH`` bytes are ``prefix``."""
    return (keys >> (BITS - 8 * NTH)) == prefix


@triton.jit
def byte_of(keys: tl.tensor, NTH: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Byte number ``NTH`` of keys of ``BITS`` bits, the first one being the most significant."""
    return ((keys >> (BITS - 8 - 8 * NTH)) & 255).to(tl.int32)


@triton.jit
def next_byte(prefix: tl.tensor, wanted: tl.tensor, histogram: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """One step towards the ``wanted``-th largest key: ``histogram`` [256] counts the next byte of keys that begin with
    ``prefix``. Returns the prefix with that byte, and the how manieth largest the key is among those that begin so.
    """
    at_least = tl.cumsum(histogram, reverse=True)
    byte = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, 256) > byte, histogram, 0), 0)
    return prefix * 256 + byte, wanted - above
