"""Conversations that go on from what was kept: incremental eviction, against a plain implementation of its definition.

L layers, H query heads, K KV heads, D head size, N new tokens, S held tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.serving import assert_idle, engine_under, prompts_of, small_policy
from tests.windowed_models import CONFIG, random_decoder, windowed_runner
from trt_kv.errors import CapacityError, UsageError
from trt_kv.layer_budget import layer_budgets
from trt_kv.plugins.paging import Floats
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import RequestSize

COMMON: dict[str, Any] = {"summary": "of a test", "sinks": 2, "recent": 3, "decode": "keep"}
POLICIES = [
    Policy(name="window", score="window", window=6, pooling=3, heads="each", budget="uniform", kept=0.4, **COMMON),
    Policy(name="mass", score="mass", budget="recipe", kept=0.4, **COMMON),
    Policy(name="mean_mass", score="mean_mass", heads="each", budget="uniform", kept=0.3, **COMMON),
    Policy(name="constant", score="mass", heads="each", budget="constant", tokens=12, **COMMON),
    Policy(name="newest", score="position", budget="uniform", kept=0.3, **COMMON),
    Policy(name="recent_share", score="window", window=4, budget="uniform", kept=0.5, recent_share=0.3, **COMMON),
    Policy(name="full", summary="everything"),
]
SHARES = (0.3, 0.5, 0.4)
TURNS = (31, 9, 1, 22, 4)
"""Tokens that are read in each turn."""
N_ANSWER = 3
CLOSE = 2e-4


@dataclasses.dataclass
class Held:
    """What one KV head of a layer holds, in order of position."""

    positions: list[int]
    k: list[Floats]
    v: list[Floats]
    scores: list[float]


class PlainConversation:
    """Lists of tokens, one turn after another: an ``Attend`` that attends to all that it holds, scores it and evicts."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._budgets = layer_budgets(policy, CONFIG.n_layers, SHARES if policy.needs_recipe else None)
        self._held = [[Held([], [], [], []) for _ in range(CONFIG.n_kv_heads)] for _ in range(CONFIG.n_layers)]
        self._n_seen = 0
        self._last_prompt = -1
        self._reads = False

    def read_in_chunks(self, ids: Sequence[int], chunk: int) -> Floats:
        """Read a prompt and evict after each chunk, down to the budget of the whole prompt and the reserve."""
        n_last = (len(ids) - 1) % chunk + 1
        for start in range(0, len(ids) - n_last, chunk):
            self.read(ids[start : start + chunk], n_prompt=len(ids), reserve=self._policy.reserve)
        return self.read(ids[-n_last:], n_prompt=len(ids))

    def read(self, ids: Sequence[int], *, n_prompt: int | None = None, reserve: int = 0) -> Floats:
        """Read a turn's tokens, then evict; the last one's logits. ``n_prompt``: the tokens that budgets are of, if these are
        not those seen.
        """
        for head in (head for layer in self._held for head in layer):
            if self._policy.score == "window":
                head.scores = [0.0] * len(head.scores)
            if self._policy.score == "mean_mass":
                counts = [max(1, self._last_prompt - position + 1) for position in head.positions]
                head.scores = [score * count for score, count in zip(head.scores, counts, strict=True)]
        self._reads = True
        logits = self._run(ids)
        self._last_prompt = self._n_seen - 1
        for budget, layer in zip(self._budgets, self._held, strict=True):
            for head in layer:
                self._finish(head)
                self._evict(head, min(len(head.positions), budget.of(n_prompt or self._n_seen) + reserve))
        return logits

    def say(self, token: int) -> Floats:
        """Generate after one more token."""
        self._reads = False
        return self._run([token])

    def positions(self, layer: int) -> list[list[int]]:
        return [head.positions for head in self._held[layer]]

    def _run(self, ids: Sequence[int]) -> Floats:
        positions = torch.arange(self._n_seen, self._n_seen + len(ids))
        self._n_seen += len(ids)
        with torch.inference_mode():
            logits: Floats = random_decoder()(torch.tensor(ids), positions, torch.tensor([len(ids) - 1]), self._attend).numpy()
        row: Floats = logits[0]
        return row

    def _attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        q, k, v = (x.double().numpy() for x in (q_NHD, k_NKD, v_NKD))
        n_new, group = len(q), CONFIG.group_size
        new = range(self._n_seen - n_new, self._n_seen)
        out = np.empty(q.shape)
        weights: list[np.ndarray] = []
        for number, head in enumerate(self._held[layer]):
            head.positions += new
            head.k += list(k[:, number])
            head.v += list(v[:, number])
            head.scores += [0.0] * n_new
            visible_NS = np.array(head.positions) <= np.array(new)[:, None]
            for h in range(number * group, (number + 1) * group):
                logits_NS = np.where(visible_NS, q[:, h] @ np.array(head.k).T * CONFIG.scale, -np.inf)
                weights_NS = np.exp(logits_NS - logits_NS.max(axis=1, keepdims=True))
                weights_NS /= weights_NS.sum(axis=1, keepdims=True)
                out[:, h] = weights_NS @ np.array(head.v)
                weights.append(weights_NS)
        if self._reads and self._policy.reads_attention:
            n_counted = min(n_new, self._policy.window) if self._policy.score == "window" else n_new
            for number, head in enumerate(self._held[layer]):
                own = weights[number * group : (number + 1) * group] if self._policy.heads == "each" else weights
                received_S = np.mean(own, axis=0)[n_new - n_counted :].sum(axis=0)
                head.scores = [score + float(more) for score, more in zip(head.scores, received_S, strict=True)]
        return torch.from_numpy(out).to(q_NHD.dtype)

    def _finish(self, head: Held) -> None:
        policy = self._policy
        if policy.score == "mean_mass":
            counts = [max(1, self._last_prompt - position + 1) for position in head.positions]
            head.scores = [score / count for score, count in zip(head.scores, counts, strict=True)]
        if policy.pooling > 1:
            end = sum(position <= self._last_prompt - policy.window for position in head.positions)
            padded = np.pad(head.scores[:end], policy.pooling // 2)
            head.scores[:end] = [float(padded[i : i + policy.pooling].mean()) for i in range(end)]

    def _evict(self, head: Held, target: int) -> None:
        policy, n = self._policy, len(head.positions)
        if not policy.evicts:
            return
        recent = max(policy.recent, int(float(np.float32(policy.recent_share)) * max(0, target - policy.sinks)))
        n_kept = min(n, max(target, policy.sinks + recent))
        others = range(policy.sinks, n - recent)
        worth = (lambda at: at) if policy.score == "position" else (lambda at: head.scores[at])
        best = sorted(others, key=lambda at: -worth(at))[: max(0, n_kept - policy.sinks - recent)]
        kept = sorted({*range(min(n, policy.sinks)), *range(max(0, n - recent), n), *best})
        for name in ("positions", "k", "v", "scores"):
            values = getattr(head, name)
            setattr(head, name, [values[at] for at in kept])


def kept_positions(runner: ModelRunner, sequence: Any, layer: int) -> list[list[int]]:
    positions: list[list[int]] = np.sort(runner.kept_positions(sequence, layer)).tolist()
    return positions


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize(("page_size", "chunk"), [(4, 64), (5, 7)])
def test_turns_keep_what_their_definition_says(policy: Policy, page_size: int, chunk: int) -> None:
    shares = SHARES if policy.needs_recipe else None
    runner = windowed_runner(CONFIG, policy, page_size=page_size, chunk=chunk, kept_shares=shares)
    plain = PlainConversation(policy)
    rng = np.random.default_rng(3)
    sequence = runner.new_sequence()
    for n_tokens in TURNS:
        ids = rng.integers(0, CONFIG.vocab_size, n_tokens).tolist()
        np.testing.assert_allclose(runner.prefill(sequence, ids), plain.read(ids), atol=CLOSE, rtol=CLOSE)
        for layer in range(CONFIG.n_layers):
            assert kept_positions(runner, sequence, layer) == plain.positions(layer)
        for token in rng.integers(0, CONFIG.vocab_size, N_ANSWER).tolist():
            np.testing.assert_allclose(runner.decode([sequence], [token])[0], plain.say(token), atol=CLOSE, rtol=CLOSE)
        state = runner.states.read(sequence)
        sequence.release()
        runner.pool.check_integrity([])
        runner.pool.kv[:] = np.nan
        runner.pool.scores[:] = np.nan
        sequence = runner.new_sequence()
        runner.states.place(sequence, state)
    if policy.evicts:
        assert max(len(held) for held in plain.positions(0)) < sum(TURNS) / 2 + N_ANSWER * len(TURNS)


BOUNDED = [policy for policy in POLICIES if policy.evicts]


@pytest.mark.parametrize("reserve", [0, 9])
@pytest.mark.parametrize("policy", BOUNDED, ids=lambda policy: policy.name)
def test_bounded_reading_keeps_what_its_definition_says(policy: Policy, reserve: int) -> None:
    policy = dataclasses.replace(policy, evict="while_reading", reserve=reserve)
    shares = SHARES if policy.needs_recipe else None
    runner = windowed_runner(CONFIG, policy, page_size=4, chunk=11, kept_shares=shares)
    plain = PlainConversation(policy)
    sequence = runner.new_sequence()
    ids = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 60).tolist()
    np.testing.assert_allclose(runner.prefill(sequence, ids), plain.read_in_chunks(ids, 11), atol=CLOSE, rtol=CLOSE)
    for layer in range(CONFIG.n_layers):
        assert kept_positions(runner, sequence, layer) == plain.positions(layer)
    for token in (3, 4, 5):
        np.testing.assert_allclose(runner.decode([sequence], [token])[0], plain.say(token), atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("name", ["prefixkv_paper", "h2o", "snapkv", "streamingllm"])
def test_a_prompt_is_read_in_the_memory_of_its_budget(name: str, small_engine: Engine) -> None:
    """In pools of exactly the reserved size, in which the whole prompt has no room; and each request is as it is alone."""
    at_end = policy_with(small_policy(name), {"budget": "uniform", "kept": 0.2})
    while_reading = policy_with(at_end, {"evict": "while_reading", "reserve": 10})
    prompts = prompts_of(small_engine, (120, 80, 40))
    with engine_under(small_engine, while_reading) as roomy:
        alone = [roomy.generate(prompt, max_new_tokens=6) for prompt in prompts]
        (_, pages) = roomy.core.reservation.resources
        n_pages = pages.while_reading(RequestSize(n_prompt=120, max_new_tokens=6))
    n_layers, page_size = len(small_engine.manifest.programs["prefill"]), small_engine.manifest.page_size
    tokens = -(-n_pages // n_layers) * page_size
    assert tokens < 110
    with engine_under(small_engine, while_reading, cache_tokens=tokens) as tight:
        assert tight.generate_batch(prompts, max_new_tokens=6) == alone
        assert_idle(tight)
    with engine_under(small_engine, at_end, cache_tokens=tokens) as whole, pytest.raises(CapacityError, match="too small"):
        whole.generate(prompts[0], max_new_tokens=6)


def test_what_bounded_reading_cannot_be_combined_with_is_refused(small_engine: Engine) -> None:
    for preset in ("refreekv", "full", "freekv"):
        with pytest.raises(UsageError, match="evict"):
            policy_with(small_policy(preset), {"evict": "while_reading"})
    with pytest.raises(UsageError, match="reserve"):
        policy_with(small_policy("snapkv"), {"reserve": 5})
    bounded = policy_with(small_policy("snapkv"), {"evict": "while_reading"})
    with pytest.raises(UsageError, match="cannot reuse prefixes"):
        engine_under(small_engine, bounded, prefix_cache=True, prefix_bytes=1000)
    with engine_under(small_engine, bounded, prefix_cache=True) as engine:
        assert engine.core.prefixes is None
