"""Pages ranked by codes of their keys (``page_summary=codes``): the definition, its kernels, and what it is good for."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import build_for_test, random_ids
from tests.test_onnx_bodies import assert_body_equals_reference, run_in_onnxruntime
from trt_kv.cli.inspection import describe_engine
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import KV_DTYPES
from trt_kv.opspec import Case
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.kv_rows import KvDtype, dtype_of, load
from trt_kv.plugins.recall_attention import reference
from trt_kv.plugins.recall_attention.choice import best_pages, summaries_of
from trt_kv.plugins.recall_attention.page_counts import CODES, summary_rows
from trt_kv.plugins.recall_attention.spec import SPEC
from trt_kv.plugins.registry import kernel
from trt_kv.policies import policy_from_name
from trt_kv.policy_settings import policy_with
from trt_kv.runtime.engine import Engine

CASES = [case for case in SPEC.cases if case.name not in ("equal_pages", "soft_cap", "many_layers", "no_room_to_recall")]
DTYPES = [pytest.param(name, marks=pytest.mark.slow if "float16" in name else ()) for name in KV_DTYPES]
"""As in ``test_op_parity``: kernels of a type take long to compile."""


def coded(case: Case) -> Case:
    return dataclasses.replace(case, attributes={**case.attributes, "summary": CODES})


def results_of(inputs: dict[str, Any], implementation: str) -> list[np.ndarray]:
    """Outputs, then states without rows of codes; ``inputs`` are left as they are."""
    own = {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in inputs.items()}
    outputs = kernel("RecallAttention", implementation)(**own)
    return [*outputs, load(own["kv"]), load(own["summaries"][:, :, :2]), own["last_query"]]


def roomy(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same step of a runtime, whose state has room for codes; summaries are those of the keys."""
    kv, page_size = inputs["kv"], inputs["page_size"]
    known = summaries_of(kv[:, 0], CODES, dtype_of(kv))
    assert known.shape[2] == summary_rows(CODES, page_size, dtype_of(kv).name)
    return {**inputs, "summaries": known}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_follows_the_definition_with_and_without_room_for_codes(case: Case, dtype: str) -> None:
    inputs = case_inputs(SPEC, coded(case), kv_dtype=dtype)
    expected = results_of(inputs, "reference")
    for found, wanted in zip(results_of(inputs, "cpu"), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=SPEC.tolerance.atol, rtol=SPEC.tolerance.rtol)
    stored = roomy(inputs)
    without = {**stored, "summaries": np.ascontiguousarray(stored["summaries"][:, :, :2])}
    for found, wanted in zip(results_of(stored, "cpu"), results_of(without, "cpu"), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("decode", "chunk_fills_pages")], ids=lambda c: c.name)
def test_the_body_in_standard_ops_follows_the_definition(case: Case) -> None:
    assert_body_equals_reference(SPEC, case_inputs(SPEC, coded(case)), run_in_onnxruntime)


@pytest.mark.parametrize("page_size", [3, 8, 13, 16])
@pytest.mark.parametrize("group", [1, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_estimates_are_those_of_the_best_key(page_size: int, group: int, dtype: str) -> None:
    """Also of more query heads than are computed at once, and of pages that fill no row of codes."""
    rng = np.random.default_rng(page_size)
    k_MKPD = rng.standard_normal((30, 2, page_size, 11), np.float32)
    summaries = summaries_of(k_MKPD, CODES, KvDtype(dtype))
    probe_HD = rng.standard_normal((2 * group, 11), np.float32)
    chosen_KC = best_pages(probe_HD, np.arange(30), summaries, 6, 2, 1.0)
    for head in range(2):
        lo_hi = load(np.ascontiguousarray(summaries[:, head, :2]))
        estimates_GJ = reference.estimates_of(probe_HD[head * group : (head + 1) * group], lo_hi, k_MKPD[:, head])
        expected = np.sort(np.argsort(-estimates_GJ.mean(axis=0), kind="stable")[:6])
        np.testing.assert_array_equal(chosen_KC[head], expected)


def test_one_key_that_matters_is_found_where_bounds_are_misled() -> None:
    """A page whose channels are large in different keys has a large bound, but no key that the query fits."""
    query = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], np.float32)
    k_MKPD = np.zeros((9, 1, 8, 8), np.float32)
    k_MKPD[:8, 0, 0, 0] = k_MKPD[:8, 0, 1, 1] = 1.5
    k_MKPD[8, 0, 3, :2] = 1.0
    by_bounds, by_codes = (
        best_pages(query, np.arange(9), summaries_of(k_MKPD, summary, KvDtype("float32")), 1, 3, 1.0) for summary in (0, CODES)
    )
    assert by_bounds[0] != [8]
    assert by_codes[0] == [8]


def test_keys_on_the_levels_are_estimated_exactly_where_the_query_is_large() -> None:
    rng = np.random.default_rng(0)
    k_PD = rng.choice(np.array([-1.5, 0.0, 1.5, 3.0], np.float32), (8, 8))
    k_PD[0], k_PD[1], k_PD[:, 2] = -1.5, 3.0, 0.75
    summaries = summaries_of(k_PD[None, None], CODES, KvDtype("float32"))
    probe_GD = np.zeros((2, 8), np.float32)
    probe_GD[:, 2], probe_GD[:, 6] = (0.3, 0.7), (-1.0, 2.0)
    found_GJ = reference.estimates_of(probe_GD, summaries[:, 0, :2], k_PD[None])
    np.testing.assert_allclose(found_GJ[:, 0], (probe_GD @ k_PD.T).max(axis=1), rtol=1e-5)


@pytest.fixture(scope="module")
def coded_engine(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    policy = policy_with(
        policy_from_name("freekv"),
        {"tokens": 30, "sinks": 3, "recent": 5, "page_summary": "codes", "group_pooling": "max_raw"},
    )
    request = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy, page_size=5)
    return build_for_test(request, tmp_path_factory.mktemp("codes") / "engine")


def test_an_engine_says_the_same_from_memory_and_from_a_file(coded_engine: Path, tmp_path: Path) -> None:
    """Also in a second request that begins like the first one, whose pages come with their codes from the prefix cache."""
    said: list[tuple[int, ...]] = []
    for host_tier in ("ram", f"file:{tmp_path}"):
        with Engine.load(coded_engine, n_threads=1, host_tier=host_tier) as engine:
            assert engine.manifest.applied_policy.page_summary == "codes"
            prompt = random_ids(engine, 80, seed=4)
            said += [engine.generate(prompt, max_new_tokens=12).token_ids for _ in range(2)]
    assert said == said[:1] * 4


def test_the_description_of_an_engine_names_codes(coded_engine: Path) -> None:
    assert "pages     codes: " in describe_engine(coded_engine)
