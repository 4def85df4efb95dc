"""What our baselines keep beside what NVIDIA's kvpress keeps of the same prompts: docs/kvpress.md tells where they differ."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.__main__ import RESULTS
from benchmarks.kvpress.docs import DOCS, measured_section
from benchmarks.kvpress.overlap import SETS_TABLE, SHARES, compared
from benchmarks.kvpress.pairs import (
    H2O_PAIR,
    LOTS,
    OBSERVED_PAIR,
    PAIRS,
    PYRAMID_PAIR,
    RANDOM_PAIR,
    SNAPKV,
    SNAPKV_PAIR,
    Pair,
)
from benchmarks.kvpress.presses import Ints, PressRun
from benchmarks.kvpress.sides import FEW, ROUNDING, Sides, documents, overlap
from trt_kv.manifest import load_manifest
from trt_kv.plugins.lots import key_of, lot_of
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = [pair for pair in PAIRS if pair.same]
SCORED = [SNAPKV_PAIR, OBSERVED_PAIR]


class FixedScores:
    """Scores [L, K, N] in the place of a press's own: one layer's at each call."""

    def __init__(self, scores_LKN: Floats) -> None:
        self._layers = iter(torch.from_numpy(scores_LKN))

    def __call__(self, *_: Any) -> torch.Tensor:
        scores_KN: torch.Tensor = next(self._layers)
        return scores_KN[None]


@pytest.fixture(scope="module")
def sides(full_folder: Path) -> Sides:
    manifest = load_manifest(full_folder)
    return Sides(
        OnnxRuntimeExecutor(full_folder / "graphs", manifest.segments, manifest.attention_ports, n_threads=1), manifest.config
    )


@pytest.fixture(scope="module")
def prompts(sides: Sides) -> list[list[int]]:
    return [sides.encode(task) for task in documents()]


def named(pairs: list[Pair]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", pairs, ids=lambda pair: f"{pair.press}-{pair.policy.name}")


def n_kept(run: PressRun) -> list[int]:
    return [kept_KS.shape[1] for kept_KS in run.kept]


def each_head(*sides: Sequence[Ints]) -> Iterator[tuple[Ints, ...]]:
    """The kept positions of each side, [S], head by head."""
    for layer in zip(*sides, strict=True):
        yield from zip(*layer, strict=True)


@named(SCORED)
def test_our_scores_are_the_press_s(pair: Pair, sides: Sides, prompts: list[list[int]]) -> None:
    """Up to a factor that changes no ranking: SnapKV's press averages over the window, and our sum is never divided."""
    factor = pair.policy.window if pair.policy.score == "window" else 1
    for prompt in prompts:
        ranked = slice(0, len(prompt) - (pair.policy.window if pair.policy.score == "window" else 0))
        ours = sides.scores(pair.policy, prompt)[..., ranked]
        theirs = factor * sides.both(pair, 0.5, prompt)[0].scores[..., ranked]
        np.testing.assert_allclose(ours, theirs, rtol=ROUNDING, atol=ROUNDING * float(np.median(theirs)))


@named(SAME)
@pytest.mark.parametrize("share", SHARES)
def test_the_same_tokens_are_kept(pair: Pair, share: float, sides: Sides, prompts: list[list[int]]) -> None:
    """As many and the same ones; but for one token per head where kvpress, which truncates, keeps one less than we."""
    for prompt in prompts:
        run, ours = sides.both(pair, share, prompt)
        n = len(prompt)
        truncated, rounded = int(n * (1 - (1 - share))), n - round((1 - share) * n)
        assert rounded - truncated in (0, 1)
        assert n_kept(run) == [truncated] * len(ours)
        assert {kept_KS.shape[1] for kept_KS in ours} == {max(rounded, pair.at_least)}
        found = overlap(run, ours)
        assert found.misplaced <= FEW * found.kvpress
        assert found.worst_gap <= ROUNDING


def test_both_ways_of_rounding_occur() -> None:
    """The shares and documents above tell truncation from rounding, or the test above would show less than it says."""
    assert {
        math.floor(n * share) - round(n * share) for n in (task.n_prompt_tokens for task in documents()) for share in SHARES
    } == {0, -1}


def test_snapkv_keeps_its_window_whole_where_kvpress_cuts_into_it(sides: Sides, prompts: list[list[int]]) -> None:
    share = 0.1
    for prompt in prompts:
        run, ours = sides.both(SNAPKV_PAIR, share, prompt)
        window = np.arange(len(prompt) - SNAPKV.window, len(prompt))
        assert all((kept_KS == window).all() for kept_KS in ours)
        assert all(np.isin(kept_KS, window).all() and kept_KS.shape[1] < SNAPKV.window for kept_KS in run.kept)


def test_pyramidkv_ranks_alike_and_keeps_the_same_at_the_same_budgets(sides: Sides, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        run, ours = sides.both(PYRAMID_PAIR, 0.5, prompt)
        budgets = n_kept(run)
        assert len(set(budgets)) == len(budgets)
        assert overlap(run, ours).misplaced <= FEW * sum(budgets)
        given = sides.kept(SNAPKV, prompt, kept_shares=[budget / len(prompt) for budget in budgets])
        assert [kept_KS.shape[1] for kept_KS in given] == budgets
        found = overlap(run, given)
        assert found.misplaced <= FEW * found.kvpress
        assert found.worst_gap <= ROUNDING


def test_pyramidkv_has_the_same_total_and_another_slope(sides: Sides, prompts: list[list[int]]) -> None:
    """kvpress takes the window out of the budgets, and is flat once the last layer's would be smaller than it."""
    for prompt in prompts:
        for share, is_flat in ((0.5, False), (0.25, True)):
            run, kept = sides.both(PYRAMID_PAIR, share, prompt)
            ours = [kept_KS.shape[1] for kept_KS in kept]
            assert sum(ours) == pytest.approx(sum(n_kept(run)), abs=len(ours))
            assert (len(set(n_kept(run))) == 1) == is_flat
            assert sorted(ours, reverse=True) == ours
            assert ours[-1] >= SNAPKV.window
            assert ours[0] > ours[-1]
        assert n_kept(sides.both(PYRAMID_PAIR, 0.5, prompt)[0])[-1] == SNAPKV.window


def test_h2o_is_the_press_with_sums_for_means_and_the_newest_half_first(sides: Sides, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        n = len(prompt)
        run, ours = sides.both(H2O_PAIR, 0.5, prompt)
        sums_LKN = (run.scores * np.arange(n, 0, -1)).astype(np.float32)
        n_newest = int(n * 0.5) // 2
        sums_LKN[..., n - n_newest :] = sums_LKN.max() + 1
        press = H2O_PAIR.press_at(0.5)
        press.score = FixedScores(sums_LKN)
        found = overlap(sides.press(press, prompt), ours)
        assert found.kvpress == found.ours
        assert found.misplaced <= FEW * found.kvpress
        assert found.worst_gap <= ROUNDING


@pytest.mark.parametrize("share", SHARES)
def test_given_our_lots_the_random_press_keeps_our_tokens(share: float, sides: Sides, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        _, ours = sides.both(RANDOM_PAIR, share, prompt)
        heads = [[key_of(LOTS.seed, layer, head) for head in range(len(kept_KS))] for layer, kept_KS in enumerate(ours)]
        press = RANDOM_PAIR.press_at(share)
        press.score = FixedScores(lot_of(np.array(heads)[..., None], np.arange(len(prompt))).astype(np.float32))
        run = sides.press(press, prompt)
        assert all(np.isin(theirs_S, ours_S).all() for theirs_S, ours_S in each_head(run.kept, ours))
        assert all(len(ours_S) - len(theirs_S) in (0, 1) for theirs_S, ours_S in each_head(run.kept, ours))


def test_a_seeded_random_press_draws_the_same_lots_in_every_layer_and_we_do_not(sides: Sides, prompts: list[list[int]]) -> None:
    run, ours = sides.both(RANDOM_PAIR, 0.5, prompts[0])
    assert all((kept_KS == run.kept[0]).all() for kept_KS in run.kept)
    assert len({kept_S.tobytes() for kept_KS in ours for kept_S in kept_KS}) == sum(len(kept_KS) for kept_KS in ours)


def test_the_results_are_those_of_this_version(sides: Sides, prompts: list[list[int]]) -> None:
    """The table of the docs comes from benchmarks/results: measured again, no overlap is more than rounding away from it."""
    document = json.loads((RESULTS / "kvpress_overlap.json").read_text())
    rows = {(row["press"], row["policy"], row["kept_share"]): row for row in document["tables"][SETS_TABLE]}
    assert set(rows) == {(pair.press, pair.named, share) for pair in PAIRS for share in SHARES}
    for pair in PAIRS:
        row = rows[pair.press, pair.named, SHARES[0]]
        found = compared(sides, pair, SHARES[0], prompts)
        assert 100 * found.both / found.kvpress == pytest.approx(row["also_kept_by_us_percent"], abs=0.3)


def test_the_docs_show_the_results() -> None:
    assert measured_section() in DOCS.read_text(), "run: python -m benchmarks.kvpress.docs"
