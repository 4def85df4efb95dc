"""The shell of the command line: what it costs to start, what it says, and the exit code of every kind of failure."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bare_python import make_bare_environment
from trt_kv import __version__
from trt_kv.cli import build, generate
from trt_kv.cli.app import COMMANDS, main
from trt_kv.cli.hints import command_line
from trt_kv.cli.prompt_options import read_prompt
from trt_kv.errors import CapacityError, EngineError, MissingDependencyError, TrtKvError, UnknownNameError, UsageError
from trt_kv.pipeline import BuildRequest, CalibrationPlan, TargetPlan
from trt_kv.require import missing_dependency, require

ROOT = Path(__file__).parent.parent
HEAVY = ("huggingface_hub", "matplotlib", "numba", "numpy", "onnx", "onnxruntime", "onnxscript", "rich", "tokenizers", "torch")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has trt-kv (as a user's site-packages would hold it) and click, and nothing else, pip included."""
    folder = tmp_path_factory.mktemp("bare")
    site = make_bare_environment(folder)
    shutil.copytree(ROOT / "trt_kv", site / "trt_kv", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "bin" / "python"


def run_bare(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from trt_kv.cli import main; sys.exit(main())"
    return subprocess.run([python, "-I", "-c", code, *arguments], capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=lambda a: "-".join(a) or "group")
def test_help_works_with_only_click_installed(bare_python: Path, arguments: list[str]) -> None:
    answer = run_bare(bare_python, *arguments, "--help")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("Usage: trt-kv")
    assert answer.stderr == ""


def test_help_answers_in_under_a_second(bare_python: Path) -> None:
    elapsed_s = []
    for _ in range(3):
        started = time.perf_counter()
        run_bare(bare_python, "--help")
        elapsed_s.append(time.perf_counter() - started)
    assert min(elapsed_s) < 1.0


def test_help_imports_nothing_heavy() -> None:
    """Asked where everything is installed: help of the group and of every command."""
    code = f"""
import sys
from trt_kv.cli import main
codes = [main([*words, "--help"]) for words in ([], *([name] for name in {COMMANDS!r}))]
print(codes, sorted(set(sys.modules) & set({HEAVY!r})))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == f"{[0] * (len(COMMANDS) + 1)} []"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"trt-kv {name}" in capsys.readouterr().out.partition("Example")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_doctor_without_its_packages_says_what_to_install(bare_python: Path) -> None:
    answer = run_bare(bare_python, "doctor")
    assert answer.returncode == 1
    assert "pip install trt-kv" in answer.stdout
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "arguments", [["bild"], ["build", "--bugdet", "0.5"], ["build", "--budget", "half"], ["export"], ["generate"]], ids="-".join
)
def test_a_misspelt_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--model", "gpt1"], "one of llama3"),
        (["build", "--policy", "lru"], "one of arkvale, "),
        (["build", "--score", "luck"], "unknown score"),
        (["build", "--budget", "0"], "(0, 1]"),
        (["build", "--budget", "1.01"], "(0, 1]"),
        (["build", "--budget", "nan"], "(0, 1]"),
        (["build", "--policy", "full", "--budget", "0.5"], "keeps everything"),
        (["build", "--policy", "h2o", "--window", "8"], "choose score "),
        (["build", "--score", "window", "--window", "0"], "window is out of range"),
        (["build", "--samples", "0"], "--samples >= 1"),
        (["build", "--target", "abacus"], "unknown target"),
        (["build", "--profile", "edge"], "--target tensorrt"),
        (["build", "--dtype", "int4"], "one of bfloat16, float16, float32"),
        (["build", "--target", "tensorrt", "--profile", "moon"], "one of a .json file, datacenter, edge"),
        (["build", "--policy", "full", "--recipe", "RECIPE"], "reads no recipe"),
        (["calibrate", "--policy", "full"], "reads no recipe"),
        (["calibrate", "--from-published", "RECIPE", "--prompts", "RECIPE"], "one of the two"),
        (["generate", "engine"], "no prompt"),
        (["generate", "engine", "text", "--prompt-file", "RECIPE"], "a prompt and --prompt-file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_impossible_request_exits_with_2_and_says_why(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text("{}")
    assert main([str(file) if word == "RECIPE" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def raising(error: BaseException) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


def run_with_pipeline(monkeypatch: pytest.MonkeyPatch, function: Any, *arguments: str) -> int:
    """Run the command line with ``function`` standing in for what the commands build and generate call."""
    monkeypatch.setattr(build, "build_engine", function)
    monkeypatch.setattr(generate, "stream_text", function)
    return main(arguments)


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (EngineError("half an engine", fix="build it again"), 1, "error: half an engine\n  fix: build it again\n"),
        (CapacityError("too long"), 1, "error: too long\n"),
        (UsageError("no", got=1, expected=2), 2, "error: no\n  got: 1\n  expected: 2\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device", "engines/x"), 1, "error: No space left on device: engines/x\n"),
        (ZeroDivisionError("a\nb"), 1, "internal error (ZeroDivisionError: a); run again with --debug for the traceback\n"),
        (EOFError(), 1, "internal error (EOFError: no message); run again with --debug for the traceback\n"),
        (
            ModuleNotFoundError("No module named 'onnx.helper'", name="onnx.helper"),
            1,
            "error: the package 'onnx' is not installed\n  fix: pip install 'trt-kv[build]'\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_failure_has_its_message_and_exit_code(
    error: BaseException, exit_code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with_pipeline(monkeypatch, raising(error), "build") == exit_code
    assert capsys.readouterr().err.removeprefix("\n") == said


def test_ctrl_c_exits_with_130_and_one_word() -> None:
    code = """
import sys, time
from trt_kv.cli import build, main
build.build_engine = lambda *_, **__: (print("started", flush=True), time.sleep(60))
sys.exit(main(["build"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.strip() == "interrupted"


@pytest.mark.parametrize("arguments", [("--debug", "build"), ("build", "--debug")], ids=" ".join)
def test_debug_shows_the_traceback(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with_pipeline(monkeypatch, raising(ZeroDivisionError("hidden")), *arguments) == 1
    assert "Traceback" in capsys.readouterr().err


def test_build_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BuildRequest] = []

    def build_engine(request: BuildRequest, **_: Any) -> Path:
        seen.append(request)
        return Path("engines/x")

    words = "build --checkpoint my/folder --budget 0.3 --score window --window 16 --samples 4 --seed 9 --force".split()
    assert run_with_pipeline(monkeypatch, build_engine, *words) == 0
    (request,) = seen
    assert request.source.checkpoint == "my/folder"
    assert (request.policy.kept, request.policy.score, request.policy.window) == (0.3, "window", 16)
    assert (request.calibration.samples, request.calibration.seed) == (4, 9)
    assert request.out == Path("engines/folder-prefixkv-budget=0.3-window=16-samples=4-seed=9")
    assert request.replace is True
    assert request.recipe is None


def test_generate_prints_segments_as_they_come(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_pipeline(monkeypatch, lambda **_: iter(["a ", "b"]), "generate", "engine", "text") == 0
    assert capsys.readouterr().out == "a b\n"


def test_a_prompt_comes_from_a_file_without_its_last_line_break(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    for text in ("zwei\nZeilen ü\n", "\ufeffzwei\r\nZeilen ü\r\n"):
        file.write_bytes(text.encode())
        assert read_prompt(None, str(file)) == "zwei\nZeilen ü"


def test_a_prompt_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match="byte 3"):
        read_prompt(None, str(file))


def test_a_prompt_comes_from_standard_input() -> None:
    code = "from trt_kv.cli.generate import read_prompt; print(repr(read_prompt('-', None)))"
    answer = subprocess.run([sys.executable, "-c", code], input=b"\xef\xbb\xbfpiped\r\n", capture_output=True, check=True)
    assert answer.stdout == b"'piped'\n"


def test_a_prompt_from_a_closed_standard_input_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "engine", "-"]) == 2
    assert "got: a closed standard input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "engine", "a \udcff b"], "PROMPT is not UTF-8 text\n  got: a lone surrogate at byte 2"),
        (["generate", "engine", "text", "--stop", "\udcff"], "--stop is not UTF-8 text"),
        (["evaluate", "engine", "--tasks", "TASKS", "--separator", "\udcff"], "--separator is not UTF-8 text"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_bytes_of_the_command_line_that_are_not_utf_8_are_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python decodes such a byte to a lone surrogate."""
    (tmp_path / "tasks.jsonl").touch()
    assert main([str(tmp_path / "tasks.jsonl") if word == "TASKS" else word for word in words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["engines/two words", "-engine", "it's"])
def test_the_command_after_a_build_works_as_printed(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell reads back the engine's path, and finds the program that ran."""
    program = tmp_path / "trt-kv"
    program.touch()
    monkeypatch.setattr(sys, "argv", [str(program), "build"])
    assert run_with_pipeline(monkeypatch, lambda request, **_: request.out, "build", "--out", folder) == 0
    (hint,) = (line.removeprefix("next:") for line in capsys.readouterr().out.splitlines() if line.startswith("next:"))
    said, command, engine, prompt = shlex.split(hint)
    assert (said, command, prompt) == (str(program), "generate", "a prompt")
    assert Path(engine) == Path(folder)
    assert not engine.startswith("-")


def test_the_program_is_named_shortly_where_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "trt-kv"
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_line(["inspect"]) == "trt-kv inspect"
    monkeypatch.setattr(sys, "argv", ["/site-packages/trt_kv/__main__.py"])
    assert command_line(["inspect"]) == f"{sys.executable} -m trt_kv inspect"


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        TargetPlan(target="abacus")


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="seed"):
        CalibrationPlan(seed=-1)


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("tokenizers", "build", "pip install trt-kv"),
        ("onnx", "build", "pip install 'trt-kv[build]'"),
        ("onnx", "gpu", "pip install 'trt-kv[build]'"),
        ("torch", "build", "pip install 'trt-kv[build]'"),
        ("torch", "gpu", "pip install 'trt-kv[gpu]'"),
    ],
)
def test_require_names_the_extra(package: str, extra: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as caught:
        require(package, extra=extra)
    assert caught.value.fix == command


def test_require_reports_the_package_that_is_missing_deep_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_onnx.py").write_text("import onnx\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match="'onnx'"):
        require("needs_onnx")


def test_require_does_not_disguise_a_bug_of_our_own() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing_here"):
        require("trt_kv.nothing_here")
    assert missing_dependency(ModuleNotFoundError("without a name")) is None


def test_every_error_on_purpose_has_an_exit_code_of_1_or_2() -> None:
    todo = [TrtKvError]
    while todo:
        kind = todo.pop()
        assert kind.exit_code == (2 if issubclass(kind, UsageError) else 1)
        todo += kind.__subclasses__()


def test_building_for_tensorrt_without_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is calibrated, exported or written."""
    for package in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["build", "--target", "tensorrt", "--out", str(tmp_path / "engine")]) == 1
    said = capsys.readouterr().err
    assert "TensorRT is not installed" in said
    assert "pip install tensorrt" in said
    assert list(tmp_path.iterdir()) == []
