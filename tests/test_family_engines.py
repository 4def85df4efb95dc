"""Engines of every family compute what transformers computes: checkpoint -> graphs -> ONNX Runtime, prompt and decoding.

Under a policy that evicts, what it left is attended to as it would be in plain masked attention; under one that recalls, the
ops' references choose and attend likewise.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import FAMILY_SAMPLES, write_checkpoint
from tests.dense_reference import transformers_steps
from tests.engines import build_for_test
from tests.windowed_models import dense_logits
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import GRAPHS
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_without_floor
from trt_kv.runtime.backends.cuda.weights import decoder_from_engine
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import ModelRunner

ATOL = 1e-4
"""Between fp32 implementations whose sums run in different orders; logits here spread over several units."""
N_PROMPT, N_DECODED = 37, 32
PAGE_SIZE, CHUNK = 5, 16
EVICTING: dict[str, Any] = {"kept": 0.4, "window": 6, "pooling": 3, "recent": 6}
ROOMY: dict[str, Any] = {"tokens": 200, "sinks": 2, "recent": 5}
TIGHT: dict[str, Any] = {**ROOMY, "tokens": 15}

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.early]


def samples(*by_default: str) -> list[Any]:
    """Every sample; all except ``by_default`` are slow ones."""
    return [pytest.param(name, marks=[] if name in by_default else pytest.mark.slow) for name in FAMILY_SAMPLES]


def checkpoint_and_tokens(tmp_path: Path, sample: str) -> tuple[Checkpoint, list[int], Floats]:
    """A random checkpoint, a text of N_PROMPT + N_DECODED tokens of which transformers chose the last ones, and its logits."""
    folder = write_checkpoint(tmp_path / "checkpoint", sample)
    checkpoint = open_checkpoint(folder)
    prompt = torch.randint(3, checkpoint.config.vocab_size, (N_PROMPT,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        steps = [logits.numpy() for logits in transformers_steps(folder, prompt, N_DECODED)]
    return checkpoint, [*prompt.tolist(), *(int(logits[-1].argmax()) for logits in steps[:-1])], np.concatenate(steps)


def engine_of(checkpoint: Checkpoint, folder: Path, policy: str, **changes: Any) -> Engine:
    request = EngineRequest(
        checkpoint=checkpoint, policy=dataclasses.replace(policy_without_floor(policy), **changes), page_size=PAGE_SIZE
    )
    return Engine.load(build_for_test(request, folder), cache_tokens=200, chunk=CHUNK, n_threads=1)


def logits_of(runner: ModelRunner, tokens: Sequence[int]) -> Floats:
    """[N, V], the prompt's in chunks, then token by token."""
    sequence = runner.new_sequence()
    got = [runner.prefill(sequence, tokens[:N_PROMPT], all_logits=True)]
    got += [runner.decode([sequence], [token]) for token in tokens[N_PROMPT:]]
    sequence.release()
    return np.concatenate(got)


@pytest.mark.parametrize("sample", samples("phi4-mini"))
def test_an_engine_that_keeps_everything_equals_transformers(sample: str, tmp_path: Path) -> None:
    checkpoint, tokens, expected = checkpoint_and_tokens(tmp_path, sample)
    engine = engine_of(checkpoint, tmp_path / "engine", "full")
    np.testing.assert_allclose(logits_of(engine.runner, tokens), expected, atol=ATOL, rtol=0)
    loaded = decoder_from_engine(engine.folder / GRAPHS, checkpoint.config, dtype=torch.float32, device=torch.device("cpu"))
    for name, weight in decoder_from_checkpoint(checkpoint).state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("sample", samples("gemma2"))
def test_an_engine_that_evicts_equals_attention_to_what_is_left(sample: str, tmp_path: Path) -> None:
    """The prompt's logits are those of transformers; a generated token sees what was kept, or its window, and later tokens."""
    checkpoint, tokens, expected = checkpoint_and_tokens(tmp_path, sample)
    config, n = checkpoint.config, len(tokens)
    runner = engine_of(checkpoint, tmp_path / "engine", "snapkv", **EVICTING).runner
    sequence = runner.new_sequence()
    got = [runner.prefill(sequence, tokens[:N_PROMPT], all_logits=True)]
    seen = {}
    for layer in set(range(config.n_layers)) - set(config.windowed_layers):
        held = runner.kept_positions(sequence, layer)
        assert all(len(positions) < 0.7 * N_PROMPT for positions in held)
        seen[layer] = np.tril(np.ones((config.n_kv_heads, n, n), bool))
        for head, positions in enumerate(held):
            seen[layer][head, N_PROMPT:, :N_PROMPT] = False
            seen[layer][head, N_PROMPT:, positions] = True
    got += [runner.decode([sequence], [token]) for token in tokens[N_PROMPT:]]
    masked = dense_logits(config, tokens, seen, decoder=decoder_from_checkpoint(checkpoint))
    np.testing.assert_allclose(got[0], expected[:N_PROMPT], atol=ATOL, rtol=0)
    # Twice, as the rounding of a chunk reaches all later tokens.
    np.testing.assert_allclose(np.concatenate(got), masked, atol=2 * ATOL, rtol=0)
    if seen:
        assert np.abs(masked - expected).max() > 100 * ATOL


@pytest.mark.parametrize("sample", samples("gemma3"))
def test_an_engine_that_recalls_equals_transformers_if_it_may_and_the_references_if_not(sample: str, tmp_path: Path) -> None:
    checkpoint, tokens, expected = checkpoint_and_tokens(tmp_path, sample)
    config = checkpoint.config
    decoder = TorchDecoderExecutor(decoder_from_checkpoint(checkpoint))
    for name, changes in (("roomy", ROOMY), ("tight", TIGHT)):
        engine = engine_of(checkpoint, tmp_path / name, "freekv", **changes)
        pool = HostKvPool(
            n_pages=200,
            page_size=PAGE_SIZE,
            n_kv_heads=config.n_kv_heads,
            head_size=config.head_dim,
            n_query_heads=config.n_heads,
        )
        references = host_runner(decoder, pool, engine.manifest.programs, implementation="reference", chunk=CHUNK)
        by_references, got = logits_of(references, tokens), logits_of(engine.runner, tokens)
        engine.close()
        np.testing.assert_allclose(got, by_references, atol=ATOL, rtol=0)
        if name == "roomy":
            np.testing.assert_allclose(got, expected, atol=ATOL, rtol=0)
        elif not all(config.windows or [0]):
            assert np.abs(got - expected).max() > 100 * ATOL
