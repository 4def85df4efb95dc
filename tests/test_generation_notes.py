"""What is told after a generation is what was held, attended to and recalled."""

import dataclasses
from pathlib import Path

import pytest

from tests.engines import Run, build_for_test
from trt_kv.cli.generation_notes import attended_tokens, held_note, recall_note
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import Manifest, load_manifest
from trt_kv.policies import policy_from_name
from trt_kv.policy_settings import policy_with
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.statistics import RecallStatistics

PAGE_SIZE = 4


@pytest.fixture(scope="module")
def recalling(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """A step attends to 8 chosen and protected pages of 4 tokens."""
    policy = policy_with(policy_from_name("freekv"), {"tokens": 35, "sinks": 5, "recent": 6})
    request = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy, page_size=PAGE_SIZE)
    folder = tmp_path_factory.mktemp("engines") / "recalling"
    build_for_test(request, folder)
    return folder


@pytest.fixture(scope="module")
def evicting(small_folder: Path) -> Manifest:
    return load_manifest(small_folder)


def generation(kv_tokens: tuple[int, ...], n_tokens: int, n_prompt: int = 1) -> Generation:
    return Generation(
        text="",
        token_ids=(5,),
        finish_reason="length",
        n_prompt_tokens=n_prompt,
        num_computed_tokens=n_tokens,
        kv_tokens=kv_tokens,
    )


@pytest.mark.parametrize(
    ("kv_tokens", "n_tokens", "told"),
    [
        ((3, 3, 2), 3, "holds 2.7 of 3 tokens per layer (89%)"),
        ((3, 3, 3), 3, "holds 3 of 3 tokens per layer (100%)"),
        ((312, 312, 312), 502, "holds 312 of 502 tokens per layer (62%)"),
        ((1000, 1000, 999), 1000, "holds 999.7 of 1000 tokens per layer (99.97%)"),
    ],
)
def test_less_than_all_does_not_look_like_all(kv_tokens: tuple[int, ...], n_tokens: int, told: str, evicting: Manifest) -> None:
    assert told in held_note(evicting, generation(kv_tokens, n_tokens))


def test_attended_tokens_are_whole_pages_with_the_protected_ones(recalling: Path) -> None:
    """Of 35 tokens 8 pages: 2 of sinks, 3 of the newest, 3 chosen. Protected pages alone may be more than the budget."""
    manifest = load_manifest(recalling)
    assert attended_tokens(manifest, 60, 90) == [32] * 3
    assert attended_tokens(manifest, 9, 12) == [12] * 3
    larger = dataclasses.replace(manifest, page_size=16)
    assert attended_tokens(larger, 60, 90) == [48] * 3
    assert "a step attends to at most 32 of 90 tokens per layer (36%), the device holds 40" in held_note(
        manifest, generation((40, 40, 40), 90)
    )


def test_corrections_are_not_told_where_nothing_can_be_recalled(recalling: Path) -> None:
    manifest, counts = load_manifest(recalling), RecallStatistics(n_layers=3, n_kv_heads=2, page_head_bytes=8)
    counts.layer_steps_L += 1
    counts.corrected_LK += 1
    assert (
        recall_note(manifest, generation((20,) * 3, 20), counts) == "[nothing could be recalled: a step attends to all tokens]"
    )
    assert "100% of KV heads were corrected" in recall_note(manifest, generation((40,) * 3, 90), counts)


def test_the_commands_tell_what_a_step_attends_to(run: Run, recalling: Path) -> None:
    code, _, err = run("generate", recalling, "the old storm " * 20, "--max-new-tokens", "4")
    assert code == 0
    assert "a step attends to at most 32 of 64 tokens per layer (50%)" in err
    code, _, err = run("generate", recalling, "the old", "--max-new-tokens", "2")
    assert "nothing could be recalled" in err
    code, out, _ = run("inspect", recalling)
    assert "35 tokens in every layer, in whole pages" in out
    assert out.count("25.0%") == 4
    assert "attended  " in out


def test_inspect_tells_the_score_that_a_recipe_comes_from(run: Run, small_folder: Path) -> None:
    assert "recipe    from score " in run("inspect", small_folder)[1]


def test_calibrations_that_tell_little_say_so(run: Run, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """One short prompt for a recipe; prompts within the working set for thresholds."""
    (tmp_path / "one.txt").write_text("the old storm\n")
    (tmp_path / "two.txt").write_text(f"{'the old storm ' * 12}\n{'the narrow tower ' * 30}\n")
    source = ("calibrate", "--checkpoint", small_checkpoint_folder)
    _, _, err = run(*source, "--prompts", "one.txt")
    assert "few or short calibration prompts (1, the longest of 4 tokens)" in err
    assert run(*source, "--prompts", "two.txt")[::2] == (0, "")
    drift = (
        *source,
        "--policy",
        "freekv",
        "--set",
        "tokens=64",
        "sinks=4",
        "recent=4",
        "--new-tokens",
        "3",
        "--page-size",
        "8",
    )
    code, _, err = run(*drift, "--prompts", "two.txt")
    assert code == 0
    assert "1 of 2 calibration prompts are no longer than what a step attends to" in err
