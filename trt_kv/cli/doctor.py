"""``trt-kv doctor``: check this machine and list what to install."""

import click

from trt_kv.cli.options import debug_option
from trt_kv.pipeline.environment import Finding, State, examine
from trt_kv.printable import printable

COLOURS = {State.OK: "green", State.OPTIONAL: "yellow", State.MISSING: "red"}


@click.command("doctor", short_help="Check this machine and installation.")
@debug_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """Check Python, memory, packages, accelerators and the models.

    Each line is marked ok, optional (not installed, and needed by some commands only) or missing (required by all).
    The exit code is 1 when something is missing.

    \b
    Example:
      trt-kv doctor
    """
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            click.secho(section, bold=True)
        click.echo(line_of(finding, width))
    n_missing = sum(finding.state is State.MISSING for finding in findings)
    if n_missing:
        click.echo(f"{n_missing} missing: see the lines above for how to install", err=True)
        ctx.exit(1)


def line_of(finding: Finding, width: int) -> str:
    """One finding as a line of the report, its name padded to ``width`` characters."""
    state = click.style(f"{finding.state.value:<8}", fg=COLOURS[finding.state])
    fix = f"  -> {finding.fix}" if finding.fix else ""
    return f"  {state}  {finding.name:<{width}}  {printable(finding.text)}{printable(fix)}"
