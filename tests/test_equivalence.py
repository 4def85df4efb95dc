"""An engine computes what the model computes: against transformers, against itself without eviction, alone and in batches."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.engines import CACHE_TOKENS, CHUNK, SHARES, assert_nothing_leaked, random_ids
from trt_kv.calibration.tasks import evaluation_tasks, plain_text_tasks
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_from_name
from trt_kv.policy import kept_tokens
from trt_kv.presets import PRESETS
from trt_kv.program import PHASES, program_of
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import ModelRunner

NEW_TOKENS = 32
LOGITS_ATOL = 1e-4
"""fp32 sums in another order; the bundled model's logits reach about 20."""

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts_of_many_lengths() -> list[str]:
    """50 prompts of 1 to about 400 tokens: lone words, sentences, texts, questions about facts, words at random."""
    texts = [task.prompt for task in plain_text_tasks(10, context_length=110, answer_length=20)]
    prompts = [" ".join(text.split()[: 1 + 3 * i]) for i, text in enumerate(texts * 2)]
    prompts += [" ".join(texts[i].split()[: CHUNK + i - 2]) for i in range(5)]
    prompts += [task.prompt for task in evaluation_tasks(15, context_length=150, n_facts=4)]
    prompts += [task.prompt for task in evaluation_tasks(4, context_length=400, n_facts=8)]
    words = sorted(set(" ".join(texts).split()))
    rng = random.Random(0)
    return prompts + [" ".join(rng.choices(words, k=rng.randint(2, 80))) for _ in range(6)]


def generated_by_transformers(model: Any, ids: Sequence[int], eos_token_ids: Sequence[int]) -> list[int]:
    """Greedy continuation, the end-of-sequence token included."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(eos_token_ids),
    )
    return [int(token) for token in output[0, len(ids) :]]


def test_full_generates_what_transformers_generates(full_engine: Engine, bundled_model: transformers.PreTrainedModel) -> None:
    """50 prompts, 32 new tokens each, greedy."""
    prompts = prompts_of_many_lengths()
    lengths = [len(full_engine.encode(prompt)) for prompt in prompts]
    assert len(prompts) == 50
    assert min(lengths) <= 3
    assert {CHUNK - 1, CHUNK, CHUNK + 1} <= set(lengths)
    generations = full_engine.generate_batch(prompts, max_new_tokens=NEW_TOKENS)
    for prompt, ours in zip(prompts, generations, strict=True):
        expected = generated_by_transformers(
            bundled_model, full_engine.encode(prompt), full_engine.manifest.config.eos_token_ids
        )
        assert list(ours.token_ids) == expected, prompt
    assert_nothing_leaked(full_engine)


def test_the_end_token_ends_where_transformers_ends(full_engine: Engine, bundled_model: transformers.PreTrainedModel) -> None:
    """The bundled model never says <eos>, so the full stop and the question mark are declared to be it."""
    eos = tuple(full_engine.encode(". ?")[1:])
    config = dataclasses.replace(full_engine.manifest.config, eos_token_ids=eos)
    manifest = dataclasses.replace(full_engine.manifest, config=config)
    engine = Engine(full_engine.folder, manifest, full_engine.loaded, full_engine.tokenizer)
    prompts = prompts_of_many_lengths()[5:45:4]
    for prompt, ours in zip(prompts, engine.generate_batch(prompts, max_new_tokens=NEW_TOKENS), strict=True):
        expected = generated_by_transformers(bundled_model, engine.encode(prompt), eos)
        assert ours.finish_reason == "stop"
        assert [*ours.token_ids, expected[-1]] == expected
        assert expected[-1] in eos


@dataclasses.dataclass
class Run:
    """A sequence that is stepped through by a runner; keeps what every step made."""

    runner: ModelRunner
    sequence: SequenceCache
    prompt_logits: Floats
    decoded: list[Floats] = dataclasses.field(default_factory=list)
    kept: list[list[set[int]]] = dataclasses.field(default_factory=list)

    @classmethod
    def prefilled(cls, runner: ModelRunner, ids: Sequence[int]) -> "Run":
        sequence = runner.new_sequence()
        run = cls(runner, sequence, runner.prefill(sequence, ids, all_logits=True))
        run.kept.append(run.positions())
        return run

    def decode(self, token_id: int) -> None:
        self.decoded.append(self.runner.decode([self.sequence], [token_id])[0])
        self.kept.append(self.positions())

    def positions(self) -> list[set[int]]:
        """Positions cached in each layer, none twice, the same by all KV heads."""
        of_layers = [self.runner.kept_positions(self.sequence, layer).tolist() for layer in range(self.sequence.n_layers)]
        assert all(len(set(p)) == len(p) for of_heads in of_layers for p in of_heads)
        assert all(set(p) == set(of_heads[0]) for of_heads in of_layers for p in of_heads)
        return [set(of_heads[0]) for of_heads in of_layers]


@pytest.mark.parametrize("n_prompt", [1, 2, 40, CHUNK, CHUNK + 1, 200])
def test_a_budget_of_100_percent_gives_exactly_the_full_logits(
    full_engine: Engine, whole_engine: Engine, n_prompt: int
) -> None:
    """Bit for bit: prefill, then 16 decode steps; scores are accumulated and the eviction op runs, but keeps all."""
    ids = random_ids(full_engine, n_prompt, seed=n_prompt)
    full, whole = (Run.prefilled(engine.runner, ids) for engine in (full_engine, whole_engine))
    for token_id in random_ids(full_engine, 16, seed=7):
        full.decode(token_id)
        whole.decode(token_id)
    np.testing.assert_array_equal(whole.prompt_logits, full.prompt_logits)
    np.testing.assert_array_equal(whole.decoded, full.decoded)
    assert whole.kept == full.kept
    full.sequence.release()
    whole.sequence.release()


def test_onnxruntime_pieces_equal_the_torch_decoder(full_engine: Engine, bundled_checkpoint: Checkpoint) -> None:
    executor = TorchDecoderExecutor(decoder_from_checkpoint(bundled_checkpoint))
    torch_runner = host_runner(executor, full_engine.runner.pool, full_engine.manifest.programs, chunk=CHUNK)
    ids = full_engine.encode(evaluation_tasks(1, context_length=150, n_facts=4)[0].prompt)
    ours, theirs = (Run.prefilled(runner, ids) for runner in (full_engine.runner, torch_runner))
    for token_id in random_ids(full_engine, 8, seed=3):
        ours.decode(token_id)
        theirs.decode(token_id)
    np.testing.assert_allclose(ours.prompt_logits, theirs.prompt_logits, atol=LOGITS_ATOL)
    np.testing.assert_allclose(ours.decoded, theirs.decoded, atol=LOGITS_ATOL)
    ours.sequence.release()
    theirs.sequence.release()


@contextlib.contextmanager
def mask_per_layer(model: Any, masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Hooks that give layer l the attention mask ``masks[l]`` [T, T], True where a query may look."""
    handles = []
    for layer, visible in zip(model.model.layers, masks, strict=True):
        bias = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))[None, None]

        def give_mask(_module: Any, args: Any, kwargs: dict[str, Any], bias: torch.Tensor = bias) -> Any:
            return args, kwargs | {"attention_mask": bias}

        handles.append(layer.self_attn.register_forward_pre_hook(give_mask, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("n_prompt", [30, 150])
def test_after_eviction_tokens_keep_their_true_positions(
    half_engine: Engine, bundled_model: transformers.PreTrainedModel, n_prompt: int
) -> None:
    """Decoding equals transformers run over the whole text with the evicted keys masked, layer by layer, step by step."""
    ids = random_ids(half_engine, n_prompt, seed=11)
    generated = random_ids(half_engine, 40, seed=12)
    run = Run.prefilled(half_engine.runner, ids)
    for token_id in generated:
        run.decode(token_id)
    assert sum(map(len, run.kept[-1])) < 0.65 * len(SHARES) * (n_prompt + len(generated))
    num_computed_tokens = n_prompt + len(generated)
    masks = []
    for layer in range(len(SHARES)):
        visible = torch.ones(num_computed_tokens, num_computed_tokens, dtype=torch.bool).tril_()
        for step, kept in enumerate(run.kept[1:]):
            visible[n_prompt + step] = False
            visible[n_prompt + step, list(kept[layer])] = True
        masks.append(visible)
    with mask_per_layer(bundled_model, masks), torch.no_grad():
        expected_TV = bundled_model(torch.tensor([[*ids, *generated]])).logits[0].numpy()
    np.testing.assert_allclose(run.prompt_logits, expected_TV[:n_prompt], atol=LOGITS_ATOL)
    np.testing.assert_allclose(run.decoded, expected_TV[n_prompt:], atol=LOGITS_ATOL)
    run.sequence.release()


@pytest.fixture(scope="module")
def attended(half_engine: Engine) -> tuple[list[int], np.ndarray]:
    """A prompt, and transformers' own attention weights on it, mean over heads: [L, N queries, N keys]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        PRESETS["llama3"].bundled_folder, dtype="float32", attn_implementation="eager"
    )
    ids = half_engine.encode(evaluation_tasks(1, context_length=200, n_facts=4, seed=5)[0].prompt)
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    return ids, np.stack([weights_1HNN[0].mean(dim=0).numpy() for weights_1HNN in attentions])


def test_the_tokens_kept_are_those_that_transformers_attends_to_most(
    half_engine: Engine, attended: tuple[list[int], np.ndarray]
) -> None:
    """Importance: attention mean over heads, summed over all queries; the first and the last token stay."""
    ids, weights_LNN = attended
    run = Run.prefilled(half_engine.runner, ids)
    n = len(ids)
    for layer, (importance_N, share) in enumerate(zip(weights_LNN.sum(axis=1), SHARES, strict=True)):
        kept = run.kept[0][layer]
        assert len(kept) == kept_tokens(n, share)
        assert {0, n - 1} <= kept
        others = set(range(1, n - 1))
        least_kept = min(importance_N[i] for i in kept & others)
        most_evicted = max(importance_N[i] for i in others - kept)
        assert least_kept > most_evicted - 1e-4
    run.sequence.release()


@pytest.mark.parametrize("window", [0, 1, 8, CHUNK + 9, 500])
def test_importance_is_transformers_attention(window: int, full_engine: Engine, attended: tuple[list[int], np.ndarray]) -> None:
    """Of all queries (window 0), or of the last ``window`` ones, wherever the chunks of the prompt end."""
    ids, weights_LNN = attended
    fields: dict[str, Any] = {"score": "window", "window": window} if window else {}
    policy = dataclasses.replace(policy_from_name("prefixkv_paper"), **fields)
    programs = {phase: program_of(policy, phase=phase, n_layers=len(SHARES), scale=32**-0.5, page_size=32) for phase in PHASES}
    steps = full_engine.runner._executor
    assert isinstance(steps, SplitStepExecutor)
    runner = host_runner(steps.dense, full_engine.runner.pool, programs, chunk=CHUNK)
    expected_LN = weights_LNN[:, -window:].sum(axis=1)
    importance_LKN = runner.importance(ids)
    np.testing.assert_allclose(importance_LKN, np.broadcast_to(expected_LN[:, None], importance_LKN.shape), atol=1e-4)
    assert_nothing_leaked(full_engine)


def test_importance_is_what_eviction_ranks_by(half_engine: Engine) -> None:
    """[L, K, N]: each layer hands out one unit of attention per query; nothing stays in the pool."""
    ids = random_ids(half_engine, 70, seed=33)
    importance_LN = half_engine.runner.importance(ids)[:, 0]
    assert_nothing_leaked(half_engine)
    np.testing.assert_allclose(importance_LN.sum(axis=1), 70, rtol=1e-4)
    run = Run.prefilled(half_engine.runner, ids)
    for importance_N, kept in zip(importance_LN, run.kept[0], strict=True):
        others = set(range(1, 69))
        assert min(importance_N[i] for i in kept & others) >= max(importance_N[i] for i in others - kept) - 1e-5
    run.sequence.release()


def test_the_chunk_size_changes_nothing_but_rounding(half_folder: Path, half_engine: Engine) -> None:
    ids = random_ids(half_engine, 700, seed=21)
    other = Engine.load(half_folder, cache_tokens=CACHE_TOKENS, chunk=512, n_threads=1)
    runs = [Run.prefilled(engine.runner, ids) for engine in (half_engine, other)]
    for run in runs:
        for token_id in random_ids(half_engine, 8, seed=22):
            run.decode(token_id)
    first, second = runs
    np.testing.assert_allclose(first.prompt_logits, second.prompt_logits, atol=LOGITS_ATOL)
    for kept, others in zip(first.kept[0], second.kept[0], strict=True):
        assert len(kept) == len(others)
        assert len(kept - others) <= 1, "rounding may swap two tokens of equal importance, not more"
    np.testing.assert_allclose(first.decoded, second.decoded, atol=0.05)
    first.sequence.release()
    second.sequence.release()


@pytest.mark.parametrize("kind", ["full", "half", "small"])
def test_a_batch_gives_exactly_the_logits_each_sequence_gives_alone(kind: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit over 12 steps, lengths from 1 token to several chunks and pages."""
    engine: Engine = request.getfixturevalue(f"{kind}_engine")
    prompts = [random_ids(engine, n, seed=n) for n in (1, 2, 5, 31, 33, CHUNK, CHUNK + 1, 90)]
    alone = [Run.prefilled(engine.runner, ids) for ids in prompts]
    together = [Run.prefilled(engine.runner, ids).sequence for ids in prompts]
    for step in range(12):
        token_ids = random_ids(engine, len(prompts) + 1, seed=step)[1:]
        logits_BV = engine.runner.decode(together, token_ids)
        for run, token_id, logits_V in zip(alone, token_ids, logits_BV, strict=True):
            run.decode(token_id)
            np.testing.assert_array_equal(logits_V, run.decoded[-1])
    engine.runner.pool.check_integrity(page for s in (*together, *(r.sequence for r in alone)) for page in s.pages)
    for sequence in (*together, *(run.sequence for run in alone)):
        sequence.release()


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 5}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("kind", ["full", "half", "small"])
def test_a_batch_gives_each_prompt_the_tokens_it_gets_alone(kind: str, sampling: Any, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(f"{kind}_engine")
    texts = prompts_of_many_lengths()[4:45:5]
    prompts = [text for text in texts if len(text.split()) < 100]
    together = engine.generate_batch(prompts, max_new_tokens=20, stop=["door"], **sampling)
    assert together == [engine.generate(prompt, max_new_tokens=20, stop=["door"], **sampling) for prompt in prompts]
    assert len({generation.n_prompt_tokens for generation in together}) > 5
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("shares", "n_prompt", "chunk", "page_size", "fields"),
    [
        ((0.3, 1.0, 0.001), 33, 7, 3, {}),
        ((0.5, 0.05, 0.77), 64, 512, 16, {"score": "window", "window": 4, "sinks": 4, "recent": 16}),
        ((0.001, 0.001, 0.3), 90, 32, 100, {"sinks": 0, "recent": 0, "decode_distance": 1}),
        ((0.3, 0.5, 0.77), 17, 1, 1, {"score": "window", "window": 1, "decode_distance": 5}),
        ((0.05, 0.3, 1.0), 1, 16, 4, {}),
        ((0.05, 0.3, 0.9), 3, 2, 5, {"sinks": 2, "recent": 3}),
    ],
    ids=str,
)
def test_kernels_and_references_decode_alike(
    small_engine: Engine, shares: tuple[float, ...], n_prompt: int, chunk: int, page_size: int, fields: dict[str, Any]
) -> None:
    """The same dense parts with either implementation of the KV ops, on uninitialised memory that is poisoned."""
    config = small_engine.manifest.config
    policy = dataclasses.replace(policy_from_name("prefixkv_paper"), **fields)
    programs = {
        phase: program_of(policy, phase=phase, n_layers=3, scale=config.scale, page_size=page_size, kept_shares=shares)
        for phase in PHASES
    }
    steps = small_engine.runner._executor
    assert isinstance(steps, SplitStepExecutor)
    runs = []
    for implementation in ("cpu", "reference"):
        pool = HostKvPool(n_pages=360, page_size=page_size, n_kv_heads=config.n_kv_heads, head_size=config.head_dim)
        pool.kv[:] = pool.scores[:] = np.nan
        pool.token_positions[:] = -(2**40)
        runner = host_runner(
            steps.dense,
            pool,
            programs,
            chunk=chunk,
            decode_distance=policy.decode_distance,
            implementation=implementation,
        )
        run = Run.prefilled(runner, random_ids(small_engine, n_prompt, seed=4))
        for token_id in random_ids(small_engine, 12, seed=5):
            run.decode(token_id)
        pool.check_integrity(run.sequence.pages)
        runs.append(run)
    ours, theirs = runs
    assert ours.kept == theirs.kept
    np.testing.assert_allclose(ours.prompt_logits, theirs.prompt_logits, atol=LOGITS_ATOL)
    np.testing.assert_allclose(ours.decoded, theirs.decoded, atol=LOGITS_ATOL)
