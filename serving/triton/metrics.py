"""The metrics of an engine among those of Triton, under the same names as the HTTP server's."""

from collections.abc import Iterator, Mapping
from typing import Any

from trt_kv.runtime.engine import Engine
from trt_kv.runtime.statistics import Histogram
from trt_kv.serving.metrics import Family, cumulative_buckets, families_of

_Labels = tuple[tuple[str, str], ...]


class Exporter:
    """Triton counts by increments, so the last values are kept. For one thread."""

    def __init__(self, backend: Any, engine: Engine, *, model_name: str) -> None:
        """``backend``: the module ``triton_python_backend_utils``, or what stands in for it."""
        self._backend = backend
        self._engine = engine
        self._model_name = model_name
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, _Labels], Any] = {}
        self._values: dict[tuple[str, _Labels], float] = {}

    def update(self) -> None:
        """Tell Triton what has changed."""
        for family in families_of(self._engine, model_name=self._model_name):
            for name, kind, labels, value in _series(family):
                self._tell(name, kind, family.help, labels, value)

    def _tell(self, name: str, kind: str, text: str, labels: Mapping[str, str], value: float) -> None:
        key = name, tuple(labels.items())
        if key not in self._metrics:
            self._metrics[key] = self._family(name, kind, text).Metric(labels=dict(labels))
            self._values[key] = 0.0
        if value != self._values[key]:
            if kind == "gauge":
                self._metrics[key].set(value)
            else:
                self._metrics[key].increment(value - self._values[key])
            self._values[key] = value

    def _family(self, name: str, kind: str, text: str) -> Any:
        if name not in self._families:
            classes = self._backend.MetricFamily
            of_kind = classes.GAUGE if kind == "gauge" else classes.COUNTER
            self._families[name] = classes(name=name, description=text, kind=of_kind)
        return self._families[name]


def _series(family: Family) -> Iterator[tuple[str, str, Mapping[str, str], float]]:
    """(name, kind, labels, value) of each number of a family. Histograms are told as their counters: releases of Triton before
    24.11 have none, and the others take single values only.
    """
    for labels, value in family.values:
        if not isinstance(value, Histogram):
            yield family.name, family.kind, labels, value
            continue
        buckets = cumulative_buckets(value)
        for bound, n in buckets:
            yield f"{family.name}_bucket", "counter", {**labels, "le": bound}, n
        yield f"{family.name}_count", "counter", labels, buckets[-1][1]
        yield f"{family.name}_sum", "counter", labels, value.total
