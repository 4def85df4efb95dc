"""Where a decoder's weights are in the checkpoints of its family: names, rows of fused tensors, offsets of norms."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trt_kv.families import family_from_name
from trt_kv.model_config import ModelConfig

_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""A fused tensor holds the rows of these projections, one after the other."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """One weight of a decoder: ``n_rows`` rows, from ``first_row`` on, of the stored tensor ``name``, plus ``offset``."""

    name: str
    first_row: int
    n_rows: int
    offset: float = 0.0


def weight_sources(config: ModelConfig) -> dict[str, WeightSource]:
    """Of each weight, by its name in ``config.tensor_shapes()``."""
    family, shapes = family_from_name(config.architecture), config.tensor_shapes()
    sources = {}
    for name, shape in shapes.items():
        offset = family.norm_offset if _is_norm(name) else 0.0
        sources[name] = WeightSource(name=name, first_row=0, n_rows=shape[0], offset=offset)
    if family.fused:
        for fused, parts in _fused(shapes):
            first_row = 0
            for part in parts:
                sources[part] = WeightSource(name=fused, first_row=first_row, n_rows=shapes[part][0])
                first_row += shapes[part][0]
    return sources


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a checkpoint of this family stores for the decoder."""
    shapes = config.tensor_shapes()
    stored: dict[str, tuple[int, ...]] = {}
    for name, source in weight_sources(config).items():
        rows = stored[source.name][0] if source.name in stored else 0
        stored[source.name] = (rows + source.n_rows, *shapes[name][1:])
    return stored


def _is_norm(name: str) -> bool:
    return name.removesuffix(".weight").endswith("norm")


def _fused(shapes: Shapes) -> Iterator[tuple[str, list[str]]]:
    """Each fused tensor of a checkpoint and the weights that it holds, in order."""
    first = {parts[0]: (fused, parts) for fused, parts in _FUSED.items()}
    for name in shapes:
        for part, (fused, parts) in first.items():
            if f".{part}." in name:
                yield name.replace(part, fused), [name.replace(part, other) for other in parts]
