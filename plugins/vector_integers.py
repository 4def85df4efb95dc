"""Products of small integers, and memory by its address, in LLVM's language.

Vectors are of 256 bits on every processor: their lanes are part of the definition of a product (``packed_products.py``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from trt_kv.plugins.vector_code import F32, I8, I16, I32, I64, Code, in_kernels

LANES = 8
VECTOR_BYTES = 32
I1 = ir.IntType(1)
BYTES, SHORTS, WORDS = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, LANES)
NIBBLE = 15
_declared: Any = cgutils.get_or_insert_function


@in_kernels
def fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` in fp32, rounded once."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = _declared(builder.module, ir.FunctionType(F32, [F32] * 3), "llvm.fma.f32")
        return builder.call(function, arguments)

    return types.float32(types.float32, types.float32, types.float32), code


def _item_at(item: Any) -> Any:
    def read(typing_context: Any, address: Any, index: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], context.get_value_type(item).as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]), align=1)

        return item(types.int64, types.int64), code

    return in_kernels(read)


byte_at, float_at = _item_at(types.uint8), _item_at(types.float32)
"""``byte_at(address, i)``: the i-th byte, or fp32 number, from an address on."""


class IntegerCode(Code):
    """``Code`` with vectors of ``LANES`` fp32 numbers, and sums of products of unsigned and signed bytes.

    Sums of products are in registers as the processor's instructions leave them; ``whole`` makes int32 of them: in lane i the
    sum of the products of bytes 4i to 4i + 3.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        super().__init__(context, builder, signature, arguments, LANES)
        features = context.codegen().magic_tuple()[2].split(",")
        self.has_vnni = "+avxvnni" in features or {"+avx512vnni", "+avx512vl"} <= set(features)
        self.has_pairs = "+avx2" in features
        self.plane_factors = (1, NIBBLE + 1) if self.has_pairs and not self.has_vnni else (1,)

    def planes(self, stored: Any) -> list[tuple[Any, int]]:
        """Bytes as unsigned numbers that ``add_products`` can take 8 times, and what to multiply their products by."""
        parts = [stored] if len(self.plane_factors) == 1 else [self.low_halves(stored), self.high_halves(stored)]
        return list(zip(parts, self.plane_factors, strict=True))

    def low_halves(self, stored: Any) -> Any:
        return self.builder.and_(stored, BYTES([NIBBLE] * 32))

    def high_halves(self, stored: Any) -> Any:
        return self.builder.lshr(stored, BYTES([4] * 32))

    def add_products(self, total: Any, unsigned: Any, signed: Any) -> Any:
        """Products of two vectors of bytes added to a total or None. Without VNNI: up to 8 times, of numbers up to 15."""
        b = self.builder
        if self.has_vnni:
            kind = ir.FunctionType(WORDS, [WORDS] * 3)
            function = _declared(b.module, kind, "llvm.x86.avx512.vpdpbusd.256")
            start = WORDS([0] * LANES) if total is None else total
            return b.call(function, [start, b.bitcast(unsigned, WORDS), b.bitcast(signed, WORDS)])
        if self.has_pairs:
            function = _declared(b.module, ir.FunctionType(SHORTS, [BYTES, BYTES]), "llvm.x86.avx2.pmadd.ub.sw")
            products = b.call(function, [unsigned, signed])
        else:
            shorts = ir.VectorType(I16, 32)
            single = b.mul(b.zext(unsigned, shorts), b.sext(signed, shorts))
            wide = b.sext(single, ir.VectorType(I32, 32))
            quarters = [self.shuffled(wide, wide, range(i, 32, 4)) for i in range(4)]
            products = b.add(b.add(quarters[0], quarters[1]), b.add(quarters[2], quarters[3]))
        return products if total is None else b.add(total, products)

    def in_registers(self, vectors: Sequence[Any]) -> list[Any]:
        """The same vectors; what is read after this is not read before. Else LLVM forms one sum after the other, for which it
        keeps everything that is read in more registers than there are.
        """
        if not self.has_pairs:
            return list(vectors)
        n = len(vectors)
        kind = ir.FunctionType(ir.LiteralStructType([vector.type for vector in vectors]), [vector.type for vector in vectors])
        constraints = ",".join(["=x"] * n + [str(i) for i in range(n)] + ["~{memory}"])
        held = self.builder.call(ir.InlineAsm(kind, "", constraints, side_effect=True), vectors)
        return [self.builder.extract_value(held, i) for i in range(n)]

    def whole(self, total: Any, factor: int = 1) -> Any:
        if total.type == WORDS:
            return total
        b = self.builder
        function = _declared(b.module, ir.FunctionType(WORDS, [SHORTS, SHORTS]), "llvm.x86.avx2.pmadd.wd")
        return b.call(function, [total, SHORTS([factor] * 16)])

    def whole_sum(self, totals: Mapping[int, Any]) -> Any:
        """The sum of totals, each times a factor."""
        first, *others = [self.whole(total, factor) for factor, total in totals.items()]
        for other in others:
            first = self.builder.add(first, other)
        return first

    def read(self, address: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def read_some(self, address: Any, kind: Any, mask: Any) -> Any:
        """The lanes of a mask, of which alone there is memory; zeros in the others."""
        b = self.builder
        suffix = {I32: "i32", F32: "f32"}[kind.element]
        name = f"llvm.masked.load.v{kind.count}{suffix}.p0"
        function = _declared(b.module, ir.FunctionType(kind, [kind.as_pointer(), I32, mask.type, kind]), name)
        return b.call(function, [b.inttoptr(address, kind.as_pointer()), I32(1), mask, ir.Constant(kind, None)])

    def lanes_below(self, n: Any, n_lanes: int = LANES) -> Any:
        """A mask of the lanes whose number is less than n."""
        words = ir.VectorType(I32, n_lanes)
        return self.builder.icmp_signed("<", words(list(range(n_lanes))), self.spread(self.builder.trunc(n, I32), n_lanes))

    def spread(self, item: Any, n_lanes: int = LANES) -> Any:
        """An item in all lanes."""
        first = self.builder.insert_element(ir.Constant(ir.VectorType(item.type, n_lanes), ir.Undefined), item, I32(0))
        return self.shuffled(first, first, [0] * n_lanes)

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        function = _declared(self.builder.module, ir.FunctionType(self.vector, [self.vector] * 3), f"llvm.fma.v{LANES}f32")
        return self.builder.call(function, [a, b, c])

    def sums_by_label(self, vectors: Sequence[Any], labels: Sequence[Sequence[int]]) -> Any:
        """int32 lanes of vectors summed up: lane i has the sum of the lanes whose label is i. Labels are in order."""
        pending = list(zip(vectors, labels, strict=True))
        while len(pending) > 1:
            pending = [self._joined(a, b) for a, b in zip(pending[::2], pending[1::2], strict=True)]
        vector, order = pending[0]
        return self.shuffled(vector, vector, [order.index(label) for label in range(LANES)])

    def _joined(self, a: Any, b: Any) -> Any:
        """Two vectors as one, by the sums of lanes next to each other; or of halves, if the lanes next to each other differ."""
        within = [base + vector * LANES + lane for base in (0, 4) for vector in range(2) for lane in (0, 2)]
        if a[1][0] != a[1][1]:
            within = [vector * LANES + lane for vector in range(2) for lane in range(4)]
        step = 1 if a[1][0] == a[1][1] else 4
        other = [lane + step for lane in within]
        both = [*a[1], *b[1]]
        total = self.builder.add(self.shuffled(a[0], b[0], within), self.shuffled(a[0], b[0], other))
        return total, [both[lane] for lane in within]

    def sum_of_lanes(self, vector: Any) -> Any:
        """The number of lanes added i and i + 4, then i and i + 2, then both."""
        return self.builder.extract_element(self.in_all_lanes(vector, self.builder.fadd), I32(0))

    def chosen(self, value: Any, bodies: Mapping[int, Callable[[], Any]], otherwise: Callable[[], Any]) -> Any:
        """What the body for a value gives, each with code of its own."""
        b = self.builder
        after, default = b.append_basic_block("after"), b.append_basic_block("otherwise")
        switch = b.switch(value, default)
        results = []
        for number, body in [*bodies.items(), (None, otherwise)]:
            block = default
            if number is not None:
                block = b.append_basic_block(f"chosen_{number}")
                switch.add_case(I64(number), block)
            b.position_at_end(block)
            result = body()
            results.append((result, b.block))
            b.branch(after)
        b.position_at_end(after)
        phi = b.phi(results[0][0].type)
        for result, block in results:
            phi.add_incoming(result, block)
        return phi
