"""A loaded engine: what it accepts and refuses, and that engines do not disturb one another."""

import dataclasses
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from tests.engines import assert_nothing_leaked, random_ids
from trt_kv.digests import digest_of
from trt_kv.errors import CapacityError, EngineError, RecipeError, UsageError
from trt_kv.json_file import read_json
from trt_kv.manifest import FILE_NAME, FileRecord, Manifest, load_manifest
from trt_kv.presets import PRESETS
from trt_kv.runtime import memory
from trt_kv.runtime.backends.host import load as loading_module
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.reservation import RequestSize
from trt_kv.runtime.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_POSITIONS = 128
"""Of the small checkpoint."""


def load(folder: Path, **options: Any) -> Engine:
    return Engine.load(folder, **{"n_threads": 1, "cache_tokens": 400, **options})


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """As a build that had made something else would have written it."""
    dataclasses.replace(load_manifest(folder), **changes).save(folder)


def test_text_and_token_ids_are_the_same_prompt(small_engine: Engine) -> None:
    ids = small_engine.encode("the old storm")
    assert ids[0] == 1
    assert small_engine.generate(ids, max_new_tokens=5) == small_engine.generate("the old storm", max_new_tokens=5)


def test_prompts_are_encoded_as_transformers_encodes_them(full_engine: Engine) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(PRESETS["llama3"].bundled_folder)
    for text in ("the old storm", " ? unheard of ", "question : what does oscar hold ? answer :"):
        assert full_engine.encode(text) == theirs(text).input_ids


def test_a_tokenizer_that_would_cut_or_pad_prompts_may_not(tmp_path: Path) -> None:
    """Files saved after training often ask for it."""
    tokenizer = Tokenizer.from_file(str(PRESETS["llama3"].bundled_folder / "tokenizer.json"))
    expected = tokenizer.encode("the old storm").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json", error=EngineError).encode("the old storm").ids == expected


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", []], ids=repr)
def test_an_empty_prompt_is_refused(small_engine: Engine, prompt: Any) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        small_engine.generate(prompt)


@pytest.mark.parametrize("stray", [-1, 269, 10**9])
def test_tokens_outside_the_vocabulary_are_refused(small_engine: Engine, stray: int) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary") as caught:
        small_engine.generate([1, stray, 5])
    assert caught.value.expected == "0 .. 268"


def test_a_prompt_may_fill_all_positions_but_not_more(small_engine: Engine) -> None:
    """The last position has logits, so one more token can be said."""
    generation = small_engine.generate(random_ids(small_engine, MAX_POSITIONS, seed=1), max_new_tokens=10)
    assert len(generation.token_ids) <= 1
    assert generation.n_prompt_tokens == MAX_POSITIONS
    with pytest.raises(UsageError, match="longer than the model's positions") as caught:
        small_engine.generate(random_ids(small_engine, MAX_POSITIONS + 1, seed=1))
    assert (caught.value.got, caught.value.expected) == ("129 tokens", "at most 128")


def test_generation_stops_at_the_last_position(small_engine: Engine) -> None:
    config = dataclasses.replace(small_engine.manifest.config, eos_token_ids=())
    manifest = dataclasses.replace(small_engine.manifest, config=config)
    engine = Engine(small_engine.folder, manifest, small_engine.loaded, small_engine.tokenizer)
    generation = engine.generate(random_ids(small_engine, MAX_POSITIONS - 9, seed=1), max_new_tokens=1000)
    assert len(generation.token_ids) == 10
    assert generation.finish_reason == "length"
    assert generation.num_computed_tokens == MAX_POSITIONS


def test_a_batch_is_refused_as_a_whole(small_engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"prompts\[1\] is empty"):
        small_engine.generate_batch(["the old storm", ""])
    with pytest.raises(UsageError, match="a batch is a list of prompts"):
        small_engine.generate_batch("the old storm")
    assert small_engine.generate_batch([]) == []
    assert_nothing_leaked(small_engine)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"chunk": 0}, "bad chunk"), ({"cache_tokens": 0}, "bad cache_tokens"), ({"n_threads": -1}, "bad n_threads")],
    ids=str,
)
def test_impossible_options_are_refused(small_folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(small_folder, **options)


def test_what_can_never_fit_is_refused_and_what_does_not_fit_now_waits(small_folder: Path) -> None:
    engine = load(small_folder, cache_tokens=40)
    prompt = random_ids(engine, 30, seed=1)
    alone = engine.generate(prompt, max_new_tokens=2)
    assert alone.n_prompt_tokens == 30
    with pytest.raises(CapacityError, match="too small for this request"):
        engine.generate(random_ids(engine, 41, seed=1), max_new_tokens=1)
    with pytest.raises(CapacityError, match="too small for this request"):
        engine.generate_batch([prompt, random_ids(engine, 41, seed=1)], max_new_tokens=1)
    assert engine.generate_batch([prompt] * 3, max_new_tokens=2) == [alone] * 3
    assert_nothing_leaked(engine)


def test_the_advice_of_a_refusal_is_right(small_folder: Path) -> None:
    """Loaded with the cache_tokens that the error names, the same request is served."""
    prompts = [random_ids(load(small_folder), n, seed=n) for n in (70, 33)]
    with pytest.raises(CapacityError) as caught:
        load(small_folder, cache_tokens=20).generate_batch(prompts, max_new_tokens=20)
    advised = int(str(caught.value.fix).split("cache_tokens=")[1].split()[0])
    assert len(load(small_folder, cache_tokens=advised).generate_batch(prompts, max_new_tokens=20)) == 2


def test_eviction_makes_room_for_more_sequences(small_folder: Path) -> None:
    """Kept shares of 0.6 on average: prompts that full caches could not hold together are served together."""
    engine = load(small_folder, cache_tokens=180)
    prompts = [random_ids(engine, 70, seed=seed) for seed in range(3)]
    assert 3 * 70 > 180
    generations = engine.generate_batch(prompts, max_new_tokens=3)
    assert [generation.n_prompt_tokens for generation in generations] == [70, 70, 70]
    assert_nothing_leaked(engine)
    for cache_tokens, n_together in (
        (180, 3),
        (160, 2),
    ):  # the last prompt is whole for a moment, beside what is left of others
        reservation = load(small_folder, cache_tokens=cache_tokens).core.reservation
        n_admitted = 0
        while reservation.reserve(n_admitted, RequestSize(n_prompt=70, max_new_tokens=3)):
            reservation.finish_reading(n_admitted)
            n_admitted += 1
        assert n_admitted == n_together


def test_the_default_pool_is_twice_the_positions_or_what_memory_allows(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(small_folder, cache_tokens=None).runner.pool.n_pages == 3 * -(-2 * MAX_POSITIONS // 5)
    monkeypatch.setattr(loading_module, "free_for_cache", lambda _: 0)
    assert load(small_folder, cache_tokens=None).runner.pool.n_pages == 3


def test_available_memory_counts_what_the_kernel_would_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemFree:   1 kB\nMemAvailable:   7 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    assert memory.available_bytes() == 7 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert memory.available_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_two_engines_in_one_process_do_not_disturb_each_other(
    full_engine: Engine, half_engine: Engine, small_engine: Engine
) -> None:
    engines = (full_engine, half_engine, small_engine)
    prompt = random_ids(full_engine, 70, seed=1)
    alone = [engine.generate(prompt, max_new_tokens=10) for engine in engines]
    streams = [engine.stream(prompt, max_new_tokens=10) for engine in engines]
    for _ in range(10):
        for stream in streams:
            next(stream, "")
    assert [stream.result for stream in streams] == alone


def test_a_folder_can_be_loaded_twice(small_folder: Path) -> None:
    first, second = load(small_folder), load(small_folder)
    prompt = random_ids(first, 40, seed=1)
    stream = first.stream(prompt, max_new_tokens=8)
    next(stream)
    assert second.generate(prompt, max_new_tokens=8).text == first.generate(prompt, max_new_tokens=8).text
    assert_nothing_leaked(second)


def test_a_read_only_folder_works_and_is_left_as_it_is(broken: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    for path in (broken, *broken.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    engine = load(broken)
    assert engine.generate("the old storm", max_new_tokens=3).n_prompt_tokens == 4
    assert {path: path.stat().st_mtime_ns for path in broken.rglob("*")} == before
    for path in (broken, *broken.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_an_engine_can_be_moved(broken: Path, small_engine: Engine, tmp_path: Path) -> None:
    """Nothing in it knows where it was built."""
    moved = tmp_path / "else where" / "ünïcode"
    moved.parent.mkdir()
    shutil.move(broken, moved)
    prompt = random_ids(small_engine, 20, seed=1)
    assert load(moved).generate(prompt, max_new_tokens=5) == small_engine.generate(prompt, max_new_tokens=5)


def test_loading_tells_its_progress(small_folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    load(small_folder, on_progress=lambda *call: told.append(call))
    assert {stage for stage, _, _ in told} == {"checking digests", "opening graphs", "compiling kernels"}
    for stage in {stage for stage, _, _ in told}:
        done = [done for name, done, _ in told if name == stage]
        totals = {total for name, _, total in told if name == stage}
        assert done == sorted(done)
        assert totals == {done[-1]}


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE_NAME)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a bit flipped": flip_a_bit,
    "a folder": make_a_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_is_found_and_named(broken: Path, small_folder: Path, damage: str) -> None:
    for path in all_files(broken):
        DAMAGES[damage](path)
        with pytest.raises(EngineError) as caught:
            load(broken)
        assert path.name in str(caught.value)
        assert "build the engine again" in str(caught.value)
        assert ("bytes" in str(caught.value.got)) == (damage in ("emptied", "truncated")), "sizes are compared before digests"
        if path.is_dir():
            path.rmdir()
        shutil.copyfile(small_folder / path.relative_to(broken), path)
    load(broken)


def test_swapped_files_are_found(broken: Path) -> None:
    first, second = broken / "graphs" / "segment_01.onnx", broken / "graphs" / "segment_02.onnx"
    first.rename(broken / "aside")
    second.rename(first)
    (broken / "aside").rename(second)
    with pytest.raises(EngineError, match="is not the file that was built"):
        load(broken)


def test_without_verification_sizes_are_not_trusted_blindly(broken: Path) -> None:
    """What cannot be opened is still told as an engine's error."""
    segment, tokenizer = broken / "graphs" / "segment_01.onnx", broken / "tokenizer.json"
    segment.write_bytes(b"nonsense")
    with pytest.raises(EngineError, match=r"segment_01\.onnx is not the file that was built"):
        load(broken, verify=False)
    rewrite_manifest(broken, files={**load_manifest(broken).files, "graphs/segment_01.onnx": record(segment)})
    with pytest.raises(EngineError, match="ONNX Runtime cannot load"):
        load(broken, verify=False)
    tokenizer.write_text("{}".ljust(tokenizer.stat().st_size))
    with pytest.raises(EngineError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        load(broken, verify=False)
    tokenizer.unlink()
    with pytest.raises(EngineError, match=r"tokenizer\.json is missing"):
        load(broken, verify=False)


def record(path: Path) -> FileRecord:
    return FileRecord(digest=digest_of(path), n_bytes=path.stat().st_size)


def replace_recipe(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another recipe in the engine, with the right digest in the manifest."""
    path = folder / "recipe.json"
    data = read_json(path, kind="recipe", error=RecipeError)
    change(data)
    path.write_text(json.dumps(data))
    rewrite_manifest(folder, files={**load_manifest(folder).files, "recipe.json": record(path)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda recipe: recipe["model"].update(digest="sha256:other"), "the recipe is for another model"),
        (lambda recipe: recipe["model"].update(n_layers=4) or recipe["kept"].append(0.5), "number of layers"),
        (lambda recipe: recipe.update(kept=[0.6, 0.3, 0.8]), "does not apply its recipe"),
        (lambda recipe: recipe.update(budget=0.7), "does not apply its recipe"),
        (lambda recipe: recipe.pop("kept"), "lacks fields"),
    ],
    ids=["another model", "another depth", "other shares", "another budget", "half a recipe"],
)
def test_a_recipe_that_is_not_the_engines_is_refused(broken: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    replace_recipe(broken, change)
    with pytest.raises((RecipeError, EngineError), match=said):
        load(broken)


def with_other_node(manifest: Manifest, **attributes: Any) -> dict[str, Any]:
    """The programs with the last layer's last prefill op changed."""
    *layers, last = manifest.programs["prefill"]
    *nodes, node = last
    changed = dataclasses.replace(node, attributes={**node.attributes, **attributes})
    return {**manifest.programs, "prefill": (*layers, (*nodes, changed))}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda _: {"target": "tensorrt"}, "does not run .*target 'tensorrt'"),
        (lambda _: {"dtype": "float8"}, "does not run .*float8"),
        (lambda m: {"op_versions": {**m.op_versions, "CachedAttention": 2}}, "does not run .*'CachedAttention': 2"),
        (lambda m: {"op_versions": {**m.op_versions, "FutureAttention": 1}}, "does not run .*RecallAttention"),
        (lambda m: {"policy": dataclasses.replace(m.policy, sinks=4)}, "layer 0 of the prefill graph .* does not apply"),
        (lambda m: {"policy": dataclasses.replace(m.policy, score="window")}, "layer 0 of the prefill graph .* does not apply"),
        (lambda m: {"programs": with_other_node(m, recent=0)}, "layer 2 of the prefill graph .* does not apply"),
        (lambda m: {"programs": with_other_node(m, kept_share=0.1)}, "does not apply its recipe"),
        (lambda m: {"programs": {**m.programs, "prefill": m.programs["decode"]}}, "does not apply the policy 'prefixkv_paper'"),
        (
            lambda m: {"programs": {**m.programs, "decode": m.programs["decode"][:2]}},
            "the programs are not of the model's layers",
        ),
    ],
    ids=["target", "type", "newer op", "unknown op", "sinks", "score", "recent", "share", "no eviction", "fewer layers"],
)
def test_an_engine_whose_policy_would_not_be_applied_is_refused(
    broken: Path, changes: Callable[[Manifest], dict[str, Any]], said: str
) -> None:
    """Though its manifest is whole and its digests are right."""
    rewrite_manifest(broken, **changes(load_manifest(broken)))
    with pytest.raises(EngineError) as caught:
        load(broken)
    assert re.search(said, str(caught.value), re.DOTALL)
    assert "build the engine again" in str(caught.value)
