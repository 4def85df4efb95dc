"""Products of small matrices with their sums in registers, for blocks of a chunk's attention."""

from typing import Any

from numba import types

from trt_kv.plugins.vector_code import FLOAT_BYTES, Code, in_kernels

ROWS = {16: 8, 8: 6}
"""Rows whose sums are in registers at once, by the width of vectors, with ``VECTORS`` vectors of columns: in 16 of 32 registers
with AVX-512, else in 12 of 16, which leaves some for the factors.
"""
VECTORS = 2


@in_kernels
def accumulate(typing_context: Any, a: Any, b: Any, out: Any, n_rows: Any, n_terms: Any, n_columns: Any) -> Any:
    """``out[r, s] += sum over c of a[r, c] * b[c, s]``: all fp32 with contiguous rows; s in the whole vectors of the columns.

    Terms are added in order of c, so that a row has the same bits wherever it is among the rows.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder, signature, arguments)
        n_rows, n_terms, n_columns = arguments[3:]
        bases = [code.address_of(i) for i in range(3)]
        steps = [code.row_bytes_of(i) for i in range(3)]
        at_once = ROWS[code.width]

        def panel(columns: Any, n_vectors: int) -> None:
            offset = code.times(columns, code.bytes)

            def rows(first_row: Any, count: int) -> None:
                lines = [code.plus(first_row, r) for r in range(count)]
                a_rows = [code.plus(bases[0], code.times(line, steps[0])) for line in lines]
                places = [
                    code.plus(bases[2], offset, code.times(line, steps[2]), code.bytes * v)
                    for line in lines
                    for v in range(n_vectors)
                ]

                def term(c: Any, sums: list[Any]) -> list[Any]:
                    at = code.plus(bases[1], offset, code.times(c, steps[1]))
                    numbers = [code.load(code.plus(at, code.bytes * v)) for v in range(n_vectors)]
                    factors = [code.everywhere(code.plus(row, code.times(c, FLOAT_BYTES))) for row in a_rows]
                    pairs = [(number, factor) for factor in factors for number in numbers]
                    return [code.product_plus(x, y, total) for (x, y), total in zip(pairs, sums, strict=True)]

                totals = code.loop(n_terms, [code.load(place) for place in places], term)
                for place, total in zip(places, totals, strict=True):
                    code.store(total, place)

            def several(i: Any, _: Any) -> list[Any]:
                rows(code.times(i, at_once), at_once)
                return []

            def one(i: Any, _: Any) -> list[Any]:
                rows(code.plus(i, code.times(whole, at_once)), 1)
                return []

            whole = code.quotient(n_rows, at_once)
            code.loop(whole, [], several)
            code.loop(builder.sub(n_rows, code.times(whole, at_once)), [], one)

        def pair(i: Any, _: Any) -> list[Any]:
            panel(code.times(i, VECTORS), VECTORS)
            return []

        def last(i: Any, _: Any) -> list[Any]:
            panel(code.plus(i, code.times(pairs, VECTORS)), 1)
            return []

        vectors = code.quotient(n_columns, code.width)
        pairs = code.quotient(vectors, VECTORS)
        code.loop(pairs, [], pair)
        code.loop(builder.sub(vectors, code.times(pairs, VECTORS)), [], last)
        return context.get_dummy_value()

    return types.void(a, b, out, types.int64, types.int64, types.int64), generate
