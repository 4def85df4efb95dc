"""Where results cannot be written is said before the work, not after it."""

from pathlib import Path
from typing import Any

import pytest

from trt_kv.cli.app import main
from trt_kv.errors import UsageError
from trt_kv.pipeline import build as building
from trt_kv.pipeline import calibrate, evaluation
from trt_kv.pipeline.destinations import check_new_file, check_new_folder
from trt_kv.runtime.engine import Engine


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a checkpoint or an engine fails the test."""

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(building, "open_source", work)
    monkeypatch.setattr(calibrate, "open_source", work)
    monkeypatch.setattr(evaluation, "begin", work)
    monkeypatch.setattr(Engine, "load", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "words",
    [
        ["build", "--policy", "full", "--out"],
        ["calibrate", "--out"],
        ["calibrate", "--policy", "freekv", "--out"],
        ["calibrate", "--to-published"],
        ["evaluate", "engine", "--tasks", "TASKS", "--out"],
        ["generate", "engine", "text", "--trace"],
    ],
    ids=" ".join,
)
def test_a_place_below_a_file_is_refused_before_the_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "p", "expected": "e"}\n')
    assert main([str(tasks) if word == "TASKS" else word for word in words] + [str(tasks / "result.json")]) == 2
    assert f"{words[-1]} cannot be written" in capsys.readouterr().err.replace("the file of ", "")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "words",
    [["calibrate", "--out"], ["evaluate", "engine", "--tasks", "TASKS", "--out"], ["generate", "engine", "text", "--trace"]],
    ids=" ".join,
)
def test_a_folder_in_place_of_a_file_is_refused_before_the_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "p", "expected": "e"}\n')
    assert main([str(tasks) if word == "TASKS" else word for word in words] + [str(tmp_path)]) == 2
    assert f"{words[-1]} names a folder" in capsys.readouterr().err


def test_only_what_is_opened_in_place_may_be_a_device() -> None:
    """A file that is renamed into place would replace it."""
    check_new_file(Path("/dev/null"), "--trace", in_place=True)
    with pytest.raises(UsageError, match="not a file"):
        check_new_file(Path("/dev/null"), "--out")


def test_folders_are_made_for_what_is_renamed_into_place_only(tmp_path: Path) -> None:
    check_new_file(tmp_path / "a" / "b.json", "--out")
    check_new_folder(tmp_path / "a" / "b", "--out")
    with pytest.raises(UsageError, match="a folder that exists"):
        check_new_file(tmp_path / "a" / "b.json", "--trace", in_place=True)


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    (tmp_path / "old").touch()
    for path, in_place in ((tmp_path / "old", True), (tmp_path / "new", True), (tmp_path / "new", False)):
        with pytest.raises(UsageError, match="cannot be written"):
            check_new_file(path, "--out", in_place=in_place)
