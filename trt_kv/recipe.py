"""A recipe: the share of tokens that each layer, or each KV head, keeps, and how it was found.

One human-readable JSON file. Shares are always the KEPT part; only published formats (``published_recipe.py``) hold forgotten
(evicted) fractions.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv import __version__
from trt_kv.cache_layers import each_repeated
from trt_kv.errors import RecipeError, UsageError
from trt_kv.head_shares import HeadShares, means
from trt_kv.json_file import MAX_DOCUMENT_BYTES, dataclass_from_json, document_text, read_json, write_atomically
from trt_kv.policy import HEADS, Policy, kept_tokens
from trt_kv.scores import attention_scores, predicted_scores, scores_that_read
from trt_kv.surrogate import Surrogate

FORMAT = "trt-kv-recipe"
VERSION = 3
"""Of recipes with a surrogate; those with shares of KV heads are written as version 2, those of layers alone as version 1."""
READ_VERSIONS = (1, 2, 3)
METHODS = ("prefixkv", "lukv", "kvzap")
_ADDED = {"heads": (2, "shares of KV heads"), "surrogate": (3, "surrogate")}
"""Fields that only recipes of one version have, and what they are."""
MEAN_ROUNDING = 2e-6
CREATED_BY = f"trt-kv {__version__}"


@dataclass(frozen=True, kw_only=True)
class RecipeScore:
    """The ranking that the shares belong to; ``window`` counts queries (scores that read it only, else None).

    ``heads`` and ``pooling`` as in ``trt_kv.policy.Policy``.
    """

    name: str
    window: int | None = None
    heads: str = "shared"
    pooling: int = 1

    def __post_init__(self) -> None:
        for what, got, known in (
            ("score", self.name, [*attention_scores(), *predicted_scores()]),
            ("heads", self.heads, HEADS),
        ):
            if got not in known:
                raise RecipeError(f"the recipe's {what} is unknown", got=repr(got), expected=f"one of {', '.join(known)}")
        windowed = scores_that_read("window")
        if (self.name in windowed) != (self.window is not None and self.window >= 1):
            raise RecipeError(
                f"score {self.name!r} with window {self.window}",
                expected=f"a window >= 1 with score {', '.join(windowed)}, else null",
            )
        if self.pooling < 1 or self.pooling % 2 == 0:
            raise RecipeError("the recipe's pooling is not odd", got=self.pooling, expected="an odd number >= 1")

    @property
    def described(self) -> str:
        """E.g. "score window (64 queries, each KV head, pooling 5)"."""
        parts = [f"{self.window} queries"] if self.window else []
        parts += ["each KV head"] if self.heads != "shared" else []
        parts += [f"pooling {self.pooling}"] if self.pooling > 1 else []
        return f"score {self.name}" + (f" ({', '.join(parts)})" if parts else "")


def recipe_score(policy: Policy) -> RecipeScore:
    """The ranking whose curves set the budgets of ``policy``: its own, or published PrefixKV's if it reads no attention."""
    if policy.scoring.predicts:
        return RecipeScore(name=policy.score, heads="each")
    if not policy.reads_attention:
        return RecipeScore(name="mass")
    window = policy.window if "window" in policy.scoring.settings else None
    return RecipeScore(name=policy.score, window=window, heads=policy.heads, pooling=policy.pooling)


@dataclass(frozen=True, kw_only=True)
class Protected:
    """The ``sinks`` first and ``recent`` last tokens of a prompt, which no layer ever evicts."""

    sinks: int = 1
    recent: int = 1

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise RecipeError(
                "the numbers of protected tokens are out of range", got=f"{self.sinks}, {self.recent}", expected="integers >= 0"
            )

    @property
    def n_tokens(self) -> int:
        """Protected tokens of a prompt that is long enough to have them all."""
        return self.sinks + self.recent


@dataclass(frozen=True, kw_only=True)
class RecipeModel:
    """The model that a recipe is for; ``digest`` is its checkpoint's."""

    name: str
    digest: str
    n_layers: int

    def __post_init__(self) -> None:
        if not self.name or not self.digest or self.n_layers < 1:
            raise RecipeError(
                "the recipe does not identify its model",
                got=f"name {self.name!r}, digest {self.digest!r}, {self.n_layers} layers",
                expected="a name, a digest and at least 1 layer",
            )


@dataclass(frozen=True, kw_only=True)
class RecipeSample:
    """What the search found for one calibration prompt of ``n_tokens``: kept share per layer, and ``mass`` as in ``Recipe``."""

    n_tokens: int
    kept: tuple[float, ...]
    mass: float

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise RecipeError("a calibration sample has no tokens", got=self.n_tokens, expected="n_tokens >= 1")
        _check_shares("a calibration sample's kept shares", self.kept)
        _check_mass("a calibration sample's mass", self.mass)


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """Where the calibration prompts came from. ``seed`` is None when they were not generated."""

    source: str
    seed: int | None
    samples: tuple[RecipeSample, ...]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Cumulative importance of each layer's tokens, most important first, averaged over samples.

    ``layers[l][i]`` is the share of layer l's importance that its highest-ranked ``kept_share[i]`` of tokens hold; empty for a
    layer with an attention window, which has no budget. ``sinks`` "in": over all tokens, as published; "out": the protected
    first tokens are left out of tokens and importance.
    """

    sinks: str
    kept_share: tuple[float, ...]
    layers: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if self.sinks not in ("in", "out"):
            raise RecipeError("curves.sinks is unknown", got=repr(self.sinks), expected="'in' or 'out'")
        named = {"curves.kept_share": self.kept_share, **{f"curves.layers[{i}]": c for i, c in enumerate(self.layers)}}
        for name, values in named.items():
            if len(values) != len(self.kept_share) and (values or name == "curves.kept_share"):
                raise RecipeError(f"{name} has the wrong length", got=len(values), expected=len(self.kept_share))
            if not all(0.0 <= value <= 1.0 for value in values) or list(values) != sorted(values):
                raise RecipeError(f"{name} is not a cumulative curve", expected="numbers from 0 to 1 in ascending order")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Kept shares per layer for one model, score and budget; raises ``RecipeError`` on any inconsistent value.

    ``budget``: mean kept share asked for, in (0, 1]. ``kept``: L kept shares in (0, 1]. ``mass``: the common cumulative mass p,
    or of method "lukv" the share of what answers attend to that was kept, mean over samples; None, like ``curves``, when a
    published list was imported. ``heads``: of method "lukv" alone, the shares of KV heads at every budget; ``kept`` is then
    their mean over the heads of a layer. ``surrogate``: of method "kvzap" alone, which predicts scores; ``kept`` is then the
    share of each layer's calibration tokens above the threshold, and ``mass`` the share of what the texts' repetitions attend
    to that they hold.
    """

    method: str
    score: RecipeScore
    budget: float
    kept: tuple[float, ...]
    mass: float | None
    protected: Protected
    model: RecipeModel
    calibration: CalibrationRecord
    curves: Curves | None
    heads: HeadShares | None = None
    surrogate: Surrogate | None = None
    created_by: str

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError("the recipe's method is unknown", got=repr(self.method), expected=f"one of {', '.join(METHODS)}")
        _check_shares("the recipe's budget", (self.budget,))
        _check_shares("the recipe's kept shares", self.kept)
        if self.mass is not None:
            _check_mass("the recipe's mass", self.mass)
        if (self.heads is not None) != (self.method == "lukv"):
            raise RecipeError(
                "shares of KV heads and the method do not fit together",
                got=f"method {self.method!r}, {'no ' if self.heads is None else ''}shares of KV heads",
                expected="method 'lukv' if and only if there are shares of KV heads",
            )
        if (self.surrogate is not None) != (self.method == "kvzap"):
            raise RecipeError(
                "a surrogate and the method do not fit together",
                got=f"method {self.method!r}, {'no ' if self.surrogate is None else 'a '}surrogate",
                expected="method 'kvzap' if and only if there is a surrogate",
            )
        if self.heads is not None:
            self._check_means(means(self.heads.at(self.budget)), "the means of its KV heads")
        if self.surrogate is not None:
            self._check_means(self.surrogate.kept_at(self.budget), "those of its surrogate")
        lists: list[tuple[str, int]] = [("kept", len(self.kept))]
        lists += [(f"calibration.samples[{i}].kept", len(s.kept)) for i, s in enumerate(self.calibration.samples)]
        lists += [("curves.layers", len(self.curves.layers))] if self.curves is not None else []
        for name, length in lists:
            if length != self.model.n_layers:
                raise RecipeError(
                    f"the recipe's {name} does not have one value per layer", got=length, expected=self.model.n_layers
                )

    def _check_means(self, found: tuple[float, ...], what: str) -> None:
        if len(found) != len(self.kept) or any(abs(a - b) > MEAN_ROUNDING for a, b in zip(found, self.kept, strict=True)):
            raise RecipeError(f"the recipe's kept shares are not {what}", got=list(self.kept), expected=list(found))

    @property
    def has_all_budgets(self) -> bool:
        """Whether it tells what to keep at any budget: ``with_budget``."""
        return self.heads is not None or self.surrogate is not None

    def with_budget(self, budget: float) -> "Recipe":
        """This recipe for another mean kept share; ``RecipeError`` if it has neither shares of KV heads nor
        a surrogate, which tell it.

        What was found for the samples at the old budget is left out.
        """
        if self.heads is not None:
            kept = means(self.heads.at(budget))
        elif self.surrogate is not None:
            kept = self.surrogate.kept_at(budget)
        else:
            raise RecipeError("the recipe is of one budget", got=budget, expected=self.budget, fix="calibrate another")
        record = dataclasses.replace(self.calibration, samples=())
        return dataclasses.replace(self, budget=budget, kept=kept, mass=None, calibration=record)

    def shares_of_cache(self, *, heads_apart: int) -> list[float]:
        """The share of each layer of the cache (``trt_kv/cache_layers.py``): of each layer of the model, or with
        ``heads_apart`` K of each of its KV heads, which have their layer's share if the recipe has no others.

        ``RecipeError`` if the recipe has shares for another number of KV heads.
        """
        if self.heads is None or heads_apart == 1:
            return each_repeated(self.kept, heads_apart)
        if self.heads.n_kv_heads != heads_apart:
            raise RecipeError(
                "the recipe has shares for another number of KV heads", got=self.heads.n_kv_heads, expected=heads_apart
            )
        return [share for layer in self.heads.at(self.budget) for share in layer]

    def kept_tokens(self, n_tokens: int) -> list[int]:
        """Tokens that each layer keeps of a prompt of ``n_tokens``: L counts, at least the protected tokens each.

        The rule is that of EvictTokens: n - round((1 - share) * n), halves rounded to even.
        """
        if n_tokens < 0:
            raise UsageError("the length of a prompt is negative", got=n_tokens, expected="an integer >= 0")
        return [max(kept_tokens(n_tokens, share), min(n_tokens, self.protected.n_tokens)) for share in self.kept]

    def check_model(self, *, digest: str, n_layers: int) -> None:
        """``RecipeError`` unless this recipe was made for the model with this checkpoint digest and number of layers."""
        for what, got, expected in (("number of layers", self.model.n_layers, n_layers), ("digest", self.model.digest, digest)):
            if got != expected:
                raise RecipeError(
                    f"the recipe is for another model ({self.model.name}): its {what} is not this checkpoint's",
                    got=got,
                    expected=expected,
                    fix="calibrate a recipe for this checkpoint: trt-kv calibrate",
                )

    def to_json(self) -> dict[str, Any]:
        """The recipe as a JSON object, format and version first."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in _ADDED or value is not None}
        version = max([1, *(version for name, (version, _) in _ADDED.items() if name in fields)])
        return {"format": FORMAT, "version": version, **fields}

    @classmethod
    def from_json(cls, data: object) -> "Recipe":
        """Read what ``to_json`` wrote; ``RecipeError`` on any unknown, missing, mistyped or impossible value."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise RecipeError(
                "this is not a trt-kv recipe",
                got=f"format {data.get('format')!r}" if isinstance(data, dict) else f"a JSON {type(data).__name__}",
                expected=f'an object with "format": "{FORMAT}"',
                fix="import published lists with recipe_from_published" if isinstance(data, list) else None,
            )
        version = data.get("version")
        if version not in READ_VERSIONS or isinstance(version, bool):
            raise RecipeError(
                "the recipe has a version that this trt-kv cannot read",
                got=repr(version),
                expected=" or ".join(map(str, READ_VERSIONS)),
                fix="use the trt-kv that wrote it, or calibrate again",
            )
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        for name, (added, what) in _ADDED.items():
            if (version == added) != (fields.get(name) is not None) or (version != added and name in fields):
                raise RecipeError(
                    f"a recipe of version {version} {'lacks' if version == added else 'has no'} {what}",
                    got=f"{name} {'in it' if name in fields else 'not in it'}",
                    expected=f"{name} in version {added} alone",
                )
        fields = dict.fromkeys(_ADDED) | fields
        if isinstance(fields.get("score"), dict):
            fields["score"] = {"heads": "shared", "pooling": 1, **fields["score"]}  # missing in recipes of version 0.1
        return dataclass_from_json(cls, fields, where="recipe", error=RecipeError)

    def to_text(self) -> str:
        """The JSON file's text: short values on one line, one sample and one layer's curve per line."""
        return document_text(self.to_json()) + "\n"

    def save(self, path: Path) -> None:
        """Write the recipe to ``path``, whole or not at all."""
        write_atomically(path, self.to_text().encode(), kind="recipe", error=RecipeError)

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """Read a recipe file; ``RecipeError`` names the file and what is wrong with it."""
        data = read_json(path, kind="recipe", error=RecipeError, max_bytes=MAX_DOCUMENT_BYTES)
        try:
            return cls.from_json(data)
        except RecipeError as cause:
            raise RecipeError(f"{path}: {cause.what}", got=cause.got, expected=cause.expected, fix=cause.fix) from cause


def _check_shares(name: str, shares: tuple[float, ...]) -> None:
    for index, share in enumerate(shares):
        if not 0.0 < share <= 1.0:
            raise RecipeError(f"{name}: value {index} is not a kept share", got=share, expected="a number in (0, 1]")


def _check_mass(name: str, mass: float) -> None:
    if not 0.0 <= mass <= 1.0:
        raise RecipeError(f"{name} is not a share of the importance", got=mass, expected="a number in [0, 1]")
