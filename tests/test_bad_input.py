"""What a user can get wrong, at the command line: a clear error, the right exit code, no traceback, nothing left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import edit_config, write_checkpoint
from tests.engines import traced_once
from trt_kv.cli.app import main
from trt_kv.export import engine as engine_module
from trt_kv.runtime.engine import Engine

Refused = Callable[..., str]


@pytest.fixture
def refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Refused:
    """Run a command line that must fail with ``exit_code`` in an empty folder, leave nothing there, and return its error."""
    folder = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(engine_module, "graph_from_checkpoint", traced_once)

    def run_refused(*words: object, exit_code: int) -> str:
        capfd.readouterr()
        assert main([str(word) for word in words]) == exit_code
        said = capfd.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert "internal error" not in said.err
        assert list(folder.iterdir()) == []
        return said.err

    return run_refused


@pytest.fixture
def checkpoint(small_checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint that a test may break."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(small_checkpoint_folder, folder)
    return folder


KNOWN_NAMES = {
    "--policy": "prefixkv, prefixkv_paper",
    "--model": "llama3",
    "--score": "mass",
    "--target": "onnxruntime",
}


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((command, option) for command in ("build", "calibrate", "export") for option in list(KNOWN_NAMES)[:3]),
        ("build", "--target"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(command: str, option: str, refused: Refused) -> None:
    said = refused(command, option, "nonsense", "--out", "there", exit_code=2)
    assert "unknown" in said
    assert "'nonsense'" in said
    assert KNOWN_NAMES[option] in said


@pytest.mark.parametrize("command", ["build", "calibrate", "export"])
@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "nan", "inf", "-0.0"])
def test_a_budget_outside_0_to_1_is_refused(command: str, budget: str, refused: Refused) -> None:
    said = refused(command, "--budget", budget, "--out", "there", exit_code=2)
    assert "(0, 1]" in said
    assert "--budget 0.5" in said


@pytest.mark.parametrize("budget", ["", "half", "50%", "0,5"])
def test_a_budget_that_is_no_number_is_refused(budget: str, refused: Refused) -> None:
    assert "'--budget'" in refused("build", "--budget", budget, exit_code=2)


@pytest.mark.parametrize("page_size", [0, -1, 129, 200_000, 10**6, 10**30])
@pytest.mark.parametrize(
    "words",
    [
        ("build", "--policy", "full"),
        ("build", "--policy", "freekv", "--set", "drift=calibrated"),
        ("calibrate", "--policy", "freekv", "--correction-rate", "0.1"),
    ],
    ids=["build", "build with drift", "calibrate"],
)
def test_pages_longer_than_the_context_are_refused(
    words: tuple[str, ...], page_size: int, small_checkpoint_folder: Path, refused: Refused
) -> None:
    """Before anything is measured or made."""
    error = refused(*words, "--checkpoint", small_checkpoint_folder, "--page-size", page_size, exit_code=2)
    assert f"got: {page_size}" in error
    assert "--page-size" in error


def overwrite_middle(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 64)


def rename_tensor(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "has no safetensors weights"),
    "truncated weights": (lambda c: os.truncate(c / "model.safetensors", 5000), "model.safetensors"),
    "empty weights": (lambda c: os.truncate(c / "model.safetensors", 0), "model.safetensors"),
    "garbage in the header": (lambda c: overwrite_middle(c / "model.safetensors"), "model.safetensors"),
    "a tensor of another name": (
        lambda c: rename_tensor(c, b"layers.2.mlp.up_proj", b"layers.9.mlp.up_proj"),
        "layers.2.mlp.up",
    ),
    "another depth": (lambda c: edit_config(c, num_hidden_layers=4, layer_types=...), "model.layers.3"),
    "another width": (lambda c: edit_config(c, intermediate_size=81), "does not have the shape"),
    "no config": (lambda c: (c / "config.json").unlink(), "config.json is missing"),
    "half a config": (lambda c: os.truncate(c / "config.json", 40), "config.json"),
    "a field missing": (lambda c: edit_config(c, hidden_size=...), "hidden_size"),
    "unknown architecture": (lambda c: edit_config(c, model_type="gpt_neox", architectures=["GPTNeoX"]), "llama"),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), "tokenizer.json"),
    "half a tokenizer": (lambda c: os.truncate(c / "tokenizer.json", 999), "tokenizer.json"),
    "no such folder": (shutil.rmtree, "checkpoint"),
}


@pytest.mark.parametrize("policy", ["full", "prefixkv"])
@pytest.mark.parametrize("damage", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_makes_no_engine(damage: str, policy: str, checkpoint: Path, refused: Refused) -> None:
    break_it, said = BROKEN_CHECKPOINTS[damage]
    break_it(checkpoint)
    error = refused("build", "--checkpoint", checkpoint, "--policy", policy, "--out", "engine", exit_code=1)
    assert error.startswith(("error: ", "no PROMPTS given"))
    assert said in error


def test_a_sliding_window_is_refused_not_ignored(checkpoint: Path, refused: Refused) -> None:
    edit_config(checkpoint, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=16)
    assert "sliding" in refused("build", "--checkpoint", checkpoint, "--policy", "full", "--out", "engine", exit_code=1)


def test_swapped_shards_are_refused(tmp_path: Path, refused: Refused) -> None:
    folder = write_checkpoint(tmp_path / "sharded", "llama-tied", shard_size="60KB")
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert first.name in refused("build", "--checkpoint", folder, "--policy", "full", "--out", "engine", exit_code=1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is not a trt-kv recipe"),
        ("[0.5, 0.5]", "is not a trt-kv recipe"),
        ("not json", "is not JSON"),
        ("", "is not JSON"),
    ],
    ids=["empty object", "published list", "text", "empty"],
)
def test_a_file_that_is_no_recipe_is_refused(
    content: str, said: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "recipe.json").write_text(content)
    error = refused("build", "--checkpoint", checkpoint, "--recipe", tmp_path / "recipe.json", "--out", "engine", exit_code=1)
    assert said in error


@pytest.mark.parametrize("field", ["digest", "n_layers"])
def test_a_recipe_for_another_model_is_refused(
    field: str, checkpoint: Path, half_folder: Path, tmp_path: Path, refused: Refused
) -> None:
    """Of another depth; and of the same depth but other weights."""
    recipe = json.loads((half_folder / "recipe.json").read_text())
    if field == "digest":
        recipe["model"]["n_layers"] = 3
        recipe["kept"] = [0.5] * 3
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    error = refused("build", "--checkpoint", checkpoint, "--recipe", tmp_path / "recipe.json", "--out", "engine", exit_code=1)
    assert "the recipe is for another model (llama3-tiny)" in error
    assert "trt-kv calibrate" in error


@pytest.mark.parametrize("prompt", ["", " ", "\n", " \t\n "], ids=repr)
def test_an_empty_prompt_is_refused(prompt: str, small_folder: Path, tmp_path: Path, refused: Refused) -> None:
    assert "the prompt is empty" in refused("generate", small_folder, prompt, exit_code=2)
    (tmp_path / "prompt.txt").write_text(prompt)
    assert "the prompt is empty" in refused("generate", small_folder, "--prompt-file", tmp_path / "prompt.txt", exit_code=2)


def test_a_prompt_longer_than_the_positions_is_refused(small_folder: Path, refused: Refused) -> None:
    error = refused("generate", small_folder, "storm " * 128, exit_code=2)
    assert "longer than the model's positions" in error
    assert "got: 129 tokens" in error
    assert "expected: at most 128" in error


@pytest.mark.parametrize(
    "words",
    [
        ("--max-new-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--top-k", "-1"),
        ("--seed", "-1"),
        ("--stop", ""),
    ],
    ids="=".join,
)
def test_impossible_sampling_is_refused(words: tuple[str, str], small_folder: Path, refused: Refused) -> None:
    error = refused("generate", small_folder, "the old storm", *words, exit_code=2)
    assert words[0].removeprefix("--").replace("-", "_") in error
    assert "expected:" in error


def test_a_prompt_that_does_not_fit_into_memory_is_refused(
    small_folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trt_kv.runtime.backends.host.load.free_for_cache", lambda _: 0)
    error = refused("generate", small_folder, "storm " * 50, exit_code=1)
    assert "the KV pool is too small for this request" in error
    tokens = re.search(r"cache_tokens=(\d+) \(--cache-tokens (\d+)\)", error)
    assert tokens is not None
    assert tokens.group(1) == tokens.group(2)


COMMANDS_ON_ENGINES = (("inspect",), ("generate", "the old storm"))


def on_engine(command: tuple[str, ...], engine: Path) -> list[object]:
    return [command[0], engine, *command[1:]]


@pytest.mark.parametrize("command", COMMANDS_ON_ENGINES, ids=lambda c: c[0])
@pytest.mark.parametrize("kind", ["missing", "an empty folder", "a file", "a checkpoint", "half-built"])
def test_what_is_no_engine_is_refused(
    kind: str, command: tuple[str, ...], checkpoint: Path, broken: Path, tmp_path: Path, refused: Refused
) -> None:
    place = tmp_path / "place"
    match kind:
        case "an empty folder":
            place.mkdir()
        case "a file":
            place.write_text("text")
        case "a checkpoint":
            place = checkpoint
        case "half-built":
            place = broken
            (broken / "manifest.json").unlink()
    error = refused(*on_engine(command, place), exit_code=1)
    assert f"{place} is not an engine" in error
    assert "expected: a folder made by `trt-kv build`" in error
    assert "fix: " in error


@pytest.mark.parametrize("command", COMMANDS_ON_ENGINES, ids=lambda c: c[0])
@pytest.mark.parametrize(
    "name", ["graphs/weights.data", "graphs/segment_02.onnx", "tokenizer.json", "recipe.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_engine_is_refused(damage: str, name: str, command: tuple[str, ...], broken: Path, refused: Refused) -> None:
    path = broken / name
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            os.truncate(path, path.stat().st_size // 2)
        case "changed":
            content = path.read_bytes()
            path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    error = refused(*on_engine(command, broken), exit_code=1)
    assert name in error
    assert "build the engine again" in error


@pytest.mark.parametrize("command", COMMANDS_ON_ENGINES, ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"kept": 0.6', '"kept": 0.9', "was changed after the build"),
        ('"sinks": 1', '"sinks": 0', "was changed after the build"),
        ('"version": 3', '"version": 4', "version 4"),
        ('"target": "onnxruntime"', '"target": "tensorrt"', "was changed after the build"),
        ("{", "", "is not JSON"),
    ],
    ids=["budget", "sinks", "version", "target", "brace"],
)
def test_a_manifest_edited_by_hand_is_refused(
    old: str, new: str, said: str, command: tuple[str, ...], broken: Path, refused: Refused
) -> None:
    path = broken / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    error = refused(*on_engine(command, broken), exit_code=1)
    assert said in error
    assert str(path) in error


def test_a_debugger_sees_the_traceback(broken: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (broken / "recipe.json").unlink()
    assert main(["generate", str(broken), "text", "--debug"]) == 1
    said = capfd.readouterr().err
    assert "Traceback" in said
    assert "EngineError" in said
    assert said.rstrip().endswith("fix: build the engine again")


def test_ctrl_c_while_generating_exits_with_130(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What has been said stays said."""
    stream = Engine.stream

    def interrupted(*arguments: Any, **options: Any) -> Any:
        segments = stream(*arguments, **options)
        yield next(segments)
        yield next(segments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupted)
    assert main(["generate", str(small_folder), "the old storm"]) == 130
    said = capfd.readouterr()
    assert said.out.strip()
    assert said.err.strip() == "interrupted"


def test_exit_codes_are_those_of_the_process(small_folder: Path, tmp_path: Path) -> None:
    """Once through a real process of its own: 0, 1 and 2."""
    code = "import sys; from trt_kv.cli import main; sys.exit(main())"
    for words, exit_code in (
        (["generate", str(small_folder), "the old storm", "--max-new-tokens", "2"], 0),
        (["generate", str(tmp_path), "the old storm"], 1),
        (["generate", str(small_folder), ""], 2),
    ):
        answer = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert answer.returncode == exit_code, answer.stderr
        assert "Traceback" not in answer.stderr
