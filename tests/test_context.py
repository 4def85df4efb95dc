"""Engines with a shorter context than their model: RoPE factors, windows, digests, limits."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import LONG_FACTORS, SHORT_FACTORS, write_checkpoint
from tests.dense_reference import decoder_steps, transformers_steps
from tests.engines import Run
from trt_kv.errors import UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.context import in_context
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.manifest import load_manifest
from trt_kv.pipeline.plans import ModelSource
from trt_kv.pipeline.sources import open_source

ORIGINAL = 32
"""Positions of the sample "phi4-mini" before its context was extended to 128."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("longrope") / "phi", "phi4-mini"))


@pytest.mark.parametrize(
    ("context", "factors"), [(128, LONG_FACTORS), (33, LONG_FACTORS), (32, SHORT_FACTORS), (1, SHORT_FACTORS)]
)
def test_the_context_decides_which_factors_a_rope_has(longrope: Checkpoint, context: int, factors: list[float]) -> None:
    config = in_context(longrope, context).config
    assert config.max_positions == context
    assert list(config.rope.factors) == factors
    assert config.rope.attention_factor == longrope.config.rope.attention_factor > 1.0


@torch.no_grad()
def test_within_the_original_context_the_short_factors_are_those_of_transformers(longrope: Checkpoint) -> None:
    prompt = torch.randint(3, 269, (20,), generator=torch.Generator().manual_seed(3))
    expected = list(transformers_steps(longrope.location, prompt, ORIGINAL - len(prompt)))
    tokens = [int(logits[-1].argmax()) for logits in expected[:-1]]
    short, long = (
        torch.cat(list(decoder_steps(decoder_from_checkpoint(checkpoint), prompt, tokens)))
        for checkpoint in (in_context(longrope, ORIGINAL), longrope)
    )
    torch.testing.assert_close(short, torch.cat(expected), atol=1e-4, rtol=0.0)
    assert (long - short).abs().max() > 0.01


def test_a_digest_changes_only_with_the_arithmetic(longrope: Checkpoint, bundled_checkpoint: Checkpoint) -> None:
    assert in_context(bundled_checkpoint, 64).digest == bundled_checkpoint.digest
    assert in_context(longrope, 64).digest == longrope.digest
    assert in_context(longrope, ORIGINAL).digest != longrope.digest


def test_windows_that_are_no_shorter_than_the_context_are_gone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "gemma3"))
    assert set(checkpoint.config.windows) == {0, 9}
    config = in_context(checkpoint, 9).config
    assert config.windows == ()
    assert config.local_rope_layers == checkpoint.config.local_rope_layers
    assert in_context(checkpoint, 10).config.windows == checkpoint.config.windows


@pytest.mark.parametrize("context", [0, 129])
def test_a_context_that_the_model_does_not_have_is_refused(longrope: Checkpoint, context: int) -> None:
    with pytest.raises(UsageError, match=r"--context from 1 to 128"):
        in_context(longrope, context)


def test_an_engine_is_built_in_its_context_and_says_which_factors_it_has(longrope: Checkpoint, run: Run) -> None:
    words = ("build", "--checkpoint", longrope.location, "--policy", "full")
    code, _, err = run(*words, "--context", str(ORIGINAL))
    assert code == 0, err
    assert "with 32 positions it has those for short contexts" in err
    engine = Path("engines/phi-full-context=32")
    manifest = load_manifest(engine)
    assert manifest.config == in_context(longrope, ORIGINAL).config
    assert "--context 32" in manifest.reproduce
    code, _, err = run(*words, "--context", str(ORIGINAL))
    assert (code, "is up to date" in err) == (0, True)
    _, out, _ = run("inspect", engine)
    assert "32 positions" in out
    assert "RoPE: longrope, factors for short contexts; over 12 of 16 channels" in out
    code, _, err = run("generate", engine, "word " * 40)
    assert code == 2
    assert "at most 32" in err
    code, _, err = run(*words, "--context", "0")
    assert (code, "--context >= 1" in err) == (2, True)
    code, _, err = run(*words, "--context", "500")
    assert code == 2
    assert "those for long contexts" not in err


def test_a_model_with_two_sets_of_factors_says_that_the_other_can_be_had(longrope: Checkpoint) -> None:
    notes: list[str] = []
    open_source(ModelSource(model="llama3", checkpoint=str(longrope.location)), notes.append)
    assert "with 128 positions it has those for long contexts; --context 32 takes those for short ones" in " ".join(notes)
