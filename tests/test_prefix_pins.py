"""Pinned prefixes are read once and stay; ``trt-kv prefix add`` reads them into files."""

import asyncio
import json
from pathlib import Path
from typing import Any

import click
import pytest

from tests.engines import Run, random_ids
from tests.serving import assert_idle, engine_under, small_policy
from trt_kv.cli.run_options import byte_count
from trt_kv.errors import CapacityError, UsageError
from trt_kv.manifest import load_manifest
from trt_kv.pipeline.plans import ResourceChoice
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.engine import Engine

CHUNK = 20
SMALL = 100_000
"""Memory for a few blocks."""


def opened(dense: Engine, policy: str = "full", **options: Any) -> Engine:
    return engine_under(dense, small_policy(policy), **({"chunk": CHUNK, "prefix_cache": True} | options))


def cached(engine: Engine, prompt: list[int], **sampling: Any) -> int:
    return engine.generate(prompt, max_new_tokens=1, **sampling).n_cached_tokens


@pytest.mark.parametrize("policy", ["full", "snapkv"])
def test_a_pinned_prompt_is_read_and_stays_until_it_is_unpinned(small_engine: Engine, policy: str) -> None:
    """Whole blocks of it, also the one that ends it; snapkv reads its last queries again in any case."""
    pinned, *others = (random_ids(small_engine, 101, seed=seed) for seed in range(6))
    with opened(small_engine, policy, prefix_bytes=SMALL) as engine:
        assert engine.core.prefixes is not None
        assert engine.pin(pinned[:60]) == engine.pin(pinned[:79]) == 60
        assert engine.core.prefixes.statistics.queried_tokens == 61, "it was read more than once"
        for prompt in others:
            cached(engine, prompt)
        assert engine.core.prefixes.statistics.evicted > 0
        assert cached(engine, pinned) == 60
        assert (engine.unpin(pinned[:60]), engine.unpin(pinned[:60]), engine.unpin(pinned[:60])) == (60, 60, 0)
        for prompt in others:
            cached(engine, prompt)
        assert cached(engine, pinned) == 0
        assert_idle(engine)


def test_a_pin_is_of_one_salt(small_engine: Engine) -> None:
    prompt = random_ids(small_engine, 61, seed=1)
    with opened(small_engine) as engine:
        assert engine.pin(prompt, cache_salt="a") == 60
        assert (cached(engine, prompt), cached(engine, prompt, cache_salt="a")) == (0, 60)
        assert engine.unpin(prompt) == 0


def test_more_than_fits_cannot_be_pinned_and_leaves_no_pin(small_engine: Engine) -> None:
    first, second = (random_ids(small_engine, 120, seed=seed) for seed in range(2))
    with opened(small_engine, prefix_bytes=SMALL) as engine:
        assert engine.core.prefixes is not None
        assert engine.pin(first[:60]) == 60
        with pytest.raises(CapacityError, match="does not fit into the prefix cache") as caught:
            engine.pin(second)
        assert "--prefix-bytes" in str(caught.value)
        assert cached(engine, first) >= 60
        engine.core.prefixes.clear()
        assert engine.core.prefixes.statistics.blocks == 3
        assert engine.pin([7]) == 0
    with opened(small_engine, prefix_cache=False) as engine, pytest.raises(UsageError, match="prefix cache is off"):
        engine.pin(first)


def test_a_prompt_of_the_whole_context_is_pinned(small_engine: Engine) -> None:
    most = small_engine.manifest.config.max_positions
    with opened(small_engine, chunk=16) as engine:
        assert engine.core.prefixes is not None
        assert engine.pin(random_ids(engine, most, seed=1)) == most // 80 * 80


def test_a_prompt_is_pinned_while_others_run(small_engine: Engine) -> None:
    pinned, other = (random_ids(small_engine, 61, seed=seed) for seed in range(2))

    async def pin() -> tuple[int, int, int]:
        async with AsyncEngine(opened(small_engine)) as engine:
            results = await asyncio.gather(engine.generate(other, max_new_tokens=20), engine.pin(pinned))
            again = await engine.generate(pinned, max_new_tokens=1)
            return results[1], again.n_cached_tokens, await engine.unpin(pinned)

    assert asyncio.run(pin()) == (60, 60, 60)


def test_prefix_add_reads_a_prompt_that_generate_continues(small_folder: Path, run: Run, tmp_path: Path) -> None:
    sizes = ("--chunk", "5", "--threads", "1", "--cache-tokens", "400", "--prefix-bytes", "64MiB")
    text = "the old storm " * 9
    assert "--prefix-store" in run("prefix", "add", small_folder, text, *sizes)[2]
    store = (*sizes, "--prefix-store", tmp_path / "store")
    code, out, err = run("prefix", "add", small_folder, text, *store)
    assert (code, out) == (0, "")
    _, expected, told = run("generate", small_folder, text, "--max-new-tokens", "4", "--no-prefix-cache", *sizes[:6])
    assert "prefix cache" not in told
    kept = json.loads(run("prefix", "list", tmp_path / "store", "--json")[1])["prefixes"]
    assert [(one["tokens"], one["policy"], one["is_whole"]) for one in kept] == [(n_of(err, "are in"), "prefixkv_paper", True)]
    assert kept[0]["engine"] == load_manifest(small_folder).to_json()["digest"]
    code, out, told = run("generate", small_folder, f"{text}and more", "--max-new-tokens", "4", *store)
    assert code == 0
    assert n_of(told, "from the prefix cache; first token after") == n_of(err, "are in") > 0
    code, out, told = run("generate", small_folder, text, "--max-new-tokens", "4", *store)
    assert (code, out) == (0, expected)
    code, _, err = run("generate", small_folder, text, "--no-prefix-cache", *store)
    assert (code, "the prefix cache is off" in err) == (2, True)


def n_of(told: str, end: str) -> int:
    """N of the note "[N of M prompt tokens ...]" whose rest begins with ``end``."""
    (note,) = [line for line in told.splitlines() if f"prompt tokens {end}" in line]
    return int(note.removeprefix("[").split()[0])


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("1", 1), ("4096", 4096), ("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("3kB", 3000), ("2gb", 2 * 10**9)]
)
def test_sizes_have_units(text: str, n_bytes: int) -> None:
    assert byte_count(None, None, text) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "MiB", "2G", "1e9", "0.1B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        byte_count(None, None, text)


def test_one_prompt_has_no_prefix_cache_unless_something_is_said_about_it() -> None:
    assert ResourceChoice(chunk=7).for_one_prompt().options() == {"chunk": 7, "prefix_cache": False}
    for said in ({"prefix_cache": True}, {"prefix_bytes": 9}, {"prefix_store": "there"}):
        assert ResourceChoice(**said).for_one_prompt().options() == said
