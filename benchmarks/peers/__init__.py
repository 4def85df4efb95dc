"""The engine beside other engines on the same machine, in the same run: ``make bench ARGS=peers`` (see ``README.md`` here)."""
