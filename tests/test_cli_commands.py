"""The commands on a real, small checkpoint, as a user types them."""

import contextlib
import importlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.engines import Run
from trt_kv.digests import document_digest
from trt_kv.manifest import load_manifest
from trt_kv.recipe import Recipe
from trt_kv.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of calibration prompts."""
    words = "the old storm marched toward a narrow tower . question : what does oscar hold ?".split()
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, 60)) for _ in range(4)) + "\n")
    return path


def test_from_a_checkpoint_to_text(run: Run, small_checkpoint_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Calibrate and build in one command, inspect, generate; a second build has nothing to do."""
    build = ("build", "--checkpoint", small_checkpoint_folder, "--budget", "0.4", "--out", "engines/first")
    calibration = ("--prompts", prompts, "--samples", "3", "--seed", "5")
    code, out, err = run(*build, *calibration)
    assert (code, err) == (0, "")
    assert out == "engine: engines/first\nnext:   trt-kv generate engines/first 'a prompt'\n"
    manifest = load_manifest(tmp_path / "engines" / "first")
    assert sum(manifest.kept_shares) / 3 == pytest.approx(0.4, abs=0.02)
    assert len(set(manifest.kept_shares)) > 1
    assert {"recipe.json", "recipe.png", "tokenizer.json"} <= set(manifest.files)
    recipe = Recipe.load(tmp_path / "engines" / "first" / "recipe.json")
    assert (recipe.budget, len(recipe.calibration.samples), recipe.calibration.seed) == (0.4, 3, 5)

    code, out, err = run("inspect", "engines/first")
    assert (code, err) == (0, "")
    shown = [line.split()[-1] for line in out.splitlines() if "█" in line]
    assert shown == [*(f"{share:.1%}" for share in manifest.kept_shares)]
    assert "40% of the tokens" in out
    assert f"--budget 0.4 --score window --window 32 --samples 3 --seed 5 --prompts {prompts}" in out

    code, out, err = run("generate", "engines/first", "the old storm", "--max-new-tokens", "6")
    engine = Engine.load(tmp_path / "engines" / "first", n_threads=1)
    assert (code, out) == (0, engine.generate("the old storm", max_new_tokens=6).text + "\n")
    assert err.startswith("[4 prompt tokens, ")
    assert err.count("\n") == 1


def test_a_build_that_has_nothing_to_do_says_so(run: Run, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """The same command from the same files; after any change it is refused, and with --force built again."""
    shutil.copytree(small_checkpoint_folder, tmp_path / "model")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (tmp_path / "model" / name).write_text("{{ bos_token }}")
    build = ("build", "--checkpoint", "model", "--policy", "full", "--out", "engine")
    assert run(*build)[0] == 0
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} <= set(load_manifest(tmp_path / "engine").files)
    before = (tmp_path / "engine" / "manifest.json").stat().st_mtime_ns
    assert run(*build) == (0, "engine: engine\nnext:   trt-kv chat engine\n", "engine is up to date\n")
    assert (tmp_path / "engine" / "manifest.json").stat().st_mtime_ns == before

    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    code, _, err = run(*build)
    assert code == 2
    assert "engine exists already" in err
    assert "--force" in err
    assert run(*build, "--force")[0] == 0
    assert load_manifest(tmp_path / "engine").config.eos_token_ids == (2, 7)

    rewrite = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    rewrite["policy"]["seed"] = 5  # as if a default of the same words had been another one
    rewrite["digest"] = document_digest({name: value for name, value in rewrite.items() if name != "digest"})
    (tmp_path / "engine" / "manifest.json").write_text(json.dumps(rewrite))
    assert run(*build)[0] == 2
    assert run(*build, "--force")[0] == 0
    (tmp_path / "engine" / "graphs" / "segment_00.onnx").unlink()
    assert run(*build)[0] == 2
    assert run(*build, "--force")[0] == 0
    assert run("inspect", "engine")[0] == 0


def test_a_build_from_files_has_nothing_to_do_while_they_are_the_same(
    run: Run, small_checkpoint_folder: Path, small_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """Calibration prompts, and a recipe."""
    source = ("build", "--checkpoint", small_checkpoint_folder)
    shutil.copyfile(prompts, tmp_path / "prompts.txt")
    calibrated = (*source, "--prompts", "prompts.txt", "--samples", "2")
    assert run(*calibrated)[0] == 0
    (folder,) = (tmp_path / "engines").iterdir()
    assert folder.name == f"{small_checkpoint_folder.name}-prefixkv-prompts=prompts-samples=2"
    assert run(*calibrated)[::2] == (0, f"engines/{folder.name} is up to date\n")
    with (tmp_path / "prompts.txt").open("a") as file:
        file.write("the old storm\n")
    code, _, err = run(*calibrated)
    assert code == 2
    assert f"{folder.name} exists already" in err

    shutil.copyfile(small_folder / "recipe.json", tmp_path / "recipe.json")
    given = (*source, "--recipe", "recipe.json", "--out", "given")
    assert run(*given)[0] == 0
    assert run(*given)[::2] == (0, "given is up to date\n")
    shutil.copyfile(folder / "recipe.json", tmp_path / "recipe.json")
    assert run(*given)[0] == 2


def test_a_recipe_made_apart_builds_the_same_engine(
    run: Run, small_checkpoint_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """calibrate, then build --recipe: the budgets come from the recipe, whatever score they are applied to."""
    source = ("--checkpoint", small_checkpoint_folder)
    words = ("--budget", "0.7", "--score", "window", "--window", "8", "--prompts", prompts, "--samples", "2")
    code, out, err = run("calibrate", *source, *words, "--out", "recipes/mine.json", "--to-published", "lists")
    assert (code, err) == (0, "")
    next_build = (
        f"--checkpoint {small_checkpoint_folder} --policy prefixkv --budget 0.7 --score window --window 8"
        " --recipe recipes/mine.json"
    )
    assert out.splitlines()[1:] == [
        "recipe: recipes/mine.json",
        f"next:   trt-kv build --model llama3 {next_build}",
    ]
    assert (tmp_path / "recipes" / "mine.png").read_bytes().startswith(b"\x89PNG")
    (published,) = (tmp_path / "lists").iterdir()
    recipe = Recipe.load(tmp_path / "recipes" / "mine.json")
    assert json.loads(published.read_text()) == pytest.approx([1 - share for share in recipe.kept])

    code, _, err = run(
        "build", *source, "--recipe", "recipes/mine.json", "--score", "window", "--window", "8", "--out", "engine"
    )
    assert (code, err) == (0, "")
    assert load_manifest(tmp_path / "engine").kept_shares == pytest.approx(recipe.kept)
    assert load_manifest(tmp_path / "engine").policy.kept == 0.7

    code, _, err = run(
        "build", *source, "--recipe", "recipes/mine.json", "--score", "window", "--window", "8", "--budget", "0.3"
    )
    assert code == 2
    assert "made for another budget" in err
    code, _, err = run(
        "build", *source, "--policy", "h2o", "--set", "budget=recipe", "--recipe", "recipes/mine.json", "--out", "other"
    )
    assert code == 0
    assert "add --set score=window window=8 heads=each pooling=15" in err
    other = load_manifest(tmp_path / "other")
    assert (other.policy.score, other.policy.heads) == ("mass", "each")
    assert other.kept_shares == pytest.approx(recipe.kept)


@pytest.mark.parametrize("command", ["build", "calibrate", "export"])
def test_ctrl_c_at_any_report_of_progress_exits_with_130_and_leaves_nothing(
    command: str,
    run: Run,
    small_checkpoint_folder: Path,
    small_folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calibration included."""
    calls_until_ctrl_c = itertools.count()

    @contextlib.contextmanager
    def interrupting() -> Iterator[Callable[..., None]]:
        def on_progress(*_: object) -> None:
            if next(calls_until_ctrl_c) == 0:
                raise KeyboardInterrupt

        yield on_progress

    monkeypatch.setattr(importlib.import_module(f"trt_kv.cli.{command}"), "progress_bars", interrupting)
    words = [command, "--checkpoint", str(small_checkpoint_folder), "--out", "there.json"]
    recipe = ["--recipe", str(small_folder / "recipe.json")]
    words += recipe if command == "export" else ["--prompts", str(prompts), "--samples", "2"]
    for number in itertools.count():
        calls_until_ctrl_c = itertools.count(-number)
        code, out, err = run(*words)
        if code == 0:
            break
        assert (code, out) == (130, "")
        assert err.endswith("interrupted\n")
        assert list(tmp_path.iterdir()) == []
    assert number >= 2


def test_a_published_list_becomes_a_recipe(run: Run, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs_0.4.json").write_text("[0.1, 0.5, 0.6]")
    words = ("--checkpoint", small_checkpoint_folder, "--from-published", "theirs_0.4.json", "--budget", "0.6")
    assert run("calibrate", *words)[0] == 0
    recipe = Recipe.load(tmp_path / "recipes" / f"{small_checkpoint_folder.name}-prefixkv-budget=0.6.json")
    assert recipe.kept == pytest.approx([0.9, 0.5, 0.4])
    assert recipe.budget == 0.6


def test_a_picture_never_overwrites_its_recipe(run: Run, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    code, _, err = run("calibrate", "--checkpoint", small_checkpoint_folder, "--out", "recipe.png")
    assert code == 2
    assert "would overwrite" in err
    assert list(tmp_path.iterdir()) == []


def test_export_writes_the_graphs_alone(run: Run, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("export", "--checkpoint", small_checkpoint_folder, "--policy", "full", "--out", "graphs")
    assert (code, out) == (0, "graph: graphs/decode.onnx\ngraph: graphs/prefill.onnx\n")
    assert {path.name for path in (tmp_path / "graphs").iterdir()} == {"decode.onnx", "prefill.onnx", "weights.data"}
    onnx.checker.check_model(tmp_path / "graphs" / "prefill.onnx")
    code, _, err = run("export", "--checkpoint", small_checkpoint_folder, "--policy", "full", "--out", "graphs")
    assert code == 2
    assert "graphs exists already" in err


def test_export_of_a_policy_with_budgets_needs_its_recipe(run: Run, small_checkpoint_folder: Path, small_folder: Path) -> None:
    words = ("export", "--checkpoint", small_checkpoint_folder, "--out", "graphs")
    code, _, err = run(*words)
    assert code == 1
    assert "needs a recipe" in err
    assert run(*words, "--recipe", small_folder / "recipe.json")[0] == 0
    code, _, err = run(*words, "--policy", "full", "--recipe", small_folder / "recipe.json")
    assert code == 2
    assert "reads no recipe" in err


def test_the_prompt_may_come_from_a_file(run: Run, small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("the old storm\n")
    words = ("generate", small_folder, "--max-new-tokens", "4")
    assert run(*words, "--prompt-file", "prompt.txt")[:2] == run(*words, "the old storm")[:2]


def test_sampling_options_reach_the_runtime(run: Run, small_folder: Path, small_engine: Engine) -> None:
    words = "--max-new-tokens 12 --temperature 1.5 --top-p 0.9 --top-k 50 --seed 4 --stop old --stop narrow".split()
    expected = small_engine.generate(
        "the old storm", max_new_tokens=12, temperature=1.5, top_p=0.9, top_k=50, seed=4, stop=("old", "narrow")
    )
    assert run("generate", small_folder, "the old storm", *words)[1] == expected.text + "\n"


def test_the_cache_and_the_threads_are_sized_from_the_command_line(
    run: Run, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an error advises can be done, with generate and with evaluate."""
    loaded: list[dict[str, object]] = []
    load = Engine.load

    def remember(path: Path, **options: Any) -> Engine:
        loaded.append({name: options.get(name) for name in ("cache_tokens", "chunk", "n_threads")})
        return load(path, **options)

    monkeypatch.setattr(Engine, "load", remember)
    code, _, err = run("generate", small_folder, "the old storm " * 9, "--cache-tokens", "5")
    advised = err.split("(--cache-tokens ")[1].split(")")[0]
    assert code == 1
    sizes = ("--cache-tokens", advised, "--chunk", "7", "--threads", "1")
    assert run("generate", small_folder, "the old storm " * 9, *sizes)[0] == 0
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "the old storm", "expected": "marched toward"}\n')
    assert run("evaluate", small_folder, "--tasks", tasks, *sizes)[0] == 0
    assert loaded[1:] == [{"cache_tokens": int(advised), "chunk": 7, "n_threads": 1}] * 2
    assert run("generate", small_folder, "the", "--host-tokens", "9")[0] == 2
    assert run("generate", small_folder, "the", "--threads", "0")[0] == 2


def test_text_comes_while_it_is_made(full_folder: Path) -> None:
    """Of a long answer the first words can be read before the last are made, and a reader that goes away ends it."""
    code = "import sys; from trt_kv.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "generate", str(full_folder), "the old storm", "--max-new-tokens", "8000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(10)) == 10
        assert process.poll() is None
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(timeout=30) == 1
    assert "Traceback" not in said
