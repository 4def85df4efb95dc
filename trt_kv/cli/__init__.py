"""The command line: ``trt-kv``. Importing it loads click and nothing heavier."""

from trt_kv.cli.app import main

__all__ = ["main"]
