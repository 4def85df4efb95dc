"""A safetensors file is refused unless it is whole and its header agrees with itself."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.safetensors_file import read_safetensors_header

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.ones((), dtype=torch.float16),
}
WHOLE = save(TENSORS, metadata={"format": "pt"})


def refusal(path: Path) -> CheckpointError:
    """The error that reading ``path`` ends in; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(path)
    assert str(path) in caught.value.what
    return caught.value


def test_dtypes_shapes_and_bytes_are_those_that_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    path.write_bytes(WHOLE)
    stored = read_safetensors_header(path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (5,)),
        "c": ("F16", ()),
    }
    for name, tensor in TENSORS.items():
        assert b"".join(stored[name].chunks()) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_off_anywhere_is_refused(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(WHOLE[:length])
    error = refusal(path)
    assert "truncated or damaged" in error.what
    assert "again" in str(error.fix)


@given(position=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
def test_a_damaged_byte_is_refused_or_harmless_but_never_a_crash(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(WHOLE[:position] + bytes([value]) + WHOLE[position + 1 :])
    try:
        stored = read_safetensors_header(path)
    except CheckpointError:
        return
    assert all(tensor.start + tensor.n_bytes <= len(WHOLE) for tensor in stored.values())


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "longer.safetensors"
    path.write_bytes(WHOLE + b"\0")
    assert "truncated or damaged" in refusal(path).what


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[" * 100_000,
        [],
        {"a": 1},
        {"a": {**ENTRY, "dtype": ["F32"]}},
        {"a": {**ENTRY, "shape": None}},
        {"a": {**ENTRY, "shape": [-2]}},
        {"a": {**ENTRY, "shape": [3]}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": {**ENTRY, "data_offsets": [8, 0]}},
        {"a": {**ENTRY, "data_offsets": [4, 12]}},
        {"a": ENTRY, "b": ENTRY},
    ],
    ids=[
        "text",
        "deep",
        "list",
        "number",
        "dtype",
        "no-shape",
        "negative",
        "large",
        "one-offset",
        "backwards",
        "gap",
        "overlap",
    ],
)
def test_a_header_that_contradicts_itself_is_refused(header: object, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refusal(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "pointer.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in str(refusal(path).fix)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_tensors_of_any_dtype_are_listed(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    """Checkpoints may hold buffers that nobody reads; whoever needs a tensor refuses its dtype."""
    path = tmp_path / "buffer.safetensors"
    save_file({"buffer": torch.ones(3).to(dtype)}, path)
    stored = read_safetensors_header(path)["buffer"]
    assert (stored.dtype, stored.shape, stored.n_bytes) == (name, (3,), 3)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path).what
