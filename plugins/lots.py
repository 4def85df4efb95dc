"""A counter-based random number in [0, 1) for each (seed, layer, KV head, position), the same in every implementation.

Integers below 2**31 are hashed by fifth powers modulo the prime 2**31 - 1, which are permutations of the residues because 5
does not divide 2**31 - 2, with constants added in between: rounds of the cipher MiMC (eprint 2016/492), far too few of them to
be secure. Products stay below 2**62, so int64 arithmetic in numpy, numba, ONNX and on GPUs gives the same numbers without
bitwise operations; the last 24 bits are exact in fp32.
"""

from typing import Any

PRIME = 2**31 - 1
LOTS = 2**24
"""Number of different values."""

ROUNDS = (314159265, 358979323, 846264338, 327950288, 419716939, 937510582)
"""Added before each fifth power: digits of pi."""


def scrambled(x: Any, constant: int) -> Any:
    """(x + constant) ** 5 modulo ``PRIME`` for integers 0 <= x < 2**32, or int64 arrays of them."""
    base = (x + constant) % PRIME
    square = base * base % PRIME
    return square * square % PRIME * base % PRIME


def key_of(seed: Any, layer: Any, kv_head: Any) -> Any:
    """The part of the hash that all positions of a KV head share; seed, layer and head are integers in [0, 2**31)."""
    return scrambled(scrambled(scrambled(seed, ROUNDS[0]) + layer, ROUNDS[1]) + kv_head, ROUNDS[2])


def lot_of(key: Any, position: Any) -> Any:
    """The random number of a position in [0, 2**31), times 2**24: an integer in [0, 2**24)."""
    return scrambled(scrambled(scrambled(key + position, ROUNDS[3]), ROUNDS[4]), ROUNDS[5]) % LOTS
