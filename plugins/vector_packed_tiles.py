"""Many rows times packed weights: a tile of columns is unpacked once, into the order of the products, and stays in the cache.

The lanes of a vector are 8 columns. Sums have the same addends in the same order as in ``vector_packed_rows.py``, where the
lanes are units: a chain here is a lane there.
"""

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from trt_kv.plugins.packed_weights import BIAS, BLOCK_SIZE, BLOCKS, N_BITS, N_BLOCKS, OFFSETS, SCALES, ZERO_POINTS
from trt_kv.plugins.vector_code import F32, FLOAT_BYTES, I8, I32, I64, in_kernels
from trt_kv.plugins.vector_integers import BYTES, LANES, VECTOR_BYTES, IntegerCode
from trt_kv.plugins.vector_packed_rows import UNIT, Matrix, same

TILE_COLUMNS = 16
ROWS = 4
"""Rows and columns whose sums are in registers at once."""
HALVES = TILE_COLUMNS // LANES
WORD_BYTES = 4
UNIT_BYTES = UNIT * TILE_COLUMNS * 2
"""The most memory that a unit of a tile takes: of 8 bits with AVX2 a byte for each half of a number."""
UNIT_FLOATS = 2 * TILE_COLUMNS
"""Scales and corrections of a unit of a tile."""


_allocated: Any = cgutils.alloca_once


class _Form:
    """How a unit is laid out: ``words`` of 4 values per column, each with the place of the 4 activations, and a factor."""

    def __init__(self, code: IntegerCode, bits: int, unit: int) -> None:
        self.code, self.bits, self.unit = code, bits, unit
        self.stored_words = unit * bits // 8 // WORD_BYTES
        # Runs of ``stored_words`` words: the place of the first one's activations, and a factor.
        self.runs = [(0, 1), (UNIT, 1)] if bits == 4 else [(0, factor) for factor in code.plane_factors]
        self.word_bytes = TILE_COLUMNS * WORD_BYTES
        self.run_bytes = self.stored_words * self.word_bytes
        self.unit_bytes = len(self.runs) * self.run_bytes

    def unpacked(self, stored: list[Any]) -> list[Any]:
        """Vectors of 4 bytes per column in the order of ``runs``."""
        if self.bits == 4:
            return [half(vector) for half in (self.code.low_halves, self.code.high_halves) for vector in stored]
        planes = [self.code.planes(vector) for vector in stored]
        return [plane[i][0] for i in range(len(planes[0])) for plane in planes]

    def first_activation(self, unit: Any) -> Any:
        """The offset of a unit's activations."""
        code = self.code
        if self.bits == 8:
            return code.times(unit, self.unit)
        per_run = 2 * UNIT // self.unit
        run = code.builder.udiv(unit, I64(per_run))
        within = code.builder.and_(unit, I64(per_run - 1))
        return code.plus(code.times(run, 2 * UNIT), code.times(within, self.unit // 2))


def _by_form(code: IntegerCode, weights: Matrix, body: Any) -> None:
    is_half = code.builder.zext(code.builder.icmp_signed("<", weights.fields[BLOCK_SIZE], I64(UNIT)), I64)

    def with_form(form: int) -> None:
        body(_Form(code, form & 12, UNIT // 2 if form & 1 else UNIT))

    code.cases(code.plus(weights.fields[N_BITS], is_half), [4, 5, 8, 9], with_form)


def _n_units(code: IntegerCode, weights: Matrix, unit: int) -> Any:
    return code.quotient(code.builder.mul(weights.fields[N_BLOCKS], weights.fields[BLOCK_SIZE]), unit)


@in_kernels
def unpack_tile(typing_context: Any, table: Any, matrix: Any, column: Any, tile: Any, factors: Any) -> Any:
    """Unpack ``TILE_COLUMNS`` columns from ``column`` on, and fetch those behind them into the second-level cache.

    ``tile``: uint8, ``UNIT_BYTES`` per unit. ``factors``: fp32, ``UNIT_FLOATS`` per unit.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = IntegerCode(context, builder, signature, arguments)
        weights = Matrix(code, code.address_of(0), arguments[1])
        fields, b = weights.fields, builder

        def with_form(form: _Form) -> None:
            n_units = _n_units(code, weights, form.unit)
            block_bytes = code.quotient(code.times(fields[BLOCK_SIZE], form.bits), 8)
            row_bytes = b.mul(fields[N_BLOCKS], block_bytes)
            columns = [code.plus(arguments[2], i) for i in range(TILE_COLUMNS)]
            rows = [code.plus(fields[BLOCKS], b.mul(column, row_bytes)) for column in columns]
            units_per_block = code.quotient(fields[BLOCK_SIZE], form.unit)

            def one_unit(u: Any, _: Any) -> list[Any]:
                block = b.udiv(u, units_per_block)
                for half in range(HALVES):
                    some = slice(half * LANES, (half + 1) * LANES)
                    offset = code.times(u, form.stored_words * WORD_BYTES)
                    stored = _transposed(code, [code.plus(row, offset) for row in rows[some]], form.stored_words)
                    to = code.plus(code.address_of(3), code.times(u, form.unit_bytes), half * VECTOR_BYTES)
                    for i, vector in enumerate(form.unpacked(stored)):
                        _put(code, vector, code.plus(to, i * form.word_bytes))
                    at = code.plus(code.address_of(4), code.times(u, UNIT_FLOATS * FLOAT_BYTES), half * code.bytes)
                    scale, correction = _factors(code, weights, form, columns[some], block)
                    code.store(scale, at)
                    code.store(correction, code.plus(at, TILE_COLUMNS * FLOAT_BYTES))
                return []

            code.loop(n_units, [], one_unit)
            following = code.plus(arguments[2], TILE_COLUMNS)
            scale_bytes = code.times(fields[N_BLOCKS], FLOAT_BYTES)
            for field, n_bytes in ((BLOCKS, row_bytes), (SCALES, scale_bytes), (OFFSETS, scale_bytes)):
                code.prefetch(code.plus(fields[field], b.mul(following, n_bytes)), code.times(n_bytes, TILE_COLUMNS))

        _by_form(code, weights, with_form)
        return context.get_dummy_value()

    return types.void(table, types.int64, types.int64, tile, factors), generate


def _put(code: IntegerCode, vector: Any, address: Any) -> None:
    code.builder.store(vector, code.builder.inttoptr(address, vector.type.as_pointer()), align=1)


def _transposed(code: IntegerCode, rows: list[Any], n_words: int) -> list[Any]:
    """Of 8 rows the first words, of 4 bytes each: a vector with a lane per row for each word."""
    results = []
    for first in range(0, n_words, 4):
        n = min(4, n_words - first)
        fours = []
        for row in rows:
            words = code.read(code.plus(row, first * WORD_BYTES), ir.VectorType(I32, n))
            fours.append(words if n == 4 else code.shuffled(words, words, [lane % n for lane in range(4)]))
        a, b, c, d = (code.shuffled(fours[i], fours[i + 4], range(LANES)) for i in range(4))
        low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
        first_pairs, last_pairs = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        ab, cd = code.shuffled(a, b, low), code.shuffled(c, d, low)
        vectors = [code.shuffled(ab, cd, first_pairs), code.shuffled(ab, cd, last_pairs)]
        ab, cd = code.shuffled(a, b, high), code.shuffled(c, d, high)
        vectors += [code.shuffled(ab, cd, first_pairs), code.shuffled(ab, cd, last_pairs)]
        results += [code.builder.bitcast(vector, BYTES) for vector in vectors[:n]]
    return results


def _factors(code: IntegerCode, weights: Matrix, form: _Form, columns: list[Any], block: Any) -> tuple[Any, Any]:
    """Scales and corrections of a block of 8 columns."""
    fields, b = weights.fields, code.builder

    def floats(field: int) -> Any:
        vector = ir.Constant(code.vector, ir.Undefined)
        for lane, column in enumerate(columns):
            place = code.plus(b.mul(column, fields[N_BLOCKS]), block)
            number = code.read(code.plus(fields[field], code.times(place, FLOAT_BYTES)), F32)
            vector = b.insert_element(vector, number, I32(lane))
        return vector

    def zero_points() -> Any:
        row_bytes = code.quotient(code.plus(code.times(fields[N_BLOCKS], form.bits), 7), 8)
        vector = ir.Constant(ir.VectorType(I8, LANES), ir.Undefined)
        place = code.quotient(code.times(block, form.bits), 8)
        for lane, column in enumerate(columns):
            byte = code.read(code.plus(fields[ZERO_POINTS], b.mul(column, row_bytes), place), I8)
            if form.bits == 4:
                odd = b.trunc(b.and_(block, I64(1)), I8)
                byte = b.and_(b.lshr(byte, b.mul(odd, I8(4))), I8(15))
            vector = b.insert_element(vector, byte, I32(lane))
        return b.uitofp(vector, code.vector)

    scale = floats(SCALES)
    zero = code.chosen(fields[ZERO_POINTS], {0: lambda: code.same(2.0 ** (form.bits - 1))}, zero_points)
    offset = code.chosen(fields[OFFSETS], {0: lambda: code.same(0.0)}, lambda: floats(OFFSETS))
    return scale, code.fused(b.fneg(scale), zero, offset)


@in_kernels
def multiply_tile(
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
    tile: Any,
    factors: Any,
    out: Any,
    out_column: Any,
) -> Any:
    """``out[first_row + r, out_column + i]``: products of r < ``n_rows`` rows with the columns of an unpacked tile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = IntegerCode(context, builder, signature, arguments)
        first_row, n_rows, column, out_column = (arguments[i] for i in (4, 5, 8, 12))
        weights, b = Matrix(code, code.address_of(6), arguments[7]), builder
        last = b.sub(n_rows, I64(1))
        chain_type = ir.ArrayType(code.vector, ROWS * HALVES)
        memory = b.ptrtoint(_allocated(b, chain_type, size=I32(LANES)), I64)
        n_sums = ROWS * HALVES

        def with_form(form: _Form) -> None:
            product = _Tile(code, form, _n_units(code, weights, form.unit))

            def some_rows(i: Any, _: Any) -> list[Any]:
                # Behind the last row it is multiplied again.
                places = [code.plus(code.times(i, ROWS), r) for r in range(ROWS)]
                rows = [code.plus(first_row, b.select(b.icmp_signed("<", place, last), place, last)) for place in places]
                for k in range(LANES * n_sums):
                    code.store(code.same(0.0), code.plus(memory, k * code.bytes))
                product.add_units(rows, memory)
                for k in range(n_sums):
                    chains = [code.load(code.plus(memory, (c * n_sums + k) * code.bytes)) for c in range(LANES)]
                    for n in (4, 2, 1):
                        chains = [b.fadd(chains[c], chains[c + n]) for c in range(n)]
                    row, half = rows[k // HALVES], k % HALVES

                    def biased(total: Any = chains[0], half: int = half) -> Any:
                        at = code.plus(weights.fields[BIAS], code.times(column, FLOAT_BYTES), half * code.bytes)
                        return b.fadd(total, code.load(at))

                    total = code.chosen(weights.fields[BIAS], {0: partial(same, chains[0])}, biased)
                    line = code.plus(code.address_of(11), code.times(row, code.row_bytes_of(11)))
                    code.store(total, code.plus(line, code.times(out_column, FLOAT_BYTES), half * code.bytes))
                return []

            code.loop(code.quotient(code.plus(n_rows, ROWS - 1), ROWS), [], some_rows)

        _by_form(code, weights, with_form)
        return context.get_dummy_value()

    i = types.int64
    return types.void(values, scales, sums, half_sums, i, i, table, i, i, tile, factors, out, i), generate


class _Tile:
    """The sums of ``ROWS`` rows with a tile."""

    def __init__(self, code: IntegerCode, form: _Form, n_units: Any) -> None:
        self.code, self.form, self.n_units = code, form, n_units

    def add_units(self, rows: list[Any], chains: Any) -> None:
        """Add every unit to its chain: fp32 [LANES, ROWS, TILE_COLUMNS] in memory, because there are not enough registers."""
        code, form = self.code, self.form
        sums_argument = 2 if form.unit == UNIT else 3
        values, scales, sums = (
            [code.plus(code.address_of(i), code.times(row, code.row_bytes_of(i))) for row in rows]
            for i in (0, 1, sums_argument)
        )
        order = code.times(code.row_bytes_of(0, 1), int(form.bits == 4))

        def one_unit(u: Any, _: Any) -> list[Any]:
            place = code.plus(order, form.first_activation(u))
            tile = code.plus(code.address_of(9), code.times(u, form.unit_bytes))
            dots = self._dots(tile, [code.plus(row, place) for row in values])
            factors = code.plus(code.address_of(10), code.times(u, UNIT_FLOATS * FLOAT_BYTES))
            chain = code.builder.and_(u, I64(LANES - 1))
            to = code.plus(chains, code.times(chain, ROWS * HALVES * code.bytes))
            scale_at = code.times(u if form.unit == UNIT else code.quotient(u, 2), FLOAT_BYTES)
            for r in range(ROWS):
                scale = code.everywhere(code.plus(scales[r], scale_at))
                total = code.everywhere(code.plus(sums[r], code.times(u, FLOAT_BYTES)))
                for half in range(HALVES):
                    k = r * HALVES + half
                    weight_scale = code.load(code.plus(factors, half * code.bytes))
                    correction = code.load(code.plus(factors, (HALVES + half) * code.bytes))
                    at = code.plus(to, k * code.bytes)
                    numbers = code.builder.sitofp(dots[k], code.vector)
                    added = code.fused(code.builder.fmul(scale, weight_scale), numbers, code.load(at))
                    code.store(code.fused(correction, total, added), at)
            return []

        code.loop(self.n_units, [], one_unit)

    def _dots(self, unit: Any, values: list[Any]) -> list[Any]:
        code, form = self.code, self.form
        by_factor: dict[int, list[Any]] = {}
        for i, (place, factor) in enumerate(form.runs):
            for j in range(form.stored_words):
                at = code.plus(unit, i * form.run_bytes + j * form.word_bytes)
                columns = [code.read(code.plus(at, half * VECTOR_BYTES), BYTES) for half in range(HALVES)]
                totals = by_factor.get(factor, [None] * (ROWS * HALVES))
                results = []
                for r, row in enumerate(values):
                    word = code.spread(code.read(code.plus(row, place + j * WORD_BYTES), I32))
                    signed = code.builder.bitcast(word, BYTES)
                    some = totals[r * HALVES : (r + 1) * HALVES]
                    results += [code.add_products(total, part, signed) for total, part in zip(some, columns, strict=True)]
                by_factor[factor] = code.in_registers(results)
        return [code.whole_sum(dict(zip(by_factor, totals, strict=True))) for totals in zip(*by_factor.values(), strict=True)]
