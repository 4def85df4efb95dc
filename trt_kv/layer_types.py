"""Which layers of a model attend through a window: the ways in which ``config.json`` says it.

Each function returns the type of every layer, ``SLIDING`` or ``FULL``, from the fields and the number of layers.
"""

from collections.abc import Callable

from trt_kv.errors import CheckpointError
from trt_kv.hf_fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def all_full(_fields: Fields, n_layers: int) -> list[str]:
    """No layer has a window."""
    return [FULL] * n_layers


def all_sliding(_fields: Fields, n_layers: int) -> list[str]:
    """Every layer has the window ``sliding_window``, if that is not null."""
    return [SLIDING] * n_layers


def if_used(fields: Fields, n_layers: int) -> list[str]:
    """Only if ``use_sliding_window``: ``layer_types``, or the layers from ``max_window_layers`` on."""
    if not fields.flag("use_sliding_window"):
        return [FULL] * n_layers
    first = fields.integer("max_window_layers")
    return named_types(fields, n_layers) or [FULL if layer < first else SLIDING for layer in range(n_layers)]


def every_nth_full(period: int, field: str | None = None) -> Callable[[Fields, int], list[str]]:
    """``layer_types``, or windows in all layers except every n-th; n is the value of ``field``, by default ``period``."""

    def types(fields: Fields, n_layers: int) -> list[str]:
        n = period if field is None else fields.integer(field, period)
        if n < 1:
            raise fields.mistyped(field or "layer_types", "an integer >= 1")
        return named_types(fields, n_layers) or [SLIDING if (layer + 1) % n else FULL for layer in range(n_layers)]

    return types


def named_types(fields: Fields, n_layers: int) -> list[str]:
    """``layer_types``, empty if there are none. ``CheckpointError`` for other types, or another number of layers."""
    types = fields.names("layer_types")
    if types and len(types) != n_layers:
        raise fields.mistyped("layer_types", f"a type for each of {n_layers} layers")
    others = sorted(set(types) - {SLIDING, FULL})
    if others:
        raise CheckpointError(
            f"{fields.source} has layers that trt-kv does not support",
            got=", ".join(others),
            expected=f"{FULL!r} or {SLIDING!r}",
        )
    return types


def windows_of(fields: Fields, types: list[str]) -> list[int]:
    """The window of each layer in tokens, 0: none."""
    if SLIDING not in types or fields.data.get("sliding_window") is None:
        return [0] * len(types)
    window = fields.integer("sliding_window")
    if window < 1:
        raise fields.mistyped("sliding_window", "an integer >= 1, or null")
    return [window if kind == SLIDING else 0 for kind in types]
