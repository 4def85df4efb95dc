"""An engine answers tasks: its greedy answers are its own, its losses those of the expected answers, alone or in a batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import assert_nothing_leaked, build_for_test, load_for_test, random_ids
from tests.evaluation_tasks import timeless, write_tasks
from trt_kv.calibration.answers import Answer
from trt_kv.calibration.task_cases import CaseRules, TaskCase, cases_from_tasks
from trt_kv.calibration.task_files import FileTask, tasks_from_file
from trt_kv.errors import CapacityError, EngineError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.pipeline.answering import answers_to
from trt_kv.policies import policy_without_floor
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import ModelRunner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[FileTask]:
    return tasks_from_file(write_tasks(tmp_path_factory.mktemp("tasks") / "tasks.jsonl"))


@pytest.fixture(scope="module", params=["prefixkv_paper", "h2o"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Engine:
    """An engine whose layers grow at their shares, and one whose KV heads keep their own tokens and go on ranking."""
    if request.param == "prefixkv_paper":
        small: Engine = request.getfixturevalue("small_engine")
        return small
    checkpoint = open_checkpoint(small_checkpoint_folder)
    wanted = EngineRequest(checkpoint=checkpoint, policy=policy_without_floor(request.param), page_size=5)
    return load_for_test(build_for_test(wanted, tmp_path_factory.mktemp("engines") / request.param))


def cases_for(engine: Engine, tasks: Sequence[FileTask], **rules: Any) -> list[TaskCase]:
    config = engine.manifest.config
    defaults: dict[str, Any] = {"separator": " ", "contains": False, "max_new_tokens": None}
    sizes: dict[str, Any] = {"max_positions": config.max_positions, "vocab_size": config.vocab_size}
    return cases_from_tasks(tasks, engine.tokenizer, CaseRules(**(defaults | sizes | rules)), source=Path("tasks"))


def all_answers(engine: Engine, cases: Sequence[TaskCase], batch_size: int) -> list[Answer]:
    batches = answers_to(engine, cases, match="exact", batch_size=batch_size, on_tokens=lambda _: None)
    return [answer for batch in batches for answer in batch]


def losses_alone(engine: Engine, case: TaskCase) -> tuple[float, list[int]]:
    """The loss of the expected answer and the tokens kept per layer, one token after the other, written plainly."""
    runner, sequence = engine.runner, engine.runner.new_sequence()
    logits_V = runner.prefill(sequence, case.prompt)
    kept, loss = [int(n) for n in sequence.kv_len], 0.0
    for index, token in enumerate(case.expected):
        if index:
            (logits_V,) = runner.decode([sequence], [case.expected[index - 1]])
        exact_V = logits_V.astype(np.float64)
        loss += float(np.log(np.exp(exact_V - exact_V.max()).sum()) + exact_V.max() - exact_V[token])
    sequence.release()
    return loss, kept


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_the_engines_and_losses_those_of_the_expected_tokens(
    batch_size: int, engine: Engine, tasks: list[FileTask]
) -> None:
    """Whatever else is in the batch."""
    cases = cases_for(engine, tasks, max_new_tokens=12)
    answers = all_answers(engine, cases, batch_size)
    assert_nothing_leaked(engine)
    assert [answer.name for answer in answers] == [f"task {i}" for i in range(5)]
    for case, answer in zip(cases, answers, strict=True):
        alone = engine.generate(list(case.prompt), max_new_tokens=12)
        assert (answer.text, answer.token_ids) == (alone.text, alone.token_ids)
        loss, kept = losses_alone(engine, case)
        assert answer.loss == pytest.approx(loss, rel=1e-4)
        assert list(answer.kept_tokens) == kept
        assert answer.n_expected_tokens == len(case.expected)
        assert answer.n_prompt_tokens == len(case.prompt)
        assert min(answer.prompt_seconds, answer.answer_seconds) > 0.0
    assert min(answer.kept_share for answer in answers) < 0.6


def test_an_engine_is_right_about_what_it_says_itself(small_engine: Engine) -> None:
    """And its perplexity is then lower than for any other answer of that length."""
    prompt = small_engine.tokenizer.decode(random_ids(small_engine, 23, seed=5))
    said = small_engine.generate(prompt, max_new_tokens=4).text
    tasks = [
        FileTask(line=1, name="itself", task=None, prompt=prompt, accepted=(said,)),
        FileTask(line=2, name="other", task=None, prompt=prompt, accepted=("the old narrow tower",)),
        FileTask(line=3, name="either", task=None, prompt=prompt, accepted=("the old narrow tower", said)),
    ]
    itself, other, either = all_answers(small_engine, cases_for(small_engine, tasks), 8)
    assert [itself.right, other.right, either.right] == [True, False, True]
    assert itself.loss < other.loss == either.loss


def test_a_batch_is_no_larger_than_the_pool(small_folder: Path, tasks: list[FileTask]) -> None:
    """Five tasks asked for at once, in a pool that holds two copies of the longest: the others wait."""
    engine = Engine.load(small_folder, cache_tokens=130, n_threads=1)
    cases = cases_for(engine, tasks)
    batches = list(answers_to(engine, cases, match="exact", batch_size=8, on_tokens=lambda _: None))
    assert sum(map(len, batches)) == 5
    roomy = Engine.load(small_folder, cache_tokens=2000, n_threads=1)
    assert timeless([answer for batch in batches for answer in batch]) == timeless(all_answers(roomy, cases, 8))


def test_a_task_that_does_not_fit_alone_is_named_and_leaves_nothing(small_folder: Path, tasks: list[FileTask]) -> None:
    engine = Engine.load(small_folder, cache_tokens=40, n_threads=1)
    cases = cases_for(engine, tasks)
    with pytest.raises(CapacityError, match="'task 2' does not fit"):
        all_answers(engine, cases, 8)
    assert_nothing_leaked(engine)


def test_logits_that_are_no_numbers_are_an_error(
    small_engine: Engine, tasks: list[FileTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ModelRunner.run

    def nonsense(*arguments: Any) -> Any:
        return run(*arguments) * np.float32(np.nan)

    monkeypatch.setattr(ModelRunner, "run", nonsense)
    with pytest.raises(EngineError, match="not finite at task 'task 0'"):
        all_answers(small_engine, cases_for(small_engine, tasks), 2)
    assert_nothing_leaked(small_engine)


def test_progress_counts_prompt_tokens_to_the_end(small_engine: Engine, tasks: list[FileTask]) -> None:
    cases = cases_for(small_engine, tasks)
    told: list[int] = []
    list(answers_to(small_engine, cases, match="exact", batch_size=2, on_tokens=told.append))
    assert told == sorted(told)
    assert told[-1] == sum(len(case.prompt) for case in cases)
