"""Engines on a device say what they say on the host; as a program, in Triton's interpreter:
``TRITON_INTERPRET=1 python -m tests.device_engines DENSE ENGINE ...`` fails where one does not, and with ``prefixes`` as
DENSE where one has other bits after a cached prefix, with ``sessions`` where a conversation has other tokens.

A program, because the variable has to be set before a kernel is imported.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.device_steps import CHANGES, PAGE_SIZE, SHARES
from tests.engines import build_for_test, recipe_for
from tests.interpreted import prepare
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.huggingface import HuggingFaceCheckpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.policies import policy_without_floor
from trt_kv.runtime.backends.devices import DeviceOptions
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import LoadOptions
from trt_kv.runtime.request import Request
from trt_kv.runtime.scheduler import StepPlan

CHUNK, N_NEW = 20, 3
COMPOSED: dict[str, dict[str, Any]] = {
    "freekv": CHANGES["freekv"],
    "freekv-recipe": CHANGES["freekv"] | {"budget": "recipe", "kept": 0.6, "tokens": 0, "exempt_layers": (0,)},
    "freekv-windows": CHANGES["freekv"],
}
"""The cache on the host: working sets of one size; and by a recipe, beside a layer that stays on the device."""
WINDOWS: dict[str, Any] = {"windows": (0, 9, 0), "attention_soft_cap": 1.5}
"""Fields of the configs of engines whose names end so: a window that pages of 5 tokens do not divide, and a soft cap."""


def with_windows(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the fields ``WINDOWS`` in its config."""
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **WINDOWS))


def build(name: str, checkpoint: Checkpoint, folder: Path, *, dtype: str = "float32") -> Path:
    """The engine of a preset whose prompts of some tens of tokens have something to lose, or of a composed policy."""
    changes = COMPOSED.get(name, CHANGES.get(name.removesuffix("-windows"), {}))
    if name.endswith("-windows"):
        checkpoint = with_windows(checkpoint)
    policy = dataclasses.replace(policy_without_floor(name.partition("-")[0]), **changes)
    recipe = recipe_for(checkpoint, SHARES, budget=policy.kept) if policy.needs_recipe else None
    request = EngineRequest(checkpoint=checkpoint, policy=policy, recipe=recipe, page_size=PAGE_SIZE, dtype=dtype)
    return build_for_test(request, folder / f"{name}-{dtype}")


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(3, 200, n).tolist() for n in (37, 12)]


def load_on(folder: Path, device: torch.device, on: DeviceOptions | None = None, **sizes: Any) -> Engine:
    """``Engine.load`` with the kernels of devices; on the device "cpu" these are only run by Triton's interpreter."""
    options = LoadOptions(**({"cache_tokens": 300, "chunk": CHUNK} | sizes))
    return Engine._open(folder, options, on or DeviceOptions(), device, verify=False, tell=lambda *_: None)


def check(folder: Path, device: torch.device, on: DeviceOptions | None = None) -> None:
    """The tokens of the host, and everything given back."""
    with Engine.load(folder, cache_tokens=200, chunk=CHUNK, n_threads=1) as host:
        expected = host.generate_batch(prompts(), max_new_tokens=N_NEW)
    with load_on(folder, device, on) as engine:
        found = engine.generate_batch(prompts(), max_new_tokens=N_NEW)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected], folder
        assert [one.finish_reason for one in found] == ["length"] * len(found)
        engine.runner.pool.check_integrity([])
        if engine.runner.tiers is not None:
            engine.runner.tiers.host.check_integrity([])
        else:
            assert [one.kv_tokens for one in found] == [one.kv_tokens for one in expected]


def check_prefixes(folder: Path) -> None:
    """A request that continues from a cached prefix has the bits that it has without: copies leave the device and come back."""
    with load_on(folder, torch.device("cpu")) as engine:
        prompt = prompts()[0]
        first, again = (engine.generate(prompt, max_new_tokens=N_NEW, top_logprobs=1) for _ in range(2))
        assert (first.n_cached_tokens, again.n_cached_tokens) == (0, CHUNK), folder
        assert (again.logprobs, again.kv_tokens) == (first.logprobs, first.kv_tokens), folder


def check_sessions(folder: Path) -> None:
    """A conversation that goes on from what was kept says on a device what it says on the host, also after it was saved."""
    turns = [prompts()[0], prompts()[1], [7]]
    answer: dict[str, Any] = {"max_new_tokens": N_NEW, "ignore_eos": True}
    with Engine.load(folder, cache_tokens=200, chunk=CHUNK, n_threads=1) as host:
        on_host = host.session(mode="compressed", **answer)
        expected = [on_host.generate(ids).token_ids for ids in turns]
    with load_on(folder, torch.device("cpu")) as engine, tempfile.TemporaryDirectory() as place:
        session = engine.session(mode="compressed", **answer)
        for ids, tokens in zip(turns, expected, strict=True):
            assert session.generate(ids).token_ids == tokens, folder
            session.save(Path(place) / "talk")
            session = engine.load_session(Path(place) / "talk", **answer)
        assert session.held_tokens == on_host.held_tokens, folder
        engine.runner.pool.check_integrity([])
        if engine.runner.tiers is not None:
            engine.runner.tiers.host.check_integrity([])


def check_batch_invariance(folder: Path) -> None:
    """With ``batch_invariant`` a request's logits are its own, bit for bit, alone and beside others that come and go.

    ``top_logprobs``, because the device chooses the tokens of requests that need no logits.
    """
    with load_on(folder, torch.device("cpu"), DeviceOptions(batch=3, batch_invariant=True)) as engine:
        logits: dict[int, list[np.ndarray]] = {}
        run = engine.runner.run

        def recording(plan: StepPlan[Request]) -> np.ndarray:
            rows = run(plan)
            for request, row in zip(plan.requests, rows, strict=True):
                if plan.phase == "decode" or plan.reads_last:
                    logits.setdefault(len(request.prompt_ids), []).append(row)
            return rows

        engine.runner.run = recording  # type: ignore[method-assign]
        for prompt in prompts():
            engine.generate(prompt, max_new_tokens=N_NEW, top_logprobs=0)
        alone = {n: np.stack(rows) for n, rows in logits.items()}
        logits.clear()
        first, *others = prompts()
        stream = engine.stream(first, max_new_tokens=N_NEW, top_logprobs=0)
        next(stream, "")
        engine.generate_batch([*others, [5, 6, 7]], max_new_tokens=N_NEW, top_logprobs=0)
        list(stream)
        for n, rows in alone.items():
            np.testing.assert_array_equal(np.stack(logits[n]), rows)


if __name__ == "__main__":
    prepare()
    np.seterr(invalid="ignore", over="ignore")  # what is masked afterwards
    if sys.argv[1] in ("prefixes", "sessions"):
        for engine_folder in sys.argv[2:]:
            (check_prefixes if sys.argv[1] == "prefixes" else check_sessions)(Path(engine_folder))
        sys.exit()
    for engine_folder in sys.argv[2:]:
        check(Path(engine_folder), torch.device("cpu"), DeviceOptions(dense=sys.argv[1]))
    if sys.argv[1] == "torch":
        check_batch_invariance(Path(sys.argv[2]))
