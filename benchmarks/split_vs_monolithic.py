"""What cutting the graph at its KV ops costs per decode step, beside the same decoder as one ONNX Runtime graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness import Check, Report, Row, Target, check_close, take_turns
from benchmarks.models import ExportedModel, Shape, exported_model, model_runner, random_checkpoint, random_tokens
from benchmarks.monolithic_graph import (
    bound_step,
    graph_with_group_query_attention,
    graph_with_onnx_attention,
    graph_without_attention,
    session_from_graph,
)
from trt_kv.plugins.paging import Floats, gather_kv, pages_of
from trt_kv.runtime.executors.protocol import DenseExecutor
from trt_kv.runtime.kv_pool import KvPool
from trt_kv.runtime.sequence_cache import SequenceCache

BATCHES = (1, 4)
LIMIT = 1.10
AGREE_WITHIN = 1e-3
SETTLE_S = 0.05
"""After a session whose threads spin: longer than they do."""


def run(folder: Path, *, quick: bool) -> Report:
    """Two pairs: the dense work alone, and whole decode steps at a context."""
    shape = Shape(
        n_layers=4 if quick else 16,
        hidden_size=256 if quick else 1024,
        n_heads=16,
        n_kv_heads=4,
        head_dim=64,
        intermediate_size=704 if quick else 2816,
    )
    context, rounds = (128, 10) if quick else (1024, 60)
    model = exported_model(random_checkpoint(shape, folder / "checkpoint"), folder / "graphs")
    executor = model.executor()
    checks: list[Check] = []
    tables: dict[str, list[Row]] = {}
    ratios = {}
    for n_sequences in BATCHES:
        rows, ratios[n_sequences] = _dense_only(model, executor, n_sequences, rounds, checks)
        tables[f"dense work only, attention replaced by out = q, batch {n_sequences}"] = rows
        caption = f"whole decode step, {context} cached tokens, batch {n_sequences}"
        tables[caption] = _whole_step(model, executor, n_sequences, context, rounds, checks)
    return Report(
        title="Split against monolithic, per decode step",
        settings={"shape": shape.hf_config, "context": context, "rounds": rounds, "intra_op_threads": "one per core"},
        checks=checks,
        tables=tables,
        targets=[
            Target(what=f"split / monolithic, dense work, batch {n}", measured=ratio, limit=LIMIT)
            for n, ratio in ratios.items()
        ],
    )


def _dense_only(
    model: ExportedModel, executor: DenseExecutor, n_sequences: int, rounds: int, checks: list[Check]
) -> tuple[list[Row], float]:
    """Times of both sides with the same session options, and of the monolith with threads that spin; split / monolith."""
    graph = graph_without_attention(model)
    whole = session_from_graph(graph, model.folder / "dense.onnx", spinning=False)
    step = _step(model, n_sequences, context=0)
    sides: dict[str, Callable[[], Floats]] = {
        "monolithic": lambda: whole.run(["logits"], step)[0],
        "split": lambda: executor.run(*step.values(), lambda _layer, q, _k, _v: q),
    }
    same = check_close(f"dense logits, batch {n_sequences}", sides["split"](), sides["monolithic"](), within=AGREE_WITHIN)
    checks.append(same)
    timings = take_turns(sides, rounds=rounds)
    spinning = session_from_graph(graph, model.folder / "dense.onnx", spinning=True)
    sides["monolithic, spinning threads"] = lambda: spinning.run(["logits"], step)[0]
    with_spinning = take_turns(sides, rounds=max(5, rounds // 3), pause_s=SETTLE_S)
    return timings.rows("monolithic") + with_spinning.rows("monolithic")[-1:], timings.ratio("split", "monolithic")


def _whole_step(
    model: ExportedModel, executor: DenseExecutor, n_sequences: int, context: int, rounds: int, checks: list[Check]
) -> list[Row]:
    """Our runner against ONNX Runtime with its attention ops over the same cached tokens."""
    runner = model_runner(executor, model.config, cache_tokens=n_sequences * (context + 64))
    sequences = [runner.new_sequence() for _ in range(n_sequences)]
    for seed, sequence in enumerate(sequences):
        runner.prefill(sequence, random_tokens(context, model.config.vocab_size, seed=seed))
    step = _step(model, n_sequences, context)
    cache = _contiguous_cache(runner.pool, sequences)
    wide = {name: np.pad(array, [(0, 0), (0, 0), (0, 1), (0, 0)]) for name, array in cache.items()}
    lengths = {"past_len": np.full(n_sequences, context, np.int32), "total_len": np.array(context + 1, np.int32)}
    standard = session_from_graph(graph_with_onnx_attention(model), model.folder / "attention.onnx", spinning=False)
    grouped = session_from_graph(
        graph_with_group_query_attention(model, context + 1), model.folder / "grouped.onnx", spinning=False
    )

    def ours() -> Floats:
        logits = runner.decode(sequences, [int(token) for token in step["input_ids"]])
        for sequence in sequences:  # forget the token, so that every round has the same context
            sequence.kv_len = sequence.kv_len - 1
            sequence.n_seen -= 1
        return logits

    sides = {
        "ONNX Attention, one graph": bound_step(standard, step, cache, in_place=False),
        "GroupQueryAttention in place, one graph": bound_step(grouped, {**step, **lengths}, wide, in_place=True),
        "trt-kv": ours,
    }
    expected = ours()
    for name, side in sides.items():
        checks.append(check_close(f"{name}, batch {n_sequences}", side(), expected, within=AGREE_WITHIN))
    return list(take_turns(sides, rounds=rounds).rows("ONNX Attention, one graph"))


def _step(model: ExportedModel, n_sequences: int, context: int) -> dict[str, np.ndarray]:
    """One new token for each sequence."""
    return {
        "input_ids": np.array(random_tokens(n_sequences, model.config.vocab_size, seed=99)),
        "positions": np.full(n_sequences, context),
        "logit_rows": np.arange(n_sequences),
    }


def _contiguous_cache(pool: KvPool, sequences: list[SequenceCache]) -> dict[str, Floats]:
    """The cached tokens as ONNX's attention ops want them: ``past_key_<l>`` and ``past_value_<l>`` [B, K, S, D]."""
    cache = {}
    for layer in range(sequences[0].n_layers):
        tables = (sequence.page_table[:, None] for sequence in sequences)
        n_cached = int(sequences[0].kv_len[layer])
        pairs = [gather_kv(pool.kv, pages_of(t, layer, 0, n_cached, pool.page_size), n_cached) for t in tables]
        cache[f"past_key_{layer}"] = np.stack([k for k, _ in pairs])
        cache[f"past_value_{layer}"] = np.stack([v for _, v in pairs])
    return cache
