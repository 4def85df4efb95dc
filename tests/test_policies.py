"""Presets, their parts, what may be combined, and what each layer keeps."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.cli.app import main
from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.layer_budget import ALL, LayerBudget, layer_budgets, pyramid_budgets
from trt_kv.policies import ALIASES, policy_from_name, policy_names, policy_without_floor
from trt_kv.policy import BUDGETS, DEFAULT_FLOOR, Policy, kept_tokens
from trt_kv.policy_settings import differences, policy_with, setting_as_text, settings_from_text
from trt_kv.program import PHASES, budgets_of, eviction_nodes, program_of, windows_of
from trt_kv.score import Score
from trt_kv.scores import score_from_name, score_names

PUBLISHED = (
    "full",
    "h2o",
    "prefixkv",
    "prefixkv_paper",
    "pyramidkv",
    "random",
    "refreekv",
    "snapkv",
    "streamingllm",
    "uniform",
)


def ops_of(policy: Policy, phase: str, *, layer: int = 2) -> list[str]:
    return [node.op for node in program_of(policy, phase=phase, n_layers=4, scale=0.5, page_size=8)[layer]]


def test_the_published_policies_are_there() -> None:
    assert set(PUBLISHED) <= set(policy_names())


@pytest.mark.parametrize("name", policy_names())
def test_a_preset_is_called_as_its_file_and_survives_json(name: str) -> None:
    policy = policy_from_name(name)
    assert policy.name == name
    assert Policy.from_json(policy.to_json()) == policy
    assert (policy.floor == DEFAULT_FLOOR) == (policy.evicts and name not in ("prefixkv_paper", "lukv", "kvzap"))


def test_an_alias_is_another_name_of_a_preset() -> None:
    assert policy_from_name("pooledwindow") is policy_from_name("prefixkv")
    assert not set(ALIASES) & set(policy_names())
    assert set(ALIASES.values()) <= set(policy_names())


def test_the_programs_of_the_published_policies() -> None:
    assert ops_of(policy_from_name("full"), "prefill") == ["CachedAttention"]
    assert ops_of(policy_from_name("streamingllm"), "prefill") == ["CachedAttention", "EvictTokens"]
    assert ops_of(policy_from_name("streamingllm"), "decode") == ["CachedAttention", "EvictTokens"]
    assert ops_of(policy_from_name("h2o"), "decode") == ["CachedAttention", "TokenScores", "EvictTokens"]
    assert ops_of(policy_from_name("snapkv"), "prefill") == ["CachedAttention", "TokenScores", "EvictTokens"]
    assert ops_of(policy_from_name("snapkv"), "decode") == ["CachedAttention"]
    for recalling in ("freekv", "quest", "arkvale"):
        layers = [ops_of(policy_from_name(recalling), "decode", layer=layer) for layer in (0, 1)]
        assert layers == [["RecallAttention" if recalling == "freekv" else "CachedAttention"], ["RecallAttention"]]
    refreekv = policy_from_name("refreekv")
    assert ops_of(refreekv, "prefill") == ["CachedAttention", "AdaptiveBudget", "EvictTokens"]
    assert ops_of(refreekv, "prefill", layer=1) == ["CachedAttention"]
    program = program_of(refreekv, phase="prefill", n_layers=3, scale=0.5, page_size=8)
    assert budgets_of(program) == [ALL, ALL, None]
    assert [node is not None for node in eviction_nodes(program)] == [False, False, True]


@given(score=st.sampled_from(score_names()), budget=st.sampled_from(sorted(BUDGETS)), name=st.sampled_from(PUBLISHED))
def test_any_score_goes_with_any_budget_or_is_refused_with_a_reason(score: str, budget: str, name: str) -> None:
    settings = {"score": score, "budget": budget} | ({"tokens": 128} if budget == "constant" else {})
    try:
        policy = policy_with(policy_from_name(name), settings)
    except UsageError:
        allowed = (score == "none") == (budget == "full") and (score == "surrogate") == (budget == "above")
        refuses_more = score_from_name(score).check is not Score.check
        assert not allowed or (refuses_more and (score != "random" or budget == "unimetric"))
        return
    ops = ops_of(policy, "prefill")
    assert ("TokenScores" in ops) == score_from_name(score).reads_attention
    assert ("AdaptiveBudget" in ops) == (budget == "unimetric")
    assert ("PredictedScores" in ops) == (score == "surrogate") == (budget == "above")
    assert ("EvictTokens" in ops) == (budget != "full" and score_from_name(score).ranks == "tokens")
    assert ("RecallAttention" in ops) == (score_from_name(score).ranks == "pages") == policy.recalls


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("prefixkv_paper", ["score=luck"], "unknown score"),
        ("prefixkv_paper", ["luck=1"], "unknown setting"),
        ("prefixkv_paper", ["score"], "NAME=VALUE"),
        ("prefixkv_paper", ["score=mass", "score=window"], "given twice"),
        ("prefixkv_paper", ["window=many"], "bad value"),
        ("prefixkv_paper", ["window=8"], "choose score "),
        ("prefixkv_paper", ["threshold=0.1"], "choose budget unimetric"),
        ("prefixkv_paper", ["budget=constant"], "tokens=512"),
        ("prefixkv_paper", ["score=none"], "needs a ranking"),
        ("full", ["score=mass"], "ignores it"),
        ("full", ["budget=uniform"], "needs a ranking"),
        ("refreekv", ["kept=0.5"], "reads no kept share"),
        ("refreekv", ["score=random"], "means nothing for a random one"),
        ("refreekv", ["metric_row=scores"], "needs a score computed from attention"),
        ("refreekv", ["exempt_layers=1,0"], "in ascending order"),
        ("refreekv", ["exempt_layers=first"], "0,1, or none"),
        ("refreekv", ["threshold=0"], "(0, 1)"),
        ("snapkv", ["pooling=4"], "an odd number"),
        ("snapkv", ["heads=both"], "unknown heads"),
        ("streamingllm", ["heads=each"], "scores computed from attention"),
        ("h2o", ["score=mean_mass"], "a mean over queries is not a sum"),
        ("h2o", ["recent_share=1.5"], "[0, 1]"),
        ("pyramidkv", ["beta=0.5"], ">= 1"),
        ("pyramidkv", ["beta=inf"], ">= 1"),
        ("full", ["sinks=9"], "a budget other than full"),
        ("full", ["decode=rank"], "a budget other than full"),
        ("full", ["exempt_layers=0"], "a budget other than full"),
        ("random", [f"seed={2**63}"], f"<= {2**31 - 1}"),
        ("snapkv", ["window=99999999999"], f"<= {2**31 - 1}"),
        ("snapkv", ["pooling=100001"], "<= 9999"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_combined_is_refused_with_the_reason(name: str, settings: list[str], said: str) -> None:
    with pytest.raises((UsageError, UnknownNameError)) as caught:
        policy_with(policy_from_name(name), settings_from_text(settings))
    assert said in str(caught.value)


def test_settings_replace_only_what_they_name() -> None:
    plain = policy_from_name("snapkv")
    changed = policy_with(plain, settings_from_text(["kept=0.2", "window=16"]))
    assert changed == dataclasses.replace(plain, kept=0.2, window=16)
    assert differences(changed, plain) == {"kept": 0.2, "window": 16}


def test_a_budget_that_reads_no_share_puts_the_share_back() -> None:
    adaptive = policy_with(policy_from_name("prefixkv_paper"), settings_from_text(["budget=unimetric"]))
    assert adaptive.kept == 1.0
    assert policy_with(adaptive, {"budget": "uniform"}).kept == 0.5
    constant = policy_with(policy_from_name("snapkv"), settings_from_text(["budget=constant", "tokens=256"]))
    assert layer_budgets(constant, 3) == [LayerBudget(share=0.0, tokens=256, floor=256)] * 3
    assert layer_budgets(constant, 3)[0].of(200) == 200
    assert layer_budgets(constant, 3)[0].of(9000) == 256


@pytest.mark.parametrize("name", policy_names())
def test_settings_as_text_are_read_back(name: str) -> None:
    other = policy_from_name("prefixkv_paper" if name != "prefixkv_paper" else "snapkv")
    changed = differences(policy_from_name(name), other)
    assert settings_from_text(setting_as_text(part, value) for part, value in changed.items()) == changed


def test_the_floor_belongs_to_eviction() -> None:
    def floor_of(name: str, *settings: str) -> int:
        return policy_with(policy_from_name(name), settings_from_text(settings)).floor

    assert floor_of("snapkv", "floor=100") == 100
    assert floor_of("full", "score=window", "budget=uniform") == DEFAULT_FLOOR
    assert floor_of("freekv", "score=window", "budget=recipe") == DEFAULT_FLOOR
    assert floor_of("prefixkv", "score=pages", "budget=recipe") == 0
    assert floor_of("snapkv", "budget=constant", "tokens=64") == 0
    assert floor_of("prefixkv_paper", "kept=0.3") == 0
    for name, *settings in (("freekv", "floor=9"), ("full", "floor=9"), ("snapkv", "budget=constant", "tokens=64", "floor=65")):
        with pytest.raises(UsageError, match=r"floor"):
            floor_of(name, *settings)


def test_exempt_layers_must_exist() -> None:
    policy = dataclasses.replace(policy_from_name("uniform"), exempt_layers=(0, 7))
    assert layer_budgets(policy, 8)[7] == ALL
    with pytest.raises(UsageError, match="does not have"):
        layer_budgets(policy, 7)


@given(
    kept=st.floats(0.05, 1.0),
    n_layers=st.integers(1, 40),
    window=st.integers(0, 64),
    beta=st.floats(1.0, 40.0),
    n=st.integers(600, 9000),
)
def test_a_pyramid_falls_from_layer_to_layer_and_keeps_the_mean(
    kept: float, n_layers: int, window: int, beta: float, n: int
) -> None:
    budgets = [budget.of(n) for budget in pyramid_budgets(kept, n_layers, window=window, beta=beta)]
    if kept * n >= window:  # share and window are rounded apart
        assert all(after <= before + 1 for before, after in itertools.pairwise(budgets))
    if kept * n >= window or kept > beta / (2 * beta - 1):
        clipped = any(budget == n for budget in budgets)
        assert abs(sum(budgets) / n_layers - kept * n) <= (1.5 if not clipped else window + 1.5)


def test_a_pyramid_keeps_the_mean_over_layers_that_are_not_exempt() -> None:
    policy = dataclasses.replace(policy_without_floor("pyramidkv"), kept=0.3, exempt_layers=(1, 4))
    budgets = layer_budgets(policy, 6)
    assert budgets[1] == budgets[4] == ALL
    others = [budgets[layer].of(4000) for layer in (0, 2, 3, 5)]
    assert others == sorted(others, reverse=True)
    assert sum(others) / 4 == pytest.approx(1200, abs=1)


@pytest.mark.parametrize("name", policy_names())
def test_layers_with_a_window_are_exempt_from_every_policy(name: str) -> None:
    """They attend to their window in both phases, and nothing else is done in them."""
    policy = policy_from_name(name)
    windows = (0, 7, 0, 9)
    for phase in PHASES:
        sizes: dict[str, Any] = {"phase": phase, "n_layers": 4, "scale": 0.5, "page_size": 8}
        program, without = (program_of(policy, windows=w, soft_cap=3.0, **sizes) for w in (windows, ()))
        assert windows_of(program) == [0, 7, 0, 9]
        for layer, nodes in enumerate(program):
            assert all(node.attributes.get("soft_cap", 3.0) == 3.0 for node in nodes)
            if windows[layer]:
                assert [node.op for node in nodes] == ["CachedAttention"]
            elif layer not in policy.exempt_layers:
                assert [node.op for node in nodes] == [node.op for node in without[layer]]
    applied = policy.applied_to(windows)
    assert applied.applied_to(windows) == applied
    assert policy.applied_to(()) == policy.applied_to((0, 0)) == policy
    nothing = policy.applied_to((3, 7, 5, 9))
    assert [nothing.evicts, nothing.recalls, nothing.needs_recipe, nothing.needs_drift] == [False] * 4


def test_pyramidkvs_published_example() -> None:
    """2048 tokens of 8192 over 32 layers, window 64, beta 20: min (c - w) / 20, max 2 (c - w) - min, each plus the window."""
    budgets = [budget.of(8192) for budget in pyramid_budgets(0.25, 32, window=64, beta=20.0)]
    smallest = (2048 - 64) / 20
    assert abs(budgets[-1] - (64 + smallest)) <= 1
    assert abs(budgets[0] - (64 + 2 * (2048 - 64) - smallest)) <= 1
    assert abs(sum(budgets) / 32 - 2048) < 1


@given(n=st.integers(0, 5000), share=st.floats(0.0, 1.0), tokens=st.integers(-300, 300))
def test_a_budget_is_never_less_than_nothing_or_more_than_all(n: int, share: float, tokens: int) -> None:
    assert 0 <= kept_tokens(n, share, tokens) <= n
    assert kept_tokens(n, 1.0) == n


def test_a_policy_is_added_with_one_file(policy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The five steps of CONTRIBUTING.md: the file alone makes the name known to the library and the command line."""
    (policy_folder / "lastwords.py").write_text(
        '"""What the last 16 queries look at, and nothing else."""\n\n'
        "from trt_kv.policy import Policy\n\n"
        'POLICY = Policy(name="lastwords", summary="seen by the last 16 queries",'
        ' score="window", budget="uniform", kept=0.25, window=16)\n'
    )
    assert "lastwords" in policy_names()
    policy = policy_from_name("lastwords")
    assert ops_of(policy, "prefill") == ["CachedAttention", "TokenScores", "EvictTokens"]
    assert main(["policies", "lastwords"]) == 0
    assert "seen by the last 16 queries" in capsys.readouterr().out
