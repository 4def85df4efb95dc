"""The inner loop of estimating keys from their codes (``recall_attention/key_codes.py``), as vector instructions.

A byte of codes is a mask of the lanes of a vector, which has a token in each of them: so a channel costs a few instructions for
eight tokens and both bits, and two more for each query and bit.
"""

from typing import Any

from llvmlite import ir
from numba import types

from trt_kv.plugins.recall_attention.page_counts import CODED_TOKENS
from trt_kv.plugins.vector_code import FLOAT_BYTES, I8, I64, Code, in_kernels

CODED_HEADS = 4
"""Queries that ``code_sums`` takes at most."""


@in_kernels
def code_sums(
    typing_context: Any,
    weights: Any,
    n_heads: Any,
    channels: Any,
    n: Any,
    n_bytes: Any,
    summaries: Any,
    at: Any,
    out: Any,
) -> Any:
    """``out[CODED_TOKENS * g + t] = sum over i < n of weights[n * g + i] * the level of channel channels[i] in token t``.

    For g < ``n_heads`` <= ``CODED_HEADS`` and the codes that begin ``at`` bytes into ``summaries``, of ``n_bytes`` channels.
    ``weights`` and ``out``: fp32, ``channels``: int64, contiguous.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder, signature, arguments, width=CODED_TOKENS)
        _, n_heads, _, n, n_bytes, _, at, _ = arguments
        queries, numbers, to = code.address_of(0), code.address_of(2), code.address_of(7)
        lower = code.plus(code.address_of(5), at)
        upper = code.plus(lower, n_bytes)
        bits = ir.VectorType(ir.IntType(1), CODED_TOKENS)

        def mask(address: Any) -> Any:
            return builder.bitcast(builder.load(builder.inttoptr(address, I8.as_pointer())), bits)

        def with_heads(n_heads: int) -> None:
            def channel(i: Any, sums: list[Any]) -> list[Any]:
                number = builder.load(builder.inttoptr(code.plus(numbers, code.times(i, 8)), I64.as_pointer()))
                masks = [mask(code.plus(plane, number)) for plane in (lower, upper)]
                offset = code.plus(queries, code.times(i, FLOAT_BYTES))
                totals = []
                for g in range(n_heads):
                    factor = code.everywhere(code.plus(offset, code.times(n, FLOAT_BYTES * g)))
                    for plane, is_set in enumerate(masks):
                        totals.append(builder.fadd(sums[2 * g + plane], builder.select(is_set, factor, code.same(0.0))))
                return totals

            sums = code.loop(n, [code.same(0.0)] * (2 * n_heads), channel)
            for g in range(n_heads):
                both = builder.fadd(sums[2 * g], builder.fmul(sums[2 * g + 1], code.same(2.0)))
                code.store(both, code.plus(to, I64(code.bytes * g)))

        code.cases(n_heads, range(1, CODED_HEADS + 1), with_heads)
        return context.get_dummy_value()

    i = types.int64
    return types.void(weights, i, channels, i, i, summaries, i, out), generate
