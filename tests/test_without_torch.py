"""An engine runs on a CPU with the packages of a plain installation: neither torch nor what else builds engines is imported."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.engines import build_for_test, shared
from tests.evaluation_tasks import write_tasks
from tests.recall_rig import freekv
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.policies import policy_without_floor
from trt_kv.policy import Policy
from trt_kv.require import BASE, EXTRAS
from trt_kv.runtime.engine import Engine

ROOT = Path(__file__).parent.parent
BLOCKED = [*sorted({package for packages in EXTRAS.values() for package in packages}), "onnx_ir", "transformers"]
MAX_NEW_TOKENS = 24
POLICIES: dict[str, Policy] = {
    "drops tokens": policy_without_floor("h2o"),
    "finds its budgets": dataclasses.replace(policy_without_floor("refreekv"), exempt_layers=(0,), threshold=0.2),
    "recalls pages": freekv(),
}

BLOCK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in {BLOCKED!r}:
    sys.modules[name] = None
"""
GENERATE = f"""{BLOCK}
import json
from trt_kv import Engine
prompts = json.loads(sys.argv[2])
with Engine.load(sys.argv[1], cache_tokens=4000, chunk=32, n_threads=1) as engine:
    results = engine.generate_batch(prompts, max_new_tokens={MAX_NEW_TOKENS})
    results.append(engine.generate(prompts[0], max_new_tokens={MAX_NEW_TOKENS}))
print(json.dumps([[result.token_ids, result.kv_tokens] for result in results]))
"""
COMMAND = f"""{BLOCK}
from trt_kv.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(params=POLICIES, ids=lambda name: f"a policy that {name}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """An engine of the small random checkpoint, on pages of 5 tokens."""
    policy = POLICIES[request.param]
    asked = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy, page_size=5)
    return shared(tmp_path_factory, f"without-torch-{policy.name}", partial(build_for_test, asked))


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd="/")


def test_an_engine_generates_the_same_tokens_where_nothing_that_builds_engines_can_be_imported(folder: Path) -> None:
    assert set(BLOCKED).isdisjoint(BASE)
    rng = np.random.default_rng(5)
    prompts = [[1, *(int(i) for i in rng.integers(3, 269, n))] for n in (90, 40, 7)]
    answer = python(GENERATE, folder, json.dumps(prompts))
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    with Engine.load(folder, cache_tokens=4000, chunk=32, n_threads=1) as engine:
        expected = engine.generate_batch(prompts, max_new_tokens=MAX_NEW_TOKENS)
    assert "torch" in sys.modules
    keeps_all = engine.manifest.policy.recalls  # in memory, where pages are read in place
    assert (min(expected[0].kv_tokens) == expected[0].num_computed_tokens) is keeps_all
    assert found == [[list(result.token_ids), list(result.kv_tokens)] for result in [*expected, expected[0]]]


@pytest.mark.parametrize(
    ("words", "extra"),
    [(["build", "--policy", "full", "--out", "new"], "build"), (["generate", "ENGINE", "words", "--device", "cuda"], "gpu")],
    ids=["build", "a GPU"],
)
def test_what_needs_more_names_the_extra(words: list[str], extra: str, small_h2o_folder: Path, tmp_path: Path) -> None:
    arguments = [
        str(small_h2o_folder) if word == "ENGINE" else str(tmp_path / word) if word == "new" else word for word in words
    ]
    answer = python(COMMAND, *arguments)
    assert answer.returncode == 1
    assert answer.stderr.endswith(f"fix: pip install 'trt-kv[{extra}]'\n")
    assert list(tmp_path.iterdir()) == []


def test_commands_that_read_an_engine_need_no_more(small_h2o_folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks.jsonl")
    for words in (["inspect", small_h2o_folder], ["evaluate", small_h2o_folder, "--tasks", tasks, "--limit", "1"], ["doctor"]):
        answer = python(COMMAND, *words)
        assert answer.returncode == 0, answer.stderr
