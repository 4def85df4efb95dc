"""The model repository for NVIDIA's Triton Inference Server that every engine has in its folder ``triton``.

``tritonserver --model-repository=ENGINE/triton`` serves it where it stands. Nothing in it depends on the engine's place, so
engines that are built twice are equal.
"""

import json
import re
from pathlib import Path

FOLDER = "triton"
VERSION = "1"

MODEL = '''"""Serves the engine that model.json names: see docs/serving.md of trt-kv, which must be installed."""

from trt_kv.serving.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
CONFIG = """# One instance has the engine's whole memory and all its threads. Inputs and outputs are completed by the model.
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: True }}
instance_group [ {{ kind: {kind} count: 1 }} ]
"""
WITHOUT_BATCH_DIMENSION = """\
# Shapes as clients of vLLM's backend send them over gRPC. NVIDIA's OpenAI frontend needs --backend vllm.
parameters { key: "batch_dimension" value { string_value: "false" } }
"""


def write_repository(folder: Path, name: str, *, is_for_gpus: bool) -> None:
    """Write the repository into the engine ``folder``; its model is called ``name``, in characters that Triton allows."""
    model = folder / FOLDER / directory_name(name)
    (model / VERSION).mkdir(parents=True)
    (model / "configs").mkdir()
    (model / VERSION / "model.py").write_text(MODEL)
    to_engine = "/".join([".."] * len((model / VERSION).relative_to(folder).parts))
    (model / VERSION / "model.json").write_text(json.dumps({"engine": to_engine}, indent=2) + "\n")
    default = CONFIG.format(kind="KIND_GPU" if is_for_gpus else "KIND_CPU")
    (model / "config.pbtxt").write_text(default)
    for name, content in (
        ("cpu", CONFIG.format(kind="KIND_CPU")),
        ("gpu", CONFIG.format(kind="KIND_GPU")),
        ("vllm", default + WITHOUT_BATCH_DIMENSION),
    ):
        (model / "configs" / f"{name}.pbtxt").write_text(content)


def directory_name(name: str) -> str:
    """``name`` in letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
