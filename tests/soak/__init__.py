"""Both servers under mixed load for minutes: ``python -m tests.soak``, or ``make soak``."""
