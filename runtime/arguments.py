"""Kinds of numbers that callers pass. A bool is no number here: ``top_k=True`` is a mistake."""

from numbers import Integral, Real


def is_integer(value: object, at_least: int | None = None) -> bool:
    """Whether ``value`` is an integer (Python's or numpy's), and not below ``at_least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and (at_least is None or int(value) >= at_least)


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number (Python's or numpy's) that a float can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True
