"""``trt-kv evaluate``: its numbers are the engine's, nothing that was measured is lost, and what is wrong is said."""

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from tests.evaluation_tasks import timeless, write_tasks
from trt_kv.calibration.answer_files import Evaluation
from trt_kv.calibration.answers import Answer
from trt_kv.cli.app import main
from trt_kv.pipeline import answering, evaluation
from trt_kv.runtime.engine import Engine

Run = Callable[..., tuple[int, str, str]]
EXAMPLE = Path(__file__).parent.parent / "examples" / "evaluate"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Evaluate in a folder of the test's own: (exit code, standard output, error stream)."""
    monkeypatch.chdir(tmp_path)

    def run_words(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["evaluate", *map(str, words)])
        said = capfd.readouterr()
        return code, said.out, said.err

    return run_words


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks.jsonl")


def test_an_evaluation_shows_its_groups_and_keeps_every_answer(
    run: Run, small_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    code, out, err = run(small_folder, "--tasks", tasks, "--out", "results/small.json", "--batch-size", 2)
    assert (code, err) == (0, "")
    assert "policy prefixkv_paper kept=0.6" in out
    rows = {line[:5].strip(): line.split() for line in out.splitlines() if line[:5].strip() in ("short", "long", "all")}
    assert [rows[name][1] for name in ("short", "long", "all")] == ["2", "3", "5"]
    assert out.endswith("results  results/small.json\n")
    kept = Evaluation.load(tmp_path / "results" / "small.json")
    assert kept.is_finished
    assert [answer.line for answer in kept.run.answers] == [1, 2, 3, 4, 5]
    assert (kept.tasks, kept.run.engine.policy.kept) == ("tasks.jsonl", 0.6)
    overall = json.loads((tmp_path / "results" / "small.json").read_text())["summary"]["overall"]
    losses = sum(answer.loss for answer in kept.run.answers)
    assert overall["perplexity"] == pytest.approx(math.exp(losses / (1 + 2 + 3 + 1 + 2)), abs=1e-4)
    assert f"{overall['perplexity']:.2f}" in " ".join(rows["all"])


def test_without_out_nothing_is_written(run: Run, small_folder: Path, tasks: Path, tmp_path: Path) -> None:
    code, out, err = run(small_folder, "--tasks", tasks, "--limit", 1)
    assert code == 0
    assert err.startswith("note: every expected answer is one token")
    assert err.count("\n") == 1
    assert "results" not in out
    assert list(tmp_path.iterdir()) == [tasks]


@contextlib.contextmanager
def interrupted_after(n_batches: int) -> Iterator[None]:
    """Inside, Ctrl-C is pressed after so many batches of answers."""
    real = answering.answers_to

    def interrupting(*arguments: Any, **options: Any) -> Iterator[list[Answer]]:
        nonlocal n_batches
        for answers in real(*arguments, **options):
            n_batches -= 1
            if n_batches < 0:
                raise KeyboardInterrupt
            yield answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "answers_to", interrupting)
        yield


def test_an_interrupted_evaluation_goes_on_where_it_was(run: Run, small_folder: Path, tasks: Path, tmp_path: Path) -> None:
    """In the first engine, then in the second, and the results are those of a run in one piece."""
    words = (small_folder, "--tasks", tasks, "--against", small_folder, "--batch-size", 2)
    out = tmp_path / "out.json"
    n_there = [0]
    for _ in range(10):
        with interrupted_after(1):
            code, said, err = run(*words, "--out", out)
        assert n_there == [0] or err.startswith(f"{out}: {n_there[-1]} of 10 answers are already there\n")
        if code == 0:
            break
        assert (code, said) == (130, "")
        assert f"{out} keeps the answers so far; the same command continues\n" in err
        assert err.endswith("interrupted\n")
        half = Evaluation.load(out)
        n_there.append(sum(len(part.answers) for part in half.runs))
        assert n_there[-1] > n_there[-2]
        assert json.loads(out.read_text())["finished"] is False
    assert len(n_there) > 3
    whole = Evaluation.load(out)
    assert whole.is_finished
    assert run(*words, "--out", "straight.json")[0] == 0
    straight = Evaluation.load(tmp_path / "straight.json")
    assert timeless(whole.run.answers) == timeless(straight.run.answers)
    assert whole.against is not None
    assert timeless(whole.against.answers) == timeless(straight.run.answers)


def test_answers_reach_the_disk_while_others_are_made(
    run: Run, small_folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a process that is killed loses only seconds of work: here, none."""
    real, on_disk = answering.answers_to, []

    def looking(*arguments: Any, **options: Any) -> Iterator[list[Answer]]:
        for answers in real(*arguments, **options):
            on_disk.append(len(Evaluation.load(tmp_path / "out.json").run.answers))
            yield answers

    monkeypatch.setattr(evaluation, "answers_to", looking)
    monkeypatch.setattr(evaluation, "SAVE_EVERY_S", 0.0)
    assert run(small_folder, "--tasks", tasks, "--out", "out.json", "--batch-size", 2)[0] == 0
    assert on_disk == sorted(on_disk)
    assert on_disk[0] == 0
    assert 0 < on_disk[-1] < 5


def test_a_finished_evaluation_is_shown_again_without_its_engine(
    run: Run, small_folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(small_folder, "--tasks", tasks, "--out", "out.json")
    content = (tmp_path / "out.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "load", lambda *_, **__: pytest.fail("nothing is missing"))
        code, out, err = run(small_folder, "--tasks", tasks, "--out", "out.json")
    assert (code, out) == first[:2]
    assert err == "out.json: 5 of 5 answers are already there\n"
    assert (tmp_path / "out.json").read_bytes() == content


def test_more_tasks_or_another_engine_add_to_what_is_there(run: Run, small_folder: Path, tasks: Path, tmp_path: Path) -> None:
    words = (small_folder, "--tasks", tasks, "--out", "out.json")
    assert run(*words, "--limit", 2)[0] == 0
    first = Evaluation.load(tmp_path / "out.json").run.answers
    assert run(*words)[0] == 0
    more = Evaluation.load(tmp_path / "out.json").run.answers
    assert (len(more), more[:2]) == (5, first)
    code, out, _ = run(*words, "--against", "out.json")
    assert code == 0
    assert "+0 points" in out
    both = Evaluation.load(tmp_path / "out.json")
    assert both.run.answers == more
    assert both.against is not None
    assert both.against.answers == more


def test_an_evaluation_goes_on_with_the_library_that_began_it(
    run: Run, small_folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (small_folder, "--tasks", tasks, "--out", "out.json")
    assert run(*words, "--limit", 1)[0] == 0
    monkeypatch.setattr(onnxruntime, "__version__", "0.0")
    code, _, error = run(*words, "--limit", 2)
    assert code == 2
    assert "has another engine" in error
    assert "float32, onnxruntime 0.0" in error


def test_what_is_there_is_never_lost_by_asking_for_something_else(
    run: Run, small_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    words = (small_folder, "--tasks", tasks, "--limit", 3, "--out", "out.json")
    assert run(*words, "--against", small_folder)[0] == 0
    content = (tmp_path / "out.json").read_bytes()
    (tmp_path / "others.jsonl").write_text('{"prompt": "the old", "expected": "storm marched"}\n')
    for changed, said in (
        ((*words, "--match", "contains"), "match 'exact'"),
        ((*words, "--max-new-tokens", 9), "max_new_tokens None"),
        ((small_folder, "--tasks", "others.jsonl", "--out", "out.json"), "made from other tasks"),
        ((*words, "--against", small_folder, "--limit", 2), "more answers than requested"),
        (words, "has another engine to compare with"),
    ):
        code, out, err = run(*changed)
        assert (code, out) == (2, "")
        assert said in err
        assert "--force" in err
        assert (tmp_path / "out.json").read_bytes() == content
    assert run(*words, "--force")[0] == 0
    assert Evaluation.load(tmp_path / "out.json").against is None


def test_a_file_that_is_no_evaluation_is_not_replaced(run: Run, small_folder: Path, tasks: Path) -> None:
    content = tasks.read_bytes()
    code, _, err = run(small_folder, "--tasks", tasks, "--out", tasks, "--force")
    assert code == 2
    assert "exists already and is not an evaluation" in err
    assert tasks.read_bytes() == content


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(
    run: Run, small_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with interrupted_after(0):
        code, out, err = run(small_folder, "--tasks", tasks, "--out", "file/out.json")
    assert (code, out) == (2, "")
    assert "--out cannot be written" in err


def test_only_engines_of_one_model_are_compared(run: Run, small_folder: Path, full_folder: Path, tasks: Path) -> None:
    code, out, err = run(small_folder, "--tasks", tasks, "--against", full_folder, "--out", "out.json")
    assert (code, out) == (2, "")
    assert "the two engines have different models" in err
    assert "--policy full" in err
    assert not Path("out.json").exists()


def test_results_to_compare_with_have_the_same_tasks_and_all_answers(run: Run, small_folder: Path, tasks: Path) -> None:
    assert run(small_folder, "--tasks", tasks, "--limit", 2, "--out", "two.json")[0] == 0
    code, _, err = run(small_folder, "--tasks", tasks, "--against", "two.json")
    assert code == 2
    assert "does not have all answers" in err
    code, _, err = run(small_folder, "--tasks", tasks, "--match", "contains", "--against", "two.json")
    assert code == 2
    assert "other tasks or with other options" in err
    assert run(small_folder, "--tasks", tasks, "--against", "two.json", "--limit", 1)[0] == 0


@pytest.mark.parametrize(
    ("line", "words", "code", "said"),
    [
        ("not json", (), 2, "line 2 of mine.jsonl is not JSON"),
        ('{"prompt": "x"}', (), 2, "line 2 of mine.jsonl lacks expected"),
        (json.dumps({"prompt": "the " * 8192, "expected": "a b"}), (), 2, "line 2 of mine.jsonl is too long for the model"),
        ('{"prompt": "x", "expected": "a b"}', ("--max-new-tokens", "1"), 2, "line 2 of mine.jsonl would be truncated"),
        ('{"name": "line 1", "prompt": "x", "expected": "y"}', (), 2, "the same name"),
        ('{"prompt": "x", "expected": "y"}', ("--limit", "0"), 2, "'--limit'"),
        ('{"prompt": "x", "expected": "y"}', ("--batch-size", "0"), 2, "'--batch-size'"),
        ('{"prompt": "x", "expected": "y"}', ("--match", "fuzzy"), 2, "'--match'"),
        ('{"prompt": "x", "expected": "y"}', ("--against", "nowhere"), 1, "nowhere is not an engine"),
        ('{"prompt": "x", "expected": "y"}', ("--against", "mine.jsonl"), 1, "the evaluation mine.jsonl is not JSON"),
    ],
)
def test_a_bad_request_is_refused_before_an_engine_is_opened(
    line: str, words: tuple[str, ...], code: int, said: str, run: Run, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.jsonl").write_text(f'{{"prompt": "p", "expected": "old"}}\n{line}\n')
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("the request is wrong"))
    found, out, err = run(small_folder, "--tasks", "mine.jsonl", "--out", "out.json", *words)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert not Path("out.json").exists()


def test_a_folder_that_is_no_engine_is_refused(run: Run, tasks: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--tasks", tasks)[0] == 1
    assert "is not an engine" in run(tmp_path, "--tasks", tasks)[2]
    assert run(tmp_path, "--tasks", "nowhere.jsonl")[0] == 2


def test_what_cannot_be_spelled_is_pointed_out(run: Run, small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text(
        '{"prompt": "the old", "expected": "storm marched"}\n{"prompt": "the old", "expected": "xylophone concert"}\n'
    )
    code, _, err = run(small_folder, "--tasks", "odd.jsonl")
    assert code == 0
    assert "1 of 2 tasks expect" in err
    assert "line 2" in err


def test_the_examples_tasks_are_what_its_script_writes() -> None:
    done = subprocess.run([sys.executable, EXAMPLE / "make_tasks.py"], capture_output=True, text=True, check=True)
    assert done.stdout == (EXAMPLE / "tasks.jsonl").read_text()


def test_the_example_tells_a_policy_that_forgets_the_question_from_the_full_cache(
    run: Run, half_folder: Path, full_folder: Path
) -> None:
    """The example's own command, with half of the cache by attention mass against all of it."""
    code, out, _ = run(half_folder, "--tasks", EXAMPLE / "tasks.jsonl", "--against", full_folder, "--out", "out.json")
    assert code == 0
    summary = json.loads(Path("out.json").read_text())["summary"]
    assert summary["against"]["overall"]["accuracy"]["value"] > 0.9
    assert summary["comparison"]["overall"]["verdict"] == "worse"
    assert summary["comparison"]["overall"]["agreement"] < 0.9
    assert summary["overall"]["kept_share"] == pytest.approx(0.5, abs=0.02)
    assert list(summary["groups"]) == ["near", "middle", "far"]
    assert "worse" in out
