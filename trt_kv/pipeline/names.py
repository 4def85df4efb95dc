"""The default name of what a request makes: the model, the policy, and every option that is not at its default."""

import hashlib
import re
from pathlib import Path

from trt_kv.export.checkpoints.hub import hub_id_of
from trt_kv.pipeline.plans import CalibrationPlan, DriftPlan, TargetPlan, WeightPlan
from trt_kv.pipeline.requests import BuildRequest
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy_settings import differences, setting_as_text

LONGEST = 120
"""Bytes of a name before the rest of it becomes a digest; file systems allow 255, and a build adds some to its own folder's."""


def default_name(request: BuildRequest) -> str:
    """E.g. ``llama3-prefixkv``, ``llama3-freekv-tokens=256-page-size=8``, ``Llama-3.2-1B-snapkv-budget=0.2``.

    A checkpoint is named by its last folder or its file, a hub repository also by its revision, and files have no suffix.
    Requests that differ only in folders further up, in suffixes, or in characters that file names should not have, share a
    name. ``request.out`` is not read.
    """
    source, policy = request.source, request.policy
    model = _checkpoint_name(source.checkpoint) if source.checkpoint else source.model
    preset = policy_from_name(policy.name) if policy.name in policy_names() else policy
    changed = differences(policy, preset)
    settings = [setting_as_text("budget" if name == "kept" else name, value) for name, value in changed.items()]
    options = {
        "context": source.context,
        "recipe": _stem(request.recipe),
        **(_drift_options(request.drift) if policy.needs_drift else {}),
        **(_calibration_options(request.calibration) if request.calibrates else {}),
        **_target_options(request.target),
    }
    settings += [f"{name}={value}" for name, value in options.items() if value is not None]
    settings += [request.weights.quant, *_quant_options(request.weights)] if request.weights.quantization is not None else []
    return _as_file_name("-".join([model, policy.name, *settings]))


def _checkpoint_name(checkpoint: str) -> str:
    """The name of the folder or file as the user writes it, a link's own; that of a hub repository, or of a file in it."""
    hub_id = hub_id_of(checkpoint)
    if hub_id is not None:
        name = (hub_id.file or hub_id.repository).rpartition("/")[2].removesuffix(".gguf")
        return name if hub_id.revision is None else f"{name}@{hub_id.revision}"
    path = Path(checkpoint)
    return (path.resolve() if ".." in path.parts else path.absolute()).name.removesuffix(".gguf")


def _drift_options(drift: DriftPlan) -> dict[str, object]:
    default = DriftPlan()
    return {
        "drift": _stem(drift.file),
        "correction-rate": _unless(drift.correction_rate, default.correction_rate),
        "new-tokens": _unless(drift.new_tokens, default.new_tokens),
    }


def _calibration_options(plan: CalibrationPlan) -> dict[str, object]:
    default = CalibrationPlan()
    return {
        "prompts": _stem(plan.prompts),
        "samples": _unless(plan.samples, default.samples),
        "seed": _unless(plan.seed, default.seed),
    }


def _target_options(target: TargetPlan) -> dict[str, object]:
    default = TargetPlan()
    return {
        "target": _unless(target.target, default.target),
        "profile": None if target.profile is None else _stem(Path(target.profile)),
        "dtype": target.dtype,
        "kv-dtype": target.kv_dtype,
        "page-size": _unless(target.page_size, default.page_size),
    }


def _quant_options(plan: WeightPlan) -> list[str]:
    """What of the quantisation is not at its default."""
    chosen, default = plan.quantization, WeightPlan(quant=plan.quant).quantization
    assert chosen is not None
    assert default is not None
    words = [f"block-size={chosen.block_size}"] if chosen.block_size != default.block_size else []
    words += ["symmetric" if chosen.symmetric else "asymmetric"] if chosen.symmetric != default.symmetric else []
    return words + ([f"level={chosen.accuracy_level}"] if chosen.accuracy_level != default.accuracy_level else [])


def _unless(value: object, default: object) -> object:
    return None if value == default else value


def _stem(path: Path | None) -> str | None:
    return None if path is None else path.stem


def _as_file_name(name: str) -> str:
    name = re.sub(r"[^\w.,=+-]+", "_", name)
    if len(name.encode()) <= LONGEST:
        return name
    beginning = name.encode()[:LONGEST].decode(errors="ignore")
    return f"{beginning}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
