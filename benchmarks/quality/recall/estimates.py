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
    """``bytes_per_key``: read per key and KV head to rank all pages; None: not comparable."""

    name: str
    page_size: int
    bytes_per_key: float
    estimate: Estimate


def ways(page_size: int, head_size: int, codebooks: Floats | None = None) -> list[Way]:
    """Everything compared, for pages of ``page_size``."""
    found: list[tuple[str, float, Estimate]] = []
    row = {"bf16": 2.0 * head_size, "int8": head_size + 4.0}
    names = {"bf16": "bfloat16", "int8": "int8"}
    for short, dtype in names.items():
        for summary, what in ((0, "bounds"), (1, "mean deviation")):
            found.append((f"{what} {short}", 2 * row[short] / page_size, _bounds(page_size, summary, dtype)))
    found.append(("mean key int8", row["int8"] / page_size, _means(page_size)))
    for part in (4, 8, 16):
        if part < page_size:
            found.append((f"bounds per {part} int8", 2 * row["int8"] / part, _bounds(part, 0, "int8")))
            found.append((f"mean deviation per {part} int8", 2 * row["int8"] / part, _bounds(part, 1, "int8")))
            found.append((f"mean key per {part} int8", row["int8"] / part, _means(part)))
    signs, two = head_size / 8, head_size / 4
    turn = rotation(head_size)
    found += [
        ("1 bit", signs + 2, _tokens(_by_signs)),
        ("1 bit rotated", signs + 2, _tokens(lambda k: _by_signs(k @ turn.T) @ turn)),
        ("1 bit rotated, largest token", signs + 2, _tokens(lambda k: _by_signs(k @ turn.T) @ turn, largest=True)),
        ("1 bit rotated, unbiased", signs + 2, _tokens(lambda k: _by_signs(k @ turn.T, unbiased=True) @ turn)),
        ("1 bit about page mean", signs + 2 + row["int8"] / page_size, _tokens(lambda k: _about_mean(k, _by_signs))),
        (
            "1 bit rotated about page mean",
            signs + 2 + row["int8"] / page_size,
            _tokens(lambda k: _about_mean(k, lambda x: _by_signs(x @ turn.T) @ turn)),
        ),
        (
            "1 bit rotated about page mean, unbiased",
            signs + 2 + row["int8"] / page_size,
            _tokens(lambda k: _about_mean(k, lambda x: _by_signs(x @ turn.T, unbiased=True) @ turn)),
        ),
        ("1 bit per channel of page", signs + 2 * row["int8"] / page_size, _tokens(_two_levels)),
        ("2 bits rotated", two + 2, _tokens(lambda k: _by_levels(k @ turn.T) @ turn)),
        ("2 bits rotated, largest token", two + 2, _tokens(lambda k: _by_levels(k @ turn.T) @ turn, largest=True)),
        (
            "2 bits rotated about page mean",
            two + 2 + row["int8"] / page_size,
            _tokens(lambda k: _about_mean(k, lambda x: _by_levels(x @ turn.T) @ turn)),
        ),
        ("2 bits per channel of page", two + 2 * row["int8"] / page_size, _tokens(_four_levels)),
        ("4 bits rotated", head_size / 2 + 2, _tokens(lambda k: _in_steps(k @ turn.T, 7) @ turn)),
        ("bit planes, 56 of 128 bits", head_size * 7 / 128 + _SCALES, _planes(56 / 128)),
        ("bit planes, 1 bit", head_size / 8 + _SCALES, _planes(1.0)),
        ("exact keys", 2.0 * head_size, _tokens(lambda k: k)),
        ("exact keys, largest token", 2.0 * head_size, _tokens(lambda k: k, largest=True)),
    ]
    if codebooks is not None:
        n_parts = len(codebooks)
        found.append(
            (f"product code, {n_parts} bytes, trained", float(n_parts), _tokens(lambda k: _by_codebooks(k, codebooks)))
        )
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


def codebooks_of(k_SD: Floats, n_parts: int, *, seed: int = 0) -> Floats:
    """256 centroids of each part of the keys, [parts, 256, D / parts], by k-means."""
    draw = np.random.default_rng(seed)
    parts_RSE = k_SD.reshape(len(k_SD), n_parts, -1).transpose(1, 0, 2)
    books = []
    for part_SE in parts_RSE:
        book_CE = part_SE[draw.choice(len(part_SE), 256, replace=False)]
        for _ in range(8):
            nearest = _nearest(part_SE, book_CE)
            counts = np.bincount(nearest, minlength=256)
            sums = np.stack([np.bincount(nearest, part_SE[:, e], 256) for e in range(part_SE.shape[1])], axis=1)
            book_CE = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], book_CE).astype(np.float32)
        books.append(book_CE)
    return np.stack(books)


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


def _means(part: int) -> Estimate:
    def estimate(q_MD: Floats, k_JPD: Floats) -> Floats:
        means = k_JPD.reshape(-1, part, k_JPD.shape[2]).mean(axis=1)
        logits = q_MD @ load(store(means, KvDtype("int8"))).T
        return log_sum_exp(logits.reshape(len(q_MD), len(k_JPD), -1))

    return estimate


def _by_signs(x: Floats, *, unbiased: bool = False) -> Floats:
    """A sign per channel and a size per key: the closest, or the one whose product with the key is right (RaBitQ)."""
    sizes = np.abs(x).mean(axis=-1, keepdims=True)
    if unbiased:
        sizes = np.square(x).sum(axis=-1, keepdims=True) / np.maximum(np.abs(x).sum(axis=-1, keepdims=True), 1e-12)
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


def _in_steps(x: Floats, most: int) -> Floats:
    steps = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-12) / most
    found: Floats = np.rint(x / steps) * steps
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
"""Bytes per key of the bit planes' scales: two bytes for 64 tokens of a channel, of half of 64 channels that are read."""


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


def _by_codebooks(k_JPD: Floats, books_RCE: Floats) -> Floats:
    parts = k_JPD.reshape(-1, len(books_RCE), books_RCE.shape[2])
    rebuilt = [book[_nearest(parts[:, r], book)] for r, book in enumerate(books_RCE)]
    return np.stack(rebuilt, axis=1).reshape(k_JPD.shape)


def _nearest(x_SE: Floats, book_CE: Floats) -> np.ndarray:
    found: np.ndarray = (np.square(book_CE).sum(axis=1) - 2 * x_SE @ book_CE.T).argmin(axis=1)
    return found
