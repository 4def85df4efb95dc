"""A checkpoint folder in Hugging Face layout, opened only if its files are consistent."""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.base import QuantizedBlocks
from trt_kv.export.checkpoints.config_digest import digest_of_arithmetic
from trt_kv.export.checkpoints.quantized.schemes import scheme_from_hf
from trt_kv.export.checkpoints.quantized.tensors import assembled
from trt_kv.export.checkpoints.safetensors_file import StoredTensor, read_safetensors_header
from trt_kv.export.checkpoints.tensor_matching import matched, some
from trt_kv.hf_config import model_config_from_hf, token_ids_from_hf
from trt_kv.model_config import ModelConfig
from trt_kv.weight_sources import WeightSource, stored_shapes, weight_sources

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Files, or patterns of their names, that are copied into an engine."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceCheckpoint:
    """A validated folder in Hugging Face layout, which ``location`` names: a ``Checkpoint``.

    ``eos_token_ids`` are those of ``config.json`` and of ``generation_config.json``. ``stored``: the tensors that hold the
    decoder's weights, by the names of ``trt_kv.weight_sources``.
    """

    location: Path
    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    stored: Mapping[str, StoredTensor]
    revision: str | None = None

    @property
    def name(self) -> str:
        """The folder's name; a hub snapshot is named after its repository, with the ``revision`` that was asked for."""
        name, cache_name = self.location.name, self.location.parent.parent.name
        if self.location.parent.name == "snapshots" and cache_name.startswith("models--"):
            name = cache_name.removeprefix("models--").replace("--", "/", 1)
        return name if self.revision is None else f"{name}@{self.revision}"

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The weights that the decoder uses, in ``config.tensor_shapes()`` order."""
        return tuple(self.config.tensor_shapes())

    @cached_property
    def _sources(self) -> Mapping[str, WeightSource]:
        return weight_sources(self.config)

    @property
    def tokenizer_file(self) -> Path:
        """``tokenizer.json``, which may be missing."""
        return self.location / "tokenizer.json"

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The existing files that are copied into an engine, ``config.json`` among them; no weights."""
        paths = [path for pattern in TOKENIZER_FILES for path in sorted(self.location.glob(pattern)) if path.is_file()]
        return {path.relative_to(self.location).as_posix(): path for path in paths}

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` over the arithmetic of the config and the names, dtypes, shapes and bytes of all weights.

        The same for single-file and sharded copies. Reads every weight once.
        """
        digest = digest_of_arithmetic(self.config)
        for name, tensor in sorted(self.stored.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for chunk in tensor.chunks():
                digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"

    def tensor(self, name: str) -> torch.Tensor:
        """One weight in its stored dtype, memory-mapped: bytes are read on use. Quantised weights, and norms that are stored
        without the 1 to which they are added, are fp32.

        Raises ``CheckpointError`` if the file has changed since the checkpoint was opened.
        """
        source = self._sources[name]
        tensor = self.stored[source.name].read()[source.first_row : source.first_row + source.n_rows]
        return tensor.float() + source.offset if source.offset else tensor

    def scheme(self, name: str) -> str | None:
        """None: safetensors hold values, no blocks."""
        return None

    def quantized(self, name: str) -> QuantizedBlocks | None:
        """None: safetensors hold values, no blocks."""
        return None


def open_huggingface(folder: Path, *, revision: str | None = None) -> HuggingFaceCheckpoint:
    """Open and check the checkpoint in ``folder``; raises ``CheckpointError`` naming the first inconsistent file.

    Weights are not read, only their headers. ``revision``: of the hub's repository, for its name.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "no such checkpoint folder", got=str(folder), expected="a folder with config.json and safetensors"
        )
    config_path = folder / "config.json"
    data = _read_json(config_path)
    config = model_config_from_hf(data, source=str(config_path))
    scheme = scheme_from_hf(data, source=str(config_path))
    stored: Mapping[str, StoredTensor] = _stored_tensors(folder, config)
    if scheme is not None:
        stored = assembled(stored, scheme, folder)
    checkpoint = HuggingFaceCheckpoint(
        location=folder.absolute(),
        config=config,
        eos_token_ids=_eos_token_ids(folder, config),
        stored=matched(folder, config, stored),
        revision=revision,
    )
    _check_tokenizer(folder, config)
    return checkpoint


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing",
            expected="a checkpoint in Hugging Face layout: config.json, safetensors, tokenizer.json",
            fix="pass the folder that holds config.json; convert other layouts with transformers first",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}", got=str(error), expected="a JSON file") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object", got=type(data).__name__, expected="an object")
    return data


def _eos_token_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    more = token_ids_from_hf(_read_json(path), "eos_token_id", source=str(path)) if path.is_file() else ()
    stray = [token for token in more if not 0 <= token < config.vocab_size]
    if stray:
        raise CheckpointError(
            f"eos_token_id in {path} is outside the vocabulary", got=stray, expected=f"below {config.vocab_size}"
        )
    return tuple(dict.fromkeys((*config.eos_token_ids, *more)))


def _stored_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """All tensors of the folder's safetensors by name; the single file wins over an index, as in transformers."""
    if (folder / SINGLE_FILE).exists():
        return read_safetensors_header(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).exists():
        return _sharded_tensors(folder, needed=stored_shapes(config))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise CheckpointError(
        f"{folder} has no safetensors weights",
        got=f"pickle files {some(pickles)}" if pickles else some(others),
        expected=f"safetensors only: {SINGLE_FILE}, or {INDEX_FILE} with its shards",
        fix="save it again with transformers' save_pretrained(), which writes safetensors; pickles can run code"
        if pickles
        else None,
    )


def _sharded_tensors(folder: Path, *, needed: Container[str]) -> dict[str, StoredTensor]:
    """The tensors that the index lists, and those that it leaves out although they are ``needed``."""
    index_path = folder / INDEX_FILE
    shard_of = _read_json(index_path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in shard_of.values()
    ):
        raise CheckpointError(
            f"{index_path} has no usable weight_map", expected="tensor names to file names in the same folder"
        )
    shards = sorted(set(shard_of.values()))
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        raise CheckpointError(
            f"{index_path} lists shards that are missing",
            got=f"missing {some(absent)}",
            expected=f"{len(shards)} shards",
            fix="finish the download, or copy the missing shards into the folder",
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        held = read_safetensors_header(folder / shard)
        promised = {name for name, where in shard_of.items() if where == shard}
        if not promised <= set(held):
            raise CheckpointError(
                f"{folder / shard} is not the shard that {INDEX_FILE} describes",
                got=f"{some(sorted(set(held) - promised))} not listed; {some(sorted(promised - set(held)))} not in the file",
                expected="the tensors that the index lists for it",
                fix="shards are swapped or from different checkpoints: download them again together",
            )
        tensors |= {name: held[name] for name in held if name in promised or (name in needed and name not in shard_of)}
    return tensors


def _check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for; unused embedding rows are common and allowed."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    largest = _largest_token_id(path)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path} belongs to a model with a larger vocabulary",
            got=f"token ids up to {largest}",
            expected=f"ids below the vocab_size {config.vocab_size} of config.json",
            fix="take tokenizer.json and the weights from the same checkpoint",
        )


def _largest_token_id(path: Path) -> int:
    data = _read_json(path)
    try:
        vocabulary = data["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return max(map(int, [*ids, *(token["id"] for token in data.get("added_tokens") or [])]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a tokenizer", got=repr(error), expected="a tokenizers file with model.vocab"
        ) from error
