"""What a user installs is what the tree holds, and what CI pins is what it installs."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from tests.bare_python import make_bare_environment
from trt_kv import require

ROOT = Path(__file__).parent.parent
LINKED = ("calibration", "export", "plugins", "runtime", "serving")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this tree and the wheel made from that sdist; the tree itself is left as it is."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    for name in ("trt_kv", *LINKED):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def files_of_tree() -> set[str]:
    """Every file a user needs: all of trt_kv with the linked folders read through their links."""
    return {
        str(folder.relative_to(ROOT) / file.name)
        for folder in folders_below(ROOT / "trt_kv")
        for file in folder.iterdir()
        if file.is_file()
    }


def folders_below(folder: Path) -> Iterator[Path]:
    yield folder
    for child in folder.iterdir():
        if child.is_dir() and child.name != "__pycache__":
            yield from folders_below(child)


@pytest.mark.parametrize("name", LINKED)
def test_code_folders_are_relative_links(name: str) -> None:
    link = ROOT / "trt_kv" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


def test_the_wheel_holds_the_whole_tree_and_one_top_level_name(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (top_level,) = [name for name in archive.namelist() if name.endswith("top_level.txt")]
        assert archive.read(top_level).decode().split() == ["trt_kv"]
    assert names == files_of_tree()


def test_the_wheel_holds_files_instead_of_links(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            assert info.external_attr >> 28 != 0xA, f"{info.filename} is a symbolic link"
        for name in LINKED:
            assert archive.read(f"trt_kv/{name}/__init__.py") == (ROOT / name / "__init__.py").read_bytes()


def test_the_installed_wheel_answers_help_with_click_alone(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    make_bare_environment(tmp_path)
    python = tmp_path / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    installed = subprocess.run(
        [*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0, installed.stderr
    answer = subprocess.run([python.with_name("trt-kv"), "--help"], capture_output=True, text=True, check=True, cwd="/")
    assert answer.stdout.startswith("Usage: trt-kv")


def test_bare_names_of_the_code_folders_are_not_installed() -> None:
    """A user's own module called ``export`` must never meet ours. Asked away from the root, where the folders are."""
    code = f"import importlib.util as u, trt_kv.export; print([n for n in {LINKED!r} if u.find_spec(n)])"
    answer = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_required_packages_are_those_of_pyproject() -> None:
    project = PYPROJECT["project"]
    assert set(require.BASE) == names_of(project["dependencies"])
    for extra, packages in require.EXTRAS.items():
        assert set(packages) == names_of(project["optional-dependencies"][extra])


def names_of(requirements: list[str]) -> set[str]:
    return {Requirement(requirement).name for requirement in requirements}


def test_every_package_that_ci_installs_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(r.name): r for r in map(Requirement, (line for line in lines if not line.startswith("#")))}
    wanted = set(reachable_distributions("trt-kv", "dev"))
    assert wanted - set(pins) == set()
    for name in wanted:
        assert pins[name].specifier.contains(importlib.metadata.version(name)), f"{name} is not the pinned one"


def reachable_distributions(root: str, root_extra: str) -> Iterator[NormalizedName]:
    """Everything that ``root[root_extra]`` installs here; torch's own GPU libraries are pinned by torch, exactly."""
    todo, done = [(canonicalize_name(root), root_extra)], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        if name != canonicalize_name(root):
            yield name
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            child = canonicalize_name(requirement.name)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            if child.startswith(("nvidia-", "cuda-")):
                continue
            todo += [(child, wanted) for wanted in ("", *requirement.extras)]


def test_constraints_name_no_place() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert "+" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


def test_every_core_module_stands_in_both_import_contracts() -> None:
    """A core module that no contract names would be free to import anything."""
    layers, core = PYPROJECT["tool"]["importlinter"]["contracts"][:2]
    layered = {name.strip(" ()") for name in layers["layers"][-1].split(":")}
    forbidden = {name.removeprefix("trt_kv.") for name in core["source_modules"]}
    present = {path.stem for path in (ROOT / "trt_kv").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert present - {"__init__", "__main__", "cli", "decoder", "pipeline", "rotation", *LINKED} == layered
    assert forbidden == layered
