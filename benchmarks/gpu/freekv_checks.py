"""Checks that all sides of ``freekv`` equal, bit for bit, the op's own kernel over the whole cache."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.freekv_model import Corrections
from benchmarks.gpu.freekv_steps import Sequences, Step
from benchmarks.harness import Check, check_close
from trt_kv.plugins.registry import device_kernel

N_STEPS = 3


class Beginning:
    """A snapshot of sequences and their whole cache on the device; must be created before their first step."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences
        self._state = [(tensor, tensor.clone()) for tensor in sequences.state()]
        sets, shape = sequences.recall.sets.tensors, sequences.shape
        on = sets.kv.device
        n_pages, n_kv_heads, _, page_size, head_size = (sets.host_kv.shape[i] for i in (0, 2, 1, 3, 4))
        self._whole = {
            "kv": sets.host_kv.to(on, copy=True),
            "token_positions": torch.zeros(n_pages, n_kv_heads, page_size, dtype=torch.int64, device=on),
            "summaries": sets.summaries.clone(),
            "last_query": torch.zeros(n_pages, shape.n_heads, head_size, dtype=sets.kv.dtype, device=on),
        }

    def check(self, steps: Iterable[Step], corrections: Corrections) -> list[Check]:
        """Run steps of every side, each from the snapshot, and restore it. ``BenchmarkError`` if one differs."""
        self._sequences.turn(corrections)
        planned = self._sequences.corrected[:N_STEPS].float().cpu().numpy()
        expected: dict[float | None, Tensor] = {}
        checks = []
        for step in steps:
            tau = step.side.tau
            if tau not in expected:
                self.restore()
                expected[tau] = self._expected(tau)
            self.restore()
            attended, corrected = [], []
            for _ in range(N_STEPS):
                step()
                attended.append(step.attended)
                corrected.append(step.corrected)
            name = f"batch {self._sequences.batch} at {self._sequences.n_tokens} tokens, {step.side.name}"
            got, wanted = torch.stack(attended).float().cpu().numpy(), expected[tau].float().numpy()
            checks.append(check_close(f"attention, {name}", got, wanted, within=0.0))
            flags = torch.stack(corrected).float().cpu().numpy()
            checks.append(
                check_close(f"KV heads corrected, {name}", flags, planned if tau is None else np.ones_like(flags), within=0.0)
            )
        self.restore()
        return checks

    def restore(self) -> None:
        """Restore the snapshot; the next step is the first of its turn."""
        for tensor, value in self._state:
            tensor.copy_(value)
        self._sequences.at.fill_(-1)

    def _expected(self, tau: float | None) -> Tensor:
        """Attention of the steps over the whole cache, [S, L, B, H, D]."""
        sequences, run = self._sequences, device_kernel("RecallAttention")
        assert run is not None
        whole = {name: tensor.clone() for name, tensor in self._whole.items()}
        values = {name: tensor.clone() for name, tensor in sequences.values.items()}
        size, program, outs = sequences.shape.page_size, sequences.shape.program(tau), []
        for i in range(N_STEPS):
            values["kv_len"] += 1
            values["positions"] += 1
            place = values["positions"] // size
            page_LB = values["page_table"].take_along_dim(place[None, :, None].expand_as(values["page_table"][..., :1]), 2)[
                ..., 0
            ]
            slots = page_LB * size + values["positions"] % size
            for layer, (node,) in enumerate(program):
                q = sequences.queries[i, layer]
                out, *_ = run(**values, **whole, slots=slots, q=q, k=sequences.k, v=sequences.v, **node.attributes)
                outs.append(out.cpu())
        return torch.stack(outs).view(N_STEPS, sequences.shape.n_layers, *outs[0].shape)
