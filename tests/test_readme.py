"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trt_kv.cli import main
from trt_kv.cli.app import COMMANDS

pytestmark = pytest.mark.early

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
POLICIES = (ROOT / "docs" / "policies.md").read_text()
EXAMPLE = ROOT / "examples" / "late_question.txt"
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make engine MODEL=llama3 POLICY=prefixkv` builds."""
    out = tmp_path_factory.mktemp("readme") / "engines" / "llama3-prefixkv"
    assert main(["build", "--model", "llama3", "--policy", "prefixkv", "--out", str(out)]) == 0
    return out


def test_inspect_shows_the_bars_of_the_readme(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(engine)]) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    bars = [line.strip() for line in README.splitlines() if "█" in line]
    assert len(bars) >= 3
    assert set(bars) <= set(shown)


def test_the_example_is_answered_as_the_readme_shows(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["generate", str(engine), "--prompt-file", str(EXAMPLE), "--max-new-tokens", "7"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "code of trent is 5 3 7"
    for line in (said.out.strip(), said.err.strip()):
        assert f"    {line}\n" in README


@pytest.mark.slow
def test_the_published_ranking_does_not_answer_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "published"
    assert main(["build", "--policy", "prefixkv_paper", "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt-file", str(EXAMPLE), "--max-new-tokens", "8"]) == 0
    assert "5 3 7" not in capsys.readouterr().out


@pytest.mark.slow
def test_reach_answers_it_with_the_share_that_the_page_on_policies_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reach = tmp_path / "reach"
    assert main(["build", "--policy", "reach", "--set", "floor=0", "--out", str(reach)]) == 0
    capsys.readouterr()
    assert main(["generate", str(reach), "--prompt-file", str(EXAMPLE), "--max-new-tokens", "8"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(" code of trent is 5 3 7")
    (share,) = re.findall(r"\((\d+)%", said.err)
    assert f"keeps {share} % of the bundled model's example prompt" in " ".join(POLICIES.split())


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("block", [*python_blocks(README), *python_blocks((ROOT / "docs" / "python.md").read_text())])
def test_the_python_blocks_run(block: str, engine: Path) -> None:
    assert '"engines/llama3-prefixkv"' in block
    done = subprocess.run([sys.executable, "-c", block], cwd=engine.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_example_script_runs(engine: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "several_prompts.py"), str(engine), str(EXAMPLE), str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    usage = subprocess.run(command[:2], capture_output=True, text=True, check=False)
    assert (usage.returncode, usage.stderr) == (1, "usage: python examples/several_prompts.py ENGINE FILE...\n")


def test_every_command_and_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"(?:^    |`)make ([a-z]+)", README, flags=re.MULTILINE))
    commands = set(re.findall(r"(?:^    \$ \.venv/bin/|`)trt-kv ([a-z]+)", README, flags=re.MULTILINE))
    assert {"engine", "generate", "test"} <= targets
    assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE) for target in targets)
    assert commands <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
