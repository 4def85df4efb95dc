"""An engine tells where its weights are, so that a decoder can be made of the engine alone."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trt_kv.errors import EngineError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.manifest import load_manifest
from trt_kv.runtime.backends.cuda.weights import decoder_from_engine
from trt_kv.weight_index import FILE_NAME, load_weight_index

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_decoder_of_an_engine_is_that_of_its_checkpoint(
    small_folder: Path, small_checkpoint_folder: Path, dtype: torch.dtype
) -> None:
    """Weight by weight, big ones and small ones."""
    told: list[tuple[int, int]] = []
    config = load_manifest(small_folder).config
    found = decoder_from_engine(
        small_folder / "graphs", config, dtype=dtype, device=CPU, on_weight=lambda *counts: told.append(counts)
    ).state_dict()
    expected = decoder_from_checkpoint(open_checkpoint(small_checkpoint_folder), dtype).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert told == [(done, len(expected)) for done in range(1, len(expected) + 1)]


def changed(folder: Path, **fields: Any) -> None:
    """Give the first weight in the list other values."""
    path = folder / FILE_NAME
    data = json.loads(path.read_text())
    data["weights"][0] |= fields
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "another"}, "does not match the model's weights"),
        ({"shape": [269, 47]}, "does not match the model's weights"),
        ({"file": "elsewhere.data"}, "elsewhere.data is missing"),
        ({"file": "../graphs/weights.data"}, "by a name that is not allowed"),
        ({"offset": 2}, "does not hold model.embed_tokens.weight"),
        ({"offset": 10**9}, "does not hold model.embed_tokens.weight"),
        ({"offset": -4}, "does not hold model.embed_tokens.weight"),
    ],
    ids=str,
)
def test_a_list_that_does_not_fit_the_engine_is_refused(
    small_folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    config = load_manifest(small_folder).config
    folder = tmp_path / "graphs"
    shutil.copytree(small_folder / "graphs", folder)
    changed(folder, **fields)
    with pytest.raises(EngineError, match=message):
        load_weight_index(folder, config.tensor_shapes())


def test_engines_without_a_list_say_what_to_do(small_folder: Path) -> None:
    manifest = load_manifest(small_folder)
    with pytest.raises(EngineError, match="build the engine again, with --force"):
        load_weight_index(small_folder, manifest.config.tensor_shapes())
    other = dataclasses.replace(manifest.config, n_layers=2)
    with pytest.raises(EngineError, match="does not match the model's weights"):
        load_weight_index(small_folder / "graphs", other.tensor_shapes())
