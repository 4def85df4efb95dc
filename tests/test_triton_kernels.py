"""The Triton kernels: in Triton's interpreter they equal the reference, and they compile for every GPU we name.

Numerics on a GPU are in the tests marked ``gpu``. The interpreter runs programs one after the other, so what no test here can
tell is a race; no kernel has two programs that write one place, or one that reads what another writes.
"""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.rig.buffers import padded, padding_slots
from tests.test_op_parity import arguments_of, run, taken_by, untouched
from tests.test_recall_codes import coded, roomy
from tests.triton_kernels import EACH_CAPABILITY, HALF_TOLERANCE, ROOT, Interpreter, assert_equals_reference, rounded
from tests.triton_worker import device_outputs
from trt_kv.opspec import Case, OpSpec, Tolerance
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.recall_attention.page_counts import CODES
from trt_kv.plugins.registry import device_kernel
from trt_kv.plugins.triton_compile import (
    SHARED_BYTES,
    compiled,
    distinct_launches,
    specs_with_kernels,
)

pytestmark = pytest.mark.early

SPECS = specs_with_kernels()
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS.values() for case in spec.cases]
EACH_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
PROMPT = tuple(range(299, -1, -1))
LONG = {
    "CachedAttention": [
        Case(name="parts", cached=(1500, 3, 700, 0), new=(1, 1, 1, 2), dims={"H": 6, "K": 2, "D": 5, "P": 16, "L": 1}),
        Case(name="tiles", cached=(270, 0), new=(70, 33), dims={"H": 3, "K": 1, "D": 6, "P": 7, "L": 1}, in_order=True),
        Case(
            name="parts_outside_the_window",
            cached=(1500, 3, 700, 0),
            new=(1, 1, 1, 2),
            dims={"H": 6, "K": 2, "D": 5, "P": 16, "L": 1},
            attributes={"window": 300, "soft_cap": 2.0},
            in_order=True,
        ),
        Case(
            name="tiles_with_a_window",
            cached=(270, 0),
            new=(70, 33),
            dims={"H": 3, "K": 1, "D": 6, "P": 7, "L": 1},
            attributes={"window": 45},
            in_order=True,
        ),
        Case(
            name="tiles_of_own_tokens_with_a_window",
            cached=(270, 90),
            new=(70, 33),
            dims={"H": 6, "K": 2, "D": 6, "P": 7, "L": 1},
            attributes={"window": 60, "soft_cap": 0.9},
            own_tokens=True,
        ),
    ],
    "TokenScores": [
        Case(
            name="tiles_in_order",
            cached=(0, 90),
            new=(300, 1),
            dims={"H": 3, "K": 1, "D": 5, "P": 7, "L": 1},
            attributes={"per_head": 1, "window": 30, "pooling": 5, "average": 1},
            values={"prompt_remaining": (*PROMPT, -1)},
            in_order=True,
        ),
        Case(
            name="tiles_of_own_tokens",
            cached=(150, 60),
            new=(20, 3),
            dims={"H": 4, "K": 2, "D": 5, "P": 16, "L": 1},
            attributes={"per_head": 1, "pooling": 7},
            values={"prompt_remaining": (*PROMPT[-20:], *PROMPT[-3:])},
            own_tokens=True,
        ),
        Case(
            name="shared",
            cached=(40,),
            new=(299,),
            dims={"H": 4, "K": 2, "D": 3, "P": 16, "L": 1},
            attributes={"generated": 1},
            values={"prompt_remaining": (*PROMPT[1:-3], -1, -1, -1)},
        ),
    ],
    "AdaptiveBudget": [
        Case(
            name="prompt",
            cached=(0, 300),
            new=(500, 1),
            dims={"H": 6, "K": 2, "D": 7, "P": 16, "L": 1},
            attributes={"threshold": 0.02, "protected_in_norm": 1, "recent": 40},
            in_order=True,
        ),
        Case(
            name="by_score",
            cached=(600, 40, 333),
            new=(1, 2, 3),
            dims={"H": 4, "K": 2, "D": 5, "P": 7, "L": 1},
            attributes={"threshold": 0.1, "ranking": 0},
            values={"scores": ()},
            own_tokens=True,
        ),
        Case(
            name="scores_as_row",
            cached=(600, 90),
            new=(0, 1),
            dims={"H": 3, "K": 3, "D": 3, "P": 9, "L": 1},
            attributes={"threshold": 0.03, "row": 1, "sinks": 0},
            values={"scores": ()},
        ),
    ],
    "EvictTokens": [
        Case(
            name="prompt",
            cached=(600,),
            new=(0,),
            dims={"H": 2, "K": 2, "D": 5, "P": 16, "L": 1},
            attributes={"kept_share": 0.4, "recent_share": 0.3, "sinks": 4},
            in_order=True,
        ),
        Case(
            name="cycles",
            cached=(300,),
            new=(0,),
            dims={"H": 2, "K": 2, "D": 3, "P": 7, "L": 1},
            attributes={"kept_share": 0.7, "ranking": 2, "seed": 5},
            own_tokens=True,
        ),
        Case(
            name="holes",
            cached=(400,),
            new=(0,),
            dims={"H": 2, "K": 2, "D": 3, "P": 5, "L": 1},
            attributes={"kept_share": 1.0, "drop": 150, "recent": 40},
            values={"evict": (2,)},
            own_tokens=True,
        ),
        Case(
            name="one_hole",
            cached=(600,),
            new=(0,),
            dims={"H": 2, "K": 2, "D": 3, "P": 9, "L": 1},
            attributes={"kept_share": 1.0, "recent_share": 0.5, "sinks": 3},
            values={"evict": (2,), "scores": (3,)},
            own_tokens=True,
        ),
    ],
    "RecallAttention": [
        Case(
            name="codes_in_turns",
            cached=(2100,),
            new=(1,),
            dims={"H": 12, "K": 2, "D": 5, "P": 270, "L": 1},
            attributes={"kept_share": 0.0, "kept_tokens": 1350, "recent": 2, "summary": CODES, "pooling": 2},
            values={"prompt_remaining": (-1,)},
            in_order=True,
        ),
        Case(
            name="thousands_of_pages",
            cached=(4300, 700),
            new=(1, 1),
            dims={"H": 4, "K": 2, "D": 3, "P": 1, "L": 1},
            attributes={"kept_share": 0.0, "kept_tokens": 900, "sinks": 3, "recent": 7, "tau": 0.0, "pooling": 2},
            values={"prompt_remaining": (-1, -1)},
            in_order=True,
        ),
        Case(
            name="ranked_in_registers_or_by_tiles",
            cached=(1033, 1034, 4105, 4106),
            new=(1, 1, 1, 1),
            dims={"H": 6, "K": 2, "D": 3, "P": 1, "L": 1},
            attributes={"kept_share": 0.0, "kept_tokens": 300, "sinks": 3, "recent": 7, "tau": 0.0},
            values={"prompt_remaining": (-1, -1, -1, -1)},
            in_order=True,
        ),
        Case(
            name="thousands_of_equal_pages",
            cached=(3000,),
            new=(1,),
            dims={"H": 3, "K": 3, "D": 5, "P": 2, "L": 1},
            attributes={"kept_share": 0.6, "recent": 70},
            values={"prompt_remaining": (-1,), "summaries": (0.0,), "prompt_len": (2900,)},
            in_order=True,
        ),
    ],
}
"""More tokens than one program takes: parts that are combined, tiles that look at each other."""
LONG_CASES = [pytest.param(SPECS[op], case, id=f"{op}-{case.name}") for op, cases in LONG.items() for case in cases]
LONG_TOLERANCE = Tolerance(atol=1e-4, rtol=1e-4, reason="fp32 sums of 1500 products in another order")
ONE_TOKEN_KERNELS = (
    *("append_kernel", "combine_kernel", "decode_kernel", "zero_kernel", "share_kernel"),
    *("bound_kernel", "estimate_kernel", "choose_kernel", "count_kernel", "drift_kernel", "summary_kernel", "table_kernel"),
    *("threshold_kernel", "source_kernel", "move_kernel"),
)
SPILLED_BYTES = {"threshold_kernel": 8, "choose_kernel": 64}
"""One address, and a few in wide programs, which the assembler puts away although registers are free."""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    interpreter = Interpreter(tmp_path_factory.mktemp("interpreter"))
    yield interpreter
    interpreter.close()


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_kernels_equal_the_reference(interpreter: Interpreter, spec: OpSpec, case: Case) -> None:
    """And leave the pages of other layers and of nobody as they are."""
    inputs = case_inputs(spec, case)
    outputs = interpreter.outputs(spec, inputs)
    assert_equals_reference(spec, inputs, outputs, spec.tolerance)
    for state in spec.states:
        others = untouched(state, inputs)
        np.testing.assert_array_equal(outputs[f"{state.name}_out"][others], inputs[state.name][others])


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_kernels_equal_the_reference_in_half_precision(interpreter: Interpreter, spec: OpSpec, case: Case) -> None:
    inputs = rounded(spec, case_inputs(spec, case), "float16")
    assert_equals_reference(spec, inputs, interpreter.outputs(spec, inputs, "float16"), HALF_TOLERANCE)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_padding_behind_the_last_token_and_sequence_changes_nothing(interpreter: Interpreter, spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case)
    step = padded(inputs, n_tokens=5, n_sequences=2)
    written = padding_slots(inputs, step, n_tokens=5)
    assert_equals_reference(spec, inputs, interpreter.outputs(spec, step), spec.tolerance, written)


@pytest.mark.parametrize(("spec", "case"), LONG_CASES)
def test_kernels_equal_the_reference_where_work_is_divided(interpreter: Interpreter, spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case)
    assert_equals_reference(spec, inputs, interpreter.outputs(spec, inputs), LONG_TOLERANCE)


CODED = [case for case in SPECS["RecallAttention"].cases if case.attributes.get("summary") == CODES]
FILLED = next(case for case in SPECS["RecallAttention"].cases if case.name == "chunk_fills_pages")


@pytest.mark.parametrize("case", [*CODED, coded(FILLED)], ids=lambda case: case.name)
def test_codes_are_those_of_a_cpu_bit_by_bit(interpreter: Interpreter, case: Case) -> None:
    """In a state that has room for them, whichever side wrote them."""
    spec = SPECS["RecallAttention"]
    inputs = roomy(case_inputs(spec, case))
    outputs, expected = interpreter.outputs(spec, inputs), run(spec, "cpu", inputs)
    for name in ("out", "lse"):
        np.testing.assert_allclose(outputs[name], expected[name], atol=spec.tolerance.atol, rtol=spec.tolerance.rtol)
    found, wanted = (np.ascontiguousarray(side["summaries_out"]).view(np.uint8) for side in (outputs, expected))
    np.testing.assert_array_equal(found, wanted)


def test_a_long_page_table_means_parts() -> None:
    from trt_kv.plugins.attention_triton import _n_splits

    assert _n_splits(8, 1552, 132) == 4
    assert _n_splits(8, 131072, 132) == 32
    assert _n_splits(90, 131072, 132) == 2
    assert _n_splits(256, 131072, 132) == 1
    assert _n_splits(8, 255, 132) == 1
    assert _n_splits(1000, 100_000, 132) == 1
    assert _n_splits(1, 10_000_000, 132) == 64


def test_importing_an_op_imports_no_triton() -> None:
    code = "import sys; from trt_kv.plugins.cached_attention.tensorrt import KERNELS"
    code += "; print(KERNELS.device is not None, 'triton' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout == "True False\n"


@EACH_SPEC
def test_kernels_take_the_arguments_of_their_op(spec: OpSpec) -> None:
    assert taken_by(spec, "triton") == [arguments_of(spec)]


@pytest.mark.slow
@EACH_SPEC
@pytest.mark.parametrize("capability", EACH_CAPABILITY)
def test_kernels_compile_for_every_gpu_we_name(spec: OpSpec, capability: int) -> None:
    """PTX for that GPU, within its shared memory, and decoding spills no register; each kernel once, on sm_90 each variant."""
    launches = distinct_launches({spec.name: spec}, ["Llama-3.1-8B"], (torch.float16,))
    one_of_each = {launch.name: launch for launch in launches}.values()
    for launch in launches if capability == 90 else one_of_each:
        check(launch, capability)


@pytest.mark.slow
@EACH_SPEC
def test_kernels_compile_for_the_shapes_of_models_and_every_type(spec: OpSpec) -> None:
    for model, dtype in (("Llama-3.2-1B", torch.bfloat16), ("Llama-3.1-70B", torch.float32), ("Qwen2.5-7B", torch.float16)):
        for launch in distinct_launches({spec.name: spec}, [model], (dtype,)):
            check(launch, 90)


def check(launch: Any, capability: int) -> None:
    resources = compiled(launch, capability)
    assert f".target sm_{capability}" in resources.ptx
    assert f".visible .entry {launch.name}" in resources.ptx
    assert resources.shared_bytes <= SHARED_BYTES[capability]
    is_decode_scoring = launch.constants.get("BLOCK_M") == 16 and "fp32" not in launch.signature["kv_ptr"]
    if launch.name in ONE_TOKEN_KERNELS or is_decode_scoring:
        assert resources.local_bytes <= SPILLED_BYTES.get(launch.name, 0), f"{launch.name} spills on sm_{capability}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_kernels_on_the_gpu_equal_the_reference(spec: OpSpec, case: Case, dtype: str) -> None:
    inputs = rounded(spec, case_inputs(spec, case), dtype)
    tensors = device_outputs(spec.name, inputs, dtype=getattr(torch, dtype), device="cuda")
    outputs = {n: (t.float() if t.is_floating_point() else t).cpu().numpy() for n, t in tensors.items()}
    coarse = Tolerance(atol=3e-2, rtol=3e-2, reason="bf16 has 8 bits")
    assert_equals_reference(
        spec, inputs, outputs, {"float32": spec.tolerance, "float16": HALF_TOLERANCE, "bfloat16": coarse}[dtype]
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "case"), LONG_CASES)
def test_kernels_on_the_gpu_equal_the_reference_where_work_is_divided(spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case)
    tensors = device_outputs(spec.name, inputs, dtype=torch.float32, device="cuda")
    assert_equals_reference(spec, inputs, {n: t.cpu().numpy() for n, t in tensors.items()}, LONG_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("n_cached", [1, 31, 5000, 40000])
def test_lengths_of_real_contexts_on_the_gpu(n_cached: int) -> None:
    """Against the CPU's kernel: one-token sequences in parts beside a chunk."""
    spec = SPECS["CachedAttention"]
    case = Case(name="real", cached=(n_cached, 700), new=(1, 300), dims={"H": 32, "K": 8, "D": 128, "P": 32, "L": 1})
    inputs = case_inputs(spec, case)
    expected = run(spec, "cpu", inputs)
    got = device_outputs(spec.name, inputs, dtype=torch.float32, device="cuda")
    for name in ("out", "lse"):
        np.testing.assert_allclose(got[name].cpu().numpy(), expected[name], atol=LONG_TOLERANCE.atol, rtol=LONG_TOLERANCE.rtol)


@EACH_SPEC
def test_the_plugin_runs_the_kernels(spec: OpSpec) -> None:
    """Where TensorRT hands tensors on a GPU to the plugin."""
    kernels = importlib.import_module(f"trt_kv.plugins.{spec.folder}.tensorrt").KERNELS
    kernel = device_kernel(spec.name)
    assert kernel is not None
    assert vars(kernels.device) == vars(kernel)


@pytest.mark.slow
def test_the_table_of_kernels_is_current() -> None:
    from trt_kv.plugins.triton_compile import kernels_markdown

    current = (ROOT / "docs" / "kernels.md").read_text()
    assert current == kernels_markdown() + "\n", "run: python -m trt_kv.plugins.triton_compile > docs/kernels.md"
