"""``trt-kv doctor``: what this machine has, and what to install."""

import click

from trt_kv.cli.options import debug_option
from trt_kv.pipeline.environment import Finding, State, examine

COLOURS = {State.OK: "green", State.OPTIONAL: "yellow", State.MISSING: "red"}


@click.command("doctor", short_help="Check this machine and installation.")
@debug_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """Check Python, memory, packages, accelerators and the bundled model.

    Each line says ok, optional (not there, and only some commands need it) or missing (nothing works without it).
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
        click.echo(f"{n_missing} missing: install what the lines above say", err=True)
        ctx.exit(1)


def line_of(finding: Finding, width: int) -> str:
    """One finding as a line of the report, its name padded to ``width`` characters."""
    state = click.style(f"{finding.state.value:<8}", fg=COLOURS[finding.state])
    fix = f"  -> {finding.fix}" if finding.fix else ""
    return f"  {state}  {finding.name:<{width}}  {finding.text}{fix}"
