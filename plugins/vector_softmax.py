"""Weights of attention from the logits of a chunk's rows, as vector instructions."""

from typing import Any

from numba import types

from trt_kv.plugins.vector_code import FLOAT_BYTES, I32, Code, in_kernels


@in_kernels
def exponentiate_rows(typing_context: Any, weights: Any, n_rows: Any, n: Any, largest: Any, total: Any, shrink: Any) -> Any:
    """Replace logits ``weights[r, :n]`` by exp(logit - largest[r]), where ``largest[r]`` becomes the row's maximum so far.

    ``shrink[r]``: by what sums with earlier weights have to be multiplied; ``total[r]`` is, and the new weights are added to
    it. All fp32; n is a multiple of a vector's width. Hidden logits are -inf; NaN stays NaN. Hidden logits at the end of a row
    do not change its bits.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder, signature, arguments)
        count, step = code.quotient(arguments[2], code.width), code.row_bytes_of(0)
        weights_at, largest_at, total_at, shrink_at = (code.address_of(i) for i in (0, 3, 4, 5))

        def row(r: Any, _: list[Any]) -> list[Any]:
            first, place = code.plus(weights_at, code.times(r, step)), code.times(r, FLOAT_BYTES)

            def find(i: Any, carried: list[Any]) -> list[Any]:
                return [code.larger(code.load(code.plus(first, code.times(i, code.bytes))), carried[0])]

            before = code.everywhere(code.plus(largest_at, place))
            found = code.in_all_lanes(code.loop(count, [before], find)[0], code.larger)
            nothing = builder.fcmp_ordered("==", found, code.same(float("-inf")))
            base = builder.select(nothing, code.same(0.0), found)
            shrunk = code.exp_or_zero(builder.fsub(before, base))

            def replace(i: Any, carried: list[Any]) -> list[Any]:
                at = code.plus(first, code.times(i, code.bytes))
                power = code.exp_or_zero(builder.fsub(code.load(at), base))
                code.store(power, at)
                return [builder.fadd(carried[0], power)]

            added = code.in_all_lanes(code.loop(count, [code.same(0.0)], replace)[0], builder.fadd)
            so_far = builder.fmul(code.everywhere(code.plus(total_at, place)), shrunk)
            for vector, at in ((found, largest_at), (builder.fadd(so_far, added), total_at), (shrunk, shrink_at)):
                code.put_float(builder.extract_element(vector, I32(0)), code.plus(at, place))
            return []

        code.loop(arguments[1], [], row)
        return context.get_dummy_value()

    return types.void(weights, types.int64, types.int64, largest, total, shrink), generate
