"""What servers tell monitoring: names that dashboards read, values of the engine, and logs without anybody's text."""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engines import random_ids
from tests.serving import engine_under, small_policy, streamed
from trt_kv.runtime.engine import Engine
from trt_kv.serving.logs import LOGGER, JsonLines, log_event
from trt_kv.serving.metrics import exposition, families_of

pytestmark = pytest.mark.usefixtures("one_thread")

DASHBOARD = Path(__file__).parent.parent / "examples" / "serving" / "grafana.json"
OF_VLLM = """num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total prefix_cache_hits_total
    prompt_tokens_total generation_tokens_total request_success_total time_to_first_token_seconds_bucket
    inter_token_latency_seconds_bucket time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket
    request_queue_time_seconds_bucket request_prefill_time_seconds_bucket request_decode_time_seconds_bucket""".split()
OF_TENSORRT_LLM = """request_success_total e2e_request_latency_seconds_bucket time_to_first_token_seconds_bucket
    request_queue_time_seconds_bucket kv_cache_utilization kv_cache_hit_rate""".split()
OF_HTTP = {"trt_kv_requests_refused_total"}
"""Metrics that the HTTP server adds."""


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Values by name and labels."""


@pytest.fixture(scope="module")
def told(small_engine: Engine) -> Iterator[tuple[Engine, Samples]]:
    """An engine that recalls, after two requests, and its metrics."""
    with engine_under(small_engine, small_policy("freekv"), prefix_cache=True) as engine:
        engine.generate_batch([random_ids(engine, 80, seed=1), [1, 9, 8]], max_new_tokens=24, ignore_eos=True)
        text = exposition(families_of(engine, model_name='a "model"')).decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        model = {("model_name", 'a "model"')}
        yield engine, {(one.name, frozenset(one.labels.items()) - model): one.value for one in samples}


def test_the_names_that_dashboards_read_are_there(
    told: tuple[Engine, Samples],
) -> None:
    names = {name for name, _ in told[1]}
    assert {f"vllm:{name}" for name in OF_VLLM} <= names
    assert {f"trtllm_{name}" for name in OF_TENSORRT_LLM} <= names
    assert "process_resident_memory_bytes" in names


def test_every_metric_of_our_dashboard_is_there(
    told: tuple[Engine, Samples],
) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    queried = {name for query in queries for name in re.findall(r"(?:vllm:|trt_kv_)\w+", query)}
    assert len(queried) > 15
    assert queried - {name for name, _ in told[1]} <= OF_HTTP


def test_values_are_those_of_the_engine(told: tuple[Engine, Samples]) -> None:
    engine, samples = told
    counts = engine.core.statistics
    recall = engine.runner.tiers.statistics  # type: ignore[union-attr]
    assert recall is not None

    def value(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    assert value("vllm:prompt_tokens_total") == 83
    assert value("vllm:generation_tokens_total") == 48
    assert value("vllm:request_success_total", finished_reason="length") == 2
    assert value("vllm:inter_token_latency_seconds_bucket", le="+Inf") == 46
    assert value("vllm:e2e_request_latency_seconds_sum") == pytest.approx(counts.time_of_request.total)
    assert value("vllm:kv_cache_usage_perc") == 0.0
    assert value("trt_kv_computed_tokens_total") == 80 + 3 + 2 * 23
    assert value("trt_kv_held_tokens_total", layer="1") == counts.held_tokens[1] > 0
    assert value("trt_kv_pages", tier="host") == engine.runner.tiers.host.n_pages  # type: ignore[union-attr]
    assert value("trt_kv_recall_checked_heads_total") == recall.layer_steps_L.sum() * recall.n_kv_heads > 0
    assert value("trt_kv_correction_rate") == pytest.approx(recall.head_rate)


def test_tokens_from_the_prefix_cache_are_counted(small_engine: Engine) -> None:
    prompt = random_ids(small_engine, 100, seed=1)
    with engine_under(small_engine, small_policy("full"), chunk=20, prefix_cache=True, prefix_bytes=90_000) as engine:
        prompts = [prompt, prompt, random_ids(engine, 110, seed=2)]
        cached = [engine.generate(one, max_new_tokens=1).n_cached_tokens for one in prompts]
        assert cached == [0, 80, 0]
        told = {family.name: family.values[0][1] for family in families_of(engine, model_name="m")}
        counts = engine.statistics["prefix_cache"]
    assert (told["vllm:prefix_cache_queries_total"], told["vllm:prefix_cache_hits_total"]) == (310, 80)
    assert told["trtllm_kv_cache_hit_rate"] == 80 / 310
    assert told["trt_kv_prefix_evicted_blocks_total"] == counts["evicted"] > 0
    assert told["trt_kv_prefix_bytes"] == counts["used_bytes"] > 0
    assert told["trt_kv_prefix_capacity_bytes"] == 90_000


@pytest.mark.parametrize("tier", ["ram", "file"])
def test_counts_of_recall_of_requests_add_up_to_those_of_the_engine(small_engine: Engine, tier: str) -> None:
    """Also when the pages of one request are those of an earlier one."""
    engine = engine_under(small_engine, small_policy("freekv"), **(streamed("freekv") if tier == "file" else {}))
    results = []
    for seed in range(2):
        prompts = [random_ids(engine, 70 + 9 * at, seed=seed) for at in range(3)]
        results += engine.generate_batch(prompts, max_new_tokens=20, ignore_eos=True)
    counts = engine.runner.tiers.statistics  # type: ignore[union-attr]
    assert counts is not None
    recalls = [result.recall for result in results if result.recall is not None]
    assert len(recalls) == 6
    assert sum(recall.moved_bytes for recall in recalls) == counts.moved_bytes
    assert (counts.moved_bytes > 0) is (tier == "file")
    rates = [recall.correction_rate for recall in recalls]
    assert sum(rates) / len(rates) == pytest.approx(counts.head_rate)
    assert 0.0 < counts.head_rate < 1.0
    engine.close()


def test_a_log_is_lines_of_json_with_the_traceback_of_a_bug() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    LOGGER.addHandler(handler)
    try:
        LOGGER.setLevel(logging.INFO)
        log_event("generated", request_id="a\nb", seconds=0.5, nothing=None)
        log_event("internal error", level=logging.ERROR, bug=ValueError("why"))
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["request_id"], first["seconds"]) == ("generated", "a\nb", 0.5)
    assert "nothing" not in first
    assert second["level"] == "error"
    assert "ValueError: why" in second["traceback"]
