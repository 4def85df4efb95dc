"""Statistics of answers, and the file that keeps them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trt_kv.calibration.answer_files import EngineFacts, Evaluation, Run, Settings, summary_of
from trt_kv.calibration.answers import UNNAMED, Answer, agreement, comparison_of, groups_of, score_of
from trt_kv.cli.evaluation_table import describe_evaluation
from trt_kv.errors import ReportError
from trt_kv.policies import policy_from_name


def answer(line: int, **fields: Any) -> Answer:
    given = {
        "name": f"line {line}",
        "task": None,
        "right": True,
        "text": "a\u2028b",
        "token_ids": (5, 6, 7),
        "loss": 1.5,
        "n_expected_tokens": 3,
        "n_prompt_tokens": 10,
        "kept_tokens": (10, 4),
        "prompt_seconds": 0.25,
        "answer_seconds": 0.5,
    }
    return Answer(line=line, **(given | fields))


def engine(name: str) -> EngineFacts:
    return EngineFacts(
        name=name,
        digest=f"sha256:{name}",
        model_name="m",
        model_digest="sha256:m",
        tokenizer_digest="sha256:t",
        policy=policy_from_name("refreekv"),
        target="onnxruntime",
        dtype="float32",
        runs_on="onnxruntime",
    )


def evaluation(answers: tuple[Answer, ...], others: tuple[Answer, ...] | None, *, n_tasks: int) -> Evaluation:
    return Evaluation(
        tasks="tasks.jsonl",
        n_tasks=n_tasks,
        settings=Settings(tasks_digest="d", match="exact", max_new_tokens=None, separator=" ", trt_kv="0"),
        machine="m",
        run=Run(engine=engine("a"), answers=answers),
        against=None if others is None else Run(engine=engine("b"), answers=others),
    )


def test_a_score_is_what_its_answers_give() -> None:
    score = score_of([answer(1), answer(2, right=False, loss=4.5, n_expected_tokens=1, kept_tokens=(1, 2), n_prompt_tokens=2)])
    assert (score.n_tasks, score.accuracy.value) == (2, 0.5)
    assert score.perplexity == pytest.approx(math.exp(6.0 / 4))
    assert score.perplexity_95 is not None
    assert score.perplexity_95[0] < score.perplexity < score.perplexity_95[1]
    assert (score.kept_share, score.least_kept, score.most_kept) == pytest.approx((0.725, 0.7, 0.75))
    assert score.seconds_per_task == 0.75


def test_exempt_layers_are_counted_and_left_out() -> None:
    answers = (answer(1, kept_tokens=(10, 10, 4, 2)), answer(2, kept_tokens=(10, 10, 6, 2)))
    told = describe_evaluation(evaluation(answers, answers, n_tasks=2))
    assert told.count("67.5% (65.0–70.0)") == 2
    assert told.count("includes the exempt layers 0, 1; without them it is 35.0% (30.0–40.0)") == 2
    assert "exempt" not in describe_evaluation(evaluation((answer(1),), None, n_tasks=1))


def test_one_answer_has_a_perplexity_without_an_interval() -> None:
    score = score_of([answer(1)])
    assert score.perplexity == pytest.approx(math.exp(0.5))
    assert score.perplexity_95 is None
    assert comparison_of([answer(1)], [answer(1)]).perplexity_ratio is None


@pytest.mark.parametrize(
    ("tokens", "others", "share"),
    [
        ((1, 2, 3), (1, 2, 3), 1.0),
        ((1, 2, 3, 4), (1, 9, 3, 4), 0.25),
        ((1, 2), (1, 2, 3, 4), 0.5),
        ((), (1,), 0.0),
        ((), (), 1.0),
    ],
)
def test_agreement_ends_at_the_first_difference(tokens: tuple[int, ...], others: tuple[int, ...], share: float) -> None:
    assert agreement(tokens, others) == agreement(others, tokens) == share


def test_a_comparison_is_made_pair_by_pair() -> None:
    """Nine answers that only the other engine has right, and one that neither has."""
    answers = [answer(i, right=False, token_ids=(5, 9), loss=3.0) for i in range(9)] + [answer(9, right=False)]
    others = [answer(i, token_ids=(5, 6)) for i in range(9)] + [answer(9, right=False)]
    compared = comparison_of(answers, others)
    assert (compared.wins, compared.losses, compared.verdict, compared.difference) == (0, 9, "worse", -0.9)
    assert compared.same_answers.value == 0.1
    assert compared.agreement == pytest.approx((9 * 0.5 + 1) / 10)
    assert compared.perplexity_ratio is not None
    assert compared.perplexity_ratio.value == pytest.approx(math.exp(9 * 1.5 / 30))


def test_tasks_are_grouped_by_the_name_they_give() -> None:
    assert groups_of([answer(1), answer(2)]) == {}
    assert groups_of([answer(1, task="b"), answer(2), answer(3, task="b")]) == {"b": [0, 2], UNNAMED: [1]}


def test_a_saved_evaluation_loads_as_it_was(tmp_path: Path) -> None:
    answers = (answer(1, task="b"), answer(2, task="c", right=False))
    path = tmp_path / "out.json"
    alone = evaluation(answers, None, n_tasks=2)
    both = evaluation(answers, (answer(1, loss=0.1), answer(2, kept_tokens=(10, 10))), n_tasks=2)
    for whole in (alone, both):
        whole.save(path)
        assert Evaluation.load(path) == whole
        assert json.loads(path.read_text())["summary"] == summary_of(whole)
    assert set(summary_of(both)["comparison"]["groups"]) == {"b", "c"}
    assert sum('"line": ' in line for line in path.read_text().split("\n")) == 4


@pytest.mark.parametrize(("n_tasks", "others"), [(3, None), (2, ()), (2, (answer(1),))])
def test_a_half_made_file_does_not_look_finished(n_tasks: int, others: tuple[Answer, ...] | None, tmp_path: Path) -> None:
    half = evaluation((answer(1), answer(2)), others, n_tasks=n_tasks)
    half.save(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["finished"] is False
    assert "summary" not in data
    assert Evaluation.load(tmp_path / "out.json") == half


def test_answers_are_added_where_they_belong() -> None:
    half = evaluation((answer(1),), (), n_tasks=2)
    assert half.with_answers(0, [answer(2)]).with_answers(1, [answer(1), answer(2)]).is_finished
    alone = evaluation((), None, n_tasks=1).with_answers(0, [answer(1)])
    assert alone.is_finished
    assert alone.against is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(format="trt-kv-report"), "not an evaluation"),
        (lambda data: data.update(version=99), "not an evaluation"),
        (lambda data: data.update(finished=False), "summary does not follow"),
        (lambda data: data["summary"]["overall"].update(perplexity=1.0), "summary does not follow"),
        (lambda data: data["run"]["answers"].pop(), "summary does not follow"),
        (lambda data: data["run"]["answers"][0].update(right=1), "right has the wrong type"),
        (lambda data: data["run"]["answers"][0].update(line=True), "line has the wrong type"),
        (lambda data: data["run"]["answers"][0].update(kept_tokens=[]), "is empty"),
        (lambda data: data.update(n_tasks=1), "more answers than tasks"),
        (lambda data: data.pop("settings"), "lacks fields"),
    ],
)
def test_a_file_that_was_changed_is_refused(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    evaluation((answer(1), answer(2)), None, n_tasks=2).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ReportError, match=words):
        Evaluation.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    half = evaluation((answer(1),), None, n_tasks=2)
    half.save(path)

    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ReportError, match="No space left"):
        half.with_answers(0, [answer(2)]).save(path)
    assert Evaluation.load(path) == half
    assert list(tmp_path.iterdir()) == [path]
