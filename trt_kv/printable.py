"""Text from files, for terminals: a name must not be able to move the cursor or colour what follows."""


def printable(line: str) -> str:
    """``line`` with every character that cannot be printed, line breaks and escape codes among them, as its escape sequence."""
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
