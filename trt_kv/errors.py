"""Every error that trt-kv raises on purpose.

TrtKvError                 exit code 1
├── UsageError             exit code 2: the caller asked for something impossible
│   └── UnknownNameError   a policy, model, score ... that is not registered
├── CheckpointError        a checkpoint that is missing, broken or not supported
├── RecipeError            a recipe that is malformed or belongs to another model
├── EngineError            an engine folder that is half-built, tampered with or of another format
├── CapacityError          a request that does not fit into the KV pool
├── LogitsError            logits that are NaN or infinite
│   └── NoTokenLeftError   parameters of a request that leave no token to choose
├── BusyError              a server whose queue is full, or that is shutting down
├── RecallError            KV pages that could not be written to or read from the host tier
├── ReportError            a results file that cannot be read or lacks what a report needs
└── MissingDependencyError an optional package that is not installed
"""

from collections.abc import Iterable

from trt_kv.printable import printable


class TrtKvError(Exception):
    """An error with a message in four parts: what happened, what was found, what was expected, how to fix it."""

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.fix = fix
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.what]
        lines += [f"  got: {self.got}"] if self.got is not None else []
        lines += [f"  expected: {self.expected}"] if self.expected is not None else []
        lines += [f"  fix: {self.fix}"] if self.fix is not None else []
        return printable("\n".join(lines), lines=True)


class UsageError(TrtKvError):
    """The request itself is wrong: a bad option, prompt or value. ``parameter``: the name of the one that is, if it is one."""

    exit_code = 2

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, fix: str | None = None, parameter: str | None = None
    ) -> None:
        self.parameter = parameter
        super().__init__(what, got=got, expected=expected, fix=fix)


class UnknownNameError(UsageError):
    """A name that is not in a registry; the message lists the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        super().__init__(
            f"unknown {kind}", got=repr(name), expected="one of " + ", ".join(known), fix=f"pick one of the known {kind} names"
        )


class CheckpointError(TrtKvError):
    """A checkpoint that is missing, broken, mixed up or of an unsupported architecture."""


class RecipeError(TrtKvError):
    """A recipe that is malformed or was calibrated for another model."""


class EngineError(TrtKvError):
    """An engine folder that is half-built, tampered with or written in another format."""


class CapacityError(TrtKvError):
    """A request that does not fit into the KV pool; nothing was allocated for it."""


class BusyError(TrtKvError):
    """A server that takes no request now. ``retry_after_s``: seconds after which it may."""

    def __init__(self, what: str, *, retry_after_s: int, got: object = None, fix: str | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what, got=got, fix=fix)


class LogitsError(TrtKvError):
    """Logits that are NaN or infinite, from which no token can be sampled; the request they belong to ends."""


class NoTokenLeftError(LogitsError):
    """Penalties, ``bad_words``, ``min_tokens`` and a structure that together leave a request no token to choose."""


class RecallError(TrtKvError):
    """KV pages that could not be written to the host tier or read from it; the request they belong to ends."""


class ReportError(TrtKvError):
    """A results file that cannot be read, or does not hold what a report needs."""


class MissingDependencyError(TrtKvError):
    """An optional package that is not installed."""


def load_option(name: str, value: object = None) -> str:
    """An option of ``Engine.load`` for a message, as it is given in Python and on the command line."""
    flag = "--" + name.removeprefix("n_").replace("_", "-")
    return f"{name} ({flag})" if value is None else f"{name}={value} ({flag} {value})"
