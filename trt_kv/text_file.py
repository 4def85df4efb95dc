"""Text that users give, in files, on standard input and as arguments: UTF-8, with or without a byte-order mark."""

from pathlib import Path

from trt_kv.errors import UsageError

_BYTE_ORDER_MARK = "\ufeff"


def read_text(path: Path, *, what: str) -> str:
    """The text of a UTF-8 file, with LF as line end, without a byte-order mark.

    ``UsageError`` for a file that cannot be read or is not UTF-8; ``what`` names it, e.g. "the file with the tasks".
    """
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise UsageError(f"cannot read {what}", got=f"{path}: {cause.strerror or cause}") from cause
    return text_from_bytes(content, what=what, where=str(path))


def text_from_bytes(content: bytes, *, what: str, where: str) -> str:
    """``content`` as ``read_text`` returns it; ``where`` names its origin."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise UsageError(
            f"{what} is not UTF-8 text", got=f"byte {cause.start} in line {line} of {where}", fix="save it as UTF-8"
        ) from cause
    return text.removeprefix(_BYTE_ORDER_MARK).replace("\r\n", "\n")


def check_encodable(text: str, *, what: str) -> None:
    """Raise ``UsageError`` for a text with lone surrogates, which has no UTF-8 form.

    Python puts them in place of bytes of the command line that are not UTF-8; JSON can contain half of a pair ("\\ud83d").
    """
    at = lone_surrogate(text)
    if at is not None:
        position = len(text[:at].encode())
        raise UsageError(
            f"{what} is not UTF-8 text",
            got=f"a lone surrogate at byte {position} of {shortened(ascii(text))}",
            fix="write it in UTF-8; the terminal's locale may use another encoding",
        )


def check_whole_characters(text: str, *, what: str, fix: str | None = None) -> None:
    """Raise ``UsageError`` for a text of a program that has lone surrogates; ``what`` names it."""
    at = lone_surrogate(text)
    if at is not None:
        raise UsageError(
            f"{what} is not text",
            got=f"half a surrogate pair, {text[at]!a}, at character {at}",
            expected="text that can be written as UTF-8",
            fix=fix,
        )


def lone_surrogate(text: str) -> int | None:
    """The index of the first half of a surrogate pair in ``text``; None if it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def shortened(text: str) -> str:
    """``text`` for a message, cut if it is long."""
    return text if len(text) <= 80 else f"{text[:77]}..."
