"""AdaptiveBudget is ReFreeKV's Uni-Metric as one reads it, cut by cut, and depends on nothing else."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.adaptive_steps import DEFAULTS, SPEC, Cached, draw, step_of
from tests.test_onnx_bodies import feeds_of, one_node_model, run_in_onnxruntime
from trt_kv.opspec import Case
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.paging import gather_kv, gather_slots, pages_of
from trt_kv.plugins.registry import IMPLEMENTATIONS, kernel

ROUNDING = 1e-5
"""How near to the threshold, as a share of the whole norm, fp32 products may put a norm on its other side."""

EACH_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
SEEDS = st.integers(0, 2**32 - 1)
THRESHOLDS = st.floats(2**-10, 0.125, width=32)
SETTINGS = st.fixed_dictionaries(
    {
        "sinks": st.integers(0, 5),
        "recent": st.integers(0, 3),
        "ranking": st.integers(0, 1),
        "row": st.integers(0, 1),
        "protected_in_norm": st.integers(0, 1),
    }
)


def budgets(implementation: str, inputs: dict[str, Any]) -> list[int]:
    (budget,) = kernel("AdaptiveBudget", implementation)(**inputs)
    assert budget.dtype == np.int64
    return [int(n) for n in budget]


def budget_of(implementation: str, sequence: Cached, **attributes: Any) -> int:
    return budgets(implementation, step_of([sequence]) | attributes)[0]


def attention(sequence: Cached) -> np.ndarray:
    """The query's weights, [H, S] fp64."""
    k_HSD = sequence.k.astype(np.float64).repeat(len(sequence.q) // len(sequence.k), axis=0)
    logits_HS = np.einsum("hd,hsd->hs", sequence.q.astype(np.float64), k_HSD) * sequence.q.shape[1] ** -0.5
    weights_HS: np.ndarray = np.exp(logits_HS - sequence.lse[:, None])
    return weights_HS


def released_code(sequence: Cached, threshold: float) -> int:
    """ReFreeKV as released: sinks out of the list, oldest tokens first, cut at max { j : (b - s_j) / b <= threshold }."""
    order = np.argsort(sequence.positions[0])[4:]
    listed = attention(sequence)[:, order]
    b = np.mean([np.linalg.norm(a) for a in listed])
    s = [np.mean([np.linalg.norm(a[j:]) for a in listed]) for j in range(len(order) + 1)]
    return sequence.n_tokens - max(j for j in range(len(s)) if (b - s[j]) / b <= threshold)


def norms_of_cuts(sequence: Cached, settings: Mapping[str, Any]) -> list[float]:
    """For c = 0, 1, .. kept candidates, the mean over the heads of the norm of a row of which only the kept tokens are left."""
    rows = sequence.scores.astype(np.float64) if settings["row"] else attention(sequence)
    norms = []
    for c in range(sequence.n_tokens - settings["sinks"] - settings["recent"] + 1):
        of_heads = []
        for h, row in enumerate(rows):
            kv_head = h * len(sequence.k) // len(rows)
            by_position = np.argsort(sequence.positions[kv_head]).tolist()
            end = sequence.n_tokens - settings["recent"]
            protected, ranked = by_position[: settings["sinks"]] + by_position[end:], by_position[settings["sinks"] : end]
            scores = sequence.scores[kv_head] if settings["ranking"] == 0 else sequence.positions[kv_head]
            ranked.sort(key=scores.tolist().__getitem__, reverse=True)
            of_heads.append(np.linalg.norm(row[ranked[:c] + (protected if settings["protected_in_norm"] else [])]))
        norms.append(float(np.mean(of_heads)))
    return norms


def paper(sequence: Cached, threshold: float, settings: Mapping[str, Any]) -> int:
    """The protected tokens and the shortest prefix of the ranking for which 1 - ||A_kept|| / ||A|| is below the threshold."""
    norms = norms_of_cuts(sequence, settings)
    return sequence.n_tokens - len(norms) + 1 + min(c for c, norm in enumerate(norms) if 1 - norm / norms[-1] < threshold)


def distance_to_threshold(norms: list[float], threshold: float) -> float:
    """How near the nearest norm is to the one that is needed, as a share of the whole."""
    return float(np.min(np.abs(np.array(norms) / norms[-1] - (1 - threshold))))


@EACH_IMPLEMENTATION
@settings(max_examples=100)
@given(seed=SEEDS, n_tokens=st.integers(5, 60), threshold=THRESHOLDS)
def test_defaults_are_the_released_code(implementation: str, seed: int, n_tokens: int, threshold: float) -> None:
    sequence = draw(np.random.default_rng(seed), n_tokens)
    assume(distance_to_threshold(norms_of_cuts(sequence, DEFAULTS), threshold) > ROUNDING)
    assert budget_of(implementation, sequence, threshold=threshold) == released_code(sequence, threshold)


@EACH_IMPLEMENTATION
@settings(max_examples=100)
@given(seed=SEEDS, n_tokens=st.integers(9, 60), own_tokens=st.booleans(), threshold=THRESHOLDS, attributes=SETTINGS)
def test_budget_is_the_papers_shortest_prefix(
    implementation: str, seed: int, n_tokens: int, own_tokens: bool, threshold: float, attributes: dict[str, Any]
) -> None:
    """Of every ranking, row, protection and norm; the paper's own is by position, with the sinks in the norm."""
    sequence = draw(np.random.default_rng(seed), n_tokens, own_tokens=own_tokens)
    assume(distance_to_threshold(norms_of_cuts(sequence, attributes), threshold) > ROUNDING)
    expected = paper(sequence, threshold, attributes)
    assert budget_of(implementation, sequence, threshold=threshold, **attributes) == expected


@settings(max_examples=25)
@given(seed=SEEDS, n_tokens=st.integers(1, 40), own_tokens=st.booleans(), threshold=THRESHOLDS, attributes=SETTINGS)
def test_onnx_body_finds_the_same_budget(
    seed: int, n_tokens: int, own_tokens: bool, threshold: float, attributes: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    sequences = [draw(rng, n, own_tokens=own_tokens) for n in (n_tokens, n_tokens + 9)]
    for sequence in sequences:
        if sequence.n_tokens > attributes["sinks"] + attributes["recent"]:
            assume(distance_to_threshold(norms_of_cuts(sequence, attributes), threshold) > ROUNDING)
    inputs = step_of(sequences, n_new=2) | attributes | {"threshold": threshold}
    (got,) = run_in_onnxruntime(one_node_model(SPEC, inputs), feeds_of(SPEC, inputs))
    assert got.tolist() == budgets("reference", inputs)


@EACH_IMPLEMENTATION
@given(seed=SEEDS, n_tokens=st.integers(1, 60), thresholds=st.tuples(THRESHOLDS, THRESHOLDS), attributes=SETTINGS)
def test_a_larger_threshold_never_keeps_more(
    implementation: str, seed: int, n_tokens: int, thresholds: tuple[float, float], attributes: dict[str, Any]
) -> None:
    sequence = draw(np.random.default_rng(seed), n_tokens)
    small, large = (budget_of(implementation, sequence, threshold=t, **attributes) for t in sorted(thresholds))
    assert min(n_tokens, attributes["sinks"] + attributes["recent"]) <= large <= small <= n_tokens


@EACH_IMPLEMENTATION
@given(seed=SEEDS, n_tokens=st.integers(1, 60), n_new=st.integers(1, 9), own_tokens=st.booleans(), attributes=SETTINGS)
def test_slots_and_chunks_do_not_matter(
    implementation: str, seed: int, n_tokens: int, n_new: int, own_tokens: bool, attributes: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    sequence = draw(rng, n_tokens, own_tokens=own_tokens)
    elsewhere = step_of([sequence.in_slots(rng.permutation(n_tokens))], n_new=n_new)
    assert budgets(implementation, elsewhere | attributes) == [budget_of(implementation, sequence, **attributes)]


@EACH_IMPLEMENTATION
@given(
    seed=SEEDS,
    flags_and_lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), min_size=2, max_size=5),
    attributes=SETTINGS,
)
def test_neighbours_do_not_matter(
    implementation: str, seed: int, flags_and_lengths: list[tuple[int, int]], attributes: dict[str, Any]
) -> None:
    """A sequence has the budget that it has alone; one whose flag is not 1 keeps everything."""
    rng = np.random.default_rng(seed)
    flags = [flag for flag, _ in flags_and_lengths]
    sequences = [draw(rng, n) for _, n in flags_and_lengths]
    alone = [
        budget_of(implementation, s, **attributes) if flag == 1 else s.n_tokens
        for flag, s in zip(flags, sequences, strict=True)
    ]
    assert budgets(implementation, step_of(sequences, n_new=3, evict=flags) | attributes) == alone


@EACH_IMPLEMENTATION
@given(seed=SEEDS, n_tokens=st.integers(1, 60), threshold=THRESHOLDS)
def test_grouped_queries_have_the_budget_of_repeated_kv_heads(
    implementation: str, seed: int, n_tokens: int, threshold: float
) -> None:
    grouped = draw(np.random.default_rng(seed), n_tokens, n_heads=6, n_kv_heads=2)
    repeated = grouped.with_repeated_heads(3)
    budget_grouped, budget_repeated = (budget_of(implementation, s, threshold=threshold) for s in (grouped, repeated))
    assert budget_grouped == budget_repeated


@EACH_IMPLEMENTATION
@given(seed=SEEDS, n_tokens=st.integers(1, 60), threshold=THRESHOLDS, attributes=SETTINGS)
def test_sinks_in_the_norm_never_make_the_budget_larger(
    implementation: str, seed: int, n_tokens: int, threshold: float, attributes: dict[str, Any]
) -> None:
    sequence = draw(np.random.default_rng(seed), n_tokens)
    with_sinks, without = (
        budget_of(implementation, sequence, **(attributes | {"threshold": threshold, "protected_in_norm": i})) for i in (1, 0)
    )
    assert with_sinks <= without


@EACH_IMPLEMENTATION
def test_positions_and_attention_alone_decide_where_scores_are_not_asked_for(implementation: str) -> None:
    """ReFreeKV keeps no scores: the state may hold anything."""
    sequence = draw(np.random.default_rng(0), 50)
    unscored = replace(sequence, scores=np.full_like(sequence.scores, np.nan))
    assert budget_of(implementation, unscored) == budget_of(implementation, sequence)


@pytest.mark.parametrize("n_candidates", [1, 7, 100])
@pytest.mark.parametrize("threshold", [0.0, 0.015625, 0.125, 1.0])
@EACH_IMPLEMENTATION
def test_equal_weights_need_the_square_of_the_norm(implementation: str, n_candidates: int, threshold: float) -> None:
    """Of C equal weights, c have the share sqrt(c / C) of the norm."""
    sequence = draw(np.random.default_rng(1), n_candidates + 4)
    sequence = replace(sequence, scores=np.ones_like(sequence.scores))
    expected = 4 + int(np.ceil((1 - threshold) ** 2 * n_candidates))
    assert budget_of(implementation, sequence, row=1, threshold=threshold) == expected


@pytest.mark.parametrize("protected_in_norm", [0, 1])
def test_candidates_without_weight_are_not_kept(protected_in_norm: int) -> None:
    """With the sinks out, the released code divides 0 by 0 here."""
    sequence = draw(np.random.default_rng(2), 20)
    first = np.argsort(sequence.positions[0])[:4]
    k_KSD = np.full_like(sequence.k, -40.0)
    k_KSD[:, first] = 0.0
    alone = replace(sequence, k=k_KSD, q=np.ones_like(sequence.q), lse=np.full(6, np.log(4), np.float32))
    inputs = step_of([alone]) | {"protected_in_norm": protected_in_norm}
    (of_body,) = run_in_onnxruntime(one_node_model(SPEC, inputs), feeds_of(SPEC, inputs))
    assert {*budgets("reference", inputs), *budgets("cpu", inputs), *of_body.tolist()} == {4}


@pytest.mark.parametrize("sinks", [0, 3])
def test_of_a_row_without_any_weight_the_protected_tokens_stay(sinks: int) -> None:
    sequence = draw(np.random.default_rng(2), 20)
    inputs = step_of([replace(sequence, scores=np.zeros_like(sequence.scores))]) | {"row": 1, "sinks": sinks}
    (of_body,) = run_in_onnxruntime(one_node_model(SPEC, inputs), feeds_of(SPEC, inputs))
    assert {*budgets("reference", inputs), *budgets("cpu", inputs), *of_body.tolist()} == {sinks}


@pytest.mark.parametrize("row", [0, 1])
def test_a_sequence_without_a_query_keeps_everything_unless_scores_are_measured(row: int) -> None:
    sequence = draw(np.random.default_rng(3), 30)
    inputs = step_of([sequence, sequence], n_new=1) | {"row": row, "threshold": 0.1}
    inputs["cu_tokens"] = np.array([0, 0, 2])
    inputs["q"][0] = np.nan
    (of_body,) = run_in_onnxruntime(one_node_model(SPEC, inputs), feeds_of(SPEC, inputs))
    without, with_query = budgets("reference", inputs)
    assert without == (30 if row == 0 else with_query)
    assert with_query < 30
    assert budgets("cpu", inputs) == of_body.tolist() == [without, with_query]


@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_no_case_is_so_near_to_its_threshold_that_rounding_decides(case: Case) -> None:
    inputs = case_inputs(SPEC, case)
    attributes = {name: inputs[name] for name in DEFAULTS}
    unscored = np.full(inputs["token_positions"].shape, np.nan, np.float32)
    for b in np.flatnonzero(inputs["evict"] == 1):
        n_cached = int(inputs["kv_len"][inputs["layer"], b])
        if n_cached <= inputs["sinks"] + inputs["recent"]:
            continue
        pages = pages_of(inputs["page_table"], inputs["layer"], b, n_cached, inputs["page_size"])
        last = inputs["cu_tokens"][b + 1] - 1
        sequence = Cached(
            positions=gather_slots(inputs["token_positions"], pages, n_cached),
            scores=gather_slots(inputs.get("scores", unscored), pages, n_cached),
            k=gather_kv(inputs["kv"], pages, n_cached)[0],
            q=inputs["q"][last],
            lse=inputs["lse"][last],
        )
        assert distance_to_threshold(norms_of_cuts(sequence, attributes), inputs["threshold"]) > 10 * ROUNDING
