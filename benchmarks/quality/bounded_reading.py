"""What it costs to evict while a prompt is read: a fact somewhere in prose, asked for at the end.

SmolLM2 with int4 weights, policies in turn on the same prompts. A prompt is evicted from after each chunk, before the question
has been read, down to the budget of the whole prompt and a reserve.
"""

import dataclasses
from pathlib import Path

from benchmarks.harness import BenchmarkError, Check, Report, Row, rounded
from benchmarks.models import host_pool, programs_of
from benchmarks.peers.subjects import bundled, engine_for, smollm2
from benchmarks.serving_peers.prompts import Prompt, facts_in_prose
from trt_kv.policies import policy_from_name, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import DEFAULT_CHUNK

KEPT = 0.2
N_ANSWER = 6
RANKED = {
    "window, pooled (pooledwindow)": policy_with(policy_without_floor("prefixkv"), {"budget": "uniform", "kept": KEPT}),
    "attention of all queries (h2o)": policy_with(policy_without_floor("h2o"), {"kept": KEPT}),
    "newest (streamingllm)": policy_with(policy_without_floor("streamingllm"), {"budget": "uniform", "kept": KEPT}),
}
RESERVES = (0, 512)


def run(folder: Path, *, quick: bool) -> Report:
    """Each policy in turn on the same prompts; quick: one short prompt."""
    n, n_tokens = (1, 600) if quick else (6, 1800)
    folder = engine_for(bundled() if quick else smollm2(), {"policy": "full", "quant": "int4"})
    with Engine.load(folder, prefix_cache=False, cache_tokens=64) as engine:
        prompts = facts_in_prose(engine.tokenizer, n, n_tokens=n_tokens, seed=5)
        sides: list[tuple[str, str, Policy]] = [("everything", "", policy_from_name("full"))]
        for name, policy in RANKED.items():
            sides.append((name, "after reading", policy))
            sides += [
                (name, f"while reading, reserve {reserve}", dataclasses.replace(policy, evict="while_reading", reserve=reserve))
                for reserve in (RESERVES[-1:] if quick else RESERVES)
            ]
        rows = [_row(engine, prompts, *side) for side in sides]
    if not quick and rows[0]["right_percent"] < 50:
        raise BenchmarkError("the model cannot answer these prompts with its whole cache", got=rows[0])
    return Report(
        title="Eviction while a prompt is read",
        settings={
            "model": "smollm2",
            "weights": "int4",
            "kept": KEPT,
            "chunk": DEFAULT_CHUNK,
            "prompts": n,
            "tokens": n_tokens,
        },
        checks=[
            Check(what="prompts longer than asked for", error=sum(len(p.token_ids) > n_tokens for p in prompts), allowed=0)
        ],
        tables={"a fact in prose, asked for at the end": rows},
    )


def _row(engine: Engine, prompts: list[Prompt], ranked_by: str, evicted: str, policy: Policy) -> Row:
    dense = engine.runner._executor
    assert isinstance(dense, SplitStepExecutor)
    config = engine.manifest.config
    pool = host_pool(config, max(len(prompt.token_ids) for prompt in prompts) + 64)
    runner = host_runner(
        dense.dense,
        pool,
        programs_of(policy, config, page_size=pool.page_size),
        decode=policy.decode,
        decode_distance=policy.decode_distance,
        reading_reserve=policy.reading_reserve,
    )
    n_right, held, most = 0, 0.0, 0
    for prompt in prompts:
        sequence = runner.new_sequence()
        logits = runner.prefill(sequence, prompt.token_ids)
        most = max(most, _most_held(len(prompt.token_ids), policy))
        held += float(sequence.held_tokens.mean()) / len(prompt.token_ids)
        said: list[int] = []
        for _ in range(N_ANSWER):
            said.append(int(logits.argmax()))
            logits = runner.decode([sequence], said[-1:])[0]
        sequence.release()
        n_right += engine.tokenizer.decode(said).strip().startswith(str(prompt.answer))
    return {
        "ranked_by": ranked_by,
        "evicted": evicted or "never",
        "right_percent": rounded(100 * n_right / len(prompts)),
        "held_percent": rounded(100 * held / len(prompts)),
        "most_tokens_while_reading": most,
    }


def _most_held(n_prompt: int, policy: Policy) -> int:
    """Tokens of a layer at the most, while a prompt is read in chunks."""
    if policy.reading_reserve is None:
        return n_prompt
    return min(n_prompt, round(policy.kept * n_prompt) + policy.reading_reserve + DEFAULT_CHUNK)
