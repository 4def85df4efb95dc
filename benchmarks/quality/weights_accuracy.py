"""What quantised weights cost in accuracy: perplexity, agreement and known words, beside llama.cpp on the same file.

The model is SmolLM2, whose GGUF file holds blocks of 4 bits (Q4_1) and an embedding of 8: its values as numbers are the
baseline. "Blocks of the file" are taken as they are; other rows round the file's values again, as a checkpoint in numbers would
be. llama.cpp takes part if the package xllamacpp can be imported.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from benchmarks.harness import BenchmarkError, Check, Report, Row, check_close, rounded
from benchmarks.quality.weights_texts import PROSE, STATEMENTS
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.graph import graph_from_checkpoint, save_graphs
from trt_kv.export.packed_weights import PackedWeights
from trt_kv.export.quantized_graph import quantize_graph
from trt_kv.export.targets.onnxruntime import save_onnxruntime_parts
from trt_kv.manifest import Quantization
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_from_name
from trt_kv.presets import PRESETS
from trt_kv.program import program_of_model
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.native.executor import NativeExecutor
from trt_kv.runtime.backends.host.native.weights import open_weights
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.weight_index import load_weight_index

PAGE_SIZE = 32
TOKENS = 320
"""Of the text."""
NATIVE = ", own kernels"
"""End of the names of rows that are computed by kernels of our own; ONNX Runtime computes the others."""
LIKELIEST = 1000
"""How many of the next tokens llama.cpp is asked for; others are less likely, whichever they are."""


class Numbers:
    """A checkpoint as if its weights were stored as numbers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def scheme(self, _name: str) -> None:
        """No blocks."""
        return


def run(folder: Path, *, quick: bool) -> Report:
    """Each way to store the weights in turn; quick: with the bundled model, on a part of the text."""
    preset = PRESETS["llama3" if quick else "smollm2"]
    packaged = None if preset.packaged is None else preset.packaged.path
    if preset.packaged is not None and packaged is None:
        raise BenchmarkError("the model is not installed", fix=preset.packaged.install_command)
    checkpoint = open_checkpoint(packaged or Path(__file__).parents[2] / "trt_kv" / "models" / str(preset.bundled))
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    ids = np.array(tokenizer.encode(PROSE, add_special_tokens=False).ids[: 60 if quick else TOKENS], dtype=np.int64)
    graph = _traced(checkpoint)
    ways = _ways(checkpoint, quick)
    expected = None
    rows: list[Row] = []
    for name, stored, quantization in ways:
        place = folder / name.replace(" ", "_").replace(",", "")
        place.mkdir()
        dense = _executor(stored, graph.clone(), quantization, place, native=name.endswith(NATIVE))
        logits = _logits(dense, checkpoint, ids)
        expected = logits if expected is None else expected
        known = _known_words(tokenizer, lambda statement, dense=dense: _logits(dense, checkpoint, statement)[-1])
        n_bytes = (place / "weights.data").stat().st_size
        rows.append(_row(name, ids, logits, expected, known) | {"weights_mib": rounded(n_bytes / 2**20)})
        for file in place.iterdir():
            file.unlink()
        if len(rows) == 1 and not quick and importlib.util.find_spec("xllamacpp") is not None:
            rows.append(_llama_row(packaged, tokenizer, ids, expected))
    return Report(
        title="Accuracy of quantised weights",
        settings={"model": preset.name, "tokens": len(ids), "statements": len(STATEMENTS)},
        checks=[_check_attention(checkpoint, graph, folder)],
        tables={"a prose text, and statements with a known last word": rows},
    )


def _ways(checkpoint: Checkpoint, quick: bool) -> list[tuple[str, Any, Quantization | None]]:
    """Name, checkpoint and quantisation of each row; the first is the baseline."""

    def of(bits: int, *, level: int = 4, size: int = 32, symmetric: bool = False) -> Quantization:
        return Quantization(bits=bits, block_size=size, symmetric=symmetric, accuracy_level=level)

    numbers = Numbers(checkpoint)
    ways: list[tuple[str, Any, Quantization | None]] = [("fp32", checkpoint, None)]
    if not quick:
        ways += [
            ("blocks of the file, level 0", checkpoint, of(4, level=0)),
            ("blocks of the file, level 4", checkpoint, of(4)),
            (f"blocks of the file, level 4{NATIVE}", checkpoint, of(4)),
        ]
    ways += [
        ("int8 symmetric", numbers, of(8, symmetric=True)),
        (f"int8 symmetric{NATIVE}", numbers, of(8, symmetric=True)),
        ("int4 asymmetric, level 0", numbers, of(4, level=0)),
        ("int4 asymmetric", numbers, of(4)),
        (f"int4 asymmetric{NATIVE}", numbers, of(4)),
        ("int4 symmetric", numbers, of(4, symmetric=True)),
        ("int4 asymmetric, blocks of 64", numbers, of(4, size=64)),
    ]
    return ways


def _traced(checkpoint: Checkpoint) -> ir.Model:
    program = program_of_model(checkpoint.config, policy_from_name("full"), phase="decode", page_size=PAGE_SIZE)
    return graph_from_checkpoint(checkpoint, program, page_size=PAGE_SIZE)


def _executor(
    checkpoint: Any, graph: ir.Model, quantization: Quantization | None, folder: Path, *, native: bool = False
) -> DenseExecutor:
    packed = None if quantization is None else PackedWeights(checkpoint, quantization)
    if packed is not None:
        quantize_graph(graph, packed)
    save_graphs({"decode": graph}, folder)
    stored = onnx.load(folder / "decode.onnx", load_external_data=False)
    parts = save_onnxruntime_parts(checkpoint, stored, folder, dtype="float32", packed=packed)
    if native:
        index = load_weight_index(folder, checkpoint.config.tensor_shapes())
        return NativeExecutor(checkpoint.config, open_weights(folder, index))
    return OnnxRuntimeExecutor(folder, parts.segments, parts.ports)


def _logits(dense: DenseExecutor, checkpoint: Checkpoint, ids: np.ndarray) -> Floats:
    """``[N, V]`` of a text of N tokens."""
    scale = checkpoint.config.scale
    rows = np.arange(len(ids), dtype=np.int64)

    def attend(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:  # noqa: ARG001
        q_HND, k_KND, v_KND = (torch.from_numpy(x).transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q_HND, k_KND, v_KND, is_causal=True, scale=scale, enable_gqa=True
        )
        return np.ascontiguousarray(out[0].transpose(0, 1).numpy())

    return dense.run(ids, rows, rows, attend)


def _check_attention(checkpoint: Checkpoint, graph: ir.Model, folder: Path) -> Check:
    """The last token of a text has the same logits if more text follows."""
    (folder / "check").mkdir()
    dense = _executor(checkpoint, graph.clone(), None, folder / "check")
    ids = np.arange(20, 40, dtype=np.int64)
    return check_close(
        "logits with and without what follows",
        _logits(dense, checkpoint, ids[:9]),
        _logits(dense, checkpoint, ids)[:9],
        within=1e-3,
    )


def _row(name: str, ids: np.ndarray, logits: Floats, expected: Floats, known: float) -> Row:
    log_p, wanted = _log_softmax(logits), _log_softmax(expected)
    divergence = (np.exp(wanted) * (wanted - log_p)).sum(-1).mean()
    return {
        "weights": name,
        "perplexity": rounded(np.exp(-_of_next(log_p, ids).mean())),
        "divergence_nats": rounded(divergence),
        "same_choice_percent": rounded(100 * (logits.argmax(-1) == expected.argmax(-1)).mean()),
        "known_words_percent": rounded(100 * known),
    }


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), dtype=np.float64)


def _of_next(log_p: Floats, ids: np.ndarray) -> Floats:
    """The log-probability of each token but the first."""
    return np.asarray(log_p[np.arange(len(ids) - 1), ids[1:]], dtype=np.float64)


def _known_words(tokenizer: Tokenizer, last_logits: Any) -> float:
    """The share of statements whose right word is likelier than the wrong ones, by the first tokens of the words."""
    right = 0
    for statement, *words in STATEMENTS:
        logits = last_logits(np.array(tokenizer.encode(statement, add_special_tokens=False).ids, dtype=np.int64))
        first = [tokenizer.encode(f" {word}", add_special_tokens=False).ids[0] for word in words]
        right += int(np.argmax([logits[token] for token in first])) == 0
    return right / len(STATEMENTS)


def _llama_row(file: Path | None, tokenizer: Tokenizer, ids: np.ndarray, expected: Floats | None) -> Row:
    """llama.cpp gives the likeliest next tokens after a text, with their log-probabilities: it is asked after each token."""
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # its threads wait for each other
    server = xllamacpp.Server(params)

    def next_tokens(prompt: np.ndarray, n: int) -> dict[int, float]:
        answer = server.handle_completions(
            {"prompt": prompt.tolist(), "n_predict": 1, "n_probs": n, "temperature": 0.0, "cache_prompt": True}
        )
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {token["id"]: token["logprob"] for token in likeliest}

    assert expected is not None
    losses, same = [], []
    for end in range(1, len(ids)):
        found = next_tokens(ids[:end], LIKELIEST)
        if int(ids[end]) not in found:
            found = next_tokens(ids[:end], tokenizer.get_vocab_size())
        losses.append(-found[int(ids[end])])
        same.append(max(found, key=found.__getitem__) == int(expected[end - 1].argmax()))

    def last_logits(statement: np.ndarray) -> Floats:
        logits = np.full(tokenizer.get_vocab_size(), -np.inf)
        found = next_tokens(statement, LIKELIEST)
        logits[list(found)] = list(found.values())
        return logits

    return {
        "weights": "llama.cpp, the same file",
        "perplexity": rounded(np.exp(np.mean(losses))),
        "divergence_nats": None,
        "same_choice_percent": rounded(100 * np.mean(same)),
        "known_words_percent": rounded(100 * _known_words(tokenizer, last_logits)),
        "weights_mib": None if file is None else rounded(file.stat().st_size / 2**20),
    }
