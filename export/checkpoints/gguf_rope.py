"""How a GGUF file scales RoPE, as the fields of ``config.json``: types linear, yarn, llama3 and longrope."""

import math
from collections.abc import Mapping

import numpy as np

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_families import Fields
from trt_kv.export.checkpoints.gguf_header import GgufTensor
from trt_kv.export.checkpoints.gguf_metadata import ModelFacts

DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_LLAMA3_HIGH = 4.0
_LLAMA3_POSITIONS = 8192
_SAME = 1e-4

Tensors = Mapping[str, GgufTensor]


def rope_fields(facts: ModelFacts, *, head_dim: int, theta: float, tensors: Tensors) -> Fields:
    """``rope_scaling``, and the original context if the file states it; nothing if RoPE is not scaled.

    Raises ``CheckpointError`` for a scaling that ``config.json`` cannot express.
    """
    kind, factor = facts.text("rope.scaling.type"), facts.number("rope.scaling.factor")
    positions = facts.integer("rope.scaling.original_context_length")
    original = {} if positions is None else {"original_max_position_embeddings": positions}
    if LONG in tensors or SHORT in tensors:
        return {"rope_scaling": _longrope(facts, tensors), **original}
    if DIVISORS in tensors:
        return {"rope_scaling": _llama3(facts, head_dim, theta, tensors[DIVISORS])}
    if kind is None and factor is None:
        factor = facts.number("rope.scale_linear")
    if kind == "none" or (kind in (None, "linear") and factor in (None, 0.0, 1.0)):
        return {}
    if kind in (None, "linear"):
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn" and factor is not None:
        return {"rope_scaling": {"rope_type": kind, "factor": factor, **original, **_yarn(facts)}}
    raise CheckpointError(
        f"{facts.path} scales its RoPE in a way that trt-kv does not know",
        got=f"rope.scaling.type {kind!r}, factor {factor}",
        expected="none, linear or yarn, or a tensor with the divisors or factors of each frequency",
    )


def _yarn(facts: ModelFacts) -> Fields:
    """Without factors on attention: converters write llama.cpp's, which multiplies that of YaRN, or Hugging Face's, which
    replaces it, under the same key.
    """
    keys = ("rope.scaling.yarn_log_multiplier", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    stray = [key for key in keys if facts.number(key) not in (None, 0.0, 1.0)]
    if stray:
        raise CheckpointError(
            f"{facts.path} scales its RoPE in a way that trt-kv does not know",
            got=", ".join(f"{key} {facts.number(key)}" for key in stray),
            expected="YaRN with its own factor on attention",
            fix="pass the original checkpoint, whose config.json has the settings",
        )
    names = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
    return {name: facts.number(key) for key, name in names.items() if facts.number(key) is not None}


def _longrope(facts: ModelFacts, tensors: Tensors) -> Fields:
    missing = [name for name in (LONG, SHORT) if name not in tensors or tensors[name].scheme != "F32"]
    if missing:
        raise facts.contradiction(
            "LongRoPE", f"no {' and no '.join(missing)} in float32", "factors for long and short contexts"
        )
    factors = {name: [float(str(value)) for value in tensors[name].read().view("<f4").reshape(-1)] for name in (LONG, SHORT)}
    scaling = {"rope_type": "longrope", "long_factor": factors[LONG], "short_factor": factors[SHORT]}
    attention = facts.number("rope.scaling.attn_factor")
    return scaling if attention is None else {**scaling, "attention_factor": attention}


def _llama3(facts: ModelFacts, size: int, theta: float, tensor: GgufTensor) -> Fields:
    if tensor.scheme != "F32" or tensor.shape != (size // 2,):
        raise facts.contradiction(DIVISORS, f"{tensor.scheme} {list(tensor.shape)}", f"F32 {[size // 2]}")
    stored = tensor.read().view("<f4").reshape(-1)
    found = llama3_settings(stored, size=size, theta=theta)
    if found is None:
        raise CheckpointError(
            f"{facts.path} scales its RoPE in a way that trt-kv does not know",
            got=f"{DIVISORS} from {stored.min():g} to {stored.max():g}",
            expected="the divisors of RoPE type llama3, with low_freq_factor 1 and high_freq_factor 4",
            fix="pass the original checkpoint, whose config.json has the settings",
        )
    return found


def llama3_settings(stored: np.ndarray, *, size: int, theta: float) -> Fields | None:
    """The settings of RoPE type llama3 whose divisors of the frequencies are ``stored`` (float32, one per pair of channels of a
    head of ``size``); None if there are none.

    In every published model ``low_freq_factor`` is 1, ``high_freq_factor`` 4, and the lowest frequency has the whole factor.
    The original context follows from any divisor in between; without one, it is that of the published models, or the nearest
    that has the same divisors.
    """
    divisors = stored.astype(np.float64)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    factor = float(f"{divisors.max():.6g}")
    between = (divisors > 1 + _SAME) & (divisors < factor * (1 - _SAME))
    shortest = _LLAMA3_HIGH * wavelengths[divisors <= 1 + _SAME].max(initial=0.0)
    longest = wavelengths[divisors >= factor * (1 - _SAME)].min(initial=np.inf)
    positions = math.floor(min(max(_LLAMA3_POSITIONS, math.ceil(shortest)), longest))
    if between.any():
        smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        positions = round(float(np.median(wavelengths[between] * (1 + (_LLAMA3_HIGH - 1) * smooth))))
    blend = np.clip((positions / wavelengths - 1) / (_LLAMA3_HIGH - 1), 0, 1)
    if not np.allclose(1 / ((1 - blend) / factor + blend), divisors, rtol=_SAME, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": positions,
    }
