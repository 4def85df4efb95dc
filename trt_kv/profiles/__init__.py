"""Profiles: the sizes that TensorRT engines are built for and that GPU memory is reserved for. For your own sizes, copy one of
the JSON files in this folder, change it, and pass its path as PROFILE.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.json_file import read_json

FOLDER = Path(__file__).parent
DEFAULT = "edge"

Range = tuple[int, int, int]
"""Smallest, usual and largest size of an axis."""


@dataclass(frozen=True, kw_only=True)
class BuildProfile:
    """Sizes in tokens and sequences; each entry of a list of ranges becomes one optimization profile of TensorRT.

    ``prefill_tokens``: prompt tokens of one prefill step. ``decode_sequences``: sequences of one decode step.
    ``context_tokens``: cached tokens of one sequence in one layer. ``cache_tokens``: tokens that the KV pool holds in every
    layer. ``workspace_mib``: scratch memory that TensorRT may use. ``optimization_level``: 0 (builds fast) .. 5 (runs fast).
    """

    summary: str
    prefill_tokens: tuple[Range, ...]
    decode_sequences: tuple[Range, ...]
    context_tokens: Range
    cache_tokens: Range
    workspace_mib: int
    optimization_level: int

    def __post_init__(self) -> None:
        for name in ("prefill_tokens", "decode_sequences"):
            ranges = getattr(self, name)
            if not ranges:
                raise UsageError(f"a build profile needs a range in {name}", got=[], expected="e.g. [[1, 8, 32]]")
            for one in ranges:
                _check_range(name, one)
        _check_range("context_tokens", self.context_tokens)
        _check_range("cache_tokens", self.cache_tokens)
        if self.workspace_mib < 1:
            raise UsageError("workspace_mib is out of range", got=self.workspace_mib, expected="an integer >= 1")
        if not 0 <= self.optimization_level <= 5:
            raise UsageError("optimization_level is out of range", got=self.optimization_level, expected="0 .. 5")

    def axis_ranges(self, *, n_layers: int, page_size: int) -> list[dict[str, Range]]:
        """Ranges of the graph's dynamic axes (N, R, B, T, M, U), one dictionary per optimization profile; prefill first.

        U, the number of stored queries, is M: each sequence has at least one page in each layer, so more is never needed.
        """
        _, *pages = (-(-tokens // page_size) for tokens in self.context_tokens)
        low, usual, high = (n_layers * -(-tokens // page_size) for tokens in self.cache_tokens)
        shared: dict[str, Range] = {"T": (1, pages[0], pages[1]), "M": (low, usual, high), "U": (low, usual, high)}
        prefill = [{"N": tokens, "R": (1, 1, tokens[2]), "B": (1, 1, 1)} for tokens in self.prefill_tokens]
        decode = [dict.fromkeys(("N", "R", "B"), sequences) for sequences in self.decode_sequences]
        return [shared | own for own in (*prefill, *decode)]


def profile_names() -> list[str]:
    """Names of the bundled profiles."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def build_profile(name: str) -> BuildProfile:
    """The preset ``name``, or the profile in the file ``name`` if it ends in ".json".

    Raises ``UnknownNameError`` for another name, ``UsageError`` naming the file for one that is not a profile.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not name.endswith(".json") and name not in profile_names():
        raise UnknownNameError("profile", name, [*profile_names(), "a .json file"])
    data = read_json(path, kind="build profile", error=UsageError)
    fields = {field.name for field in dataclasses.fields(BuildProfile)}
    if not isinstance(data, dict) or set(data) != fields:
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise UsageError(
            f"{path} is not a build profile", got=got, expected=sorted(fields), fix=f"copy {FOLDER}/{DEFAULT}.json"
        )
    return BuildProfile(**{key: _tuples(value) for key, value in data.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check_range(name: str, given: Any) -> None:
    is_range = isinstance(given, tuple) and len(given) == 3 and all(isinstance(n, int) for n in given)
    if not is_range or not 1 <= given[0] <= given[1] <= given[2]:
        raise UsageError(
            f"{name} has a bad range", got=given, expected="[smallest, usual, largest]: integers >= 1 in ascending order"
        )
