"""Typed reads of a GGUF file's metadata; every error names the key and the file."""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_header import Metadata


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The metadata of one model, of ``architecture``, and the names of its tensors."""

    path: Path
    metadata: Metadata
    architecture: str
    tensor_names: Container[str]

    def has_tensor(self, name: str) -> bool:
        return name in self.tensor_names

    def optional(self, key: str, *, prefixed: bool = True) -> Any:
        """The value of ``key``, of the architecture's own keys unless ``prefixed`` is false; None if there is none.

        An array of equal numbers is one number: some files give a value per layer. float32 numbers become those that people
        write: 1e-05, not 9.999999747378752e-06.
        """
        name = f"{self.architecture}.{key}" if prefixed else key
        value = self.metadata.get(name)
        if isinstance(value, np.ndarray):
            if len(value) == 0 or (value != value[0]).any():
                raise CheckpointError(
                    f"{name} of {self.path} differs from layer to layer",
                    got=value[:8].tolist(),
                    expected="one value for all layers",
                )
            value = value[0].item()
        if isinstance(value, float):
            return float(str(np.float32(value)))
        return value

    def required(self, key: str) -> Any:
        value = self.optional(key)
        if value is None:
            raise CheckpointError(
                f"{self.path} lacks metadata",
                got=f"no {self.architecture}.{key}",
                expected=f"a complete GGUF file of a {self.architecture} model",
                fix="convert the original checkpoint again, with a recent llama.cpp",
            )
        return value

    def contradiction(self, what: str, got: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} contradicts itself: {what}",
            got=got,
            expected=expected,
            fix="download it again, or another conversion",
        )
