"""Shares of a number of tokens in standard ONNX ops: the spec's fp64 products in integers, as TensorRT has no fp64."""

import onnx_ir as ir

from trt_kv.plugins.onnx_function import FunctionBody

SHARE_UNIT = 1 << 40
"""Shares in fixed point: exact for shares of at least 2**-17 and up to 2**22 tokens."""


def kept_share_of(f: FunctionBody, n_tokens: ir.Value) -> ir.Value:
    """n - round((1 - kept_share) * n), halves to the even neighbour; ``kept_share`` is the node's attribute."""
    forgotten = f.Mul(f.Sub(SHARE_UNIT, fixed_point(f, "kept_share")), n_tokens)
    whole, rest = f.Div(forgotten, SHARE_UNIT), f.Mod(forgotten, SHARE_UNIT)
    is_odd_half = f.And(f.Equal(rest, SHARE_UNIT // 2), f.Equal(f.Mod(whole, 2), 1))
    rounded = f.Add(whole, f.Cast(f.Or(f.Greater(rest, SHARE_UNIT // 2), is_odd_half), to=ir.DataType.INT64))
    return f.Sub(n_tokens, rounded)


def fixed_point(f: FunctionBody, share: str) -> ir.Value:
    """The node's attribute ``share`` in units of 1 / SHARE_UNIT, int64."""
    return f.Cast(f.Mul(f.attribute(share), float(SHARE_UNIT)), to=ir.DataType.INT64)
