"""manifest.json: the description of an engine, which loading verifies and ``inspect`` prints."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.errors import EngineError, TrtKvError
from trt_kv.json_file import read_json
from trt_kv.layer_budget import LayerBudget
from trt_kv.model_config import ModelConfig
from trt_kv.policy import Policy
from trt_kv.program import PHASES, OpNode, Program, budgets_of, recall_nodes

FORMAT = "trt-kv-engine"
VERSION = 2
READ_VERSIONS = (1, 2)
"""In version 1, ``segments`` is called ``pieces``, and a tensor of plans has another name."""
FILE_NAME = "manifest.json"
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPES = tuple(ITEM_BYTES)
"""Compute types of an engine's graphs; CPUs run float32 only."""


@dataclass(frozen=True, kw_only=True)
class GraphSegment:
    """The dense part of the graph between the attention of two layers: a file under ``graphs/`` and its values by name."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionPort:
    """The values one layer's KV ops read (q, k, v) and make (out)."""

    q: str
    k: str
    v: str
    out: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled TensorRT engine: its file, what built it, and for each optimization profile the admitted sizes
    (smallest, usual, largest) of the axes N, R, B, T and M.
    """

    file: str
    built_by: str
    profiles: tuple[Mapping[str, tuple[int, int, int]], ...]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Digest ("sha256:<hex>") and size of one file of the engine."""

    digest: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime needs before it opens a graph.

    An engine for ONNX Runtime has ``segments`` and their ``attention_ports``, one for TensorRT has a ``plan``. ``programs`` are
    the KV ops of the graphs, per phase; ``files`` covers every file except the manifest.
    """

    model_name: str
    model_digest: str
    model_source: str
    config: ModelConfig
    policy: Policy
    target: str
    dtype: str
    page_size: int
    op_versions: Mapping[str, int]
    programs: Mapping[str, Program]
    segments: tuple[GraphSegment, ...]
    attention_ports: tuple[AttentionPort, ...]
    plan: Plan | None
    files: Mapping[str, FileRecord]
    reproduce: str
    created_by: str

    @property
    def budgets(self) -> list[LayerBudget | None]:
        """Each layer's budget, as the prefill graph's ops have it; None if it is computed from the input."""
        return budgets_of(self.programs["prefill"])

    @property
    def kept_shares(self) -> list[float]:
        """The share in each layer's budget; 1 if nothing is evicted or if the budget is computed from the input."""
        return [1.0 if budget is None else budget.share for budget in self.budgets]

    @property
    def taus(self) -> list[float | None]:
        """Each layer's drift threshold, as the decode graph's ops have it; None if nothing is recalled."""
        recalls = recall_nodes(self.programs["decode"])
        return [None if recall is None else float(recall.attributes["tau"]) for recall in recalls]

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data |= {
            "config": self.config.to_json(),
            "policy": self.policy.to_json(),
            "programs": {phase: [[n.to_json() for n in nodes] for nodes in layers] for phase, layers in self.programs.items()},
            "segments": [dataclasses.asdict(segment) for segment in self.segments],
            "attention_ports": [dataclasses.asdict(port) for port in self.attention_ports],
            "plan": None if self.plan is None else dataclasses.asdict(self.plan),
            "files": {name: dataclasses.asdict(record) for name, record in sorted(self.files.items())},
            "op_versions": dict(self.op_versions),
        }
        document = {"format": FORMAT, "version": VERSION, **data}
        return {**document, "digest": _document_digest(document)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: Path) -> "Manifest":
        """Read what ``to_json`` wrote. Raises ``EngineError`` naming ``source`` for another format, version or shape."""
        version, has_plan = data.get("version"), data.get("plan") is not None
        if data.get("format") != FORMAT or version not in READ_VERSIONS or (has_plan and version != VERSION):
            raise EngineError(
                f"{source} is not an engine manifest of this version",
                got=f"format {data.get('format')!r}, version {version!r}{', with a TensorRT plan' if has_plan else ''}",
                expected=f"format {FORMAT!r}, version {VERSION}",
                fix=how_to_rebuild(source.parent, data.get("reproduce")),
            )
        names = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in data.items() if name not in {"format", "version", "digest"}}
        if version == 1 and "pieces" in fields:
            fields["segments"] = fields.pop("pieces")
        if set(fields) != names:
            raise EngineError(
                f"{source} does not have the fields of an engine manifest",
                got=f"missing {sorted(names - set(fields))}, unknown {sorted(set(fields) - names)}",
                fix="build the engine again",
            )
        if data.get("digest") != (found := _document_digest({name: data[name] for name in data if name != "digest"})):
            raise EngineError(
                f"{source} was changed after the build", got=found, expected=data.get("digest"), fix="build the engine again"
            )
        try:
            return cls(**(fields | _parsed(fields)))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise EngineError(f"{source} is malformed", got=repr(error), fix="build the engine again") from error
        except TrtKvError as error:
            raise EngineError(f"{source}: {error.what}", got=error.got, expected=error.expected, fix=error.fix) from error

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(self.to_json(), indent=1) + "\n")


def how_to_rebuild(folder: Path, reproduce: object) -> str:
    """The command that builds ``folder`` again; ``reproduce``: the command in its manifest, if any."""
    if not isinstance(reproduce, str) or not reproduce:
        return "build the engine again with this version of trt-kv"
    return f"build the engine again: {reproduce} --out {shlex.quote(str(folder))} --force"


def load_manifest(folder: Path) -> Manifest:
    """The manifest of an engine folder; ``EngineError`` if there is none or it cannot be read."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise EngineError(
            f"{folder} is not an engine",
            got="no such folder" if not folder.is_dir() else f"a folder without {FILE_NAME}",
            expected="a folder made by `trt-kv build`",
            fix="make engine MODEL=llama3 POLICY=prefixkv",
        )
    data = read_json(path, kind="manifest", error=EngineError)
    if not isinstance(data, dict):
        raise EngineError(f"{path} is not an engine manifest", got=type(data).__name__, expected="a JSON object")
    return Manifest.from_json(data, source=path)


def digest_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """sha256 of a file as "sha256:<hex>"; ``on_bytes`` is called with the size of each block read."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return f"sha256:{sha.hexdigest()}"


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Records of every file under ``folder`` except the manifest, by path relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE_NAME)
    return {
        path.relative_to(folder).as_posix(): FileRecord(digest=digest_of(path), n_bytes=path.stat().st_size) for path in paths
    }


def verify_files(folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] | None = None) -> None:
    """Raise ``EngineError`` for a file that is missing or was changed after the build; sizes are compared before any digest."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise EngineError(f"the engine {folder} is incomplete", got=f"{name} is missing", fix="build the engine again")
        if path.stat().st_size != record.n_bytes:
            raise EngineError(
                f"{path} is not the file that was built",
                got=f"{path.stat().st_size} bytes",
                expected=f"{record.n_bytes} bytes",
                fix="build the engine again",
            )
    for name, record in manifest.files.items():
        if (found := digest_of(folder / name, on_bytes)) != record.digest:
            raise EngineError(
                f"{folder / name} is not the file that was built",
                got=found,
                expected=record.digest,
                fix="build the engine again",
            )


def _document_digest(document: Mapping[str, Any]) -> str:
    """Digest of a JSON document, independent of white space and key order."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _plan(data: Mapping[str, Any]) -> Plan:
    profiles = [{axis: (low, usual, high) for axis, (low, usual, high) in ranges.items()} for ranges in data["profiles"]]
    return Plan(file=data["file"], built_by=data["built_by"], profiles=tuple(profiles))


def _parsed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "config": ModelConfig.from_json(fields["config"]),
        "policy": Policy.from_json(fields["policy"]),
        "programs": {
            phase: tuple(tuple(OpNode.from_json(n) for n in nodes) for nodes in fields["programs"][phase]) for phase in PHASES
        },
        "segments": tuple(
            GraphSegment(file=p["file"], inputs=tuple(p["inputs"]), outputs=tuple(p["outputs"])) for p in fields["segments"]
        ),
        "attention_ports": tuple(AttentionPort(**port) for port in fields["attention_ports"]),
        "plan": None if fields["plan"] is None else _plan(fields["plan"]),
        "files": {name: FileRecord(**record) for name, record in fields["files"].items()},
    }
