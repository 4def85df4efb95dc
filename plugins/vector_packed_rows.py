"""A few rows times packed weights where they are, one column of the product after the other: for weights read from memory once.

The lanes of a vector are 8 units of a column, so that its blocks, scales and offsets are read in the order of memory.
"""

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from trt_kv.plugins.packed_weights import (
    BIAS,
    BLOCK_SIZE,
    BLOCKS,
    FIELDS,
    N_BITS,
    N_BLOCKS,
    OFFSETS,
    SCALES,
    ZERO_POINTS,
)
from trt_kv.plugins.vector_code import F32, FLOAT_BYTES, I8, I32, I64, in_kernels
from trt_kv.plugins.vector_integers import BYTES, LANES, VECTOR_BYTES, WORDS, IntegerCode

UNIT = 32
FEW = 4
"""Rows that weights are multiplied with while they are in registers."""
FIELD_BYTES = 8


class Matrix:
    """A row of a ``weight_table``, and how it is read in one of the forms that differ in code."""

    def __init__(self, code: IntegerCode, table: Any, matrix: Any) -> None:
        self.code = code
        at = code.plus(table, code.times(matrix, FIELDS * FIELD_BYTES))
        self.fields = [code.read(code.plus(at, i * FIELD_BYTES), I64) for i in range(FIELDS)]

    def per_block(self, field: int, column: Any, n_bytes: Any) -> Any:
        return self.code.plus(self.fields[field], self.code.times(column, n_bytes))

    def lanes_of_blocks(self, read: Any, unit: int) -> Any:
        """A vector with a lane per unit: ``read(n)`` has the items of the n blocks that 8 units are in."""
        code = self.code

        def spread_over(n_blocks: int) -> Any:
            vector = read(n_blocks)
            return vector if n_blocks == LANES else code.shuffled(vector, vector, [i * n_blocks // LANES for i in range(LANES)])

        if unit < UNIT:
            return spread_over(LANES)
        bodies = {size: partial(spread_over, LANES * UNIT // size) for size in (64, 128)}
        return code.chosen(self.fields[BLOCK_SIZE], bodies, lambda: spread_over(LANES))


@in_kernels
def multiply_columns(
    typing_context: Any,
    values: Any,
    scales: Any,
    sums: Any,
    half_sums: Any,
    first_row: Any,
    n_rows: Any,
    table: Any,
    matrix: Any,
    column: Any,
    n_columns: Any,
    out: Any,
    out_column: Any,
) -> Any:
    """``out[first_row + r, out_column + i]``: products of r < ``n_rows`` <= ``FEW`` rows with ``n_columns`` columns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = IntegerCode(context, builder, signature, arguments)
        _, _, _, _, first_row, n_rows, _, matrix, column, n_columns, _, out_column = arguments
        weights = Matrix(code, code.address_of(6), matrix)
        last = builder.sub(n_rows, I64(1))

        def with_rows(count: int, bits: int, unit: int) -> None:
            # Behind the last row it is multiplied again.
            places = [builder.select(builder.icmp_signed("<", I64(i), last), I64(i), last) for i in range(count)]
            rows = [code.plus(first_row, place) for place in places]
            sums_argument = 2 if unit == UNIT else 3
            order = code.times(code.row_bytes_of(0, 1), int(bits == 4))
            inputs = [
                (
                    code.plus(code.address_of(0), code.times(row, code.row_bytes_of(0)), order),
                    code.plus(code.address_of(1), code.times(row, code.row_bytes_of(1))),
                    code.plus(code.address_of(sums_argument), code.times(row, code.row_bytes_of(sums_argument))),
                )
                for row in rows
            ]
            outputs = [
                code.plus(code.address_of(10), code.times(row, code.row_bytes_of(10)), code.times(out_column, FLOAT_BYTES))
                for row in rows
            ]
            product = _Columns(code, weights, bits, unit)

            def one_column(i: Any, _: Any) -> list[Any]:
                for total, at in zip(product.totals(code.plus(column, i), inputs), outputs, strict=True):
                    code.put_float(total, code.plus(at, code.times(i, FLOAT_BYTES)))
                return []

            code.loop(n_columns, [], one_column)

        # The forms: bits, and units of 16 or 32 values.
        size = weights.fields[BLOCK_SIZE]
        is_half = builder.zext(builder.icmp_signed("<", size, I64(UNIT)), I64)
        is_one = builder.zext(builder.icmp_signed("==", n_rows, I64(1)), I64)
        form = code.plus(weights.fields[N_BITS], is_half, code.times(is_one, 2))

        def with_form(form: int) -> None:
            with_rows(1 if form & 2 else FEW, form & 12, UNIT // 2 if form & 1 else UNIT)

        code.cases(form, [bits + kind for bits in (4, 8) for kind in range(4)], with_form)
        return context.get_dummy_value()

    i = types.int64
    return types.void(values, scales, sums, half_sums, i, i, table, i, i, i, out, i), generate


def same(value: Any) -> Any:
    """The value: what ``chosen`` takes if nothing is added."""
    return value


class _Columns:
    """The sums of one column at a time, in one of the forms."""

    def __init__(self, code: IntegerCode, weights: Matrix, bits: int, unit: int) -> None:
        self.code, self.weights, self.bits, self.unit = code, weights, bits, unit
        size, n_blocks = weights.fields[BLOCK_SIZE], weights.fields[N_BLOCKS]
        values = code.builder.mul(n_blocks, size)
        self.row_bytes = code.quotient(code.times(values, bits), 8)
        self.zero_bytes = code.quotient(code.plus(code.times(n_blocks, bits), 7), 8)
        self.n_units = code.quotient(values, unit)
        self.n_groups = code.quotient(self.n_units, LANES)
        self.n_vectors = LANES * unit * bits // 8 // VECTOR_BYTES
        lanes_per_unit = unit * bits // 32
        self.labels = [[(v * LANES + lane) // lanes_per_unit for lane in range(LANES)] for v in range(self.n_vectors)]

    def totals(self, column: Any, inputs: list[tuple[Any, Any, Any]]) -> list[Any]:
        code, b = self.code, self.code.builder
        scale_bytes = code.times(self.weights.fields[N_BLOCKS], FLOAT_BYTES)
        self.blocks = code.plus(self.weights.fields[BLOCKS], b.mul(column, self.row_bytes))
        self.scales = code.plus(self.weights.fields[SCALES], b.mul(column, scale_bytes))
        self.offsets = code.plus(self.weights.fields[OFFSETS], b.mul(column, scale_bytes))
        self.zeros = code.plus(self.weights.fields[ZERO_POINTS], b.mul(column, self.zero_bytes))
        start = [code.same(0.0)] * len(inputs)
        totals = code.loop(self.n_groups, start, lambda g, carried: self._group(g, carried, inputs, None, self.n_vectors))
        rest = b.sub(self.n_units, code.times(self.n_groups, LANES))
        per_vector = I64(LANES // self.n_vectors)
        is_short = b.and_(b.icmp_signed(">", rest, I64(0)), b.icmp_signed("<=", rest, per_vector))
        is_long = b.icmp_signed(">", rest, per_vector)
        for which, n in ((is_short, 1), (is_long, self.n_vectors)):
            totals = code.loop(b.zext(which, I64), totals, partial(self._last_group, inputs, rest, n))
        sums = [code.sum_of_lanes(total) for total in totals]

        def biased(total: Any) -> Any:
            at = code.plus(self.weights.fields[BIAS], code.times(column, FLOAT_BYTES))
            return b.fadd(total, code.read(at, F32))

        absent = self.weights.fields[BIAS]
        return [code.chosen(absent, {0: partial(same, total)}, partial(biased, total)) for total in sums]

    def _last_group(
        self, inputs: list[tuple[Any, Any, Any]], rest: Any, n_vectors: int, _: Any, totals: list[Any]
    ) -> list[Any]:
        return self._group(self.n_groups, totals, inputs, rest, n_vectors)

    def _group(self, group: Any, totals: list[Any], inputs: list[tuple[Any, Any, Any]], rest: Any, n_vectors: int) -> list[Any]:
        """Add 8 units of the column, of which there are only ``rest``, in ``n_vectors`` vectors, if that is not None."""
        code, b = self.code, self.code.builder
        at = code.plus(self.blocks, code.times(group, self.n_vectors * VECTOR_BYTES))
        stored = [self._stored(code.plus(at, VECTOR_BYTES * v), v, rest) for v in range(n_vectors)]
        scale = self._floats(self.scales, group, rest)
        offset = code.chosen(
            self.weights.fields[OFFSETS], {0: lambda: code.same(0.0)}, lambda: self._floats(self.offsets, group, rest)
        )
        zero = code.chosen(
            self.weights.fields[ZERO_POINTS],
            {0: lambda: code.same(2.0 ** (self.bits - 1))},
            lambda: self._zero_points(group, rest),
        )
        correction = code.fused(b.fneg(scale), zero, offset)
        results = []
        for total, (values, scales, sums) in zip(totals, inputs, strict=True):
            dots = b.sitofp(self._dots(stored, code.plus(values, code.times(group, LANES * self.unit))), code.vector)
            activation_scale = self._activation_scales(scales, group)
            added = code.fused(b.fmul(activation_scale, scale), dots, total)
            added = code.fused(correction, code.load(code.plus(sums, code.times(group, code.bytes))), added)
            results.append(added if rest is None else b.select(code.lanes_below(rest), added, total))
        return results

    def _stored(self, at: Any, v: int, rest: Any) -> Any:
        code = self.code
        if rest is None:
            return code.read(at, BYTES)
        n_words = code.builder.sub(code.times(rest, self.unit * self.bits // 32), I64(v * LANES))
        return code.builder.bitcast(code.read_some(at, WORDS, code.lanes_below(n_words)), BYTES)

    def _dots(self, stored: list[Any], values: Any) -> Any:
        code = self.code
        sums = []
        for v, vector in enumerate(stored):
            if self.bits == 4:
                at = code.plus(values, 2 * VECTOR_BYTES * v)
                total = code.add_products(None, code.low_halves(vector), code.read(at, BYTES))
                halves = code.high_halves(vector)
                sums.append(code.whole(code.add_products(total, halves, code.read(code.plus(at, VECTOR_BYTES), BYTES))))
            else:
                signed = code.read(code.plus(values, VECTOR_BYTES * v), BYTES)
                totals = {factor: code.add_products(None, plane, signed) for plane, factor in code.planes(vector)}
                sums.append(code.whole_sum(totals))
        sums += [ir.Constant(WORDS, None)] * (self.n_vectors - len(sums))
        return code.sums_by_label(sums, self.labels)

    def _activation_scales(self, scales: Any, group: Any) -> Any:
        code = self.code
        if self.unit == UNIT:
            return code.load(code.plus(scales, code.times(group, code.bytes)))
        four = code.read(code.plus(scales, code.times(group, code.bytes // 2)), ir.VectorType(F32, 4))
        return code.shuffled(four, four, [0, 0, 1, 1, 2, 2, 3, 3])

    def _floats(self, row: Any, group: Any, rest: Any) -> Any:
        code = self.code

        def read(n_blocks: int) -> Any:
            at, kind = code.plus(row, code.times(group, n_blocks * FLOAT_BYTES)), ir.VectorType(F32, n_blocks)
            if rest is None:
                return code.read(at, kind)
            if n_blocks < 4:  # of 4 lanes, for which there are instructions
                four = code.read_some(at, ir.VectorType(F32, 4), code.lanes_below(self._blocks_of(rest, n_blocks), 4))
                return code.shuffled(four, four, range(n_blocks))
            return code.read_some(at, kind, code.lanes_below(self._blocks_of(rest, n_blocks), n_blocks))

        return self.weights.lanes_of_blocks(read, self.unit)

    def _blocks_of(self, rest: Any, n_blocks: int) -> Any:
        per_block = LANES // n_blocks
        return self.code.quotient(self.code.plus(rest, per_block - 1), per_block)

    def _zero_points(self, group: Any, rest: Any) -> Any:
        code, b = self.code, self.code.builder

        def read(n_blocks: int) -> Any:
            n_bytes = n_blocks * self.bits // 8
            at = code.plus(self.zeros, code.times(group, n_bytes))
            if rest is None:
                stored = code.read(at, ir.VectorType(I8, n_bytes))
            else:
                stored = ir.Constant(ir.VectorType(I8, n_bytes), None)
                end = code.plus(self.zeros, self.zero_bytes, -1)
                for i in range(n_bytes):  # behind the last byte it is read again
                    place = code.plus(at, i)
                    inside = b.select(b.icmp_signed("<", place, end), place, end)
                    stored = b.insert_element(stored, code.read(inside, I8), I32(i))
            if self.bits == 4:
                twice = code.shuffled(stored, stored, [i // 2 for i in range(n_blocks)])
                halves = ir.VectorType(I8, n_blocks)
                stored = b.and_(b.lshr(twice, halves([4 * (i % 2) for i in range(n_blocks)])), halves([15] * n_blocks))
            return b.uitofp(stored, ir.VectorType(F32, n_blocks))

        return self.weights.lanes_of_blocks(read, self.unit)
