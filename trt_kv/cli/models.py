"""``trt-kv models``: list the values of --model."""

import click

from trt_kv.cli.options import debug_option
from trt_kv.cli.output import say
from trt_kv.presets import PRESETS, Preset


@click.command("models", short_help="List the models by name.")
@debug_option
def command() -> None:
    """List the models that --model knows, where they come from, and whether they are installed.

    \b
    Examples:
      trt-kv models
      trt-kv build --model smollm2 --policy prefixkv
      trt-kv build --checkpoint ~/models/Llama-3.2-1B --policy full
    """
    click.echo("models (--model NAME; make: MODEL=NAME)")
    for preset in PRESETS.values():
        for line in _lines(preset):
            say(line)
    click.echo(
        "\nany other model (--checkpoint; make: CHECKPOINT=), which then is used instead of --model\n"
        "  FOLDER                            config.json, safetensors, tokenizer.json: Hugging Face layout\n"
        "  FILE.gguf                         weights in any quantisation that the gguf package reads; needs trt-kv[gguf]\n"
        "  OWNER/NAME[@REVISION]             of the Hugging Face hub; a branch, tag or commit\n"
        "  OWNER/NAME[@REVISION]:FILE.gguf   one GGUF file of such a repository"
    )


def _lines(preset: Preset) -> list[str]:
    location = preset.location
    state = f"in {location}" if location is not None else f"not installed: {preset.install_command}"
    return [
        f"  {preset.name:<9}{preset.summary}",
        f"           {preset.parameters} parameters, {preset.size / 1e6:.0f} MB, {preset.licence}; {preset.source}",
        f"           {state}",
        f"           full size or original: --checkpoint {preset.hub_id}",
    ]
