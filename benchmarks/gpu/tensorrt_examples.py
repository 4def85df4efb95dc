"""Two small networks with known results, one of standard ops and one with a Python plugin, and how TensorRT builds them."""

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, Any]


class RefusedError(RuntimeError):
    """The answer is no, and why."""


class Plain:
    """y = x w + b, with w and b in the engine."""

    name = "plain"
    outputs: Mapping[str, tuple[int, ...]] = {"y": (64, 48)}
    in_place: Mapping[str, str] = {}
    within = 5e-2  # products may be rounded to TF32

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self._w, self._b = rng.standard_normal((96, 48), np.float32), rng.standard_normal(48, np.float32)

    def inputs(self, seed: int) -> dict[str, Any]:
        return {"x": np.random.default_rng(seed).standard_normal((64, 96), np.float32)}

    def expected(self, inputs: Arrays) -> dict[str, Any]:
        return {"y": inputs["x"] @ self._w + self._b}

    def model(self) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        weights = [numpy_helper.from_array(self._w, "w"), numpy_helper.from_array(self._b, "b")]
        nodes = [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Add", ["product", "b"], ["y"])]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 96])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 48])
        graph = helper.make_graph(nodes, self.name, [x], [y], weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class Attention:
    """One case of CachedAttention, a Python plugin; keys and values are updated in place."""

    name = "attention"
    within = 2e-3

    def __init__(self) -> None:
        from trt_kv.plugins.registry import op_specs

        self.spec = op_specs()["CachedAttention"]
        self.case = next(case for case in self.spec.cases if case.name == "mixed")
        self.in_place: Mapping[str, str] = {f"{t.name}_out": t.name for t in self.spec.states}
        self.outputs: Mapping[str, tuple[int, ...]] = {
            name: array.shape for name, array in self.expected(self.inputs(0)).items() if name not in self.in_place
        }

    def inputs(self, seed: int) -> dict[str, Any]:
        return {name: value for name, value in self._everything(seed).items() if isinstance(value, np.ndarray)}

    @property
    def attributes(self) -> dict[str, Any]:
        return {a.name: self._everything(0)[a.name] for a in self.spec.attributes}

    def _everything(self, seed: int) -> dict[str, Any]:
        from trt_kv.plugins.cases import case_inputs

        return case_inputs(self.spec, self.case, seed=seed)

    def expected(self, inputs: Arrays) -> dict[str, Any]:
        from trt_kv.plugins.registry import kernel

        arrays = {name: array.copy() for name, array in inputs.items()}
        results = kernel(self.spec.name, "reference")(**arrays, **self.attributes)
        return dict(zip(self.spec.output_names, [*results, *(arrays[t.name] for t in self.spec.states)], strict=True))

    def model(self) -> Any:
        from onnx import helper

        from trt_kv.opspec import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES

        inputs = self.inputs(0)
        fields = self.attributes | PLUGIN_ATTRIBUTES
        node = helper.make_node(self.spec.name, list(inputs), self.spec.output_names, domain=DOMAIN, **fields)

        def described(arrays: Arrays) -> list[Any]:
            dtype = helper.np_dtype_to_tensor_dtype
            return [helper.make_tensor_value_info(name, dtype(a.dtype), a.shape) for name, a in arrays.items()]

        graph = helper.make_graph([node], self.name, described(inputs), described(self.expected(inputs)))
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, OP_VERSION)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


Example = Plain | Attention


def find_tensorrt() -> None:
    """Make ``import tensorrt`` find the installed package, or the tests' rig if that has been set up."""
    from tests.rig.set_up import rig_folder

    installed = any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx"))
    if not installed and rig_folder().is_dir():
        sys.path.append(str(rig_folder()))


def logger_of(errors: list[str]) -> Any:
    """A TensorRT logger that collects errors, and prints errors and warnings immediately."""
    from trt_kv.plugins.tensorrt_base import trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Writes to the terminal."""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)
            if severity != trt.ILogger.VERBOSE and severity != trt.ILogger.INFO:
                print(f"{severity}: {message}", file=sys.stderr, flush=True)

    return Logger()


def plan_of(example: Example) -> bytes:
    """The plan that TensorRT builds of the example. Raises ``RefusedError`` with TensorRT's error messages."""
    from trt_kv.plugins.tensorrt_base import register_plugins, trt

    register_plugins()
    errors: list[str] = []
    logger = logger_of(errors)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(example.model().SerializeToString()):
        raise RefusedError(f"the graph is not parsed: {'; '.join(errors)}")
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedError(f"no plan is built: {'; '.join(errors)}")
    return bytes(plan)
