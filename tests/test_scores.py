"""Scores: what each puts into a program, what no score may be, and that a new one is one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engines import build_for_test, load_for_test, random_ids
from trt_kv.cli.app import main
from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import load_manifest
from trt_kv.plugins.token_scores.spec import SPEC as TOKEN_SCORES
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.policy_settings import SETTABLE, policy_with, settings_from_text
from trt_kv.program import OpNode, program_of
from trt_kv.recipe import RecipeScore, recipe_score
from trt_kv.score import Score
from trt_kv.scores import attention_scores, score_from_name, score_names

CONTRIBUTIONS: dict[str, tuple[Mapping[str, int] | None, int]] = {
    "mass": ({"window": 0, "average": 0}, 0),
    "mean_mass": ({"window": 0, "average": 1}, 0),
    "window": ({"window": 7, "average": 0}, 0),
    "position": (None, 1),
    "random": (None, 2),
}
"""By score of tokens: attributes of TokenScores at window 7, None where it is not there; ``ranking`` of EvictTokens."""

MEAN_WINDOW = '''"""The observation window as a mean over those of its queries that could see the token."""

import dataclasses

from trt_kv.scores.mean_mass import SCORE as MEAN_MASS

SCORE = dataclasses.replace(
    MEAN_MASS,
    name="meanwindow",
    summary="attention received, averaged over the last `window` prompt queries that could see the token",
    token_scores=lambda policy: {"window": policy.window, "average": 1},
    settings=("window",),
)
'''


def nodes_of(policy: Policy, *, phase: str = "prefill") -> dict[str, OpNode]:
    """The KV ops of the last of three layers."""
    nodes = program_of(policy, phase=phase, n_layers=3, scale=0.5, page_size=8)[-1]
    return {node.op: node for node in nodes}


@pytest.mark.parametrize("name", score_names())
def test_a_score_is_called_as_its_file_and_reads_settings_that_there_are(name: str) -> None:
    score = score_from_name(name)
    assert score.name == name
    assert set(score.settings) <= set(SETTABLE)


@pytest.mark.parametrize("name", attention_scores())
def test_a_score_sets_attributes_that_its_op_has(name: str) -> None:
    node = nodes_of(Policy(name="any", summary="", score=name, budget="uniform", kept=0.5, decode="keep"))["TokenScores"]
    assert set(node.attributes) == {attribute.name for attribute in TOKEN_SCORES.attributes}


@pytest.mark.parametrize("name", CONTRIBUTIONS)
def test_what_a_score_puts_into_the_program(name: str) -> None:
    token_scores, ranking = CONTRIBUTIONS[name]
    policy = Policy(name="any", summary="", score=name, budget="uniform", kept=0.5, window=7)
    nodes = nodes_of(policy)
    assert nodes["EvictTokens"].attributes["ranking"] == ranking
    assert ("TokenScores" in nodes) == policy.reads_attention == (token_scores is not None)
    if token_scores is not None:
        attributes = nodes["TokenScores"].attributes
        assert attributes == {**attributes, **token_scores}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"token_scores": lambda _: {}, "ranking": 1},
        {"ranks": "nothing", "ranking": 1},
        {"ranks": "pages", "token_scores": lambda _: {}},
        {"ranks": "layers", "ranking": 1},
    ],
    ids=["by nothing", "by two things", "nothing, but in order", "pages by tokens", "what is not there"],
)
def test_a_score_says_one_thing_that_it_ranks_by(parts: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="score 'mine'"):
        Score(name="mine", summary="", **parts)


def test_an_unknown_score_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=f"one of {', '.join(score_names())}"):
        score_from_name("luck")


@pytest.mark.parametrize("command", [["policies"], ["policies", "lately"]])
def test_a_score_is_added_with_one_file(
    command: list[str], score_folder: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CONTRIBUTING.md: the file alone makes the name known to the command line, to presets, to --set and to recipes."""
    (score_folder / "meanwindow.py").write_text(MEAN_WINDOW)
    (policy_folder / "lately.py").write_text(
        "from trt_kv.policy import Policy\n\n"
        'POLICY = Policy(name="lately", summary="", score="meanwindow", budget="recipe", kept=0.5, window=5)\n'
    )
    assert main(command) == 0
    assert "averaged over the last `window` prompt queries" in capsys.readouterr().out
    for policy in (
        policy_from_name("lately"),
        policy_with(policy_from_name("prefixkv_paper"), settings_from_text(["score=meanwindow", "window=5"])),
    ):
        attributes = nodes_of(policy)["TokenScores"].attributes
        assert (attributes["window"], attributes["average"]) == (5, 1)
        assert recipe_score(policy) == RecipeScore(name="meanwindow", window=5)
    assert {"mass", "meanwindow", "window"} <= set(attention_scores())


@pytest.mark.parametrize(
    ("preset", "settings", "said"),
    [
        ("h2o", ["score=meanwindow"], "a mean over queries is not a sum"),
        ("streamingllm", ["heads=each"], "meanwindow"),
        ("prefixkv_paper", ["window=5"], "meanwindow"),
        ("prefixkv_paper", ["score=luck"], "meanwindow"),
    ],
)
def test_an_added_score_refuses_and_is_offered(preset: str, settings: list[str], said: str, score_folder: Path) -> None:
    (score_folder / "meanwindow.py").write_text(MEAN_WINDOW)
    with pytest.raises(UsageError) as caught:
        policy_with(policy_from_name(preset), settings_from_text(settings))
    assert said in str(caught.value)


def test_an_added_score_becomes_an_engine(score_folder: Path, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """One file in a folder of scores, and nothing else: an engine is built, loads, and keeps what the score ranks first."""
    (score_folder / "meanwindow.py").write_text(MEAN_WINDOW)
    settings = ["score=meanwindow", "window=6", "budget=constant", "tokens=20"]
    policy = policy_with(policy_from_name("uniform"), settings_from_text(settings))
    request = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy)
    folder = build_for_test(request, tmp_path / "engine")
    assert load_manifest(folder).policy == policy
    engine = load_for_test(folder)
    generation = engine.generate(random_ids(engine, 60, seed=1), max_new_tokens=4, temperature=1.0)
    assert min(generation.kv_tokens) >= 20
    assert max(generation.kv_tokens) < 60
