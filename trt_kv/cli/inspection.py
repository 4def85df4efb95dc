"""An engine told in text: what it is, what each layer keeps, how large it is, and where each number came from."""

from collections.abc import Sequence
from pathlib import Path

from trt_kv.manifest import Manifest, load_manifest, verify_files
from trt_kv.policy import SCORES
from trt_kv.recipe import Recipe

BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def describe_engine(folder: Path) -> str:
    """Many lines of text. Raises ``EngineError`` for anything that is not a complete, untouched engine."""
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    recipe = Recipe.load(folder / "recipe.json") if manifest.policy.needs_recipe else None
    sections = (
        _model(folder, manifest),
        _policy(manifest, recipe),
        _budgets(manifest, recipe),
        _sizes(manifest),
        _origins(manifest, recipe),
    )
    return "\n\n".join("\n".join(section) for section in sections)


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
        f"target    {manifest.target}, {manifest.dtype}, pages of {manifest.page_size} tokens",
        *_plan(manifest),
    ]


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
    if policy.evicts:
        window = f", window {policy.window}" if policy.score == "window" else ""
        lines += [
            f"score     {policy.score}{window}: {SCORES[policy.score]}",
            f"budget    {policy.budget}: {policy.kept:.0%} of the tokens, mean over layers",
            f"always    first {policy.sinks} and last {policy.recent} prompt tokens",
        ]
    if recipe is not None and recipe.mass is not None:
        lines.append(f"mass      each layer keeps {recipe.mass:.1%} of its importance")
    return lines


def _budgets(manifest: Manifest, recipe: Recipe | None) -> list[str]:
    shares = manifest.kept_shares
    origin = "recipe.json" if recipe is not None else "the policy"
    lines = [f"kept share per layer (from {origin})"]
    lines += [f"  {layer:>3} {bar(share)} {share:6.1%}" for layer, share in enumerate(shares)]
    return [*lines, f" mean {' ' * BAR_WIDTH}{sum(shares) / len(shares):6.1%}"]


def _sizes(manifest: Manifest) -> list[str]:
    config = manifest.config
    token_bytes = 2 * config.n_kv_heads * config.head_dim * (4 if manifest.dtype == "float32" else 2)
    full = token_bytes * config.n_layers * config.max_positions
    kept = token_bytes * config.max_positions * sum(manifest.kept_shares)
    total = sum(record.n_bytes for record in manifest.files.values())
    weights = manifest.files["graphs/weights.data" if manifest.plan is None else manifest.plan.file].n_bytes
    instead = f"at {config.max_positions} tokens, instead of {_megabytes(full)}"
    return [
        f"size      {_megabytes(total)}, of which weights {_megabytes(weights)}",
        f"KV cache  {_megabytes(kept)} {instead} (computed from shapes and shares)",
    ]


def _origins(manifest: Manifest, recipe: Recipe | None) -> list[str]:
    lines = [f"weights   {manifest.model_source}, {_short(manifest.model_digest)}"]
    if recipe is not None:
        record = recipe.calibration
        seed = "" if record.seed is None else f", seed {record.seed}"
        lines.append(f"recipe    {recipe.method}, {len(record.samples)} samples{_lengths(recipe)}: {record.source}{seed}")
    return [
        *lines,
        f"made by   {manifest.created_by}",
        f"again     {manifest.reproduce}",
        f"verified  {len(manifest.files)} files against their digests",
    ]


def _lengths(recipe: Recipe) -> str:
    lengths: Sequence[int] = [sample.n_tokens for sample in recipe.calibration.samples]
    return f" of {min(lengths)} to {max(lengths)} tokens" if lengths else ""


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"


def _short(digest: str) -> str:
    return digest[:19] + "..."
