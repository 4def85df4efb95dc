"""Inner loops of attention with one query per head, as vector instructions: what numba's vectoriser makes of loops is slower.

A loop over the numbers of a row has to add the lanes of a vector for each row and query, which takes about as many instructions
as the products. Here up to ``HEADS`` queries and several rows are multiplied at once, with their sums in registers, and the
lanes of all sums are added together, by a tree that ends in one vector with a sum in each lane.

``row`` is an offset in bytes into ``kv``, whose last axis is contiguous: ``n_rows`` rows follow each other at a distance of
``step`` bytes. What is ``ahead`` bytes behind each row is fetched into the second-level cache. Of a row's n numbers only those
of whole vectors are used; the rest is left to the caller.
"""

from typing import Any

from numba import types

from trt_kv.plugins.vector_code import FLOAT_BYTES, I64, Code, in_kernels, width_of

HEADS = 4
"""Queries that a row is multiplied with at once. Products and weights have a number for each of them: [tokens, HEADS]."""
WIDEST = 16
"""The most numbers that a vector may have. Buffers are filled up to multiples of it."""


@in_kernels
def vector_width(typing_context: Any) -> Any:
    """Numbers of a vector: 8 or 16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return I64(width_of(context))

    return types.int64(), code


@in_kernels
def multiply_rows(
    typing_context: Any,
    q: Any,
    q_at: Any,
    n_heads: Any,
    n: Any,
    kv: Any,
    row: Any,
    step: Any,
    ahead: Any,
    n_rows: Any,
    out: Any,
    out_at: Any,
) -> Any:
    """``out[out_at + HEADS * t + g] = sum over c of q[q_at + n * g + c] * row t[c]`` for g < ``n_heads`` <= ``HEADS``.

    Zero for the other g. ``q`` and ``out``: fp32, contiguous. Numbers up to ``WIDEST`` behind the last token are overwritten.
    """
    element_bytes = kv.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder, signature, arguments)
        _, q_at, n_heads, n, _, row, step, ahead, n_rows, _, out_at = arguments
        queries = code.plus(code.address_of(0), code.times(q_at, FLOAT_BYTES))
        first = code.plus(code.address_of(4), row)
        to = code.plus(code.address_of(9), code.times(out_at, FLOAT_BYTES))
        n_tokens = code.width // HEADS
        last = builder.sub(n_rows, I64(1))

        def with_heads(n_heads: int) -> None:
            def tokens(t: Any, _: Any) -> list[Any]:
                block_bytes = code.times(step, n_tokens)
                code.prefetch(code.plus(first, ahead, code.times(t, block_bytes)), block_bytes)
                # Behind the last row it is multiplied again.
                places = [code.plus(code.times(t, n_tokens), i) for i in range(n_tokens)]
                inside = [builder.select(builder.icmp_signed("<", place, last), place, last) for place in places]
                rows = [code.plus(first, code.times(place, step)) for place in inside]

                def products(c: Any, sums: list[Any]) -> list[Any]:
                    offset = code.times(c, code.bytes)
                    heads = [code.load(code.plus(queries, offset, code.times(n, FLOAT_BYTES * g))) for g in range(n_heads)]
                    numbers = [code.load(code.plus(at, code.times(c, element_bytes * code.width)), kv.dtype) for at in rows]
                    pairs = [(number, head) for number in numbers for head in heads]
                    return [code.product_plus(a, b, total) for (a, b), total in zip(pairs, sums, strict=True)]

                zero = code.same(0.0)
                sums = code.loop(code.quotient(n, code.width), [zero] * (n_tokens * n_heads), products)
                lanes = [sums[i * n_heads + g] if g < n_heads else zero for i in range(n_tokens) for g in range(HEADS)]
                total = code.sums_of(lanes)
                if kv.dtype == types.int8:
                    total = builder.fmul(total, code.per_token([code.plus(at, n) for at in rows], HEADS))
                code.store(total, code.plus(to, code.times(t, code.bytes)))
                return []

            code.loop(code.quotient(code.plus(n_rows, n_tokens - 1), n_tokens), [], tokens)

        code.cases(n_heads, range(1, HEADS + 1), with_heads)
        return context.get_dummy_value()

    i = types.int64
    return types.void(q, i, i, i, kv, i, i, i, i, out, i), generate


@in_kernels
def add_rows(
    typing_context: Any,
    weights: Any,
    weights_at: Any,
    n_heads: Any,
    n: Any,
    kv: Any,
    row: Any,
    step: Any,
    ahead: Any,
    n_rows: Any,
    sums: Any,
    sums_at: Any,
) -> Any:
    """``sums[sums_at + n * g + c] += sum over t of weights[weights_at + HEADS * t + g] * row t[c]`` for g < ``n_heads``.

    ``weights`` and ``sums``: fp32, contiguous.
    """
    element_bytes = kv.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder, signature, arguments)
        _, weights_at, n_heads, n, _, row, step, ahead, n_rows, _, sums_at = arguments
        weights_from = code.plus(code.address_of(0), code.times(weights_at, FLOAT_BYTES))
        first = code.plus(code.address_of(4), row)
        to = code.plus(code.address_of(9), code.times(sums_at, FLOAT_BYTES))

        def with_heads(n_heads: int) -> None:
            def columns(from_vector: Any, n_vectors: int) -> None:
                """Add to some vectors of each head's sums, which stay in registers for all rows."""
                offset = code.times(from_vector, code.bytes)
                places = [
                    code.plus(to, offset, code.times(n, FLOAT_BYTES * g), code.bytes * v)
                    for g in range(n_heads)
                    for v in range(n_vectors)
                ]
                part_bytes = element_bytes * code.width
                start = code.plus(first, code.times(from_vector, part_bytes))

                def add(t: Any, totals: list[Any]) -> list[Any]:
                    at = code.plus(start, code.times(t, step))
                    code.prefetch(code.plus(at, ahead), I64(part_bytes * n_vectors))
                    numbers = [code.load(code.plus(at, part_bytes * v), kv.dtype) for v in range(n_vectors)]
                    token = code.plus(weights_from, code.times(t, FLOAT_BYTES * HEADS))
                    factors = [code.everywhere(code.plus(token, FLOAT_BYTES * g)) for g in range(n_heads)]
                    if kv.dtype == types.int8:
                        scale = code.everywhere(code.plus(first, code.times(t, step), n))
                        factors = [builder.fmul(factor, scale) for factor in factors]
                    pairs = [(number, factor) for factor in factors for number in numbers]
                    return [code.product_plus(a, b, total) for (a, b), total in zip(pairs, totals, strict=True)]

                totals = code.loop(n_rows, [code.load(place) for place in places], add)
                for place, total in zip(places, totals, strict=True):
                    code.store(total, place)

            def several(i: Any, _: Any) -> list[Any]:
                columns(code.times(i, at_once), at_once)
                return []

            def one(i: Any, _: Any) -> list[Any]:
                columns(code.plus(i, code.times(n_several, at_once)), 1)
                return []

            at_once = code.width // HEADS  # With HEADS heads, 16 of 32 registers are sums with AVX-512, 8 of 16 without.
            n_several = code.quotient(n, code.width * at_once)
            code.loop(n_several, [], several)
            code.loop(builder.sub(code.quotient(n, code.width), code.times(n_several, at_once)), [], one)

        code.cases(n_heads, range(1, HEADS + 1), with_heads)
        return context.get_dummy_value()

    signature = types.void(
        weights,
        types.int64,
        types.int64,
        types.int64,
        kv,
        types.int64,
        types.int64,
        types.int64,
        types.int64,
        sums,
        types.int64,
    )
    return signature, generate


@in_kernels
def exponentiate(typing_context: Any, weights: Any, n: Any, largest: Any, total: Any, shrink: Any) -> Any:
    """Replace logits ``weights[:n]`` [tokens, HEADS] by exp(logit - largest), where largest becomes the head's maximum so far.

    ``shrink``: by what sums with earlier weights have to be multiplied. ``total``: the sums of the weights of every
    ``WIDEST // HEADS``-th token, or fewer lanes. All three: [WIDEST] fp32 with a head in every ``HEADS``-th place; n is a
    multiple of ``WIDEST``. Hidden logits are -inf; NaN stays NaN.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder, signature, arguments)
        first, count = code.address_of(0), code.quotient(arguments[1], code.width)
        largest_at, total_at, shrink_at = (code.address_of(i) for i in (2, 3, 4))

        def find(i: Any, carried: list[Any]) -> list[Any]:
            return [code.larger(code.load(code.plus(first, code.times(i, code.bytes))), carried[0])]

        before = code.load(largest_at)
        largest = code.in_all_lanes(code.loop(count, [before], find)[0], code.larger, HEADS)
        nothing = builder.fcmp_ordered("==", largest, code.same(float("-inf")))
        base = builder.select(nothing, code.same(0.0), largest)
        shrunk = code.exp_or_zero(builder.fsub(before, base))

        def replace(i: Any, carried: list[Any]) -> list[Any]:
            at = code.plus(first, code.times(i, code.bytes))
            power = code.exp_or_zero(builder.fsub(code.load(at), base))
            code.store(power, at)
            return [builder.fadd(carried[0], power)]

        (sums,) = code.loop(count, [builder.fmul(code.load(total_at), shrunk)], replace)
        for vector, at in ((largest, largest_at), (sums, total_at), (shrunk, shrink_at)):
            code.store(vector, at)
        return context.get_dummy_value()

    return types.void(weights, types.int64, largest, total, shrink), generate
