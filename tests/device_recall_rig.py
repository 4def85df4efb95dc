"""Sequences that come and go on device-driven recall, compared step by step with RecallAttention over the whole cache.

``TRITON_INTERPRET=1 python -m tests.device_recall_rig fast|slow ERRORS`` plays cases in Triton's interpreter, and writes by
their names what went wrong, as JSON. L layers, H query heads, K KV heads, D head size, P page size, N tokens, B sequences.
"""

import json
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.device_recall_cases import BLOCKWISE, CASES, SLOW_CASES, Case
from tests.interpreted import prepare
from trt_kv.plugins.recall_attention.spec import SPEC
from trt_kv.plugins.registry import Kernel
from trt_kv.program import Program
from trt_kv.runtime.backends.cuda.store import DeviceKvPool

Values = dict[str, Tensor]


class Deferred:
    """Side work done later than it was submitted: when the last third of a layer's comes, when it is joined, or by chance."""

    def __init__(self, placement: str, seed: int) -> None:
        self._placement = placement
        self._random = random.Random(seed)
        self._waiting: list[Callable[[], None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)
        runs = {"after_attention": len(self._waiting) // 3 * 3, "last_moment": 0}
        self._run(runs.get(self._placement, self._random.randint(0, len(self._waiting))))

    def join(self) -> None:
        self._run(len(self._waiting))

    def _run(self, n: int) -> None:
        for _ in range(n):
            self._waiting.pop(0)()


@dataclass
class Stream:
    """One sequence: its host pages, its tokens so far, and how its query turns."""

    n_prompt: int
    pages: list[list[int]]
    rng: np.random.Generator
    n_tokens: int = 0
    turned: Any = None

    def vectors(self, case: Case, n_new: int) -> dict[str, np.ndarray]:
        """q [L, n, H, D], k and v [L, n, K, D] of the next tokens."""
        n_heads, n_kv_heads, head_size = case.heads
        made = {
            name: self.rng.standard_normal((case.n_layers, n_new, n, head_size), np.float32)
            for name, n in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
        }
        for i in range(n_new):
            if self.turned is not None:
                turn = (1 - case.steadiness**2) ** 0.5
                made["q"][:, i] = case.steadiness * self.turned + turn * made["q"][:, i]
            self.turned = made["q"][:, i]
        return made


@dataclass
class World:
    """Both sides, and what they have to agree on. ``decode``: runs a decode step's kernel over all layers."""

    case: Case
    device: str
    side: Any = None
    compares: bool = True
    decode: Callable[[Values], list[tuple[Tensor, ...]]] | None = None
    made: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        from trt_kv.runtime.backends.cuda.recall.driver import DeviceRecall, RecallCapacity

        case = self.case
        n_heads, n_kv_heads, head_size = case.heads
        capacity = RecallCapacity(
            host_pages=case.n_table * case.n_layers * (len(case.prompts) + 1),
            sequences=len(case.prompts),
            longest_prompt=max(case.prompts),
            largest_chunk=case.chunk,
            prompt_block=case.prompt_block,
        )
        self.recall = DeviceRecall(
            case.program,
            capacity,
            pool_of(case, self.device),
            n_query_heads=n_heads,
            side=self.side,
        )
        sets = self.recall.sets.tensors
        for tensor in (sets.host_kv, sets.kv, sets.summaries, sets.last_query):
            tensor.fill_(float("nan"))
        n_pages = capacity.host_pages
        self.whole = {
            "kv": torch.full(sets.host_kv.shape, float("nan"), dtype=sets.kv.dtype, device=self.device),
            "token_positions": torch.full((n_pages, n_kv_heads, case.page_size), 10**9, device=self.device),
            "summaries": torch.full_like(sets.summaries, float("nan")),
            "last_query": torch.full((n_pages, n_heads, head_size), float("nan"), dtype=sets.kv.dtype, device=self.device),
        }
        self.rng = np.random.default_rng(case.seed)

    def arrive(self, n_prompt: int, beside: Sequence[Stream] = ()) -> Stream:
        """A sequence of its own pages, and its prompt read in chunks, while those ``beside`` it generate tokens."""
        case = self.case
        pages = [self.recall.host.allocate(case.n_table, owner=1) for _ in range(case.n_layers)]
        stream = Stream(
            n_prompt=n_prompt,
            pages=[[int(page) for page in self.rng.permutation(of_layer)] for of_layer in pages],
            rng=np.random.default_rng(self.rng.integers(1 << 30)),
        )
        for begin in range(0, n_prompt, case.chunk):
            others = [(other, 1) for other in beside]
            self.step("prefill", [*others, (stream, min(case.chunk, n_prompt - begin))])
        return stream

    def leave(self, stream: Stream) -> None:
        self.recall.release([pages[0] for pages in stream.pages])
        for pages in stream.pages:
            self.recall.host.release(pages)

    def step(self, phase: str, entries: Sequence[tuple[Stream, int]]) -> None:
        """So many tokens of each sequence; what both sides make of them is compared."""
        values = self._values(entries)
        before = self._before(entries)
        if phase == "decode" and self.decode is not None:
            results = self.decode(values)
        else:
            results = over_layers(self.recall.kernels(phase), self.case.program, values)
        self.made += [tensor.float().cpu().numpy() for of_layer in results for tensor in of_layer]
        if self.compares:
            self._compare(values, results)
            check_state(self, entries, before, [corrected for *_, corrected in results])

    def _values(self, entries: Sequence[tuple[Stream, int]]) -> Values:
        case = self.case
        vectors = [stream.vectors(case, n_new) for stream, n_new in entries]
        ends = np.cumsum([0, *(n_new for _, n_new in entries)])
        positions = [np.arange(stream.n_tokens, stream.n_tokens + n_new) for stream, n_new in entries]
        remaining = [
            np.where(at < stream.n_prompt, stream.n_prompt - 1 - at + case.cut, -1)
            for (stream, _), at in zip(entries, positions, strict=True)
        ]
        for stream, n_new in entries:
            stream.n_tokens += n_new
        table = np.full((case.n_layers, len(entries), case.n_table), -1)
        slots = np.empty((case.n_layers, ends[-1]), np.int64)
        for layer in range(case.n_layers):
            for b, (stream, _) in enumerate(entries):
                n_pages = -(-stream.n_tokens // case.page_size)
                table[layer, b, :n_pages] = stream.pages[layer][:n_pages]
                page, offset = np.divmod(positions[b], case.page_size)
                slots[layer, ends[b] : ends[b + 1]] = table[layer, b, page] * case.page_size + offset
        kv_len = [stream.n_tokens for stream, _ in entries]
        integers = {
            "positions": np.concatenate(positions),
            "cu_tokens": ends,
            "prompt_remaining": np.concatenate(remaining),
            "slots": slots,
            "page_table": table,
            "kv_len": np.tile(kv_len, (case.n_layers, 1)),
            "prompt_len": np.array([min(s.n_prompt, s.n_tokens) for s, _ in entries]),
            "adaptive_budget": np.full((case.n_layers, len(entries)), -1),
            "query_rows": table[:, :, 0].copy(),
        }
        floats = {name: np.concatenate([of[name] for of in vectors], axis=1) for name in "qkv"}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for name, array in integers.items()}
        dtype = self.recall.host.kv.dtype
        tensors |= {name: torch.from_numpy(array).to(self.device, dtype) for name, array in floats.items()}
        return states_of(self.recall.device) | tensors

    def _compare(self, values: Values, results: Sequence[tuple[Tensor, ...]]) -> None:
        from trt_kv.plugins.registry import device_kernel

        run = device_kernel("RecallAttention")
        assert run is not None
        expected = over_layers({"RecallAttention": run}, self.case.program, values | self.whole)
        exact = self.case.prompt_block >= max(self.case.prompts) or bool((values["prompt_remaining"] < 0).all())
        for layer, (got, wanted) in enumerate(zip(results, expected, strict=True)):
            for name, a, b in zip(("out", "lse", "corrected"), got, wanted, strict=True):
                assert not b.isnan().any(), (name, layer)
                tolerance = 0 if exact else 1e-5
                torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=f"{name} of layer {layer}: {a} != {b}")

    def _before(self, entries: Sequence[tuple[Stream, int]]) -> Values:
        if not self.compares:
            return {}
        sets = self.recall.sets.tensors
        names = ("kv", "host_kv", "held", "chosen", "moved")
        return {name: getattr(sets, name).clone() for name in names}


def pool_of(case: Case, device: str) -> DeviceKvPool:
    """Layers that do not recall have no pages."""
    _, n_kv_heads, head_size = case.heads
    return DeviceKvPool(
        n_pages=0, page_size=case.page_size, n_kv_heads=n_kv_heads, head_size=head_size, dtype=case.dtype, device=device
    )


def states_of(pool: DeviceKvPool) -> Values:
    """What RecallAttention would update in the pool if its cache were there."""
    return {state.name: pool.states[state.name] for state in SPEC.states}


def over_layers(kernels: Mapping[str, Kernel], program: Program, values: Values) -> list[tuple[Tensor, ...]]:
    """One step's kernel in every layer: (out, lse, corrected) of each."""
    results = []
    for layer, (node,) in enumerate(program):
        of_layer = values | {name: values[name][layer] for name in "qkv"}
        results.append(kernels[node.op](**of_layer, **node.attributes))
    return results


class ReplayedSteps:
    """Decode steps as CUDA graphs, one for each number of sequences, recorded on a step without tokens."""

    def __init__(self, kernels: Mapping[str, Kernel], program: Program) -> None:
        self._kernels = kernels
        self._program = program
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Values, list[tuple[Tensor, ...]]]] = {}

    @property
    def n_graphs(self) -> int:
        return len(self._recorded)

    def __call__(self, values: Values) -> list[tuple[Tensor, ...]]:
        n_sequences = values["kv_len"].shape[1]
        if n_sequences not in self._recorded:
            self._recorded[n_sequences] = self._record(values)
        graph, places, results = self._recorded[n_sequences]
        for name, place in places.items():
            place.copy_(values[name])
        graph.replay()
        return results

    def _record(self, values: Values) -> tuple[torch.cuda.CUDAGraph, Values, list[tuple[Tensor, ...]]]:
        places = {name: value.clone() for name, value in values.items()}
        places["cu_tokens"].zero_()
        over_layers(self._kernels, self._program, places)  # compiles, and changes nothing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = over_layers(self._kernels, self._program, places)
        return graph, places, results


def check_state(world: World, entries: Sequence[tuple[Stream, int]], before: Values, corrected: Sequence[Tensor]) -> None:
    """Both tiers hold what was appended, nothing else was touched, and only what was missing has moved, to the slots that the
    CPU's plan names.
    """
    case, sets, size = world.case, world.recall.sets, world.case.page_size
    tensors = sets.tensors
    others = torch.ones(len(tensors.kv), dtype=torch.bool)
    host_others = torch.ones(len(tensors.host_kv), dtype=torch.bool)
    for b, (stream, n_new) in enumerate(entries):
        n_full = stream.n_tokens // size
        for layer, pages in enumerate(stream.pages):
            full = pages[:n_full]
            for ours, whole in ((tensors.host_kv, "kv"), (tensors.summaries, "summaries")):
                both = (kept[full].cpu().view(torch.uint8) for kept in (ours, world.whole[whole]))
                assert torch.equal(*both), whole  # bit by bit: summaries may have codes in them, which are no numbers
            host_others[pages[(stream.n_tokens - n_new) // size : n_full]] = False
            block = sets.block(pages[0])
            others[block * tensors.block_pages : (block + 1) * tensors.block_pages] = False
            check_moves(case, stream, tensors, before, block, corrected[layer][b].tolist())
    for name, kept in (("kv", others), ("host_kv", host_others)):
        tensor = getattr(tensors, name)
        torch.testing.assert_close(tensor.cpu()[kept], before[name].cpu()[kept], rtol=0, atol=0, equal_nan=True, msg=name)


def check_moves(case: Case, stream: Stream, tensors: Any, before: Values, block: int, corrected_K: Sequence[int]) -> None:
    from trt_kv.runtime.backends.host.recall.working_set import planned_moves

    if case.cut and stream.n_tokens <= stream.n_prompt + 1:
        return  # nothing was chosen ahead for the first generated token
    is_generated, looks_ahead = stream.n_tokens > stream.n_prompt, case.tau <= 1
    if not (is_generated or (looks_ahead and stream.n_tokens == stream.n_prompt)):
        return
    n_now = case.n_chosen(stream.n_prompt, stream.n_tokens) if is_generated else 0
    n_wanted = case.n_chosen(stream.n_prompt, stream.n_tokens + looks_ahead)
    first, limits = stream.n_tokens == stream.n_prompt, case.limits
    held_KS = np.full(tensors.held[block].shape, -1) if first else before["held"][block].cpu().numpy()
    moved_K2 = tensors.moved[block].cpu().numpy() - (0 if first else before["moved"][block].cpu().numpy())
    wanted_KC = tensors.chosen[block, :, :n_wanted].cpu().numpy()
    attended_KC = before["chosen"][block, :, : n_now if looks_ahead else 0].cpu().numpy()
    for head in range(len(held_KS)):
        if corrected_K[head] and looks_ahead:
            # Twice, and what lay between cannot be seen; but with as many pages to choose from, the same are chosen again.
            if limits.choosable(stream.n_tokens) == limits.choosable(stream.n_tokens + 1):
                assert moved_K2[head, 1] == 0
                assert set(wanted_KC[head]) <= set(tensors.held[block, head].tolist())
            continue
        wanted, held, attended = (np.ascontiguousarray(array) for array in (wanted_KC, held_KS, attended_KC))
        moves = planned_moves(wanted, held, attended, np.array([head]))
        expected_S = held_KS[head].copy()
        expected_S[moves[:, 2]] = moves[:, 1]
        np.testing.assert_array_equal(tensors.held[block, head].cpu().numpy(), expected_S)
        assert moved_K2[head].tolist() == ([0, len(moves)] if looks_ahead else [len(moves), 0])
        assert len(set(wanted_KC[head]) - set(held_KS[head])) == len(moves)


def play(world: World) -> list[np.ndarray]:
    """Prompts, batches of changing sequences, one that leaves, and one that comes and is read beside others' tokens."""
    prompts, n_steps = world.case.prompts, world.case.n_steps
    streams = [world.arrive(n) for n in prompts]
    for i in range(n_steps):
        batch = streams if i % 3 else streams[: 1 + i % len(streams)]
        world.step("decode", [(stream, 1) for stream in reversed(batch)])
        if i == n_steps // 2:
            world.leave(streams.pop(0))
            streams.append(world.arrive(prompts[-1], beside=streams))
    return world.made


def side_of(case: Case) -> Any:
    return None if case.placement == "at_once" else Deferred(case.placement, case.seed)


def errors_of(cases: Sequence[Case]) -> dict[str, str]:
    """What went wrong, by the names of the cases in which something did."""
    errors = {}
    for case in cases:
        try:
            play(World(case=case, device="cpu", side=side_of(case)))
        except Exception:  # noqa: BLE001  (told to the test of this case, whatever it is)
            errors[case.name] = traceback.format_exc()
    return errors


if __name__ == "__main__":
    prepare()
    Path(sys.argv[2]).write_text(json.dumps(errors_of(SLOW_CASES if sys.argv[1] == "slow" else (*CASES, BLOCKWISE))))
