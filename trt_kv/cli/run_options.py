"""Options of the commands that run an engine: where, and with how much memory and how many threads."""

import functools
import re
from typing import Any

import click

from trt_kv.cli.options import CommandFunction
from trt_kv.manifest import KV_DTYPES
from trt_kv.pipeline.plans import DeviceChoice, ResourceChoice

_UNITS = {"": 1} | {f"{prefix}B": 1000**at for at, prefix in enumerate(("", "k", "M", "G", "T"))}
_UNITS |= {f"{prefix}iB": 1024**at for at, prefix in enumerate(("K", "M", "G", "T"), start=1)}


def byte_count(_ctx: click.Context | None, _parameter: click.Parameter | None, text: str | None) -> int | None:
    """Callback of a number of bytes, with a unit or without: 4096, 512MiB, 1.5 GB."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    factor = None if found is None else next((n for unit, n in _UNITS.items() if unit.lower() == found[2].lower()), None)
    if found is None or factor is None or not (n_bytes := int(float(found[1]) * factor)):
        raise click.BadParameter(f"{text!r} is no size: expected bytes >= 1, such as 512MiB or 2GiB")
    return n_bytes


def device_options(command: CommandFunction) -> CommandFunction:
    """Add --device, --dtype, --dense, --precision and --profile; ``command`` receives ``on``, a ``DeviceChoice``."""

    @click.option(
        "--device",
        default="cpu",
        show_default=True,
        metavar="cpu|cuda[:N]",
        help="cuda: run an engine of target onnxruntime on an NVIDIA GPU. cpu: run the engine on its own target.",
    )
    @click.option(
        "--dtype", metavar="NAME", help="Convert weights to this type on loading, with --device cuda. Default: the engine's."
    )
    @click.option(
        "--dense",
        metavar="NAME",
        help="What runs the dense layers. On the CPU: native (the default for quantised weights with activations in int8), "
        "onnxruntime (the default for others), or openvino (needs the extra openvino). With --device cuda: torch (the "
        "default), or onnxruntime (needs onnxruntime-gpu).",
    )
    @click.option(
        "--precision",
        metavar="NAME",
        help="What --dense openvino multiplies weights by: float32, bfloat16, or int8 for quantised weights. Default: what the "
        "engine was built for.",
    )
    @click.option(
        "--profile",
        metavar="NAME|FILE",
        help="Sizes to reserve memory for with --device cuda, as in build. Default: the model's limits, reduced to fit.",
    )
    @functools.wraps(command)
    def collected(
        *, device: str, dense: str | None, precision: str | None, dtype: str | None, profile: str | None, **others: Any
    ) -> None:
        command(on=DeviceChoice(device=device, dense=dense, precision=precision, dtype=dtype, profile=profile), **others)

    return collected


def resource_options(command: CommandFunction) -> CommandFunction:
    """Add --kv-dtype, --cache-tokens, --host-tier, --host-tokens, --chunk, --threads, --batch-invariant, --prefix-cache,
    --prefix-bytes and --prefix-store; ``command`` receives ``resources``, a ``ResourceChoice``.
    """
    count = click.IntRange(min=1)

    @click.option(
        "--kv-dtype",
        metavar="NAME",
        help=f"Store the KV cache in this type on a CPU: one of {', '.join(KV_DTYPES)}. Default: as the engine was built.",
    )
    @click.option(
        "--cache-tokens",
        type=count,
        metavar="N",
        help="Size of the KV pool: tokens in every layer. Default: twice the model's positions, or what fits into memory.",
    )
    @click.option(
        "--host-tier",
        metavar="ram|file:PATH",
        help="Where a host-resident cache is stored: in memory, or in a new file. Default: ram.",
    )
    @click.option(
        "--host-tokens", type=count, metavar="N", help="Size of a host-resident cache in tokens. Default: as --cache-tokens."
    )
    @click.option("--chunk", type=count, metavar="N", help="Prompt tokens per step; fewer take less memory. Default: 512.")
    @click.option("--threads", type=count, metavar="N", help="CPU threads that compute. Default: one per core.")
    @click.option(
        "--batch-invariant/--no-batch-invariant",
        default=None,
        help="Results that do not depend, bit for bit, on what else runs. Default: yes on a CPU, no on a GPU.",
    )
    @click.option(
        "--prefix-cache/--no-prefix-cache",
        default=None,
        help="Prompts that begin like an earlier one continue from copies of what it had cached. Default: yes, "
        "but of generate only with --prefix-store.",
    )
    @click.option(
        "--prefix-bytes",
        callback=byte_count,
        metavar="SIZE",
        help="Memory of these copies, such as 512MiB or 2GiB. Default: an eighth of what is free.",
    )
    @click.option("--prefix-store", metavar="FOLDER", help="Also keep them in files there, for the next run. Default: in none.")
    @functools.wraps(command)
    def collected(
        *,
        kv_dtype: str | None,
        cache_tokens: int | None,
        host_tier: str | None,
        host_tokens: int | None,
        chunk: int | None,
        threads: int | None,
        batch_invariant: bool | None,
        prefix_cache: bool | None,
        prefix_bytes: int | None,
        prefix_store: str | None,
        **others: Any,
    ) -> None:
        resources = ResourceChoice(
            kv_dtype=kv_dtype,
            cache_tokens=cache_tokens,
            host_tier=host_tier,
            host_tokens=host_tokens,
            chunk=chunk,
            n_threads=threads,
            batch_invariant=batch_invariant,
            prefix_cache=prefix_cache,
            prefix_bytes=prefix_bytes,
            prefix_store=prefix_store,
        )
        command(resources=resources, **others)

    return collected
