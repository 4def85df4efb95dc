"""Bytes of a KV cache, by arithmetic on types and sizes alone."""

from trt_kv.manifest import ITEM_BYTES
from trt_kv.model_config import ModelConfig

SCALE_BYTES = 4
"""Of the fp32 scale behind each key and value that is stored in int8."""
POSITION_BYTES = 8
SCORE_BYTES = 4
"""A pool holds an int64 position and an fp32 score per token and KV head, whatever its type."""


def row_bytes(kv_dtype: str, head_size: int) -> int:
    """Bytes of one key or value of ``head_size`` numbers as ``kv_dtype`` (one of ``KV_DTYPES``), with the scale of int8."""
    return head_size + SCALE_BYTES if kv_dtype == "int8" else head_size * ITEM_BYTES[kv_dtype]


def kv_bytes(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of the keys and values of a token in one layer."""
    return config.n_kv_heads * 2 * row_bytes(kv_dtype, config.head_dim)


def token_bytes(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of a pool per token and layer: keys and values, a position and a score per KV head."""
    return kv_bytes(config, kv_dtype) + config.n_kv_heads * (POSITION_BYTES + SCORE_BYTES)


def recall_row_bytes(config: ModelConfig, kv_dtype: str, n_summaries: int = 2) -> int:
    """Bytes besides of a page whose cache is recalled in place: the summaries of each KV head's keys, ``n_summaries`` rows
    stored like them, and a row for the last query of all query heads, fp32.
    """
    summaries = config.n_kv_heads * n_summaries * row_bytes(kv_dtype, config.head_dim)
    return summaries + config.n_heads * config.head_dim * ITEM_BYTES["float32"]
