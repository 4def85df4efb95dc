"""ONNX Runtime, which only this module imports: its telemetry is off unless the user's environment asks for it.

From version 1.29 on, ONNX Runtime on Linux writes a number of the device and a queue of events for Microsoft into the home and
the temporary folder of whoever uses it. Only the environment variable, set before the import, prevents that.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort  # noqa: TID251  (after the line above)

__all__ = ["ort"]
