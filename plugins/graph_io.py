"""What goes into and comes out of a monolithic graph, by name: from the KV ops in it."""

from trt_kv.opspec import OpSpec, TensorSpec
from trt_kv.plugins.registry import op_specs
from trt_kv.plugins.tensors import POSITIONS
from trt_kv.program import Program

INPUT_IDS = TensorSpec(name="input_ids", axes=("N",), dtype="int64", doc="token ids of this step")
LOGIT_ROWS = TensorSpec(name="logit_rows", axes=("R",), dtype="int64", doc="rows of this step whose logits are wanted")
LOGITS = TensorSpec(name="logits", axes=("R", "V"), dtype="float", doc="logits of those rows")


def specs_of(program: Program) -> list[OpSpec]:
    """The ops that stand in the program."""
    used = {node.op for nodes in program for node in nodes}
    return [spec for name, spec in op_specs().items() if name in used]


def states_of(program: Program) -> dict[str, TensorSpec]:
    """The KV state of one layer, by name."""
    return {t.name: t for spec in specs_of(program) for t in spec.states}


def step_tensors_of(program: Program) -> dict[str, TensorSpec]:
    """What the ops read that is neither state nor made by the layer: one tensor each for all layers."""
    specs = specs_of(program)
    made = {"q", "k", "v"} | {t.name for spec in specs for t in spec.outputs} | set(states_of(program))
    return {t.name: t for spec in specs for t in spec.inputs if not t.optional and t.name not in made}


def results_of(program: Program) -> dict[str, TensorSpec]:
    """What a layer's ops tell the runtime beside the state."""
    return {t.name: t for spec in specs_of(program) if spec.name == "EvictTokens" for t in spec.outputs}


def graph_inputs(program: Program) -> dict[str, TensorSpec]:
    """All inputs in order; the state ``kv`` of layer 3 is ``kv_3``."""
    flat = {"input_ids": INPUT_IDS, "positions": POSITIONS, "logit_rows": LOGIT_ROWS} | step_tensors_of(program)
    return flat | {f"{name}_{layer}": t for name, t in states_of(program).items() for layer in range(len(program))}


def graph_outputs(program: Program) -> dict[str, TensorSpec]:
    """All outputs in order; ``kv_3_out`` is the state ``kv_3`` after the step."""
    layers = range(len(program))
    results = {f"{name}_{layer}": t for name, t in results_of(program).items() for layer in layers}
    states = {f"{name}_{layer}_out": t for name, t in states_of(program).items() for layer in layers}
    return {"logits": LOGITS, **results, **states}
