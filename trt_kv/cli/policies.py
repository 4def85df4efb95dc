"""``trt-kv policies``: list the policies and the parts that --set can change."""

import click

from trt_kv.cli.options import debug_option
from trt_kv.policies import ALIASES, policy_from_name, policy_names
from trt_kv.policy import DEFAULT_FLOOR, NAMES
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
      trt-kv build --policy prefixkv --set window=64 pooling=5
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
        also = [alias for alias, meant in ALIASES.items() if meant == known]
        click.echo(f"  {known:<15}{policy_from_name(known).summary}" + (f" (also: {', '.join(also)})" if also else ""))
    click.echo(
        f"\nNo layer that holds at most `floor` tokens evicts any: {DEFAULT_FLOOR} by default, 0 in prefixkv_paper.\n"
        "--set floor=0 is as in the papers. Policies that evict hold the whole prompt until it has been read; only\n"
        "freekv, whose cache is on the host, reads prompts that are longer than the cache."
    )
    for part, values in names.items():
        if part in SETTABLE:
            click.echo(f"\n{part} (--set {part}=NAME)")
            for value, meaning in values.items():
                click.echo(f"  {value:<14}{meaning}")
    others = [part for part in SETTABLE if part not in names]
    click.echo(f"\nother values (--set PART=VALUE): {', '.join(others)}")
    click.echo("`trt-kv policies NAME` shows the values of one policy.")
