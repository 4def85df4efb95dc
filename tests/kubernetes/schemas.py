"""Makes ``schemas.json``: ``python -m tests.kubernetes.schemas FOLDER``, with the wheels of both packages in FOLDER.

    pip download --no-deps -d FOLDER kubernetes-validate==1.37.0 kserve==0.21.0

kubernetes-validate has Kubernetes' own schemas, strict ones; 17,000 files. kserve has classes that are generated from the
definitions of its resources; their tables of types are read, and no class is run. Only what the resources in ``ROOTS`` refer to
is kept.
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "schemas.json"
STRICT = "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict/_definitions.json"
ROOTS = {
    ("apps/v1", "Deployment"): "io.k8s.api.apps.v1.Deployment",
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("autoscaling/v2", "HorizontalPodAutoscaler"): "io.k8s.api.autoscaling.v2.HorizontalPodAutoscaler",
    ("policy/v1", "PodDisruptionBudget"): "io.k8s.api.policy.v1.PodDisruptionBudget",
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): "V1alpha1ServingRuntime",
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
}
"""Names of definitions by apiVersion and kind."""
_SIMPLE: Mapping[str, Any] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "object": {},
    "datetime": {"type": "string"},
    "ResourceQuantity": {"type": ["string", "number"]},
    "IntstrIntOrString": {"type": ["string", "integer"]},
    "V1beta1MetricQuantity": {"type": ["string", "number"]},
    "KnativeURL": {"type": "string"},
    "KnativeVolatileTime": {"type": "string"},
}


def main(folder: Path) -> None:
    """Write ``FILE``."""
    (kubernetes,) = folder.glob("kubernetes_validate-*.whl")
    (kserve,) = folder.glob("kserve-*.whl")
    with zipfile.ZipFile(kubernetes) as wheel:
        definitions = json.loads(wheel.read(STRICT))["$defs"]
    with zipfile.ZipFile(kserve) as wheel:
        for name in wheel.namelist():
            if re.fullmatch(r"kserve/models/v1\w+\.py", name):
                definitions |= dict(_of_classes(ast.parse(wheel.read(name)), definitions))
    for name in ROOTS.values():
        definitions[name]["properties"].pop("status", None)  # the cluster's, and in no file
    kept: dict[str, Any] = {}
    wanted = list(ROOTS.values())
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept[name] = _plain(definitions.get(name, False))  # False: the wheel lacks it, so nothing may use it
            wanted += re.findall(r'"#/\$defs/([^"]+)"', json.dumps(kept[name]))
    FILE.write_text(json.dumps({"$defs": dict(sorted(kept.items()))}, separators=(",", ":")) + "\n")


def _of_classes(module: ast.Module, definitions: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Schemas of the generated classes in a module, by name."""
    for cls in module.body:
        if isinstance(cls, ast.ClassDef):
            tables = {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in cls.body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
            }
            types = {tables["attribute_map"][name]: kind for name, kind in tables.get("openapi_types", {}).items()}
            properties = {name: _schema(kind, definitions) for name, kind in types.items()}
            yield cls.name, {"type": "object", "properties": properties, "additionalProperties": False}


def _schema(kind: str, definitions: Mapping[str, Any]) -> Any:
    """The schema of a type as the generator writes it."""
    if found := re.fullmatch(r"list\[(.*)\]", kind):
        return {"type": "array", "items": _schema(found[1], definitions)}
    if found := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {"type": "object", "additionalProperties": _schema(found[1], definitions)}
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    places = ("io.k8s.api.core.v1", "io.k8s.apimachinery.pkg.apis.meta.v1")
    candidates = [f"{place}.{kind.removeprefix('V1')}" for place in places]
    if found := re.fullmatch(r"K8sIoApi([A-Z][a-z]+)V([12])(.*)", kind):
        candidates.append(f"io.k8s.api.{found[1].lower()}.v{found[2]}.{found[3]}")
    return {"$ref": f"#/$defs/{next((name for name in candidates if name in definitions), kind)}"}


def _plain(schema: Any) -> Any:
    """A schema without descriptions, whose references are to definitions of the same document."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    texts = {name for name in ("description", "$schema", "$id") if isinstance(schema.get(name), str)}
    texts |= {name for name in schema if name.startswith("x-kubernetes")}
    return {
        name: value.replace("/api/_definitions.json", "") if name == "$ref" else _plain(value)
        for name, value in schema.items()
        if name not in texts
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
