"""Instructions on vectors of fp32 numbers, in LLVM's language, for ``plugins/vectors.py``.

Vectors are as wide as those of the processor for which numba compiles: 16 numbers with AVX-512, else 8.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from trt_kv.plugins.fast_math import C0, C1, C2, C3, C4, C5, C6, LOG2_E, SMALLEST

F32, F16, I8, I16, I32, I64 = ir.FloatType(), ir.HalfType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT_BYTES = 4
LINE_BYTES = 64
_declared: Any = cgutils.get_or_insert_function
COEFFICIENTS = tuple(float(c) for c in (C0, C1, C2, C3, C4, C5, C6))


def in_kernels(generator: Callable[..., Any]) -> Any:
    """``numba.extending.intrinsic`` without its types: kernels leave out the first argument, the context."""
    return intrinsic(generator)


def width_of(context: Any) -> int:
    """Numbers of a vector on the processor that ``context`` compiles for."""
    return 16 if "+avx512f" in context.codegen().magic_tuple()[2] else 8


class Code:
    """Adds the instructions of an intrinsic to its caller. Addresses are integers, offsets from them bytes.

    ``width``: numbers of a vector, if not those of the processor.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, width: int | None = None) -> None:
        self.context, self.builder = context, builder
        self.types, self.arguments = signature.args, arguments
        self.width = width or width_of(context)
        self.vector = ir.VectorType(F32, self.width)
        self.bytes = FLOAT_BYTES * self.width

    def address_of(self, argument: int) -> Any:
        """The address of an array's first element."""
        array = self.context.make_array(self.types[argument])(self.context, self.builder, self.arguments[argument])
        return self.builder.ptrtoint(array.data, I64)

    def row_bytes_of(self, argument: int, axis: int = 0) -> Any:
        """The distance between an array's rows, or what is next to each other along another axis."""
        array = self.context.make_array(self.types[argument])(self.context, self.builder, self.arguments[argument])
        return self.builder.extract_value(array.strides, axis)

    def plus(self, value: Any, *others: Any) -> Any:
        for other in others:
            value = self.builder.add(value, other if isinstance(other, ir.Value) else I64(other))
        return value

    def times(self, value: Any, factor: Any) -> Any:
        return self.builder.mul(value, factor if isinstance(factor, ir.Value) else I64(factor))

    def quotient(self, value: Any, divisor: int) -> Any:
        return self.builder.sdiv(value, I64(divisor))

    def load(self, address: Any, element: Any = types.float32) -> Any:
        """A vector of fp32 numbers from elements as ``kv_rows`` stores them; int8 without the row's scale."""
        b = self.builder
        stored = {types.float32: F32, types.int16: F16, types.uint16: I16, types.int8: I8}[element]
        raw = b.load(b.inttoptr(address, ir.VectorType(stored, self.width).as_pointer()), align=1)
        if element == types.int16:
            return b.fpext(raw, self.vector)
        if element == types.uint16:
            ints = ir.VectorType(I32, self.width)
            return b.bitcast(b.shl(b.zext(raw, ints), ints([16] * self.width)), self.vector)
        return raw if element == types.float32 else b.sitofp(raw, self.vector)

    def store(self, vector: Any, address: Any) -> None:
        self.builder.store(vector, self.builder.inttoptr(address, self.vector.as_pointer()), align=FLOAT_BYTES)

    def everywhere(self, address: Any) -> Any:
        """The number at an address, in all lanes."""
        number = self.builder.load(self.builder.inttoptr(address, F32.as_pointer()), align=1)
        first = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), number, I32(0))
        return self.shuffled(first, first, [0] * self.width)

    def per_token(self, addresses: Sequence[Any], n_lanes: int) -> Any:
        """The numbers at these addresses, each in ``n_lanes`` lanes."""
        vector = self.everywhere(addresses[0])
        for i, address in enumerate(addresses[1:], 1):
            lanes = [lane + self.width * (lane >= i * n_lanes) for lane in range(self.width)]
            vector = self.shuffled(vector, self.everywhere(address), lanes)
        return vector

    def same(self, value: Any) -> Any:
        return ir.Constant(self.vector, [float(value)] * self.width)

    def shuffled(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.VectorType(I32, len(lanes))(list(lanes)))

    def product_plus(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, in one instruction if there is one."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])

    def larger(self, a: Any, b: Any) -> Any:
        """The maximum; ``b`` where ``a`` is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def in_all_lanes(self, vector: Any, combine: Callable[[Any, Any], Any], every: int = 1) -> Any:
        """What ``combine`` makes of lanes a multiple of ``every`` apart, in all of them: first of those half a vector apart."""
        step = self.width // 2
        while step >= every:
            turned = [(lane + step) % self.width for lane in range(self.width)]
            vector = combine(vector, self.shuffled(vector, vector, turned))
            step //= 2
        return vector

    def put_float(self, number: Any, address: Any) -> None:
        self.builder.store(number, self.builder.inttoptr(address, F32.as_pointer()), align=FLOAT_BYTES)

    def exp_or_zero(self, x: Any) -> Any:
        """As ``fast_math.exp_or_zero``."""
        b = self.builder
        y = b.fmul(self.larger(x, self.same(SMALLEST)), self.same(LOG2_E))
        floor = _declared(b.module, ir.FunctionType(self.vector, [self.vector]), f"llvm.floor.v{self.width}f32")
        whole = b.call(floor, [y])
        f, mantissa = b.fsub(y, whole), self.same(COEFFICIENTS[-1])
        for coefficient in COEFFICIENTS[-2::-1]:
            mantissa = self.product_plus(mantissa, f, self.same(coefficient))
        ints = ir.VectorType(I32, self.width)
        exponent = b.shl(b.add(b.fptosi(whole, ints), ints([127] * self.width)), ints([23] * self.width))
        power = b.fmul(mantissa, b.bitcast(exponent, self.vector))
        power = b.select(b.fcmp_ordered("<", x, self.same(SMALLEST)), self.same(0.0), power)
        return b.select(b.fcmp_unordered("uno", x, x), x, power)

    def prefetch(self, address: Any, n_bytes: Any) -> None:
        """Fetch the lines of memory from ``address`` on into the second-level cache. The address need not exist."""
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = _declared(self.builder.module, kind, "llvm.prefetch.p0")
        reads, second_level, data = I32(0), I32(2), I32(1)

        def line(i: Any, _: Sequence[Any]) -> list[Any]:
            at = self.builder.inttoptr(self.plus(address, self.times(i, LINE_BYTES)), pointer)
            self.builder.call(function, [at, reads, second_level, data])
            return []

        self.loop(self.quotient(n_bytes, LINE_BYTES), [], line)

    def sums_of(self, vectors: Sequence[Any]) -> Any:
        """One vector whose lane i is the sum of the lanes of ``vectors[i]``."""
        halves = [halves_of(self.width >> level, self.width) for level in range(self.width.bit_length() - 1)]
        labels = [[i] * self.width for i in range(self.width)]
        for first, _ in halves:
            labels = [[(a + b)[lane] for lane in first] for a, b in _pairs(labels)]
        # The sum of input i ends up in the lane whose label is i; so the inputs are placed by their label's lane.
        placed: list[Any] = [None] * self.width
        for lane, label in enumerate(labels[0]):
            placed[label] = vectors[lane]
        for first, second in halves:
            placed = [self.builder.fadd(self.shuffled(a, b, first), self.shuffled(a, b, second)) for a, b in _pairs(placed)]
        return placed[0]

    def loop(self, count: Any, carried: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """``for i in range(count): carried = body(i, carried)``, with what is carried in registers."""
        b = self.builder
        before, inside, after = b.block, b.append_basic_block("inside"), b.append_basic_block("after")
        b.cbranch(b.icmp_signed(">", count, I64(0)), inside, after)
        b.position_at_end(inside)
        index, values = b.phi(I64), [b.phi(value.type) for value in carried]
        results = body(index, values)
        following = b.add(index, I64(1))
        end = b.block
        for phi, start, result in zip([index, *values], [I64(0), *carried], [following, *results], strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(result, end)
        b.cbranch(b.icmp_signed("<", following, count), inside, after)
        b.position_at_end(after)
        finals = [b.phi(value.type) for value in carried]
        for phi, start, result in zip(finals, carried, results, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(result, end)
        return finals

    def cases(self, value: Any, numbers: Sequence[int], body: Callable[[int], None]) -> None:
        """``body(value)`` for a value that is one of ``numbers``, each with code of its own; nothing for another one."""
        b = self.builder
        after = b.append_basic_block("after")
        switch = b.switch(value, after)
        for number in numbers:
            block = b.append_basic_block(f"case_{number}")
            switch.add_case(I64(number), block)
            b.position_at_end(block)
            body(number)
            b.branch(after)
        b.position_at_end(after)


def _pairs(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def halves_of(size: int, width: int) -> tuple[list[int], list[int]]:
    """Of two vectors' groups of ``size`` lanes, the lanes of all first halves, and those of all second halves.

    In an order for which x86 has one instruction: halves below 128 bits stay within theirs.
    """
    half = size // 2
    block = max(size, 4) if size <= 4 else width
    firsts = [
        base + vector * width + group + lane
        for base in range(0, width, block)
        for vector in range(2)
        for group in range(0, block, size)
        for lane in range(half)
    ]
    return firsts, [lane + half for lane in firsts]
