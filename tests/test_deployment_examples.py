"""The files in ``examples/serving`` are what Kubernetes and KServe take, and start our servers with options that exist."""

import copy
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.kubernetes.schemas import FILE, ROOTS
from tests.triton_rig.set_up import SERVER, python_libraries
from trt_kv.cli.serve import command as serve

EXAMPLES = Path(__file__).parent.parent / "examples" / "serving"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
SCHEMAS = json.loads(FILE.read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def errors_of(document: dict[str, Any]) -> list[str]:
    """What the schema of its kind says against a document."""
    root = ROOTS[document["apiVersion"], document["kind"]]
    checker = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{root}", **SCHEMAS})
    return [f"{error.json_path}: {error.message}" for error in checker.iter_errors(document)]


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(pod, container) of every example."""
    for name in NAMES:
        for document in documents(name):
            if document["kind"] == "Deployment":
                pod = document["spec"]["template"]["spec"]
                yield pod, pod["containers"][0]
            elif document["kind"] == "ServingRuntime":
                yield document["spec"], document["spec"]["containers"][0]


def test_there_is_an_example_for_both_doors_and_both_ways() -> None:
    assert NAMES == ["kserve-http.yaml", "kserve-triton.yaml", "kubernetes-http.yaml", "kubernetes-triton.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_every_resource_conforms_to_its_schema(name: str) -> None:
    for document in documents(name):
        assert errors_of(document) == []
        wrong = copy.deepcopy(document)
        wrong["spec"]["replica"] = 1
        assert errors_of(wrong)


def test_containers_have_no_rights_and_are_asked_whether_they_are_ready() -> None:
    for pod, container in containers():
        rights = {**pod.get("securityContext", {}), **container["securityContext"]}
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert (rights["runAsNonRoot"], rights["allowPrivilegeEscalation"], rights["readOnlyRootFilesystem"]) == (
            True,
            False,
            True,
        )
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        if container["command"] == ["tritonserver"]:
            assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_replicas_follow_the_length_of_the_queue() -> None:
    scalers = [one for name in NAMES for one in documents(name) if one["kind"] == "HorizontalPodAutoscaler"]
    assert len(scalers) == 2
    for scaler in scalers:
        (metric,) = scaler["spec"]["metrics"]
        assert metric["pods"]["metric"]["name"] == "vllm:num_requests_waiting".replace(":", "_")


def test_serve_has_the_options_that_it_is_started_with() -> None:
    known = {option for parameter in serve.params for option in parameter.opts}
    for _, container in containers():
        if container["command"] == ["trt-kv", "serve"]:
            given = {argument.partition("=")[0] for argument in container["args"] if argument.startswith("--")}
            assert given
            assert given <= known


def test_tritonserver_has_the_options_that_it_is_started_with(triton_rig: Path) -> None:
    server = triton_rig / SERVER / "bin" / "tritonserver"
    environment = os.environ | {"LD_LIBRARY_PATH": str(python_libraries())}
    told = subprocess.run([server, "--help"], capture_output=True, text=True, env=environment, check=False)
    for _, container in containers():
        if container["command"] == ["tritonserver"]:
            for argument in container["args"]:
                assert f"{argument.partition('=')[0]} " in told.stdout + told.stderr, argument
