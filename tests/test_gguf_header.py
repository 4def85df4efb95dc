"""A GGUF header is read only if the file is complete and consistent, in time and memory bounded by the file."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gguf_files import write_gguf
from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_header import read_gguf_header

METADATA = {"a.number": 7, "a.float": 0.1, "a.flag": True, "a.text": "é", "a.texts": ["one", "", "three"], "a.list": [1, 2, 5]}
WEIGHTS = {
    "matrix": np.arange(3 * 64, dtype=np.float32).reshape(3, 64),
    "vector": np.arange(5, dtype=np.float32),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file whose last bytes are those of a tensor: without padding."""
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", WEIGHTS, METADATA, scheme="Q8_0")
    last = max(read_gguf_header(path).tensors.values(), key=lambda tensor: tensor.start)
    return path.read_bytes()[: last.start + last.n_bytes]


def refusal(path: Path) -> CheckpointError:
    """The error that reading ``path`` ends in; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_gguf_header(path)
    assert str(path) in caught.value.what
    return caught.value


def test_metadata_and_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    header = read_gguf_header(write_gguf(tmp_path / "a.gguf", WEIGHTS, METADATA, scheme="Q8_0"))
    found = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in header.metadata.items()}
    assert found.pop("a.float") == pytest.approx(0.1)
    assert found == {"general.architecture": "llama", **{key: value for key, value in METADATA.items() if key != "a.float"}}
    assert {name: (tensor.scheme, tensor.shape) for name, tensor in header.tensors.items()} == {
        "matrix": ("Q8_0", (3, 64)),
        "vector": ("F32", (5,)),
    }
    np.testing.assert_array_equal(header.tensors["vector"].read().view("<f4"), WEIGHTS["vector"][None])
    blocks = gguf.quantize(WEIGHTS["matrix"], gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(header.tensors["matrix"].read(), blocks)
    np.testing.assert_array_equal(header.tensors["matrix"].read(1, 2), blocks[1:])


def test_the_package_that_wrote_it_reads_the_same(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", WEIGHTS, METADATA, scheme="Q8_0")
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert {tensor.name: tensor.data_offset for tensor in reader.tensors} == {
        name: tensor.start for name, tensor in header.tensors.items()
    }
    for key, value in header.metadata.items():
        assert reader.fields[key].contents() == (value.tolist() if isinstance(value, np.ndarray) else value)


@given(data=st.data())
def test_a_file_cut_off_anywhere_is_refused(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert "again" in str(refusal(path).fix)


@given(data=st.data())
def test_damaged_bytes_are_refused_or_harmless_but_never_a_crash(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged = bytearray(whole)
    for position in data.draw(st.lists(st.integers(0, 500), min_size=1, max_size=9)):
        damaged[position] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    path.write_bytes(damaged)
    try:
        header = read_gguf_header(path)
    except CheckpointError:
        return
    assert all(tensor.start + tensor.n_bytes <= len(whole) for tensor in header.tensors.values())


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(*entries: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None, rest: int = 1000) -> bytes:
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_entries) + b"".join((*entries, *tensors)) + bytes(rest)


HUGE = 2**63 + 5
HOSTILE = {
    "entries without end": file(counts=(0, 2**64 - 1)),
    "tensors without end": file(counts=(2**64 - 1, 0)),
    "a text without end": file(entry("a", 8, struct.pack("<Q", HUGE))),
    "a key without end": file(struct.pack("<Q", HUGE), counts=(0, 1)),
    "an array of bytes without end": file(entry("a", 9, struct.pack("<IQ", 0, HUGE))),
    "an array of texts without end": file(entry("a", 9, struct.pack("<IQ", 8, HUGE))),
    "arrays in arrays": file(entry("a", 9, struct.pack("<IQ", 9, 3))),
    "a type that does not exist": file(entry("a", 13, bytes(8))),
    "a key twice": file(entry("a", 0, b"1"), entry("a", 0, b"1")),
    "no UTF-8": file(entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    "dimensions without end": file(tensors=(text("a") + struct.pack("<I", 2**32 - 1),)),
    "no dimensions": file(tensors=(tensor("a", ()),)),
    "a size that overflows 64 bits": file(tensors=(tensor("a", (2**32, 2**32)),)),
    "a size that overflows to the right one": file(tensors=(tensor("a", (2**62, 4 + 2**62)),)),
    "an offset that overflows": file(tensors=(tensor("a", (4,), 0, 2**64 - 32),)),
    "an empty tensor": file(tensors=(tensor("a", (4, 0)),)),
    "half a block": file(tensors=(tensor("a", (16, 4), 8),)),
    "an offset beside the alignment": file(tensors=(tensor("a", (4,), 0, 8),)),
    "two tensors of one name": file(tensors=(tensor("a", (4,)), tensor("a", (4,), 0, 32))),
    "two tensors in one place": file(tensors=(tensor("a", (64,)), tensor("b", (4,), 0, 128))),
    "an alignment of zero": file(entry("general.alignment", 4, struct.pack("<I", 0))),
    "an alignment of three": file(entry("general.alignment", 4, struct.pack("<I", 3))),
    "an alignment beyond any file": file(entry("general.alignment", 10, struct.pack("<Q", 2**63))),
    "an alignment of letters": file(entry("general.alignment", 8, text("32"))),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_without_large_allocations(case: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    try:
        assert "truncated or damaged" in refusal(path).what
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_any_size_has_a_header_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(file(entry("a", 9, struct.pack("<IQ", 0, 2**35)), rest=0))
    with path.open("r+b") as sparse:
        sparse.truncate(2**36)
    assert "truncated or damaged" in refusal(path).what


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated or damaged"),
        (b"GGUF", "truncated or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"PK\x03\x04" + bytes(40), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (file(tensors=(tensor("a", (4,), 4),)), "does not know"),  # Q4_2, which no longer exists
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_refused_by_name(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf_header(path)
    assert words in caught.value.what
    assert str(path) in caught.value.what


def test_a_big_endian_file_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "big.gguf", WEIGHTS, METADATA, endianess=gguf.GGUFEndian.BIG)
    assert "big-endian" in refusal(path).what


def test_an_unreadable_path_is_a_checkpoint_error(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path).what
