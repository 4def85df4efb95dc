"""The command group, and the one place where an exception becomes a message and an exit code."""

import importlib
import traceback
from collections.abc import Sequence

import click

from trt_kv import __version__
from trt_kv.cli.options import Invocation, debug_option
from trt_kv.cli.output import lenient_output, say
from trt_kv.errors import TrtKvError
from trt_kv.openmp import let_threads_wait
from trt_kv.require import missing_dependency

INTERRUPTED = 130

# name of the command and of its module in trt_kv.cli, in the order a user needs them
COMMANDS = (
    *("doctor", "models", "policies", "build", "generate", "chat", "serve", "prefix", "evaluate", "inspect", "advise"),
    *("calibrate", "export"),
)


class LazyGroup(click.Group):
    """A group whose commands are imported on demand: module ``trt_kv.cli.NAME`` holds ``command``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"trt_kv.cli.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"trt_kv.cli.{cmd_name}.command is not a click command")
        return command


@click.group(
    name="trt-kv",
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="trt-kv")
@debug_option
def group() -> None:
    """Build and run LLM engines that keep the KV cache small.

    An engine is a folder: the model as an ONNX graph, the policy that decides which tokens each layer keeps,
    the calibrated recipe, the tokenizer and a manifest.

    \b
    Start here:
      trt-kv build --policy prefixkv --out engines/first
      trt-kv inspect engines/first
      trt-kv generate engines/first --prompt-file prompt.txt

    Exit codes: 0 success, 1 failure, 2 invalid request, 130 interrupted. Every command takes --debug.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``trt-kv`` with ``arguments`` (default: the process's) and return the exit code; messages go to stderr."""
    invocation = Invocation()
    let_threads_wait()
    try:
        with lenient_output():
            result = group.main(
                list(arguments) if arguments is not None else None, prog_name="trt-kv", obj=invocation, standalone_mode=False
            )
        return result if isinstance(result, int) else 0
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  the top of the program: nothing may escape as a traceback
        if invocation.debug:
            traceback.print_exception(error)
        return _report(error)


def _report(error: BaseException) -> int:
    """Print the message for ``error`` and return its exit code."""
    if isinstance(error, click.Abort) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError):
        error = missing_dependency(error) or error
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    if isinstance(error, TrtKvError):
        return _say(f"error: {error}", error.exit_code)
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return _say(f"error: {error.strerror}{where}", 1)
    kind = type(error).__name__
    return _say(f"internal error ({kind}: {_first_line(error)}); run again with --debug for the traceback", 1)


def _say(message: str, exit_code: int) -> int:
    say(message, err=True)
    return exit_code


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no message"])[0]
