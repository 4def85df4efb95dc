"""Drift thresholds: the cosine below which a layer's KV heads select their pages again, and the measurement it is derived from.

One human-readable JSON file. FreeKV (arXiv 2505.13109) has one tau for all layers; how much adjacent queries differ
depends on the layer, so the same tau corrects some layers in every step and others never.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.errors import RecipeError, TrtKvError
from trt_kv.json_file import MAX_DOCUMENT_BYTES, dataclass_from_json, document_text, read_json, write_atomically
from trt_kv.policy import Policy
from trt_kv.recipe import RecipeModel

FORMAT = "trt-kv-drift"
VERSION = 1
ALWAYS = 1.01
"""A threshold above every cosine: each KV head selects its pages again in every step."""
NEVER = -1.01
"""A threshold below every cosine."""


def check_correction_rate(rate: float, *, error: type[TrtKvError]) -> None:
    """Raise ``error`` unless 0 < ``rate`` < 1."""
    if not 0.0 < rate < 1.0:
        raise error(
            "the correction rate is the share of KV heads that select their pages again in a step",
            got=rate,
            expected="a number between 0 and 1",
            fix=f"e.g. 0.1; for none --set drift=fixed tau={NEVER}, for all --set drift=fixed tau={ALWAYS}",
        )


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """What determines the attended pages in the measurement: fields of ``Policy`` of the same names, and the page size."""

    budget: str
    kept: float
    tokens: int
    threshold: float
    sinks: int
    recent: int
    page_size: int
    page_summary: str
    group_pooling: str
    softmax_scale: float
    exempt_layers: tuple[int, ...]


def drift_settings(policy: Policy, page_size: int) -> DriftSettings:
    """The settings of ``policy`` that decide which pages are attended to."""
    names = [field.name for field in dataclasses.fields(DriftSettings) if field.name != "page_size"]
    return DriftSettings(page_size=page_size, **{name: getattr(policy, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class DriftHead:
    """One KV head over all measured steps.

    ``cosine``: quantiles of the mean cosine between its query heads' queries and those of the token before; ``mean`` of the
    same. ``rate``: share of steps in which its layer's tau corrects it. ``overlap``: share of the pages chosen with a step's
    own query that the query before would have chosen too, mean over the steps with more pages than the budget; None: no such
    step.
    """

    cosine: tuple[float, ...]
    mean: float
    rate: float
    overlap: float | None

    def __post_init__(self) -> None:
        _check_share("a KV head's rate", self.rate)
        if self.overlap is not None:
            _check_share("a KV head's overlap", self.overlap)


@dataclass(frozen=True, kw_only=True)
class DriftLayer:
    """One layer whose cache is recalled. ``tau``: its threshold. ``rate``: corrected share of its KV heads, mean over steps.

    ``step_rate``: share of steps in which at least one KV head is corrected. ``cosine``: quantiles over all its KV heads;
    ``lowest``: of the lowest KV head of each step, which decides whether the step is corrected at all.
    """

    layer: int
    tau: float
    rate: float
    step_rate: float
    cosine: tuple[float, ...]
    lowest: tuple[float, ...]
    heads: tuple[DriftHead, ...]

    def __post_init__(self) -> None:
        if self.layer < 0 or not self.heads:
            raise RecipeError("a layer was not measured", got=f"layer {self.layer}, {len(self.heads)} KV heads")
        if not NEVER <= self.tau <= ALWAYS:
            raise RecipeError(f"layer {self.layer}'s tau is out of range", got=self.tau, expected=f"{NEVER} to {ALWAYS}")
        for name, rate in (("rate", self.rate), ("step_rate", self.step_rate)):
            _check_share(f"layer {self.layer}'s {name}", rate)

    @property
    def curves(self) -> list[tuple[float, ...]]:
        """Every list of quantiles, of the layer and of its KV heads."""
        return [self.cosine, self.lowest, *(head.cosine for head in self.heads)]

    @property
    def mean(self) -> float:
        """Mean cosine over steps and KV heads."""
        return sum(head.mean for head in self.heads) / len(self.heads)

    @property
    def overlap(self) -> float | None:
        """Mean over KV heads; None if there was never a choice of pages."""
        overlaps = [head.overlap for head in self.heads if head.overlap is not None]
        return sum(overlaps) / len(overlaps) if overlaps else None


@dataclass(frozen=True, kw_only=True)
class DriftSample:
    """One calibration prompt: its tokens, and how many steps were measured after it."""

    n_tokens: int
    n_steps: int

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or self.n_steps < 0:
            raise RecipeError("a calibration sample has no tokens", got=f"{self.n_tokens} tokens, {self.n_steps} steps")


@dataclass(frozen=True, kw_only=True)
class DriftRecord:
    """Source of the prompts (``seed`` None: not drawn at random), and the maximum number of tokens generated after each."""

    source: str
    seed: int | None
    max_new_tokens: int
    samples: tuple[DriftSample, ...]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Thresholds per layer for one model and correction rate; raises ``RecipeError`` on any inconsistent value.

    ``correction_rate``: the requested share of KV heads, in (0, 1). ``shares``: which quantiles the lists of cosines in
    ``layers`` hold, ascending from 0 to 1. ``layers``: those that are recalled, in order.
    """

    correction_rate: float
    model: RecipeModel
    settings: DriftSettings
    calibration: DriftRecord
    shares: tuple[float, ...]
    layers: tuple[DriftLayer, ...]
    created_by: str

    def __post_init__(self) -> None:
        check_correction_rate(self.correction_rate, error=RecipeError)
        numbers = [layer.layer for layer in self.layers]
        recalled = [layer for layer in range(self.model.n_layers) if layer not in self.settings.exempt_layers]
        if numbers != recalled:
            raise RecipeError("the thresholds do not match the recalled layers", got=numbers, expected=recalled)
        if len(self.shares) < 2 or not _rises(self.shares) or (self.shares[0], self.shares[-1]) != (0.0, 1.0):
            raise RecipeError("the quantiles' shares do not rise from 0 to 1", got=list(self.shares))
        for layer in self.layers:
            for curve in layer.curves:
                if len(curve) != len(self.shares) or not _rises(curve):
                    raise RecipeError(
                        f"layer {layer.layer} has invalid quantiles",
                        got=list(curve),
                        expected=f"{len(self.shares)} cosines in ascending order",
                    )

    @property
    def taus(self) -> list[float | None]:
        """Each layer's threshold; None if the layer is exempt."""
        found = {layer.layer: layer.tau for layer in self.layers}
        return [found.get(layer) for layer in range(self.model.n_layers)]

    @property
    def rate(self) -> float:
        """Corrected share of KV heads on the calibration prompts, mean over layers."""
        return sum(layer.rate for layer in self.layers) / len(self.layers)

    @property
    def step_rate(self) -> float:
        """Share of layer-steps on the calibration prompts in which any KV head is corrected."""
        return sum(layer.step_rate for layer in self.layers) / len(self.layers)

    @property
    def n_steps(self) -> int:
        return sum(sample.n_steps for sample in self.calibration.samples)

    def check_model(self, *, digest: str, n_layers: int) -> None:
        """``RecipeError`` unless measured on the model with this checkpoint digest and number of layers."""
        for what, got, expected in (("number of layers", self.model.n_layers, n_layers), ("digest", self.model.digest, digest)):
            if got != expected:
                raise RecipeError(
                    f"the thresholds are for another model ({self.model.name}): its {what} is not this checkpoint's",
                    got=got,
                    expected=expected,
                    fix="calibrate this checkpoint: trt-kv calibrate --policy freekv",
                )

    def to_json(self) -> dict[str, Any]:
        """A JSON object, format and version first."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: object) -> "Drift":
        """Read what ``to_json`` wrote; ``RecipeError`` on any unknown, missing, mistyped or impossible value."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise RecipeError(
                "this is not a file of trt-kv drift thresholds",
                got=f"format {data.get('format')!r}" if isinstance(data, dict) else f"a JSON {type(data).__name__}",
                expected=f'an object with "format": "{FORMAT}"',
                fix="make one: trt-kv calibrate --policy freekv",
            )
        version = data.get("version")
        if version != VERSION or isinstance(version, bool):
            raise RecipeError(
                "the thresholds have a version that this trt-kv cannot read",
                got=repr(version),
                expected=VERSION,
                fix="use the trt-kv that wrote them, or calibrate again",
            )
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        return dataclass_from_json(cls, fields, where="drift", error=RecipeError)

    def save(self, path: Path) -> None:
        """Write to ``path``, whole or not at all."""
        text = document_text(self.to_json()) + "\n"
        write_atomically(path, text.encode(), kind="file of drift thresholds", error=RecipeError)

    @classmethod
    def load(cls, path: Path) -> "Drift":
        """Read a file; ``RecipeError`` names it and what is wrong with it."""
        data = read_json(path, kind="file of drift thresholds", error=RecipeError, max_bytes=MAX_DOCUMENT_BYTES)
        try:
            return cls.from_json(data)
        except RecipeError as cause:
            raise RecipeError(f"{path}: {cause.what}", got=cause.got, expected=cause.expected, fix=cause.fix) from cause


def _check_share(name: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise RecipeError(f"{name} is not a share", got=share, expected="a number in [0, 1]")


def _rises(numbers: Sequence[float]) -> bool:
    return all(math.isfinite(n) for n in numbers) and list(numbers) == sorted(numbers)
