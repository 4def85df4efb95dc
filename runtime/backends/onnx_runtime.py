"""ONNX Runtime, which only this module imports: its telemetry is off unless the user's environment asks for it.

From version 1.29 on, ONNX Runtime on Linux writes a number of the device and a queue of events for Microsoft into the home and
the temporary folder of whoever uses it. Only an environment variable prevents that; trt_kv/__init__.py sets it.
"""

import onnxruntime as ort  # noqa: TID251

__all__ = ["ort"]
