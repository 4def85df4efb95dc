"""Hugging Face ``config.json`` to ``ModelConfig``: defaults of each architecture, required fields, unsupported features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trt_kv.errors import CheckpointError
from trt_kv.model_config import ROPE_KINDS, ModelConfig, RopeConfig


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What follows from the architecture alone, if ``config.json`` does not contain it.

    ``lenient``: old Llama configs leave out ``num_key_value_heads`` (then as many as query heads), ``rope_theta`` (10000) and
    ``max_position_embeddings`` (2048), and spell the class ``LLaMAForCausalLM``.
    ``bias_field``: ``attention_bias`` in ``config.json`` switches the biases of q, k, v and o. ``window_field``: whether
    attention slides by default (``sliding_window``) or only if ``use_sliding_window`` is true.
    """

    class_name: str
    old_class_names: tuple[str, ...] = ()
    lenient: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    bias_field: bool = False
    mlp_bias_field: bool = False
    derives_head_dim: bool = True
    window_field: Literal["none", "sliding_window", "use_sliding_window"] = "none"

    @property
    def base_class_name(self) -> str:
        """The class of a model that was saved without its head."""
        return self.class_name.replace("ForCausalLM", "Model")


ARCHITECTURES = {
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        old_class_names=("LLaMAForCausalLM",),
        lenient=True,
        bias_field=True,
        mlp_bias_field=True,
    ),
    "mistral": Architecture(class_name="MistralForCausalLM", window_field="sliding_window"),
    "qwen2": Architecture(class_name="Qwen2ForCausalLM", qkv_bias=True, window_field="use_sliding_window"),
    "qwen3": Architecture(
        class_name="Qwen3ForCausalLM",
        qk_norm=True,
        bias_field=True,
        derives_head_dim=False,
        window_field="use_sliding_window",
    ),
}


_ROPE_TYPES = (*ROPE_KINDS, "dynamic")
_LENIENT_THETA = 10000.0
_LENIENT_POSITIONS = 2048
_DEFAULT_WINDOW = 4096
_DEFAULT_WINDOW_LAYERS = 28
_LARGEST_NUMBER = 2**53


class _Fields:
    """Typed reads from one JSON object; every error names the field and its file."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = data
        self.source = source

    def number(self, name: str, default: float | None = None) -> float:
        value = self.data.get(name)
        if value is None:
            if default is None:
                raise self._missing(name)
            return float(default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
            raise self._mistyped(name, "a number")
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not value.is_integer():
            raise self._mistyped(name, "an integer")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._mistyped(name, "true or false")
        return value

    def names(self, name: str) -> list[str]:
        value = self.data.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._mistyped(name, "a list of names")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.data.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int | float) or token % 1 != 0 for token in ids):
            raise self._mistyped(name, "a token id or a list of token ids")
        return tuple(dict.fromkeys(int(token) for token in ids))

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source} has no field {name!r}",
            got="fields " + ", ".join(sorted(self.data)),
            expected=f"a value for {name!r}",
            fix="take config.json from the same place as the weights",
        )

    def _mistyped(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"field {name!r} in {self.source} has a bad value", got=repr(self.data[name]), expected=expected)


def model_config_from_hf(data: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Read the parsed ``config.json``; ``source`` names the file in error messages.

    Raises ``CheckpointError`` for a missing or mistyped field, an architecture or RoPE type that is not supported, an
    activation other than SiLU, and attention that slides inside the context. Quantisation is not looked at.
    """
    fields = _Fields(data, source)
    name, architecture = _architecture(data, source)
    _refuse_other_activation(data, source)
    max_positions = fields.integer("max_position_embeddings", _LENIENT_POSITIONS if architecture.lenient else None)
    n_layers = fields.integer("num_hidden_layers")
    _refuse_sliding_window(fields, architecture, n_layers=n_layers, max_positions=max_positions)
    n_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    bias = architecture.bias_field and fields.flag("attention_bias")
    equals_heads = architecture.lenient or "num_key_value_heads" in data  # null: as many as query heads
    return ModelConfig(
        architecture=name,
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", n_heads if equals_heads else None),
        head_dim=fields.integer("head_dim", _derived_head_dim(hidden_size, n_heads) if architecture.derives_head_dim else None),
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_positions=max_positions,
        rope=_rope_config(fields, _LENIENT_THETA if architecture.lenient else None),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=architecture.qkv_bias or bias,
        output_bias=bias,
        mlp_bias=architecture.mlp_bias_field and fields.flag("mlp_bias"),
        qk_norm=architecture.qk_norm,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def token_ids_from_hf(data: Mapping[str, Any], name: str, *, source: str) -> tuple[int, ...]:
    """The token ids of field ``name`` (an id, a list or absent), as ``generation_config.json`` has them."""
    return _Fields(data, source).token_ids(name)


def _architecture(data: Mapping[str, Any], source: str) -> tuple[str, Architecture]:
    class_names = data.get("architectures") or []
    for name, architecture in ARCHITECTURES.items():
        known = (architecture.class_name, architecture.base_class_name, *architecture.old_class_names)
        if data.get("model_type") == name and (class_names == [] or class_names in [[known_name] for known_name in known]):
            return name, architecture
    raise CheckpointError(
        f"{source} has an architecture that trt-kv does not support",
        got=f"model_type {data.get('model_type')!r}, architectures {class_names}",
        expected="model_type " + ", ".join(f"{name!r} ({known.class_name})" for name, known in ARCHITECTURES.items()),
    )


def _derived_head_dim(hidden_size: int, n_heads: int) -> int | None:
    return None if n_heads < 1 or hidden_size % n_heads else hidden_size // n_heads


def _refuse_other_activation(data: Mapping[str, Any], source: str) -> None:
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(
            f"{source} has an unsupported activation", got=repr(data["hidden_act"]), expected="hidden_act 'silu'"
        )


def _refuse_sliding_window(fields: _Fields, architecture: Architecture, *, n_layers: int, max_positions: int) -> None:
    """A window of W tokens equals full attention exactly when no context is longer than W."""
    window = _sliding_window(fields, architecture, n_layers)
    if window is not None and window < max_positions:
        raise CheckpointError(
            f"{fields.source} uses sliding-window attention, which trt-kv does not support",
            got=f"a window of {window} tokens in a context of {max_positions}",
            expected="full attention: a window at least as long as the context, or none",
            fix=f'set "max_position_embeddings": {window} in config.json: in such a context the window has no effect',
        )


def _sliding_window(fields: _Fields, architecture: Architecture, n_layers: int) -> int | None:
    """Window size in tokens of the sliding layers, None if there are none; absent fields have transformers' defaults."""
    if architecture.window_field == "none" or fields.data.get("sliding_window", _DEFAULT_WINDOW) is None:
        return None
    if architecture.window_field == "use_sliding_window":
        some_slide = "sliding_attention" in fields.names("layer_types")
        if fields.data.get("layer_types") is None:
            some_slide = fields.integer("max_window_layers", _DEFAULT_WINDOW_LAYERS) < n_layers
        if not fields.flag("use_sliding_window") or not some_slide:
            return None
    return fields.integer("sliding_window", _DEFAULT_WINDOW)


def _rope_config(fields: _Fields, default_theta: float | None) -> RopeConfig:
    """Reads both forms: ``rope_parameters`` (with theta inside), and ``rope_theta`` beside ``rope_scaling``."""
    spellings = [name for name in ("rope_parameters", "rope_scaling") if fields.data.get(name) is not None]
    configs = [_rope_from(fields, name, default_theta) for name in spellings] or [_rope_from(fields, None, default_theta)]
    if configs[0] != configs[-1]:
        raise CheckpointError(
            f"{fields.source} has two different RoPE settings",
            got=f"rope_parameters {fields.data['rope_parameters']}, rope_scaling {fields.data['rope_scaling']}",
            expected="one of the two",
        )
    return configs[0]


def _rope_from(fields: _Fields, name: str | None, default_theta: float | None) -> RopeConfig:
    settings = {} if name is None else fields.data[name]
    if not isinstance(settings, Mapping) or any(isinstance(value, Mapping) for value in settings.values()):
        raise CheckpointError(
            f"{name} in {fields.source} is not one flat object", got=settings, expected="one RoPE for all layers"
        )
    kind = settings.get("rope_type", settings.get("type", "default"))
    partial = settings.get("partial_rotary_factor", fields.data.get("partial_rotary_factor"))
    if kind not in _ROPE_TYPES or partial not in (None, 1.0):
        raise CheckpointError(
            f"{fields.source} uses a type of RoPE that trt-kv does not support",
            got=f"type {kind!r}" + ("" if partial in (None, 1.0) else f" over {partial} of each head"),
            expected="type " + ", ".join(map(repr, _ROPE_TYPES)) + " over whole heads",
        )
    inner = _Fields(settings, fields.source if name is None else f"{name} in {fields.source}")
    theta = inner.number("rope_theta") if "rope_theta" in settings else fields.number("rope_theta", default_theta)
    if kind in ("default", "dynamic"):  # "dynamic" only changes what is beyond max_position_embeddings
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=inner.number("factor"))
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        original_max_positions=inner.integer("original_max_position_embeddings"),
    )
