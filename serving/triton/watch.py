"""Ends the server when this process, which runs a model, is killed.

Triton (seen in 24.10) tells clients nothing when a model's process dies: those whose answers were being streamed wait for ever,
and the server still calls itself ready. A server that ends closes their connections, and is started again by what runs it.
"""

import subprocess
from pathlib import Path

_SCRIPT = 'read -r word; [ "$word" = closed ] || [ "$(readlink "/proc/$1/exe")" != "$2" ] || kill -s TERM "$1"'
"""Its standard input ends when this process does. The server may have ended first, and its number belong to another program."""


class Watch:
    """From now until ``close``; then the end of this process means nothing."""

    def __init__(self, server: int) -> None:
        """``server``: the number of the process that gets SIGTERM."""
        program = str(Path(f"/proc/{server}/exe").readlink())
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "sh", str(server), program],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        self._process.communicate(b"closed\n")
