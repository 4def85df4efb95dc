"""Inputs and outputs of a monolithic graph by name, derived from its KV ops."""

from collections.abc import Sequence

from trt_kv.opspec import OpSpec, TensorSpec
from trt_kv.plugins.registry import op_specs
from trt_kv.plugins.tensors import POSITIONS
from trt_kv.program import OpNode, Program

INPUT_IDS = TensorSpec(name="input_ids", axes=("N",), dtype="int64", doc="token ids of this step")
LOGIT_ROWS = TensorSpec(name="logit_rows", axes=("R",), dtype="int64", doc="rows of this step whose logits are wanted")
LOGITS = TensorSpec(name="logits", axes=("R", "V"), dtype="float", doc="logits of those rows")

_WITHIN_THE_GRAPH = {"out", "lse"}
"""Outputs of ops that are used only inside the graph."""


def specs_of(program: Program) -> list[OpSpec]:
    """The specs of the ops in the program."""
    used = {node.op for nodes in program for node in nodes}
    return [spec for name, spec in op_specs().items() if name in used]


def states_of(program: Program) -> dict[str, TensorSpec]:
    """The KV state that the program's ops update, by name."""
    return {t.name: t for spec in specs_of(program) for t in spec.states}


def made_by(program: Program) -> set[str]:
    """Names of the outputs of the program's ops, whether other ops or the runtime read them."""
    return {t.name for spec in specs_of(program) for t in spec.outputs}


def step_tensors_of(program: Program) -> dict[str, TensorSpec]:
    """Inputs of the ops that are neither state nor computed in the layer: one tensor each for all layers."""
    within = {"q", "k", "v"} | made_by(program) | set(states_of(program))
    return {t.name: t for spec in specs_of(program) for t in spec.inputs if not t.optional and t.name not in within}


def results_of(program: Program) -> dict[str, TensorSpec]:
    """Outputs of the layers' ops that the runtime reads, besides the state, by name in the graph: ``kept_3`` is layer 3's."""
    return {f"{t.name}_{layer}": t for layer, nodes in enumerate(program) for t in results_of_layer(nodes)}


def makers_of(program: Program) -> dict[str, list[int]]:
    """For each output that the runtime reads, the layers that have it: ``kept`` of layers 0, 1, 3."""
    makers: dict[str, list[int]] = {}
    for layer, nodes in enumerate(program):
        for t in results_of_layer(nodes):
            makers.setdefault(t.name, []).append(layer)
    return makers


def results_of_layer(nodes: Sequence[OpNode]) -> list[TensorSpec]:
    """Outputs that no op of the layer reads; ``budget`` is among them if no EvictTokens follows."""
    specs = [op_specs()[node.op] for node in nodes]
    read = {t.name for spec in specs for t in spec.inputs}
    return [t for spec in specs for t in spec.outputs if t.name not in read | _WITHIN_THE_GRAPH]


def step_inputs_of(program: Program) -> dict[str, TensorSpec]:
    """The tensors of a step by name: inputs of the decoder and of the ops."""
    return {"input_ids": INPUT_IDS, "positions": POSITIONS, "logit_rows": LOGIT_ROWS} | step_tensors_of(program)


def graph_inputs(program: Program) -> dict[str, TensorSpec]:
    """All inputs in order; the state ``kv`` of layer 3 is ``kv_3``. A layer has the states that its ops update."""
    return step_inputs_of(program) | _layer_states(program)


def graph_outputs(program: Program) -> dict[str, TensorSpec]:
    """All outputs in order; ``kv_3_out`` is the state ``kv_3`` after the step."""
    states = {f"{name}_out": t for name, t in _layer_states(program).items()}
    return {"logits": LOGITS, **results_of(program), **states}


def _layer_states(program: Program) -> dict[str, TensorSpec]:
    """By state, then by layer."""
    of_layers = [states_of((nodes,)) for nodes in program]
    return {
        f"{name}_{layer}": t for name, t in states_of(program).items() for layer, own in enumerate(of_layers) if name in own
    }
