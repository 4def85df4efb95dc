"""The interface of checkpoints of any format."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trt_kv.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class QuantizedBlocks:
    """A matrix stored in blocks of values of one row, which have a scale in common.

    ``scheme``: ggml's name of the format, such as "q4_0", "q4_1", "q8_0", "q4_k". ``blocks``: uint8 ``[rows, blocks per row,
    bytes per block]``, rows in Hugging Face's order. ``shape``: of the values.
    """

    scheme: str
    blocks: "np.ndarray"
    shape: tuple[int, ...]


class Checkpoint(Protocol):
    """A validated checkpoint: every tensor that ``config`` requires is present, complete and of the right shape."""

    @property
    def location(self) -> Path:
        """Its path, for messages."""

    @property
    def name(self) -> str:
        """The model's name, for messages and manifests."""

    @property
    def config(self) -> "ModelConfig": ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: those of ``config`` and of the generation settings."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The weights that the decoder uses, in ``config.tensor_shapes()`` order."""

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer as one file in the format of Hugging Face's tokenizers; it need not exist."""

    @property
    def tokenizer_files(self) -> Mapping[str, Path]:
        """The existing files that are copied into an engine, ``tokenizer_file`` and chat templates among them, by the name
        that they have there.
        """

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` over the arithmetic of the config and the names, dtypes, shapes and bytes of all weights."""

    def tensor(self, name: str) -> "torch.Tensor":
        """One weight in its stored dtype, on the CPU; its bytes are read on use.

        Raises ``CheckpointError`` if the file has changed since the checkpoint was opened.
        """

    def scheme(self, name: str) -> str | None:
        """The scheme of ``quantized(name)``, of which nothing is read; None if that is None."""

    def quantized(self, name: str) -> QuantizedBlocks | None:
        """The weight ``name`` as it is stored, if it is stored in blocks; ``tensor(name)`` has their values.

        Raises ``CheckpointError`` as ``tensor`` does.
        """
