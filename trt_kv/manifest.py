"""manifest.json: the description of an engine, which loading verifies and ``inspect`` prints."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trt_kv.cache_layers import cache_config, cache_policy, heads_apart
from trt_kv.digests import check_digest, document_digest
from trt_kv.errors import EngineError, TrtKvError, UsageError
from trt_kv.json_file import MAX_DOCUMENT_BYTES, dataclass_from_json, read_json
from trt_kv.layer_budget import LayerBudget
from trt_kv.model_config import ModelConfig
from trt_kv.policy import Policy
from trt_kv.program import PHASES, OpNode, Program, budgets_of, predictors_of, recall_nodes, windows_of
from trt_kv.rebuild import how_to_rebuild, in_new_words
from trt_kv.safe_path import safe_join
from trt_kv.surrogate import Predictor, check_predictors

T = TypeVar("T")

FORMAT = "trt-kv-engine"
VERSION = 3
READ_VERSIONS = (1, 2, 3)
"""In version 1, ``segments`` is called ``pieces``, and a tensor of plans has another name. ``_added``: what version 3 added."""
FILE_NAME = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 128 * 2**20
"""Four times the largest that are published."""
RECIPE_FILE = "recipe.json"
DRIFT_FILE = "drift.json"
GRAPHS = "graphs"
"""The folder of an engine's graphs and weights."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPES = tuple(ITEM_BYTES)
"""Compute types of an engine's graphs; CPUs run float32 only."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Values per block of a quantised weight."""
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
INT8_ACTIVATIONS = 4
"""The accuracy level at which products round activations to int8."""
KV_DTYPES = (*DTYPES, "int8")
"""Types in which a KV cache is stored."""


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

    def __post_init__(self) -> None:
        check_digest(self.digest, error=EngineError)
        if self.n_bytes < 0:
            raise EngineError("a file has a negative size", got=self.n_bytes, expected="bytes >= 0")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the matrices of a model are stored: integers of ``bits`` bits in blocks of ``block_size`` along the input axis, each
    block with an fp32 scale, and unless ``symmetric`` a zero point.

    ``accuracy_level``: of ONNX Runtime's MatMulNBits, 0 (activations in fp32) to 4 (in int8).
    """

    bits: int
    block_size: int
    symmetric: bool
    accuracy_level: int

    def check(self, error: type[TrtKvError]) -> None:
        """Raise ``error`` for values out of range."""
        for what, value, expected in (
            ("bits of a weight", self.bits, (4, 8)),
            ("block size of weights", self.block_size, BLOCK_SIZES),
            ("accuracy level", self.accuracy_level, ACCURACY_LEVELS),
        ):
            if value not in expected:
                raise error(f"bad {what}", got=value, expected=f"one of {', '.join(map(str, expected))}")
        if self.bits == 8 and self.accuracy_level < INT8_ACTIVATIONS:
            raise error(
                "weights of 8 bits have products with activations in int8 only",
                got=f"accuracy level {self.accuracy_level}",
                expected=f"{INT8_ACTIVATIONS}",
                fix="take int4, or weights that are not quantised",
            )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime needs before it opens a graph.

    An engine for ONNX Runtime has ``segments`` and their ``attention_ports``, one for TensorRT has a ``plan``. ``programs`` are
    the KV ops of the graphs, per phase; ``files`` covers every file except the manifest. Types: weights are stored in
    ``dtype``, or as ``quantization`` says; the graphs compute in ``dtype``; the KV cache is stored in ``kv_dtype``, unless it
    is loaded with another one; attention, scores and softmax accumulate in fp32.
    """

    model_name: str
    model_digest: str
    model_source: str
    config: ModelConfig
    policy: Policy
    target: str
    dtype: str
    quantization: Quantization | None
    kv_dtype: str
    page_size: int
    op_versions: Mapping[str, int]
    programs: Mapping[str, Program]
    segments: tuple[GraphSegment, ...]
    attention_ports: tuple[AttentionPort, ...]
    plan: Plan | None
    files: Mapping[str, FileRecord]
    reproduce: str
    created_by: str

    def __post_init__(self) -> None:
        self.config.check_page_size(self.page_size)
        if self.kv_dtype not in KV_DTYPES:
            raise EngineError("unknown type of the KV cache", got=self.kv_dtype, expected=" or ".join(KV_DTYPES))
        if self.plan is None and not len(self.segments) - 1 == len(self.attention_ports) == self.config.n_layers:
            raise EngineError(
                "the segments are not those of the model's layers",
                got=f"{len(self.segments)} segments, {len(self.attention_ports)} attention ports",
                expected=f"{self.config.n_layers + 1} and {self.config.n_layers}",
            )
        unlisted = sorted(self.loaded_files - set(self.files))
        if unlisted:
            raise EngineError("files of the engine have no digest", got=unlisted, expected="every file that is loaded")

    @property
    def applied_policy(self) -> Policy:
        """What the policy decides in this model: layers with an attention window are exempt from it."""
        return self.policy.applied_to(self.config.windows)

    @property
    def heads_apart(self) -> int:
        """Layers of the cache per layer of the model: its KV heads if each has its own budget, else 1."""
        return heads_apart(self.config, self.applied_policy)

    @property
    def cache_config(self) -> ModelConfig:
        """The model's config with the layers, heads and windows of the cache (``trt_kv/cache_layers.py``)."""
        return cache_config(self.config, self.applied_policy)

    @property
    def cache_policy(self) -> Policy:
        """``applied_policy`` with the numbers of its exempt layers as the cache counts them."""
        return cache_policy(self.applied_policy, self.heads_apart)

    @property
    def loaded_files(self) -> set[str]:
        """What loading opens by name, by path in the folder; weights are named by the graphs and their index."""
        names = {TOKENIZER_FILE, *(f"{GRAPHS}/{segment.file}" for segment in self.segments)}
        names |= {self.plan.file} if self.plan is not None else set()
        names |= {RECIPE_FILE} if self.applied_policy.needs_recipe else set()
        return names | ({DRIFT_FILE} if self.applied_policy.needs_drift else set())

    @property
    def budgets(self) -> list[LayerBudget | None]:
        """The budget of each layer of the cache, as the prefill graph's ops have it; None if it is computed from the input."""
        return budgets_of(self.programs["prefill"])

    @property
    def windows(self) -> list[int]:
        """The attention window of each layer of the cache in tokens, as the decode graph's ops have it; 0: it has none."""
        return windows_of(self.programs["decode"])

    @property
    def kept_shares(self) -> list[float]:
        """The share in the budget of each layer of the cache; 1 if nothing is evicted or if it is computed from the input."""
        return [1.0 if budget is None else budget.share for budget in self.budgets]

    @property
    def predictors(self) -> list[Predictor | None]:
        """What each layer of the cache predicts scores with, as the prefill graph's ops have it; None: it predicts none."""
        return predictors_of(self.programs["prefill"])

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
            "quantization": None if self.quantization is None else dataclasses.asdict(self.quantization),
            "files": {name: dataclasses.asdict(record) for name, record in sorted(self.files.items())},
            "op_versions": dict(self.op_versions),
        }
        document = {"format": FORMAT, "version": VERSION, **data}
        return {**document, "digest": document_digest(document)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: Path) -> "Manifest":
        """Read what ``to_json`` wrote. Raises ``EngineError`` naming ``source`` for another format, version or shape."""
        version, has_plan = data.get("version"), data.get("plan") is not None
        if data.get("format") != FORMAT or version not in READ_VERSIONS or (has_plan and version == 1):
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
        if version != VERSION:
            fields = _added(fields) | fields
        if isinstance(fields.get("policy"), dict) and "floor" not in fields["policy"]:
            fields["reproduce"] = in_new_words(fields.get("reproduce"), fields["policy"])
        if set(fields) != names:
            raise EngineError(
                f"{source} does not have the fields of an engine manifest",
                got=f"missing {sorted(names - set(fields))}, unknown {sorted(set(fields) - names)}",
                fix="build the engine again",
            )
        if data.get("digest") != (found := document_digest({name: data[name] for name in data if name != "digest"})):
            raise EngineError(
                f"{source} was changed after the build", got=found, expected=data.get("digest"), fix="build the engine again"
            )
        try:
            manifest = cls(**(fields | _parsed(fields)))
            _check_programs(manifest)
            return manifest
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise EngineError(f"{source} is malformed", got=repr(error), fix="build the engine again") from error
        except TrtKvError as error:
            fix = error.fix or "build the engine again"
            raise EngineError(f"{source}: {error.what}", got=error.got, expected=error.expected, fix=fix) from error

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(self.to_json(), indent=1) + "\n")


def load_manifest(folder: Path, *, digest: str | None = None) -> Manifest:
    """The manifest of an engine folder; ``EngineError`` if there is none, if it cannot be read, or if ``digest`` is given
    and is not the manifest's.
    """
    data = _document(folder)
    manifest = Manifest.from_json(data, source=folder / FILE_NAME)
    if digest is not None:
        check_digest(digest, error=UsageError)
        if data["digest"] != digest:
            raise EngineError(f"{folder} is another engine than was asked for", got=data["digest"], expected=digest)
    return manifest


def recorded_digest(folder: Path) -> str:
    """The digest of an engine's manifest as its file has it; ``Manifest.from_json`` checks that it is right."""
    return str(_document(folder).get("digest"))


def _document(folder: Path) -> dict[str, Any]:
    """The file's content, unchecked."""
    if not (folder / FILE_NAME).is_file():
        raise EngineError(
            f"{folder} is not an engine",
            got=f"a folder without {FILE_NAME}" if folder.is_dir() else "a file" if folder.exists() else "no such folder",
            expected="a folder made by `trt-kv build`",
            fix="make engine MODEL=llama3 POLICY=prefixkv",
        )
    path = safe_join(folder, FILE_NAME, error=EngineError)
    data = read_json(path, kind="manifest", error=EngineError, max_bytes=MAX_DOCUMENT_BYTES)
    if not isinstance(data, dict):
        raise EngineError(f"{path} is not an engine manifest", got=type(data).__name__, expected="a JSON object")
    return data


def _added(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the fields that version 3 added are in an engine of an earlier one."""
    return {"quantization": None, "kv_dtype": fields.get("dtype")}


def _quantization(data: Mapping[str, Any] | None) -> Quantization | None:
    if data is None:
        return None
    quantization = dataclass_from_json(Quantization, data, where="quantization", error=EngineError)
    quantization.check(EngineError)
    return quantization


def _plan(data: Mapping[str, Any]) -> Plan:
    profiles = [{axis: (low, usual, high) for axis, (low, usual, high) in ranges.items()} for ranges in data["profiles"]]
    for ranges in profiles:
        counts = all(type(size) is int for sizes in ranges.values() for size in sizes)
        if not counts or not set("NBTM") <= set(ranges) or not all(1 <= low <= high for low, _, high in ranges.values()):
            raise EngineError("a profile of the plan is malformed", got=ranges, expected="three sizes of each axis")
    texts = {name: data[name] for name in ("file", "built_by")}
    return Plan(**_texts(texts), profiles=tuple(profiles))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    for name, value in values.items():
        if not isinstance(value, str):
            raise EngineError(f"{name} is not a text", got=repr(value), expected="a text")
    return dict(values)


def _listed(cls: type[T], values: list[Any], where: str) -> tuple[T, ...]:
    return tuple(
        dataclass_from_json(cls, value, where=f"{where}[{index}]", error=EngineError) for index, value in enumerate(values)
    )


def _parsed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not plain JSON, read; and those that are, checked."""
    names = ("model_name", "model_digest", "model_source", "target", "dtype", "kv_dtype", "reproduce", "created_by")
    if type(fields["page_size"]) is not int or not all(type(version) is int for version in fields["op_versions"].values()):
        raise EngineError("page_size or op_versions are not integers")
    return {
        **_texts({name: fields[name] for name in names}),
        "config": ModelConfig.from_json(fields["config"]),
        "policy": Policy.from_json(fields["policy"]),
        "programs": {
            phase: tuple(tuple(OpNode.from_json(n) for n in nodes) for nodes in fields["programs"][phase]) for phase in PHASES
        },
        "segments": _listed(GraphSegment, fields["segments"], "segments"),
        "attention_ports": _listed(AttentionPort, fields["attention_ports"], "attention_ports"),
        "plan": None if fields["plan"] is None else _plan(fields["plan"]),
        "quantization": _quantization(fields["quantization"]),
        "files": {
            name: dataclass_from_json(FileRecord, record, where=f"files[{name!r}]", error=EngineError)
            for name, record in fields["files"].items()
        },
    }


def _check_programs(manifest: Manifest) -> None:
    """Raise ``EngineError``, or what reading them raises, for programs that are not of the model's layers."""
    depths = {phase: len(program) for phase, program in manifest.programs.items()}
    n_layers = manifest.cache_config.n_layers
    if set(depths.values()) != {n_layers}:
        raise EngineError("the programs are not of the model's layers", got=depths, expected=n_layers)
    ops = {node.op for program in manifest.programs.values() for nodes in program for node in nodes}
    if not ops <= set(manifest.op_versions):
        raise EngineError("ops have no version", got=dict(manifest.op_versions), expected=f"versions of {sorted(ops)}")
    assert len(manifest.budgets) == len(manifest.taus) == n_layers
    check_predictors(manifest.predictors, manifest.config, heads_apart=manifest.heads_apart)
