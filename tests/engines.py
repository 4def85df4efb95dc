"""Engines that many tests run, each built once per session, and the model they are compared with."""

import dataclasses
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numba
import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from tests.checkpoints import write_checkpoint
from trt_kv.cli import main
from trt_kv.export import engine as engine_module
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest, build_engine
from trt_kv.export.graph import graph_from_checkpoint
from trt_kv.head_shares import HeadShares, Shares, means
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.predicted_scores.frequencies import key_frequencies
from trt_kv.policies import policy_from_name, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.presets import PRESETS
from trt_kv.program import Program
from trt_kv.recipe import CREATED_BY, CalibrationRecord, Protected, Recipe, RecipeModel, RecipeScore, recipe_score
from trt_kv.runtime.engine import Engine
from trt_kv.surrogate import Predictor, Surrogate, n_weights

SHARES = (0.72, 0.28, 0.54, 0.5, 0.62, 0.49, 0.53, 0.32)
"""Kept shares of the 50 % engine: all different, mean 0.5, much like calibrated ones."""

HEAD_SHARES: Shares = ((0.6, 0.15), (0.3, 0.32), (0.09, 0.9))
"""Kept shares of the KV heads of the small checkpoint."""
CACHE_TOKENS = 10_000
CHUNK = 64
"""Prompt tokens per prefill step, small enough that many prompts need several."""


Run = Callable[..., tuple[int, str, str]]
"""Runs a command line; see the fixture ``run``."""

_TRACED: dict[tuple[str, str, int, torch.dtype], ir.Model] = {}


def traced_once(checkpoint: Checkpoint, program: Program, *, page_size: int, dtype: torch.dtype = torch.float32) -> ir.Model:
    """``graph_from_checkpoint``, which takes seconds, but each graph is traced once per session and then copied."""
    key = (checkpoint.digest, repr(program), page_size, dtype)
    if key not in _TRACED:
        _TRACED[key] = graph_from_checkpoint(checkpoint, program, page_size=page_size, dtype=dtype)
    return _TRACED[key].clone()


def build_for_test(request: EngineRequest, folder: Path, *, replace: bool = False, share: bool = False) -> Path:
    """Build quickly. Without ``share`` the weights are the engine's own: onnx, which some tests use, reads no file that has
    several names.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not share:
            patch.setattr(engine_module, "link_weights", lambda *_, **__: None)
        patch.setattr(engine_module, "graph_from_checkpoint", traced_once)
        build_engine(request, folder, replace=replace)
    return folder


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name``, made by whichever of the processes that run the tests asks for it first, while others wait."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder)
    return folder


def interrupted_at_line(number: int, modules: Sequence[ModuleType], work: Callable[[], object], *, only: str = "") -> bool:
    """Run ``work`` and raise KeyboardInterrupt at the given line executed in ``modules``; False if it never gets there.

    ``only``: names of functions, separated by spaces, whose lines count; empty: all.
    """
    files = {module.__file__ for module in modules}
    functions = only.split()
    remaining = number
    previous = sys.gettrace()

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal remaining
        if frame.f_code.co_filename not in files or (functions and frame.f_code.co_name not in functions):
            return None
        if event == "line":
            remaining -= 1
            if remaining < 0:
                sys.settrace(previous)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


def recipe_for(checkpoint: Checkpoint, kept: Sequence[float], *, budget: float, score: RecipeScore | None = None) -> Recipe:
    """A recipe with given shares, as if somebody had calibrated it."""
    return Recipe(
        method="prefixkv",
        score=score or RecipeScore(name="mass"),
        budget=budget,
        kept=tuple(kept),
        mass=None,
        protected=Protected(),
        model=RecipeModel(name=checkpoint.name, digest=checkpoint.digest, n_layers=checkpoint.config.n_layers),
        calibration=CalibrationRecord(source="made for a test", seed=None, samples=()),
        curves=None,
        created_by=CREATED_BY,
    )


def prefixkv_request(checkpoint: Checkpoint, kept: Sequence[float], *, budget: float) -> EngineRequest:
    policy = dataclasses.replace(policy_from_name("prefixkv_paper"), kept=budget)
    return EngineRequest(checkpoint=checkpoint, policy=policy, recipe=recipe_for(checkpoint, kept, budget=budget))


def lukv_request(checkpoint: Checkpoint, shares: Shares, **settings: Any) -> EngineRequest:
    """An engine whose KV heads keep ``shares`` at the budget of the preset; ``settings`` of the policy."""
    policy = dataclasses.replace(policy_without_floor("lukv"), **settings)
    heads = HeadShares(rows=(shares,) * 99)
    recipe = dataclasses.replace(
        recipe_for(checkpoint, means(shares), budget=policy.kept, score=recipe_score(policy)), method="lukv", heads=heads
    )
    return EngineRequest(checkpoint=checkpoint, policy=policy, recipe=recipe)


def kvzap_request(checkpoint: Checkpoint, **settings: Any) -> EngineRequest:
    """An engine whose scores are predicted with weights at random; ``settings`` of the policy."""
    policy = dataclasses.replace(policy_without_floor("kvzap"), **settings)
    surrogate = surrogate_of(checkpoint.config)
    recipe = dataclasses.replace(
        recipe_for(checkpoint, surrogate.kept_at(policy.kept), budget=policy.kept, score=recipe_score(policy)),
        method="kvzap",
        surrogate=surrogate,
    )
    return EngineRequest(checkpoint=checkpoint, policy=policy, recipe=recipe)


def surrogate_of(config: ModelConfig) -> Surrogate:
    """Weights at random."""
    rng = np.random.default_rng(8)
    return Surrogate(
        weights=tuple(
            tuple(tuple(rng.normal(size=n_weights(config.head_dim)).round(4).tolist()) for _ in range(config.n_kv_heads))
            for _ in range(config.n_layers)
        ),
        thresholds=tuple((np.arange(99) / 30.0 - 1.6).round(4).tolist()),
        kept=tuple(((99 - row) / 100.0,) * config.n_layers for row in range(99)),
    )


def predictors_for(policy: Policy, config: ModelConfig, *, heads_apart: int = 1) -> list[Predictor] | None:
    """Of ``surrogate_of``, for each layer of the cache; None if the policy predicts no scores."""
    if not policy.scoring.predicts:
        return None
    return surrogate_of(config).predictors(config, policy.kept, key_frequencies(config), heads_apart=heads_apart)


def load_for_test(folder: Path) -> Engine:
    return Engine.load(folder, cache_tokens=CACHE_TOKENS, chunk=CHUNK, n_threads=1)


def random_ids(engine: Engine, n: int, *, seed: int) -> list[int]:
    """A prompt of ``n`` tokens: <bos>, then words at random."""
    vocabulary = engine.tokenizer.get_vocab_size()
    return [1, *(int(i) for i in np.random.default_rng(seed).integers(3, vocabulary, n - 1))]


def assert_nothing_leaked(engine: Engine) -> None:
    """Every page of the engine's pool is free again."""
    engine.runner.pool.check_integrity([])


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command line in an empty folder; (exit code, standard output, error stream)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine_module, "graph_from_checkpoint", traced_once)

    def run_words(*words: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        said = capfd.readouterr()
        return code, said.out, said.err

    return run_words


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small lose more to waiting threads than they gain, above all on a busy machine."""
    n_torch, n_numba = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(n_torch)
    numba.set_num_threads(n_numba)


@pytest.fixture(scope="session")
def bundled_checkpoint() -> Checkpoint:
    return open_checkpoint(PRESETS["llama3"].bundled_folder)


@pytest.fixture(scope="session")
def bundled_model() -> transformers.PreTrainedModel:
    """The bundled checkpoint as transformers runs it, in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(PRESETS["llama3"].bundled_folder, dtype="float32")
    assert isinstance(model, transformers.PreTrainedModel)
    model.eval()
    return model


@pytest.fixture(scope="session")
def full_folder(tmp_path_factory: pytest.TempPathFactory, bundled_checkpoint: Checkpoint) -> Path:
    """An engine of the bundled checkpoint that keeps everything. Not to be changed: copy it first."""
    request = EngineRequest(checkpoint=bundled_checkpoint, policy=policy_from_name("full"))
    return shared(tmp_path_factory, "full", partial(build_for_test, request))


@pytest.fixture(scope="session")
def half_folder(tmp_path_factory: pytest.TempPathFactory, bundled_checkpoint: Checkpoint) -> Path:
    """An engine of the bundled checkpoint whose layers keep ``SHARES``. Not to be changed: copy it first."""
    request = prefixkv_request(bundled_checkpoint, SHARES, budget=0.5)
    return shared(tmp_path_factory, "half", partial(build_for_test, request))


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory, bundled_checkpoint: Checkpoint) -> Path:
    """A prefixkv engine of the bundled checkpoint with a budget of 100 %."""
    request = prefixkv_request(bundled_checkpoint, [1.0] * len(SHARES), budget=1.0)
    return shared(tmp_path_factory, "whole", partial(build_for_test, request))


@pytest.fixture(scope="session")
def small_checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of 3 layers with odd sizes and the bundled tokenizer. Not to be changed: copy it first."""
    return shared(tmp_path_factory, "qwen3-biases", partial(write_checkpoint, sample="qwen3-biases"))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """A prefixkv engine of the small random checkpoint, pages of 5 tokens. Not to be changed: copy it first."""
    request = prefixkv_request(open_checkpoint(small_checkpoint_folder), (0.6, 0.3, 0.9), budget=0.6)
    return shared(tmp_path_factory, "small", partial(build_for_test, dataclasses.replace(request, page_size=5)))


@pytest.fixture(scope="session")
def small_refreekv_folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """Budgets found from the input in the last of three layers, on pages of 5 tokens. Not to be changed: copy it first."""
    return _small_preset(tmp_path_factory, small_checkpoint_folder, "refreekv")


@pytest.fixture(scope="session")
def small_h2o_folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """A ranking per KV head that goes on while decoding, on pages of 5 tokens. Not to be changed: copy it first."""
    return _small_preset(tmp_path_factory, small_checkpoint_folder, "h2o")


@pytest.fixture(scope="session")
def small_lukv_folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """KV heads that keep ``HEAD_SHARES``, on pages of 5 tokens. Not to be changed: copy it first."""
    request = lukv_request(open_checkpoint(small_checkpoint_folder), HEAD_SHARES)
    return shared(tmp_path_factory, "small-lukv", partial(build_for_test, dataclasses.replace(request, page_size=5)))


@pytest.fixture(scope="session")
def small_kvzap_folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """Predicted scores, on pages of 5 tokens. Not to be changed: copy it first."""
    request = kvzap_request(open_checkpoint(small_checkpoint_folder), kept=0.3, recent=9)
    return shared(tmp_path_factory, "small-kvzap", partial(build_for_test, dataclasses.replace(request, page_size=5)))


@pytest.fixture(scope="session")
def small_freekv_folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """A cache on the host, on pages of 5 tokens. Not to be changed: copy it first."""
    return _small_preset(tmp_path_factory, small_checkpoint_folder, "freekv")


def _small_preset(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, name: str) -> Path:
    request = EngineRequest(checkpoint=open_checkpoint(checkpoint), policy=policy_without_floor(name), page_size=5)
    return shared(tmp_path_factory, f"small-{name}", partial(build_for_test, request))


@pytest.fixture(scope="session")
def full_engine(full_folder: Path) -> Engine:
    return load_for_test(full_folder)


@pytest.fixture(scope="session")
def half_engine(half_folder: Path) -> Engine:
    return load_for_test(half_folder)


@pytest.fixture(scope="session")
def whole_engine(whole_folder: Path) -> Engine:
    return load_for_test(whole_folder)


@pytest.fixture(scope="session")
def small_engine(small_folder: Path) -> Engine:
    return load_for_test(small_folder)


@pytest.fixture
def broken(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small engine that a test may break."""
    folder = tmp_path / "engine"
    shutil.copytree(small_folder, folder)
    (folder / "graphs" / "weights.data").chmod(0o644)
    return folder
