"""``model.json``: the engine that a Triton model serves, how it is loaded, and how many requests may wait."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.errors import UsageError
from trt_kv.json_file import MAX_DOCUMENT_BYTES, dataclass_from_json, read_json
from trt_kv.manifest import load_manifest

OPTIONS_FILE = "model.json"
_OF_THE_SERVICE = {"engine", "max_queue", "drain_seconds", "end_server_if_killed"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """``engine``: its folder, absolute or relative to the folder of ``model.json``. At most ``max_queue`` requests wait for
    their first step; more are refused. ``drain_seconds``: how long unloading waits for requests that run.
    ``end_server_if_killed``: see ``watch.py``. The other fields are options of ``Engine.load``.
    """

    engine: str
    max_queue: int = 256
    drain_seconds: float = 10.0
    end_server_if_killed: bool = True
    digest: str | None = None
    verify: bool = True
    model_defaults: bool = True
    device: str | None = None
    dense: str | None = None
    precision: str | None = None
    dtype: str | None = None
    batch: int | None = None
    profile: str | None = None
    kv_dtype: str | None = None
    cache_tokens: int | None = None
    host_tier: str | None = None
    host_tokens: int | None = None
    chunk: int | None = None
    token_budget: int | None = None
    max_sequences: int | None = None
    n_threads: int | None = None
    batch_invariant: bool | None = None
    prefix_cache: bool | None = None
    prefix_bytes: int | None = None
    prefix_store: str | None = None

    def __post_init__(self) -> None:
        if self.drain_seconds < 0:
            raise UsageError("bad drain_seconds", got=self.drain_seconds, expected="seconds >= 0")

    @classmethod
    def read(cls, folder: Path) -> "ModelOptions":
        """Of the model version in ``folder``. ``UsageError`` for a file that is missing, or has unknown or ill-typed fields."""
        path = folder / OPTIONS_FILE
        data = read_json(path, kind="file of options", error=UsageError, max_bytes=MAX_DOCUMENT_BYTES)
        return dataclass_from_json(cls, data, where=str(path), error=UsageError, with_defaults=True)

    def engine_folder(self, folder: Path) -> Path:
        """The engine's folder; a relative one begins at ``folder``, links followed."""
        return (folder.resolve() / self.engine).resolve()

    def load_options(self, folder: Path, *, gpu: int | None) -> dict[str, Any]:
        """Keyword arguments of ``Engine.load``. ``gpu``: on which Triton places the model; an engine for ONNX Runtime runs
        there unless ``device`` says otherwise, one for TensorRT in any case.
        """
        names = {field.name for field in dataclasses.fields(self)} - _OF_THE_SERVICE
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if gpu is not None and self.device is None and load_manifest(self.engine_folder(folder)).plan is None:
            given["device"] = f"cuda:{gpu}"
        return given
