"""Advice as text for the terminal."""

from typing import TYPE_CHECKING

from trt_kv.cli.hints import as_argument
from trt_kv.cli.output import say
from trt_kv.cli.sizes import bytes_as_text
from trt_kv.pipeline import Advice, MeasuredMachine, PolicyAdvice
from trt_kv.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 150
"""Columns of the table where the output is not a terminal."""


def print_advice(advice: Advice) -> None:
    """The model and the machine, a row per policy, and what the figures mean."""
    from rich.console import Console
    from rich.table import Table

    for line in _heading(advice):
        say(line)
    table = Table(title=f"\n{_asked(advice)}", title_justify="left", title_style="bold")
    rows = [_cells(policy, advice) for policy in advice.policies]
    shown = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    for name in shown:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=name == "policy")
    for policy, row in zip(advice.policies, rows, strict=True):
        table.add_row(*(row[name] for name in shown), style=None if policy.fits else "dim")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)
    if advice.measured:
        console.print(_measured(advice))
    for line in _explanation(advice):
        say(line)


def _heading(advice: Advice) -> list[str]:
    machine = advice.machine
    weights = ", ".join(f"{size.quant} {bytes_as_text(size.n_bytes)}" for size in advice.weights)
    besides = (
        "the engine's process besides" if advice.is_engine else "Python and the runtime; an engine's buffers are not in it"
    )
    return [
        printable(f"model     {advice.model} ({advice.source})"),
        f"weights   {weights}" + (f"; the table is for {advice.quant}" if len(advice.weights) > 1 else ""),
        f"memory    {bytes_as_text(advice.memory_bytes)}, of which program {bytes_as_text(machine.program_bytes)} ({besides})",
        *_speed(machine),
        *_steps(advice),
    ]


def _speed(machine: MeasuredMachine) -> list[str]:
    if machine.gb_per_s is None:
        return []
    told = f"with {machine.n_threads} threads (measured; the probe took {machine.probe_s:.1f} s)"
    return [f"machine   reads {machine.gb_per_s:.1f} GB/s {told}"]


def _steps(advice: Advice) -> list[str]:
    machine = advice.machine
    if machine.step_ms is None or machine.prompt_ms_per_token is None:
        return []
    read = advice.weight_bytes / machine.step_ms / 1e6 if machine.step_ms else 0.0
    of_step = f"{machine.step_ms:.2f} ms in a decode step of {advice.batch}, as if weights were read at {read:.1f} GB/s"
    return [f"steps     dense layers take {of_step}, and {machine.prompt_ms_per_token:.3f} ms per token of a prompt (timed)"]


def _asked(advice: Advice) -> str:
    requests = "1 request" if advice.batch == 1 else f"{advice.batch} requests at once"
    return (
        f"{requests} of {advice.context:,} tokens, {advice.new_tokens:,} of them generated; "
        f"KV cache in {advice.kv_dtype}, weights in {advice.quant}"
    )


def _cells(policy: PolicyAdvice, advice: Advice) -> dict[str, str]:
    """By the name of the column; "-" for what is not known."""
    at_most = "≤ " if policy.is_at_most else ""
    step, bound = policy.token_ms, "≥ " if policy.is_lower_bound else ""
    return {
        "policy": f"{policy.name} (this engine)" if policy.is_engine else policy.name,
        "KV cache": at_most + bytes_as_text(policy.pool_bytes + policy.tier_bytes),
        "while decoding": at_most + bytes_as_text(policy.decoding_bytes),
        "in all": at_most + bytes_as_text(policy.total_bytes),
        "fits": "yes" if policy.fits else "no",
        "longest context": f"{policy.largest_context:,}" if policy.largest_context else "none",
        "most requests": f"{policy.largest_batch}" if policy.largest_batch else "none",
        "tokens attended": at_most + f"{policy.attended_tokens:,.0f}",
        "ms per step": "-" if step is None else f"{bound}{step:.1f}",
        "tokens/s": "-" if step is None else f"{'≤ ' if policy.is_lower_bound else ''}{1e3 * advice.batch / step:.1f}",
        "s per prompt": "-" if policy.prompt_s is None else f"{policy.prompt_s:.2f}",
    }


def _measured(advice: Advice) -> "Table":
    """A row for each policy that answered tasks."""
    from rich.table import Table

    table = Table(title=f"\n{advice.measured[0].n_tasks} tasks, one at a time", title_justify="left", title_style="bold")
    for name in ("policy", "right", "95 %", "KV cache", "s per task", ""):
        table.add_column(name, justify="left" if name in ("policy", "") else "right")
    for policy in advice.measured:
        interval = f"{policy.accuracy_low:.0%}–{policy.accuracy_high:.0%}"
        told = ["not beaten in all of accuracy, bytes and time"] if policy.on_front else []
        told += ["recommended"] if policy.name == advice.recommendation else []
        told += [] if policy.fits else ["does not fit what was asked for"]
        table.add_row(
            policy.name,
            f"{policy.accuracy:.0%}",
            interval,
            bytes_as_text(policy.cache_bytes),
            f"{policy.seconds_per_task:.2f}",
            "; ".join(told),
        )
    return table


def _explanation(advice: Advice) -> list[str]:
    """What the columns mean, and how to get the best of what fits."""
    lines = [
        "KV cache: the most that is reserved, while a prompt is read; pools take up memory as they are used.",
        "longest context: with as many requests. most requests: of as many tokens.",
    ]
    if not advice.is_engine and advice.machine.gb_per_s is not None:
        lines.append(
            "≥: weights read as fast as memory allows; `trt-kv advise ENGINE` times the steps of an engine, and prompts."
        )
    if advice.measured:
        lines.append(
            "recommended: of what fits, the smallest cache whose 95 % interval reaches the best accuracy; few tasks tell"
        )
        lines.append(f"little, so look at the intervals. picture: {advice.picture}")
    lines += [f"note: {note}" for note in advice.notes]
    own = next((policy for policy in advice.policies if policy.is_engine), None)
    if own is not None:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in own.load_options.items())
        lines.append(f"load it with {options} for exactly this: trt-kv generate {options} {as_argument_of(advice.source)} ...")
    return [printable(line) for line in lines]


def as_argument_of(path: str) -> str:
    """A path as it is written on a command line."""
    import shlex
    from pathlib import Path

    return shlex.quote(as_argument(Path(path)))
