"""Build profiles are data that users copy and change; what is wrong with one is said before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest

from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.profiles import FOLDER, build_profile, profile_names

PAGE_SIZE = 32


@pytest.mark.parametrize("name", profile_names())
def test_presets_cover_prefill_and_decode(name: str) -> None:
    profile = build_profile(name)
    ranges = profile.axis_ranges(n_layers=8, page_size=PAGE_SIZE)
    assert len(ranges) == len(profile.prefill_tokens) + len(profile.decode_sequences)
    assert all(low <= usual <= high for axes in ranges for low, usual, high in axes.values())
    assert ranges[0]["M"][2] * PAGE_SIZE == 8 * profile.cache_tokens[2]
    assert ranges[-1]["N"] == ranges[-1]["B"] == ranges[-1]["R"] == profile.decode_sequences[-1]


def changed(tmp_path: Path, **fields: Any) -> str:
    """The path of a copy of a preset with other values; None leaves a field out."""
    data = json.loads((FOLDER / "edge.json").read_text()) | fields
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return str(path)


def test_a_copied_preset_can_be_changed(tmp_path: Path) -> None:
    profile = build_profile(changed(tmp_path, decode_sequences=[[1, 2, 3], [4, 6, 8]], workspace_mib=77))
    assert profile.decode_sequences == ((1, 2, 3), (4, 6, 8))
    assert profile.workspace_mib == 77
    assert profile.prefill_tokens == build_profile("edge").prefill_tokens


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"workspace_mib": None}, "not a build profile"),
        ({"batch": 3}, "not a build profile"),
        ({"prefill_tokens": []}, "prefill_tokens"),
        ({"prefill_tokens": [[8, 4, 16]]}, "bad range"),
        ({"decode_sequences": [[0, 1, 2]]}, "bad range"),
        ({"context_tokens": [1, 2]}, "bad range"),
        ({"cache_tokens": "many"}, "bad range"),
        ({"workspace_mib": 0}, "workspace_mib is out of range"),
        ({"optimization_level": 6}, r"0 \.\. 5"),
    ],
    ids=str,
)
def test_a_bad_profile_is_refused_by_field(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_profile(changed(tmp_path, **fields))


def test_an_unknown_profile_lists_the_known_ones_and_an_absent_file_is_named() -> None:
    with pytest.raises(UnknownNameError, match="datacenter, edge"):
        build_profile("moon")
    with pytest.raises(UsageError, match=r"moon\.json"):
        build_profile("moon.json")
