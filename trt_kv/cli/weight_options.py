"""Options of how weights are stored."""

import functools
from typing import Any

import click

from trt_kv.cli.options import CommandFunction
from trt_kv.manifest import ACCURACY_LEVELS, BLOCK_SIZES
from trt_kv.pipeline.plans import QUANTS, WeightPlan


def weight_options(command: CommandFunction) -> CommandFunction:
    """Add --quant and its details; ``command`` receives ``weights``, a ``WeightPlan``."""
    default = WeightPlan(quant="int4").quantization
    assert default is not None

    @click.option(
        "--quant",
        default="none",
        show_default=True,
        metavar="NAME",
        help=f"How weights are stored: one of {', '.join(QUANTS)}. For CPUs. Blocks of a .gguf file are taken as they are.",
    )
    @click.option(
        "--quant-block-size",
        type=int,
        metavar="N",
        help=f"Values with a common scale: one of {', '.join(map(str, BLOCK_SIZES))}. Default: {default.block_size}.",
    )
    @click.option(
        "--quant-symmetric/--quant-asymmetric",
        "quant_symmetric",
        default=None,
        help=f"Blocks without, or with a zero point. Default: {'symmetric' if default.symmetric else 'asymmetric'}.",
    )
    @click.option(
        "--quant-accuracy-level",
        type=int,
        metavar="N",
        help=f"Of ONNX Runtime's products: {ACCURACY_LEVELS[0]} computes in fp32, {ACCURACY_LEVELS[-1]} with activations "
        f"rounded to int8. Default: {default.accuracy_level}.",
    )
    @functools.wraps(command)
    def collected(
        *,
        quant: str,
        quant_block_size: int | None,
        quant_symmetric: bool | None,
        quant_accuracy_level: int | None,
        **others: Any,
    ) -> None:
        plan = WeightPlan(
            quant=quant, block_size=quant_block_size, symmetric=quant_symmetric, accuracy_level=quant_accuracy_level
        )
        command(weights=plan, **others)

    return collected
