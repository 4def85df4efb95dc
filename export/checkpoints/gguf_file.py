"""A checkpoint in one GGUF file, or in the parts that gguf-split makes of one: opened only if its contents are consistent."""

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.base import QuantizedBlocks
from trt_kv.export.checkpoints.config_digest import digest_of_arithmetic
from trt_kv.export.checkpoints.gguf_config import config_from_gguf, end_tokens, family_of
from trt_kv.export.checkpoints.gguf_header import GgufHeader, read_gguf_header
from trt_kv.export.checkpoints.gguf_metadata import ModelFacts
from trt_kv.export.checkpoints.gguf_tensors import StoredRows, stored_rows
from trt_kv.export.checkpoints.gguf_tokenizer import check_tokenizer, write_tokenizer
from trt_kv.export.checkpoints.tensor_matching import some
from trt_kv.hf_config import model_config_from_hf
from trt_kv.model_config import ModelConfig

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, kw_only=True)
class GgufCheckpoint:
    """A validated GGUF file, which ``location`` names (the first of several): a ``Checkpoint``.

    ``hf_config`` is its configuration in Hugging Face's form. ``eos_token_ids``: the tokens that the metadata name, and control
    tokens that end a text in every model that has them.
    """

    location: Path
    name: str
    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    hf_config: Mapping[str, Any]
    facts: ModelFacts
    stored: Mapping[str, StoredRows]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The weights that the decoder uses, in ``config.tensor_shapes()`` order."""
        return tuple(self.stored)

    @property
    def tokenizer_file(self) -> Path:
        """``tokenizer.json``, made from the metadata."""
        return self._folder / "tokenizer.json"

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """Files in Hugging Face's layout, made from the metadata in a temporary folder that lives as long as this object."""
        return {path.relative_to(self._folder).as_posix(): path for path in sorted(self._folder.rglob("*")) if path.is_file()}

    @cached_property
    def _folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="trt-kv-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        write_tokenizer(self.facts, dict(self.hf_config), folder)
        return folder

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` over the arithmetic of the config and the names, types, shapes and bytes of all weights.

        Reads every weight once.
        """
        digest = digest_of_arithmetic(self.config)
        for name, rows in sorted(self.stored.items()):
            digest.update(json.dumps([name, rows.tensor.scheme, rows.shape]).encode())
            for chunk in rows.chunks():
                digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"

    def tensor(self, name: str) -> torch.Tensor:
        """One weight, read and dequantised on use: float32, or the type it is stored in if that is no quantisation.

        Raises ``CheckpointError`` if the file has become shorter since the checkpoint was opened.
        """
        return self.stored[name].values()

    def scheme(self, name: str) -> str | None:
        """ggml's name of the quantisation of a weight; None if it is stored as numbers."""
        return self.stored[name].scheme

    def quantized(self, name: str) -> QuantizedBlocks | None:
        """The stored blocks of a weight, with whole rows in Hugging Face's order; None if it is stored as numbers."""
        return self.stored[name].blocks()


def open_gguf(path: Path, *, revision: str | None = None) -> GgufCheckpoint:
    """Open and check the GGUF file ``path``, and the other parts if it is one of several.

    Only headers are read. Raises ``CheckpointError`` for what is missing, damaged, contradictory or not supported, and
    ``MissingDependencyError`` if the packages of the extra ``gguf`` are not installed. ``revision``: of the hub's repository,
    for its name.
    """
    paths = _parts(path)
    headers = [read_gguf_header(part) for part in paths]
    _check_parts(headers)
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    if len(tensors) != sum(len(header.tensors) for header in headers):
        raise CheckpointError(f"two parts of {path} hold the same tensor", fix="download all parts again, together")
    metadata = headers[0].metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{paths[0]} does not say what model it holds",
            got="no general.architecture",
            expected="a GGUF file of a language model",
        )
    facts = ModelFacts(path=paths[0], metadata=metadata, architecture=architecture, tensor_names=tensors.keys())
    family = family_of(facts)
    hf_config = config_from_gguf(facts, family, tensors)
    config = model_config_from_hf(hf_config, source=str(paths[0]))
    check_tokenizer(facts)
    name = _PART.sub(r"\g<stem>.gguf", paths[0].name).removesuffix(".gguf")
    return GgufCheckpoint(
        location=paths[0].absolute(),
        name=name if revision is None else f"{name}@{revision}",
        config=config,
        eos_token_ids=end_tokens(facts),
        hf_config=hf_config,
        facts=facts,
        stored=stored_rows(facts, family, config, tensors),
    )


def _parts(path: Path) -> list[Path]:
    """The files of the checkpoint: ``path``, or all parts of the one that it is a part of."""
    match = _PART.fullmatch(path.name)
    count = 0 if match is None else int(match["count"])
    if match is None or count == 0:
        return [path]
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    absent = [part.name for part in paths if not part.is_file()]
    if absent:
        raise CheckpointError(
            f"{path} is one of {count} parts, and others are missing",
            got=f"missing {some(absent)}",
            expected=f"{count} files in one folder",
            fix="finish the download, or copy the missing parts into the folder",
        )
    return paths


def _check_parts(headers: list[GgufHeader]) -> None:
    for number, header in enumerate(headers):
        stated = [header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)]
        known = ([number, len(headers)], [0, 0]) if len(headers) == 1 else ([number, len(headers)],)
        if any(type(value) is not int for value in stated) or stated not in known:
            raise CheckpointError(
                f"{header.path} is not the part that its name says",
                got=f"split.no {stated[0]}, split.count {stated[1]}",
                expected=f"split.no {number}, split.count {len(headers)}",
                fix="parts keep the names that gguf-split gave them: NAME-00001-of-0000N.gguf",
            )
