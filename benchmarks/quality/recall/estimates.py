"""Ways to estimate which pages hold a query's attention, from less than the keys; each with the bytes that it reads per key.

An estimate gives each page a logit, that of its tokens' attention together: the logarithm of the sum of exponentials of its
tokens' estimated logits, or a bound of the largest. Everything here is plain numpy, to compare ideas.

M queries, J pages, P tokens of a page, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trt_kv.plugins.kv_rows import KvDtype, load, store
from trt_kv.plugins.paging import Floats
from trt_kv.plugins.recall_attention.choice import summaries_of

Estimate = Callable[[Floats, Floats], Floats]
"""(queries [M, D], already with attention's scale; keys [J, P, D]) -> logits of pages [M, J]."""
LEVELS_2_BITS = np.array([-1.5104, -0.4528, 0.4528, 1.5104], np.float32)
"""The best four values for a normal variable of variance 1 (Lloyd, Max)."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """``bytes_per_key``: read per key and KV head to rank all pages; rows are in int8 unless the name says otherwise."""

    name: str
    page_size: int
    bytes_per_key: float
    estimate: Estimate


def ways(page_size: int, head_size: int, group: int) -> list[Way]:
    """Everything compared, for pages of ``page_size``; a KV head has ``group`` query heads."""
    row = {"bfloat16": 2.0 * head_size, "int8": head_size + 4.0}
    turn = rotation(head_size)
    bounds, mean, codes = 2 * row["int8"] / page_size, row["int8"] / page_size, head_size / 4
    found: list[tuple[str, float, Estimate]] = [
        ("bounds, bf16", 2 * row["bfloat16"] / page_size, _bounds(page_size, 0, "bfloat16")),
        ("bounds", bounds, _bounds(page_size, 0, "int8")),
        ("mean deviation", bounds, _bounds(page_size, 1, "int8")),
        ("mean key", mean, _means(page_size)),
        ("bounds of 4 tokens", 2 * row["int8"] / 4, _bounds(4, 0, "int8")),
        ("mean keys of 4 tokens", row["int8"] / 4, _means(4)),
        ("1 bit, rotated", head_size / 8 + 2, _tokens(lambda k: _by_signs(k @ turn.T) @ turn)),
        (
            "1 bit, rotated, about the page's mean",
            head_size / 8 + 2 + mean,
            _tokens(lambda k: _about_mean(k, lambda x: _by_signs(x @ turn.T) @ turn)),
        ),
        ("2 bits, rotated", codes + 2, _tokens(lambda k: _by_levels(k @ turn.T) @ turn)),
        ("bounds and 1 bit per channel", bounds + codes / 2, _tokens(_two_levels)),
        ("bounds and 2 bits per channel", bounds + codes, _tokens(_four_levels)),
        ("bounds and 2 bits of a quarter of the channels", bounds + codes / 4, _of_large_channels(group)),
        ("bit planes, 28 bits", head_size * 7 / 128 + _SCALES, _planes(7 / 16)),
        ("bit planes, 64 bits", head_size / 8 + _SCALES, _planes(1.0)),
        ("exact keys, bf16", row["bfloat16"], _tokens(lambda k: k)),
        ("exact keys, bf16, largest token", row["bfloat16"], _tokens(lambda k: k, largest=True)),
    ]
    return [Way(name=name, page_size=page_size, bytes_per_key=n_bytes, estimate=estimate) for name, n_bytes, estimate in found]


def rotation(size: int) -> Floats:
    """A fixed random rotation [D, D], orthogonal: what a Hadamard matrix with random signs stands for, of any size."""
    turned, upper = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))
    return (turned * np.sign(np.diag(upper))).astype(np.float32)


def log_sum_exp(logits: Floats) -> Floats:
    """Over the last axis."""
    largest = logits.max(axis=-1, keepdims=True)
    found: Floats = largest[..., 0] + np.log(np.exp(logits - largest).sum(axis=-1))
    return found


def _tokens(rebuilt: Callable[[Floats], Floats], *, largest: bool = False) -> Estimate:
    """From keys that are rebuilt from a code."""

    def estimate(q_MD: Floats, k_JPD: Floats) -> Floats:
        logits_MJP = np.tensordot(q_MD, rebuilt(k_JPD), axes=(1, 2))
        return logits_MJP.max(axis=2) if largest else log_sum_exp(logits_MJP)

    return estimate


def _bounds(part: int, summary: int, dtype: str) -> Estimate:
    """Bounds of the parts of a page, and the largest of them."""

    def estimate(q_MD: Floats, k_JPD: Floats) -> Floats:
        parts = k_JPD.reshape(-1, 1, part, k_JPD.shape[2])
        rows = load(summaries_of(parts, summary, KvDtype(dtype)))[:, 0]
        bounds = np.minimum(q_MD, 0) @ rows[:, 0].T + np.maximum(q_MD, 0) @ rows[:, 1].T
        largest: Floats = bounds.reshape(len(q_MD), len(k_JPD), -1).max(axis=2)
        return largest

    return estimate


def _of_large_channels(group: int) -> Estimate:
    """As RecallAttention with summary 2: the largest token, by the quarter of the channels in which the queries are large."""

    def estimate(q_MD: Floats, k_JPD: Floats) -> Floats:
        rebuilt_JPD = _four_levels(k_JPD)
        middle_JD = (k_JPD.min(axis=1) + k_JPD.max(axis=1)) / 2
        logits = []
        for q_GD in q_MD.reshape(-1, group, q_MD.shape[1]):
            order = np.argsort(-np.square(q_GD).sum(axis=0), kind="stable")
            large, others = np.split(order, [-(-len(order) // 4)])
            products_GJP = np.tensordot(q_GD[:, large], rebuilt_JPD[:, :, large], axes=(1, 2))
            logits.append(products_GJP.max(axis=2) + q_GD[:, others] @ middle_JD[:, others].T)
        return np.concatenate(logits)

    return estimate


def _means(part: int) -> Estimate:
    def estimate(q_MD: Floats, k_JPD: Floats) -> Floats:
        means = k_JPD.reshape(-1, part, k_JPD.shape[2]).mean(axis=1)
        logits = q_MD @ load(store(means, KvDtype("int8"))).T
        return log_sum_exp(logits.reshape(len(q_MD), len(k_JPD), -1))

    return estimate


def _by_signs(x: Floats) -> Floats:
    """A sign per channel and a size per key."""
    sizes = np.abs(x).mean(axis=-1, keepdims=True)
    found: Floats = np.where(x >= 0, sizes, -sizes)
    return found


def _by_levels(x: Floats) -> Floats:
    """Two bits per channel and a size per key, fitted to the levels."""
    spread = np.sqrt(np.square(x).mean(axis=-1, keepdims=True))
    shares = x / np.maximum(spread, 1e-12)
    levels = LEVELS_2_BITS[(shares > -0.9816).astype(int) + (shares > 0) + (shares > 0.9816)]
    fit = (x * levels).sum(axis=-1, keepdims=True) / np.square(levels).sum(axis=-1, keepdims=True)
    found: Floats = levels * fit
    return found


def _about_mean(k_JPD: Floats, code: Callable[[Floats], Floats]) -> Floats:
    means = load(store(k_JPD.mean(axis=1), KvDtype("int8")))[:, None]
    return means + code(k_JPD - means)


def _two_levels(k_JPD: Floats) -> Floats:
    """Of each channel of a page, the mean of what is above its middle, and of what is below."""
    middle = (k_JPD.max(axis=1, keepdims=True) + k_JPD.min(axis=1, keepdims=True)) / 2
    above = k_JPD >= middle
    n_above = np.maximum(above.sum(axis=1, keepdims=True), 1)
    n_below = np.maximum((~above).sum(axis=1, keepdims=True), 1)
    high = np.where(above, k_JPD, 0).sum(axis=1, keepdims=True) / n_above
    low = np.where(above, 0, k_JPD).sum(axis=1, keepdims=True) / n_below
    high, low = (load(store(np.ascontiguousarray(x[:, 0]), KvDtype("int8")))[:, None] for x in (high, low))
    found: Floats = np.where(above, high, low)
    return found


def _four_levels(k_JPD: Floats) -> Floats:
    """Of each channel of a page, four values at equal steps from the smallest to the largest (KIVI)."""
    low, high = (load(store(np.ascontiguousarray(x), KvDtype("int8")))[:, None] for x in (k_JPD.min(axis=1), k_JPD.max(axis=1)))
    step = np.maximum(high - low, 1e-12) / 3
    found: Floats = low + np.rint((k_JPD - low) / step).clip(0, 3) * step
    return found


_SCALES = 0.5
"""Bytes per key of the bit planes' scales, with 16 of 64 channels read: two bytes for 64 tokens of a channel."""


def _planes(bits_per_channel: float) -> Estimate:
    """Bit planes of 64 tokens of a channel, more of them for channels that matter to the query (Fathom, arXiv 2609.17652)."""

    def estimate(q_MD: Floats, k_JPD: Floats) -> Floats:
        k_SD = k_JPD.reshape(-1, k_JPD.shape[2])
        blocks = np.pad(k_SD, ((0, -len(k_SD) % 64), (0, 0))).reshape(-1, 64, k_SD.shape[1])
        largest = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), 1e-12)
        rebuilt = [np.zeros_like(k_SD)]
        for bits in (1, 2, 3, 4):
            cells = 2**bits
            at = np.floor((blocks / largest + 1) / 2 * cells).clip(0, cells - 1)
            rebuilt.append((((at + 0.5) / cells * 2 - 1) * largest).reshape(-1, k_SD.shape[1])[: len(k_SD)])
        variance = k_SD.var(axis=0)
        logits = np.empty((len(q_MD), len(k_SD)), np.float32)
        for m, q_D in enumerate(q_MD):
            gain = np.log2(np.maximum(np.square(q_D) * variance, 1e-30)) / 2
            lowest, highest = gain.min() - 5, gain.max() + 5
            for _ in range(30):
                level = (lowest + highest) / 2
                depth = np.rint(gain - level).clip(0, 4).astype(int)
                lowest, highest = (level, highest) if depth.sum() > bits_per_channel * len(q_D) else (lowest, level)
            depth = np.rint(gain - highest).clip(0, 4).astype(int)
            logits[m] = sum(rebuilt[bits][:, depth == bits] @ q_D[depth == bits] for bits in (1, 2, 3, 4))
        return log_sum_exp(logits.reshape(len(q_MD), *k_JPD.shape[:2]))

    return estimate
