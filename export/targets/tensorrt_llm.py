"""Writes the folder that is handed over to TensorRT-LLM: a checkpoint, options of the LLM API, and what they need."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.huggingface import HuggingFaceCheckpoint
from trt_kv.export.new_folder import new_folder
from trt_kv.export.targets.tensorrt_llm_fields import published_fields
from trt_kv.export.targets.tensorrt_llm_options import HandOver
from trt_kv.model_config import ModelConfig
from trt_kv.rope_frequencies import rope_frequencies

MODEL_FOLDER = "model"
OPTIONS_FILE = "llm_options.yaml"
STATISTICS_FILE = "triattention.safetensors"
README_FILE = "README.md"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")

CONVERSION = (
    "python -c \"import torch; from safetensors.torch import load_file; t = load_file('triattention.safetensors'); "
    "torch.save({'E_q': torch.complex(t['q_mean_real'], t['q_mean_imag']), 'E_q_norm': t['q_abs_mean'], "
    "'omega': t['omega'], 'freq_scale_sq': t['freq_scale_sq']}, 'triattention.pt')\""
)
"""Makes the file that TensorRT-LLM reads, which is a pickle, and so is written by its user."""


def write_hand_over(
    checkpoint: Checkpoint,
    hand_over: HandOver,
    destination: Path,
    *,
    statistics: Path | None,
    what: str,
    reproduce: str,
    extra_files: Sequence[Path] = (),
) -> None:
    """Write the folder ``destination``, whole or not at all. ``statistics``: the file of queries, if ``hand_over`` needs one.

    Weights are hard links to the checkpoint's files where the file system allows it, else copies. Raises ``CheckpointError``
    for a checkpoint in another layout than Hugging Face's, ``UsageError`` if something is at ``destination``.
    """
    files = checkpoint_files(checkpoint)
    with new_folder(destination) as folder:
        for name, path in files.items():
            target = folder / MODEL_FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path.resolve(), target)
        (folder / OPTIONS_FILE).write_text(as_yaml(hand_over.options), encoding="utf-8")
        for path in [*([] if statistics is None else [statistics]), *extra_files]:
            shutil.copyfile(path, folder / path.name)
        (folder / README_FILE).write_text(_readme(hand_over, what, reproduce), encoding="utf-8")


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files of a checkpoint in Hugging Face layout, by name; ``CheckpointError`` for any other checkpoint."""
    if not isinstance(checkpoint, HuggingFaceCheckpoint):
        raise CheckpointError(
            "TensorRT-LLM reads checkpoints in Hugging Face layout",
            got=str(checkpoint.location),
            expected="a folder with config.json and safetensors",
            fix="take the original checkpoint of this model with --checkpoint",
        )
    weights = {path.name: path for pattern in _WEIGHTS for path in sorted(checkpoint.location.glob(pattern))}
    return {**checkpoint.tokenizer_files, **weights}


def save_statistics(path: Path, arrays: Mapping[str, np.ndarray], config: ModelConfig, *, n_tokens: int, source: str) -> None:
    """Write query statistics with the rotation's angular frequencies ``omega`` and squared amplitudes ``freq_scale_sq``."""
    frequencies = np.asarray(
        rope_frequencies(config.rope, config.head_dim, array=lambda x: np.array(x, np.float32)), np.float32
    )
    amplitude = np.full(len(frequencies), config.rope.attention_factor**2, np.float32)
    metadata = {"format": "trt-kv-query-statistics", "n_tokens": str(n_tokens), "source": source}
    save_file({**arrays, "omega": frequencies, "freq_scale_sq": amplitude}, path, metadata=metadata)


def as_yaml(options: Mapping[str, Any], indent: str = "") -> str:
    """Options as YAML: mappings in lines, other values as JSON, which is YAML too."""
    lines = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name}:\n{as_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{name}: {json.dumps(value)}\n")
    return "".join(lines)


def _link_or_copy(source: Path, target: Path) -> None:
    if target.suffix == ".safetensors":
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copyfile(source, target)


def _readme(hand_over: HandOver, what: str, reproduce: str) -> str:
    published = published_fields()
    lost = "".join(f"* {loss}\n" for loss in hand_over.losses)
    convert = f"Once, in this folder, make the file that TensorRT-LLM reads:\n\n    {CONVERSION}\n\n"
    convert = convert if hand_over.needs_queries else ""
    statistics = f"* `{STATISTICS_FILE}`: statistics of queries for TriAttention\n" if hand_over.needs_queries else ""
    return f"""# For TensorRT-LLM

{what}

* `{MODEL_FOLDER}/`: the checkpoint, in Hugging Face layout
* `{OPTIONS_FILE}`: options of the LLM API
{statistics}
{convert}Then, in this folder:

    trtllm-serve {MODEL_FOLDER} --config {OPTIONS_FILE}

## What is lost

TensorRT-LLM's own attention and cache run, not the policy. The options are the nearest that it has:

{lost}
## What was checked

Names and values of the options were compared with its source ({published["source"]}, commit {published["commit"]}).
Nothing here has been run with TensorRT-LLM. `trt-kv doctor` compares the fields with those of the version that is installed.

Made by: `{reproduce}`
"""
