"""Engines of every family compute what transformers computes: checkpoint -> graphs -> ONNX Runtime, prompt and decoding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import FAMILY_SAMPLES, write_checkpoint
from tests.dense_reference import transformers_steps
from tests.engines import build_for_test
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.policies import policy_from_name
from trt_kv.runtime.engine import Engine

ATOL = 1e-4
"""Between fp32 implementations whose sums run in different orders; logits here spread over several units."""
N_PROMPT, N_DECODED = 37, 32
PAGE_SIZE, CHUNK = 5, 16
BY_DEFAULT = ("olmo2", "phi4-mini")
"""Samples of the default run; the others are slow ones."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "sample", [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in FAMILY_SAMPLES]
)
@torch.no_grad()
def test_an_engine_that_keeps_everything_equals_transformers(sample: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", sample)
    checkpoint = open_checkpoint(folder)
    prompt = torch.randint(3, checkpoint.config.vocab_size, (N_PROMPT,), generator=torch.Generator().manual_seed(5))
    expected = [logits.numpy() for logits in transformers_steps(folder, prompt, N_DECODED)]
    request = EngineRequest(checkpoint=checkpoint, policy=policy_from_name("full"), page_size=PAGE_SIZE)
    engine = Engine.load(build_for_test(request, tmp_path / "engine"), cache_tokens=200, chunk=CHUNK, n_threads=1)
    sequence = engine.runner.new_sequence()
    got = [engine.runner.prefill(sequence, prompt.tolist(), all_logits=True)]
    got += [engine.runner.decode([sequence], [int(logits[-1].argmax())]) for logits in expected[:-1]]
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(expected), atol=ATOL, rtol=0)
