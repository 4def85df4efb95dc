"""``trt-kv policies``: list the policies and the parts that --set can change."""

import click

from trt_kv.cli.options import debug_option
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy import NAMES
from trt_kv.policy_settings import SETTABLE, setting_as_text
from trt_kv.scores import all_scores


@click.command("policies", short_help="List the policies and their parts.")
@click.argument("name", required=False)
@debug_option
def command(*, name: str | None) -> None:
    """List the policies and what --set can change; with NAME, the parts of that policy.

    \b
    Examples:
      trt-kv policies
      trt-kv policies snapkv
      trt-kv build --policy snapkv --budget 0.2
      trt-kv build --policy prefixkv --set score=window window=64 heads=each
      trt-kv build --policy refreekv --set threshold=0.003 exempt_layers=none
    """
    names = {"score": {score.name: score.summary for score in all_scores()}, **NAMES}
    if name is not None:
        policy = policy_from_name(name)
        click.echo(f"{policy.name}: {policy.summary}\n")
        for part in SETTABLE:
            value = getattr(policy, part)
            meaning = f"  {names[part][value]}" if part in names else ""
            click.echo(f"  {setting_as_text(part, value):<26}{meaning}")
        return
    click.echo("policies (--policy NAME)")
    for known in policy_names():
        click.echo(f"  {known:<14}{policy_from_name(known).summary}")
    for part, values in names.items():
        if part in SETTABLE:
            click.echo(f"\n{part} (--set {part}=NAME)")
            for value, meaning in values.items():
                click.echo(f"  {value:<14}{meaning}")
    others = [part for part in SETTABLE if part not in names]
    click.echo(f"\nother values (--set PART=VALUE): {', '.join(others)}")
    click.echo("`trt-kv policies NAME` shows the values of one policy.")
