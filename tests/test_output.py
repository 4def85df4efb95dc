"""What is printed reaches any terminal, and cannot control it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import Run
from trt_kv.cli.app import main
from trt_kv.cli.progress import progress_bars
from trt_kv.printable import printable

HOSTILE = "\x1b[31mred\x1b[0m [bold]x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 😀 巴 👨‍👩‍👧", "plain ü 😀 巴 👨‍👩‍👧"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        ("a\u202eb\u2028c", "a\\u202eb\\u2028c"),
        ("\udcff", "\\udcff"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == printable(shown) == shown


def test_lines_stay_lines() -> None:
    assert printable("a\nb\x1b", lines=True) == "a\nb\\x1b"
    assert printable("a\nb") == "a\\nb"


def test_names_of_tasks_and_engines_cannot_control_the_terminal(run: Run, small_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_folder, tmp_path / HOSTILE)
    task = '{"name": "\\u001b[2J", "task": "\\u001b[31mred\\n[bold]x", "prompt": "the old", "expected": "storm"}\n'
    (tmp_path / f"{HOSTILE}.jsonl").write_text(task)
    code, out, err = run("evaluate", HOSTILE, "--tasks", f"{HOSTILE}.jsonl", "--out", f"{HOSTILE}.json")
    assert code == 0
    assert "\x1b" not in out + err
    assert "\\x1b[31mred\\n[bold]x  1 " in out
    code, out, err = run("inspect", HOSTILE)
    assert (code, "\x1b" in out + err) == (0, False)
    assert "engine    \\x1b[31mred" in out
    code, out, err = run("inspect", f"{HOSTILE}.json")
    assert (code, "\x1b" in out + err) == (1, False)
    assert "\\x1b[31mred" in err


def test_names_in_progress_bars_are_no_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bars() as on_progress:
        on_progress(f"evaluating [/] {HOSTILE}", 1, 2)
    assert "evaluating [/] \\x1b[31mred\\x1b[0m [bold]x" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_output_that_the_terminal_cannot_encode_does_not_fail(encoding: str) -> None:
    """A path of the user's, and text of the model."""
    code = """
import sys
from trt_kv.cli import build, generate, main
build.build_engine = lambda request, **_: request.out
generate.stream_text = lambda **_: iter(["gut ", "\\u0444 \\U0001f600"])
sys.exit(main(["build", "--out", "\\U0001f600 \\udcff"]) or main(["generate", "engine", "text"]))
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"engine: ")
    assert b"gut " in done.stdout


def test_the_streams_of_a_program_are_left_as_they_were() -> None:
    before = sys.stdout.errors
    assert main(["policies"]) == 0
    assert sys.stdout.errors == before
