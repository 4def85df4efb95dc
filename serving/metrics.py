"""What a server tells monitoring: an engine's statistics, under the names of vLLM's and TensorRT-LLM's dashboards and ours.

``families_of`` is plain data, for any exporter (Triton has its own); ``exposition`` is Prometheus' text format.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trt_kv.require import require
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.prefix.cache import PrefixStatistics
from trt_kv.runtime.statistics import EngineStatistics, Histogram, RecallStatistics

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

Kind = Literal["counter", "gauge", "histogram"]
Labels = Mapping[str, str]
_TIERS = {"the KV pool": "pool", "the host tier": "host"}
"""Labels of pools, by name."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A metric: its name as dashboards query it (counters end with ``_total``), and its values by labels."""

    name: str
    kind: Kind
    help: str
    values: Sequence[tuple[Labels, float | Histogram]]


def families_of(engine: Engine, *, model_name: str) -> list[Family]:
    """Every metric of an engine, each with the label ``model_name``."""
    counts = engine.core.statistics
    tiers = engine.runner.tiers
    recall = None if tiers is None else tiers.statistics
    prefixes = PrefixStatistics() if engine.core.prefixes is None else engine.core.prefixes.statistics
    pages = {_TIERS.get(name, name): (n["used"], n["total"]) for name, n in engine.statistics["pages"].items()}
    return [
        Family(
            name=family.name,
            kind=family.kind,
            help=family.help,
            values=[({"model_name": model_name, **labels}, value) for labels, value in family.values],
        )
        for family in (
            *_dashboards(counts, pages),
            *_prefixes(prefixes),
            *_steps(counts),
            *_held(counts),
            *_pages(pages),
            *_recall(recall),
        )
    ]


def exposition(families: Sequence[Family]) -> bytes:
    """The metrics, and those of this process, in Prometheus' text format."""
    prometheus = require("prometheus_client", extra="serve")
    registry = prometheus.CollectorRegistry()
    registry.register(_Collector(families))
    prometheus.ProcessCollector(registry=registry)
    text: bytes = prometheus.generate_latest(registry)
    return text


def gauge(name: str, text: str, value: float, **labels: str) -> Family:
    """A gauge with one value."""
    return Family(name=name, kind="gauge", help=text, values=[(labels, value)])


def counter(name: str, text: str, value: float, **labels: str) -> Family:
    """A counter with one value."""
    return Family(name=name, kind="counter", help=text, values=[(labels, value)])


class _Collector:
    """``families`` as the objects of prometheus_client."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> "Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]":
        core = require("prometheus_client.core", extra="serve")
        classes = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "histogram": core.HistogramMetricFamily,
        }
        for family in self._families:
            labels = list(family.values[0][0]) if family.values else []
            made = classes[family.kind](family.name, family.help, labels=labels)
            for given, value in family.values:
                if isinstance(value, Histogram):
                    made.add_metric(list(given.values()), cumulative_buckets(value), value.total)
                else:
                    made.add_metric(list(given.values()), value)
            yield made


def cumulative_buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """(upper bound, number of values up to it) of each bucket, as Prometheus counts them."""
    total, buckets = 0, []
    for bound, n in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        total += n
        buckets.append((bound, float(total)))
    return buckets


def _dashboards(counts: EngineStatistics, pages: Mapping[str, tuple[int, int]]) -> list[Family]:
    """The metrics of vLLM and TensorRT-LLM that mean the same here."""
    usage = max(used / max(1, total) for used, total in pages.values())
    times = {
        "e2e_request_latency_seconds": (counts.time_of_request, "from arrival to the end"),
        "time_to_first_token_seconds": (counts.time_to_first_token, "from arrival to the first token"),
        "request_queue_time_seconds": (counts.time_in_queue, "from arrival to the start"),
    }
    more_times = {
        "inter_token_latency_seconds": (counts.time_between_tokens, "from one token to the next"),
        "time_per_output_token_seconds": (counts.time_between_tokens, "from one token to the next"),
        "request_prefill_time_seconds": (counts.time_reading, "from the start to the first token"),
        "request_decode_time_seconds": (counts.time_decoding, "from the first token to the end"),
    }
    n_generated = counts.time_to_first_token.n + counts.time_between_tokens.n
    ends = [({"finished_reason": reason}, float(n)) for reason, n in sorted(counts.n_finished.items())]
    ends = ends or [({"finished_reason": "stop"}, 0.0)]
    found = [
        gauge("vllm:num_requests_running", "Sequences that have been started and have not ended.", counts.n_running),
        gauge("vllm:num_requests_waiting", "Requests that wait to be started.", counts.n_waiting),
        gauge("vllm:kv_cache_usage_perc", "Share of the pages in use, of the tier that is fullest; 1 is all.", usage),
        gauge("trtllm_kv_cache_utilization", "Share of the pages in use, of the tier that is fullest; 1 is all.", usage),
        counter("vllm:prompt_tokens_total", "Prompt tokens that were computed.", counts.prompt_tokens),
        counter("vllm:generation_tokens_total", "Tokens that were generated.", n_generated),
    ]
    for prefix in ("vllm:", "trtllm_"):
        text = "Samples that ended, by reason."
        found.append(Family(name=f"{prefix}request_success_total", kind="counter", help=text, values=ends))
        given = times | (more_times if prefix == "vllm:" else {})
        found += [
            Family(name=prefix + name, kind="histogram", help=f"Seconds {what}.", values=[({}, histogram)])
            for name, (histogram, what) in given.items()
        ]
    return found


def _steps(counts: EngineStatistics) -> list[Family]:
    phases = {"prefill": counts.prefill_steps, "decode": counts.decode_steps}
    parts = {"planning": counts.planning_s, "model": counts.steps_s, "sampling": counts.sampling_s}
    steps, seconds = [({"phase": p}, float(n)) for p, n in phases.items()], [({"part": p}, s) for p, s in parts.items()]
    return [
        Family(name="trt_kv_steps_total", kind="counter", help="Steps of the engine.", values=steps),
        Family(name="trt_kv_step_seconds_total", kind="counter", help="Time of steps, by what was done.", values=seconds),
    ]


def _held(counts: EngineStatistics) -> list[Family]:
    held = [({"layer": str(layer)}, float(n)) for layer, n in enumerate(counts.held_tokens)]
    shares = [(labels, n / max(1, counts.computed_tokens)) for labels, n in held]
    what = "of finished requests"
    return [
        counter("trt_kv_computed_tokens_total", f"Tokens, prompt and generated, {what}.", counts.computed_tokens),
        Family(name="trt_kv_held_tokens_total", kind="counter", help=f"Tokens {what} held at their end.", values=held),
        Family(name="trt_kv_kept_share", kind="gauge", help=f"Share of the tokens {what} held at their end.", values=shares),
    ]


def _pages(pages: Mapping[str, tuple[int, int]]) -> list[Family]:
    used = [({"tier": tier}, float(n)) for tier, (n, _) in pages.items()]
    total = [({"tier": tier}, float(n)) for tier, (_, n) in pages.items()]
    return [
        Family(name="trt_kv_pages_used", kind="gauge", help="Pages of the KV cache in use.", values=used),
        Family(name="trt_kv_pages", kind="gauge", help="Pages of the KV cache.", values=total),
    ]


def _prefixes(counts: PrefixStatistics) -> list[Family]:
    """Zeros for engines without a prefix cache, so that dashboards find the names."""
    rate = counts.hit_tokens / max(1, counts.queried_tokens)
    return [
        counter("vllm:prefix_cache_queries_total", "Tokens of prompts looked up in the prefix cache.", counts.queried_tokens),
        counter("vllm:prefix_cache_hits_total", "Tokens found there, which were not computed.", counts.hit_tokens),
        gauge("trtllm_kv_cache_hit_rate", "Share of the tokens looked up that were found.", rate),
        gauge("trt_kv_prefix_blocks", "Blocks of the prefix cache in memory.", counts.blocks),
        gauge("trt_kv_prefix_bytes", "Memory of these blocks.", counts.used_bytes),
        gauge("trt_kv_prefix_capacity_bytes", "Memory that they may take.", counts.capacity_bytes),
        counter("trt_kv_prefix_kept_blocks_total", "Blocks that were added to memory.", counts.kept),
        counter("trt_kv_prefix_evicted_blocks_total", "Blocks that made room for others.", counts.evicted),
        counter("trt_kv_prefix_stored_tokens_total", "Tokens found in files of the store.", counts.stored_hit_tokens),
    ]


def _recall(counts: RecallStatistics | None) -> list[Family]:
    """Zeros for engines that recall nothing, so that dashboards find the names."""
    checked = 0 if counts is None else int(counts.layer_steps_L.sum()) * counts.n_kv_heads
    corrected = 0 if counts is None else int(counts.corrected_LK.sum())
    moved, waited_s = (0, 0.0) if counts is None else (counts.moved_bytes, counts.waited_ms / 1e3)
    return [
        counter("trt_kv_recalled_bytes_total", "Bytes of keys and values that were copied from the host.", moved),
        counter("trt_kv_recall_checked_heads_total", "(Layer, token, KV head) triples whose drift was tested.", checked),
        counter("trt_kv_recall_corrected_heads_total", "Those of them whose pages were chosen again.", corrected),
        gauge("trt_kv_correction_rate", "Share of the triples that were corrected.", corrected / max(1, checked)),
        counter("trt_kv_recall_wait_seconds_total", "Time that steps waited for copies.", waited_s),
    ]
