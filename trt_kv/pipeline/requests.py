"""The request of each function of the pipeline. A contradictory request raises ``UsageError`` in its constructor."""

from dataclasses import dataclass, field
from pathlib import Path

from trt_kv.calibration.task_files import Match
from trt_kv.errors import UsageError
from trt_kv.pipeline.plans import CalibrationPlan, DeviceChoice, DriftPlan, ModelSource, ResourceChoice, TargetPlan, WeightPlan
from trt_kv.policy import Policy


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """An engine of ``source`` with ``policy`` in the new folder ``out``; with ``replace``, an existing engine is replaced.

    ``recipe``: a file of budgets per layer; None: if the policy needs one, it is calibrated as ``calibration`` specifies. Drift
    thresholds likewise, as ``drift`` specifies.
    """

    source: ModelSource
    policy: Policy
    out: Path
    recipe: Path | None = None
    drift: DriftPlan = field(default_factory=DriftPlan)
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)
    target: TargetPlan = field(default_factory=TargetPlan)
    weights: WeightPlan = field(default_factory=WeightPlan)
    replace: bool = False

    def __post_init__(self) -> None:
        self.weights.check_target(self.target)
        check_recipe_is_read(self.policy, self.recipe)
        check_drift_is_read(self.policy, self.drift)

    @property
    def calibrates(self) -> bool:
        """Whether the build calibrates a recipe or drift thresholds."""
        return self.calibrates_recipe or self.calibrates_drift

    @property
    def calibrates_recipe(self) -> bool:
        return self.policy.needs_recipe and self.recipe is None

    @property
    def calibrates_drift(self) -> bool:
        return self.policy.needs_drift and self.drift.file is None


@dataclass(frozen=True, kw_only=True)
class RecipeRequest:
    """A recipe for ``policy`` in the file ``out`` (.json): calibrated, or the published list or curves ``from_published``.

    ``to_published``: a folder for the same budgets in the published format.
    """

    source: ModelSource
    policy: Policy
    out: Path
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)
    from_published: Path | None = None
    to_published: Path | None = None

    def __post_init__(self) -> None:
        check_reads_recipe(self.policy)
        if self.from_published is not None and self.calibration.prompts is not None:
            raise UsageError(
                "a published list is not calibrated, so it takes no prompts",
                got="--from-published and --prompts",
                expected="one of the two",
            )


@dataclass(frozen=True, kw_only=True)
class DriftRequest:
    """Drift thresholds for ``policy`` in the file ``out`` (.json), measured as ``drift`` specifies.

    ``recipe``: the budgets to measure with, if the policy reads a recipe; None: calibrated first.
    """

    source: ModelSource
    policy: Policy
    out: Path
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)
    drift: DriftPlan = field(default_factory=DriftPlan)
    recipe: Path | None = None

    def __post_init__(self) -> None:
        if not self.policy.needs_drift:
            raise UsageError(
                f"policy {self.policy.name!r} has no drift thresholds to calibrate",
                got=f"drift={self.policy.drift}",
                fix="take a policy that recalls pages, such as freekv, with --set drift=calibrated",
            )
        if self.drift.file is not None:
            raise UsageError("this command produces thresholds", got=f"--drift {self.drift.file}", fix="leave --drift out")
        check_recipe_is_read(self.policy, self.recipe)


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The monolithic graphs of ``source`` with ``policy`` in the new folder ``out``.

    ``recipe`` and ``drift``: files with budgets and thresholds per layer, if the policy needs them.
    """

    source: ModelSource
    policy: Policy
    out: Path
    recipe: Path | None = None
    drift: DriftPlan = field(default_factory=DriftPlan)

    def __post_init__(self) -> None:
        check_recipe_is_read(self.policy, self.recipe)
        check_drift_is_read(self.policy, self.drift)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Answers of ``engine`` to ``tasks`` (JSON lines). ``against``: another engine, or the results file of one.

    ``limit``: first tasks only. ``max_new_tokens``: generated per task; None: as many as its longest accepted answer needs.
    ``separator`` is put between prompt and expected answer if neither has white space there. ``out``: the results file,
    which is continued if it has answers; with ``force`` it is replaced. ``digest``: of the only ``engine`` to accept.
    """

    engine: Path
    tasks: Path
    against: Path | None = None
    match: Match = "exact"
    max_new_tokens: int | None = None
    separator: str = " "
    batch_size: int = 8
    limit: int | None = None
    out: Path | None = None
    force: bool = False
    on: DeviceChoice = field(default_factory=DeviceChoice)
    digest: str | None = None
    resources: ResourceChoice = field(default_factory=ResourceChoice)

    def __post_init__(self) -> None:
        counts = {"--max-new-tokens": self.max_new_tokens, "--batch-size": self.batch_size, "--limit": self.limit}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise UsageError(f"{name} is below 1", got=f"{name} {count}", expected=f"{name} >= 1")


def check_reads_recipe(policy: Policy) -> None:
    """Raise ``UsageError`` for a policy that does not read a recipe."""
    if not policy.needs_recipe:
        raise UsageError(
            f"policy {policy.name!r} reads no recipe", fix="calibrate a policy that does, e.g. --policy prefixkv, or freekv"
        )


def check_recipe_is_read(policy: Policy, recipe: Path | None) -> None:
    """Raise ``UsageError`` for a recipe that ``policy`` would ignore."""
    if recipe is not None and not policy.needs_recipe:
        raise UsageError(f"policy {policy.name!r} reads no recipe", got=f"--recipe {recipe}", fix="leave --recipe out")


def check_drift_is_read(policy: Policy, drift: DriftPlan) -> None:
    """Raise ``UsageError`` for options about drift thresholds that ``policy`` would ignore."""
    if drift.given and not policy.needs_drift:
        recalls = policy.recalls
        raise UsageError(
            f"policy {policy.name!r} " + ("has one fixed tau" if recalls else "recalls no pages, and has no drift thresholds"),
            got=", ".join(drift.given),
            fix="add --set drift=calibrated" if recalls else f"leave {drift.given[0].split()[0]} out, or take --policy freekv",
        )
