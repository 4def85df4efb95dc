"""RoPE of a ``config.json``: ``rope_parameters``, or ``rope_theta`` beside ``rope_scaling``; for all layers or for each type.

The formulas are those of transformers' ``modeling_rope_utils``. What depends on the length of a text there depends on the
context here, because an engine's frequencies are fixed.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from trt_kv.errors import CheckpointError
from trt_kv.family import Family
from trt_kv.hf_fields import Fields
from trt_kv.layer_types import FULL, SLIDING
from trt_kv.rope_config import ROPE_KINDS, RopeConfig, RopeKind

ROPE_TYPES = (*ROPE_KINDS, "dynamic")


def ropes_from_hf(fields: Fields, family: Family, *, head_dim: int, max_positions: int) -> tuple[RopeConfig, RopeConfig | None]:
    """The model's RoPE, and that of its layers with a window if they have their own."""
    reader = _Reader(fields, family, head_dim=head_dim, max_positions=max_positions)
    if family.local_theta is None:
        return reader.from_spellings(), None
    thetas = {FULL: fields.number("rope_theta"), SLIDING: fields.number("rope_local_base_freq", family.local_theta)}
    nested = fields.data.get("rope_parameters")
    if nested is None:
        return reader.from_spellings(), reader.rope(Fields({"rope_theta": thetas[SLIDING]}, fields.source))
    is_nested = isinstance(nested, Mapping) and (not nested or not thetas.keys().isdisjoint(nested))
    if not is_nested or not all(isinstance(nested.get(kind) or {}, Mapping) for kind in thetas):
        raise fields.mistyped("rope_parameters", f"an object with one for {FULL!r} and one for {SLIDING!r}")
    settings = {kind: {"rope_theta": theta, **(nested.get(kind) or {})} for kind, theta in thetas.items()}
    whole, local = (reader.rope(Fields(settings[kind], f"rope_parameters in {fields.source}")) for kind in thetas)
    scaling = fields.data.get("rope_scaling")
    if scaling is not None and reader.spelled("rope_scaling", theta=whole.theta) != whole:
        raise reader.disagreement()
    return whole, local


class _Reader:
    def __init__(self, fields: Fields, family: Family, *, head_dim: int, max_positions: int) -> None:
        self._fields = fields
        self._family = family
        self._head_dim = head_dim
        self._max_positions = max_positions

    def from_spellings(self) -> RopeConfig:
        """From whichever spelling is there; from both, if they agree."""
        data = self._fields.data
        spellings = [name for name in ("rope_parameters", "rope_scaling") if data.get(name) is not None]
        configs = [self.spelled(name) for name in spellings] or [self.spelled(None)]
        if configs[0] != configs[-1]:
            raise self.disagreement()
        return configs[0]

    def disagreement(self) -> CheckpointError:
        """The error for two spellings that mean different things."""
        data = self._fields.data
        return CheckpointError(
            f"{self._fields.source} has two different RoPE settings",
            got=f"rope_parameters {data['rope_parameters']}, rope_scaling {data['rope_scaling']}",
            expected="one of the two",
        )

    def spelled(self, name: str | None, *, theta: float | None = None) -> RopeConfig:
        """From the field ``name``; None: from those that are outside of both. ``theta``: if the field has none; None: the
        config's.
        """
        source, settings = self._fields.source, {} if name is None else self._fields.data[name]
        if not isinstance(settings, Mapping) or any(isinstance(value, Mapping) for value in settings.values()):
            raise CheckpointError(
                f"{name} in {source} is not one flat object", got=settings, expected="one RoPE for all layers"
            )
        known = {} if "rope_theta" in settings else {"rope_theta": theta or self._fields.number("rope_theta")}
        return self.rope(Fields({**known, **settings}, source if name is None else f"{name} in {source}"))

    def rope(self, settings: Fields) -> RopeConfig:
        """From the settings of one RoPE, ``rope_theta`` among them."""
        kind = settings.data.get("rope_type", settings.data.get("type", "default"))
        kind = self._family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in ROPE_TYPES:
            raise CheckpointError(
                f"{self._fields.source} uses a type of RoPE that trt-kv does not support",
                got=f"type {kind!r}",
                expected="type " + ", ".join(map(repr, ROPE_TYPES)),
            )
        theta, rotary_dim = settings.number("rope_theta"), self._rotary_dim(settings, kind)
        if kind in ("default", "dynamic"):  # "dynamic" only changes what is beyond max_position_embeddings
            return RopeConfig(theta=theta, rotary_dim=rotary_dim)
        more = {
            "linear": _linear,
            "proportional": _proportional,
            "llama3": self._llama3,
            "yarn": self._yarn,
            "longrope": self._longrope,
        }[kind]
        return RopeConfig(theta=theta, kind=cast(RopeKind, kind), rotary_dim=rotary_dim, **more(settings))

    def _rotary_dim(self, settings: Fields, kind: str) -> int:
        """Channels of a head that turn; 0: all."""
        outer = self._fields.number("partial_rotary_factor", 1.0)
        share = settings.number("partial_rotary_factor", outer)
        if share == 1.0:
            return 0
        rotary_dim = 2 * int(share * self._head_dim // 2) if kind == "proportional" else int(self._head_dim * share)
        if (
            not (self._family.partial_rotary or kind == "proportional")
            or not 0 < rotary_dim <= self._head_dim
            or rotary_dim % 2
        ):
            raise CheckpointError(
                f"{self._fields.source} turns only a part of each head, which trt-kv does not support",
                got=f"partial_rotary_factor {share}: RoPE over {share} of each head",
                expected=f"whole heads for {self._family.model_type!r}; where parts are supported, an even number of channels",
            )
        return rotary_dim

    def _original(self, settings: Fields, default: int | None) -> int:
        """The context before rescaling. As in transformers, the field outside the settings comes first."""
        name = "original_max_position_embeddings"
        return (self._fields if self._fields.data.get(name) is not None else settings).integer(name, default)

    def _llama3(self, settings: Fields) -> dict[str, Any]:
        return {
            "factor": settings.number("factor"),
            "low_freq_factor": settings.number("low_freq_factor"),
            "high_freq_factor": settings.number("high_freq_factor"),
            "original_max_positions": self._original(settings, None),
        }

    def _yarn(self, settings: Fields) -> dict[str, Any]:
        """YaRN (Peng et al. 2023, section 3.4), with DeepSeek's ``mscale``."""
        original = self._original(settings, self._max_positions)
        factor = settings.positive("factor", self._max_positions / max(1, original))
        mscale, over_all = settings.number("mscale", 0.0), settings.number("mscale_all_dim", 0.0)
        attention = _mscale(factor, mscale) / _mscale(factor, over_all) if mscale and over_all else _mscale(factor, 1.0)
        return {
            "factor": factor,
            "original_max_positions": original,
            "attention_factor": settings.number("attention_factor", attention),
            "beta_fast": settings.number("beta_fast", 0.0) or 32.0,
            "beta_slow": settings.number("beta_slow", 0.0) or 1.0,
            "truncate": settings.flag("truncate", True),
        }

    def _longrope(self, settings: Fields) -> dict[str, Any]:
        """LongRoPE (Ding et al. 2024): the context decides once which factors an engine has, as in vLLM."""
        original = self._original(settings, self._max_positions)
        factor = settings.number("factor", self._max_positions / max(1, original))
        grows = factor > 1.0 and original > 1
        attention = math.sqrt(1.0 + math.log(factor) / math.log(original)) if grows else 1.0
        short, long = settings.numbers("short_factor"), settings.numbers("long_factor")
        return {
            "original_max_positions": original,
            "attention_factor": settings.number("attention_factor", attention),
            "factors": long if self._max_positions > original else short,
            "short_factors": short if self._max_positions > original else (),
        }


def _linear(settings: Fields) -> dict[str, Any]:
    return {"factor": settings.number("factor")}


def _proportional(settings: Fields) -> dict[str, Any]:
    return {"factor": settings.number("factor", 1.0)}


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
