"""Cost per decode step of cutting the graph at its KV ops, compared with the same decoder as one ONNX Runtime graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, Report, Row, Target, check_close, take_turns
from benchmarks.models import ExportedModel, Shape, exported_model, model_runner, random_checkpoint, random_tokens
from benchmarks.speed.monolithic_graph import (
    bound_step,
    graph_with_group_query_attention,
    graph_with_onnx_attention,
    graph_without_attention,
    session_from_graph,
)
from trt_kv.plugins.paging import Floats, gather_kv, pages_of
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.onnxruntime_segments import SESSION_OPTIONS
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache

BATCHES = (1, 4)
LIMIT = 1.10
AGREE_WITHIN = 1e-3
ORT_DEFAULTS: dict[str, str] = {}
SETTLE_S = 0.5
"""With ONNX Runtime's default options threads spin after a run, on some CPUs for a third of a second."""


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
    context, rounds = (128, 5) if quick else (1024, 60)
    model = exported_model(random_checkpoint(shape, folder / "checkpoint"), folder / "graphs")
    executor = model.executor()
    checks: list[Check] = []
    tables: dict[str, list[Row]] = {}
    targets = []
    for n_sequences in BATCHES:
        dense = _dense_only(model, executor, n_sequences, checks)
        timings = take_turns(dense, rounds=rounds)
        tables[f"dense work only, batch {n_sequences}, same options"] = timings.rows("monolithic")
        ratio = timings.ratio("split", "monolithic")
        targets.append(Target(what=f"split / monolithic, dense work, batch {n_sequences}", measured=ratio, limit=LIMIT))
        tables[f"dense work only, batch {n_sequences}, monolithic with ONNX Runtime's default options"] = _beside_defaults(
            model, dense["split"], n_sequences, rounds // 4
        )
        tables[f"whole decode step, batch {n_sequences}, {context} cached tokens"] = _whole_step(
            model, executor, n_sequences, context, rounds, checks
        )
    return Report(
        title="Split against monolithic, per decode step",
        settings={
            "shape": shape.hf_config,
            "rounds": rounds,
            "session_options": SESSION_OPTIONS,
            "intra_op_threads": "one per core",
            "stand_in": "attention replaced by out = q on both sides",
        },
        checks=checks,
        tables=tables,
        targets=targets,
    )


def _dense_only(
    model: ExportedModel, executor: DenseExecutor, n_sequences: int, checks: list[Check]
) -> dict[str, Callable[[], Floats]]:
    """The step without attention, as one graph and in segments."""
    whole = session_from_graph(graph_without_attention(model), model.folder / "dense.onnx", SESSION_OPTIONS)
    step = _step(model, n_sequences, context=0)
    sides: dict[str, Callable[[], Floats]] = {
        "monolithic": lambda: whole.run(["logits"], step)[0],
        "split": lambda: executor.run(**step, attend=lambda *layer_q_k_v: layer_q_k_v[1]),
    }
    checks.append(
        check_close(f"dense logits, batch {n_sequences}", sides["split"](), sides["monolithic"](), within=AGREE_WITHIN)
    )
    return sides


def _beside_defaults(model: ExportedModel, split: Callable[[], Floats], n_sequences: int, rounds: int) -> list[Row]:
    """The split compared with the monolith under ONNX Runtime's default options; pauses let its threads go to sleep."""
    whole = session_from_graph(graph_without_attention(model), model.folder / "dense.onnx", ORT_DEFAULTS)
    step = _step(model, n_sequences, context=0)
    sides = {"monolithic": lambda: whole.run(["logits"], step)[0], "split": split}
    return list(take_turns(sides, rounds=max(2, rounds), warmup=1, pause_s=SETTLE_S).rows("monolithic"))


def _whole_step(
    model: ExportedModel, executor: DenseExecutor, n_sequences: int, context: int, rounds: int, checks: list[Check]
) -> list[Row]:
    """Our runner compared with ONNX Runtime's attention ops over the same cached tokens."""
    runner = model_runner(executor, model.config, cache_tokens=n_sequences * (context + 64))
    sequences = [runner.new_sequence() for _ in range(n_sequences)]
    for seed, sequence in enumerate(sequences):
        runner.prefill(sequence, random_tokens(context, model.config.vocab_size, seed=seed))
    step = _step(model, n_sequences, context)
    cache = _contiguous_cache(runner.pool, sequences)
    wide = {name: np.pad(array, [(0, 0), (0, 0), (0, 1), (0, 0)]) for name, array in cache.items()}
    lengths = {"past_len": np.full(n_sequences, context, np.int32), "total_len": np.array(context + 1, np.int32)}
    graphs = {"onnx": graph_with_onnx_attention(model), "grouped": graph_with_group_query_attention(model, context + 1)}
    sessions = {
        name: session_from_graph(graph, model.folder / f"{name}.onnx", SESSION_OPTIONS) for name, graph in graphs.items()
    }

    def ours() -> Floats:
        logits = runner.decode(sequences, [int(token) for token in step["input_ids"]])
        for sequence in sequences:  # drop the token, so that every round has the same context
            sequence.kv_len = sequence.kv_len - 1
            sequence.num_computed_tokens -= 1
        return logits

    sides = {
        "ONNX Attention, one graph": bound_step(sessions["onnx"], step, cache, in_place=False),
        "GroupQueryAttention in place, one graph": bound_step(sessions["grouped"], {**step, **lengths}, wide, in_place=True),
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


def _contiguous_cache(pool: KvPool[Any], sequences: list[SequenceCache]) -> dict[str, Floats]:
    """The cached tokens in the layout of ONNX's attention ops: ``past_key_<l>`` and ``past_value_<l>`` [B, K, S, D]."""
    cache = {}
    for layer in range(sequences[0].n_layers):
        tables = (sequence.page_table[:, None] for sequence in sequences)
        n_cached = int(sequences[0].kv_len[layer])
        pairs = [gather_kv(pool.kv, pages_of(t, layer, 0, n_cached, pool.page_size), n_cached) for t in tables]
        cache[f"past_key_{layer}"] = np.stack([k for k, _ in pairs])
        cache[f"past_value_{layer}"] = np.stack([v for _, v in pairs])
    return cache
