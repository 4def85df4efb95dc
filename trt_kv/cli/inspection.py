"""A text report on an engine: what it is, what each layer keeps, how large it is, and where each number came from."""

from collections.abc import Sequence
from pathlib import Path

from trt_kv.cache_layers import layer_name
from trt_kv.cli.generation_notes import attended_tokens
from trt_kv.cli.inspected_types import described_types
from trt_kv.drift import Drift
from trt_kv.engine_files import verify_files
from trt_kv.errors import EngineError
from trt_kv.kv_memory import kv_bytes, token_bytes
from trt_kv.layer_budget import ALL
from trt_kv.manifest import DRIFT_FILE, KV_DTYPES, RECIPE_FILE, Manifest, load_manifest, recorded_digest
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.recall_attention.page_counts import most_rows
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy import DECODES, GROUP_POOLINGS, METRIC_ROWS, PAGE_SUMMARIES, RESIDENCIES, Policy
from trt_kv.policy_settings import differences, setting_as_text
from trt_kv.printable import printable
from trt_kv.rebuild import build_command
from trt_kv.recipe import Recipe
from trt_kv.safe_path import safe_join

BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def describe_engine(folder: Path, *, digest: str | None = None) -> str:
    """Multi-line text. Raises ``EngineError`` for anything that is not a complete, unmodified engine, or not that of
    ``digest``.
    """
    manifest = load_manifest(folder, digest=digest)
    verify_files(folder, manifest)
    recipe = Recipe.load(safe_join(folder, RECIPE_FILE, error=EngineError)) if manifest.applied_policy.needs_recipe else None
    drift = Drift.load(safe_join(folder, DRIFT_FILE, error=EngineError)) if manifest.applied_policy.needs_drift else None
    sections = [
        _model(folder, manifest),
        _policy(manifest, recipe),
        _budgets(manifest, recipe),
        _taus(manifest, drift),
        [*_sizes(manifest), *_shared(folder, manifest)],
        _bits(manifest),
        [*_origins(manifest, recipe, drift), f"digest    {recorded_digest(folder)}"],
    ]
    return "\n\n".join("\n".join(map(printable, section)) for section in sections if section)


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A horizontal bar of ``width`` cells for a share in [0, 1], in steps of an eighth of a cell."""
    eighths = round(share * width * 8)
    return (_EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(width)


def _model(folder: Path, manifest: Manifest) -> list[str]:
    config = manifest.config
    heads = f"{config.n_heads} query / {config.n_kv_heads} KV heads of size {config.head_dim}"
    layers = f"{config.n_layers} layers of width {config.hidden_size}"
    return [
        f"engine    {folder}",
        f"model     {manifest.model_name}: {config.architecture}, {layers}, {heads}",
        f"          {config.max_positions} positions, vocabulary {config.vocab_size}",
        *_attention(manifest),
        *_rope(manifest.config),
        f"target    {manifest.target}, {manifest.dtype}, KV cache in {manifest.kv_dtype}, pages of {manifest.page_size} tokens",
        *_plan(manifest),
        *described_types(folder, manifest),
    ]


def _attention(manifest: Manifest) -> list[str]:
    """Windows and soft cap of attention, if there are any."""
    lines = []
    windows = manifest.windows[:: manifest.heads_apart]
    for window in sorted({window for window in windows if window}):
        layers = [layer for layer, other in enumerate(windows) if other == window]
        which = "every layer" if len(layers) == len(windows) else f"layers {', '.join(map(str, layers))}"
        lines.append(f"          a window of {window} tokens in {which}")
    soft_cap = manifest.config.attention_soft_cap
    return lines + ([f"          logits of attention capped at {soft_cap:g}"] if soft_cap else [])


def _rope(config: ModelConfig) -> list[str]:
    """How RoPE differs from that of every channel in every layer with one theta, if it does."""
    rope, facts = config.rope, []
    if rope.kind == "longrope":
        facts.append(
            f"longrope, factors for {'long' if config.max_positions > rope.original_max_positions else 'short'} contexts"
        )
    elif rope.kind != "default":
        facts.append(f"{rope.kind}, factor {rope.factor:g}")
    facts += [f"over {rope.rotary_dim} of {config.head_dim} channels"] if rope.rotary_dim else []
    if config.local_rope is not None:
        layers = ", ".join(map(str, config.local_rope_layers))
        facts.append(f"theta {rope.theta:g}, and {config.local_rope.theta:g} in layers {layers}")
    facts += [f"none in layers {', '.join(map(str, config.unrotated_layers))}"] if config.unrotated_layers else []
    return [f"          RoPE: {'; '.join(facts)}"] if facts else []


def _plan(manifest: Manifest) -> list[str]:
    if manifest.plan is None:
        return []
    meaning = {"N": "tokens", "B": "sequences", "T": "pages per sequence and layer", "M": "pages in the pool"}
    lines = [f"plan      {manifest.plan.file}, built by {manifest.plan.built_by}"]
    for ranges in manifest.plan.profiles:
        sizes = ", ".join(f"{meaning[axis]} {ranges[axis][0]}..{ranges[axis][2]}" for axis in meaning)
        lines.append(f"          for {sizes}")
    return lines


def _policy(manifest: Manifest, recipe: Recipe | None) -> list[str]:
    policy = manifest.policy
    lines = [f"policy    {policy.name}: {policy.summary}"]
    changed = differences(policy, policy_from_name(policy.name)) if policy.name in policy_names() else {}
    if changed:
        lines.append(f"changed   {' '.join(setting_as_text(name, value) for name, value in changed.items())}")
    applied = manifest.applied_policy
    if applied != policy and not (applied.evicts or applied.recalls):
        return [*lines, "          decides nothing here: every layer keeps its window, or all tokens"]
    if policy.evicts:
        lines += [
            f"score     {policy.score}{_details(policy)}: {policy.scoring.summary}",
            f"budget    {policy.budget}: {_budget(manifest)}",
            f"protected {_protected(policy)}",
            f"decoding  {policy.decode}: {DECODES[policy.decode]}",
        ]
    if policy.recalls:
        lines += [
            f"residency {policy.residency}: {RESIDENCIES[policy.residency]}",
            f"pages     {policy.page_summary}: {PAGE_SUMMARIES[policy.page_summary]}",
            f"          {policy.group_pooling}: {GROUP_POOLINGS[policy.group_pooling]}{_softmax(policy)}",
            f"budget    {policy.budget}: {_budget(manifest)}, for what one step attends to",
            f"protected first {policy.sinks} and last {policy.recent} tokens, in whole pages",
        ]
    if recipe is not None and recipe.mass is not None:
        lines.append(f"mass      {_mass(recipe, recipe.mass)}")
    return lines


def _mass(recipe: Recipe, mass: float) -> str:
    if recipe.heads is not None:
        return f"the KV heads together keep {mass:.1%} of what answers attend to (ranked by {recipe.score.described})"
    if recipe.surrogate is not None:
        return f"the KV heads together kept {mass:.1%} of what repetitions of the calibration prompts attend to"
    return f"each layer keeps {mass:.1%} of its importance ({recipe.score.described})"


def _details(policy: Policy) -> str:
    parts = [f"window {policy.window}"] if "window" in policy.scoring.settings else []
    parts += ["each KV head"] if policy.heads != "shared" else []
    parts += [f"pooling {policy.pooling}"] if policy.pooling > 1 else []
    return f" ({', '.join(parts)})" if parts else ""


def _softmax(policy: Policy) -> str:
    """The softmax scale, if it is not the published one."""
    return f", bounds scaled by {policy.softmax_scale:g}" if policy.softmax_scale != 1.0 else ""


def _budget(manifest: Manifest) -> str:
    policy, which = manifest.policy, " without a window" if any(manifest.windows) else ""
    told = {
        "constant": f"{policy.tokens} tokens in every layer{which}" + (", in whole pages" if policy.recalls else ""),
        "above": f"computed per input, a threshold that {policy.kept:.0%} of the calibration's tokens exceeded",
        "unimetric": f"computed per input, threshold {policy.threshold:.2%} of the norm of {METRIC_ROWS[policy.metric_row]}",
    }
    windows = manifest.windows[:: manifest.heads_apart]
    exempt = ", ".join(str(layer) for layer in policy.exempt_layers if not windows[layer])
    told_exempt = f"; layers {exempt} keep everything" if exempt else ""
    return told.get(policy.budget, f"{policy.kept:.0%} of the tokens, mean over layers{which}") + told_exempt


def _protected(policy: Policy) -> str:
    newest = f", newest {policy.recent_share:.0%} of the budget" if policy.recent_share else ""
    what = "KV head" if policy.heads == "own" else "layer"
    floor = f"; nothing while a {what} holds at most {policy.eviction_floor} tokens" if policy.eviction_floor else ""
    return f"first {policy.sinks} and last {policy.recent} prompt tokens{newest}{floor}"


def _budgets(manifest: Manifest, recipe: Recipe | None) -> list[str]:
    length = manifest.config.max_positions
    origin = RECIPE_FILE if recipe is not None else "the policy"
    recalls, windows = manifest.applied_policy.recalls, manifest.windows
    depends = recalls or any(windows) or any(budget is not None and budget.tokens for budget in manifest.budgets)
    at = f", at {length} tokens" if depends else ""
    what = "share attended to" if recalls else "kept share"
    per = "layer" if manifest.heads_apart == 1 else "layer and KV head"
    lines = [f"{what} per {per} (from {origin}{at})"]
    shares = _shares(manifest)
    for layer, (budget, share, window) in enumerate(zip(manifest.budgets, shares, windows, strict=True)):
        told = "computed for each input" if budget is None else f"{bar(share)} {share:6.1%}{'  window' if window else ''}"
        lines.append(f"  {layer_name(layer, manifest.heads_apart):>3} {told}")
    if None in manifest.budgets:
        return lines
    return [*lines, f" mean {' ' * BAR_WIDTH}{sum(shares) / len(shares):6.1%}"]


def _taus(manifest: Manifest, drift: Drift | None) -> list[str]:
    """Each layer's drift threshold, with the measurements if it was calibrated; empty if no layer recalls pages."""
    if not manifest.applied_policy.recalls:
        return []
    if drift is None:
        lines = ["drift threshold per layer (from the policy)"]
        return lines + [f"  {layer:>3} " + ("-" if tau is None else f"{tau:.4g}") for layer, tau in enumerate(manifest.taus)]
    lines = [
        f"drift threshold per layer (from drift.json, for a correction rate of {drift.correction_rate:.4g})",
        "      tau       mean cosine  same pages  KV heads corrected  steps with any",
    ]
    measured = {layer.layer: layer for layer in drift.layers}
    for layer, tau in enumerate(manifest.taus):
        if tau is None:
            lines.append(f"  {layer:>3} -")
            continue
        found = measured[layer]
        overlap = "-" if found.overlap is None else f"{found.overlap:.1%}"
        lines.append(f"  {layer:>3} {tau:<9.6f} {found.mean:>11.4f} {overlap:>11} {found.rate:>19.1%} {found.step_rate:>15.1%}")
    return lines


def _shares(manifest: Manifest) -> list[float]:
    """Kept share of each layer for a prompt that fills the model's positions, or share that a step attends to; 1 if it depends
    on the input. Of a layer with a window, the window's share.
    """
    length = manifest.config.max_positions
    if manifest.applied_policy.recalls:
        return [n / length for n in attended_tokens(manifest, length, length) or [length] * manifest.config.n_layers]
    return [
        min(window, length) / length if window else budget.of(length) / length if budget.tokens else budget.share
        for budget, window in zip((budget or ALL for budget in manifest.budgets), manifest.windows, strict=True)
    ]


def _sizes(manifest: Manifest) -> list[str]:
    config = manifest.cache_config
    of_token = kv_bytes(config, manifest.kv_dtype)
    full = of_token * config.n_layers * config.max_positions
    kept = of_token * config.max_positions * sum(_shares(manifest))
    total = sum(record.n_bytes for record in manifest.files.values())
    weights = manifest.files["graphs/weights.data" if manifest.plan is None else manifest.plan.file].n_bytes
    instead = f"at {config.max_positions} tokens, instead of {_megabytes(full)}"
    at_most = "at most " if None in manifest.budgets else ""
    recalls = manifest.applied_policy.recalls
    told = "attended" if recalls else "KV cache"
    lines = [
        f"size      {_megabytes(total)}, of which weights {_megabytes(weights)}",
        f"{told:<10}{at_most}{_megabytes(kept)} {instead} (computed from shapes and shares)",
    ]
    if recalls:
        host = of_token * sum(tau is not None for tau in manifest.taus) * config.max_positions
        rows = most_rows(manifest.programs["decode"], manifest.page_size, manifest.kv_dtype)
        summaries = _megabytes(host * rows / (2 * manifest.page_size))
        lines.append(f"on host   {_megabytes(host)} at {config.max_positions} tokens, and {summaries} of summaries")
    return lines


def _bits(manifest: Manifest) -> list[str]:
    """Bits of a cached token in the engine's type and in those that it can be loaded with."""
    config, on_gpus = manifest.config, manifest.plan is not None or manifest.dtype != "float32"
    others = token_bytes(config, manifest.kv_dtype) - kv_bytes(config, manifest.kv_dtype)
    sizes = {name: kv_bytes(config, name) for name in KV_DTYPES if name == manifest.kv_dtype or not on_gpus}
    rows = [*sizes.items(), ("positions and scores", others)]
    width = max(len(name) for name, _ in rows)
    return [
        f"bits of a token in the KV cache{'' if on_gpus else ' (--kv-dtype loads the engine with another type)'}",
        f"  {'':<{width}} {'in a layer':>12} {'in all':>12}",
        *(
            f"  {name:<{width}} {8 * n:>12,} {8 * n * config.n_layers:>12,}"
            + ("  this engine" if name == manifest.kv_dtype else "  besides, in every type" if name not in sizes else "")
            for name, n in rows
        ),
    ]


def _shared(folder: Path, manifest: Manifest) -> list[str]:
    """What other folders have too, as hard links."""
    links = {name: (folder / name).stat().st_nlink for name in manifest.files}
    return [
        f"shared    {name}, {_megabytes(manifest.files[name].n_bytes)}: one file on the disk with {n - 1} more names"
        for name, n in links.items()
        if n > 1
    ]


def _origins(manifest: Manifest, recipe: Recipe | None, drift: Drift | None) -> list[str]:
    lines = [f"source    {manifest.model_source}, {_short(manifest.model_digest)}"]
    if recipe is not None:
        record = recipe.calibration
        seed = "" if record.seed is None else f", seed {record.seed}"
        lines.append(
            f"recipe    from {recipe.score.described}, {len(record.samples)} samples{_lengths(recipe)}: {record.source}{seed}"
        )
    if drift is not None:
        origin = drift.calibration
        seed = "" if origin.seed is None else f", seed {origin.seed}"
        lines.append(f"drift     {drift.n_steps} steps after {len(origin.samples)} samples: {origin.source}{seed}")
    return [
        *lines,
        f"made by   {manifest.created_by}",
        f"rebuild   {build_command(manifest.reproduce) or 'unknown'}",
        f"verified  {len(manifest.files)} files against their digests",
    ]


def _lengths(recipe: Recipe) -> str:
    lengths: Sequence[int] = [sample.n_tokens for sample in recipe.calibration.samples]
    return f" of {min(lengths)} to {max(lengths)} tokens" if lengths else ""


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"


def _short(digest: str) -> str:
    return digest[:19] + "..."
