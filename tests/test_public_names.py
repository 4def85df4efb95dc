"""``from trt_kv import Engine`` and ``python -m trt_kv``: what a user types first."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import pytest

import trt_kv
from tests.bare_python import make_bare_environment
from trt_kv import AsyncEngine, Engine, Generation, SamplingParams
from trt_kv.cli import main
from trt_kv.errors import MissingDependencyError
from trt_kv.runtime import async_engine, engine, generation, sampling

ROOT = Path(__file__).parent.parent


def test_public_names_are_the_classes_themselves() -> None:
    assert [AsyncEngine, Engine, Generation, SamplingParams] == [
        async_engine.AsyncEngine,
        engine.Engine,
        generation.Generation,
        sampling.SamplingParams,
    ]
    assert set(trt_kv.__all__) <= set(dir(trt_kv))


def test_type_checkers_know_the_public_names() -> None:
    """mypy fails at these lines if the package's own ``__getattr__`` hides the types."""
    assert_type(SamplingParams(max_new_tokens=3).max_new_tokens, int)
    if TYPE_CHECKING:
        assert_type(Engine.load("an engine").generate("a prompt").text, str)


def test_importing_the_package_loads_no_other() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import trt_kv; print(*{{m.partition('.')[0] for m in sys.modules}})"
    answer = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(answer.stdout.split()) - sys.stdlib_module_names == {"__main__", "trt_kv"}


def test_a_misspelt_name_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="Engin"):
        exec("from trt_kv import Engin", {})
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        trt_kv.Engin  # type: ignore[attr-defined]  # noqa: B018


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trt_kv.runtime.engine")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match="'tokenizers' is not installed\n  fix: pip install trt-kv"):
        _ = trt_kv.Engine


def test_the_module_is_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Output and exit codes, with click alone installed."""
    (make_bare_environment(tmp_path) / "trt_kv.pth").write_text(str(ROOT))
    for arguments in (["--help"], ["generate", "--no-such-option"]):
        answer = subprocess.run(
            [tmp_path / "bin" / "python", "-m", "trt_kv", *arguments], capture_output=True, text=True, check=False, cwd="/"
        )
        assert answer.returncode == main(arguments)
        assert (answer.stdout, answer.stderr) == capsys.readouterr()
