"""Where int8 keys and values have their scales, keys before or after RoPE, and the type of summaries: on a model's own keys.

K KV heads, H query heads, G = H / K, S tokens, N last queries, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.harness import Row, rounded
from benchmarks.models import FULL, PAGE_SIZE, model_runner
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.kv_rows import KvDtype, load, store
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.recall_attention.choice import best_pages, summaries_of
from trt_kv.rope_frequencies import rope_frequencies
from trt_kv.runtime.backends.base import Attend, DenseExecutor

N_QUERIES = 64
"""The last queries of the text attend to all tokens before them."""
SUMMARY_PAGES = (8, 32)
CHOSEN_SHARE = 0.25

Axes = tuple[int, ...]
Rounding = Callable[[Floats], Floats]


@dataclass(frozen=True, kw_only=True)
class LayerVectors:
    """Queries [N, H, D] of the last tokens, keys after RoPE and values [K, S, D] of one layer."""

    q_NHD: Floats
    k_KSD: Floats
    v_KSD: Floats


class Recording:
    """A dense executor that keeps what its layers pass to attention."""

    def __init__(self, dense: DenseExecutor) -> None:
        self._dense = dense
        self.vectors: dict[int, list[tuple[Floats, Floats, Floats]]] = {}

    @property
    def description(self) -> str:
        return self._dense.description

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``."""

        def recorded(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
            self.vectors.setdefault(layer, []).append((q.copy(), k.copy(), v.copy()))
            return attend(layer, q, k, v)

        return self._dense.run(input_ids, positions, logit_rows, recorded)


def scale_tables(executor: DenseExecutor, config: ModelConfig, text: list[int]) -> dict[str, list[Row]]:
    """Tables by caption, means over all layers and heads."""
    recording = Recording(executor)
    runner = model_runner(recording, config, policy=FULL, cache_tokens=len(text))
    runner.prefill(runner.new_sequence(), text)
    layers = [_joined(parts) for _, parts in sorted(recording.vectors.items())]
    frequencies = rope_frequencies(config.rope, config.head_dim, array=partial(np.array, dtype=np.float32))
    angles_SD = np.outer(np.arange(len(text)), frequencies)
    return {
        f"int8, one scale per what; {len(text)} tokens, pages of {PAGE_SIZE}": _scales(layers, angles_SD),
        f"types of summaries over keys in int8; {CHOSEN_SHARE:.0%} of the pages are chosen": _summaries(layers),
    }


def _joined(parts: list[tuple[Floats, Floats, Floats]]) -> LayerVectors:
    q, k, v = (np.concatenate(part) for part in zip(*parts, strict=True))
    return LayerVectors(
        q_NHD=q[-N_QUERIES:], k_KSD=np.ascontiguousarray(k.transpose(1, 0, 2)), v_KSD=np.ascontiguousarray(v.transpose(1, 0, 2))
    )


def _in_int8(x_KSD: Floats, axes: Axes) -> Floats:
    """Rounded to 8 bits and back, one scale for each slice along ``axes`` of the pages [K, T, P, D]."""
    n_tokens = x_KSD.shape[1]
    padded = np.pad(x_KSD, ((0, 0), (0, -n_tokens % PAGE_SIZE), (0, 0)))
    pages_KTPD = padded.reshape(len(x_KSD), -1, PAGE_SIZE, x_KSD.shape[2])
    scale = np.maximum(np.abs(pages_KTPD).max(axis=axes, keepdims=True), 1e-12) / 127
    rounded_KTPD = np.rint(pages_KTPD / scale) * scale
    back: Floats = rounded_KTPD.reshape(padded.shape)[:, :n_tokens].astype(np.float32)
    return back


PER: dict[str, Axes] = {"token and head": (3,), "page and head": (2, 3), "page, head and channel": (2,), "head": (1, 2, 3)}


def _scales(layers: list[LayerVectors], angles_SD: Floats) -> list[Row]:
    """Keys alone, values alone, and both as they are built, as errors of the attention of the last queries."""

    def before_rope(axes: Axes) -> Rounding:
        return lambda k_KSD: _turned(_in_int8(_turned(k_KSD, -angles_SD), axes), angles_SD)

    def as_it_is(x_KSD: Floats) -> Floats:
        return x_KSD

    def after(axes: Axes) -> Rounding:
        return lambda x_KSD: _in_int8(x_KSD, axes)

    sides: dict[tuple[str, str, str], tuple[Rounding, Rounding]]
    sides = {("keys", "after", per): (after(axes), as_it_is) for per, axes in PER.items()}
    sides |= {("keys", "before", per): (before_rope(axes), as_it_is) for per, axes in PER.items()}
    sides |= {("values", "", per): (as_it_is, after(axes)) for per, axes in PER.items()}
    sides |= {("both, as built", "after", "token and head"): (after(PER["token and head"]), after(PER["token and head"]))}
    rows = []
    for (what, rope, per), (of_k, of_v) in sides.items():
        errors = np.array([_errors(layer, of_k(layer.k_KSD), of_v(layer.v_KSD)) for layer in layers])
        logit, out = errors.mean(axis=0)
        rows.append(
            {
                "in_int8": what,
                "rope": rope,
                "scale_per": per,
                "rms_logit_error": rounded(logit),
                "relative_error_of_attention": rounded(out),
                "in_the_worst_layer": rounded(errors[:, 1].max()),
            }
        )
    return rows


def _turned(x_KSD: Floats, angles_SD: Floats) -> Floats:
    """RoPE by ``angles_SD`` [S, D / 2], channel d with channel d + D / 2; negative angles undo it."""
    cos, sin = np.cos(angles_SD).astype(np.float32), np.sin(angles_SD).astype(np.float32)
    low, high = np.split(x_KSD, 2, axis=2)
    turned: Floats = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)
    return turned


def _errors(layer: LayerVectors, k_KSD: Floats, v_KSD: Floats) -> tuple[float, float]:
    """RMS error of the logits, and RMS error of attention's output as a share of its RMS."""
    (logits, out), (logits_then, out_then) = _attention(layer, layer.k_KSD, layer.v_KSD), _attention(layer, k_KSD, v_KSD)
    seen = np.isfinite(logits)
    logit_error = np.sqrt(np.square(logits_then[seen] - logits[seen]).mean())
    return float(logit_error), float(np.sqrt(np.square(out_then - out).mean() / np.square(out).mean()))


def _attention(layer: LayerVectors, k_KSD: Floats, v_KSD: Floats) -> tuple[Floats, Floats]:
    """Logits [K, G, N, S], -inf for later tokens, and output [K, G, N, D] of the last queries."""
    n_queries, n_heads, head_size = layer.q_NHD.shape
    n_kv_heads, n_tokens, _ = k_KSD.shape
    q_KGND = layer.q_NHD.reshape(n_queries, n_kv_heads, n_heads // n_kv_heads, head_size).transpose(1, 2, 0, 3)
    logits = q_KGND @ k_KSD[:, None].transpose(0, 1, 3, 2) * head_size**-0.5
    logits = np.where(np.arange(n_tokens) <= np.arange(n_tokens - n_queries, n_tokens)[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return logits, weights @ v_KSD[:, None]


def _summaries(layers: list[LayerVectors]) -> list[Row]:
    """How the choice of pages by summaries in a type differs from that by summaries in fp32."""
    rows = []
    for page_size in SUMMARY_PAGES:
        for dtype in ("float32", "bfloat16", "float16", "int8"):
            same, weight = np.array([_choices(layer, page_size, dtype) for layer in layers]).mean(axis=0)
            rows.append(
                {
                    "page_size": page_size,
                    "summaries": dtype,
                    "bits_per_channel": {"float32": 32, "int8": rounded(8 * (1 + 4 / layers[0].k_KSD.shape[2]))}.get(dtype, 16),
                    "same_pages": rounded(same),
                    "attention_on_chosen_pages": rounded(weight),
                }
            )
    return rows


def _choices(layer: LayerVectors, page_size: int, dtype: str) -> tuple[float, float]:
    """Share of the pages chosen by summaries of fp32 keys in fp32 that are chosen too; weight of attention on the chosen."""
    n_kv_heads, n_tokens, head_size = layer.k_KSD.shape
    n_pages = n_tokens // page_size
    k_TKPD = layer.k_KSD[:, : n_pages * page_size].reshape(n_kv_heads, n_pages, page_size, head_size).transpose(1, 0, 2, 3)
    k_TKPD = np.ascontiguousarray(k_TKPD)
    exact = summaries_of(k_TKPD, 0, KvDtype("float32"))
    rough = summaries_of(store(k_TKPD, KvDtype("int8")), 0, KvDtype(dtype))
    n_chosen, pages = max(1, int(n_pages * CHOSEN_SHARE)), np.arange(n_pages)
    logits_KGNS, _ = _attention(layer, load(store(layer.k_KSD, KvDtype("int8"))), layer.v_KSD)
    weights = np.exp(logits_KGNS - logits_KGNS.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_pages_KNT = weights.mean(axis=1)[..., : n_pages * page_size].reshape(n_kv_heads, -1, n_pages, page_size).sum(axis=3)
    same, weight = [], []
    for n in range(0, len(layer.q_NHD), 8):
        wanted, found = (best_pages(layer.q_NHD[n], pages, lo_hi, n_chosen, 0, 1.0) for lo_hi in (exact, rough))
        for head in range(n_kv_heads):
            same.append(len(np.intersect1d(wanted[head], found[head])) / n_chosen)
            weight.append(float(of_pages_KNT[head, n, found[head]].sum()))
    return float(np.mean(same)), float(np.mean(weight))
