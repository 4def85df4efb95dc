"""KV heads with budgets of their own: what each keeps and attends to, and the pages that it frees."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import SAMPLES, write_checkpoint
from tests.engines import CHUNK, HEAD_SHARES, assert_nothing_leaked, build_for_test, load_for_test, lukv_request, random_ids
from tests.serving import assert_idle, engine_under
from tests.test_native_engine import INT4, LARGE_ENOUGH
from trt_kv.cache_layers import cache_config, cache_policy, heads_apart, layer_name
from trt_kv.cli.inspection import describe_engine
from trt_kv.errors import EngineError, RecipeError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.head_shares import means
from trt_kv.manifest import load_manifest
from trt_kv.model_config import ModelConfig
from trt_kv.policies import policy_from_name, policy_without_floor
from trt_kv.policy import Policy, kept_tokens
from trt_kv.program import PHASES, program_of_model
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.reservation import HostSizing
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import check_policy_for_devices
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import RequestSize

pytestmark = pytest.mark.usefixtures("one_thread")

N_PROMPT, N_NEW = 90, 7
SHARES_K = np.array(HEAD_SHARES)


@pytest.fixture(scope="module")
def engine(small_lukv_folder: Path) -> Iterator[Engine]:
    with load_for_test(small_lukv_folder) as engine:
        yield engine


def dense_of(engine: Engine) -> Any:
    steps = engine.runner._executor
    assert isinstance(steps, SplitStepExecutor)
    return steps.dense


def runner_under(engine: Engine, policy: Policy, shares: Sequence[float] | None, *, implementation: str = "cpu") -> ModelRunner:
    """The dense pieces of ``engine`` with another policy's ops, and a pool of their own."""
    config, page_size = engine.manifest.config, engine.manifest.page_size
    programs = {
        phase: program_of_model(config, policy, phase=phase, page_size=page_size, kept_shares=shares) for phase in PHASES
    }
    cache = cache_config(config, policy)
    pool = HostKvPool(n_pages=300, page_size=page_size, n_kv_heads=cache.n_kv_heads, head_size=cache.head_dim)
    dense = dense_of(engine)
    return host_runner(dense, pool, programs, chunk=CHUNK, decode=policy.decode, implementation=implementation)


def kept_after(runner: ModelRunner, ids: Sequence[int]) -> list[list[list[int]]]:
    """Positions of each KV head of each layer of the cache."""
    sequence = runner.new_sequence()
    runner.prefill(sequence, ids)
    kept = [runner.kept_positions(sequence, layer).tolist() for layer in range(sequence.n_layers)]
    sequence.release()
    return kept


def test_each_head_keeps_what_it_keeps_in_an_engine_where_all_have_its_share(engine: Engine) -> None:
    """The reference has one budget for all, and heads that share their pages."""
    ids = random_ids(engine, N_PROMPT, seed=1)
    policy = engine.manifest.policy
    kept = kept_after(engine.runner, ids)
    together = dataclasses.replace(policy, heads="each")
    for layer, shares in enumerate(HEAD_SHARES):
        for head, share in enumerate(shares):
            expected = kept_after(runner_under(engine, together, [share] * 3), ids)[layer][head]
            (found,) = kept[layer * 2 + head]
            assert found == expected
            assert len(found) == max(kept_tokens(N_PROMPT, share), policy.sinks + policy.recent)


@pytest.mark.parametrize("decode", ["keep", "row", "rank"])
def test_kernels_say_what_the_references_say(engine: Engine, decode: str) -> None:
    policy = dataclasses.replace(engine.manifest.policy, decode=decode)
    shares = SHARES_K.reshape(-1).tolist()
    runners = [runner_under(engine, policy, shares, implementation=name) for name in ("cpu", "reference")]
    ids = random_ids(engine, N_PROMPT, seed=2)
    logits = []
    for runner in runners:
        sequence = runner.new_sequence()
        runner.prefill(sequence, ids)
        logits.append([runner.decode([sequence], [token]) for token in random_ids(engine, N_NEW, seed=3)])
    np.testing.assert_allclose(np.stack(logits[0]), np.stack(logits[1]), atol=1e-4)


def masked_logits(folder: Path, ids: Sequence[int], kept: Sequence[Sequence[int]], config: ModelConfig) -> np.ndarray:
    """Logits of the tokens after the prompt: the torch decoder over all tokens at once, where a KV head's later queries see the
    prompt tokens ``kept`` by it, by layer and head, and the tokens after the prompt.
    """
    decoder = decoder_from_checkpoint(open_checkpoint(folder), torch.float32)
    n, group = len(ids), config.group_size

    def attend(layer: int, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor) -> torch.Tensor:
        outs = []
        for head in range(config.n_heads):
            visible = torch.ones(n, n, dtype=torch.bool).tril()
            evicted = np.setdiff1d(np.arange(N_PROMPT), kept[layer * config.n_kv_heads + head // group])
            visible[N_PROMPT:, evicted] = False
            logits = q_NHD[:, head] @ k_NKD[:, head // group].T * config.scale
            outs.append(torch.softmax(logits.masked_fill(~visible, -torch.inf), -1) @ v_NKD[:, head // group])
        return torch.stack(outs, 1)

    with torch.no_grad():
        tokens = torch.tensor(ids)
        logits: torch.Tensor = decoder(tokens, torch.arange(n), torch.arange(N_PROMPT, n), attend)
    return logits.numpy()


def test_logits_are_those_of_a_whole_model_whose_heads_see_what_they_keep(
    engine: Engine, small_checkpoint_folder: Path
) -> None:
    runner = runner_under(engine, dataclasses.replace(engine.manifest.policy, decode="keep"), SHARES_K.reshape(-1).tolist())
    ids, fed = random_ids(engine, N_PROMPT, seed=4), random_ids(engine, N_NEW, seed=5)
    kept = [heads[0] for heads in kept_after(runner, ids)]
    sequence = runner.new_sequence()
    runner.prefill(sequence, ids)
    logits = np.concatenate([runner.decode([sequence], [token]) for token in fed])
    expected = masked_logits(small_checkpoint_folder, [*ids, *fed], kept, engine.manifest.config)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_heads_free_their_own_pages(engine: Engine) -> None:
    """Fewer than with the largest share of each layer for both of its heads, which pages that heads share would need."""
    pool, size = engine.runner.pool, engine.manifest.page_size
    before = pool.n_free
    sequence = engine.runner.new_sequence()
    engine.runner.prefill(sequence, random_ids(engine, N_PROMPT, seed=6))
    held = before - pool.n_free
    n_kept = np.maximum(5, [[kept_tokens(N_PROMPT, share) for share in shares] for shares in HEAD_SHARES])
    assert sequence.kv_len.tolist() == n_kept.reshape(-1).tolist()
    assert held == (-(-n_kept // size)).sum()
    assert held < (-(-n_kept.max(axis=1) // size)).sum() * 2
    # A page holds one head's tokens.
    assert pool.page_bytes == size * (2 * 16 * 4 + 8 + 4)
    sequence.release()
    assert_nothing_leaked(engine)


def test_requests_reserve_what_the_heads_keep(engine: Engine) -> None:
    manifest, size = engine.manifest, RequestSize(n_prompt=N_PROMPT, max_new_tokens=N_NEW)
    together = dataclasses.replace(manifest.policy, heads="each")
    largest = [max(shares) for shares in HEAD_SHARES]

    def decoding_bytes(policy: Policy, shares: Sequence[float]) -> int:
        config = manifest.config
        programs = {phase: program_of_model(config, policy, phase=phase, page_size=5, kept_shares=shares) for phase in PHASES}
        sizing = HostSizing(cache_config(config, policy), policy, programs, page_size=5, kv_dtype="float32")
        return sizing.after_reading(size).pool_bytes

    apart = decoding_bytes(manifest.policy, SHARES_K.reshape(-1).tolist())
    assert apart < 0.75 * decoding_bytes(together, largest)


def test_generation_tells_what_each_head_holds(engine: Engine) -> None:
    prompts = [random_ids(engine, n, seed=n) for n in (40, 73, 12)]
    alone = [engine.generate(prompt, max_new_tokens=6) for prompt in prompts]
    together = engine.generate_batch(prompts, max_new_tokens=6)
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert all(len(result.kv_tokens) == 6 for result in together)
    assert_nothing_leaked(engine)


def test_a_decode_step_in_one_call_has_the_bits_of_one_layer_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense layers in kernels of our own, of a model with three KV heads."""
    with monkeypatch.context() as patch:
        patch.setitem(SAMPLES, "large-enough", LARGE_ENOUGH)
        checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", "large-enough"))
    shares = ((0.5, 0.2, 0.8), (0.3, 0.3, 0.9), (0.1, 1.0, 0.6))
    request = dataclasses.replace(lukv_request(checkpoint, shares), page_size=5, quantization=INT4)
    folder = build_for_test(request, tmp_path / "engine")
    with Engine.load(folder, cache_tokens=900, n_threads=1, chunk=16) as engine:
        assert "own kernels" in engine.runner.description
        prompts = [random_ids(engine, n, seed=n) for n in (50, 17)]

        def decoded() -> np.ndarray:
            sequences = [engine.runner.new_sequence() for _ in prompts]
            for sequence, prompt in zip(sequences, prompts, strict=True):
                engine.runner.prefill(sequence, prompt)
            logits = np.stack([engine.runner.decode(sequences, [token, token]) for token in (5, 9, 30)])
            for sequence in sequences:
                sequence.release()
            return logits

        whole = decoded()
        monkeypatch.setattr(engine.runner._executor, "_attention", None)
        np.testing.assert_array_equal(whole, decoded())


def test_an_engine_tells_the_shares_of_its_heads(small_lukv_folder: Path) -> None:
    manifest, told = load_manifest(small_lukv_folder), describe_engine(small_lukv_folder)
    np.testing.assert_allclose(manifest.kept_shares, SHARES_K.reshape(-1), atol=1e-6)
    assert "kept share per layer and KV head (from recipe.json)" in told
    assert "  2.1 " in told
    assert not (small_lukv_folder / "graphs" / "whole_layers.onnx").exists()


def test_other_targets_and_devices_are_refused(small_lukv_folder: Path, small_checkpoint_folder: Path) -> None:
    manifest = load_manifest(small_lukv_folder)
    with pytest.raises(UsageError, match="runs on a CPU only"):
        check_policy_for_devices(small_lukv_folder, manifest)
    request = lukv_request(open_checkpoint(small_checkpoint_folder), HEAD_SHARES)
    with pytest.raises(UsageError, match="ONNX Runtime on a CPU"):
        dataclasses.replace(request, dtype="float16")


def test_policies_in_which_a_part_would_be_ignored_are_refused() -> None:
    for name, what in (
        ("freekv", "heads applies only to scores computed from attention"),
        ("pyramidkv", "to each layer, not to each KV head"),
    ):
        with pytest.raises(UsageError) as refused:
            dataclasses.replace(policy_from_name(name), heads="own")
        assert what in str(refused.value)


def test_a_recipe_for_other_heads_is_refused(small_checkpoint_folder: Path) -> None:
    checkpoint = open_checkpoint(small_checkpoint_folder)
    request = lukv_request(checkpoint, tuple((a, b, 0.5) for a, b in HEAD_SHARES))
    with pytest.raises(RecipeError, match="another number of KV heads"):
        _ = request.kept_shares


def test_a_changed_recipe_is_noticed(small_lukv_folder: Path, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """Other shares with the same means, as a digest that was made again would not tell."""
    from trt_kv.runtime.compatibility import check_recipe

    turned = tuple((b, a) for a, b in HEAD_SHARES)
    assert means(turned) == means(HEAD_SHARES)
    recipe = lukv_request(open_checkpoint(small_checkpoint_folder), turned).recipe
    assert recipe is not None
    recipe.save(tmp_path / "recipe.json")
    with pytest.raises(EngineError, match=r"does not apply its recipe.json"):
        check_recipe(tmp_path, load_manifest(small_lukv_folder))


def test_heads_of_their_own_work_without_a_recipe_and_with_exempt_layers(small_checkpoint_folder: Path) -> None:
    """With the share of their layer a head keeps what it keeps with the others."""
    checkpoint = open_checkpoint(small_checkpoint_folder)
    policy = dataclasses.replace(policy_without_floor("snapkv"), heads="own", exempt_layers=(1,), window=8, recent=8)
    config = checkpoint.config
    programs = {phase: program_of_model(config, policy, phase=phase, page_size=5) for phase in PHASES}
    assert [len(nodes) for nodes in programs["prefill"]] == [3, 3, 1, 1, 3, 3]
    assert cache_policy(policy, heads_apart(config, policy)).exempt_layers == (2, 3)
    assert [layer_name(layer, 2) for layer in (2, 3)] == ["1.0", "1.1"]
    with pytest.raises(UsageError, match="does not have"):
        program_of_model(config, dataclasses.replace(policy, exempt_layers=(3,)), phase="prefill", page_size=5)
    assert EngineRequest(checkpoint=checkpoint, policy=policy).kept_shares is None


def test_layers_with_a_window_keep_it_for_each_head(small_checkpoint_folder: Path) -> None:
    config = dataclasses.replace(open_checkpoint(small_checkpoint_folder).config, windows=(0, 11, 0))
    programs = {
        phase: program_of_model(config, policy_without_floor("lukv"), phase=phase, page_size=5, kept_shares=(0.5, 0.5, 0.5))
        for phase in PHASES
    }
    windows = [nodes[0].attributes["window"] for nodes in programs["decode"]]
    assert windows == [0, 0, 11, 11, 0, 0]
    assert [len(nodes) for nodes in programs["prefill"]] == [3, 3, 1, 1, 3, 3]


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "evicts while it reads": ("lukv", {"evict": "while_reading", "reserve": 6}),
    "draws generated pages": ("lukv", {"decode": "draw", "draw_tokens": 8}),
    "finds its budgets": ("reach", {"heads": "own"}),
    "ranks while it decodes": ("h2o", {"heads": "own"}),
    "constant": ("lukv", {"budget": "constant", "tokens": 30, "kept": 1.0}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_heads_apart_go_with_the_other_parts_of_policies(name: str, small_engine: Engine) -> None:
    """A request gets the same alone and in company, and a conversation goes on from what the heads kept."""
    preset, settings = OTHERS[name]
    policy = dataclasses.replace(policy_without_floor(preset), **settings)
    with engine_under(small_engine, policy, chunk=16) as engine:
        prompts = [random_ids(engine, n, seed=n) for n in (61, 23, 47)]
        alone = [engine.generate(prompt, max_new_tokens=16) for prompt in prompts]
        assert engine.generate_batch(prompts, max_new_tokens=16) == alone
        assert max(alone[0].kv_tokens) > min(alone[0].kv_tokens) or name == "constant"
        assert_idle(engine)
        session = engine.session(mode="compressed", max_new_tokens=4)
        session.generate(prompts[0])
        assert len(session.generate(prompts[1]).kv_tokens) == 6
