"""Activations rounded to int8 for products with packed weights (``packed_products.py``, which defines the result)."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from trt_kv.plugins.vector_code import F32, FLOAT_BYTES, I8, I32, I64, in_kernels
from trt_kv.plugins.vector_integers import LANES, WORDS, IntegerCode
from trt_kv.plugins.vector_packed_rows import UNIT

RUN = 2 * UNIT
"""Values whose even and odd places are told apart."""
PADDED = UNIT * LANES
"""Rounded rows are filled up with zeros to a multiple of it."""
SMALLEST = 1e-36
"""Activations whose largest in a unit is smaller count as zeros: the quotient 127 / largest would overflow."""
LARGEST_INTEGER = 127.0
NO_SIGN, INFINITY = 0x7FFFFFFF, 0x7F800000
_declared: Any = cgutils.get_or_insert_function


@in_kernels
def round_row(typing_context: Any, x: Any, row: Any, values: Any, scales: Any, sums: Any, half_sums: Any) -> Any:
    """Round a row of x, fp32 [R, K] with contiguous rows, into the same row of ``RoundedRows``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _Rounding(context, builder, signature, arguments)
        row, b = arguments[1], builder
        shape = context.make_array(signature.args[0])(context, builder, arguments[0]).shape
        n_inputs = b.extract_value(shape, 1)
        source, *places = [code.plus(code.address_of(i), code.times(row, code.row_bytes_of(i))) for i in (0, 2, 3, 4, 5)]
        places.append(code.plus(places[0], code.row_bytes_of(2, 1)))

        def whole(i: Any, _: Any) -> list[Any]:
            code.round_run(code.plus(source, code.times(i, RUN * FLOAT_BYTES)), None, i, places)
            return []

        def partial(i: Any, _: Any) -> list[Any]:
            run = code.plus(n_whole, i)
            rest = b.sub(n_inputs, code.times(run, RUN))
            code.round_run(code.plus(source, code.times(run, RUN * FLOAT_BYTES)), rest, run, places)
            return []

        n_whole = code.quotient(n_inputs, RUN)
        n_runs = code.times(code.quotient(code.plus(n_inputs, PADDED - 1), PADDED), PADDED // RUN)
        code.loop(n_whole, [], whole)
        code.loop(b.sub(n_runs, n_whole), [], partial)
        return context.get_dummy_value()

    return types.void(x, types.int64, values, scales, sums, half_sums), generate


class _Rounding(IntegerCode):
    """Rounds runs of values."""

    def round_run(self, source: Any, rest: Any, run: Any, places: list[Any]) -> None:
        """``rest``: how many values of the run there are, which may be none; None if all. ``places``: of the row's values in
        order, scales, sums, half sums, and values by even and odd places.
        """
        units = []
        for i in range(RUN // UNIT):
            numbers = [self._numbers(source, i * UNIT + v * LANES, rest) for v in range(UNIT // LANES)]
            unit = self.plus(self.times(run, RUN // UNIT), i)
            units.append(self._round_unit(numbers, [self.plus(at, self.times(unit, FLOAT_BYTES)) for at in places[1:3]]))
            for half in range(2):
                at = self.plus(places[3], self.times(unit, 2 * FLOAT_BYTES), half * FLOAT_BYTES)
                self.put_float(units[-1][1 + half], at)
        first, second = (unit[0] for unit in units)
        for parity in range(2):
            split = self.shuffled(first, second, range(parity, RUN, 2))
            self._put(split, self.plus(places[4], self.times(run, RUN), parity * UNIT))
        for i, vector in enumerate((first, second)):
            self._put(vector, self.plus(places[0], self.times(run, RUN), i * UNIT))

    def _numbers(self, source: Any, first: int, rest: Any) -> Any:
        at = self.plus(source, first * FLOAT_BYTES)
        if rest is None:
            return self.load(at)
        return self.read_some(at, self.vector, self.lanes_below(self.builder.sub(rest, I64(first))))

    def _round_unit(self, numbers: list[Any], places: list[Any]) -> tuple[Any, Any, Any]:
        """Integers, and the sums of each half; puts the scale, and the sum, to ``places``."""
        b = self.builder
        magnitudes = [b.and_(b.bitcast(vector, WORDS), WORDS([NO_SIGN] * LANES)) for vector in numbers]
        largest = magnitudes[0]
        for vector in magnitudes[1:]:
            largest = b.select(b.icmp_signed(">", vector, largest), vector, largest)
        top_bits = self._reduced("smax", largest)
        top, zero = b.bitcast(top_bits, F32), F32(0.0)
        is_zero = b.fcmp_ordered("<", top, F32(SMALLEST))
        is_finite = b.icmp_signed("<", top_bits, I32(INFINITY))
        scale = b.select(is_zero, zero, b.fdiv(top, F32(LARGEST_INTEGER)))
        scale = b.select(is_finite, scale, F32(float("nan")))
        inverse = self.spread(b.select(is_zero, zero, b.fdiv(F32(LARGEST_INTEGER), top)))
        finite = self.spread(is_finite)
        nearest = _declared(b.module, ir.FunctionType(self.vector, [self.vector]), f"llvm.rint.v{LANES}f32")
        integers = []
        for vector in numbers:
            scaled = b.call(nearest, [b.fmul(vector, inverse)])
            integers.append(b.fptosi(b.select(finite, scaled, self.same(0.0)), WORDS))
        totals = [self._reduced("add", b.add(*integers[half * 2 : half * 2 + 2])) for half in range(2)]
        sums = [b.fmul(b.sitofp(total, F32), scale) for total in (b.add(*totals), *totals)]
        self.put_float(scale, places[0])
        self.put_float(sums[0], places[1])
        pairs = [self.shuffled(integers[i], integers[i + 1], range(2 * LANES)) for i in (0, 2)]
        return b.trunc(self.shuffled(pairs[0], pairs[1], range(UNIT)), ir.VectorType(I8, UNIT)), sums[1], sums[2]

    def _reduced(self, how: str, words: Any) -> Any:
        function = _declared(self.builder.module, ir.FunctionType(I32, [WORDS]), f"llvm.vector.reduce.{how}.v{LANES}i32")
        return self.builder.call(function, [words])

    def _put(self, vector: Any, address: Any) -> None:
        self.builder.store(vector, self.builder.inttoptr(address, vector.type.as_pointer()), align=1)
