"""Clients of a server of the rig, over HTTP and gRPC. Each call has a connection of its own and a time limit."""

import http.client
import json
import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.triton_rig.server import Server
from trt_kv.serving.triton.tensors import INPUTS

TIMEOUT_S = 60.0


@contextmanager
def posted(server: Server, path: str, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, of which nothing but the head has been read. Leaving the block closes the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def generate(server: Server, model: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Status and body of one answer."""
    with posted(server, f"/v2/models/{model}/generate", body) as response:
        return response.status, json.loads(response.read())


def generate_stream(server: Server, model: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer."""
    with posted(server, f"/v2/models/{model}/generate_stream", {"stream": True, **body}) as response:
        return list(events_of(response))


def events_of(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events as they come."""
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def joined(events: list[dict[str, Any]], name: str) -> list[Any]:
    """The values of a list in all events; an answer over HTTP has a list of one value as the value."""
    values = [event[name] for event in events if name in event]
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def grpc_stream(server: Server, model: str, *, leading: tuple[int, ...] = (1,), **inputs: Any) -> list[dict[str, Any]]:
    """The responses to one request over gRPC, as lists by output. ``leading``: the dimensions in front of each input's own.

    An error is raised as the client library's.
    """
    import tritonclient.grpc as grpc

    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    client.start_stream(lambda result, error: responses.put((result, error)), stream_timeout=TIMEOUT_S)
    try:
        given = [_tensor(grpc, name, value, leading) for name, value in inputs.items()]
        client.async_stream_infer(model, given, enable_empty_final_response=True)
        found = []
        while True:
            result, error = responses.get(timeout=TIMEOUT_S)
            if error is not None:
                raise error
            found.append({output.name: result.as_numpy(output.name).tolist() for output in result.get_response().outputs})
            if result.get_response().parameters["triton_final_response"].bool_param:
                return found
    finally:
        client.stop_stream()
        client.close()


def _tensor(grpc: Any, name: str, value: Any, leading: tuple[int, ...]) -> Any:
    (dtype,) = (tensor.dtype for tensor in INPUTS if tensor.name == name)
    kinds = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
    array: np.ndarray[Any, Any] = np.atleast_1d(np.array(value, kinds[dtype]))
    array = array.reshape(*leading, *array.shape)
    tensor = grpc.InferInput(name, list(array.shape), "BYTES" if dtype == "STRING" else dtype)
    tensor.set_data_from_numpy(array)
    return tensor
