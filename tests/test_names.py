"""Default names of engines: what differs has different names, and `make generate` finds what `make engine` made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trt_kv.cli.app import main

ROOT = Path(__file__).parent.parent
LONG_SETTINGS = (
    "tokens=256 sinks=17 recent=33 page_summary=deviation group_pooling=mean_raw tau=0.75 exempt_layers=0,1,2".split()
)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "llama3-prefixkv"),
        (["--policy", "snapkv", "--budget", "0.2"], "llama3-snapkv-budget=0.2"),
        (["--checkpoint", "models/mine/", "--policy", "full"], "mine-full"),
        (["--checkpoint", "models/mine", "--context", "4096", "--policy", "full"], "mine-full-context=4096"),
        (["--checkpoint", "owner/Llama-3.2-1B", "--policy", "full"], "Llama-3.2-1B-full"),
        (["--checkpoint", "owner/Llama-3.2-1B@v1.0", "--policy", "full"], "Llama-3.2-1B_v1.0-full"),
        (["--checkpoint", "owner/Llama@refs/pr/3:q/Llama.Q4_0.gguf", "--policy", "full"], "Llama.Q4_0_refs_pr_3-full"),
        (["--checkpoint", "models/Llama-3.2-1B.Q4_K_M.gguf", "--policy", "full"], "Llama-3.2-1B.Q4_K_M-full"),
        (["--model", "smollm2", "--policy", "full"], "smollm2-full"),
        (["--checkpoint", "a b/c'd $e", "--policy", "full"], "c_d_e-full"),
        (["--prompts", "FILE", "--samples", "3"], "llama3-prefixkv-prompts=file-samples=3"),
        (["--recipe", "FILE"], "llama3-prefixkv-recipe=file"),
        (["--policy", "full", "--samples", "3"], "llama3-full"),
        (["--policy", "full", "--page-size", "8", "--dtype", "float16"], "llama3-full-dtype=float16-page-size=8"),
        (["--quant", "int4", "--quant-block-size", "32", "--quant-accuracy-level", "4"], "llama3-prefixkv-int4"),
        (["--quant", "int4", "--quant-accuracy-level", "0"], "llama3-prefixkv-int4-level=0"),
        (
            ["--quant", "int8", "--quant-block-size", "64", "--quant-symmetric", "--quant-accuracy-level", "4"],
            "llama3-prefixkv-int8-block-size=64-symmetric",
        ),
        (["--target", "tensorrt", "--profile", "edge", "--policy", "full"], "llama3-full-target=tensorrt-profile=edge"),
        (
            ["--policy", "freekv", "--set", "tokens=256", "drift=calibrated", "--correction-rate", "0.2"],
            "llama3-freekv-tokens=256-drift=calibrated-correction-rate=0.2",
        ),
        (["--policy", "freekv", "--set", "drift=calibrated", "--correction-rate", "0.1"], "llama3-freekv-drift=calibrated"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_default_name_tells_model_policy_and_what_is_not_at_its_default(
    words: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.txt"
    file.touch()
    assert main(["build", "--where", *(str(file) if word == "FILE" else word for word in words)]) == 0
    assert capsys.readouterr().out == f"engines/{name}\n"


def test_a_long_name_is_cut_and_stays_different(capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    for last in ("softmax_scale=0.5", "softmax_scale=0.25"):
        checkpoint = "x" * 60
        words = [
            "--checkpoint",
            checkpoint,
            "--policy",
            "freekv",
            "--set",
            "group_pooling=mean_softmax",
            *LONG_SETTINGS[:3],
            last,
        ]
        assert main(["build", "--where", *words, *LONG_SETTINGS[5:]]) == 0
        names.append(capsys.readouterr().out.strip())
    assert names[0] != names[1]
    assert all(len(Path(name).name) < 140 for name in names)


@pytest.fixture
def recorded_make(tmp_path: Path) -> "Make":
    return Make(tmp_path)


class Make:
    """Runs make with a program for `trt-kv` that prints its arguments, one per line, except for `build --where`."""

    def __init__(self, folder: Path) -> None:
        self.environment = folder / "venv"
        (self.environment / "bin").mkdir(parents=True)
        program = self.environment / "bin" / "trt-kv"
        code = "import sys; from trt_kv.cli import main; sys.exit(main())"
        program.write_text(
            f"""#!/bin/bash
case "$*" in *--where*) exec '{sys.executable}' -c '{code}' "$@";; esac
printf '%s\\n' "$@"
"""
        )
        program.chmod(0o755)
        (self.environment / ".ready-build").touch()

    def __call__(self, *words: str) -> list[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "--no-print-directory", "-C", str(ROOT), f"VENV={self.environment}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout.splitlines()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ([], "engines/llama3-prefixkv"),
        (["POLICY=freekv", "SET=tokens=256 sinks=16", "PAGE_SIZE=8"], "engines/llama3-freekv-tokens=256-sinks=16-page-size=8"),
        (["QUANT=int4"], "engines/llama3-prefixkv-int4"),
        (["POLICY=snapkv", "BUDGET=0.2", "DTYPE=bfloat16"], "engines/llama3-snapkv-budget=0.2-dtype=bfloat16"),
        (["POLICY=snapkv", "DTYPE=bfloat16", "PROFILE=datacenter", "DEVICE=cuda"], "engines/llama3-snapkv"),
        (["OUT=engines/mine", "BUDGET=0.2"], "engines/mine"),
        (["ENGINE=two words"], "two words"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_make_generate_finds_the_engine_of_the_same_variables(
    variables: list[str], folder: str, recorded_make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """With DEVICE, DTYPE and PROFILE are those of loading if no engine was built with them."""
    generated = recorded_make("generate", "PROMPT=a 'quoted' prompt", *variables)
    assert generated[0] == "generate"
    assert generated[-2:] == [folder, "a 'quoted' prompt"]
    assert recorded_make("evaluate", *variables)[-1] == folder
    talked = recorded_make("chat", *variables, "ARGS=--temperature 0.5")
    assert (talked[0], talked[-1]) == ("chat", folder)
    assert talked[1:3] == ["--temperature", "0.5"]
    if not any(variable.startswith(("ENGINE", "DEVICE")) for variable in variables):
        built = recorded_make("engine", *variables)
        if "--out" not in built:
            assert main([*built, "--where"]) == 0
            assert capsys.readouterr().out == f"{folder}\n"
        else:
            assert built[built.index("--out") + 1] == folder
