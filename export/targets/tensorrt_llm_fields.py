"""The fields of TensorRT-LLM's options that a hand-over uses, as its source has them (``tensorrt_llm_fields.json``)."""

import functools
import importlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from trt_kv.errors import UsageError

Options = Mapping[str, Any]


@functools.cache
def published_fields() -> dict[str, Any]:
    """``options`` and ``sections`` with their fields, and the ``source`` and ``commit`` that they were read from."""
    text = resources.files("trt_kv.export.targets").joinpath("tensorrt_llm_fields.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def check_options(options: Options) -> None:
    """``UsageError`` for an option that the published list does not have, or a value that it does not admit."""
    published = published_fields()
    for name, value in options.items():
        section = published["sections"].get(name)
        if section is None:
            _check(name, value, published["options"])
            continue
        for field, of_field in value.items():
            _check(f"{name}.{field}", of_field, section["fields"])


def _check(path: str, value: object, fields: Mapping[str, Mapping[str, Any]]) -> None:
    rule = fields.get(path.rpartition(".")[2])
    if rule is None:
        raise UsageError("TensorRT-LLM has no such option", got=path, expected=f"one of {', '.join(fields)}")
    if not _admits(rule, value):
        raise UsageError(f"TensorRT-LLM does not accept this value of {path}", got=repr(value), expected=json.dumps(dict(rule)))


def _admits(rule: Mapping[str, Any], value: object) -> bool:
    if "names" in rule:
        return value in rule["names"]
    match rule["type"]:
        case "bool":
            return isinstance(value, bool)
        case "int":
            return type(value) is int and value >= rule["least"]
        case "ints":
            return isinstance(value, list) and bool(value) and all(type(n) is int and n >= rule["least"] for n in value)
        case _:
            return isinstance(value, str) and bool(value)


def missing_fields() -> list[str]:
    """The classes and fields that the installed tensorrt_llm lacks, as ``section.field``. Raises what its import raises."""
    module = importlib.import_module("tensorrt_llm.llmapi.llm_args")
    missing = []
    for name, section in published_fields()["sections"].items():
        known = getattr(getattr(module, section["class"], None), "model_fields", None)
        if known is None:
            missing.append(f"{name} ({section['class']})")
        else:
            missing += [f"{name}.{field}" for field in section["fields"] if field not in known]
    return missing
