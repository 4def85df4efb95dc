"""Typed reads of a GGUF file's metadata; every error names the key and the file."""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_header import Metadata
from trt_kv.model_config import LARGEST_SIZE

_LARGEST_NUMBER = 1e30


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The metadata of one model, of ``architecture``, and the names of its tensors."""

    path: Path
    metadata: Metadata
    architecture: str
    tensor_names: Container[str]

    def has_tensor(self, name: str) -> bool:
        return name in self.tensor_names

    def integer(self, key: str, *, prefixed: bool = True) -> int | None:
        """An integer from 0 to 2^24, None if there is none. ``key``: of the architecture's own keys if ``prefixed``.

        An array of equal numbers is one number: some files give a value per layer.
        """
        value = self._value(key, prefixed)
        if value is not None and not (type(value) is int and 0 <= value <= LARGEST_SIZE):
            raise self._bad(key, prefixed, value, f"an integer from 0 to {LARGEST_SIZE}")
        return value

    def number(self, key: str) -> float | None:
        """A number, None if there is none; of float32, the one that people write: 1e-05, not 9.999999747378752e-06."""
        value = self._value(key, True)
        if value is None:
            return None
        if type(value) not in (int, float) or not abs(value) <= _LARGEST_NUMBER:
            raise self._bad(key, True, value, "a number")
        return float(str(np.float32(value)))

    def text(self, key: str, *, prefixed: bool = True) -> str | None:
        """A text, None if there is none."""
        value = self._value(key, prefixed)
        if value is not None and not isinstance(value, str):
            raise self._bad(key, prefixed, value, "a text")
        return value

    def flag(self, key: str, *, prefixed: bool = True) -> bool | None:
        """True or false, None if there is neither."""
        value = self._value(key, prefixed)
        if value is not None and not isinstance(value, bool):
            raise self._bad(key, prefixed, value, "true or false")
        return value

    def per_layer(self, key: str) -> list[Any] | None:
        """The values of an array, None if ``key`` is absent or no array."""
        value = self.metadata.get(self._name(key, True))
        return value.tolist() if isinstance(value, np.ndarray) else None

    def required_integer(self, key: str) -> int:
        value = self.integer(key)
        if value is None:
            raise self._missing(key)
        if value < 1:
            raise self._bad(key, True, value, "an integer >= 1")
        return value

    def required_number(self, key: str) -> float:
        value = self.number(key)
        if value is None:
            raise self._missing(key)
        return value

    def has_value(self, key: str) -> bool:
        """Whether the architecture's ``key`` has a value other than 0, false or nothing."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return bool(value.any()) if isinstance(value, np.ndarray) else bool(value)

    def _value(self, key: str, prefixed: bool) -> Any:
        value = self.metadata.get(self._name(key, prefixed))
        if isinstance(value, np.ndarray):
            if len(value) == 0 or (value != value[0]).any():
                raise CheckpointError(
                    f"{self._name(key, prefixed)} of {self.path} differs from layer to layer",
                    got=value[:8].tolist(),
                    expected="one value for all layers",
                )
            value = value[0].item()
        return value

    def _name(self, key: str, prefixed: bool) -> str:
        return f"{self.architecture}.{key}" if prefixed else key

    def _bad(self, key: str, prefixed: bool, value: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self._name(key, prefixed)} of {self.path} has a bad value", got=repr(value)[:80], expected=expected
        )

    def _missing(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} lacks metadata",
            got=f"no {self.architecture}.{key}",
            expected=f"a complete GGUF file of a {self.architecture} model",
            fix="convert the original checkpoint again, with a recent llama.cpp",
        )

    def contradiction(self, what: str, got: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} contradicts itself: {what}",
            got=got,
            expected=expected,
            fix="download it again, or another conversion",
        )
